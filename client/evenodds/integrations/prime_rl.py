"""prime-rl: a task sampler for its curricula.

`Curriculum` builds its samplers from two known configurations and takes no import path, so `install` puts this sampler
in the place of the standard one: in a launcher of your own, before the orchestrator starts (see `examples/prime_rl`).
There is no wave to fill: the orchestrator draws one task after the other until its batch is full; `fill` is refused.
"""

from __future__ import annotations

import functools
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from prime_rl.orchestrator import train_source
from prime_rl.orchestrator.curriculum import samplers
from prime_rl.orchestrator.curriculum.samplers import TaskSampler

from evenodds.errors import ConfigurationError
from evenodds.integrations.connection import Connection
from evenodds.training.text import described

NO_FILL = "prime-rl's orchestrator draws one task after the other until its batch is full"
_KEPT_DRAWS = 64
"""Of each task: those that are under way, and those whose groups were dropped."""


class EvenOddsSampler(TaskSampler):  # type: ignore[misc]  # prime-rl is not installed where this is checked
    """The tasks that the service chooses, one after the other.

    They are chosen `batch_size` at a time; the next choice is asked for when half of one is given out, so that the
    orchestrator does not wait. Each choice is a step.

    Args:
        tasks: A finite taskset. A task's id is its `key`, its answer the field `answer` of its data, where it has one.
        settings: See `Connection`.
        batch_size: Tasks of a choice; best as many as a training step takes.

    Raises:
        ConfigurationError: The settings are incomplete, or the taskset has no end.
    """

    def __init__(self, tasks: Sequence[Any] | Iterator[Any], settings: Mapping[str, Any], *, batch_size: int) -> None:
        if not isinstance(tasks, Sequence):
            raise ConfigurationError("tasks: a taskset without end has no pool to choose from: give a finite one")
        self._by_key: dict[str, Any] = {}
        for task in tasks:
            if task.key in self._by_key:
                raise ConfigurationError(f"tasks: two have the key {task.key!r}: keys must differ within a taskset")
            self._by_key[task.key] = task
        self._batch_size = min(batch_size, len(self._by_key))
        pool = [
            {"prompt_id": key} | described(task.data.prompt_text, getattr(task.data, "answer", None))
            for key, task in self._by_key.items()
        ]
        self._connection = Connection(settings, pool, where="settings", no_fill=NO_FILL)
        self._waiting: deque[str] = deque()
        self.trainer_step: int | None = None
        """The orchestrator's step, which the groups that are drawn now will carry. Set before each draw."""
        # At which choice each task was drawn, by the orchestrator's step at which it was: [(trainer step, step)].
        self._drawn: dict[str, deque[tuple[int | None, int]]] = defaultdict(lambda: deque(maxlen=_KEPT_DRAWS))
        self._step_of: dict[str, int] = {}

    def __next__(self) -> Any:
        if not self._waiting:
            batch = self._connection.choose(self._batch_size)
            self._waiting.extend(batch)
            self._step_of = dict.fromkeys(batch, batch.step)
        key = self._waiting.popleft()
        self._drawn[key].append((self.trainer_step, self._step_of[key]))
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
        if rewards:
            self._connection.observe(self._chosen_at(key, group), {key: rewards})

    def set_group_size(self, attempts: int) -> None:
        """How many attempts the environment makes at each task."""
        self._connection.selector.set_group_size(attempts)

    def _chosen_at(self, key: str, group: list[Any]) -> int:
        """The choice that drew the task of this group.

        A group that is dropped or stale is never shown, so that the draws of a task cannot be counted off. The group
        says at which of the orchestrator's steps it was dispatched, and so which draw it is of. Where it does not say,
        the newest counts.
        """
        drawn = self._drawn.get(key)
        if not drawn:
            return max(0, self._connection.next_step - 1)
        work = getattr(getattr(group[0], "run", None), "work", None)
        at = getattr(work, "step", None)
        for draw in drawn:
            if at is not None and draw[0] == at:
                drawn.remove(draw)
                return draw[1]
        return drawn.pop()[1]

    def state_dict(self) -> dict[str, Any]:
        """What belongs into the checkpoint."""
        return self._connection.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go back to it, together with the service. What was chosen and not finished is chosen anew."""
        self._connection.load_state_dict(state_dict)
        self._waiting.clear()
        self._drawn.clear()

    def metrics(self) -> dict[str, float]:
        """See `PromptSelector.metrics`; prime-rl puts them under `sampler/`."""
        return self._connection.selector.metrics()


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
    _follow(train_source.TrainSource)


def _follow(source: Any) -> None:
    """Let samplers know at which of the orchestrator's steps they draw, and how many attempts a task gets."""
    if getattr(source, "_follows_evenodds", False):
        return
    made, next_task = source.__init__, source.next_task

    @functools.wraps(made)
    def make_source(self: Any, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        for env in self.envs:
            sampler = self.curricula[env.name].sampler
            if isinstance(sampler, EvenOddsSampler):
                sampler.set_group_size(env.config.group_size)

    @functools.wraps(next_task)
    def next_task_at(self: Any, *, step: int) -> Any:
        for curriculum in self.curricula.values():
            if isinstance(curriculum.sampler, EvenOddsSampler):
                curriculum.sampler.trainer_step = step
        return next_task(self, step=step)

    source.__init__, source.next_task, source._follows_evenodds = make_source, next_task_at, True
