"""LiteLLM's proxy: budgets before each call, outcomes after it.

`BudgetHook` is a callback of the proxy. Name an instance of it under `litellm_settings: callbacks` in the proxy's
configuration; `examples/litellm` shows one. Importing this module imports LiteLLM (1.80 or newer).
"""

from __future__ import annotations

import asyncio
import inspect
import json
import logging
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Coroutine,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import groupby
from typing import Any, Literal
from urllib.parse import quote

from litellm.integrations.custom_logger import CustomLogger  # type: ignore[import-not-found]  # see BudgetHook

from evenodds.answers import ABORTED, Answer, answers_of
from evenodds.errors import ConfigurationError
from evenodds.gateway import GatewayBudget
from evenodds.judged_text import DEFAULT_RULE, TextRule
from evenodds.schemas import BudgetReply

logger = logging.getLogger(__name__)

Parameter = Literal["n", "reasoning_effort", "max_tokens"]
Rewards = Sequence[float] | None
Verify = Callable[[Mapping[str, Any], Sequence[str]], "Rewards | Awaitable[Rewards]"]

EFFORT_ONLY: tuple[Parameter, ...] = ("reasoning_effort",)
METADATA = "evenodds"
"""Under this key of the request's metadata stands the decision, for the proxy's logs."""
HEADERS = "x-evenodds-"
"""With this begin the response's headers that say what was decided and changed."""

