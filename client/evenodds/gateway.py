"""The gateway's side: budgets for requests on a hot path, and outcomes back. Never raises, never makes anyone wait.

`GatewayBudget` asks the service within a hard deadline and answers None where there is no answer: the gateway then goes
on as if there were no service ("fail open"). After several faults in a row it stops asking for a while (a circuit
breaker). Outcomes are kept in memory, and sent in the background when the service can take them.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from uuid import uuid4

import httpx
from pydantic import TypeAdapter

from evenodds.client import AsyncClient
from evenodds.errors import (
    ConfigurationError,
    EvenOddsError,
    InvalidRequest,
    ProblemError,
    RateLimited,
    ServerError,
)
from evenodds.judged_text import DEFAULT_RULE, TextRule
from evenodds.schemas import MAX_ITEMS, BudgetReply, Observation, PromptRef
from evenodds.schemas.fields import Step

logger = logging.getLogger(__name__)

Judged = str | PromptRef | Mapping[str, object] | Sequence[Mapping[str, object]]
"""What a budget is asked for, or an outcome is reported of: a text, a prompt, a conversation, or a whole request."""

FAULTS_TO_OPEN = 5
FIRST_DELIVERY_WAIT, MAX_DELIVERY_WAIT = 0.25, 30.0
_REPORTS_AT_ONCE = 1_000
_OF_THE_WHOLE_CALL = {"run_unknown", "step_jump", "route_unknown", "http_404"}
"""Codes of refusals that no outcome alone may be the cause of."""
_STEP: TypeAdapter[int] = TypeAdapter(Step)


@dataclass(slots=True)
class GatewayCounts:
    """What became of the requests and outcomes of one `GatewayBudget` so far.

    Attributes:
        answered: Requests that got a budget.
        late: Without an answer within the deadline.
        failed: Refused, or without a connection.
        skipped: Not asked, since the circuit was open.
        reported: Outcomes that the service accepted.
        dropped: Outcomes that were given up: the buffer was full, the service refuses them for good, or the gateway
            was closed before they were delivered.
        without_text: Requests that were not asked about, since no turn of the user has a text, or since it follows
            what only the provider has (`TextRule`).
        left_out: Answers that are not outcomes, by reason; see `evenodds.answers`. Whoever reports counts them.
    """

    answered: int = 0
    late: int = 0
    failed: int = 0
    skipped: int = 0
    reported: int = 0
    dropped: int = 0
    without_text: int = 0
    left_out: Counter[str] = field(default_factory=Counter)


class GatewayBudget:
    """Budgets of one run for a gateway on asyncio. Tasks of one event loop share one.

    It has more than eight arguments, because a gateway has no other place to set them. All but the run have a default.

    Args:
        base_url: Where the service is.
        run: The run that stands for the served model.
        policy: Name of the run's budget policy.
        deadline_ms: Longest wait of a request, whatever happens. Above 0.
        open_seconds: After five faults in a row, requests get no budget at once for this long; then one of them tries
            again. Above 0.
        buffer: Outcomes that may wait for delivery, at least 1; the oldest are dropped first.
        text_rule: Which text of a conversation is judged.
        transport: Carries the requests; a connection pool by default.
        clock: Monotonic, in seconds.

    As many arguments as a gateway decides on: they are the interface.

    Raises:
        ConfigurationError: An argument is out of its range.
    """

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8000",
        *,
        run: str,
        policy: str = "default",
        deadline_ms: float = 50.0,
        open_seconds: float = 5.0,
        buffer: int = 10_000,
        text_rule: TextRule = DEFAULT_RULE,
        transport: httpx.AsyncBaseTransport | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        for name, value in (("deadline_ms", deadline_ms), ("open_seconds", open_seconds)):
            if not (math.isfinite(value) and value > 0):
                raise ConfigurationError(f"{name} {value!r} must be finite and above 0")
        if buffer < 1:
            raise ConfigurationError(f"buffer {buffer!r} must be at least 1")
        self._client = AsyncClient(base_url, retries=0, transport=transport)
        self._run, self._policy, self._deadline = run, policy, deadline_ms / 1_000
        self._open_seconds, self._clock, self._text_rule = open_seconds, clock, text_rule
        self._faults = 0
        self._closed_until: float | None = None  # the circuit is open up to then
        self._reports: deque[tuple[int, Observation]] = deque(maxlen=buffer)
        self._parts: list[list[Observation]] = []  # of the batch under way, the next one last
        self._delivery: asyncio.Task[None] | None = None
        self._is_closing = False
        self.counts = GatewayCounts()

    async def budget(self, prompt: Judged, *, failures: int = 0, step: int | None = None) -> BudgetReply | None:
        """The budget of one request; None where the service does not give one in time, or nothing can be judged.

        Args:
            prompt: A string is a text. A list is the messages of a conversation, whose text `text_rule` takes, as it
                does of a mapping with `messages` or `input`, which is a whole request. `PromptRef`, or a mapping with
                its fields, may name a prompt of the pool.
            failures: Attempts of this request that failed so far, for policies that go on one by one.
            step: Version of the served model, under which a verdict by the reply's `decision_id` counts.
        """
        asked = self._described(prompt)
        if not asked:
            self.counts.without_text += 1
            return None
        if not self._may_ask():
            self.counts.skipped += 1
            return None
        deadline_ms = min(1_000 * self._deadline, 60_000)
        call = self._client.budget(
            self._run, asked, policy=self._policy, failures=failures, step=step, deadline_ms=deadline_ms
        )
        try:
            reply = await asyncio.wait_for(call, self._deadline)
        except asyncio.TimeoutError:
            self.counts.late += 1
            self._fault(f"no answer within {1_000 * self._deadline:g} ms")
        except Exception as error:  # a request must never fail because of us
            self.counts.failed += 1
            if _is_of_the_request(error):
                logger.debug("no budget: %s", error)
            else:
                self._fault(str(error))
        else:
            self.counts.answered += 1
            self._fine()
            return reply
        return None

    def report(self, prompt: Judged, rewards: Sequence[float], *, step: int) -> None:
        """Keep what came of the attempts at one request, to be sent soon. Needs a running event loop.

        Args:
            prompt: A string is a text. A list is the messages of a conversation, whose text `text_rule` takes, as it
                does of a mapping with `messages` or `input`, which is a whole request. Any other mapping has fields of
                `Observation` such as `prompt_id`, `text`, `category`.
            rewards: In [0, 1], one for each attempt that was made and finished; none for attempts that failed for
                other reasons than the model, or whose answer was cut off (`evenodds.answers_of` tells which). Without
                rewards, or where there is no text, nothing is kept.
            step: Version of the served model: a number that never falls.
        """
        described = self._described(prompt)
        if not described:
            return
        try:
            given = [float(reward) for reward in rewards]
            if not given:
                return
            observation = Observation.model_validate({**described, "rewards": given})
            step = _STEP.validate_python(step)
        except (ValueError, TypeError) as error:
            self.counts.dropped += 1
            logger.warning("an outcome cannot be reported: %s", error)
            return
        if self._is_closing:
            self.counts.dropped += 1
            return
        if len(self._reports) == self._reports.maxlen:
            self.counts.dropped += 1
        self._reports.append((step, observation))
        if self._delivery is None or self._delivery.done():
            self._delivery = asyncio.get_running_loop().create_task(self._deliver())

    def _described(self, prompt: Judged) -> dict[str, object]:
        """The fields that name the prompt; none where a conversation or a request has no text."""
        if isinstance(prompt, PromptRef):
            return prompt.model_dump(exclude_none=True)
        if isinstance(prompt, Mapping) and not ("messages" in prompt or "input" in prompt):
            return dict(prompt)
        text = prompt if isinstance(prompt, str) else self._text_rule.of(prompt)
        return {"text": text} if text else {}

    async def close(self, *, seconds: float = 1.0) -> None:
        """Try for so long to deliver what waits, then close the connections. What is left counts as dropped."""
        self._is_closing = True
        if self._delivery is not None and not self._delivery.done():
            await asyncio.wait([self._delivery], timeout=seconds)
            self._delivery.cancel()
            await asyncio.gather(self._delivery, return_exceptions=True)
        self.counts.dropped += len(self._reports) + sum(map(len, self._parts))
        self._reports.clear()
        self._parts.clear()
        await self._client.close()

    async def __aenter__(self) -> GatewayBudget:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    @property
    def is_open(self) -> bool:
        """Whether requests pass without asking at the moment."""
        return self._closed_until is not None and self._clock() < self._closed_until

    def _may_ask(self) -> bool:
        if self._closed_until is None:
            return True
        if self._clock() < self._closed_until:
            return False
        self._closed_until = self._clock() + self._open_seconds  # one tries, all others still pass
        return True

    def _fault(self, reason: str) -> None:
        self._faults += 1
        if self._faults == FAULTS_TO_OPEN:
            logger.warning(
                "%d requests in a row got no budget (%s): requests pass without a budget, and one request tries "
                "again every %g s",
                self._faults,
                reason,
                self._open_seconds,
            )
        if self._faults >= FAULTS_TO_OPEN:
            self._closed_until = self._clock() + self._open_seconds

    def _fine(self) -> None:
        if self._closed_until is not None:
            logger.warning("budgets are answered again")
        self._faults, self._closed_until = 0, None

    def _give_up(self, batch: Sequence[Observation], error: Exception) -> None:
        self.counts.dropped += len(batch)
        if len(batch) == 1:
            logger.warning("the service refused the outcome of %s, and it is dropped: %s", _name(batch[0]), error)
        else:
            logger.warning("the service refused %d outcomes, and they are dropped: %s", len(batch), error)

    async def _deliver(self) -> None:
        """Send what waits, oldest first, until nothing does."""
        while self._reports:
            await asyncio.sleep(0)  # what the same moment brings goes together
            step = self._reports[0][0]
            batch: list[Observation] = []
            while self._reports and self._reports[0][0] == step and len(batch) < min(_REPORTS_AT_ONCE, MAX_ITEMS):
                batch.append(self._reports.popleft()[1])
            self._parts.append(batch)
            await self._send_parts(step)

    async def _send_parts(self, step: int) -> None:
        """Send a batch, in halves where it is refused, so that one faulty outcome costs no other."""
        wait, request_id = FIRST_DELIVERY_WAIT, uuid4().hex  # a part keeps its id, so that it is counted once
        while self._parts:
            part = self._parts[-1]
            try:
                await self._client.observe(self._run, step, part, request_id=request_id)
            except Exception as error:
                if not _is_for_good(error):
                    logger.debug("%d outcomes wait: %s", len(part), error)
                    await asyncio.sleep(wait)
                    wait = min(2 * wait, MAX_DELIVERY_WAIT)
                    continue
                self._parts.pop()
                if len(part) > 1 and _may_be_of_one(error):
                    self._parts += [part[len(part) // 2 :], part[: len(part) // 2]]
                else:
                    self._give_up(part, error)
            else:
                self._parts.pop()
                self.counts.reported += len(part)
            wait, request_id = FIRST_DELIVERY_WAIT, uuid4().hex


def _name(observation: Observation) -> str:
    """What a log may say of it: texts of users stay out."""
    if observation.prompt_id is not None:
        return f"prompt {observation.prompt_id!r}"
    return f"a text of {len(observation.text or '')} characters"


def _is_of_the_request(error: Exception) -> bool:
    """Whether a budget failed by what was asked: nothing is wrong with the service."""
    if isinstance(error, ProblemError):
        return error.status in (413, 422)
    return isinstance(error, InvalidRequest)


def _is_for_good(error: Exception) -> bool:
    """Whether a delivery that failed so would fail each time."""
    if isinstance(error, ProblemError):
        return not isinstance(error, (ServerError, RateLimited))
    return isinstance(error, InvalidRequest) or not isinstance(error, EvenOddsError)


def _may_be_of_one(error: Exception) -> bool:
    """Whether one of several outcomes may be the reason why all of them are refused for good."""
    if isinstance(error, ProblemError):
        return error.status in (404, 409, 413, 422) and error.code not in _OF_THE_WHOLE_CALL
    return isinstance(error, InvalidRequest)
