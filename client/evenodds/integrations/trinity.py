"""Trinity-RFT: a data selector, registered as `evenodds`. Load it with `--plugin-dir` (see `examples/trinity`).

buffer.explorer_input.tasksets[0].data_selector:
  selector_type: evenodds
  kwargs: {base_url: http://127.0.0.1:8000, run: math-7b, group_size: 8}

The explorer and the trainer keep in step by `buffer.batch_size` tasks and `buffer.train_batch_size` experiences, so
that no batch can be filled: what is more would wait and grow old. `fill` is refused.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from trinity.buffer.selector import SELECTORS
from trinity.buffer.selector.selector import BaseSelector

from evenodds.errors import ConfigurationError
from evenodds.integrations.connection import Connection
from evenodds.training.text import described

WHERE = "data_selector.kwargs"
NO_FILL = "Trinity's explorer and trainer keep in step by batches of one size, and what is more would grow old"


@SELECTORS.register_module("evenodds")
class EvenOddsSelector(BaseSelector):  # type: ignore[misc]  # Trinity-RFT is not installed where this is checked
    """Row numbers of the tasks that the service chooses. Each choice is a step.

    The feedback is one mean for each group and does not say of how many attempts: `group_size` does, the explorer's
    `repeat_times`. Nor does it say of which choice: it counts for the newest step that the task was chosen at.

    In `kwargs`, besides what `Connection` takes: `group_size`; `prompt_key`, the column of the task's text
    (`question`); `answer_key`, that of its answer (`answer`), which may be missing; `id_key`, the column of its id, by
    default none: the row number.

    Raises:
        ConfigurationError: `kwargs` are incomplete.
    """

    def __init__(self, data_source: Any, config: Any) -> None:
        super().__init__(data_source, config)
        kwargs = dict(config.kwargs)
        self._group_size = kwargs.pop("group_size", 0)
        if not isinstance(self._group_size, int) or self._group_size < 1:
            raise ConfigurationError(
                f"{WHERE}: group_size {self._group_size!r}; set it to the number of attempts that a mean is of"
            )
        prompt_key, id_key = kwargs.pop("prompt_key", "question"), kwargs.pop("id_key", None)
        answer_key = kwargs.pop("answer_key", "answer")
        pool: list[dict[str, object]] = []
        for index, row in enumerate(data_source.dataset):
            if id_key is not None and row.get(id_key) is None:
                raise ConfigurationError(f"{WHERE}: row {index} of the taskset has no column {id_key!r} (id_key)")
            prompt: dict[str, object] = {"prompt_id": str(index if id_key is None else row[id_key])}
            pool.append(prompt | described(row.get(prompt_key), row.get(answer_key)))
        settings = {"seed": config.seed, **kwargs}
        self._connection = Connection(settings, pool, where=WHERE, no_fill=NO_FILL, group_size=self._group_size)
        self._ids = self._connection.selector.prompt_ids
        self._indices = {prompt_id: index for index, prompt_id in enumerate(self._ids)}
        self._chosen_at: dict[int, int] = {}

    def get_indices(self, batch_size: int, return_extra_info: bool = False) -> list[int]:
        """The next choice."""
        batch = self._connection.choose(batch_size)
        indices = [self._indices[prompt_id] for prompt_id in batch]
        self._chosen_at.update(dict.fromkeys(indices, batch.step))
        return indices

    def feedback(self, indices: list[int], values: list[float]) -> None:
        """Report groups by the means of their rewards."""
        by_step: dict[int, dict[str, float]] = defaultdict(dict)  # NaN, of a group that all failed, is left out
        for index, value in zip(indices, values, strict=True):
            step = self._chosen_at.get(int(index), max(0, self._connection.next_step - 1))
            by_step[step][self._ids[int(index)]] = float(value)
        for step, means in sorted(by_step.items()):
            self._connection.observe_means(step, means, attempts=self._group_size)

    update = feedback
    """Its name in earlier releases."""

    def state_dict(self) -> dict[str, Any]:
        """What belongs into the checkpoint."""
        return self._connection.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go back to it, together with the service. A training that starts anew hands over no state of ours."""
        if "selector" in state_dict:
            self._connection.load_state_dict(state_dict)
            self._chosen_at.clear()