_DECISION = {
    *("run", "policy", "policy_version", "attempts", "effort", "success_rate", "price", "log_position", "decision_id")
}
_CHAT, _RESPONSES, _MESSAGES = "chat", "responses", "messages"
_ENDPOINTS = {
    "completion": _CHAT,
    "acompletion": _CHAT,
    "responses": _RESPONSES,
    "aresponses": _RESPONSES,
    "anthropic_messages": _MESSAGES,
}
_LIMITS = {
    _CHAT: ("max_completion_tokens", "max_tokens"),
    _RESPONSES: ("max_output_tokens",),
    _MESSAGES: ("max_tokens",),
}
_EFFORTS = ("reasoning_effort", "reasoning", "thinking", "output_config")
"""Where a caller may have set an effort itself."""


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What stands for a served model in Even Odds.

    Attributes:
        run: Its run.
        policy: A budget policy of the run; of mode `parallel` where `n` is set.
        step: Version of the served model: a number that never falls.
    """

    run: str
    policy: str = "default"
    step: int = 0


class _Decision(dict[str, Any]):
    """What a hook decided, told from what a caller sends under the same name."""


class BudgetHook(CustomLogger):  # type: ignore[misc]  # LiteLLM is not installed where this is checked
    """Sets what a request may spend by `POST /budget`, and reports what came of it.

    Works on `/v1/chat/completions`, `/v1/responses` and `/v1/messages`, streams too. What the caller has set itself
    stays; a length limit is only ever raised. Where the service gives no budget within the deadline the request passes
    as it came. Nothing here raises into the proxy. What was decided and changed stands in the response's headers
    `x-evenodds-*` and in the metadata under `evenodds`.

    Args:
        base_url: Where Even Odds is.
        models: The run, or the `ServedModel`, of each model by a pattern (`*`, `?`, `[...]`) of its name; the first one
            that fits counts. A budget is asked for the model that the caller names. An outcome goes to the model that
            answered: its deployment's own name (`hosted_vllm/m`) is looked up, then the group that it is in. Of a
            wildcard (`openai/*`) these are the names of the one model that answered, then those of the wildcard. A
            model that no pattern fits is left alone.
        sets: Which parameters it sets: `reasoning_effort` to the tier's label, but on `/v1/messages`, where no
            parameter holds for every provider; `max_tokens`, which raises the caller's own limit by the tier's scale;
            `n` to the number of attempts, where `picks` says so, the request is no
            stream, has no tools and nothing but text, and the policy is `parallel`.
        picks: Whether somebody picks the best of several answers to this request. Where `verify` tells them apart, the
            best answer becomes the first choice.
        verify: Scores the finished answers to a request: (request, their texts) -> a reward in [0, 1] for each text,
            or None where it cannot tell. Without it nothing is reported. Answers that were cut off, filtered, aborted,
            empty or ask for a tool are left out before, and counted by reason. The caller waits for it only where `n`
            was set. It may be a coroutine function; a plain one holds up every request of the proxy while it runs, so
            give work that takes long to `asyncio.to_thread`. Return None where a verdict by the header
            `x-evenodds-decision-id` follows: that is an outcome of its own, and the attempt would count twice.
        text_rule: Which text of a conversation is judged.
        deadline_ms: A request waits no longer than this, above 0.

    Attributes:
        gateways: A `GatewayBudget` of each served model, with its counts.

    Raises:
        ConfigurationError: An argument is out of its range, or does not fit another one.
    """

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8000",
        *,
        models: Mapping[str, str | ServedModel],
        sets: Collection[Parameter] = EFFORT_ONLY,
        picks: Callable[[Mapping[str, Any]], bool] | None = None,
        verify: Verify | None = None,
        text_rule: TextRule = DEFAULT_RULE,
        deadline_ms: float = 50.0,
    ) -> None:
        super().__init__()
        unknown = sorted(set(sets) - {"n", "reasoning_effort", "max_tokens"})
        if unknown:
            raise ConfigurationError(f"sets {unknown!r} is none of 'n', 'reasoning_effort', 'max_tokens'")
        if "n" in sets and picks is None:
            raise ConfigurationError(
                "sets 'n' asks for several answers, and callers read the first: say with picks for which requests "
                "somebody picks the best, or leave 'n' out"
            )
        if not models:
            raise ConfigurationError("models is empty: name the run of each served model, {'*': 'served'} for all")
        self._models = {
            pattern: served if isinstance(served, ServedModel) else ServedModel(served)
            for pattern, served in models.items()
        }
        self._sets, self._picks, self._verify = frozenset(sets), picks, verify
        self.gateways = {
            served: GatewayBudget(
                base_url, run=served.run, policy=served.policy, deadline_ms=deadline_ms, text_rule=text_rule
            )
            for served in self._models.values()
        }
        self._reports: set[asyncio.Task[None]] = set()

    async def async_pre_call_hook(
        self, user_api_key_dict: Any, cache: Any, data: dict[str, Any], call_type: str
    ) -> dict[str, Any]:
        """The request with its budget. LiteLLM calls this before each call."""
        try:
            _forget_claims(data)
            served = self._served([data.get("model")])
            endpoint = _ENDPOINTS.get(call_type)
            if served is not None and endpoint is not None:
                budget = await self.gateways[served].budget(_said(data), step=served.step)
                if budget is not None:
                    changed = self._apply(data, endpoint, budget)
                    decided = budget.model_dump(include=_DECISION)
                    _bucket(data)[METADATA] = _Decision(decided, step=served.step, changed=changed)
        except Exception:  # an exception here would be the caller's error
            logger.warning("a request passes without a budget", exc_info=True)
        return data

    async def async_post_call_success_hook(self, data: dict[str, Any], user_api_key_dict: Any, response: Any) -> Any:
        """Report what came of the request, and put the best answer first. LiteLLM calls this with whole responses."""
        try:
            served = self._answered(data, response)
            if served is not None and self._verify is not None:
                report = self._report(served, data, answers_of(_plain(response)))
                if "n" in _decision(data).get("changed", {}):
                    _best_first(response, await report)
                else:
                    self._behind(report)
        except Exception:
            logger.warning("an outcome is not reported", exc_info=True)
        return response

    async def async_post_call_streaming_iterator_hook(
        self, user_api_key_dict: Any, response: Any, request_data: dict[str, Any]
    ) -> AsyncIterator[Any]:
        """The stream as it comes; its end is assembled and reported behind it. LiteLLM calls this with streams."""
        chunks: list[Any] = []
        keeps = self._verify is not None and self._answered(request_data, response) is not None
        try:
            async for chunk in response:
                if keeps:
                    chunks.append(chunk)
                yield chunk
        except (GeneratorExit, asyncio.CancelledError):
            served = self._answered(request_data, response) if keeps else None
            if served is not None:
                self.gateways[served].counts.left_out[ABORTED] += 1
            raise
        if keeps:
            self._behind(self._report_stream(request_data, response, chunks))

    async def async_post_call_response_headers_hook(
        self,
        data: dict[str, Any],
        user_api_key_dict: Any,
        response: Any,
        request_headers: dict[str, str] | None = None,
        litellm_call_info: dict[str, object] | None = None,
    ) -> dict[str, str] | None:
        """What was decided and changed, as headers of the response."""
        decision = _decision(data)
        if not decision:
            return None
        changed = ", ".join(f"{name}={value}" for name, value in decision["changed"].items())
        said = {
            "run": decision["run"],
            "policy": f"{decision['policy']}/{decision['policy_version']}",
            "effort": decision["effort"],
            "attempts": decision["attempts"],
            "success-rate": f"{decision['success_rate']:.3f}",
            "changed": changed or "nothing",
        }
        served = self._answered(data, response)
        is_asked = served is not None and (served.run, served.step) == (decision["run"], decision["step"])
        if decision.get("decision_id") and is_asked:  # a verdict on another model, or version, must not count here
            said["decision-id"] = decision["decision_id"]
        return {f"{HEADERS}{name}": quote(str(value), safe=" ,=/:+") for name, value in said.items()}

    def _served(self, names: Iterable[object]) -> ServedModel | None:
        """What stands for the first of these names that any pattern fits."""
        for name in names:
            for pattern, served in self._models.items():
                if isinstance(name, str) and fnmatchcase(name, pattern):
                    return served
        return None

    def _answered(self, data: Mapping[str, Any], response: Any) -> ServedModel | None:
        """What stands for the deployment that answered, after any fallback."""
        return self._served(_names(data, response))

    def _apply(self, data: dict[str, Any], endpoint: str, budget: BudgetReply) -> dict[str, Any]:
        """Set what the budget says in the request. Returns what was set."""
        changed: dict[str, Any] = {}
        is_free = "reasoning_effort" in self._sets and all(data.get(name) is None for name in _EFFORTS)
        if is_free and endpoint == _CHAT:
            data["reasoning_effort"] = changed["reasoning_effort"] = budget.effort
        elif is_free and endpoint == _RESPONSES:
            data["reasoning"], changed["reasoning_effort"] = {"effort": budget.effort}, budget.effort
        if "max_tokens" in self._sets and budget.max_tokens_scale > 1:
            for name in _LIMITS[endpoint]:
                if isinstance(data.get(name), int):
                    data[name] = changed[name] = round(data[name] * budget.max_tokens_scale)
        several = "n" in self._sets and budget.mode == "parallel" and budget.attempts > 1
        if several and endpoint == _CHAT and _is_plain(data) and self._picks is not None and self._picks(data):
            data["n"] = changed["n"] = budget.attempts
        return changed

    def _behind(self, report: Coroutine[Any, Any, object]) -> None:
        """Report behind the reply, which does not wait for `verify`."""

        async def logged() -> None:
            try:
                await report
            except Exception:
                logger.warning("an outcome is not reported", exc_info=True)

        task = asyncio.get_running_loop().create_task(logged())
        self._reports.add(task)  # else nobody holds it
        task.add_done_callback(self._reports.discard)

    async def _report_stream(self, data: dict[str, Any], response: Any, chunks: Sequence[Any]) -> None:
        served = self._answered(data, response)  # again: another deployment may have gone on with the stream
        if served is not None:
            await self._report(served, data, answers_of(assembled(chunks, sent=getattr(response, "chunks", ()))))

    async def _report(self, served: ServedModel, data: Mapping[str, Any], answers: Sequence[Answer]) -> list[float]:
        """Report the rewards of the finished answers. Returns a rank for each answer: unfinished ones are the last."""
        if self._verify is None:
            return []
        gateway = self.gateways[served]
        for answer in answers:
            if answer.left_out is not None:
                gateway.counts.left_out[answer.left_out] += 1
        texts = [answer.text for answer in answers if answer.left_out is None]
        if not texts:
            return []
        rewards = self._verify(data, texts)
        if inspect.isawaitable(rewards):
            rewards = await rewards
        if rewards is None:
            return []
        if len(rewards) != len(texts):
            raise ValueError(f"verify gave {len(rewards)} rewards for {len(texts)} answers: give one for each")
        gateway.report(_said(data), rewards, step=served.step)
        left = iter(rewards)
        return [-1.0 if answer.left_out is not None else float(next(left)) for answer in answers]


def assembled(chunks: Sequence[Any], *, sent: object = ()) -> Mapping[str, Any]:
    """The reply that a finished stream of any of the three endpoints amounts to.

    Args:
        chunks: The stream as the caller got it.
        sent: The chunks that LiteLLM says a provider sent of a chat. Where the provider gave no finish reason, the
            stream itself ends with a `stop` that LiteLLM adds.
    """
    events = list(_events(chunks))
    for event in reversed(events):  # of /v1/responses: the last event holds the response whole
        if isinstance(event.get("response"), Mapping):
            return dict(event["response"])
    if any(event.get("type") == "message_start" for event in events):
        return _message_of(events)
    choices = _choices_of(_events(sent)) if isinstance(sent, list) else []
    if not any(any(choice["message"].values()) for choice in choices):  # another deployment has gone on
        choices = _choices_of(events)
    return {"choices": choices}


def _events(chunks: Iterable[Any]) -> Iterator[Mapping[str, Any]]:
    """The events of a stream, whose chunks are one each, or pieces of server-sent events that end anywhere."""
    for is_raw, together in groupby(chunks, key=lambda chunk: isinstance(chunk, (bytes, str))):
        if not is_raw:
            yield from map(_plain, together)
            continue
        raw = b"".join(piece if isinstance(piece, bytes) else piece.encode(errors="replace") for piece in together)
        for line in raw[: raw.rfind(b"\n") + 1].splitlines():  # a line without an end was cut off
            if line.startswith(b"data:") and line[5:].strip().startswith(b"{"):
                yield json.loads(line[5:].decode(errors="replace"))


def _choices_of(events: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The choices of a chat from its chunks, each with its own text, tools and finish reason.

    LiteLLM passes on one finish reason of several, under the first choice: where one lacks its own, none is known.
    """
    made: dict[int, dict[str, Any]] = {}
    for event in events:
        for choice in event.get("choices") or ():
            start = {"message": {"content": ""}, "finish_reason": None}
            whole, delta = made.setdefault(choice.get("index") or 0, start), choice.get("delta") or {}
            whole["message"]["content"] += delta.get("content") or ""
            for name in ("tool_calls", "function_call"):
                whole["message"][name] = whole["message"].get(name) or delta.get(name)
            whole["finish_reason"] = choice.get("finish_reason") or whole["finish_reason"]
    choices = [made[index] for index in sorted(made)]
    if not all(choice["finish_reason"] for choice in choices):
        choices = [{**choice, "finish_reason": None} for choice in choices]
    return choices or [{"message": {}, "finish_reason": None}]


