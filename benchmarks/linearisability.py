"""Several services and workers over one database, many clients at once, and a checker that replays the log.

    python -m benchmarks.linearisability [--requests 20000] [--services 3] [--workers 2] [--clients 8] [--seed 0]

Clients send a mixture of calls to services in turn: observations with request ids (some of them repeated, also at
another service, and some with another body under a used id), predictions for known ids and new texts, selections (some
repeated, some with other arguments), new prompts, states of the run and of prompts, refits, rewinds and retractions.
Afterwards one more
replica, in this process and alone, folds the log from its beginning entry by entry, without checkpoints, and answers
every prediction and selection again at the log position that the answer names. A violation is:

- *fold*: an answer that is not the one of its log position, to the last bit.
- *order*: an answer whose log position is below that of a call which was acknowledged before this one was sent.
- *log*: an acknowledged write that is not in the log exactly once at the position that was answered, or an entry that
  nobody sent, or a gap.
- *repetition*: a repeated call that was answered otherwise than the first time, or a conflicting one that was not
  refused with 409.
- *refusal*: any other reply than success.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import psycopg
from benchmarks.bad_weather import postgresql
from benchmarks.kills import serving, working
from fastapi.testclient import TestClient
from sqlalchemy import Engine, select

from evenodds_service.api.app import create_app
from evenodds_service.domain.log_entries import Entry
from evenodds_service.storage.engine import open_engine
from evenodds_service.storage.migration import upgrade
from evenodds_service.storage.store import NewSelection, Run, Selection, Store, Written
from evenodds_service.storage.tables import log, runs, selections

RUN = "replicas"
POOL_SIZE = 400
GROUP_SIZE = 8
KINDS = {
    "observe": 0.42,
    "predict": 0.3,
    "select": 0.1,
    "prompts": 0.04,
    "run": 0.06,
    "prompt": 0.0587,
    "refit": 0.02,
    "retract": 0.001,
    "rewind": 0.0003,
}
VOIDS = ("retract", "rewind")
_REPEATED = 0.2
_WORDS = ("find", "number", "triangle", "integer", "sum", "angle", "prime", "digits", "circle", "area")


@dataclass(frozen=True, slots=True)
class Call:
    """One request with its reply. Times are of one monotonic clock, in seconds."""

    kind: str
    method: str
    path: str
    body: Mapping[str, Any] | None
    status: int
    reply: Mapping[str, Any]
    sent: float
    answered: float
    of: str = ""
    """For calls that are sent more than once: what they have in common. `!` before it: with another body."""


class Clients:
    """Threads that send `n_requests` calls in all to services in turn.

    Args:
        base_urls: Of the services, at least one.
        seed: Of what is sent.
    """

    def __init__(self, base_urls: Sequence[str], n_clients: int, n_requests: int, *, seed: int) -> None:
        self.calls: list[Call] = []
        self._base_urls = base_urls
        self._left = itertools.count(1)
        self._n_requests = n_requests
        self._numbers = itertools.count(1)
        self._steps = itertools.count(1)
        self._head = self._newest = 0
        self._n_prompts = itertools.count(POOL_SIZE)
        self._failure: BaseException | None = None
        self._threads = [
            threading.Thread(target=self._work, args=(random.Random(f"{seed}-{i}"),)) for i in range(n_clients)
        ]

    def run(self) -> list[Call]:
        """Send everything; returns the calls in the order of their replies."""
        for thread in self._threads:
            thread.start()
        for thread in self._threads:
            thread.join()
        if self._failure is not None:
            raise self._failure
        return sorted(self.calls, key=lambda call: call.answered)

    def _work(self, chance: random.Random) -> None:
        try:
            with ExitStack() as stack:
                https = [stack.enter_context(httpx.Client(base_url=url, timeout=60)) for url in self._base_urls]
                while next(self._left) <= self._n_requests:
                    kind = chance.choices(tuple(KINDS), tuple(KINDS.values()))[0]
                    method, path, body, of = getattr(self, f"_{kind}")(chance)
                    self._send(chance.choice(https), kind, method, path, body, of)
                    if of and chance.random() < _REPEATED and next(self._left) <= self._n_requests:
                        other = chance.random() < 0.3
                        body = {**body, "step": body["step"] + 1} if other and kind == "observe" else body
                        body = {**body, "seed": 1} if other and kind == "select" else body
                        of = f"!{of}" if other and kind != "prompts" else of
                        self._send(chance.choice(https), kind, method, path, body, of)
        except BaseException as error:
            self._failure = error
            raise

    def _send(
        self, http: httpx.Client, kind: str, method: str, path: str, body: Mapping[str, Any] | None, of: str
    ) -> None:
        sent = time.monotonic()
        reply = http.request(method, path, json=body)
        answered = time.monotonic()
        self.calls.append(Call(kind, method, path, body, reply.status_code, reply.json(), sent, answered, of))

    def _observe(self, chance: random.Random) -> tuple[str, str, dict[str, Any], str]:
        number = self._newest = next(self._numbers)
        ids = chance.sample(range(POOL_SIZE), chance.choice((1, 4, 16)))
        rows = [{"prompt_id": f"p{i}", "successes": _successes(i, chance), "attempts": GROUP_SIZE} for i in ids]
        if chance.random() < 0.1:
            rows.append({"text": f"Prove: {_text(chance)} {number}.", "successes": 1, "attempts": GROUP_SIZE})
        step = max(0, self._head - chance.choice((0, 0, 0, 1, 3)))
        body = {"run": RUN, "step": step, "request_id": f"r{number}", "observations": rows}
        return "POST", "/observe", body, f"r{number}"

    def _predict(self, chance: random.Random) -> tuple[str, str, dict[str, Any], str]:
        items: list[dict[str, Any]] = [{"prompt_id": f"p{chance.randrange(POOL_SIZE)}"} for _ in range(6)]
        if chance.random() < 0.4:
            items.insert(chance.randrange(6), {"text": f"Compute: {_text(chance)}."})
        return "POST", "/predict", {"run": RUN, "prompts": items}, ""

    def _select(self, chance: random.Random) -> tuple[str, str, dict[str, Any], str]:
        step = self._head = next(self._steps)
        body = {"run": RUN, "step": step, "batch_size": chance.choice((4, 16)), "seed": 0}
        return "POST", "/select_batch", body, f"step {step}"

    def _prompts(self, chance: random.Random) -> tuple[str, str, dict[str, Any], str]:
        i = next(self._n_prompts)
        prompt = {"prompt_id": f"p{i}", "text": f"Compute: {_text(chance)} {i}."}
        return "POST", f"/runs/{RUN}/prompts", {"prompts": [prompt]}, f"p{i}"

    def _run(self, _: random.Random) -> tuple[str, str, None, str]:
        return "GET", f"/runs/{RUN}", None, ""

    def _prompt(self, chance: random.Random) -> tuple[str, str, None, str]:
        return "GET", f"/runs/{RUN}/prompts/p{chance.randrange(POOL_SIZE)}", None, ""

    def _retract(self, chance: random.Random) -> tuple[str, str, dict[str, Any], str]:
        """A whole report, or the outcomes of a few prompts in a few steps."""
        if chance.random() < 0.5:
            newest = self._newest
            body: dict[str, Any] = {"request_id": f"r{chance.randint(max(1, newest - 200), max(1, newest))}"}
        else:
            ids = [f"p{i}" for i in chance.sample(range(POOL_SIZE), 10)]
            body = {"prompt_ids": ids, "from_step": max(0, self._head - 20), "to_step": self._head}
        return "POST", f"/runs/{RUN}/retract", body, ""

    def _rewind(self, chance: random.Random) -> tuple[str, str, dict[str, Any], str]:
        return "POST", f"/runs/{RUN}/rewind", {"step": max(0, self._head - chance.randint(0, 5))}, ""

    def _refit(self, _: random.Random) -> tuple[str, str, dict[str, Any], str]:
        return "POST", f"/runs/{RUN}/refit", {}, ""


def _text(chance: random.Random) -> str:
    return " ".join(chance.choice(_WORDS) for _ in range(8))


def _successes(i: int, chance: random.Random) -> int:
    return chance.randint(0, 3) + 5 * (i % 2)


def prepare(http: httpx.Client) -> None:
    """Create the run with its pool."""
    chance = random.Random(0)
    settings = {"group_size": GROUP_SIZE, "refit": {"every_observations": 1_000}}
    http.put(f"/runs/{RUN}", json=settings).raise_for_status()
    pool = [
        {"prompt_id": f"p{i}", "text": f"{'Compute' if i % 2 else 'Prove'}: {_text(chance)} {i}."}
        for i in range(POOL_SIZE)
    ]
    http.post(f"/runs/{RUN}/prompts", json={"prompts": pool}).raise_for_status()


@dataclass
class Verdict:
    """How many calls of each kind were checked, and every violation in words."""

    calls: Counter[str] = field(default_factory=Counter)
    entries: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)


def check(engine: Engine, calls: Sequence[Call]) -> Verdict:
    """Hold the calls, in the order of their replies, against the log. Takes the engine over."""
    verdict = Verdict(calls=Counter(call.kind for call in calls))
    rows = _rows(engine)
    verdict.entries = Counter(row["kind"] for row in rows)
    say = verdict.violations.append
    if [row["position"] for row in rows] != list(range(1, len(rows) + 1)):
        say("log: its positions have gaps")
    voids = [row["position"] for row in rows if row["kind"] in VOIDS]
    _check_repetitions(calls, voids, say)
    _check_log(calls, rows, engine, say)
    _check_order(calls, rows, engine, say)
    _check_fold(calls, voids, engine, say)
    return verdict


def _rows(engine: Engine) -> list[dict[str, Any]]:
    statement = select(log).join(runs).where(runs.c.name == RUN).order_by(log.c.position)
    with engine.connect() as connection:
        return [dict(row) for row in connection.execute(statement).mappings()]


def _entries_of_selections(engine: Engine) -> dict[str, int]:
    with engine.connect() as connection:
        statement = select(selections.c.selection_id, selections.c.log_position)
        return {row[0]: row[1] for row in connection.execute(statement)}


def _check_repetitions(calls: Sequence[Call], voids: Sequence[int], say: Any) -> None:
    """What was said before is answered as before, and with another body refused; unless it was voided meanwhile."""
    first: dict[str, Call] = {}
    fields = {
        "observe": ("log_position", "accepted", "model_version"),
        "select": ("selection_id", "prompts", "forecast"),
    }
    for call in calls:
        of = call.of.removeprefix("!")
        if call.status >= 400:
            if not (of != call.of and call.status == 409):
                say(f"refusal: {call.method} {call.path} {call.of}: {call.status} {call.reply.get('detail')}")
            continue
        if not of or call.kind not in fields:
            continue
        earlier = first.get(of)
        if not call.reply["replayed"]:
            at = call.reply["log_position"]
            if earlier is not None and not any(earlier.reply["log_position"] < void <= at for void in voids):
                say(f"repetition: {call.of} was answered anew at {at}, and nothing was voided")
            first[of] = call
        elif earlier is None or of != call.of:
            say(f"repetition: {call.of} was answered as a repetition")
        elif any(call.reply[name] != earlier.reply[name] for name in fields[call.kind]):
            say(f"repetition: {call.of} was answered {earlier.reply}, and then {call.reply}")


def _check_log(calls: Sequence[Call], rows: Sequence[Mapping[str, Any]], engine: Engine, say: Any) -> None:
    observed = {(row["request_id"], row["position"]): row for row in rows if row["kind"] == "observe"}
    acknowledged = {
        (call.of.removeprefix("!"), call.reply["log_position"]): call
        for call in calls
        if call.kind == "observe" and call.status < 400 and not call.reply["replayed"]
    }
    standing = [row["request_id"] for row in observed.values() if row["voided_at"] is None]
    if len(set(standing)) != len(standing):
        say("log: a request id stands twice")
    if acknowledged.keys() != observed.keys():
        say(f"log: {acknowledged.keys() ^ observed.keys()} are acknowledged or in the log, not both")
    for key, call in acknowledged.items():
        row = observed.get(key)
        if row is None:
            continue
        body, sent = json.loads(row["body"]), call.body or {}
        same = [float(item["successes"]) for item in sent["observations"]] == body["successes"]
        if not same or row["step"] != sent["step"]:
            say(f"log: {key[0]} was answered with position {key[1]}, where another one is")
    chosen = {call.reply["selection_id"] for call in calls if call.kind == "select" and call.status < 400}
    stored = _entries_of_selections(engine)
    at = [row["position"] for row in rows if row["kind"] == "select"]
    if chosen != stored.keys() or sorted(stored.values()) != at:
        say(f"log: {len(chosen)} selections were answered, {len(stored)} are stored, {len(at)} are in the log")


def _position(call: Call, entries_of_selections: Mapping[str, int]) -> int:
    """How much of the log the call proves to be there, for all who ask after it was answered."""
    if call.kind == "refit":
        return 0
    if call.kind == "select":
        return entries_of_selections.get(call.reply["selection_id"], 0)
    return int(call.reply["log_position"])


def _check_order(calls: Sequence[Call], rows: Sequence[Mapping[str, Any]], engine: Engine, say: Any) -> None:
    """Whoever sends a call after another one was answered is answered from no earlier state."""
    entries = _entries_of_selections(engine)
    good = [call for call in calls if call.status < 400 and call.kind != "refit"]
    by_sending = sorted(good, key=lambda call: call.sent)
    proven, done = 0, 0
    for call in by_sending:
        while done < len(good) and good[done].answered < call.sent:
            proven = max(proven, _position(good[done], entries))
            done += 1
        if call.reply.get("replayed"):
            continue  # the first answer, from its own time
        at = call.reply["log_position"]
        if at < proven or (call.kind == "observe" and at <= proven):
            say(f"order: {call.method} {call.path} {call.of} was answered at {at}, {proven} had been acknowledged")


class _Past(Store):
    """The store as it was at a log position, for one run: what came later is not there, and nothing is written."""

    def __init__(self, engine: Engine, voids: Sequence[int]) -> None:
        super().__init__(engine)
        self.position = 0
        self._voids = voids
        self._now: Run | None = None

    def run(self, name: str) -> Run:
        self._now = self._now or super().run(name)
        void_position = max((void for void in self._voids if void <= self.position), default=0)
        return replace(self._now, log_position=self.position, void_position=void_position)

    def entries(self, run_id: int, *, after: int, limit: int = 1_000, **more: Any) -> tuple[Entry, ...]:
        return super().entries(run_id, after=after, limit=min(limit, self.position - after), **more)

    def newest_checkpoint(self, run_id: int, *, at_most: int | None = None) -> tuple[int, bytes] | None:
        return None

    def give_up_checkpoints(self, run_id: int, **_: Any) -> bool:
        return False

    def run_and_selection(self, name: str, step: int, *, arguments_hash: str) -> tuple[Run, Selection | None]:
        return self.run(name), None

    def record_selection(self, run_id: int, chosen: NewSelection, *, now: datetime) -> tuple[Selection, Written | None]:
        recorded = (chosen.selection_id, chosen.step, chosen.arguments_hash, chosen.reply)
        return Selection(*recorded, log_position=self.position), None


_FIRST_TIME = {"selection_id": None, "replayed": False}


def _check_fold(calls: Sequence[Call], voids: Sequence[int], engine: Engine, say: Any) -> None:
    """A replica that folds the log entry by entry, and again after what was voided, answers every question again."""
    asked = [c for c in calls if c.kind in ("predict", "select", "prompt") and c.status < 400]
    asked.sort(key=lambda call: call.reply["log_position"])
    past = _Past(engine, voids)
    app = create_app(past)
    with TestClient(app, base_url="http://localhost") as replica:
        for call in asked:
            for position in range(past.position + 1, call.reply["log_position"] + 1):
                past.position = position
                app.state.services.live_runs.at_head(RUN)
            again = replica.request(call.method, call.path, json=call.body).json()
            theirs = dict(call.reply)
            if call.kind == "select":
                again, theirs = {**again, **_FIRST_TIME}, {**theirs, **_FIRST_TIME}
            if call.kind == "prompt":  # its history is read from the log, whose tail is there by now
                again["history"] = theirs["history"]
            if again != theirs:
                say(f"fold: {call.method} {call.path} {call.of} at {past.position}: was {theirs}, due is {again}")


def run(url: str, base_urls: Sequence[str], *, n_clients: int, n_requests: int, seed: int = 0) -> tuple[Verdict, float]:
    """Send the requests to services over an empty database, and check them. Returns also the seconds of the sending."""
    with httpx.Client(base_url=base_urls[0], timeout=60) as http:
        prepare(http)
    began = time.monotonic()
    calls = Clients(base_urls, n_clients, n_requests, seed=seed).run()
    seconds = time.monotonic() - began
    engine = open_engine(url, timeout_seconds=60)
    try:
        return check(engine, calls), seconds
    finally:
        engine.dispose()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--services", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    os.environ["EVENODDS_SNAPSHOTS"] = "1000000"  # who folds the whole log again needs all of them
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="evenodds-replicas-")))
        server = stack.enter_context(postgresql(folder))
        with psycopg.connect(server.url, autocommit=True) as connection:
            connection.execute("ALTER SYSTEM SET fsync = off")  # nobody pulls the plug here
            connection.execute("SELECT pg_reload_conf()")
        upgrade(open_engine(server.url))
        base_urls = [stack.enter_context(serving(server.url)) for _ in range(options.services)]
        for _ in range(options.workers):
            stack.enter_context(working(server.url))
        verdict, seconds = run(
            server.url, base_urls, n_clients=options.clients, n_requests=options.requests, seed=options.seed
        )
    print(
        f"{verdict.calls.total()} requests in {seconds:.0f} s by {options.clients} clients to {options.services} "
        f"services with {options.workers} workers: {dict(verdict.calls)}\nlog: {dict(verdict.entries)}\n"
        f"violations: {len(verdict.violations)} {dict(Counter(v.partition(':')[0] for v in verdict.violations))}"
    )
    for violation in verdict.violations[:20]:
        print(f"  {violation[:1_000]}")
    raise SystemExit(int(bool(verdict.violations)))


if __name__ == "__main__":
    main()
