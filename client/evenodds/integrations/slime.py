"""slime, and miles, which has the same interface: a data source, and a report of all samples.

--data-source-path evenodds.integrations.slime.EvenOddsDataSource
--rollout-all-samples-process-path evenodds.integrations.slime.report
--custom-config-path evenodds.yaml         # evenodds: {base_url: http://127.0.0.1:8000, run: math-7b}

With `fill` a rollout begins with as many groups as it takes to find `--rollout-batch-size` informative ones, which
`--dynamic-sampling-filter-path` lets through; the others are reported and not trained on.
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
from evenodds.integrations.connection import Connection
from evenodds.training.batch import Batch
from evenodds.training.text import described

logger = logging.getLogger(__name__)

_ROLLOUTS_WITHOUT_REPORT = 4
KEY = "evenodds"
"""Where a sample's metadata say which choice it belongs to."""


class EvenOddsDataSource(RolloutDataSourceWithBuffer):  # type: ignore[misc]  # slime is untyped
    """The prompts that the service chooses, one choice for each call that the buffer cannot serve.

    A prompt's id is `metadata["prompt_id"]`, or else a hash of its text; its answer is its label (`--label-key`).

    Raises:
        ConfigurationError: `evenodds` is missing from the configuration, or there is no global data set; or `fill` is
            set, and no filter that drops silent groups.
    """

    def __init__(self, args: Any) -> None:
        super().__init__(args)
        if self.dataset is None:
            raise ConfigurationError("there is no pool to choose from: set --prompt-data and --rollout-global-dataset")
        self._by_id = _by_id(self.dataset.samples)
        pool = [
            {"prompt_id": prompt_id} | described(sample.prompt, getattr(sample, "label", None))
            for prompt_id, sample in self._by_id.items()
        ]
        n_rollout = max(getattr(args, "rollout_batch_size", 1), getattr(args, "over_sampling_batch_size", None) or 1)
        self.connection = Connection(
            getattr(args, KEY, None),
            pool,
            where=f"{KEY} in the file of --custom-config-path",
            no_fill=_no_fill(args),
            group_size=args.n_samples_per_prompt,
            unreported_prompts=_ROLLOUTS_WITHOUT_REPORT * n_rollout,
        )
        self._n_wanted = getattr(args, "rollout_batch_size", 1)
        self.is_filled = False
        """Whether this rollout has had a filled choice: what it still asks for then are refills."""
        if "fully_async" in str(getattr(args, "rollout_function_path", "")):
            logger.warning(
                "%s never calls --rollout-all-samples-process-path: prompts are chosen and nothing is reported, so "
                "that nothing is learned; use slime's own sglang_rollout, or report from your rollout function with "
                "evenodds.integrations.slime.report(args, all_samples, data_source)",
                args.rollout_function_path,
            )

    def get_samples(self, num_samples: int) -> list[list[Any]]:
        """Groups of `n_samples_per_prompt` samples: what waits in the buffer, then what the service chooses."""
        groups: list[list[Any]] = self._get_samples_from_buffer(num_samples)
        n_missing = num_samples - len(groups)
        if n_missing > 0:
            batch = self._chosen(n_missing, len(groups))
            groups += [self._group(prompt_id, batch.step) for prompt_id in batch]
        return groups

    def _chosen(self, n_missing: int, n_buffered: int) -> Batch:
        if self.connection.fill is None or self.is_filled:
            return self.connection.choose(n_missing, is_refill=True)
        self.is_filled = True
        return self.connection.choose(max(1, self._n_wanted - n_buffered))

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

    Samples that were aborted or failed, or have no reward, are no attempts of the policy and are left out. Several
    samples of one attempt (a list in the place of a sample, or samples with the same `rollout_id`) count once: the last
    that has a reward.

    Args:
        all_samples: Groups, each a list of samples or of lists of samples.
        data_source: The `EvenOddsDataSource`, or its `get_samples`, which is what slime hands over.
    """
    source: EvenOddsDataSource = getattr(data_source, "__self__", data_source)
    rewards: dict[int, dict[str, list[float | None]]] = defaultdict(lambda: defaultdict(list))
    for attempt in _attempts(all_samples):
        made = [
            sample
            for sample in attempt
            if (sample.metadata or {}).get(KEY) is not None
            and sample.reward is not None
            and sample.status.value not in ("pending", "aborted", "failed")
        ]
        if made:
            chosen = made[-1].metadata[KEY]
            rewards[chosen["step"]][chosen["prompt_id"]].append(made[-1].get_reward_value(args))
    for step, groups in sorted(rewards.items()):
        source.connection.observe(step, groups)
    source.is_filled = False  # slime reports at the end of a rollout


def _no_fill(args: Any) -> str | None:
    if getattr(args, "dynamic_sampling_filter_path", None) is not None:
        return None
    return (
        "slime trains on the first groups that are done, silent or not: set --dynamic-sampling-filter-path to a filter "
        "that drops silent ones"
    )


def _attempts(groups: Iterable[Any]) -> Iterator[list[Any]]:
    """The samples of each attempt."""
    for group in groups:
        of_rollout: dict[Any, list[Any]] = defaultdict(list)
        for sample in group:
            if isinstance(sample, list):
                yield list(_flat(sample))
            elif getattr(sample, "rollout_id", None) is None:
                yield [sample]
            else:
                of_rollout[sample.rollout_id].append(sample)
        yield from of_rollout.values()


def _flat(samples: Iterable[Any]) -> Iterator[Any]:
    for item in samples:
        if isinstance(item, list):
            yield from _flat(item)
        else:
            yield item


def _by_id(samples: Iterable[Any]) -> dict[str, Any]:
    """Raises ConfigurationError: two rows have the same id and are not the same."""
    by_id: dict[str, Any] = {}
    n_repeated = 0
    for number, sample in enumerate(samples):
        prompt_id = _prompt_id(sample)
        if prompt_id in by_id and (sample.metadata or {}).get("prompt_id") is not None:
            raise ConfigurationError(
                f"row {number} of --prompt-data has the metadata prompt_id {prompt_id!r} of an earlier row"
            )
        n_repeated += prompt_id in by_id
        by_id.setdefault(prompt_id, sample)
    if n_repeated:
        logger.warning(
            "%d rows of --prompt-data repeat the prompt of an earlier row and are one prompt with it; metadata "
            '"prompt_id" tells them apart',
            n_repeated,
        )
    return by_id


def _prompt_id(sample: Any) -> str:
    given = (sample.metadata or {}).get("prompt_id")
    if given is not None:
        return str(given)
    return sha256(json.dumps(sample.prompt, sort_keys=True, default=str).encode()).hexdigest()


def _state_file(folder: str, rollout_id: Any) -> Path:
    return Path(folder) / "rollout" / f"evenodds_{rollout_id}.json"
