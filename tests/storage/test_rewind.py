"""What rewind and retract void, what they leave, and that the run then stands as if it had never been."""

from __future__ import annotations

import itertools
import json
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine, select, update
from tests.backends import mainly_sqlite_store

from evenodds_service.domain.learning.checkpoint import to_bytes
from evenodds_service.domain.log_entries import (
    Entry,
    NewObservation,
    ObserveEntry,
    Outcomes,
    PoolEntry,
    SelectEntry,
    SnapshotEntry,
    VoidEntry,
)
from evenodds_service.domain.prompts import NewPrompt
from evenodds_service.domain.settings import RunSettings
from evenodds_service.errors import ChoiceOutdated, RefitLost, RunUnknown, SelectionVoided
from evenodds_service.runtime.live_run import LiveRun
from evenodds_service.storage.engine import WRITES as IS_WRITING
from evenodds_service.storage.store import NewSelection, NewSnapshot, Run, Snapshot, Store, Voided
from evenodds_service.storage.tables import log, refits

LEASE = timedelta(minutes=5)
_numbers = itertools.count(1)


@dataclass
class Trainer:
    """Writes to one run."""

    store: Store
    run_id: int
    now: datetime

    @property
    def run(self) -> Run:
        return self.store.run_with_id(self.run_id)

    def observe(self, step: int, *prompts: int, request_id: str | None = None, selection_id: str | None = None) -> int:
        """One success of two for each prompt. Returns the log position."""
        rows = [NewObservation.of_counts(prompt, 1, 2) for prompt in prompts]
        return self.store.append_observations(
            self.run_id,
            Outcomes(
                step=step,
                observations=rows,
                request_id=request_id,
                request_hash=None if request_id is None else "h",
                selection_id=selection_id,
            ),
            now=self.now,
        ).log_position

    def select(self, step: int, *prompts: int, selection_id: str, chosen_at: int | None = None) -> str:
        selection, _ = self.store.record_selection(
            self.run_id,
            NewSelection(
                selection_id=selection_id,
                step=step,
                arguments_hash="h",
                prompts=np.array(prompts),
                reply="{}",
                chosen_at=chosen_at,
            ),
            now=self.now,
        )
        return selection.selection_id

    def rewind(self, step: int) -> Voided:
        return self.store.rewind(self.run_id, step=step, now=self.now)

    def retract(
        self,
        *,
        from_step: int | None = None,
        to_step: int | None = None,
        prompts: list[int] | None = None,
        request_id: str | None = None,
    ) -> Voided:
        return self.store.retract(
            self.run_id, from_step=from_step, to_step=to_step, prompts=prompts, request_id=request_id, now=self.now
        )

    def publish(self, fitted_position: int, *, worker: str = "w") -> Snapshot:
        self.store.request_refit(self.run_id, now=self.now)
        refit = self.store.claim_refit(worker=worker, lease=LEASE, now=self.now)
        assert refit is not None
        return self.store.publish_refit(refit, self.model(fitted_position), now=self.now)

    @staticmethod
    def model(fitted_position: int) -> NewSnapshot:
        return NewSnapshot("builtin", b"w", fitted_position, report={})

    def entries(self, *, as_of: int | None = None) -> list[Entry]:
        return list(self.store.entries(self.run_id, after=0, as_of=as_of))

    def counting(self) -> list[tuple[int, list[int]]]:
        """Position and prompts of the observe entries that count."""
        return [(e.position, e.prompts.tolist()) for e in self.entries() if isinstance(e, ObserveEntry)]


@pytest.fixture
def trainer(store: Store, run: Run, now: datetime) -> Trainer:
    """A run with five prompts, at log position 1."""
    store.add_prompts(run.id, [NewPrompt(name) for name in "abcde"], now=now)
    return Trainer(store, run.id, now)


def test_rewind_voids_what_is_above_the_step_and_moves_the_head_back(trainer: Trainer) -> None:
    for step in range(4):
        trainer.select(step, 0, 1, selection_id=f"s{step}")
        trainer.observe(step, 0, 1, 2)
    trainer.observe(1, 4)  # late: of a policy that is still known

    voided = trainer.rewind(1)

    assert voided == Voided(log_position=11, head_step=1, n_observations=6, n_selections=2)
    assert trainer.counting() == [(3, [0, 1, 2]), (5, [0, 1, 2]), (10, [4])]
    assert [e.position for e in trainer.entries() if isinstance(e, VoidEntry)] == [6, 7, 8, 9, 11]
    run = trainer.run
    assert (run.log_position, run.void_position, run.head_step, run.n_observations) == (11, 11, 1, 7)


