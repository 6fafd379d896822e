"""What must be so whatever happens, held against the database's file and against a fold of the log from its beginning.

The file is read by plain SQL, not by the store: a fault of the store should not excuse itself.
"""

from __future__ import annotations

import json
import math
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
from sqlalchemy import Engine
from tests.simulation.world import World

from evenodds.schemas import PredictRequest, SelectRequest
from evenodds_service.api.routes import training
from evenodds_service.domain.learning.checkpoint import from_bytes, to_bytes
from evenodds_service.domain.log_entries import Entry
from evenodds_service.runtime.live_runs import LiveRuns
from evenodds_service.storage.store import Run, Snapshot, Store

MARK = 2.0**-20
"""A power of two: successes that carry a mark are exact in binary."""

LOOKED_AT = 24
"""Replies of a run that are held against the fold at the end of a seed."""

_SAME = ("log_position", "accepted", "model_version")
_REFUSALS = {
    401: {"key_invalid"},
    404: {"run_unknown", "prompt_unknown", "selection_unknown"},
    409: {"request_conflict", "selection_conflict", "selection_voided", "not_enough_prompts", "prompt_conflict"},
    422: {"malformed"},
    503: {"store_unavailable", "log_compacted", "pool_changed"},
}


@dataclass(frozen=True)
class Reply:
    """What a service answered with 200."""

    what: str
    run: str
    asked: Mapping[str, Any]
    told: Mapping[str, Any]


