"""Questions about one run are answered together, none by a look at the log that is older than the question."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from pathlib import Path

import httpx
import pytest
from tests.waiting import PATIENCE_SECONDS

from evenodds import Problem
from evenodds_service.api.app import create_app
from evenodds_service.api.routes import training
from evenodds_service.errors import Overloaded
from evenodds_service.runtime.coalescer import Coalescer
from evenodds_service.storage import migration
from evenodds_service.storage.engine import open_engine
from evenodds_service.storage.store import Run, Store


class Oracle:
    """Answers with the number of the round; each round waits for its leave."""

    def __init__(self, *, is_open: bool = False) -> None:
        self.rounds: list[list[int]] = []
        self.started = threading.Semaphore(0)
        self.leave = threading.Semaphore(1_000 if is_open else 0)

    async def answer(self, run: str, questions: Sequence[int]) -> list[int | Exception]:
        return await asyncio.to_thread(self._answer, questions)

    def _answer(self, questions: Sequence[int]) -> list[int | Exception]:
        self.rounds.append(list(questions))
        number = len(self.rounds)
        self.started.release()
        assert self.leave.acquire(timeout=PATIENCE_SECONDS)
        if 13 in questions:
            raise ConnectionError("all of you")
        return [ValueError("you alone") if question < 0 else number for question in questions]


def coalescer(oracle: Oracle, *, most_waiting: int = 1_000, one_at_a_time: bool = True) -> Coalescer[int, int]:
    """Holds at most `most_waiting` questions about a run, and 64 in a round."""

    def refusal(run: str, n_of_run: int, n_in_all: int) -> str | None:
        return f"{n_of_run} about {run}, {n_in_all} in all" if n_of_run >= most_waiting else None

    return Coalescer(oracle.answer, refusal=refusal, most_at_once=64, one_at_a_time=one_at_a_time)


async def began(oracle: Oracle) -> None:
    assert await asyncio.to_thread(oracle.started.acquire, timeout=PATIENCE_SECONDS)


def test_questions_that_come_during_a_round_share_the_next_one() -> None:
    oracle = Oracle()

    async def ask() -> list[int]:
        questions = coalescer(oracle)
        tasks = [asyncio.create_task(questions.ask("r", 0))]
        await began(oracle)
        tasks += [asyncio.create_task(questions.ask("r", n)) for n in (1, 2, 3)]
        await asyncio.sleep(0)
        oracle.leave.release()
        await began(oracle)
        oracle.leave.release()
        return await asyncio.gather(*tasks)

    assert asyncio.run(ask()) == [1, 2, 2, 2]
    assert oracle.rounds == [[0], [1, 2, 3]]


def test_one_run_does_not_wait_for_another() -> None:
    oracle = Oracle()

    async def ask() -> tuple[int, int]:
        questions = coalescer(oracle)
        slow = asyncio.create_task(questions.ask("slow", 0))
        await began(oracle)
        quick = asyncio.create_task(questions.ask("quick", 1))
        await began(oracle)
        oracle.leave.release(2)
        return await slow, await quick

    assert sorted(asyncio.run(ask())) == [1, 2]


def test_each_question_gets_its_own_error_or_that_of_its_round() -> None:
    oracle = Oracle(is_open=True)

    async def ask(*numbers: int) -> list[int | BaseException]:
        questions = coalescer(oracle)
        return await asyncio.gather(*(questions.ask("r", number) for number in numbers), return_exceptions=True)

    good, alone = asyncio.run(ask(1, -1))
    assert good == 1
    assert isinstance(alone, ValueError)
    assert all(isinstance(answer, ConnectionError) for answer in asyncio.run(ask(1, 13, 2)))


def test_after_an_error_and_after_a_pause_questions_are_answered_again() -> None:
    oracle = Oracle(is_open=True)

    async def ask() -> list[int]:
        questions = coalescer(oracle)
        with pytest.raises(ConnectionError):
            await questions.ask("r", 13)
        return [await questions.ask("r", 1), await questions.ask("r", 2)]

    assert asyncio.run(ask()) == [2, 3]


def test_a_round_holds_a_limited_number_and_every_question_is_answered_once() -> None:
    oracle = Oracle(is_open=True)
    n = 3 * 64 + 5

    async def ask() -> None:
        questions = coalescer(oracle)
        await asyncio.gather(*(questions.ask("r", number + 100) for number in range(n)))

    asyncio.run(ask())

    assert max(len(questions) for questions in oracle.rounds) <= 64
    assert sorted(question for questions in oracle.rounds for question in questions) == [i + 100 for i in range(n)]


def test_a_question_that_was_given_up_holds_nobody_up() -> None:
    oracle = Oracle()

    async def ask() -> int:
        questions = coalescer(oracle)
        given_up = asyncio.create_task(questions.ask("r", 0))
        await began(oracle)
        given_up.cancel()
        patient = asyncio.create_task(questions.ask("r", 1))
        oracle.leave.release(2)
        return await patient

    assert asyncio.run(ask()) == 2


def test_who_would_be_one_too_many_is_sent_away_and_those_before_are_served() -> None:
    oracle = Oracle()

    async def ask() -> list[int | BaseException]:
        questions = coalescer(oracle, most_waiting=3)
        first = asyncio.create_task(questions.ask("r", 0))
        await began(oracle)
        asked = [asyncio.create_task(questions.ask("r", n)) for n in (1, 2, 3)]
        await asyncio.wait(asked[2:])
        asked[0].cancel()  # who has given up makes room
        await asyncio.sleep(0)
        asked.append(asyncio.create_task(questions.ask("r", 4)))
        await asyncio.sleep(0)
        oracle.leave.release(2)
        return await asyncio.gather(first, *asked, return_exceptions=True)

    first, given_up, waited, too_many, late = asyncio.run(ask())

    assert (first, waited, late) == (1, 2, 2)
    assert isinstance(given_up, asyncio.CancelledError)
    assert isinstance(too_many, Overloaded)
    assert str(too_many) == "3 about r, 3 in all"
    assert oracle.rounds == [[0], [2, 4]]


def test_where_rounds_need_not_take_turns_one_that_lasts_holds_nobody_up() -> None:
    oracle = Oracle()

    async def ask() -> list[int]:
        questions = coalescer(oracle, one_at_a_time=False)
        slow = asyncio.create_task(questions.ask("r", 0))
        await began(oracle)
        together = [asyncio.create_task(questions.ask("r", n)) for n in (1, 2)]
        await began(oracle)
        assert not slow.done()
        oracle.leave.release(2)
        return await asyncio.gather(slow, *together)

    assert sorted(asyncio.run(ask())) == [1, 2, 2]
    assert oracle.rounds == [[0], [1, 2]]


def test_who_waits_for_so_many_seconds_only_leaves_then_and_makes_room() -> None:
    oracle = Oracle()

    async def ask() -> int:
        questions = coalescer(oracle, most_waiting=1)
        with pytest.raises(asyncio.TimeoutError):
            await questions.ask("r", 0, seconds=0.001)
        patient = asyncio.create_task(questions.ask("r", 1))
        oracle.leave.release(2)
        return await patient

    assert asyncio.run(ask()) >= 1
    assert [1] in oracle.rounds


def test_predictions_over_a_database_that_hangs_wait_in_a_line_of_limited_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = 100
    monkeypatch.setattr(training, "MOST_WAITING", limit)
    go_on = threading.Event()

    class Hanging(Store):
        def run(self, name: str) -> Run:
            go_on.wait(PATIENCE_SECONDS)
            return super().run(name)

    engine = open_engine(f"sqlite:///{tmp_path / 'hangs.db'}")
    migration.upgrade(engine)
    app = create_app(Hanging(engine))
    body = {"run": "nobody", "prompts": [{"prompt_id": "a"}]}

    async def crowd() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
            asked = [asyncio.create_task(http.post("/predict", json=body)) for _ in range(limit + 50)]
            await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)  # nobody is served yet
            go_on.set()
            return list(await asyncio.gather(*asked))

    replies = asyncio.run(crowd())
    engine.dispose()

    refused = [reply for reply in replies if reply.status_code == 503]
    assert {reply.status_code for reply in replies if reply not in refused} == {404}
    assert 0 < len(refused) <= 50
    problem = Problem.model_validate_json(refused[0].content)
    assert (problem.code, refused[0].headers["retry-after"]) == ("overloaded", "1")
    assert f"the limit is {limit}:" in problem.detail