def test_rewind_before_the_first_step_leaves_the_pool_alone(trainer: Trainer) -> None:
    trainer.observe(5, 0)

    assert trainer.rewind(4) == Voided(log_position=3, head_step=None, n_observations=1, n_selections=0)
    assert trainer.entries() == [PoolEntry(1, 5), VoidEntry(2), VoidEntry(3)]
    assert trainer.run.n_observations == 0


def test_voiding_what_is_void_already_writes_nothing(trainer: Trainer) -> None:
    trainer.observe(1, 0, 1, request_id="r")
    trainer.observe(2, 0, 1)
    trainer.rewind(1)
    trainer.retract(request_id="r")
    before = trainer.run

    repeated = [trainer.rewind(1), trainer.retract(request_id="r"), trainer.retract(prompts=[0])]

    assert repeated == [Voided(before.log_position, None, 0, 0)] * 3
    assert trainer.run == before


@pytest.mark.parametrize(
    ("conditions", "left"),
    [
        ({"from_step": 2}, [(2, [0, 1]), (3, [1, 2])]),
        ({"to_step": 1}, [(4, [2, 3]), (5, [3, 0])]),
        ({"from_step": 1, "to_step": 2}, [(2, [0, 1]), (5, [3, 0])]),
        ({"prompts": [0]}, [(2, [1]), (3, [1, 2]), (4, [2, 3]), (5, [3])]),
        ({"prompts": [2, 3]}, [(2, [0, 1]), (3, [1]), (5, [0])]),
        ({"request_id": "r1"}, [(2, [0, 1]), (4, [2, 3]), (5, [3, 0])]),
        ({"prompts": [0, 3], "from_step": 3}, [(2, [0, 1]), (3, [1, 2]), (4, [2, 3])]),
        ({"request_id": "r1", "prompts": [1]}, [(2, [0, 1]), (3, [2]), (4, [2, 3]), (5, [3, 0])]),
    ],
)
def test_retract_voids_what_fulfils_every_condition(
    trainer: Trainer, conditions: dict[str, int], left: list[tuple[int, list[int]]]
) -> None:
    for step, prompts in enumerate([(0, 1), (1, 2), (2, 3), (3, 0)]):
        trainer.observe(step, *prompts, request_id=f"r{step}")

    voided = trainer.retract(**conditions)  # type: ignore[arg-type]  # of the type that each name wants

    assert trainer.counting() == left
    n_left = sum(len(prompts) for _, prompts in left)
    assert voided == Voided(6, trainer.run.head_step, 8 - n_left, 0)
    assert trainer.run.n_observations == n_left
    assert trainer.run.head_step == max(position - 2 for position, _ in left)


def test_observations_are_retracted_one_after_the_other_until_none_is_left(trainer: Trainer) -> None:
    trainer.observe(0, 0, 1, 0, 2)

    first, second = trainer.retract(prompts=[0]), trainer.retract(prompts=[2, 0])
    third = trainer.retract(from_step=0)

    assert [voided.n_observations for voided in (first, second, third)] == [2, 1, 1]
    assert trainer.counting() == []
    assert trainer.run.n_observations == 0


def test_the_log_can_be_read_as_it_stood_at_any_position(trainer: Trainer) -> None:
    trainer.observe(0, 0, 1)
    trainer.observe(1, 2, 1)
    trainer.retract(prompts=[1], from_step=1)
    trainer.observe(2, 3)
    trainer.rewind(0)

    def prompts(as_of: int) -> list[list[int]]:
        return [e.prompts.tolist() if isinstance(e, ObserveEntry) else [] for e in trainer.entries(as_of=as_of)][1:]

    assert prompts(3) == [[0, 1], [2, 1]]
    assert prompts(4) == [[0, 1], [2], []]
    assert prompts(5) == [[0, 1], [2], [], [3]]
    assert prompts(6) == [[0, 1], [], [], [], []]


