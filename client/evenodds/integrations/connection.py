"""What the integrations share: a selector made from a framework's configuration, and the count of its choices."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from evenodds.errors import ConfigurationError
from evenodds.schemas import PromptIn
from evenodds.training.batch import Batch
from evenodds.training.selector import PromptSelector


class Connection:
    """A selector and the next choice to make. Each choice has a step of its own, also where a policy makes several.

    Args:
        settings: `base_url` (null is offline) and `run`; `reward_range`, two numbers that stand for failure and
            success, [0, 1] by default; anything else is an argument of `PromptSelector`.
        where: Where the settings stand in the framework's configuration, for its errors.
        first_step: The step of the first choice.

    Raises:
        ConfigurationError: The settings are not like that.
    """

    def __init__(
        self,
        settings: Mapping[str, Any] | None,
        prompts: Iterable[str | PromptIn | Mapping[str, object]],
        *,
        where: str,
        first_step: int = 0,
    ) -> None:
        options = _plain(settings or {})
        missing = [name for name in ("base_url", "run") if name not in options]
        if missing:
            raise ConfigurationError(f"{where}: {' and '.join(missing)} missing; base_url says where the service is")
        low, high = options.pop("reward_range", (0.0, 1.0))
        if not low < high:
            raise ConfigurationError(f"{where}: reward_range [{low}, {high}] must rise from failure to success")
        self._low, self._high = float(low), float(high)
        try:
            self.selector = PromptSelector(options.pop("base_url"), options.pop("run"), prompts, **options)
        except (TypeError, ConfigurationError) as error:
            raise ConfigurationError(f"{where}: {error}") from error
        self.next_step = first_step

    def choose(self, n_prompts: int) -> Batch:
        """The next choice."""
        batch = self.selector.select(self.next_step, n_prompts)
        self.next_step += 1
        return batch

    def observe(self, step: int, rewards: Mapping[str, Sequence[float]]) -> None:
        """Report rewards by prompt id; they are scaled by `reward_range`."""
        self.selector.observe(
            step, {prompt_id: [self._scaled(r) for r in group] for prompt_id, group in rewards.items() if len(group)}
        )

    def observe_means(self, step: int, means: Mapping[str, float], *, attempts: int) -> None:
        """Report the mean reward of each prompt's group of so many attempts, where a framework tells no more."""
        self.selector.observe(
            step,
            [
                {"prompt_id": prompt_id, "successes": self._scaled(mean) * attempts, "attempts": attempts}
                for prompt_id, mean in means.items()
            ],
        )

    def _scaled(self, reward: float) -> float:
        return (float(reward) - self._low) / (self._high - self._low)

    def state_dict(self) -> dict[str, Any]:
        """What belongs into the checkpoint."""
        return checkpoint(self.selector, self.next_step)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to it: the service too."""
        self.next_step = go_back(self.selector, state)


def checkpoint(selector: PromptSelector, next_step: int) -> dict[str, Any]:
    """The state of a selector whose steps are counted: a resumed training chooses anew after the newest observed one.

    Args:
        next_step: Where to go on if nothing was observed.
    """
    state = selector.state_dict()
    return {"selector": state, "next_step": next_step if state["step"] is None else state["step"] + 1}


def go_back(selector: PromptSelector, state: Mapping[str, Any]) -> int:
    """Load what `checkpoint` returned, and return the step to go on with.

    Raises:
        ConfigurationError: It is something else.
    """
    try:
        next_step, selector_state = int(state["next_step"]), state["selector"]
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigurationError(f"state: not what state_dict returned: {error!r}") from error
    selector.load_state_dict(selector_state)
    return next_step


def text_of(prompt: object) -> str | None:
    """The text of a prompt as frameworks keep it: a string, or messages with a role and a content."""
    if isinstance(prompt, str):
        return prompt or None
    if not isinstance(prompt, Sequence):
        return None
    texts = [message.get("content") for message in prompt if isinstance(message, Mapping)]
    return "\n\n".join(text for text in texts if isinstance(text, str) and text) or None


def _plain(value: Any) -> Any:
    """Dicts and lists, where OmegaConf has its own."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return [_plain(item) for item in value]
    return value
