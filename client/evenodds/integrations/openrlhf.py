"""OpenRLHF: prompts that the service chooses, and rewards as its samples generator gets them, before its filter.

`following(PPOTrainer, settings)` in a launcher of your own, in the place of `PPOTrainer` (see `examples/openrlhf`).
Nothing of OpenRLHF is imported: the trainer's class is handed over. There is no wave to fill: with dynamic filtering it
replaces each filtered prompt by one more, until its batch is full; `fill` is refused.
"""

from __future__ import annotations

import inspect
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping
from hashlib import sha256
from typing import Any

from evenodds.errors import ConfigurationError
from evenodds.integrations.connection import Connection
from evenodds.training.text import described

WHERE = "settings of OpenRLHF's trainer"
NO_FILL = "OpenRLHF draws one prompt after the other, and with dynamic filtering until its batch is full"


class SelectedDataloader:
    """In the place of OpenRLHF's data loader: one prompt after the other, `batch_size` of each choice.

    A prompt's id is a hash of its text and its label, which is its answer; rows with the same are one prompt.
    """

    def __init__(self, dataset: Any, settings: Mapping[str, Any], *, batch_size: int, group_size: int) -> None:
        self.dataset = dataset
        self._rows: dict[str, int] = {}
        for row in range(len(dataset)):
            self._rows.setdefault(id_of(dataset[row][1], dataset[row][2]), row)
        if len(self._rows) < batch_size:
            raise ConfigurationError(f"{WHERE}: {len(self._rows)} prompts do not fill a batch of {batch_size}")
        pool = [{"prompt_id": i} | described(*dataset[row][1:3]) for i, row in self._rows.items()]
        self._batch_size = batch_size
        self._n_samples = group_size
        self.connection = Connection(settings, pool, where=WHERE, no_fill=NO_FILL, group_size=group_size)
        self._waiting: deque[tuple[str, int]] = deque()
        self._chosen_at: dict[str, int] = {}
        self._rewards: dict[str, list[float | None]] = defaultdict(list)

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[Any]:
        """An epoch."""
        for _ in range(len(self.dataset)):
            if not self._waiting:
                batch = self.connection.choose(self._batch_size)
                self._waiting.extend((prompt_id, batch.step) for prompt_id in batch)
            prompt_id, step = self._waiting.popleft()
            self._chosen_at[prompt_id] = step
            self._rewards.pop(prompt_id, None)  # of attempts that were given up
            yield self.dataset.collate_fn([self.dataset[self._rows[prompt_id]]])

    def reported(self, response: Mapping[str, Any]) -> None:
        """One attempt. Its group is reported when it is whole.

        What counts is `scores`, which OpenRLHF filters by, or else `reward`.
        """
        prompt_id = id_of(response["prompt"], response["label"])
        if prompt_id not in self._chosen_at:
            return
        score = response.get("scores")
        group = self._rewards[prompt_id]
        group.append(response.get("reward") if score is None else score)
        if len(group) == self._n_samples:
            del self._rewards[prompt_id]
            self.connection.observe(self._chosen_at[prompt_id], {prompt_id: group})

    def state_dict(self) -> dict[str, Any]:
        """What belongs into the checkpoint."""
        return self.connection.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to it, together with the service. What was drawn and not finished is chosen anew."""
        if not state:  # of a training that starts anew
            return
        self.connection.load_state_dict(state)
        self._waiting.clear()
        self._rewards.clear()


def following(trainer: type[Any], settings: Mapping[str, Any]) -> type[Any]:
    """The trainer's class, following the service.

    Args:
        trainer: The class below the Ray actor `PPOTrainer`: `PPOTrainer.__ray_metadata__.modified_class`.
        settings: See `Connection`.
    """

    def made(self: Any, *args: Any, **kwargs: Any) -> None:
        _follow(inspect.unwrap(trainer.__init__).__globals__, settings)  # Ray wraps the methods of an actor's class
        trainer.__init__(self, *args, **kwargs)

    return type(trainer.__name__, (trainer,), {"__init__": made})


def _follow(names: dict[str, Any], settings: Mapping[str, Any]) -> None:
    """Give the trainer's constructor other parts: by the names that it looks up, wherever Ray has put its class."""
    if hasattr(names["SamplesGenerator"], "_follows_evenodds"):
        return
    prepare_datasets = names["prepare_datasets"]

    def prepared(strategy: Any, tokenizer: Any) -> Any:
        loader, eval_loader, max_steps = prepare_datasets(strategy, tokenizer)
        rollout = strategy.args.rollout
        selected = SelectedDataloader(
            loader.dataset, settings, batch_size=rollout.batch_size, group_size=rollout.n_samples_per_prompt
        )
        return selected, eval_loader, max_steps

    names["prepare_datasets"] = prepared
    names["SamplesGenerator"] = reporting(names["SamplesGenerator"])


def reporting(generator: type[Any]) -> type[Any]:
    """A samples generator that reports each response before groups are filtered, and none of an evaluation."""

    class Reporting(generator):  # type: ignore[misc]
        _follows_evenodds = True
        _is_evaluating = False

        def generate_eval_samples(self, **options: Any) -> Any:
            self._is_evaluating = True
            try:
                return super().generate_eval_samples(**options)
            finally:
                self._is_evaluating = False

        def _process_response_into_experience(self, response: Any, **options: Any) -> Any:
            experience = super()._process_response_into_experience(response, **options)
            if not self._is_evaluating and isinstance(self.prompts_dataloader, SelectedDataloader):
                self.prompts_dataloader.reported(response)
            return experience

    Reporting.__name__ = generator.__name__
    return Reporting


def id_of(prompt: str, label: object) -> str:
    """The id of a prompt that stays the same when rows are added or left out."""
    return sha256(f"{prompt}\x00{label}".encode()).hexdigest()
