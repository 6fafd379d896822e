"""prime-rl: a task sampler for its curricula.

`Curriculum` builds its samplers from two known configurations and takes no import path, so `install` puts this sampler
in the place of the standard one: in a launcher of your own, before the orchestrator starts (see `examples/prime_rl`).
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from prime_rl.orchestrator.curriculum import samplers
from prime_rl.orchestrator.curriculum.samplers import TaskSampler

from evenodds.errors import ConfigurationError
from evenodds.integrations.connection import Connection, text_of


class EvenOddsSampler(TaskSampler):  # type: ignore[misc]  # prime-rl is not installed where this is checked
    """The tasks that the service chooses, one after the other.

    They are chosen `batch_size` at a time; the next choice is asked for when half of one is given out, so that the
    orchestrator does not wait. Each choice is a step.

    Args:
        tasks: A finite taskset. A task's id is its `key`.
        settings: See `Connection`.
        batch_size: Tasks of a choice; best as many as a training step takes.

    Raises:
        ConfigurationError: The settings are incomplete, or the taskset has no end.
    """

    def __init__(self, tasks: Sequence[Any] | Iterator[Any], settings: Mapping[str, Any], *, batch_size: int) -> None:
        if not isinstance(tasks, Sequence):
            raise ConfigurationError("tasks: a taskset without end has no pool to choose from")
        self._by_key = {task.key: task for task in tasks}
        self._batch_size = min(batch_size, len(self._by_key))
        pool = [
            {"prompt_id": key} | ({"text": text} if (text := text_of(task.data.prompt_text)) else {})
            for key, task in self._by_key.items()
        ]
        self._connection = Connection(settings, pool, where="settings")
        self._waiting: deque[str] = deque()
        # At which steps each task was chosen and not observed yet, oldest first.
        self._steps: dict[str, deque[int]] = defaultdict(deque)

    def __next__(self) -> Any:
        if not self._waiting:
            batch = self._connection.choose(self._batch_size)
            self._waiting.extend(batch)
            for prompt_id in batch:
                self._steps[prompt_id].append(batch.step)
        key = self._waiting.popleft()
        if len(self._waiting) == self._batch_size // 2:
            self._connection.selector.prefetch(self._connection.next_step, self._batch_size)
        return self._by_key[key]

    def observe(self, group: list[Any]) -> None:
        """Report a finalized group: the rewards of its attempts that did not fail for other reasons."""
        rewards = [
            trace.reward
            for episode in group
            for trace in episode.traces
            if episode.ok and not trace.has_error and trace.agent.trainable and trace.num_turns > 0
        ]
        key = group[0].task.key
        steps = self._steps.get(key)
        step = steps.popleft() if steps else max(0, self._connection.next_step - 1)
        if rewards:
            self._connection.observe(step, {key: rewards})

    def state_dict(self) -> dict[str, Any]:
        """What belongs into the checkpoint."""
        return self._connection.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go back to it, together with the service. What was chosen and not finished is chosen anew."""
        self._connection.load_state_dict(state_dict)
        self._waiting.clear()
        self._steps.clear()

    def metrics(self) -> dict[str, float]:
        """Counts of this process, under `sampler/`."""
        counts = self._connection.selector.counts()
        return {
            "evenodds/service_batches": float(counts.service_batches),
            "evenodds/uniform_batches": float(counts.uniform_batches),
            "evenodds/undelivered": float(counts.observed - counts.delivered),
        }


def install(settings: Mapping[str, Any], *, batch_size: int) -> None:
    """From now on, a curriculum with the standard sampler follows the service.

    Each environment of a training has a curriculum, and a run of its own: the first has the name in `settings`, the
    others that name with `-2`, `-3` and so on.
    """
    n_made = 0

    def make(tasks: Sequence[Any] | Iterator[Any]) -> EvenOddsSampler:
        nonlocal n_made
        n_made += 1
        run = settings.get("run", "") if n_made == 1 else f"{settings.get('run', '')}-{n_made}"
        return EvenOddsSampler(tasks, {**settings, "run": run}, batch_size=batch_size)

    samplers.StandardSampler = make
