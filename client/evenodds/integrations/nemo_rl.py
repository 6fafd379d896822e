"""NeMo-RL: a custom dataloader. Its dotted name goes into the configuration, so it stands in a module of your own:

    # select_prompts.py
    from evenodds.integrations.nemo_rl import SelectedDataloader

    dataloader = SelectedDataloader({"base_url": "http://127.0.0.1:8000", "run": "math-7b"}, n_prompts=64)

    data.use_multiple_dataloader=true data.custom_dataloader=select_prompts.dataloader

Nothing in NeMo-RL tells a dataloader what came of its prompts: `observe` needs a line in `grpo.py`; see
`examples/nemo_rl`. It asserts how many prompts a batch has, so that none can be filled; `fill` is refused.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from evenodds.errors import ConfigurationError
from evenodds.integrations.connection import Connection
from evenodds.training.text import described

NO_FILL = "NeMo-RL asserts that each batch has grpo.num_prompts_per_step prompts (times batch_multiplier)"
ID, STEP = "evenodds_id", "evenodds_step"
"""Columns that the batches get."""


class SelectedDataloader:
    """Draws from all data loaders' data sets the prompts that the service chooses; their own order is not used.

    A prompt's id is the name of its data loader and its row number; the name is its category too. Its answer is
    `extra_env_info["ground_truth"]`, where NeMo-RL's processors put it.

    Args:
        settings: See `Connection`.
        n_prompts: Prompts of a batch: `grpo.num_prompts_per_step`. Where NeMo-RL says how many it expects (its
            asynchronous collector does), that counts.
    """

    def __init__(self, settings: Mapping[str, Any], *, n_prompts: int) -> None:
        self._settings = dict(settings)
        self._n_prompts = n_prompts
        self._connection: Connection | None = None

    def __call__(
        self, data_iterators: dict[str, Iterator[Any]], dataloaders: Mapping[str, Any], **records: Any
    ) -> tuple[Any, dict[str, Iterator[Any]]]:
        """What `MultipleDataloaderWrapper` calls for each batch."""
        from nemo_rl.distributed.batched_data_dict import BatchedDataDict

        connection = self._connected(dataloaders)
        batch = connection.choose(records.get("expected_num_prompts", self._n_prompts))
        rows: dict[str, list[Any]] = defaultdict(list)
        ids: dict[str, list[str]] = defaultdict(list)
        for prompt_id in batch:
            task, _, index = prompt_id.rpartition("/")
            rows[task].append(dataloaders[task].dataset[int(index)])
            ids[task].append(prompt_id)
        parts = []
        for task, chosen in rows.items():
            part = dataloaders[task].collate_fn(chosen)
            part[ID] = ids[task]
            part[STEP] = [batch.step] * len(chosen)
            parts.append(part)
        return BatchedDataDict.from_batches(parts), data_iterators

    def observe(self, batch: Mapping[str, Any], rewards: Iterable[float | None]) -> None:
        """Report the rewards of a rolled-out batch, one for each of its (repeated) rows.

        Args:
            batch: As the rollout returned it: with the columns that this dataloader added.

        Raises:
            ConfigurationError: It lacks them, a reward is outside `reward_range`, or this process drew nothing.
        """
        if self._connection is None:
            raise ConfigurationError("observe: nothing was drawn in this process; call it where the dataloader runs")
        missing = [name for name in (ID, STEP) if name not in batch]
        if missing:
            raise ConfigurationError(
                f"observe: the batch lacks {', '.join(missing)}, which this dataloader adds: hand over the batch that "
                "the rollout returned (run_multi_turn_rollout keeps them, rollouts through NeMo-Gym do not)"
            )
        by_step: dict[int, dict[str, list[float | None]]] = defaultdict(lambda: defaultdict(list))
        for prompt_id, step, reward in zip(batch[ID], batch[STEP], rewards, strict=True):
            by_step[int(step)][prompt_id].append(reward)
        for step, groups in sorted(by_step.items()):
            self._connection.observe(step, groups)

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint of your own: NeMo-RL keeps the state of its data loaders only."""
        return {} if self._connection is None else self._connection.state_dict()

    def load_state_dict(self, state: Mapping[str, Any], dataloaders: Mapping[str, Any]) -> None:
        """Go back to it, together with the service."""
        if state:
            self._connected(dataloaders).load_state_dict(state)

    def _connected(self, dataloaders: Mapping[str, Any]) -> Connection:
        """Connected at the first batch: only then the pool is known."""
        if self._connection is None:
            pool = [
                {"prompt_id": f"{task}/{index}", "category": task} | described(_text(row), _answer(row))
                for task, dataloader in dataloaders.items()
                for index, row in enumerate(_rows(dataloader.dataset))
            ]
            self._connection = Connection(self._settings, pool, where="settings", no_fill=NO_FILL)
        return self._connection


def _rows(dataset: Any) -> Iterator[Any]:
    for index in range(len(dataset)):
        yield dataset[index]


def _text(row: Mapping[str, Any]) -> str | None:
    """What the user says: a row's `message_log` has messages with a role and a content."""
    said = [message.get("content") for message in row.get("message_log", ()) if message.get("role") == "user"]
    return "\n\n".join(text for text in said if isinstance(text, str) and text) or None


def _answer(row: Mapping[str, Any]) -> object:
    of_environment = row.get("extra_env_info")
    return of_environment.get("ground_truth") if isinstance(of_environment, Mapping) else None
