"""Budgets of single requests, on the hot path: those that come together are answered together, from memory.

Runs on the event loop. The database is read, and anything slow computed, in threads beside it; the loop itself answers
from what is at most `staleness` behind the log. More requests than may wait are turned away at once, and one that has
waited for its deadline is not worked on. Knows nothing of the wire.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from anyio import CapacityLimiter, to_thread

from evenodds_service.domain.arrays import FloatArray
from evenodds_service.domain.budgets.allocation import attempts_at_price, solve_probability
from evenodds_service.domain.budgets.pricing import MOST_REQUESTS, Traffic
from evenodds_service.domain.distributions import mean_and_std
from evenodds_service.domain.learning.predictors import PREDICTORS
from evenodds_service.domain.prompts import text_to_read
from evenodds_service.domain.retention import SERVED_PROMPTS
from evenodds_service.domain.settings import BUILTIN, CALLER, NO_EMBEDDER, BudgetPolicy
from evenodds_service.errors import DeadlinePassed, PolicyUnknown, StoreError, UnknownPrompts
from evenodds_service.runtime.beliefs import UNKNOWN_HINT, beliefs_about
from evenodds_service.runtime.coalescer import Coalescer
from evenodds_service.runtime.featurizer import Featurizer, PromptLike
from evenodds_service.runtime.live_run import LiveRun
from evenodds_service.runtime.live_runs import FoldedRun, LiveRuns
from evenodds_service.storage.store import Run

logger = logging.getLogger(__name__)

DEFAULT_POLICY = "default"
_THREADS = 4
_LIGHT_CHARACTERS = 20_000
_KEPT_TRAFFIC = 256

T = TypeVar("T")


@dataclass(frozen=True, slots=True, eq=False)
class Budget:
    """What one request deserves, by a policy, and what that was decided on.

    Attributes:
        price: Of one attempt, in probability: attempts that gain less are not made, >= 0.
        attempts: So many, besides those that failed already.
        success_rate, std: Mean and standard deviation of the belief about the prompt.
        solve_probability: That one of the attempts succeeds, in [0, 1].
        seen: Attempts observed of the prompt.
        age_seconds: Since the log was read.
        run_id, head_step: Of the run; its newest step, 0 where there is none.
        prompt_id: The prompt's id, which a new text has too.
        is_new: Whether the pool does not have it.
        keeps_text: Whether the run keeps texts.
    """

    policy: BudgetPolicy
    price: float
    attempts: int
    success_rate: float
    std: float
    solve_probability: float
    seen: int
    model_version: int
    log_position: int
    age_seconds: float
    run_id: int
    head_step: int
    prompt_id: str
    is_new: bool
    keeps_text: bool


@dataclass(slots=True, eq=False)
class _Question:
    prompt: PromptLike
    policy: str
    failures: int
    asked_at: float
    has_left: bool = False


class Budgets:
    """Decides the budget of each request.

    Args:
        staleness_seconds: So far behind the log an answer may be; 0 reads the log for every round of requests.
        deadline_seconds: After so long a request is given up, unless it names a shorter time.
        capacity: Requests that may wait at a time.
        settle_retention: Called once with a run's id and how many prompts it may keep, when it proves to be a served
            one.
    """

    def __init__(
        self,
        live_runs: LiveRuns,
        featurizer: Featurizer,
        *,
        staleness_seconds: float,
        deadline_seconds: float,
        capacity: int,
        settle_retention: Callable[[int, int], None] | None = None,
    ) -> None:
        self._live_runs, self._featurizer = live_runs, featurizer
        self._staleness, self._deadline, self._capacity = staleness_seconds, deadline_seconds, capacity
        self._coalescer: Coalescer[_Question, Budget] = Coalescer(
            self._answers, refusal=self._refusal, most_at_once=capacity, one_at_a_time=False
        )
        self._refreshes: dict[str, asyncio.Task[FoldedRun]] = {}
        self._limiter: CapacityLimiter | None = None
        self._traffic: OrderedDict[tuple[int, BudgetPolicy], Traffic] = OrderedDict()
        self._traffic_lock = threading.Lock()
        self._settle_retention = settle_retention
        self._settling: set[int] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def ask(
        self, run: str, prompt: PromptLike, *, policy: str, failures: int = 0, deadline_seconds: float | None = None
    ) -> Budget:
        """The budget of one request.

        Args:
            policy: Name of a budget policy of the run.
            failures: Attempts of this request that failed already; they are not observed yet.
            deadline_seconds: Shortens that of the service.

        Raises:
            Overloaded, DeadlinePassed: the service is too busy now.
            RunUnknown, PolicyUnknown, UnknownPrompts, EmbeddingRefused, StoreUnavailable: as elsewhere.
        """
        seconds = self._deadline if deadline_seconds is None else min(self._deadline, deadline_seconds)
        question = _Question(prompt, policy, failures, self._live_runs.now())
        try:
            return await self._coalescer.ask(run, question, seconds=seconds)
        except asyncio.TimeoutError:
            raise DeadlinePassed(
                f"no budget within {1_000 * seconds:g} ms: continue without a budget, or allow more time (deadline_ms, "
                "EVENODDS_BUDGET_DEADLINE_MS)"
            ) from None
        finally:
            question.has_left = True

    def _refusal(self, run: str, n_of_run: int, n_in_all: int) -> str | None:
        if n_in_all < self._capacity:
            return None
        return (
            f"{n_in_all} requests wait for a budget, the limit of one process: continue without a "
            "budget, or raise EVENODDS_BUDGET_QUEUE"
        )

    async def _answers(self, name: str, questions: Sequence[_Question]) -> Sequence[Budget | Exception]:
        """Of one round: at once if the run in memory is fresh and free, else beside the loop."""
        folded = self._live_runs.held(name, self._staleness)
        if folded is None:
            folded = await self._read(name, since=max(question.asked_at for question in questions) - self._staleness)
            return self._settled(folded, await self._in_thread(lambda: self._budgets(folded, questions)))
        if self._live_runs.age(folded) > self._staleness / 2:
            self._refresh(name)  # ahead of time, so that nobody has to wait for it
        if not _is_light(folded.run, questions) or not folded.live.lock.acquire(blocking=False):
            return self._settled(folded, await self._in_thread(lambda: self._budgets(folded, questions)))
        try:
            return self._settled(folded, self._budgets(folded, questions))
        finally:
            folded.live.lock.release()

    def _settled(self, folded: FoldedRun, answers: Sequence[Budget | Exception]) -> Sequence[Budget | Exception]:
        """A run that answers budgets and has never chosen a batch is a served one: from now on its pool is bounded."""
        run = folded.run
        is_settled = run.settings.retain_prompts is not None or folded.live.state.tallies.n_selections
        is_answered = any(isinstance(answer, Budget) for answer in answers)
        if is_settled or not is_answered or run.id in self._settling or self._settle_retention is None:
            return answers
        settle = self._settle_retention
        self._settling.add(run.id)

        async def work() -> None:
            try:
                await self._in_thread(lambda: settle(run.id, SERVED_PROMPTS))
                self._live_runs.forget(run.name)
            except StoreError as error:
                logger.warning("run %r: its retention could not be set, and is tried again: %s", run.name, error)
            finally:
                self._settling.discard(run.id)
                self._tasks.discard(task)

        task = asyncio.get_running_loop().create_task(work())
        self._tasks.add(task)
        return answers

    async def _read(self, name: str, *, since: float) -> FoldedRun:
        """The run as it was at `since` or later."""
        folded = await asyncio.shield(self._refresh(name))
        while folded.read_at < since:  # that look was under way before the question came
            folded = await asyncio.shield(self._refresh(name))
        return folded

    def _refresh(self, name: str) -> asyncio.Task[FoldedRun]:
        """The one task that reads this run anew."""
        task = self._refreshes.get(name)
        # One that has ended stays until the loop comes round to `done`. Awaiting it would give the loop no turn: what
        # waits for a newer look would spin and stop the service.
        if task is None or task.done():
            task = asyncio.get_running_loop().create_task(self._in_thread(lambda: self._live_runs.at_head(name)))
            self._refreshes[name] = task

            def done(finished: asyncio.Task[FoldedRun]) -> None:
                if self._refreshes.get(name) is finished:
                    del self._refreshes[name]
                if not finished.cancelled():
                    finished.exception()  # who waits has it; ahead of time nobody does, and the next one tries again

            task.add_done_callback(done)
        return task

    async def _in_thread(self, work: Callable[[], T]) -> T:
        if self._limiter is None:
            self._limiter = CapacityLimiter(_THREADS)
        return await to_thread.run_sync(work, limiter=self._limiter)

    def _budgets(self, folded: FoldedRun, questions: Sequence[_Question]) -> list[Budget | Exception]:
        """A budget or a refusal for each. One request that is at fault spoils no other."""
        answers: dict[int, Budget | Exception] = {}
        sound: list[tuple[int, BudgetPolicy]] = []
        for i, question in enumerate(questions):
            if question.has_left:
                answers[i] = DeadlinePassed("nobody waits for this budget any more")
                continue
            try:
                policy = budget_policy(folded.run, question.policy)
                _check_prompt(folded, question.prompt)
            except (PolicyUnknown, UnknownPrompts) as error:
                answers[i] = error
            else:
                sound.append((i, policy))

        def decided(some: Sequence[tuple[int, BudgetPolicy]]) -> dict[int, Budget | Exception]:
            asked = [questions[i] for i, _ in some]
            try:
                found = self._decided(folded, asked, [policy for _, policy in some])
                return {i: budget for (i, _), budget in zip(some, found, strict=True)}
            except Exception as error:  # of one of them, and rare: a vector that the run does not take, say
                if len(some) == 1:
                    return {some[0][0]: error}
                return {i: answer for one in some for i, answer in decided([one]).items()}

        if sound:
            answers |= decided(sound)
        return [answers[i] for i in range(len(questions))]

    def _decided(
        self, folded: FoldedRun, questions: Sequence[_Question], policies: Sequence[BudgetPolicy]
    ) -> Sequence[Budget]:
        """The budget of each question by its policy. Price and attempts are computed once for each policy."""
        prompts = [question.prompt for question in questions]
        asked = beliefs_about(self._featurizer, folded.run, folded.live, prompts, names=["prompt"] * len(prompts))
        failures = np.array([question.failures for question in questions])
        a, b = asked.a, asked.b + failures
        age = self._live_runs.age(folded)
        budgets: dict[int, Budget] = {}
        for policy in dict.fromkeys(policies):
            rows = np.array([i for i, other in enumerate(policies) if other is policy or other == policy])
            fresh = rows[failures[rows] == 0]  # what goes on is no new traffic
            done = failures[rows]
            traffic = self._traffic_of(folded, policy) if policy.price is None else None
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
            solved = np.maximum(solve_probability(a[rows], b[rows], attempts), 0.0)
            columns = (attempts.tolist(), mean.tolist(), std.tolist(), solved.tolist(), asked.seen[rows].tolist())
            for row, n, rate, deviation, chance, seen in zip(rows.tolist(), *columns, strict=True):
                budgets[row] = Budget(
                    policy,
                    price,
                    n,
                    rate,
                    deviation,
                    chance,
                    int(seen),
                    asked.model_version,
                    asked.log_position,
                    age,
                    folded.run.id,
                    folded.run.head_step or 0,
                    asked.ids[row],
                    asked.ids[row] not in folded.live.pool.index,
                    folded.run.settings.keep_text,
                )
        return [budgets[i] for i in range(len(questions))]

    def _traffic_of(self, folded: FoldedRun, policy: BudgetPolicy) -> Traffic:
        """What was asked under this policy; begins with the prompts that the run observed last."""
        key = (folded.run.id, policy)
        fresh = None
        if key not in self._traffic:
            # Takes the run's lock: never while the traffic's is held, which is waited for while the run's is held.
            fresh = Traffic(policy, *_observed(folded.run, folded.live))
        with self._traffic_lock:
            traffic = self._traffic.get(key) or fresh or Traffic(policy, np.zeros(0), np.zeros(0))
            self._traffic[key] = traffic
            self._traffic.move_to_end(key)
            while len(self._traffic) > _KEPT_TRAFFIC:
                self._traffic.popitem(last=False)
        return traffic


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


def _check_prompt(folded: FoldedRun, prompt: PromptLike) -> None:
    """Raises UnknownPrompts where only the pool could tell what is asked about, and does not have it."""
    if prompt.text is None and prompt.prompt_id not in folded.live.pool.index:
        raise UnknownPrompts(folded.run.name, [prompt.prompt_id or ""], path="prompt", hint=UNKNOWN_HINT)


def _observed(run: Run, live: LiveRun) -> tuple[FloatArray, FloatArray]:
    """Beliefs about the newest prompts of the pool that were observed, at most as many as traffic holds."""
    with live.lock:
        rows = np.flatnonzero(live.state.visits_N)[-MOST_REQUESTS:]
        return live.beliefs(run.settings.predictor, rows) if len(rows) else (np.zeros(0), np.zeros(0))


def _is_light(run: Run, questions: Sequence[_Question]) -> bool:
    """Whether the event loop can answer itself within a few milliseconds."""
    settings = run.settings
    if PREDICTORS[settings.predictor].is_published or settings.embedder not in (None, BUILTIN, CALLER, NO_EMBEDDER):
        return False
    prompts = (question.prompt for question in questions)
    return sum(len(text_to_read(prompt.text, prompt.answer)) for prompt in prompts) <= _LIGHT_CHARACTERS