def test_the_entry_says_what_was_asked_and_what_was_voided(trainer: Trainer, engine: Engine) -> None:
    trainer.observe(0, 0, 1, request_id="r")
    trainer.retract(prompts=[1, 3], to_step=4)
    trainer.select(7, 0, selection_id="s")
    trainer.rewind(3)

    with engine.connect() as connection:
        rows = connection.execute(select(log.c.kind, log.c.body).order_by(log.c.position)).all()

    assert (rows[2].kind, json.loads(rows[2].body)) == (
        "retract",
        {
            "from_step": None,
            "to_step": 4,
            "prompts": [1, 3],
            "request_id": None,
            "first": 2,
            "observations": 1,
            "selections": 0,
        },
    )
    assert (rows[4].kind, json.loads(rows[4].body)) == (
        "rewind",
        {"step": 3, "first": 4, "observations": 0, "selections": 1},
    )


def test_a_voided_request_counts_anew_and_then_once(trainer: Trainer) -> None:
    trainer.observe(3, 0, 1, request_id="r")
    trainer.rewind(2)

    positions = [trainer.observe(3, 0, 1, request_id="r") for _ in range(2)]
    trainer.retract(request_id="r")
    again = trainer.observe(3, 0, 1, request_id="r")

    assert positions == [4, 4]
    assert again == 6
    assert trainer.run.n_observations == 2


def test_a_request_retracted_in_part_keeps_its_answer(trainer: Trainer) -> None:
    first = trainer.observe(3, 0, 1, request_id="r")
    trainer.retract(prompts=[0])

    assert trainer.observe(3, 0, 1, request_id="r") == first
    assert trainer.counting() == [(first, [1])]


def test_a_rewound_step_is_chosen_anew(trainer: Trainer) -> None:
    old = trainer.select(3, 0, selection_id="old")
    trainer.rewind(2)

    assert trainer.store.selection(trainer.run_id, 3, arguments_hash="other") is None
    assert [trainer.select(3, 1, selection_id=name) for name in ("new", "newer")] == ["new", "new"]
    with pytest.raises(
        SelectionVoided,
        match=r"^selection 'old' of run 'math' for step 3 was voided by the rewind at log position 3: its outcomes "
        "belong to a policy that the run has forgotten; drop them, and select for the step again$",
    ):
        trainer.observe(3, 0, selection_id=old)


def test_a_retracted_step_keeps_its_batch(trainer: Trainer) -> None:
    trainer.select(3, 0, selection_id="s")
    trainer.observe(3, 0, selection_id="s")

    trainer.retract(from_step=3)

    assert trainer.select(3, 1, selection_id="other") == "s"
    trainer.observe(3, 0, selection_id="s")
    assert trainer.run.n_observations == 1


def test_a_batch_chosen_before_something_was_voided_is_not_recorded(trainer: Trainer) -> None:
    trainer.observe(3, 0)
    trainer.rewind(2)

    with pytest.raises(ChoiceOutdated, match=r"^run 'math': the batch was chosen at log position 2, .* choose again$"):
        trainer.select(3, 0, selection_id="s", chosen_at=2)

    assert trainer.run.log_position == 3
    assert trainer.select(3, 0, selection_id="s", chosen_at=3) == "s"


def test_voided_visits_are_not_in_a_prompts_history(trainer: Trainer) -> None:
    for step in range(3):
        trainer.observe(step, 0, 1)

    trainer.rewind(1)
    trainer.retract(prompts=[0], to_step=0)

    assert [visit.step for visit in trainer.store.prompt_history(trainer.run_id, 0)] == [1]
    assert [visit.step for visit in trainer.store.prompt_history(trainer.run_id, 1)] == [1, 0]


def test_checkpoints_behind_the_first_voided_entry_are_dropped(trainer: Trainer) -> None:
    for step in range(3):
        trainer.observe(step, 0)  # at positions 2, 3, 4
    for position in (2, 3, 4):
        trainer.store.save_checkpoint(
            trainer.run_id, position=position, state=b"%d" % position, now=trainer.now, keep=9
        )

    trainer.rewind(1)

    assert trainer.store.newest_checkpoint(trainer.run_id) == (3, b"3")
    trainer.retract(to_step=0)
    assert trainer.store.newest_checkpoint(trainer.run_id) is None


def test_a_state_from_before_something_was_voided_is_not_saved(trainer: Trainer) -> None:
    trainer.observe(3, 0)
    position = trainer.run.log_position
    trainer.rewind(2)

    def save(position: int) -> bool:
        return trainer.store.save_checkpoint(trainer.run_id, position=position, state=b"state", now=trainer.now)

    assert not save(position)
    assert trainer.store.newest_checkpoint(trainer.run_id) is None
    assert save(trainer.run.log_position)


