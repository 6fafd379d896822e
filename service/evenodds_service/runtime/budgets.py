"""The desk of the hot path: requests for a budget that wait together are answered together, from memory.

Runs on the event loop. The database is read, and anything slow computed, in threads beside it; the loop itself answers
from a view that is at most `staleness` old. More requests than the desk holds are turned away at once, and one that has
waited for its deadline is not worked on.
"""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from anyio import CapacityLimiter, to_thread

from evenodds.schemas import BudgetReply, BudgetRequest
from evenodds_service.domain.arrays import FloatArray
from evenodds_service.domain.budgets.allocation import attempts_at_price, solve_probability
from evenodds_service.domain.budgets.pricing import MOST_REQUESTS, Traffic
from evenodds_service.domain.distributions import mean_and_std
from evenodds_service.domain.settings import BUILTIN, CALLER, NO_EMBEDDER, BudgetPolicy
from evenodds_service.errors import DeadlinePassed, DeskFull, PolicyUnknown, UnknownPrompts
from evenodds_service.runtime.beliefs import UNKNOWN_HINT, Beliefs, beliefs_about
from evenodds_service.runtime.featurizer import Featurizer
from evenodds_service.runtime.live_run import LiveRun
from evenodds_service.runtime.live_runs import View, Views
from evenodds_service.storage.store import Run

DEFAULT_POLICY = "default"
_THREADS = 4
_LIGHT_CHARACTERS = 20_000
_KEPT_TRAFFIC = 256


