"""verl >= 0.9: every V1 trainer follows the service once this module is loaded.

    export VERL_USE_EXTERNAL_MODULES=evenodds.integrations.verl_v1
    +data.evenodds.base_url=http://127.0.0.1:8000
    +data.evenodds.run=math-7b
    +data.evenodds.reward_key=acc    # where the score holds more than success (such as an overlong penalty)

`trainer.v1.trainer_mode` stays as it is (`sync`, `colocate_async`, `separate_async`): verl compares that name in many
places, so the registered trainers are replaced by subclasses under their own names. Without `data.evenodds` they do
what they always did. Groups that verl's replay buffer drops (`algorithm.filter_groups`, those that are too old or left
over) are reported too. `fill` is refused: that buffer decides how many prompts are rolled out.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import verl.trainer.ppo.v1  # noqa: F401  # registers the trainers
from verl.trainer.ppo.v1 import trainer_base

from evenodds.integrations.connection import Connection
from evenodds.integrations.torch import PromptSampler
from evenodds.integrations.verl_rows import (
    no_such_key,
    pool_of,
    prompt_id_of,
    rewards_by_prompt,
    without_reward_key,
)

logger = logging.getLogger(__name__)

WHERE = "data.evenodds"
NO_FILL = "verl's replay buffer decides how many prompts are rolled out, and refills what it evicts"


class SelectsPrompts:
    """Mixed into a V1 trainer, it draws from the service and reports what is trained on.

    A step is one choice of `data.train_batch_size` prompts, from 1 on: verl's global step, unless evicted groups are
    refilled, which takes choices of their own.
    """

    def _init_dataloader(self: Any) -> None:
        super()._init_dataloader()  # type: ignore[misc]  # of the trainer that this is mixed into
        self._evenodds: Connection | None = None
        data = self.config.data
        if data.get("evenodds") is None:
            return
        pool = pool_of(self.train_dataset, data.get("prompt_key", "prompt"))
        settings, self._evenodds_reward_key = without_reward_key(data.evenodds)
        self._evenodds = Connection(settings, pool, where=WHERE, no_fill=NO_FILL, group_size=_group_size(self.config))
        self._evenodds_sampler = PromptSampler(
            self._evenodds.selector,
            data.train_batch_size,
            first_step=1,
            epoch_steps=len(self.train_dataset) // data.train_batch_size,
        )
        # uid of a prompt under way: its id, and the step at which it was chosen.
        self._evenodds_chosen: dict[str, tuple[str, int]] = {}
        self.train_dataloader = trainer_base.StatefulDataLoader(
            dataset=self.train_dataset,
            batch_size=data.get("gen_batch_size") or data.train_batch_size,
            num_workers=0,  # workers would read ahead of the outcomes
            drop_last=True,
            collate_fn=trainer_base.collate_fn,
            sampler=self._evenodds_sampler,
        )
        self._evenodds_follow(self.replay_buffer)

    def _evenodds_follow(self: Any, replay_buffer: Any) -> None:
        """Report the groups that the buffer drops before it lets them go."""
        clear = getattr(replay_buffer, "_clear_groups", None)
        if clear is None:
            logger.warning(
                "%s, of trainer.v1.sampler.custom_sampler, is no ReplayBuffer of verl's: groups that it drops are not "
                "reported, and the service takes their prompts for unseen",
                type(replay_buffer).__name__,
            )
            return

        def reported(partition_id: str, uids: set[str]) -> None:
            is_rewarded = self.reward_loop_manager.reward_loop_worker_handles is not None  # else after it was sampled
            if partition_id == "train" and is_rewarded:
                dropped = replay_buffer.partitions[partition_id]
                self._report([key for key in dropped if key.split("_")[0] in uids], partition_id)
                for uid in uids:  # of which every attempt failed
                    self._evenodds_chosen.pop(uid, None)
            clear(partition_id, uids)

        replay_buffer._clear_groups = reported

    def _fetch_one_gen_batch(self: Any) -> Any:
        batch = super()._fetch_one_gen_batch()  # type: ignore[misc]
        if self._evenodds is not None:
            step = self._evenodds_sampler.newest_step
            rows = zip(_list(batch["uid"]), _list(batch["data_source"]), _list(batch["extra_info"]), strict=True)
            for uid, source, extra_info in rows:
                self._evenodds_chosen[uid] = (prompt_id_of(source, extra_info), step)
        return batch

    def _compute_advantage(self: Any, batch: Any, metrics: dict[str, Any]) -> Any:
        computed = super()._compute_advantage(batch, metrics)  # type: ignore[misc]
        if self._evenodds is not None:
            padded = zip(batch.keys, batch.tags, strict=True)
            self._report([key for key, tag in padded if not tag.get("is_padding", False)], batch.partition_id)
            metrics.update(self._evenodds.selector.metrics())
        return computed

    def _report(self: Any, keys: list[str], partition_id: str) -> None:
        """The rewards of these trajectories, which lie in verl's queue."""
        attempts = last_of_sessions(keys)
        if not attempts:
            return
        field = "rm_scores" if self._evenodds_reward_key is None else "extra_fields"
        data = trainer_base.tq.kv_batch_get(keys=attempts, partition_id=partition_id, select_fields=["uid", field])
        trajectories: dict[int, tuple[list[str], list[float | None]]] = defaultdict(lambda: ([], []))
        for uid, value in zip(_list(data["uid"]), list(data[field]), strict=True):
            if uid in self._evenodds_chosen:  # not what a checkpoint of the queue brought back
                prompt_id, step = self._evenodds_chosen[uid]
                ids, rewards = trajectories[step]
                ids.append(prompt_id)
                rewards.append(_reward(value, self._evenodds_reward_key))
        for uid in set(_list(data["uid"])):
            self._evenodds_chosen.pop(uid, None)
        for step, (ids, rewards) in trajectories.items():
            self._evenodds.observe(step, rewards_by_prompt(ids, rewards))