def test_snapshots_fitted_on_voided_observations_are_voided_and_a_refit_is_asked_for(trainer: Trainer) -> None:
    trainer.observe(0, 0)  # 2
    trainer.publish(2)  # 3: version 1
    trainer.observe(1, 0)  # 4
    trainer.publish(2)  # 5: version 2, has not seen it
    trainer.publish(5)  # 6: version 3, has

    trainer.rewind(0)

    assert trainer.run.model_version == 2
    assert [e.version for e in trainer.entries() if isinstance(e, SnapshotEntry)] == [1, 2]
    assert trainer.store.refits(trainer.run_id)[0].status == "pending"
    assert trainer.publish(trainer.run.log_position).version == 4
    assert trainer.run.model_version == 4


def test_a_selection_voided_alone_leaves_snapshots_and_fits_alone(trainer: Trainer) -> None:
    trainer.observe(0, 0)
    trainer.select(1, 0, selection_id="s")
    trainer.publish(3)
    trainer.store.request_refit(trainer.run_id, now=trainer.now)
    trainer.store.claim_refit(worker="w", lease=LEASE, now=trainer.now)

    trainer.rewind(0)

    assert trainer.run.model_version == 1
    assert trainer.store.refits(trainer.run_id)[0].status == "running"


def test_a_fit_that_was_going_on_is_fenced_and_begun_again(trainer: Trainer) -> None:
    trainer.observe(0, 0)
    trainer.observe(1, 0)
    asked = trainer.store.request_refit(trainer.run_id, now=trainer.now)
    claimed = trainer.store.claim_refit(worker="w", lease=LEASE, now=trainer.now)
    assert claimed is not None

    trainer.rewind(0)

    with pytest.raises(RefitLost):
        trainer.store.publish_refit(claimed, trainer.model(3), now=trainer.now)
    again = trainer.store.claim_refit(worker="w", lease=LEASE, now=trainer.now)
    assert again is not None
    assert (again.id, again.attempts) == (asked.id, 2)
    assert trainer.run.model_version == 0


def test_a_refit_that_a_worker_is_just_claiming_is_fenced_too(trainer: Trainer, engine: Engine) -> None:
    """The claim has not been committed when something is voided: its worker would fit what is void by then."""
    trainer.observe(0, 0)
    trainer.observe(1, 0)
    asked = trainer.store.request_refit(trainer.run_id, now=trainer.now)
    claim = update(refits).values(status="running", worker="w", attempts=1, lease_until=trainer.now + LEASE)

    with ThreadPoolExecutor(1) as other:
        with engine.execution_options(**{IS_WRITING: True}).begin() as connection:
            connection.execute(claim.where(refits.c.id == asked.id))
            voided = other.submit(trainer.rewind, 0)
            wait([voided], timeout=0.3)
        assert voided.result().n_observations == 1

    refit = trainer.store.refit(asked.id)
    assert (refit.status, refit.worker, refit.lease_until) == ("pending", None, None)


def test_an_unknown_run_is_refused(store: Store, now: datetime) -> None:
    with pytest.raises(RunUnknown, match="run with id 0 does not exist"):
        store.rewind(0, step=1, now=now)
    with pytest.raises(RunUnknown, match="run with id 0 does not exist"):
        store.retract(0, to_step=1, now=now)


def test_of_many_callers_one_voids_and_the_others_find_nothing(trainer: Trainer) -> None:
    for step in range(6):
        trainer.observe(step, 0, 1)
    together = threading.Barrier(6)

    def void(caller: int) -> Voided:
        together.wait()
        return trainer.rewind(2) if caller % 2 else trainer.retract(from_step=3)

    with ThreadPoolExecutor(6) as callers:
        answers = list(callers.map(void, range(6)))

    assert sorted(answer.n_observations for answer in answers) == [0] * 5 + [6]
    assert trainer.run.log_position == 8


# The property: whatever was voided, the run stands as one in which it never happened.


@dataclass(frozen=True)
class Written:
    """An entry as a test wrote it: outcomes by prompt, or a selection."""

    is_selection: bool
    step: int
    outcomes: dict[int, int]
    request_id: str
    number: int