@dataclass
class History:
    """All that the services answered, checked as it comes, and whole at the end.

    Attributes:
        proven: By run, the newest log position that somebody was told of.
        first: By run and request id, the first answer to a report.
        rates: By prompt, the true share of successes among its attempts.
        forecasts: Predicted and true success rate of prompts with 16 attempts and more.
    """

    world: World
    path: Path
    rates: Mapping[str, float]
    is_skewed: bool
    proven: Counter[str] = field(default_factory=Counter)
    replies: list[Reply] = field(default_factory=list)
    first: dict[tuple[str, str], Reply] = field(default_factory=dict)
    forecasts: list[tuple[float, float]] = field(default_factory=list)
    erased: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._file = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
        self._file.row_factory = sqlite3.Row
        self._refits: dict[int, sqlite3.Row] = {}
        self._snapshots: dict[tuple[int, int], bytes] = {}  # as published; most are dropped later
        self._open: list[dict[str, int]] = []  # what was proven as each request began that is being answered
        self._deleting: Counter[str] = Counter()  # by run, how many deletions are being answered

    def close(self) -> None:
        self._file.close()

    def rows(self, statement: str, *values: object) -> list[sqlite3.Row]:
        return self._file.execute(statement, values).fetchall()

    # At each step.

    def committed(self) -> None:
        """After each transaction that wrote."""
        for row in self.rows(
            "SELECT name, log_position AS head, base_position + count(position) AS n, "
            "coalesce(max(position), base_position) AS newest "
            "FROM runs LEFT JOIN log ON run_id = id AND position > base_position GROUP BY id"
        ):
            if not row["head"] == row["n"] == row["newest"]:
                self.world.violated(f"the log of {row['name']} has gaps: {dict(row)}")
        kept = "SELECT name FROM runs WHERE json_extract(settings, '$.keep_text') = 0 AND id IN "
        for row in self.rows(f"{kept}(SELECT run_id FROM prompts WHERE text IS NOT NULL)"):
            self.world.violated(f"{row['name']} keeps no texts, and there is one")
        known, self._snapshots = self._snapshots, {}
        for row in self.rows("SELECT run_id, version, weights FROM snapshots"):
            self._snapshots[row["run_id"], row["version"]] = row["weights"] or known[row["run_id"], row["version"]]
            self.world.sometimes["a snapshot was dropped"] += not row["weights"]
        for row in self.rows("SELECT * FROM refits"):
            before = self._refits.get(row["id"])
            self._refits[row["id"]] = row
            if before is not None and row["attempts"] != before["attempts"]:
                self._check_lease(before, row)
            if before is not None and before["status"] == "done" and tuple(row) != tuple(before):
                self.world.violated(f"refit {row['id']} was done, and changed: {dict(before)}, {dict(row)}")

    def _check_lease(self, before: sqlite3.Row, after: sqlite3.Row) -> None:
        """A refit was claimed: it waited, or its lease had run out."""
        if before["status"] == "pending" or self.is_skewed:
            return
        now = self.world.now().replace(tzinfo=None).isoformat(sep=" ")
        if before["status"] != "running" or before["lease_until"] > now:
            self.world.violated(f"refit {after['id']} was claimed at {now} from who holds it: {dict(before)}")

    @contextmanager
    def answering(self, request: httpx.Request) -> Iterator[Mapping[str, int]]:
        """While a request is answered: what is proven as it begins, since its answer may not be older.

        A run that is deleted meanwhile, and perhaps made again, may be met before or after that by who asks at the same
        time: nothing is proven of it.
        """
        deleted = _deleted_by(request)
        before = dict(self.proven)
        self._open.append(before)
        if deleted is not None:
            self._deleting[deleted] += 1
            self._forget(deleted)
        try:
            yield before
        finally:
            if deleted is not None:
                self._forget(deleted)
                self._deleting[deleted] -= 1
            self._open = [each for each in self._open if each is not before]

    def _forget(self, run: str) -> None:
        for proven in (self.proven, *self._open):
            proven[run] = 0

    def answered(self, before: Mapping[str, int], request: httpx.Request, status: int, body: bytes) -> None:
        """A service has answered; whether anybody hears it is another matter."""
        told = json.loads(body) if body else {}
        where = f"{request.method} {request.url.path}"
        self.world.say(f"{where} -> {status} {told.get('code', '')}{told.get('log_position', '')}")
        if status >= 400:
            self.world.sometimes[f"answered {told['code']}"] += 1
            if told["code"] not in _REFUSALS.get(status, ()):
                self.world.violated(f"{where} {request.content!r:.300} was answered {status} {told}")
            return
        asked = json.loads(request.content) if request.content else {}
        run = told.get("run") or str(request.url.path).split("/")[2]
        reply = Reply(where.rpartition("/")[2] if "runs" in where else where, run, asked, told)
        if request.method == "DELETE":
            if _deleted_by(request) is not None:
                self._deleted(run)
            return
        at = told.get("log_position")
        if at is not None and not told.get("replayed"):
            if at < before.get(run, 0):
                self.world.violated(f"{where} was answered at {at}, after {before[run]} had been told")
            if not self._deleting[run]:
                self.proven[run] = max(self.proven[run], at)
        if request.url.path == "/observe":
            self._observed(reply)
        elif request.url.path == "/select_batch":
            self._selected(reply)
        elif request.url.path == "/predict":
            self._predicted(reply)
        elif reply.what in ("rewind", "retract"):
            self._voided(reply)

    def _observed(self, reply: Reply) -> None:
        """What was acknowledged is in the log, once, and a repetition is answered as the first time."""
        run, told, asked = reply.run, reply.told, reply.asked
        found = self.rows(
            "SELECT log.* FROM log JOIN runs ON run_id = id WHERE name = ? AND position = ?", run, told["log_position"]
        )
        sent = [float(each["successes"]) for each in asked["observations"]]
        if not found and self._base_of(run) >= told["log_position"]:
            return  # it is in the state that the log begins from
        if not found or json.loads(found[0]["body"])["successes"] != sent or found[0]["step"] != asked["step"]:
            self.world.violated(f"an acknowledged report is not where it should be: {asked} {told}")
        key = (run, asked.get("request_id") or "")
        if not key[1]:
            return
        earlier = self.first.get(key)
        if self._was_voided(run, told["log_position"]):
            return  # true when it was written or looked up, and overtaken on its way
        if told["replayed"]:
            self.world.sometimes["a report was repeated"] += 1
            if earlier is not None and self._was_voided(run, earlier.told["log_position"]):
                earlier = None  # it was sent again since, and nobody heard the answer
            if earlier is not None and any(earlier.told[name] != told[name] for name in _SAME):
                self.world.violated(f"a repetition was answered otherwise: {earlier.told}, then {told}")
            if earlier is not None and earlier.asked["observations"] != asked["observations"]:
                self.world.violated(
                    f"another report under the same id was taken for the first: {earlier.asked}, {asked}"
                )
        elif (
            earlier is not None
            and earlier.told["log_position"] != told["log_position"]  # else a repetition was answered sooner
            and not self._was_voided(run, earlier.told["log_position"])
        ):
            self.world.violated(f"a report was written twice: {earlier.told}, then {told}")
        if earlier is None or not told["replayed"]:
            self.first[key] = reply

    def _base_of(self, run: str) -> int:
        """The position that the run's log begins behind."""
        found = self.rows("SELECT base_position FROM runs WHERE name = ?", run)
        return int(found[0]["base_position"]) if found else 0

    def _was_voided(self, run: str, position: int) -> bool:
        found = self.rows(
            "SELECT voided_at FROM log JOIN runs ON run_id = id WHERE name = ? AND position = ?", run, position
        )
        return not found or found[0]["voided_at"] is not None

    def _selected(self, reply: Reply) -> None:
        chosen = [prompt["prompt_id"] for prompt in reply.told["prompts"]]
        if len(set(chosen)) != reply.asked["batch_size"]:
            self.world.violated(f"a batch of another size, or with a prompt twice: {reply.asked}, {chosen}")
        if reply.told["fallback"] is not None:
            self.world.sometimes["a run fell back to uniform choice"] += 1
        if reply.told["replayed"]:
            self.world.sometimes["a batch was asked for again"] += 1
        else:
            self.replies.append(reply)

    def _predicted(self, reply: Reply) -> None:
        self.replies.append(reply)
        for each in reply.told["predictions"]:
            rate, (low, high) = each["success_rate"], each["interval"]
            if not (0 <= low <= rate <= high <= 1 and math.isfinite(each["std"]) and 0 <= each["std"] <= 1):
                self.world.violated(f"no forecast: {each}")
            if not 0 <= each["informative_probability"] <= 1:
                self.world.violated(f"no chance: {each}")
            if each["attempts_seen"] >= 16 and each["prompt_id"] in self.rates:
                self.forecasts.append((rate, self.rates[each["prompt_id"]]))

    def _voided(self, reply: Reply) -> None:
        """Nothing of what was to be forgotten stands. (What came afterwards may.)"""
        self.world.sometimes[f"a {reply.what} took something"] += bool(reply.told["voided_observations"])
        if reply.what == "rewind" and not reply.asked.get("incarnation"):
            standing = self.rows(
                "SELECT position FROM log JOIN runs ON run_id = id "
                "WHERE name = ? AND step > ? AND position < ? AND voided_at IS NULL AND kind IN ('observe', 'select')",
                reply.run,
                reply.asked["step"],
                reply.told["log_position"],
            )
            if standing:
                self.world.violated(f"{dict(standing[0])} stands after {reply.asked}, {reply.told}")

    def _deleted(self, run: str) -> None:
        for key in [key for key in self.first if key[0] == run]:
            del self.first[key]
        self.replies = [reply for reply in self.replies if reply.run != run]
        for table in ("log", "prompts", "selections", "refits", "snapshots", "checkpoints"):
            if self.rows(f"SELECT 1 FROM {table} WHERE run_id NOT IN (SELECT id FROM runs) LIMIT 1"):
                self.world.violated(f"{table} has rows of the deleted run {run}")

    # At the end.

    def check_the_whole(self, engine: Engine) -> None:
        for (run, request_id), reply in self.first.items():
            n = self.rows(
                "SELECT count(*) AS n FROM log JOIN runs ON run_id = id WHERE name = ? AND request_id = ? "
                "AND voided_at IS NULL",
                run,
                request_id,
            )[0]["n"]
            if n != 1 and not (n == 0 and self._was_voided(run, reply.told["log_position"])):
                self.world.violated(f"report {request_id} of {run} stands {n} times: {reply.told}")
        for row in self.rows("SELECT run_id, count(*) AS n, max(version) AS newest FROM snapshots GROUP BY run_id"):
            if row["n"] != row["newest"]:
                self.world.violated(f"snapshots do not count from 1: {dict(row)}")
        for name in sorted({reply.run for reply in self.replies}):
            base = self._base_of(name)
            of_run = [reply for reply in self.replies if reply.run == name and reply.told["log_position"] >= base]
            log = _Log(
                self.rows("SELECT log.* FROM log JOIN runs ON run_id = id WHERE name = ? ORDER BY position", name)
            )
            index = {
                row["prompt_id"]: row["index"]
                for row in self.rows("SELECT prompts.* FROM prompts JOIN runs ON run_id = id WHERE name = ?", name)
            }
            if not base:
                for reply in of_run:
                    self._check_counts(reply, log, index)
            some = self.world.chance.sample(of_run, min(LOOKED_AT, len(of_run)))
            self._check_fold(name, sorted(some, key=lambda reply: int(reply.told["log_position"])), log, engine)
        content = self.path.read_bytes() + self.path.with_name(self.path.name + "-wal").read_bytes()
        for text in self.erased:
            if text.encode() in content:
                self.world.violated(f"{text!r} stands in the file after it was erased")

    def standing_marks(self, run: str) -> tuple[Counter[int], Counter[int]]:
        """How often each marked observation stands in the log, and how often it stood and was voided."""
        standing: Counter[int] = Counter()
        voided: Counter[int] = Counter()
        log = self.rows("SELECT log.* FROM log JOIN runs ON run_id = id WHERE name = ? AND kind = 'observe'", run)
        for row in log:
            gone = {i for _, rows in json.loads(row["voided_rows"] or "[]") for i in rows}
            for i, successes in enumerate(json.loads(row["body"])["successes"]):
                mark = round((successes % 1.0) / MARK)
                if mark:
                    (voided if row["voided_at"] is not None or i in gone else standing)[mark] += 1
        return standing, voided

    def _check_counts(self, reply: Reply, log: _Log, index: Mapping[str, int]) -> None:
        """Attempts that were seen, and that who is waited for was not chosen: counted from the rows alone."""
        at = int(reply.told["log_position"])
        if reply.what.endswith("/predict"):
            seen = log.attempts(at)
            for each in reply.told["predictions"]:
                if each["attempts_seen"] != seen[index[each["prompt_id"]]]:
                    self.world.violated(
                        f"at {at} of {reply.run}: {each}, due are {seen[index[each['prompt_id']]]} attempts"
                    )
        elif not reply.told["outstanding"] and not reply.asked.get("allow_outstanding"):
            at = log.position_of(reply.told["selection_id"]) - 1  # whatever was recorded after it was chosen
            waited_for = log.waited_for(at, int(reply.asked["step"]))
            both = {prompt["prompt_id"] for prompt in reply.told["prompts"] if index[prompt["prompt_id"]] in waited_for}
            if both:
                self.world.violated(
                    f"{both} are waited for at {at} of {reply.run}, and chosen for {reply.asked['step']}"
                )

    def _check_fold(self, name: str, replies: Sequence[Reply], log: _Log, engine: Engine) -> None:
        """Who folds the log entry by entry up to the position that a reply names, answers the same."""
        past = _Past(engine, log.voids, self._snapshots)
        live_runs = LiveRuns(past, capacity=1)
        for reply in replies:
            past.position = int(reply.told["log_position"])
            run, live, _ = live_runs.at_head(name)
            if reply.what.endswith("/predict"):
                asked = PredictRequest.model_validate(reply.asked)
                (again,) = training._predict_known(live_runs, name, [asked])
                due = again if isinstance(again, Exception) else json.loads(again)
                told: object = dict(reply.told)
            else:
                body = SelectRequest.model_validate(reply.asked)
                # Settings are no part of the log: what the reply does not say of them is taken from the present ones.
                asked_for = partial(training._request, body, run, live)
                chosen = live.choose(training._overlaid(body, run.settings), asked_for)
                due, told = list(chosen.prompt_ids), [prompt["prompt_id"] for prompt in reply.told["prompts"]]
            if told != due:
                self.world.violated(f"the fold of {name} at {past.position} answers {due}, answered was {told}")
        self._check_checkpoints(name, live_runs, past)

    def _check_checkpoints(self, name: str, live_runs: LiveRuns, past: _Past) -> None:
        for row in self.rows(
            "SELECT checkpoints.* FROM checkpoints JOIN runs ON run_id = id "
            "WHERE name = ? AND position >= base_position ORDER BY position",
            name,
        ):
            self.world.sometimes["a checkpoint was saved"] += 1
            if row["position"] >= past.position:
                past.position = row["position"]
                live = live_runs.at_head(name).live
                if to_bytes(from_bytes(row["state"])) != to_bytes(live.state):
                    self.world.violated(f"the checkpoint of {name} at {row['position']} is not the fold")


