"""verl <= 0.7.1: a curriculum sampler for its `data.sampler` setting. Later releases have none: see `verl_v1`.

data.sampler.class_path=pkg://evenodds.integrations.verl
data.sampler.class_name=EvenOddsSampler
data.dataloader_num_workers=0
+data.evenodds.base_url=http://127.0.0.1:8000
+data.evenodds.run=math-7b
+data.evenodds.reward_key=acc             # where the score holds more than success (such as an overlong penalty)

verl's data loader makes batches of one size of what a sampler yields, so that none can be filled; `fill` is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sized
from typing import Any

from verl.experimental.dataset.sampler import AbstractCurriculumSampler

from evenodds.errors import ConfigurationError
from evenodds.integrations.connection import Connection
from evenodds.integrations.torch import PromptSampler
from evenodds.integrations.verl_rows import (
    no_such_key,
    pool_of,
    prompt_id_of,
    rewards_by_prompt,
    without_reward_key,
)

WHERE = "data.evenodds"
NO_FILL = "verl's data loader makes batches of one size of what a sampler yields"


class EvenOddsSampler(AbstractCurriculumSampler):  # type: ignore[misc]  # verl is untyped
    """Row numbers of the batch of each step, and the scores of each trained batch for the service.

    Steps are verl's global steps, from 1 on. It is in the data loader's checkpoint.

    Raises:
        ConfigurationError: `data.evenodds` is incomplete, or a row has no `extra_info.index`.
    """

    def __init__(self, data_source: Sized, data_config: Mapping[str, Any]) -> None:
        batch_size = data_config.get("gen_batch_size") or data_config["train_batch_size"]
        pool = pool_of(data_source, data_config.get("prompt_key", "prompt"))
        settings, self._reward_key = without_reward_key(data_config.get("evenodds"))
        self._connection = Connection(settings, pool, where=WHERE, no_fill=NO_FILL)
        self._sampler = PromptSampler(
            self._connection.selector, batch_size, first_step=1, epoch_steps=len(data_source) // batch_size
        )

    def __iter__(self) -> Iterator[int]:
        return iter(self._sampler)

    def __len__(self) -> int:
        return len(self._sampler)

    def update(self, batch: Any) -> None:
        """Report a trained batch: what stands under `reward_key`, or else the sum of the token-level scores.

        Raises:
            ConfigurationError: The reward function returns no such key, or a reward is outside `reward_range`.
        """
        columns = batch.non_tensor_batch
        if self._reward_key is None:
            scores = batch.batch["token_level_scores"].sum(-1).tolist()
        elif self._reward_key in columns:
            scores = list(columns[self._reward_key])
        else:
            raise no_such_key(self._reward_key, columns)
        missing = [name for name in ("data_source", "extra_info") if name not in columns]
        if missing:
            raise ConfigurationError(f"the trained batch lacks the columns {missing}, which tell its prompts apart")
        ids = [
            prompt_id_of(source, extra_info)
            for source, extra_info in zip(columns["data_source"], columns["extra_info"], strict=True)
        ]
        self._connection.observe(self._sampler.newest_step, rewards_by_prompt(ids, scores))

    def state_dict(self) -> dict[str, Any]:
        """What belongs into the checkpoint."""
        return self._sampler.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go back to it, together with the service."""
        self._sampler.load_state_dict(state_dict)
