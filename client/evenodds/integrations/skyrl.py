"""SkyRL: a trainer that draws from the service and reports what its generator returned.

    class Experiment(BasePPOExp):
        def get_trainer(self, *args, **kwargs):
            return following(RayPPOTrainer, {"base_url": "http://127.0.0.1:8000", "run": "math"})(*args, **kwargs)

Nothing of SkyRL is imported: the trainer's class is handed over. With `fill` a batch has as many prompts as it takes to
find `train_batch_size` informative groups, which `dynamic_sampling.type=filter` leaves to be trained on.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Any

from torchdata.stateful_dataloader import StatefulDataLoader

from evenodds.errors import ConfigurationError
from evenodds.integrations.connection import Connection
from evenodds.integrations.torch import FilledBatchSampler, PromptSampler
from evenodds.training.text import described, ground_truth_of

WHERE = "settings of SkyRL's trainer"
NO_FILL = (
    "SkyRL trains on all groups of a batch, silent or not: set trainer.algorithm.dynamic_sampling.type=filter, which "
    "drops silent ones"
)


def following(trainer: type[Any], settings: Mapping[str, Any]) -> type[Any]:
    """The trainer's class, following the service.

    Args:
        trainer: `RayPPOTrainer`, or a subclass of it.
        settings: See `Connection`; and `id_key`, the column of the data set that holds a prompt's id, by default none:
            a hash of the prompt.

    Raises:
        ConfigurationError: It is the fully asynchronous trainer, which draws one prompt at a time and keeps its own
            account of the data loader.
    """
    if any(base.__name__ == "FullyAsyncRayPPOTrainer" for base in trainer.__mro__):
        raise ConfigurationError(
            f"{trainer.__name__}: SkyRL's fully asynchronous trainer resets and skips its data loader on its own, so "
            "that its prompts cannot be chosen: use RayPPOTrainer"
        )
    return type(trainer.__name__, (SelectsPrompts, trainer), {"_evenodds_settings": dict(settings)})


class SelectsPrompts:
    """Mixed into a trainer. A step is one batch of its data loader, from 1 on: its global step, unless dynamic
    sampling draws further batches, which take steps of their own. Its data loader's state is in its checkpoint."""

    _evenodds_settings: Mapping[str, Any]
    train_dataset: Any
    cfg: Any
    all_metrics: dict[str, Any]

    def _build_train_dataloader_and_compute_training_steps(self: Any) -> None:
        super()._build_train_dataloader_and_compute_training_steps()  # type: ignore[misc]
        if self.train_dataset is None:
            raise ConfigurationError(f"{WHERE}: the trainer has no training data to choose from")
        id_key = self._evenodds_settings.get("id_key")
        rows = [self.train_dataset[index] for index in range(len(self.train_dataset))]
        # uid of a row, which is its number: the prompt's id, which stays the same when rows are left out.
        self._evenodds_ids = {uid: _prompt_id(messages, extras, id_key) for messages, _, extras, uid in rows}
        pool = [
            {"prompt_id": self._evenodds_ids[uid]} | described(messages, ground_truth_of(extras))
            for messages, _, extras, uid in rows
        ]
        batch_size = self.cfg.trainer.train_batch_size
        options = {name: value for name, value in self._evenodds_settings.items() if name != "id_key"}
        self._evenodds_filters = _dynamic_sampling(self.cfg)
        self._evenodds = Connection(
            options,
            pool,
            where=WHERE,
            no_fill=None if self._evenodds_filters == "filter" else NO_FILL,
            group_size=self.cfg.generator.n_samples_per_prompt,
        )
        steps = {"first_step": 1, "epoch_steps": len(rows) // batch_size}
        selector, fill = self._evenodds.selector, self._evenodds.fill
        batches: dict[str, Any]
        if fill is None:
            batches = {
                "batch_size": batch_size,
                "sampler": PromptSampler(selector, batch_size, **steps),
                "drop_last": True,
            }
        else:
            batches = {"batch_sampler": FilledBatchSampler(selector, batch_size, fill=fill, **steps)}
        self._evenodds_sampler = batches["sampler" if fill is None else "batch_sampler"]
        self.train_dataloader = StatefulDataLoader(
            self.train_dataset,
            collate_fn=self.train_dataset.collate_fn,
            num_workers=0,  # workers would read ahead of the outcomes
            **batches,
        )

    def handle_dynamic_sampling(self: Any, generator_output: Any, uids: list[str]) -> Any:
        """Report the rewards of all groups, before dynamic sampling drops or replaces any."""
        self._report(generator_output, uids)
        return super().handle_dynamic_sampling(generator_output, uids)  # type: ignore[misc]

    def postprocess_generator_output(
        self: Any,
        generator_output: Any,
        uids: list[str],
        metrics_generator_output: Any = None,
        metrics_uids: list[str] | None = None,
    ) -> Any:
        """Report the rewards of all groups, those too that are dropped afterwards."""
        if self._evenodds_filters is None:  # else they were reported before it had its way
            whole = generator_output if metrics_generator_output is None else metrics_generator_output
            self._report(whole, uids if metrics_uids is None else metrics_uids)
        given: list[Any] = [generator_output, uids]
        if metrics_generator_output is not None or metrics_uids is not None:
            given += [metrics_generator_output, metrics_uids]
        processed = super().postprocess_generator_output(*given)  # type: ignore[misc]
        self.all_metrics.update(self._evenodds.selector.metrics())
        return processed

    def _report(self: Any, output: Mapping[str, Any], uids: Sequence[str]) -> None:
        is_last = output.get("is_last_step") or [True] * len(uids)  # of several steps of an attempt, the last counts
        groups: dict[str, list[float | None]] = defaultdict(list)
        for uid, reward, is_whole in zip(uids, output["rewards"], is_last, strict=True):
            if is_whole:
                groups[self._evenodds_ids[uid]].append(sum(reward) if isinstance(reward, list) else reward)
        self._evenodds.observe(self._evenodds_sampler.newest_step, groups)


def _dynamic_sampling(cfg: Any) -> str | None:
    """What `trainer.algorithm.dynamic_sampling.type` says."""
    kind: str | None = cfg.trainer.algorithm.dynamic_sampling.type
    return kind


def _prompt_id(messages: Any, extras: Mapping[str, Any], id_key: str | None) -> str:
    if id_key is None:
        return sha256(json.dumps(messages, sort_keys=True, default=str).encode()).hexdigest()
    if extras.get(id_key) is None:
        raise ConfigurationError(f"{WHERE}: a row of the training data has no column {id_key!r} (id_key)")
    return str(extras[id_key])
