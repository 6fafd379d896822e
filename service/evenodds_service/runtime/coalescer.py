"""Many small questions answered together.

Questions about one run that come while others are answered wait for the next round, which looks at the log's head once
and passes over the arrays once for all of them. A round begins after its questions have come: each answer shows
everything that was acknowledged before its question.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextvars import Context
from typing import Generic, TypeVar

from starlette.concurrency import run_in_threadpool

from evenodds_service.errors import RoundsFull

QuestionT = TypeVar("QuestionT")
AnswerT = TypeVar("AnswerT")

MOST_AT_ONCE = 64
"""Questions in one round: later ones wait for a round of their own, so that the first need not wait for all."""

MOST_WAITING = 1_000
"""Questions about one run that wait for a round: those before them take seconds already where the database hangs."""


class Rounds(Generic[QuestionT, AnswerT]):
    """The waiting questions of a process, by run. Belongs to one event loop.

    Args:
        answer: Answers all questions of a round about one run, in their order, each with an answer or the error that
            it gets; what it raises, all get. Runs in a thread.
        most_waiting: Questions about one run that may wait for a round, besides those in the present one.
    """

    def __init__(
        self,
        answer: Callable[[str, Sequence[QuestionT]], Sequence[AnswerT | Exception]],
        *,
        most_waiting: int = MOST_WAITING,
    ) -> None:
        self._answer = answer
        self._most_waiting = most_waiting
        self._waiting: dict[str, list[tuple[QuestionT, asyncio.Future[AnswerT]]]] = {}
        self._at_work: dict[str, asyncio.Task[None]] = {}

    async def ask(self, run: str, question: QuestionT) -> AnswerT:
        """The answer of the next round.

        Raises:
            RoundsFull: too many wait already.
        """
        loop = asyncio.get_running_loop()
        waiting = self._waiting.setdefault(run, [])
        if len(waiting) >= self._most_waiting:
            # Who has gone away in the meantime keeps nobody out.
            waiting[:] = [(asked, future) for asked, future in waiting if not future.done()]
        if len(waiting) >= self._most_waiting:
            raise RoundsFull(
                f"{len(waiting)} requests wait for a prediction of run {run!r}, the limit is {self._most_waiting}: "
                "repeat the call later"
            )
        future: asyncio.Future[AnswerT] = loop.create_future()
        waiting.append((question, future))
        if run not in self._at_work:
            # In a context of its own: a round belongs to no single request.
            self._at_work[run] = Context().run(loop.create_task, self._work(run))
        return await future

    async def _work(self, run: str) -> None:
        try:
            while waiting := self._waiting.pop(run, None):
                now, later = waiting[:MOST_AT_ONCE], waiting[MOST_AT_ONCE:]
                if later:
                    self._waiting[run] = later
                answers: Sequence[AnswerT | Exception]
                try:
                    answers = await run_in_threadpool(self._answer, run, [question for question, _ in now])
                except Exception as error:
                    answers = [error] * len(now)
                for (_, future), answer in zip(now, answers, strict=True):
                    if future.done():  # its request was given up
                        continue
                    if isinstance(answer, Exception):
                        future.set_exception(answer)
                    else:
                        future.set_result(answer)
        finally:
            del self._at_work[run]
            for _, future in self._waiting.pop(run, ()):  # only where the loop is shutting down
                future.cancel()