class _Log:
    """The rows of a run's log, and what they amount to at any position."""

    def __init__(self, rows: Sequence[sqlite3.Row]) -> None:
        self._rows = [(row, json.loads(row["body"])) for row in rows]
        self.voids = [row["position"] for row in rows if row["kind"] in ("rewind", "retract")]

    def _as_of(self, at: int) -> list[tuple[sqlite3.Row, dict[str, Any], set[int]]]:
        """Rows up to a position that stood at it, with those of their observations that did not."""
        return [
            (row, body, {i for by, gone in json.loads(row["voided_rows"] or "[]") if by <= at for i in gone})
            for row, body in self._rows
            if row["position"] <= at and (row["voided_at"] is None or row["voided_at"] > at)
        ]

    def attempts(self, at: int) -> Mapping[int, int]:
        seen: dict[int, int] = defaultdict(int)
        for row, body, gone in self._as_of(at):
            if row["kind"] == "observe":
                for i, (prompt, attempts) in enumerate(zip(body["prompts"], body["attempts"], strict=True)):
                    seen[prompt] += 0 if i in gone else attempts
        return seen

    def position_of(self, selection_id: str) -> int:
        """Of the entry that records this selection; 1 where there is none."""
        found = (
            row["position"] for row, _ in self._rows if (row["kind"], row["selection_id"]) == ("select", selection_id)
        )
        return next(found, 1)

    def waited_for(self, at: int, step: int, *, lease_steps: int = 8) -> set[int]:
        since: dict[int, int] = {}
        newest = step
        for row, body, gone in self._as_of(at):
            if row["kind"] == "select":
                for prompt in body["prompts"]:
                    since[prompt] = max(since.get(prompt, -1), row["step"])
            elif row["kind"] == "observe":
                newest = max(newest, row["step"])
                for i, prompt in enumerate(body["prompts"]):
                    until = body.get("selection_step")
                    if i not in gone and prompt in since and (until is None or since[prompt] <= until):
                        del since[prompt]
        return {prompt for prompt, chosen in since.items() if newest - chosen < lease_steps}


class _Past(Store):
    """The store as it was at a log position: what came later is not there, all snapshots are, and no checkpoints."""

    def __init__(self, engine: Engine, voids: Sequence[int], published: Mapping[tuple[int, int], bytes]) -> None:
        super().__init__(engine)
        self.position = 0
        self._voids, self._published = voids, published

    def snapshot(self, run_id: int, version: int) -> Snapshot:
        return replace(super().snapshot(run_id, version), weights=self._published[run_id, version])

    def run(self, name: str) -> Run:
        void_position = max((void for void in self._voids if void <= self.position), default=0)
        return replace(super().run(name), log_position=self.position, void_position=void_position)

    def entries(self, run_id: int, *, after: int, as_of: int | None = None, limit: int = 1_000) -> tuple[Entry, ...]:
        return super().entries(run_id, after=after, as_of=self.position, limit=limit)

    def newest_checkpoint(self, run_id: int, *, at_most: int | None = None) -> tuple[int, bytes] | None:
        return None


def _deleted_by(request: httpx.Request) -> str | None:
    """The run that this request deletes."""
    path = str(request.url.path)
    return path.split("/")[2] if request.method == "DELETE" and "/prompts/" not in path else None