def _message_of(events: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """A message of Anthropic's from its events: the text of its deltas, its tools, and why it stopped."""
    text, stop_reason, tools = "", None, False
    for event in events:
        delta = event.get("delta") or {}
        text += delta.get("text") or ""
        stop_reason = delta.get("stop_reason") or stop_reason
        tools |= (event.get("content_block") or {}).get("type") == "tool_use"
    content = [{"type": "text", "text": text}, *([{"type": "tool_use"}] if tools else [])]
    return {"content": content, "stop_reason": stop_reason}


def _plain(reply: Any) -> Mapping[str, Any]:
    """A reply as a mapping, whatever LiteLLM made of it."""
    if isinstance(reply, Mapping):
        return reply
    dump = getattr(reply, "model_dump", None)
    plain = dump() if dump is not None else None
    return plain if isinstance(plain, Mapping) else {}


def _said(data: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a request that says what is asked for."""
    return {name: data.get(name) for name in ("messages", "input", "previous_response_id", "conversation")}


def _is_plain(data: Mapping[str, Any]) -> bool:
    """Whether several answers can come back whole: no stream, no tools, nothing but text, no `n` of the caller's."""
    if data.get("stream") or data.get("n") is not None:
        return False
    if any(data.get(name) for name in ("tools", "functions", "modalities", "audio")):
        return False
    parts = [message.get("content") for message in data.get("messages") or () if isinstance(message, Mapping)]
    return all(
        isinstance(part, Mapping) and part.get("type", "text") == "text"
        for content in parts
        if isinstance(content, Sequence) and not isinstance(content, str)
        for part in content
    )


def _best_first(response: Any, ranks: Sequence[float]) -> None:
    """Order the choices of a chat by rank, the best first, so that who reads the first one reads the best."""
    choices = getattr(response, "choices", None)
    if not choices or len(choices) != len(ranks):
        return
    order = sorted(range(len(ranks)), key=lambda place: -ranks[place])
    response.choices = [choices[place] for place in order]
    for place, choice in enumerate(response.choices):
        choice.index = place


def _names(data: Mapping[str, Any], response: Any) -> list[object]:
    """Names of the model that answered, the most exact one first."""
    deployment = _deployment(data, response)
    if deployment is None:
        return [data.get("model")]
    routed: Mapping[str, Any] = {}  # what LiteLLM's router notes: of a wildcard, the names of the one model
    for name in ("litellm_metadata", "metadata"):
        noted = data.get(name)
        info = noted.get("model_info") if isinstance(noted, Mapping) else None
        if noted and isinstance(info, Mapping) and info.get("id") == deployment.model_info.id:
            routed = noted
    concrete = _hidden(response).get("litellm_model_name") or routed.get("deployment")
    return [concrete, deployment.litellm_params.model, routed.get("model_group"), deployment.model_name]


def _hidden(response: Any) -> Mapping[str, Any]:
    """What LiteLLM notes about a response, and callers do not see."""
    hidden = response.get("_hidden_params") if isinstance(response, Mapping) else None
    hidden = hidden or getattr(response, "_hidden_params", None)
    return hidden if isinstance(hidden, Mapping) else {}


def _deployment(data: Mapping[str, Any], response: Any) -> Any:
    """LiteLLM's deployment that answered; None where it names none."""
    model_id = _hidden(response).get("model_id")
    named = data.get("deployment")
    if model_id is None or (named is not None and getattr(named.model_info, "id", None) == model_id):
        return named
    from litellm.proxy.proxy_server import llm_router  # type: ignore[import-not-found]  # set once the proxy has started

    return (llm_router.get_deployment(model_id=model_id) if llm_router is not None else None) or named


def _bucket(data: dict[str, Any]) -> dict[str, Any]:
    """The metadata that stays in the proxy. Where the endpoint's own goes to the provider, LiteLLM keeps another."""
    name = "litellm_metadata" if isinstance(data.get("litellm_metadata"), dict) else "metadata"
    if not isinstance(data.get(name), dict):
        data[name] = {}
    bucket: dict[str, Any] = data[name]
    return bucket


def _decision(data: Mapping[str, Any]) -> Mapping[str, Any]:
    """What this hook decided about the request; empty without a budget."""
    for name in ("litellm_metadata", "metadata"):
        metadata = data.get(name)
        if isinstance(metadata, Mapping) and isinstance(metadata.get(METADATA), Mapping):
            return dict(metadata[METADATA])
    return {}


def _forget_claims(data: Mapping[str, Any]) -> None:
    """Remove what a caller sends under the name of a decision."""
    for name in ("litellm_metadata", "metadata"):
        metadata = data.get(name)
        if isinstance(metadata, dict) and not isinstance(metadata.get(METADATA), _Decision):  # of another hook
            metadata.pop(METADATA, None)
