"""Trainers that select while rollouts are out, and report late, in pieces and out of order."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from scipy import stats

if TYPE_CHECKING:
    from tests.api.conftest import Caller
    from tests.conftest import Service

    from evenodds import Client

one_backend = pytest.mark.parametrize("service", ["sqlite"], indirect=True)
"""What the database has no part in."""

NAMES = [f"p{i}" for i in range(12)]


@pytest.fixture
def pool(caller: Caller) -> Caller:
    caller.load_texts(*NAMES)
    return caller


def outcomes(*names: str) -> list[dict[str, Any]]:
    return [{"prompt_id": name, "rewards": [1, 0]} for name in names]


def test_what_is_outstanding_is_not_chosen_again_before_its_outcome(pool: Caller) -> None:
    first, second, third = (pool.select(step, 4) for step in range(3))
    ids = [[p["prompt_id"] for p in reply["prompts"]] for reply in (first, second, third)]

    assert sorted(name for batch in ids for name in batch) == sorted(NAMES)
    assert [reply["outstanding"] for reply in (first, second, third)] == [0, 0, 0]
    pool.observe(1, *outcomes(*ids[1]), selection_id=second["selection_id"])  # the second comes first
    assert sorted(pool.chosen(3, 4)) == sorted(ids[1])


def test_a_trainer_is_never_stopped_by_slow_rollouts(pool: Caller) -> None:
    first = pool.chosen(0, 6)
    second = pool.chosen(1, 4)

    reply = pool.select(2, 6)

    chosen = {p["prompt_id"] for p in reply["prompts"]}
    assert reply["outstanding"] == 4
    assert chosen >= set(NAMES) - set(first) - set(second)
    assert len(chosen & set(first)) == 4
    everything = pool.select(3, 12)
    assert (len(everything["prompts"]), everything["outstanding"]) == (12, 12)


def test_outstanding_prompts_are_chosen_again_when_asked(pool: Caller) -> None:
    first = pool.chosen(0, 11)

    reply = pool.select(1, 11, allow_outstanding=True)

    again = {p["prompt_id"] for p in reply["prompts"]} & set(first)
    assert len(again) >= 10
    assert reply["outstanding"] == len(again)


def test_what_is_outstanding_rests_also_when_it_may_be_chosen_again(pool: Caller) -> None:
    first = pool.chosen(0, 6)

    assert not set(pool.chosen(1, 6, allow_outstanding=True, cooldown_steps=3)) & set(first)
    pool.create(lease_steps=0)
    body = {"run": pool.run, "step": 2, "batch_size": 1, "cooldown_steps": 3}
    assert pool.refused("POST", "/select_batch", json=body).code == "not_enough_prompts"


def test_what_is_outstanding_has_spent_its_visit(pool: Caller) -> None:
    first = pool.chosen(0, 6)

    assert not set(pool.chosen(1, 6, allow_outstanding=True, max_visits=1, cooldown_steps=0)) & set(first)


@pytest.mark.parametrize(("lease", "step", "expired"), [(3, 2, False), (3, 3, True), (0, 1, True), (None, 8, True)])
def test_a_lease_expires(pool: Caller, lease: int | None, step: int, expired: bool) -> None:
    pool.create(lease_steps=lease)
    lost = set(pool.chosen(0, 4))

    reply = pool.select(step, 12)

    assert reply["outstanding"] == (0 if expired else 4)
    assert {p["prompt_id"] for p in reply["prompts"]} >= lost


def test_a_lost_rollout_is_not_held_against_its_prompt(pool: Caller) -> None:
    """It neither rests nor has spent a visit, and counts as unseen."""
    pool.create(lease_steps=2, max_visits=1)
    lost, seen = pool.chosen(0, 1), pool.chosen(1, 11)
    pool.observe(1, *outcomes(*seen))

    assert pool.chosen(5, 1, cooldown_steps=9) == lost


def test_selections_may_be_made_for_lower_steps_than_others_have_reached(pool: Caller) -> None:
    ahead = pool.chosen(9, 4)
    pool.observe(9, *outcomes(*ahead))

    behind, between = pool.chosen(2, 4), pool.chosen(5, 4, cooldown_steps=2)

    assert not set(behind) & set(between)
    assert pool.client.run(pool.run).head_step == 9


def test_outcomes_may_come_in_pieces_late_and_with_others(pool: Caller) -> None:
    first = pool.select(0, 3)
    ids = [p["prompt_id"] for p in first["prompts"]]
    other = next(name for name in NAMES if name not in ids)
    pool.select(7, 3)
    pool.observe(7, *outcomes(other))

    pool.observe(0, *outcomes(ids[0]), selection_id=first["selection_id"])
    pool.observe(1, *outcomes(ids[0], other), selection_id=first["selection_id"])  # by the next policy already
    reply = pool.observe(0, *outcomes(ids[2], ids[1]), selection_id=first["selection_id"])

    assert reply["accepted"] == 2
    seen = {p["prompt_id"]: p["attempts_seen"] for p in pool.predict(*NAMES)}
    assert {name: n for name, n in seen.items() if n} == {ids[0]: 4, ids[1]: 2, ids[2]: 2, other: 4}
    state = pool.client.prompt(pool.run, ids[0])
    assert [(v.step, v.selection_id) for v in state.history] == [(1, first["selection_id"]), (0, first["selection_id"])]


def test_batches_that_are_chosen_at_once_share_no_prompt(caller: Caller) -> None:
    caller.load_texts(*(f"p{i}" for i in range(40)))

    with ThreadPoolExecutor(8) as workers:
        batches = list(workers.map(lambda step: caller.chosen(step, 5), range(8)))

    assert len({name for batch in batches for name in batch}) == 40


def test_replicas_that_choose_at_once_share_no_prompt(
    database_url: str, start_service: Callable[[str], Service]
) -> None:
    clients = [start_service(database_url).client for _ in range(2)]
    clients[0].put_run("math", embedder="none", lease_steps=12)
    clients[0].add_prompts("math", [{"prompt_id": f"p{i}"} for i in range(60)])

    with ThreadPoolExecutor(6) as workers:
        replies = list(workers.map(lambda step: clients[step % 2].select_batch("math", step, 5), range(12)))

    assert len({p.prompt_id for reply in replies for p in reply.prompts}) == 60
    assert [reply.outstanding for reply in replies] == [0] * 12


# A trainer with four workers, in simulated time.


@dataclass
class World:
    """Prompts of which some are hard; the policy gets better. An outcome depends on prompt and step alone."""

    n: int = 96
    group_size: int = 8
    ids: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.ids = [f"p{i}" for i in range(self.n)]
        rng = np.random.default_rng(5)
        self._hardness = rng.normal(scale=2.0, size=self.n)

    def successes(self, prompt_id: str, step: int) -> int:
        i = int(prompt_id[1:])
        rate = 1 / (1 + np.exp(self._hardness[i] - 0.03 * step))
        return int(np.random.default_rng([i, step]).binomial(self.group_size, rate))

    def create(self, client: Client, run: str, **settings: Any) -> str:
        client.put_run(run, embedder="none", group_size=self.group_size, **settings)
        prompts = [
            {"prompt_id": name, "features": {"hint": float(self._hardness[i] + i % 3)}}
            for i, name in enumerate(self.ids)
        ]
        client.add_prompts(run, prompts)
        return run

    def outcomes(self, prompt_ids: list[str], step: int, part: int | None = None) -> list[dict[str, Any]]:
        """The whole groups, or one of their two halves."""
        rows = []
        for name in prompt_ids:
            k, n = self.successes(name, step), self.group_size
            halves = [(min(k, n // 2), n // 2), (max(k - n // 2, 0), n - n // 2)]
            successes, attempts = (k, n) if part is None else halves[part]
            rows.append({"prompt_id": name, "successes": successes, "attempts": attempts})
        return rows

    def informative_share(self, batches: dict[int, list[str]]) -> float:
        groups = [0 < self.successes(i, step) < self.group_size for step, batch in batches.items() for i in batch]
        return float(np.mean(groups))


def synchronous(client: Client, run: str, world: World, n_steps: int, batch_size: int) -> dict[int, list[str]]:
    batches = {}
    for step in range(n_steps):
        reply = client.select_batch(run, step, batch_size)
        batches[step] = [p.prompt_id for p in reply.prompts]
        client.observe(run, step, world.outcomes(batches[step], step), selection_id=reply.selection_id)
    return batches


def asynchronous(
    client: Client, run: str, world: World, n_steps: int, batch_size: int, seed: int
) -> dict[int, list[str]]:
    """Four workers, each with a batch out: every batch comes back after a random time, in pieces, some of them twice.

    A step is taken from a counter some time before it is selected for, so that selections come out of order too.
    """
    rng, turn, steps = np.random.default_rng(seed), count(), iter(range(n_steps))
    events: list[tuple[float, int, str, int, Any]] = []
    batches: dict[int, list[str]] = {}

    def begin(now: float) -> None:
        step = next(steps, None)
        if step is not None:
            heapq.heappush(events, (now + rng.exponential(0.3), next(turn), "select", step, None))

    for _ in range(4):
        begin(0.0)
    while events:
        now, _, act, step, what = heapq.heappop(events)
        if act == "select":
            reply = client.select_batch(run, step, batch_size)
            batches[step] = [p.prompt_id for p in reply.prompts]
            assert reply.outstanding == 0
            cut = int(rng.integers(1, batch_size))
            done = now
            for number, ids in enumerate((batches[step][:cut], batches[step][cut:])):
                arrival = now + rng.gamma(2.0, 1.0)
                done = max(done, arrival)
                heapq.heappush(events, (arrival, next(turn), "observe", step, (number, ids, reply.selection_id)))
            heapq.heappush(events, (done, next(turn), "begin", step, None))
        elif act == "observe":
            number, ids, selection_id = what
            for _ in range(1 + int(rng.random() < 0.2)):  # a reply was lost: the report is repeated
                client.observe(
                    run,
                    step,
                    world.outcomes(ids, step),
                    request_id=f"{step}-{number}",
                    selection_id=selection_id,
                )
        else:
            begin(now)
    return batches


@one_backend
@pytest.mark.parametrize("seed", [1, 2])
def test_four_workers_in_flight_leave_what_one_after_the_other_would(caller: Caller, seed: int) -> None:
    """The same batches and outcomes, reported late and out of order, and in order.

    Exactly equal: attempts, visits, last steps, histories as sets, and every prompt's own evidence, hence the
    beliefs under `mopps`. Within a tolerance: the beliefs under `gps`, whose weights and regressions forget as the
    newest step advances and so weigh what came late a little differently.
    """
    world, client = World(), caller.client
    late = world.create(client, f"{caller.run}.late")
    batches = asynchronous(client, late, world, n_steps=40, batch_size=8, seed=seed)
    assert list(batches) != sorted(batches)  # selections came out of order, too
    in_order = world.create(client, f"{caller.run}.order")
    for step in sorted(batches):
        reply = client.select_batch(in_order, step, 8, candidates=batches[step])
        assert {p.prompt_id for p in reply.prompts} == set(batches[step])
        client.observe(in_order, step, world.outcomes(batches[step], step), selection_id=reply.selection_id)

    ours, theirs = (client.predict(run, world.ids).predictions for run in (late, in_order))
    assert [p.attempts_seen for p in ours] == [p.attempts_seen for p in theirs]
    assert client.run(late).observations == client.run(in_order).observations == 40 * 8
    assert client.run(late).head_step == client.run(in_order).head_step == 39
    for name in world.ids[:12]:
        one, other = client.prompt(late, name), client.prompt(in_order, name)
        assert (one.visits, one.last_step) == (other.visits, other.last_step)
        assert sorted((v.step, v.successes) for v in one.history) == sorted(
            (v.step, v.successes) for v in other.history
        )
    means = np.array([[p.success_rate for p in predictions] for predictions in (ours, theirs)])
    assert np.abs(means[0] - means[1]).mean() < 0.03
    assert stats.spearmanr(means[0], means[1]).statistic > 0.97
    for run in (late, in_order):
        client.put_run(run, predictor="mopps")
    exact = [client.predict(run, world.ids).predictions for run in (late, in_order)]
    assert exact[0] == exact[1]


@one_backend
def test_four_workers_choose_about_as_well_as_one_after_the_other(caller: Caller) -> None:
    """In closed loop the batches differ; what they are worth must not, beyond what staleness costs."""
    world, client = World(), caller.client
    late = asynchronous(client, world.create(client, f"{caller.run}.a"), world, n_steps=48, batch_size=8, seed=3)
    fresh = synchronous(client, world.create(client, f"{caller.run}.s"), world, n_steps=48, batch_size=8)
    chance = synchronous(
        client, world.create(client, f"{caller.run}.u", predictor="uniform"), world, n_steps=48, batch_size=8
    )

    shares = [
        world.informative_share({step: batch for step, batch in batches.items() if step >= 16})
        for batches in (late, fresh, chance)
    ]

    assert shares[0] > shares[1] - 0.08
    assert shares[0] > shares[2] + 0.1


@one_backend
def test_the_lease_does_not_touch_a_trainer_that_reports_each_batch_before_the_next(caller: Caller) -> None:
    world, client = World(), caller.client
    runs = [world.create(client, f"{caller.run}.{lease}", lease_steps=lease) for lease in (0, 8, 1_000)]

    batches = [synchronous(client, run, world, n_steps=15, batch_size=8) for run in runs]

    assert batches[0] == batches[1] == batches[2]


@one_backend
def test_groups_reported_in_halves_count_as_one_visit(caller: Caller) -> None:
    world, client = World(), caller.client
    whole, halves = (world.create(client, f"{caller.run}.{name}", predictor="mopps") for name in ("w", "h"))
    for step in range(6):
        ids = world.ids[4 * step % 16 : 4 * step % 16 + 4]
        client.observe(whole, step, world.outcomes(ids, step))
        for part in (0, 1):
            client.observe(halves, step, world.outcomes(ids, step, part=part))

    assert client.predict(halves, world.ids).predictions == client.predict(whole, world.ids).predictions
    assert [client.prompt(run, "p0").visits for run in (whole, halves)] == [2, 2]


def test_a_restart_between_choice_and_outcome_changes_nothing_that_is_outstanding(
    start_service: Callable[[str], Service], database_url: str
) -> None:
    def chosen(service: Service, step: int, n: int) -> tuple[str, list[str], int]:
        reply = service.client.select_batch("math", step, n)
        return reply.selection_id, [prompt.prompt_id for prompt in reply.prompts], reply.outstanding

    before = start_service(database_url)
    before.client.put_run("math", embedder="none", lease_steps=8)
    before.client.add_prompts("math", [{"prompt_id": name} for name in NAMES])
    selection, batch, _ = chosen(before, 0, 6)
    before.stop()

    after = start_service(database_url)
    _, others, outstanding = chosen(after, 1, 6)
    after.client.observe("math", 0, outcomes(*batch[:4]), selection_id=selection)
    after.stop()
    last = start_service(database_url)

    assert (sorted({*batch, *others}), outstanding) == (sorted(NAMES), 0)
    assert chosen(last, 2, 12)[2] == 12 - 4


@one_backend
def test_what_came_too_late_for_a_step_teaches_the_beliefs_and_does_not_count_as_its_yield(pool: Caller) -> None:
    """A trainer that drops a stale group reports it without its selection: what it shows is true all the same."""
    pool.create(control_share=0.5)
    batch = pool.select(0, 8)
    ids = [prompt["prompt_id"] for prompt in batch["prompts"]]
    pool.observe(0, *outcomes(*ids[:4]), selection_id=batch["selection_id"])
    before, believed = pool.client.report(pool.run), pool.predict(ids[-1])

    pool.observe(3, *({**one, "rewards": [1, 1, 1, 1]} for one in outcomes(*ids[4:])))

    first, later = pool.client.report(pool.run).windows
    assert pool.predict(ids[-1])[0]["success_rate"] > believed[0]["success_rate"]
    assert (first, later.observations) == (before.windows[0], 4)
    assert later.policy_informative_share is later.control_informative_share is None
