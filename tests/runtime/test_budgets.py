"""Budgets over a real store: how far behind the log an answer may be, how many may wait, and what a fault costs."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray
from tests.waiting import PATIENCE_SECONDS, until_awaited

from evenodds.schemas import PromptRef
from evenodds_service.api.app import create_app
from evenodds_service.domain.log_entries import NewObservation, Outcomes
from evenodds_service.domain.prompts import NewPrompt
from evenodds_service.domain.settings import BudgetPolicy, RunSettings
from evenodds_service.errors import DeadlinePassed, Overloaded, StoreUnavailable
from evenodds_service.model.embedder import Embedder
from evenodds_service.runtime.budgets import DEFAULT_POLICY, Budget, Budgets
from evenodds_service.runtime.featurizer import CACHED_TEXTS, MOST_EMBEDDERS, Featurizer
from evenodds_service.runtime.live_runs import LiveRuns
from evenodds_service.settings import Settings
from evenodds_service.storage.engine import open_engine
from evenodds_service.storage.migration import upgrade
from evenodds_service.storage.store import Run, Store

NOW = datetime(2026, 1, 2, tzinfo=timezone.utc)


class CountingStore(Store):
    """A store that counts how often a run is read, and that can be cut off."""

    reads = 0
    is_cut_off = False
    held_back: threading.Event | None = None

    def run(self, name: str) -> Run:
        self.reads += 1
        if self.is_cut_off:
            raise StoreUnavailable("the database is away")
        run = super().run(name)
        if self.held_back is not None:
            assert self.held_back.wait(PATIENCE_SECONDS)
        return run


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Office:
    def __init__(self, store: CountingStore) -> None:
        self.store, self.clock = store, Clock()
        self.live_runs = LiveRuns(store, capacity=8, clock=self.clock)

    def budgets(self, *, staleness: float = 0.2, deadline: float = PATIENCE_SECONDS, capacity: int = 64) -> Budgets:
        return Budgets(
            self.live_runs,
            Featurizer(self.store),
            staleness_seconds=staleness,
            deadline_seconds=deadline,
            capacity=capacity,
        )

    def observe(self) -> None:
        run = Store.run(self.store, "r")
        self.store.append_observations(
            run.id, Outcomes(step=0, observations=[NewObservation.of_counts(0, 1, 4)]), now=NOW
        )


@pytest.fixture
def office(tmp_path: Path) -> Iterator[Office]:
    engine = open_engine(f"sqlite:///{tmp_path}/evenodds.db")
    upgrade(engine)
    store = CountingStore(engine)
    run, _ = store.put_run("r", RunSettings(predictor="mopps", embedder="none"), now=NOW)
    store.add_prompts(run.id, [NewPrompt("p")], (), embedder="none", embedding_width=None, now=NOW)
    store.reads = 0
    yield Office(store)
    store.close()


async def ask_for(budgets: Budgets, *, deadline_seconds: float | None = None) -> Budget:
    """The budget of the one prompt."""
    prompt = PromptRef(prompt_id="p")
    return await budgets.ask("r", prompt, policy=DEFAULT_POLICY, deadline_seconds=deadline_seconds)


def test_what_was_read_a_moment_ago_answers_without_the_database(office: Office) -> None:
    async def ask() -> list[Budget]:
        budgets = office.budgets()
        return [await ask_for(budgets) for _ in range(20)]

    replies = asyncio.run(ask())

    assert office.store.reads == 1
    assert {reply.log_position for reply in replies} == {1}


def test_what_is_too_old_is_read_anew_before_the_answer(office: Office) -> None:
    async def ask() -> tuple[Budget, Budget, Budget]:
        budgets = office.budgets()
        first = await ask_for(budgets)
        office.observe()
        office.clock.now = 0.09
        second = await ask_for(budgets)
        office.clock.now = 0.21
        return first, second, await ask_for(budgets)

    first, second, third = asyncio.run(ask())

    assert [reply.log_position for reply in (first, second, third)] == [1, 1, 2]
    assert [reply.seen for reply in (first, second, third)] == [0, 0, 4]
    assert second.age_seconds == pytest.approx(0.09)


def test_one_after_another_what_is_really_granted_keeps_to_the_target_too(office: Office) -> None:
    """No prompt is ever solved, which the beliefs do not expect: without correction 24 attempts would be made each."""
    policy = BudgetPolicy(name="mine", mode="sequential", target_attempts=4, max_attempts=24)
    office.store.put_budget_policy("r", policy)

    async def granted() -> list[int]:
        budgets, prompt, all_made = office.budgets(), PromptRef(prompt_id="p"), []
        for _ in range(450):
            made = 0
            while (await budgets.ask("r", prompt, policy="mine", failures=made)).attempts > 0:
                made += 1
            all_made.append(made)
        return all_made

    attempts = asyncio.run(granted())

    assert np.mean(attempts[:64]) > 6
    assert np.mean(attempts[300:]) == pytest.approx(4, rel=0.25)


def test_without_staleness_every_answer_has_read_the_log(office: Office) -> None:
    async def ask() -> list[int]:
        budgets, positions = office.budgets(staleness=0), []
        for _ in range(3):
            positions.append((await ask_for(budgets)).log_position)
            office.observe()
        return positions

    assert asyncio.run(ask()) == [1, 2, 3]


def test_without_staleness_a_look_that_began_before_the_question_does_not_answer_it(office: Office) -> None:
    async def ask() -> Budget:
        budgets = office.budgets(staleness=0)
        office.store.held_back = threading.Event()
        first = asyncio.create_task(ask_for(budgets))
        await until_awaited(lambda: office.store.reads, "the first look, in a thread")
        office.clock.now = 1.0
        office.observe()
        second = asyncio.create_task(ask_for(budgets))
        await asyncio.sleep(0.01)
        office.store.held_back.set()
        await first
        return await second

    assert asyncio.run(ask()).log_position == 2


def test_a_run_is_read_ahead_of_time_so_that_nobody_waits(office: Office) -> None:
    async def ask() -> None:
        budgets = office.budgets()
        await ask_for(budgets)
        office.clock.now = 0.15
        assert (await ask_for(budgets)).age_seconds == pytest.approx(0.15)
        await until_awaited(lambda: office.store.reads == 2, "the refresh, in a thread")

    asyncio.run(ask())


def test_those_who_wait_together_share_one_look_at_the_log(office: Office) -> None:
    async def ask() -> list[Budget]:
        budgets = office.budgets()
        return await asyncio.gather(*(ask_for(budgets) for _ in range(30)))

    replies = asyncio.run(ask())

    assert len(replies) == 30
    assert office.store.reads == 1


def test_a_database_that_is_away_matters_only_when_what_is_in_memory_is_too_old(office: Office) -> None:
    async def ask() -> None:
        budgets = office.budgets()
        await ask_for(budgets)
        office.store.is_cut_off = True
        office.clock.now = 0.19
        assert (await ask_for(budgets)).log_position == 1
        office.clock.now = 0.3
        with pytest.raises(StoreUnavailable):
            await ask_for(budgets)
        office.store.is_cut_off = False
        assert (await ask_for(budgets)).log_position == 1

    asyncio.run(ask())


def test_more_than_may_wait_are_turned_away_at_once(office: Office) -> None:
    async def ask() -> list[Budget | BaseException]:
        budgets = office.budgets(capacity=5)
        return await asyncio.gather(*(ask_for(budgets) for _ in range(8)), return_exceptions=True)

    replies = asyncio.run(ask())

    assert [type(reply) for reply in replies] == [Budget] * 5 + [Overloaded] * 3
    assert str(replies[-1]) == (
        "5 requests wait for a budget, the limit of one process: continue without a budget, or raise "
        "EVENODDS_BUDGET_QUEUE"
    )


def test_who_has_left_at_the_deadline_takes_no_room(office: Office) -> None:
    async def ask() -> Budget:
        budgets = office.budgets(capacity=1)
        with pytest.raises(DeadlinePassed, match=r"no budget within 0\.001 ms"):
            await ask_for(budgets, deadline_seconds=1e-6)
        return await ask_for(budgets)

    assert asyncio.run(ask()).log_position == 1


def test_while_the_run_is_being_folded_answers_come_from_beside_the_loop(office: Office) -> None:
    async def ask() -> Budget:
        budgets = office.budgets()
        await ask_for(budgets)
        live = office.live_runs.at_head("r").live
        held = asyncio.Event()

        def hold() -> None:
            with live.lock:
                loop.call_soon_threadsafe(held.set)
                release.wait(PATIENCE_SECONDS)

        release, loop = threading.Event(), asyncio.get_running_loop()
        holder = threading.Thread(target=hold)
        holder.start()
        await held.wait()
        asked = asyncio.create_task(ask_for(budgets))
        await asyncio.sleep(0.05)
        assert not asked.done()  # and the loop runs on meanwhile
        release.set()
        holder.join()
        return await asked

    assert asyncio.run(ask()).attempts >= 1


def test_predict_is_exact_unless_told_otherwise_and_a_choice_always_is(office: Office) -> None:
    async def ask(staleness_ms: float) -> list[int]:
        app = create_app(office.store, Settings(predict_staleness_ms=staleness_ms))
        asked = {"run": "r", "prompts": [{"prompt_id": "p"}]}
        positions = []
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as http:
            positions.append((await http.post("/predict", json=asked)).json()["log_position"])
            office.observe()
            positions.append((await http.post("/predict", json=asked)).json()["log_position"])
            chosen = await http.post("/select_batch", json={"run": "r", "step": int(staleness_ms), "batch_size": 1})
            positions.append(chosen.json()["log_position"])
        return positions

    assert asyncio.run(ask(0)) == [1, 2, 2]
    assert asyncio.run(ask(60_000)) == [3, 3, 4]


def test_a_text_that_is_asked_again_is_not_embedded_again(office: Office) -> None:
    embedded: list[str] = []

    def encode(texts: list[str]) -> NDArray[np.float32]:
        embedded.extend(texts)
        return np.ones((len(texts), 4), dtype=np.float32)

    featurizer = Featurizer(office.store, opener=lambda setting, prompt: Embedder("counting", 4, encode))
    run, _ = office.store.put_run("texts", RunSettings(), now=NOW)

    def vectors(*texts: str) -> list[list[float]]:
        items = [PromptRef(text=text) for text in texts]
        names = [f"prompts[{i}]" for i in range(len(items))]
        rows: list[list[float]] = featurizer.block(run, items, names=names).embedding_N_D.tolist()
        return rows

    first = vectors("one", "two", "one")
    again = vectors("two", "three", " one ")  # white space at the ends makes no other text

    assert embedded == ["one", "two", "three"]
    assert first == again == [[0.5] * 4] * 3


def test_only_so_many_texts_are_kept(office: Office) -> None:
    embedded: list[str] = []

    def encode(texts: list[str]) -> NDArray[np.float32]:
        embedded.extend(texts)
        return np.ones((len(texts), 4), dtype=np.float32)

    featurizer = Featurizer(office.store, opener=lambda setting, prompt: Embedder("counting", 4, encode))
    run, _ = office.store.put_run("texts", RunSettings(), now=NOW)
    many = [PromptRef(text=f"text {i}") for i in range(CACHED_TEXTS + 1)]

    featurizer.block(run, many, names=[""] * len(many))
    featurizer.block(run, [many[-1], many[0]], names=["", ""])

    assert len(embedded) == CACHED_TEXTS + 2
    assert embedded[-1] == "text 0"


def test_only_so_many_embedders_are_kept_open(office: Office) -> None:
    """Any caller may name another instruction; the one that was used last stays."""
    opened: list[str | None] = []

    def opener(setting: str, prompt: str | None) -> Embedder:
        opened.append(prompt)
        return Embedder("counting", 4, lambda texts: np.ones((len(texts), 4), dtype=np.float32))

    featurizer = Featurizer(office.store, opener=opener)
    for i in range(MOST_EMBEDDERS):
        featurizer.embedder(RunSettings(embedder_prompt=f"{i}"))
    featurizer.embedder(RunSettings(embedder_prompt="0"))
    assert len(opened) == MOST_EMBEDDERS

    featurizer.embedder(RunSettings(embedder_prompt="one more"))
    featurizer.embedder(RunSettings(embedder_prompt="0"))
    featurizer.embedder(RunSettings(embedder_prompt="1"))

    assert opened[MOST_EMBEDDERS:] == ["one more", "1"]