class Desk:
    """Answers `POST /budget`.

    Args:
        staleness_seconds: Age up to which a view may answer; 0 reads the log for every batch of requests.
        deadline_seconds: After so long a request is given up, unless it names a shorter time.
        capacity: Requests that may wait at a time.
    """

    def __init__(
        self,
        views: Views,
        featurizer: Featurizer,
        *,
        staleness_seconds: float,
        deadline_seconds: float,
        capacity: int,
    ) -> None:
        self._views, self._featurizer = views, featurizer
        self._staleness, self._deadline, self._capacity = staleness_seconds, deadline_seconds, capacity
        self._n_waiting = 0
        self._waiting: dict[str, list[_Waiting]] = {}
        self._refreshes: dict[str, asyncio.Task[View]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._limiter: CapacityLimiter | None = None
        self._traffic: OrderedDict[tuple[int, BudgetPolicy], Traffic] = OrderedDict()
        self._traffic_lock = threading.Lock()

    async def ask(self, request: BudgetRequest) -> BudgetReply:
        """The budget of one request.

        Raises:
            DeskFull, DeadlinePassed: the service is too busy now.
            RunUnknown, PolicyUnknown, UnknownPrompts, EmbeddingRefused, StoreUnavailable: as elsewhere.
        """
        if self._n_waiting >= self._capacity:
            raise DeskFull(
                f"{self._n_waiting} requests wait for a budget, the most that one process holds: go on without one, "
                "or raise EVENODDS_BUDGET_QUEUE"
            )
        loop = asyncio.get_running_loop()
        seconds = self._deadline
        if request.deadline_ms is not None:
            seconds = min(seconds, request.deadline_ms / 1_000)
        waiting = _Waiting(request, loop.create_future(), self._views.now())
        queue = self._waiting.setdefault(request.run, [])
        queue.append(waiting)
        if len(queue) == 1:
            loop.call_soon(self._serve, request.run)
        self._n_waiting += 1
        try:
            return await asyncio.wait_for(waiting.reply, seconds)
        except asyncio.TimeoutError:
            raise DeadlinePassed(
                f"no budget within {1_000 * seconds:g} ms: go on without one, or allow more (deadline_ms, "
                "EVENODDS_BUDGET_DEADLINE_MS)"
            ) from None
        finally:
            self._n_waiting -= 1

    def _serve(self, name: str) -> None:
        """Answer all that wait for this run: at once if the view is fresh and free, else beside the loop."""
        queue = self._waiting.pop(name)
        view = self._views.peek(name, self._staleness)
        if view is None:
            self._start(self._serve_refreshed(name, queue))
            return
        if self._views.age(view) > self._staleness / 2:
            self._refresh(name)  # ahead of time, so that nobody has to wait for it
        if not _is_light(view.run, queue) or not view.live.lock.acquire(blocking=False):
            self._start(self._serve_aside(view, queue))
            return
        try:
            self._reply(view, queue, self._answers(view, queue))
        finally:
            view.live.lock.release()

    async def _serve_refreshed(self, name: str, queue: Sequence[_Waiting]) -> None:
        oldest_read = max(waiting.asked_at for waiting in queue) - self._staleness
        try:
            view = await asyncio.shield(self._refresh(name))
            while view.read_at < oldest_read:  # that look was under way before the question came
                view = await asyncio.shield(self._refresh(name))
        except Exception as error:  # whatever it is, it is the answer of all that wait
            for waiting in queue:
                waiting.refuse(error)
            return
        await self._serve_aside(view, queue)

    async def _serve_aside(self, view: View, queue: Sequence[_Waiting]) -> None:
        open_ = [waiting for waiting in queue if not waiting.reply.done()]
        answers = await self._in_thread(self._answers, view, open_)
        self._reply(view, open_, answers)

    def _refresh(self, name: str) -> asyncio.Task[View]:
        """The one task that reads this run anew."""
        task = self._refreshes.get(name)
        if task is None:
            task = self._start(self._in_thread(self._views.at_head, name))
            self._refreshes[name] = task

            def done(finished: asyncio.Task[View]) -> None:
                self._refreshes.pop(name, None)
                if not finished.cancelled():
                    finished.exception()  # who waits has it; ahead of time nobody does, and the next one tries again

            task.add_done_callback(done)
        return task

    async def _in_thread(self, work: Any, *arguments: Any) -> Any:
        if self._limiter is None:
            self._limiter = CapacityLimiter(_THREADS)
        return await to_thread.run_sync(work, *arguments, limiter=self._limiter)

    def _start(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)  # the loop itself keeps weak references only
        task.add_done_callback(self._tasks.discard)
        return task

    def _answers(self, view: View, queue: Sequence[_Waiting]) -> list[_Answer | Exception]:
        """An answer or a refusal for each. One request that is at fault spoils no other."""
        answers: dict[int, _Answer | Exception] = {}
        sound: list[int] = []
        for i, waiting in enumerate(queue):
            fault = _fault(view, waiting.request)
            if fault is None:
                sound.append(i)
            else:
                answers[i] = fault
        try:
            answers |= zip(sound, self._decided(view, [queue[i].request for i in sound]), strict=True)
        except Exception as error:  # of one of them, and rare: a vector that the run does not take, say
            if len(sound) == 1:
                answers[sound[0]] = error
            else:
                answers |= {i: self._answers(view, [queue[i]])[0] for i in sound}
        return [answers[i] for i in range(len(queue))]

    def _decided(self, view: View, requests: Sequence[BudgetRequest]) -> Sequence[_Answer]:
        if not requests:
            return ()
        policies = [budget_policy(view.run, request.policy) for request in requests]
        prompts = [request.prompt for request in requests]
        asked = beliefs_about(self._featurizer, view.run, view.live, prompts, names=["prompt"] * len(prompts))
        failures = np.array([request.failures for request in requests])
        a, b = asked.a, asked.b + failures
        answers: list[_Answer | None] = [None] * len(requests)
        for policy in dict.fromkeys(policies):
            rows = np.array([i for i, other in enumerate(policies) if other is policy or other == policy])
            fresh = rows[failures[rows] == 0]  # what goes on is no new traffic
            done = failures[rows]
            traffic = self._traffic_of(view, policy) if policy.price is None else None
            with self._traffic_lock:
                price = traffic.price(a[fresh], b[fresh]) if traffic is not None else policy.price or 0.0
                attempts = attempts_at_price(
                    policy.mode,
                    a[rows],
                    b[rows],
                    price,
                    minimum=np.maximum(policy.min_attempts - done, 0),
                    maximum=np.maximum(policy.max_attempts - done, 0),
                )
                if traffic is not None:
                    traffic.grant(int((attempts > 0).sum()))
            mean, std = mean_and_std(a[rows], b[rows])
            solved = solve_probability(a[rows], b[rows], attempts)
            columns = (attempts.tolist(), mean.tolist(), std.tolist(), solved.tolist(), asked.seen[rows].tolist())
            for row, n, rate, deviation, chance, seen in zip(rows.tolist(), *columns, strict=True):
                answers[row] = _Answer(policy, price, n, rate, deviation, chance, int(seen), asked)
        return [answer for answer in answers if answer is not None]

    def _traffic_of(self, view: View, policy: BudgetPolicy) -> Traffic:
        """What was asked under this policy; begins with the prompts that the run observed last."""
        key = (view.run.id, policy)
        fresh = None
        if key not in self._traffic:
            # Takes the run's lock: never while the traffic's is held, which is waited for with the run's lock in hand.
            fresh = Traffic(policy, *_observed(view.run, view.live))
        with self._traffic_lock:
            traffic = self._traffic.get(key) or fresh or Traffic(policy, np.zeros(0), np.zeros(0))
            self._traffic[key] = traffic
            self._traffic.move_to_end(key)
            while len(self._traffic) > _KEPT_TRAFFIC:
                self._traffic.popitem(last=False)
        return traffic

    def _reply(self, view: View, queue: Sequence[_Waiting], answers: Sequence[_Answer | Exception]) -> None:
        age_ms = 1_000 * self._views.age(view)
        for waiting, answer in zip(queue, answers, strict=True):
            if isinstance(answer, Exception):
                waiting.refuse(answer)
            elif not waiting.reply.done():
                waiting.reply.set_result(answer.in_words(waiting.request, age_ms))


def budget_policy(run: Run, name: str) -> BudgetPolicy:
    """The run's policy of this name; `default` is always there.

    Raises:
        PolicyUnknown: there is no such policy.
    """
    for policy in run.settings.budget_policies:
        if policy.name == name:
            return policy
    if name == DEFAULT_POLICY:
        return BudgetPolicy()
    known = ", ".join(sorted({DEFAULT_POLICY, *(policy.name for policy in run.settings.budget_policies)}))
    raise PolicyUnknown(
        f"run {run.name!r} has no budget policy {name!r}: create it with PUT "
        f"/runs/{{run}}/budget_policies/{{policy}}, or name one of {known}"
    )


def _fault(view: View, request: BudgetRequest) -> PolicyUnknown | UnknownPrompts | None:
    """What is unknown about the request, if anything."""
    try:
        budget_policy(view.run, request.policy)
    except PolicyUnknown as error:
        return error
    prompt = request.prompt
    if prompt.text is None and prompt.prompt_id not in view.live.pool.index:
        return UnknownPrompts(view.run.name, [prompt.prompt_id or ""], path="prompt", hint=UNKNOWN_HINT)
    return None


@dataclass(frozen=True, slots=True)
class _Waiting:
    request: BudgetRequest
    reply: asyncio.Future[BudgetReply]
    asked_at: float

    def refuse(self, error: Exception) -> None:
        if not self.reply.done():
            self.reply.set_exception(error)


@dataclass(frozen=True, slots=True, eq=False)
class _Answer:
    policy: BudgetPolicy
    price: float
    attempts: int
    success_rate: float
    std: float
    solve_probability: float
    seen: int
    asked: Beliefs

    def in_words(self, request: BudgetRequest, age_ms: float) -> BudgetReply:
        tier = self.policy.tier(self.success_rate)
        return BudgetReply(
            run=request.run,
            policy=self.policy.name,
            policy_version=self.policy.version,
            mode=self.policy.mode,
            attempts=self.attempts,
            go_on=self.attempts > 0,
            effort=tier.label,
            max_tokens_scale=tier.max_tokens_scale,
            success_rate=self.success_rate,
            std=self.std,
            solve_probability=max(0.0, self.solve_probability),
            price=self.price,
            attempts_seen=self.seen,
            model_version=self.asked.model_version,
            log_position=self.asked.log_position,
            age_ms=age_ms,
        )


def _observed(run: Run, live: LiveRun) -> tuple[FloatArray, FloatArray]:
    """Beliefs about the newest prompts of the pool that were observed, at most as many as traffic holds."""
    with live.lock:
        rows = np.flatnonzero(live.state.visits_N)[-MOST_REQUESTS:]
        return live.beliefs(run.settings.predictor, rows) if len(rows) else (np.zeros(0), np.zeros(0))


def _is_light(run: Run, queue: Sequence[_Waiting]) -> bool:
    """Whether the event loop can answer itself within a few milliseconds."""
    if run.settings.predictor == "gps-paper" or run.settings.embedder not in (None, BUILTIN, CALLER, NO_EMBEDDER):
        return False
    return sum(len(waiting.request.prompt.text or "") for waiting in queue) <= _LIGHT_CHARACTERS
