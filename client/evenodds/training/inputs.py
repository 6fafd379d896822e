"""What a trainer hands to a `PromptSelector`, checked: what is a mistake in the program raises, data does not."""

from __future__ import annotations

import json
import math
import operator
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, SupportsFloat, SupportsIndex, TypeAlias, cast

from pydantic import TypeAdapter, ValidationError

from evenodds.client import Client
from evenodds.errors import ConfigurationError, InvalidRequest
from evenodds.schemas import MAX_ITEMS, OLDER_NAMES, Observation, PromptIn, RunName, RunUpdate, Step
from evenodds.schemas.fields import Key
from evenodds.training.outbox import Delivery
from evenodds.validation import fault_lines, kept_to, warn_of_older_names

EQUAL_WITHIN = 1e-6
"""Rewards that differ by less are equal: they differ by rounding."""

Outcomes: TypeAlias = Mapping[str, Iterable[float | None]] | Iterable[Observation | Mapping[str, object]]

_RUN: TypeAdapter[str] = TypeAdapter(RunName)
_STEP: TypeAdapter[int] = TypeAdapter(Step)
_KEY: TypeAdapter[str] = TypeAdapter(Key)
_DELIVERY = TypeAdapter(Delivery)

MAX_CALL_BYTES = 8_000_000
"""Most bytes of observations in one call, well below what a service takes unless it is told otherwise."""


@dataclass(frozen=True)
class Setup:
    """What a selector was made with.

    Attributes:
        base_url: None is offline.
        run_settings: Arguments of `put_run`, which comes before anything else; None leaves the run as it is.
        prompts: The pool, loaded next, and again where the service has lost it. None leaves it alone.
        folder: Of the outbox; None keeps everything in memory.
        deadline_seconds: How long a call of the training loop may take.
        prefetches: Whether the next batch is asked for once a step is observed.
        releases_held: Whether outcomes are delivered that an earlier selector held back.

    Raises:
        ConfigurationError: A field is out of its range.
    """

    base_url: str | None
    run: str
    run_settings: Mapping[str, Any] | None
    prompts: Sequence[PromptIn] | None
    folder: Path | None
    deadline_seconds: float
    prefetches: bool
    releases_held: bool

    def __post_init__(self) -> None:
        with _configured("run"):
            _RUN.validate_python(self.run)
        if not (math.isfinite(self.deadline_seconds) and self.deadline_seconds > 0):
            raise ConfigurationError(f"deadline_seconds {self.deadline_seconds!r} must be finite and above 0")
        if self.base_url is not None:
            Client(self.base_url).close()  # refuses what is no URL


def checked_settings(run_settings: Mapping[str, object] | None) -> Mapping[str, Any] | None:
    """As arguments of `put_run`, all under their present names."""
    if run_settings is None:
        return None
    with _configured("run_settings"):
        update = RunUpdate.model_validate(run_settings)
    warn_of_older_names("run_settings", run_settings, stacklevel=3)
    return {name: getattr(update, name) for name in update.model_fields_set - OLDER_NAMES.keys()}


def as_index(value: SupportsIndex) -> object:
    """An int of whatever counts as one (NumPy's, a tensor's); anything else as it is, for the schema to refuse."""
    try:
        return operator.index(value)
    except TypeError:
        return value


def checked_step(call: str, step: SupportsIndex) -> int:
    with kept_to(call, "step"):
        return _STEP.validate_python(as_index(step))


def checked_prompts(
    prompts: Iterable[str | PromptIn | Mapping[str, object]],
) -> tuple[tuple[str, ...], tuple[PromptIn, ...] | None]:
    """Their ids, and the prompts themselves if they are more than ids."""
    ids: list[str] = []
    whole: list[PromptIn] = []
    if isinstance(prompts, (str, Mapping)):
        raise ConfigurationError("prompts: a list of prompts is needed, got a single prompt")
    for index, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            ids.append(prompt)
            continue
        with _configured(f"prompts[{index}]"):
            checked = PromptIn.model_validate(prompt)
        if checked.prompt_id is None:
            raise ConfigurationError(f"prompts[{index}].prompt_id: missing; a trainer's prompts need ids")
        ids.append(checked.prompt_id)
        whole.append(checked)
    if not ids:
        raise ConfigurationError("prompts: at least 1 prompt is needed, got none")
    if whole and len(whole) < len(ids):
        raise ConfigurationError(f"prompts: {len(whole)} are mappings and {len(ids) - len(whole)} ids: send one kind")
    if len(set(ids)) < len(ids):
        twice, n = Counter(ids).most_common(1)[0]
        raise ConfigurationError(f"prompts: the prompt_id {twice!r} stands there {n} times: ids must differ")
    return tuple(ids), tuple(whole) or None


def checked_state(state: Mapping[str, Any], run: str, expected: int) -> tuple[int | None, list[Delivery]]:
    try:
        if state["format"] != expected:
            raise ConfigurationError(
                f"state: format {state['format']!r}, this release reads format {expected}: use the release that "
                "wrote the state"
            )
        if state["run"] != run:
            raise ConfigurationError(
                f"state: it belongs to run {state['run']!r}, and this selector's run is {run!r}: load the state of "
                "this run"
            )
        step = None if state["step"] is None else checked_step("load_state_dict", state["step"])
        return step, [_DELIVERY.validate_python(delivery) for delivery in state["undelivered"]]
    except (KeyError, TypeError, InvalidRequest, ValidationError) as error:
        raise ConfigurationError(f"state: it is not what state_dict returned: {error!r}") from error


