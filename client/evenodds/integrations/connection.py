"""What the integrations share: a selector made from a framework's configuration, and the count of its choices."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from evenodds.errors import ConfigurationError
from evenodds.schemas import PromptIn
from evenodds.training.batch import Batch
from evenodds.training.inputs import as_rate, as_reward
from evenodds.training.selector import PromptSelector

logger = logging.getLogger(__name__)

_CHOICES_WITHOUT_REPORT = 8


class Connection:
    """A selector and the next choice to make. Each choice has a step of its own, also where a policy makes several.

    Args:
        settings: `base_url` (null is offline) and `run`; `reward_range`, two numbers that stand for failure and
            success, [0, 1] by default; `fill`, true or the options of `Fill`, for batches of as many prompts as it
            takes to find so many informative groups; anything else is an argument of `PromptSelector`.
        where: Where the settings stand in the framework's configuration, for its errors.
        no_fill: Why the framework cannot take a varying number of prompts: `fill` is refused with it. None: it can.
        first_step: The step of the first choice.
        group_size: Attempts that the framework makes at each prompt, where it says so.
        unreported_prompts: Warn once so many prompts were chosen in a row without a report; by default when eight
            choices were made without any.

    Raises:
        ConfigurationError: The settings are not like that.
    """

    def __init__(
        self,
        settings: Mapping[str, Any] | None,
        prompts: Iterable[str | PromptIn | Mapping[str, object]],
        *,
        where: str,
        no_fill: str | None,
        first_step: int = 0,
        group_size: int | None = None,
        unreported_prompts: int | None = None,
    ) -> None:
        options = _plain(settings or {})
        missing = [name for name in ("base_url", "run") if name not in options]
        if missing:
            raise ConfigurationError(
                f"{where}: {' and '.join(missing)} missing: set them; base_url is the address of the service"
            )
        self._range = RewardRange.of(options.pop("reward_range", (0.0, 1.0)), where=where)
        self.fill = Fill.of(options.pop("fill", None), where=where)
        if self.fill is not None and no_fill is not None:
            raise ConfigurationError(f"{where}: fill is not possible here: {no_fill}")
        if group_size is not None:
            options["run_settings"] = _with_group_size(options.get("run_settings") or {}, group_size, where)
        try:
            self.selector = PromptSelector(options.pop("base_url"), options.pop("run"), prompts, **options)
        except (TypeError, ConfigurationError) as error:
            raise ConfigurationError(f"{where}: {error}") from error
        self.next_step = first_step
        self._where = where
        self._unreported_prompts = unreported_prompts
        self._n_choices = self._n_unreported = 0
        self._has_warned = False

    def choose(self, n_prompts: int, *, is_refill: bool = False) -> Batch:
        """The next choice: so many prompts, or with `fill` as many as it takes to find so many informative groups.

        Args:
            is_refill: Choose just so many all the same: for a batch that a choice before has not filled.
        """
        if self.fill is None or is_refill:
            batch = self.selector.select(self.next_step, n_prompts)
        else:
            batch = self.selector.select_informative(self.next_step, n_prompts, **asdict(self.fill))
        self.next_step += 1
        self._n_choices += 1
        self._n_unreported += len(batch)
        if not self._has_warned and self._is_silent():
            self._has_warned = True
            logger.warning(
                "%s: %d prompts were chosen for run %r since outcomes were last reported, and the service learns "
                "nothing from them. The example's README names the call that reports outcomes",
                self._where,
                self._n_unreported,
                self.selector.run,
            )
        return batch

    def _is_silent(self) -> bool:
        if self._unreported_prompts is not None:
            return self._n_unreported >= self._unreported_prompts
        return self._n_choices >= _CHOICES_WITHOUT_REPORT

    def observe(self, step: int, rewards: Mapping[str, Sequence[float | None]]) -> None:
        """Report rewards by prompt id; they are scaled by `reward_range`. None and NaN are no attempts.

        Raises:
            ConfigurationError: A reward is outside `reward_range`; then nothing is reported.
        """
        scaled = {
            prompt_id: [self._range.scaled(reward, prompt_id) for reward in group]
            for prompt_id, group in rewards.items()
            if len(group)
        }
        self.selector.observe(step, scaled)
        self._reported()

    def _reported(self) -> None:
        self._n_choices = self._n_unreported = 0

    def observe_means(self, step: int, means: Mapping[str, float], *, attempts: int) -> None:
        """Report the mean reward of each prompt's group of so many attempts, where a framework tells no more."""
        scaled = {prompt_id: self._range.scaled(mean, prompt_id) for prompt_id, mean in means.items()}
        self.selector.observe(
            step,
            [
                {"prompt_id": prompt_id, "successes": mean * attempts, "attempts": attempts}
                for prompt_id, mean in scaled.items()
                if mean is not None
            ],
        )
        self._reported()

    def state_dict(self) -> dict[str, Any]:
        """What belongs into the checkpoint."""
        return checkpoint(self.selector, self.next_step)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to it: the service too."""
        self.next_step = go_back(self.selector, state)


@dataclass(frozen=True)
class Fill:
    """How a filled batch is asked for, as `PromptSelector.select_informative` has it."""

    fill_factor: float | None = None
    max_prompts: int | None = None
    update_cost: float | None = None

    @classmethod
    def of(cls, given: object, *, where: str) -> Fill | None:
        """None where it is not asked for (None or false).

        Raises:
            ConfigurationError: It is neither true nor such options.
        """
        if given is None or given is False:
            return None
        options = {} if given is True else given
        names = [field.name for field in fields(cls)]
        if not isinstance(options, Mapping) or not set(options) <= set(names):
            raise ConfigurationError(f"{where}: fill {given!r} must be true, or have no keys but {', '.join(names)}")
        return cls(**options)


@dataclass(frozen=True)
class RewardRange:
    """The rewards that stand for failure and success.

    Attributes:
        where: Where it is set, for errors.
    """

    low: float
    high: float
    where: str

    @classmethod
    def of(cls, given: Sequence[float], *, where: str) -> RewardRange:
        """Raises ConfigurationError: it is not two numbers of which the second is the larger."""
        try:
            low, high = map(float, given)
        except (TypeError, ValueError) as error:
            raise ConfigurationError(f"{where}: reward_range {given!r} must be two numbers, as [-1, 1]") from error
        if not low < high:
            raise ConfigurationError(f"{where}: reward_range {list(given)} must rise from failure to success")
        return cls(low, high, where)

    def scaled(self, reward: object, prompt_id: str) -> float | None:
        """In [0, 1]; None for a reward of None or NaN.

        Raises:
            ConfigurationError: It is no number, or outside the range.
        """
        try:
            number = as_reward(reward)
        except ValueError as error:
            raise ConfigurationError(f"{self.where}: {error}, of prompt {prompt_id!r}") from error
        if number is None:
            return None
        rate = as_rate((number - self.low) / (self.high - self.low))
        if rate is None:
            raise ConfigurationError(
                f"{self.where}: the reward {number:g} of prompt {prompt_id!r} is outside of reward_range "
                f"[{self.low:g}, {self.high:g}]: set reward_range to the rewards that stand for failure and success"
            )
        return rate


def _with_group_size(run_settings: Mapping[str, Any], group_size: int, where: str) -> dict[str, Any]:
    given = run_settings.get("group_size", group_size)
    if given != group_size:
        logger.warning(
            "%s: group_size is set to %d, the attempts that the trainer makes, instead of the %r of run_settings",
            where,
            group_size,
            given,
        )
    return {**run_settings, "group_size": group_size}


def checkpoint(selector: PromptSelector, next_step: int) -> dict[str, Any]:
    """The state of a selector whose steps are counted: a resumed training chooses anew after the newest observed one.

    Args:
        next_step: Where to go on if nothing was observed.
    """
    state = selector.state_dict()
    return {"selector": state, "next_step": next_step if state["step"] is None else state["step"] + 1}


def go_back(selector: PromptSelector, state: Mapping[str, Any] | None) -> int:
    """Load what `checkpoint` returned, and return the step to go on with.

    Args:
        state: None where a data loader's checkpoint is of another sampler.

    Raises:
        ConfigurationError: It is something else.
    """
    if state is None:
        raise ConfigurationError(
            "state: the checkpoint has none of this sampler: go on with the setting of fill that it was saved with"
        )
    try:
        next_step, selector_state = int(state["next_step"]), state["selector"]
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigurationError(f"state: it is not what state_dict returned: {error!r}") from error
    selector.load_state_dict(selector_state)
    return next_step


def _plain(value: Any) -> Any:
    """Dicts and lists, where OmegaConf has its own."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return [_plain(item) for item in value]
    return value