def last_of_sessions(keys: Iterable[str]) -> list[str]:
    """One key for each attempt: an agent may give several outputs in one session, which share its reward.

    Args:
        keys: `{uid}_{session}_{index}`, as verl names trajectories; others stand for themselves.
    """
    last: dict[str, tuple[int, str]] = {}
    for key in keys:
        session, _, index = key.rpartition("_")
        if "_" not in session or not index.isdigit():
            session, index = key, "0"
        last[session] = max(last.get(session, (-1, key)), (int(index), key))
    return [key for _, key in last.values()]


def _reward(value: Any, reward_key: str | None) -> float | None:
    if reward_key is None:
        return float(value.sum())
    fields = getattr(value, "data", value)  # tensordict wraps what is no tensor
    extra = fields.get("reward_extra_info") or {}
    if reward_key not in extra:
        raise no_such_key(reward_key, extra)
    reward: float | None = extra[reward_key]
    return reward


def _group_size(config: Any) -> int | None:
    """`actor_rollout_ref.rollout.n`."""
    try:
        n = int(config.actor_rollout_ref.rollout.n)
    except (AttributeError, KeyError, TypeError):
        return None
    return n if n > 1 else None


def _list(column: Any) -> list[Any]:
    """The items of a column, whatever holds it: an array, or tensordict's stack of values that are no tensors."""
    return list(column.tolist() if hasattr(column, "tolist") else column)


def install() -> None:
    """Replace every registered trainer by one that follows the service. Repeating it changes nothing."""
    for name, trainer in list(trainer_base.TRAINER_REGISTRY.items()):
        if not issubclass(trainer, SelectsPrompts):
            members = {"__module__": __name__}
            trainer_base.TRAINER_REGISTRY[name] = type(trainer.__name__, (SelectsPrompts, trainer), members)


install()
