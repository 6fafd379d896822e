"""How verl's data sets name and hold their prompts, in all its releases. Imports nothing of verl."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from evenodds.errors import ConfigurationError
from evenodds.training.text import described, ground_truth_of


def prompt_id_of(data_source: object, extra_info: Mapping[str, Any]) -> str:
    """The id of a prompt that stays the same in every epoch and after every restart."""
    return f"{data_source}/{extra_info['index']}"


def pool_of(dataset: Any, prompt_key: str) -> list[dict[str, object]]:
    """All prompts of an `RLHFDataset`, in the order of its rows, with `reward_model.ground_truth` as their answers.

    Raises:
        ConfigurationError: A row has no `extra_info.index`.
    """
    pool: list[dict[str, object]] = []
    for number, row in enumerate(dataset.dataframe):
        extra_info = row.get("extra_info") or {}
        if extra_info.get("index") is None:
            raise ConfigurationError(
                f"row {number} of the training files has no extra_info.index, which tells prompts apart: "
                "add it where the files are made"
            )
        source = row.get("data_source")
        prompt: dict[str, object] = {"prompt_id": prompt_id_of(source, extra_info)}
        prompt |= described(row.get(prompt_key), ground_truth_of(row))
        pool.append(prompt | ({"category": str(source)} if source else {}))
    return pool


def rewards_by_prompt(prompt_ids: Iterable[str], rewards: Iterable[float | None]) -> dict[str, Sequence[float | None]]:
    """The rewards of each prompt's group."""
    groups: dict[str, list[float | None]] = defaultdict(list)
    for prompt_id, reward in zip(prompt_ids, rewards, strict=True):
        groups[prompt_id].append(reward)
    return dict(groups)


def without_reward_key(settings: Mapping[str, Any] | None) -> tuple[dict[str, Any] | None, str | None]:
    """The settings for `Connection`, and the verifier's own key (`reward_key`), if rewards stand under one."""
    if settings is None:
        return None, None
    return {str(name): settings[name] for name in settings if name != "reward_key"}, settings.get("reward_key")


def no_such_key(reward_key: str, there: Iterable[str]) -> ConfigurationError:
    """The verifier gives no such key."""
    names = ", ".join(sorted(there)) or "none"
    return ConfigurationError(
        f"data.evenodds: reward_key {reward_key!r} is not among what the reward function returns besides the score "
        f"({names}): let it return a dict with that key"
    )
