"""Many small questions answered together: a queue for each run, answered in rounds.

A round begins after its questions have come, so that each answer may show everything that was acknowledged before its
question. How fresh an answer is decides whoever answers; who waits longer than it wants to has left, and takes no
room.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextvars import Context
from typing import Generic, TypeVar

from evenodds_service.errors import Overloaded

QuestionT = TypeVar("QuestionT")
AnswerT = TypeVar("AnswerT")


class Coalescer(Generic[QuestionT, AnswerT]):
    """The waiting questions of a process, by run. Belongs to one event loop.

    Args:
        answer: Answers all questions of a round about one run, in their order, each with an answer or the error that
            it gets; what it raises, all get. It may answer on the event loop as far as that takes little time.
        refusal: Why one more question about a run is too many, given the run and how many wait for an answer, of this
            run and of all; None where there is room.
        most_at_once: Questions in one round. Later ones wait for another, so that the first need not wait for all.
        one_at_a_time: Whether the questions that come during a round of their run wait for its end. Otherwise a round
            begins at the loop's next turn, whatever else is under way.
    """

    def __init__(
        self,
        answer: Callable[[str, Sequence[QuestionT]], Awaitable[Sequence[AnswerT | Exception]]],
        *,
        refusal: Callable[[str, int, int], str | None],
        most_at_once: int,
        one_at_a_time: bool,
    ) -> None:
        self._answer, self._refusal = answer, refusal
        self._most_at_once, self._one_at_a_time = most_at_once, one_at_a_time
        self._queues: dict[str, list[tuple[QuestionT, asyncio.Future[AnswerT]]]] = {}
        self._n_waiting: Counter[str] = Counter()
        self._n_waiting_in_all = 0
        self._at_work: set[str] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def ask(self, run: str, question: QuestionT, *, seconds: float | None = None) -> AnswerT:
        """The answer of the next round.

        Args:
            seconds: How long to wait for it; None waits for as long as it takes.

        Raises:
            Overloaded: too many wait already.
            asyncio.TimeoutError: there was no answer in time.
        """
        refusal = self._refusal(run, self._n_waiting[run], self._n_waiting_in_all)
        if refusal is not None:
            raise Overloaded(refusal)
        loop = asyncio.get_running_loop()
        future: asyncio.Future[AnswerT] = loop.create_future()
        queue = self._queues.setdefault(run, [])
        queue.append((question, future))
        if len(queue) == 1 and run not in self._at_work:
            # In a context of its own: a round belongs to no single request.
            task = Context().run(loop.create_task, self._work(run))
            self._tasks.add(task)  # the loop itself keeps weak references only
            task.add_done_callback(self._tasks.discard)
        self._n_waiting[run] += 1
        self._n_waiting_in_all += 1
        try:
            return await asyncio.wait_for(future, seconds)
        finally:
            self._n_waiting_in_all -= 1
            self._n_waiting[run] -= 1
            if not self._n_waiting[run]:
                del self._n_waiting[run]

    async def _work(self, run: str) -> None:
        """Answer in rounds until nobody waits."""
        if self._one_at_a_time:
            self._at_work.add(run)
        try:
            while queue := self._queues.pop(run, None):
                queue = [(question, future) for question, future in queue if not future.done()]  # who has not left
                now, later = queue[: self._most_at_once], queue[self._most_at_once :]
                if later:
                    self._queues[run] = later
                if now:
                    await self._round(run, now)
        finally:
            self._at_work.discard(run)
            for _, future in self._queues.pop(run, ()):  # only where the loop is shutting down
                future.cancel()

    async def _round(self, run: str, queue: Sequence[tuple[QuestionT, asyncio.Future[AnswerT]]]) -> None:
        answers: Sequence[AnswerT | Exception]
        try:
            answers = await self._answer(run, [question for question, _ in queue])
        except Exception as error:  # whatever it is, it is the answer of all that wait
            answers = [error] * len(queue)
        for (_, future), answer in zip(queue, answers, strict=True):
            if future.done():  # its request has left
                continue
            if isinstance(answer, Exception):
                future.set_exception(answer)
            else:
                future.set_result(answer)
