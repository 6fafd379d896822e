"""PyTorch: a `Sampler` and an `IterableDataset` that follow a `PromptSelector`, and one choice for all ranks.

Both count steps by one a batch. A `DataLoader` with workers reads ahead, so its batches are chosen before the outcomes
of the batches before them are known: `prefetch_factor * num_workers` batches with workers, none without.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, TypedDict

import torch.distributed
from torch.utils.data import IterableDataset, Sampler, get_worker_info

from evenodds.errors import ConfigurationError
from evenodds.integrations.connection import Fill, checkpoint, go_back
from evenodds.training.batch import Batch
from evenodds.training.selector import PromptSelector


class Ranks(TypedDict, total=False):
    """Arguments of `PromptSelector` that make all ranks draw the same."""

    rank: int
    broadcast: Callable[[Batch | None], Batch]


def ranks(group: torch.distributed.ProcessGroup | None = None) -> Ranks:
    """`PromptSelector(url, run, prompts, **ranks())`: rank 0 of the group asks, and all get its batch.

    Empty where `torch.distributed` is not initialised. Initialise it first.

    Args:
        group: All processes by default.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return {}

    source = 0 if group is None else torch.distributed.get_global_rank(group, 0)

    def broadcast(batch: Batch | None) -> Batch:
        values = [batch]
        torch.distributed.broadcast_object_list(values, src=source, group=group)
        (value,) = values
        assert value is not None  # rank 0 always has one
        return value

    return {"rank": torch.distributed.get_rank(group), "broadcast": broadcast}


class _Steps:
    """The steps still to come, and where they stand in a checkpoint."""

    def __init__(
        self,
        selector: PromptSelector,
        batch_size: int,
        *,
        first_step: int,
        n_steps: int | None,
        epoch_steps: int | None = None,
    ) -> None:
        if epoch_steps is not None and epoch_steps < 1:
            n = len(selector.prompt_ids)
            raise ConfigurationError(
                f"epoch_steps {epoch_steps!r} must be at least 1: {n} prompts do not fill a batch of {batch_size}"
            )
        for name, value, least in (("batch_size", batch_size, 1), ("first_step", first_step, 0)):
            if value < least:
                raise ConfigurationError(f"{name} {value!r} must be at least {least}")
        self.selector = selector
        self.batch_size = batch_size
        self._first_step = self._next_step = first_step
        self._epoch_steps = epoch_steps
        self._end = None if n_steps is None else first_step + n_steps
        self._next_of_worker: int | None = None

    def __iter__(self) -> Iterator[int]:
        end = self._end if self._epoch_steps is None else self._next_step + self._left_of_epoch(self._epoch_steps)
        while end is None or self._next_step < end:
            self._next_step += 1
            yield self._next_step - 1

    def _left_of_epoch(self, epoch_steps: int) -> int:
        return epoch_steps - (self._next_step - self._first_step) % epoch_steps

    @property
    def newest(self) -> int:
        return self._next_step - 1

    def remaining(self) -> int:
        if self._epoch_steps is not None:
            return self._epoch_steps
        if self._end is None:
            raise TypeError("it has no length without n_steps")
        return max(0, self._end - self._next_step)

    def range_for_worker(self) -> Iterator[int]:
        """Whole steps in turn, as a `DataLoader` takes its batches from its workers in turn.

        Each iteration has new workers, which know what was observed before it; one that lives on knows its own steps.
        """
        worker = get_worker_info()
        if worker is None:
            yield from self
            return
        if self._next_of_worker is None:
            observed = self.selector.observed_step
            begins = self._next_step if observed is None else max(self._next_step, observed + 1)
            self._next_of_worker = begins + worker.id
        while self._end is None or self._next_of_worker < self._end:
            self._next_of_worker += worker.num_workers
            yield self._next_of_worker - worker.num_workers

    def state_dict(self) -> dict[str, Any]:
        return checkpoint(self.selector, self._next_step)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._next_step = go_back(self.selector, state)


