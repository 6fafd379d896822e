"""slime, and miles, which has the same interface: a data source, and a report of all samples.

--data-source-path evenodds.integrations.slime.EvenOddsDataSource
--rollout-all-samples-process-path evenodds.integrations.slime.report
--custom-config-path evenodds.yaml         # evenodds: {base_url: http://127.0.0.1:8000, run: math-7b}
"""

from __future__ import annotations

import copy
import json
import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

try:
    from slime.rollout.data_source import RolloutDataSourceWithBuffer
except ImportError:
    from miles.rollout.data_source import RolloutDataSourceWithBuffer

from evenodds.errors import ConfigurationError
from evenodds.integrations.connection import Connection, text_of

logger = logging.getLogger(__name__)

KEY = "evenodds"
"""Where a sample's metadata say which choice it belongs to."""


class EvenOddsDataSource(RolloutDataSourceWithBuffer):  # type: ignore[misc]  # slime is untyped
    """The prompts that the service chooses, one choice for each call that the buffer cannot serve.

    A prompt's id is `metadata["prompt_id"]`, or else a hash of its text.

    Raises:
        ConfigurationError: `evenodds` is missing from the configuration, or there is no global data set.
    """

    def __init__(self, args: Any) -> None:
        super().__init__(args)
        if self.dataset is None:
            raise ConfigurationError("there is no pool to choose from: set --prompt-data and --rollout-global-dataset")
        self._by_id = {_prompt_id(sample): sample for sample in self.dataset.samples}
        pool = [
            {"prompt_id": prompt_id} | ({"text": text} if (text := text_of(sample.prompt)) else {})
            for prompt_id, sample in self._by_id.items()
        ]
        self.connection = Connection(getattr(args, KEY, None), pool, where=f"{KEY} in the file of --custom-config-path")

    def get_samples(self, num_samples: int) -> list[list[Any]]:
        """Groups of `n_samples_per_prompt` samples: what waits in the buffer, then what the service chooses."""
        groups: list[list[Any]] = self._get_samples_from_buffer(num_samples)
        n_missing = num_samples - len(groups)
        if n_missing > 0:
            batch = self.connection.choose(n_missing)
            groups += [self._group(prompt_id, batch.step) for prompt_id in batch]
        return groups

    def save(self, rollout_id: Any) -> None:
        """Keep the state with the trainer's checkpoint of this rollout."""
        super().save(rollout_id)
        if self.args.save is not None:
            path = _state_file(self.args.save, rollout_id)
            path.parent.mkdir(parents=True, exist_ok=True)
            state = {"samples": [self.sample_group_index, self.sample_index], **self.connection.state_dict()}
            path.write_text(json.dumps(state))

    def load(self, rollout_id: Any = None) -> None:
        """Go back to the checkpoint of this rollout, together with the service."""
        super().load(rollout_id)
        if self.args.load is None or rollout_id is None:
            return
        path = _state_file(self.args.load, rollout_id)
        if not path.is_file():
            if int(rollout_id) >= 0:  # -1 where the training starts
                logger.warning("%s is missing: the service keeps what was observed after the checkpoint", path)
            return
        state = json.loads(path.read_text())
        self.sample_group_index, self.sample_index = state["samples"]
        self.connection.load_state_dict(state)

    def _group(self, prompt_id: str, step: int) -> list[Any]:
        group = []
        for _ in range(self.args.n_samples_per_prompt):
            sample = copy.deepcopy(self._by_id[prompt_id])
            sample.group_index, sample.index = self.sample_group_index, self.sample_index
            sample.metadata = {**(sample.metadata or {}), KEY: {"prompt_id": prompt_id, "step": step}}
            self.sample_index += 1
            group.append(sample)
        self.sample_group_index += 1
        return group


def report(args: Any, all_samples: Iterable[Any], data_source: Any) -> None:
    """Report the rewards of all samples of a rollout, those that a filter dropped too.

    Samples that were aborted or failed, or have no reward, are no attempts of the policy and are left out.
    """
    rewards: dict[int, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for sample in _flat(all_samples):
        chosen = (sample.metadata or {}).get(KEY)
        if chosen is None or sample.reward is None or sample.status.value in ("pending", "aborted", "failed"):
            continue
        rewards[chosen["step"]][chosen["prompt_id"]].append(float(sample.get_reward_value(args)))
    for step, groups in sorted(rewards.items()):
        data_source.connection.observe(step, groups)


def _flat(samples: Iterable[Any]) -> Iterator[Any]:
    for item in samples:
        if isinstance(item, list):
            yield from _flat(item)
        else:
            yield item


def _prompt_id(sample: Any) -> str:
    given = (sample.metadata or {}).get("prompt_id")
    if given is not None:
        return str(given)
    return sha256(json.dumps(sample.prompt, sort_keys=True, default=str).encode()).hexdigest()


def _state_file(folder: str, rollout_id: Any) -> Path:
    return Path(folder) / "rollout" / f"evenodds_{rollout_id}.json"
