"""Any sequence of calls, against a plain model of what a run is: what counts, what repeats, what is forgotten.

The model keeps lists and no beliefs. Whatever the order of calls, the service agrees with it on every count, every
refusal, and on which answers are repetitions.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

if TYPE_CHECKING:
    from tests.conftest import Service

RUNS = ("a", "b")
PROMPTS = [f"p{i}" for i in range(6)]
REQUESTS = ("r0", "r1", "r2")
_numbers = itertools.count(1)

runs = st.sampled_from(RUNS)
steps = st.integers(0, 4)
few_prompts = st.lists(st.sampled_from(PROMPTS), min_size=1, max_size=4, unique=True)


@dataclass
class Observed:
    """One accepted call; `rows` are the prompts whose outcomes still count."""

    step: int
    request_id: str | None
    body: dict[str, Any]
    first: dict[str, Any]
    rows: list[str]


@dataclass
class Selected:
    step: int
    arguments: dict[str, Any]
    first: dict[str, Any]


@dataclass
class Run:
    """What a run is to its callers."""

    pool: list[str] = field(default_factory=list)
    observed: list[Observed] = field(default_factory=list)
    selected: list[Selected] = field(default_factory=list)
    forgotten: list[str] = field(default_factory=list)
    log_position: int = 0
    fork_of: str | None = None

    @property
    def head_step(self) -> int | None:
        taken = [entry.step for entry in self.observed if entry.rows] + [entry.step for entry in self.selected]
        return max(taken, default=None)


class Callers(RuleBasedStateMachine):
    """Several callers of two runs, one call after another."""

    http: httpx.Client

    def __init__(self) -> None:
        super().__init__()
        self.prefix = f"machine-{next(_numbers)}-"
        self.model: dict[str, Run] = {}

    def call(self, method: str, path: str, expected: int, body: dict[str, Any] | None = None) -> dict[str, Any]:
        reply = self.http.request(method, path, json=body)
        assert reply.status_code == expected, (method, path, body, reply.status_code, reply.text)
        if expected >= 400:
            assert reply.headers["content-type"] == "application/problem+json"
        return dict(reply.json()) if reply.content else {}

    def post(self, name: str, what: str, expected: int, body: dict[str, Any]) -> dict[str, Any]:
        return self.call("POST", f"/runs/{self.prefix}{name}/{what}", expected, body)

    def wrote(self, run: Run, log_position: int, *, entries: int) -> None:
        """The call added so many entries to the log."""
        assert log_position == run.log_position + entries
        run.log_position = log_position

    @rule(name=runs, cooldown=st.none() | st.integers(0, 2))
    def create(self, name: str, cooldown: int | None) -> None:
        body = {"embedder": "none", "predictor": "mopps", **({} if cooldown is None else {"cooldown_steps": cooldown})}
        if name not in self.model:
            self.call("PUT", f"/runs/{self.prefix}{name}", 201, body)
            self.model[name] = Run()
            return
        self.call("PUT", f"/runs/{self.prefix}{name}", 200, {k: v for k, v in body.items() if k != "embedder"})

    @rule(name=runs)
    def delete(self, name: str) -> None:
        self.call("DELETE", f"/runs/{self.prefix}{name}", 204 if name in self.model else 404)
        self.model.pop(name, None)

    @rule(name=runs, prompts=few_prompts)
    def load(self, name: str, prompts: list[str]) -> None:
        run = self.model.get(name)
        body = {"prompts": [{"prompt_id": prompt} for prompt in prompts]}
        reply = self.post(name, "prompts", 200 if run is not None else 404, body)
        if run is None:
            return
        new = [prompt for prompt in prompts if prompt not in run.pool]
        run.pool += new
        assert (reply["added"], reply["existing"]) == (len(new), len(prompts) - len(new))
        assert reply["pool_size"] == len(run.pool)
        self.wrote(run, reply["log_position"], entries=1 if new else 0)

    @rule(
        name=runs,
        step=steps,
        prompts=few_prompts,
        request_id=st.none() | st.sampled_from(REQUESTS),
        successes=st.integers(0, 1),
        selection=st.none() | st.integers(0, 3),
    )
    def observe(
        self,
        name: str,
        step: int,
        prompts: list[str],
        request_id: str | None,
        successes: int,
        selection: int | None,
    ) -> None:
        outcomes = [{"prompt_id": prompt, "successes": successes, "attempts": 2} for prompt in prompts]
        body: dict[str, Any] = {"run": self.prefix + name, "step": step, "observations": outcomes}
        if request_id is not None:
            body["request_id"] = request_id
        run = self.model.get(name)
        if run is not None and selection is not None and selection < len(run.selected):
            body["selection_id"] = run.selected[selection].first["selection_id"]
        if run is None:
            self.call("POST", "/observe", 404, body)
            return
        if not set(prompts) <= set(run.pool):
            self.call("POST", "/observe", 404, body)
            return
        standing = [each for each in run.observed if each.request_id == request_id and each.rows]
        if request_id is not None and standing:
            (earlier,) = standing
            reply = self.call("POST", "/observe", 200 if body == earlier.body else 409, body)
            if body == earlier.body:
                assert reply == {**earlier.first, "replayed": True}
            return
        reply = self.call("POST", "/observe", 200, body)
        assert (reply["accepted"], reply["replayed"]) == (len(prompts), False)
        self.wrote(run, reply["log_position"], entries=1)
        run.observed.append(Observed(step, request_id, body, reply, list(prompts)))

    @precondition(lambda self: any(run.observed for run in self.model.values()))
    @rule(data=st.data())
    def repeat_an_observation(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from([name for name, run in self.model.items() if run.observed]))
        run = self.model[name]
        earlier = data.draw(st.sampled_from(run.observed))
        standing = [each for each in run.observed if each.request_id == earlier.request_id and each.rows]
        if earlier.request_id is None or not earlier.rows or standing != [earlier]:
            return
        selection_id = earlier.body.get("selection_id")
        assert selection_id not in run.forgotten or earlier.rows
        reply = self.call("POST", "/observe", 200, earlier.body)
        assert reply == {**earlier.first, "replayed": True}
        self.call("POST", "/observe", 409, {**earlier.body, "step": earlier.step + 1})

    @rule(name=runs, step=steps, batch_size=st.integers(1, 3), seed=st.integers(0, 1))
    def select(self, name: str, step: int, batch_size: int, seed: int) -> None:
        body = {
            "run": self.prefix + name,
            "step": step,
            "batch_size": batch_size,
            "seed": seed,
            "allow_outstanding": True,
            "cooldown_steps": 0,
        }
        run = self.model.get(name)
        if run is None:
            self.call("POST", "/select_batch", 404, body)
            return
        standing = [each for each in run.selected if each.step == step]
        if standing:
            reply = self.call("POST", "/select_batch", 200 if standing[0].arguments == body else 409, body)
            if standing[0].arguments == body:
                assert reply == {**standing[0].first, "replayed": True}
            return
        if len(run.pool) < batch_size:
            self.call("POST", "/select_batch", 409, body)
            return
        reply = self.call("POST", "/select_batch", 200, body)
        chosen = [prompt["prompt_id"] for prompt in reply["prompts"]]
        assert len(set(chosen)) == batch_size
        assert set(chosen) <= set(run.pool)
        assert (reply["replayed"], reply["log_position"]) == (False, run.log_position)  # of the state it was chosen in
        run.log_position += 1
        run.selected.append(Selected(step, body, reply))

    @rule(name=runs, step=steps)
    def rewind(self, name: str, step: int) -> None:
        run = self.model.get(name)
        reply = self.post(name, "rewind", 200 if run is not None else 404, {"step": step})
        if run is None:
            return
        lost = sum(len(each.rows) for each in run.observed if each.step > step)
        unchosen = [each for each in run.selected if each.step > step]
        run.observed = [each for each in run.observed if each.step <= step]
        run.selected = [each for each in run.selected if each.step <= step]
        run.forgotten += [each.first["selection_id"] for each in unchosen]
        self.voided(run, reply, observations=lost, selections=len(unchosen))

    @rule(
        name=runs,
        from_step=st.none() | steps,
        to_step=st.none() | steps,
        prompts=st.none() | few_prompts,
        request_id=st.none() | st.sampled_from(REQUESTS),
    )
    def retract(
        self,
        name: str,
        from_step: int | None,
        to_step: int | None,
        prompts: list[str] | None,
        request_id: str | None,
    ) -> None:
        given = {"from_step": from_step, "to_step": to_step, "prompt_ids": prompts, "request_id": request_id}
        body = {key: value for key, value in given.items() if value is not None}
        run = self.model.get(name)
        if not body or (from_step is not None and to_step is not None and from_step > to_step):
            self.post(name, "retract", 422, body)
            return
        if run is None or not set(prompts or ()) <= set(run.pool):
            self.post(name, "retract", 404, body)
            return
        reply = self.post(name, "retract", 200, body)
        lost = 0
        for each in run.observed:
            if (
                (from_step is None or each.step >= from_step)
                and (to_step is None or each.step <= to_step)
                and (request_id is None or each.request_id == request_id)
            ):
                kept = [] if prompts is None else [row for row in each.rows if row not in prompts]
                lost += len(each.rows) - len(kept)
                each.rows = kept
        self.voided(run, reply, observations=lost, selections=0)

    def voided(self, run: Run, reply: dict[str, Any], *, observations: int, selections: int) -> None:
        assert (reply["voided_observations"], reply["voided_selections"]) == (observations, selections)
        assert reply["head_step"] == run.head_step
        self.wrote(run, reply["log_position"], entries=1 if observations or selections else 0)

    @precondition(lambda self: any(run.forgotten and run.pool for run in self.model.values()))
    @rule(data=st.data())
    def report_on_a_forgotten_selection(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from([name for name, run in self.model.items() if run.forgotten and run.pool]))
        run = self.model[name]
        body = {
            "run": self.prefix + name,
            "step": 0,
            "selection_id": data.draw(st.sampled_from(run.forgotten)),
            "observations": [{"prompt_id": run.pool[0], "rewards": [1]}],
        }
        assert self.call("POST", "/observe", 409, body)["code"] == "selection_voided"

    @rule(name=runs, prompts=few_prompts)
    def predict(self, name: str, prompts: list[str]) -> None:
        run = self.model.get(name)
        body = {"run": self.prefix + name, "prompts": [{"prompt_id": prompt} for prompt in prompts]}
        is_known = run is not None and set(prompts) <= set(run.pool)
        reply = self.call("POST", "/predict", 200 if is_known else 404, body)
        if run is None or not is_known:
            return
        assert reply["log_position"] == run.log_position
        for prompt, prediction in zip(prompts, reply["predictions"], strict=True):
            times = sum(each.rows.count(prompt) for each in run.observed)
            assert (prediction["prompt_id"], prediction["attempts_seen"]) == (prompt, 2 * times)

    @invariant()
    def the_runs_stand_as_their_models_do(self) -> None:
        for name in RUNS:
            run = self.model.get(name)
            state = self.call("GET", f"/runs/{self.prefix}{name}", 404 if run is None else 200)
            if run is None:
                continue
            assert state["pool_size"] == len(run.pool)
            assert state["observations"] == sum(len(each.rows) for each in run.observed)
            assert state["log_position"] == run.log_position
            assert state["head_step"] == run.head_step
            listed = self.call("GET", f"/runs/{self.prefix}{name}/prompts", 200)["prompts"]
            assert [prompt["prompt_id"] for prompt in listed] == run.pool

    def teardown(self) -> None:
        for name in self.model:
            self.http.delete(f"/runs/{self.prefix}{name}")


def tried(http: httpx.Client, *, examples: int, n_steps: int) -> None:
    """Run the machine against this service."""
    machine = type("MachineOverHttp", (Callers,), {"http": http})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=n_steps,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.parametrize("service", ["sqlite"], indirect=True)
def test_any_sequence_of_calls_leaves_what_a_plain_model_says(service: Service) -> None:
    tried(service.http, examples=12, n_steps=15)


@pytest.mark.slow
def test_many_longer_sequences_do_on_both_databases(service: Service) -> None:
    tried(service.http, examples=80, n_steps=40)