OUTCOMES = st.dictionaries(st.integers(0, 7), st.integers(0, 4), min_size=1, max_size=5)
WRITES = st.tuples(st.sampled_from(["observe", "observe", "select"]), st.integers(0, 5), OUTCOMES)
VOIDS = st.one_of(
    st.tuples(st.just("rewind"), st.integers(0, 5), st.none()),
    st.tuples(st.just("steps"), st.integers(0, 5), st.none()),
    st.tuples(st.just("prompts"), st.integers(0, 5), st.sets(st.integers(0, 7), min_size=1, max_size=3)),
    st.tuples(st.just("request"), st.integers(0, 5), st.none()),
    st.tuples(st.just("look"), st.none(), st.none()),
)


@mainly_sqlite_store
@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(acts=st.lists(st.one_of(WRITES, WRITES, VOIDS), min_size=3, max_size=25))
def test_the_run_stands_as_if_what_was_voided_had_never_happened(
    store: Store, now: datetime, acts: list[tuple[str, int, object]]
) -> None:
    """Bit for bit but for positions, seen by one who looked in between and by one who starts afterwards."""
    run, never = (_new_run(store, now) for _ in range(2))
    watcher = LiveRun(run.id)
    left: list[Written] = []
    for number, (act, step, what) in enumerate(acts):
        trainer = Trainer(store, run.id, now)
        if act == "look":
            watcher.catch_up(store, trainer.run)
        elif act in ("observe", "select"):
            assert isinstance(what, dict)
            written = Written(act == "select", step, what, f"r{number % 3}", number)
            taken = any(w.request_id == written.request_id and not w.is_selection for w in left)
            chosen = any(w.step == step and w.is_selection for w in left)
            if not (chosen if written.is_selection else taken):
                left.append(written)
                _write(store, run.id, written, now)
        elif act == "rewind":
            left = [w for w in left if w.step <= step]
            trainer.rewind(step)
        else:
            left = _without(left, act, step, what)
            if act == "steps":
                trainer.retract(from_step=step, to_step=step + 1)
            elif act == "prompts":
                assert isinstance(what, set)
                trainer.retract(prompts=sorted(what), to_step=step)
            else:
                trainer.retract(request_id=f"r{step % 3}")
    for number, written in enumerate(left):
        _write(store, never.id, replace(written, request_id=f"n{number}"), now)

    states = []
    for live, name in ((watcher, run), (LiveRun(run.id), run), (LiveRun(never.id), never)):
        live.catch_up(store, store.run_with_id(name.id))
        live.state.position = 0
        states.append(to_bytes(live.state))

    assert states[0] == states[1] == states[2]
    one, other = store.run_with_id(run.id), store.run_with_id(never.id)
    assert (one.n_observations, one.head_step) == (other.n_observations, other.head_step)


def _without(left: list[Written], act: str, step: int, what: object) -> list[Written]:
    """What a retraction leaves, in the plainest words."""
    kept = []
    for w in left:
        if w.is_selection:
            kept.append(w)
        elif act == "steps" and step <= w.step <= step + 1:
            continue
        elif act == "prompts" and w.step <= step:
            assert isinstance(what, set)
            rows = {prompt: k for prompt, k in w.outcomes.items() if prompt not in what}
            if rows:
                kept.append(replace(w, outcomes=rows))
        elif act == "request" and w.request_id == f"r{step % 3}":
            continue
        else:
            kept.append(w)
    return kept


def _new_run(store: Store, now: datetime) -> Run:
    run, _ = store.put_run(f"property-{next(_numbers)}", RunSettings(embedder="none"), now=now)
    store.add_prompts(run.id, [NewPrompt(f"p{i}", group="ab"[i % 2], prior_rate=i / 8) for i in range(8)], now=now)
    return run


def _write(store: Store, run_id: int, written: Written, now: datetime) -> None:
    trainer = Trainer(store, run_id, now)
    if written.is_selection:
        trainer.select(written.step, *written.outcomes, selection_id=f"s{written.number}")
        return
    rows = [NewObservation.of_counts(prompt, k, 4) for prompt, k in written.outcomes.items()]
    appended = store.append_observations(
        run_id, Outcomes(step=written.step, observations=rows, request_id=written.request_id, request_hash="h"), now=now
    )
    assert not appended.replayed


def test_a_selection_of_an_entry_is_not_confused_with_its_outcomes(trainer: Trainer) -> None:
    trainer.select(1, 0, 1, selection_id="s")
    trainer.observe(1, 0, 1)

    trainer.retract(prompts=[0])

    (chosen,) = [e for e in trainer.entries() if isinstance(e, SelectEntry)]
    assert np.array_equal(chosen.prompts, [0, 1])