@dataclass(frozen=True)
class Checked:
    """What is told to the service, and what is not.

    Attributes:
        sound: Observations of known prompts, or of new ones with a text, as JSON.
        faults: What is wrong with the others.
        n_without_reward: Attempts whose reward is None or NaN. They are no attempts of the policy.
    """

    sound: list[dict[str, Any]]
    faults: list[str]
    n_without_reward: int


def checked_observations(outcomes: Outcomes, known: frozenset[str]) -> Checked:
    """Tell observations from what is none.

    Raises:
        InvalidRequest: The outcomes are none, the rewards of a prompt are no list, or a reward is no number or lies
            outside [0, 1]. To leave such rewards out would bias what is believed: of rewards -1 and 1 nothing but
            success would be left.
    """
    sound: list[dict[str, Any]] = []
    faults: list[str] = []
    n_without_reward = 0
    for index, outcome in enumerate(_listed(outcomes)):
        where = f"outcomes[{index}]"
        if isinstance(outcome, Mapping) and outcome.get("rewards") is not None:
            given = _rewards(outcome["rewards"], where, outcome)
            rewards = [checked for reward in given if (checked := _reward(reward, where, outcome)) is not None]
            n_without_reward += len(given) - len(rewards)
            if not rewards:
                continue
            outcome = {**outcome, "rewards": rewards}
        try:
            observation = Observation.model_validate(outcome)
        except ValidationError as error:
            faults.append(fault_lines(error.errors(include_url=False), prefix=where)[0])
        else:
            if observation.text is None and observation.prompt_id not in known:
                faults.append(f"{where}.prompt_id: {observation.prompt_id!r} is not among this selector's prompts")
            else:
                sound.append(observation.model_dump(exclude_none=True, exclude_unset=True))
    return Checked(sound, faults, n_without_reward)


def as_reward(reward: object) -> float | None:
    """A float of whatever counts as one; None for None and NaN.

    Raises:
        ValueError: It is no number.
    """
    if reward is None:
        return None
    try:
        number = float(cast("SupportsFloat", reward))
    except (TypeError, ValueError):
        raise ValueError(f"the reward {reward!r} is not a number") from None
    return None if math.isnan(number) else number


def as_rate(number: float) -> float | None:
    """The number itself if it lies in [0, 1], the end that it misses by rounding; None for all others."""
    return min(1.0, max(0.0, number)) if -EQUAL_WITHIN <= number <= 1 + EQUAL_WITHIN else None


def _rewards(given: object, where: str, outcome: Mapping[str, object]) -> list[object]:
    try:
        if not isinstance(given, (str, bytes)):
            return list(cast("Iterable[object]", given))
    except TypeError:
        pass  # a number, say
    raise InvalidRequest(
        "observe",
        [
            f"{where}.rewards: {given!r:.80} of prompt {outcome.get('prompt_id')!r} is no list of rewards: send one "
            "reward for each attempt, as [1.0, 0.0]"
        ],
    )


def _reward(reward: object, where: str, outcome: Mapping[str, object]) -> float | None:
    prompt_id = outcome.get("prompt_id")
    try:
        number = as_reward(reward)
    except ValueError as error:
        raise InvalidRequest("observe", [f"{where}.rewards: {error}, of prompt {prompt_id!r}"]) from error
    rate = None if number is None else as_rate(number)
    if number is not None and rate is None:
        raise InvalidRequest(
            "observe",
            [
                f"{where}.rewards: the reward {number:g} of prompt {prompt_id!r} is outside [0, 1]: map rewards to "
                "[0, 1] before you report them (in an adapter set reward_range, for TRL also success=)"
            ],
        )
    return rate


def checked_selection_id(selection_id: object) -> str | None:
    """None for what the service would refuse, and with it every outcome."""
    try:
        return _KEY.validate_python(selection_id, strict=True)
    except ValidationError:
        return None


def bodies(observations: Sequence[Mapping[str, object]]) -> Iterator[str]:
    """JSON lists of the observations, each with no more items and bytes than one call should carry."""
    items: list[str] = []
    n_bytes = 0
    for item in map(json.dumps, observations):  # ASCII: as many bytes as characters
        if items and (len(items) == MAX_ITEMS or n_bytes + len(item) > MAX_CALL_BYTES):
            yield f"[{', '.join(items)}]"
            items, n_bytes = [], 0
        items.append(item)
        n_bytes += len(item) + 2
    if items:
        yield f"[{', '.join(items)}]"


def _listed(outcomes: Outcomes) -> Iterable[Observation | Mapping[str, object]]:
    if isinstance(outcomes, Mapping):
        return [{"prompt_id": prompt_id, "rewards": rewards} for prompt_id, rewards in outcomes.items()]
    if isinstance(outcomes, Iterable) and not isinstance(outcomes, (str, bytes, Observation)):
        return outcomes
    raise InvalidRequest(
        "observe",
        [
            f"outcomes: {outcomes!r:.80} is neither rewards by prompt id nor a list of observations: send "
            '{"a": [1.0, 0.0]}, say'
        ],
    )


@contextmanager
def _configured(name: str) -> Iterator[None]:
    try:
        yield
    except ValidationError as error:
        raise ConfigurationError(fault_lines(error.errors(include_url=False), prefix=name)[0]) from error