class _Stepping:
    """What samplers have in common that give out the batches of steps."""

    _steps: _Steps

    @property
    def newest_step(self) -> int:
        """The last step whose batch was begun; the one before the first, if none was."""
        return self._steps.newest

    def state_dict(self) -> dict[str, Any]:
        """What belongs into the checkpoint."""
        return self._steps.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to it.

        Raises:
            ConfigurationError: It is no state of this sampler.
        """
        self._steps.load_state_dict(state)


class PromptSampler(_Stepping, Sampler[int]):
    """Positions in a dataset, `batch_size` for each step: give it to a `DataLoader` with the same batch size.

    It is stateful: `state_dict` goes into the checkpoint, `load_state_dict` continues after the newest observed step
    and sends the service back there. Batches that a `DataLoader` had read ahead are chosen anew.

    Args:
        selector: Of whose `prompt_ids` the dataset's rows stand in the same order, unless `positions` is given.
        first_step: The first step to choose for.
        n_steps: End after so many; endless by default.
        epoch_steps: Iterating gives so many steps, and goes on with the next ones when it is iterated again; for
            trainers that count epochs. In place of `n_steps`.
        positions: Where each prompt stands in the dataset.
        shard: (k, n): give out every n-th prompt of a batch from the k-th on, where each rank loads its own share.
            `batch_size` counts the prompts of all.
    """

    def __init__(
        self,
        selector: PromptSelector,
        batch_size: int,
        *,
        first_step: int = 0,
        n_steps: int | None = None,
        epoch_steps: int | None = None,
        positions: Mapping[str, int] | None = None,
        shard: tuple[int, int] = (0, 1),
    ) -> None:
        k, n = shard
        if not 0 <= k < n or batch_size % n:
            raise ConfigurationError(f"shard {shard!r} must be (k, n) with 0 <= k < n, and n divide {batch_size}")
        self._steps = _Steps(selector, batch_size, first_step=first_step, n_steps=n_steps, epoch_steps=epoch_steps)
        self._positions = positions if positions is not None else _in_order(selector)
        self._shard = shard

    def __iter__(self) -> Iterator[int]:
        k, n = self._shard
        for step in self._steps:
            for prompt_id in self._steps.selector.select(step, self._steps.batch_size).prompt_ids[k::n]:
                yield self._positions[prompt_id]

    def __len__(self) -> int:
        return self._steps.remaining() * self._steps.batch_size // self._shard[1]


class FilledBatchSampler(_Stepping, Sampler[list[int]]):
    """Positions in a dataset, for each step as many as it takes to find so many informative groups in one wave.

    Give it to a `DataLoader` as `batch_sampler`, without workers. Roll out all that a step gets, hand all outcomes to
    `selector.informative` together with `batch`, and train on what it returns. Stateful as `PromptSampler`.

    Args:
        selector: As in `PromptSampler`; so are `first_step`, `n_steps`, `epoch_steps` and `positions`.
        informative_groups: Groups wanted of each step.
    """

    def __init__(
        self,
        selector: PromptSelector,
        informative_groups: int,
        *,
        fill: Fill | None = None,
        first_step: int = 0,
        n_steps: int | None = None,
        epoch_steps: int | None = None,
        positions: Mapping[str, int] | None = None,
    ) -> None:
        self._steps = _Steps(
            selector, informative_groups, first_step=first_step, n_steps=n_steps, epoch_steps=epoch_steps
        )
        self._fill = asdict(fill or Fill())
        self._positions = positions if positions is not None else _in_order(selector)
        self.batch: Batch | None = None
        """The newest one; None before the first."""

    def __iter__(self) -> Iterator[list[int]]:
        for step in self._steps:
            self.batch = self._steps.selector.select_informative(step, self._steps.batch_size, **self._fill)
            yield [self._positions[prompt_id] for prompt_id in self.batch]

    def __len__(self) -> int:
        return self._steps.remaining()


class PromptDataset(IterableDataset[dict[str, Any]]):
    """The rows that the selector chooses, each with its `prompt_id` and its `step`.

    Give it to a `DataLoader` with the same batch size. With workers, each asks for whole steps, and the loader puts
    them in order. Each worker is a process: load a state before the loader is iterated, and wait until the selector is
    ready, so that `existing` can be checked. Iterating again goes on behind the newest step that was observed by then.
    With several ranks use `PromptSampler`, or no workers.

    Args:
        rows: By prompt id, or a sequence in the order of the selector's `prompt_ids`; mappings.
        first_step: The first step to choose for.
        n_steps: End after so many; endless by default.
    """

    def __init__(
        self,
        selector: PromptSelector,
        rows: Mapping[str, Mapping[str, Any]] | Sequence[Mapping[str, Any]],
        batch_size: int,
        *,
        first_step: int = 0,
        n_steps: int | None = None,
    ) -> None:
        self._steps = _Steps(selector, batch_size, first_step=first_step, n_steps=n_steps)
        self._rows = rows
        self._positions = None if isinstance(rows, Mapping) else _in_order(selector, len(rows))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for step in self._steps.range_for_worker():
            for prompt_id in self._steps.selector.select(step, self._steps.batch_size):
                row = self._rows[prompt_id if self._positions is None else self._positions[prompt_id]]  # type: ignore[index]  # a key for a mapping, a position for a sequence
                yield {**row, "prompt_id": prompt_id, "step": step}

    def state_dict(self) -> dict[str, Any]:
        """What belongs into the checkpoint. With workers, the newest observed step alone counts."""
        return self._steps.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to it, before the loader is iterated.

        Raises:
            ConfigurationError: It is no state of this dataset.
        """
        self._steps.load_state_dict(state)


def _in_order(selector: PromptSelector, n_rows: int | None = None) -> dict[str, int]:
    if n_rows is not None and n_rows != len(selector.prompt_ids):
        raise ConfigurationError(f"rows: {n_rows}, but the selector has {len(selector.prompt_ids)} prompts")
    return {prompt_id: position for position, prompt_id in enumerate(selector.prompt_ids)}
