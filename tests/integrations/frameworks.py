"""Stand-ins for frameworks that no registry has or that need a cluster: as much of each as its adapter touches.

What they look like is recorded in `interfaces.json`, with the release or commit that it was read from.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler


@contextmanager
def installed(modules: dict[str, dict[str, Any]], *adapters: str) -> Iterator[None]:
    """With these modules (and the packages above them), and with the adapters imported anew."""
    names = {".".join(name.split(".")[: n + 1]) for name in modules for n in range(name.count(".") + 1)}
    kept = {name: sys.modules.pop(name, None) for name in (*names, *adapters)}
    for name in sorted(names):
        module = ModuleType(name)
        module.__path__ = []
        vars(module).update(modules.get(name, {}))
        sys.modules[name] = module
        parent, _, leaf = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], leaf, module)
    try:
        yield
    finally:
        for name, module_before in kept.items():
            sys.modules.pop(name, None)
            if module_before is not None:
                sys.modules[name] = module_before


# verl 0.7.1


class AbstractCurriculumSampler(Sampler[int]):
    def __init__(self, data_source: Any, data_config: Any) -> None: ...

    def update(self, batch: Any) -> None:
        raise NotImplementedError


class RLHFDataset:
    """Rows as verl keeps them: a frame, from which it makes items."""

    def __init__(self, n: int) -> None:
        self.dataframe = [
            {
                "data_source": "sums",
                "prompt": [{"role": "user", "content": f"What is {i} + {i}?"}],
                "extra_info": {"index": i, "split": "train"},
                "reward_model": {"style": "rule", "ground_truth": f"{2 * i}"},
            }
            for i in range(n)
        ]

    def __len__(self) -> int:
        return len(self.dataframe)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.dataframe[index], "index": index}


VERL_071 = {"verl.experimental.dataset.sampler": {"AbstractCurriculumSampler": AbstractCurriculumSampler}}


# verl 0.9.1


def collate(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {key: [row[key] for row in rows] for key in rows[0]}


@dataclass
class Meta:
    """What is known of trajectories that lie in the transfer queue."""

    keys: list[str]
    tags: list[dict[str, Any]]
    partition_id: str = "train"


class TransferQueue:
    """Trajectories by key."""

    def __init__(self) -> None:
        self.fields: dict[str, dict[str, Any]] = {}

    def kv_batch_get(self, keys: list[str], partition_id: str, select_fields: list[str]) -> dict[str, list[Any]]:
        return {name: [self.fields[key][name] for key in keys] for name in select_fields}


class ReplayBuffer:
    """What verl drops, it drops by this method."""

    def __init__(self) -> None:
        self.partitions: dict[str, dict[str, Any]] = {"train": {}, "val": {}}

    def _clear_groups(self, partition_id: str, uids: set[str]) -> None:
        kept = {key: tag for key, tag in self.partitions[partition_id].items() if key.split("_")[0] not in uids}
        self.partitions[partition_id] = kept


class PPOTrainer:
    """One step of a V1 trainer: fetch, roll out, compute advantages."""

    def __init__(self, config: Any, dataset: RLHFDataset, queue: TransferQueue, replay_buffer: Any = None) -> None:
        self.config = config
        self.replay_buffer = replay_buffer or ReplayBuffer()
        self.reward_loop_manager = SimpleNamespace(reward_loop_worker_handles=["worker"])
        self.train_dataset = dataset
        self.queue = queue
        self.n_fetched = 0
        self.train_dataloader_it: Iterator[Any] | None = None

    def _init_dataloader(self) -> None:
        self.train_dataloader: Any = DataLoader(
            self.train_dataset,  # type: ignore[arg-type]
            batch_size=self.config.data.get("gen_batch_size") or self.config.data.train_batch_size,
            collate_fn=collate,
        )

    def _fetch_one_gen_batch(self) -> dict[str, Any]:
        try:
            if self.train_dataloader_it is None:
                self.train_dataloader_it = iter(self.train_dataloader)
            batch: dict[str, Any] = next(self.train_dataloader_it)
        except StopIteration:
            self.train_dataloader_it = iter(self.train_dataloader)
            batch = next(self.train_dataloader_it)
        batch["uid"] = [f"uid-{self.n_fetched + i}" for i in range(len(batch["prompt"]))]
        self.n_fetched += len(batch["uid"])
        return batch

    def _compute_advantage(self, batch: Meta, metrics: dict[str, Any]) -> Meta:
        metrics["advantages"] = len(batch.keys)
        return batch


class PPOTrainerSync(PPOTrainer):
    pass


def verl_091(queue: TransferQueue) -> dict[str, dict[str, Any]]:
    return {
        "verl.trainer.ppo.v1.trainer_base": {
            "PPOTrainer": PPOTrainer,
            "TRAINER_REGISTRY": {"sync": PPOTrainerSync},
            "StatefulDataLoader": DataLoader,
            "collate_fn": collate,
            "tq": queue,
        }
    }


# slime


@dataclass
class Sample:
    class Status(Enum):
        PENDING = "pending"
        COMPLETED = "completed"
        TRUNCATED = "truncated"
        ABORTED = "aborted"
        FAILED = "failed"

    prompt: Any = ""
    group_index: int | None = None
    index: int | None = None
    rollout_id: int | None = None
    label: str | None = None
    reward: Any = None
    status: Status = Status.PENDING
    metadata: dict[str, Any] = field(default_factory=dict)

    def get_reward_value(self, args: Any) -> Any:
        return self.reward if not args.reward_key else self.reward[args.reward_key]


class RolloutDataSourceWithBuffer:
    def __init__(self, args: Any) -> None:
        self.args = args
        self.sample_group_index = self.sample_index = 0
        self.dataset = SimpleNamespace(samples=args.samples) if args.rollout_global_dataset else None
        self.buffer: list[list[Sample]] = []
        self.saved: list[Any] = []

    def _get_samples_from_buffer(self, num_samples: int) -> list[list[Sample]]:
        taken, self.buffer = self.buffer[:num_samples], self.buffer[num_samples:]
        return taken

    def add_samples(self, samples: list[list[Sample]]) -> None:
        self.buffer += samples

    def save(self, rollout_id: Any) -> None:
        self.saved.append(rollout_id)

    def load(self, rollout_id: Any = None) -> None:
        return


SLIME = {"slime.rollout.data_source": {"RolloutDataSourceWithBuffer": RolloutDataSourceWithBuffer}}
MILES = {"miles.rollout.data_source": {"RolloutDataSourceWithBuffer": RolloutDataSourceWithBuffer}}


# prime-rl


class TaskSampler:
    def __iter__(self) -> Any:
        return self


class StandardSampler(TaskSampler):
    def __init__(self, tasks: Any) -> None:
        self.tasks = tasks


class TrainSource:
    """One environment, whose groups have three attempts."""

    def __init__(self, sampler: Any) -> None:
        self.envs = [SimpleNamespace(name="env", config=SimpleNamespace(group_size=3))]
        self.curricula = {"env": SimpleNamespace(sampler=sampler)}

    def next_task(self, *, step: int) -> Any:
        return SimpleNamespace(task=next(self.curricula["env"].sampler), step=step)


def prime_rl() -> dict[str, dict[str, Any]]:
    return {
        "prime_rl.orchestrator.curriculum.samplers": {"TaskSampler": TaskSampler, "StandardSampler": StandardSampler},
        "prime_rl.orchestrator.train_source": {"TrainSource": type("TrainSource", (TrainSource,), {})},
    }


def task(key: str) -> Any:
    return SimpleNamespace(key=key, data=SimpleNamespace(prompt_text=f"Do {key}.", answer=f"{key} done"))


def episode(task: Any, reward: float, *, step: int | None = None, **more: Any) -> Any:
    """One episode with one trace, dispatched at a step of the orchestrator."""
    trace = {"reward": reward, "has_error": False, "agent": SimpleNamespace(trainable=True), "num_turns": 1, **more}
    run = SimpleNamespace(work=SimpleNamespace(step=step))
    return SimpleNamespace(task=task, ok=True, traces=[SimpleNamespace(**trace)], run=run)


# Trinity-RFT


class BaseSelector:
    def __init__(self, data_source: Any, config: Any) -> None:
        self.data_source, self.config = data_source, config


class Registry:
    def __init__(self) -> None:
        self.modules: dict[str, Any] = {}

    def register_module(self, name: str) -> Callable[[Any], Any]:
        return lambda module: self.modules.setdefault(name, module)


def trinity(registry: Registry) -> dict[str, dict[str, Any]]:
    return {
        "trinity.buffer.selector": {"SELECTORS": registry},
        "trinity.buffer.selector.selector": {"BaseSelector": BaseSelector},
    }


# NeMo-RL


class BatchedDataDict(dict[str, Any]):
    @classmethod
    def from_batches(cls, batches: list[dict[str, Any]]) -> BatchedDataDict:
        return cls({key: [item for batch in batches for item in batch[key]] for key in batches[0]})


NEMO_RL = {"nemo_rl.distributed.batched_data_dict": {"BatchedDataDict": BatchedDataDict}}


def nemo_loader(name: str, n: int) -> Any:
    rows = [
        {
            "message_log": [{"role": "user", "content": f"{name} {i}?"}],
            "extra_env_info": {"ground_truth": f"{i}"},
            "task_name": name,
            "idx": i,
        }
        for i in range(n)
    ]
    return SimpleNamespace(dataset=rows, collate_fn=collate)


def rewards_tensor(rewards: list[float]) -> torch.Tensor:
    """Token-level scores whose sums are these rewards, [N, 2]."""
    return torch.tensor([[0.0, reward] for reward in rewards])


# tinker-cookbook


class RLDataset:
    pass


class EnvGroupBuilder:
    pass


TINKER = {"tinker_cookbook.rl.types": {"RLDataset": RLDataset, "EnvGroupBuilder": EnvGroupBuilder}}


# SkyRL


class StatefulDataLoader(DataLoader[Any]):
    """torchdata's, without workers: its state is the sampler's, or the batch sampler's where that has one."""

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = self._stateful().state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._stateful().load_state_dict(state)

    def _stateful(self) -> Any:
        return self.batch_sampler if hasattr(self.batch_sampler, "state_dict") else self.sampler


TORCHDATA = {"torchdata.stateful_dataloader": {"StatefulDataLoader": StatefulDataLoader}}


def _sky_extras(index: int) -> dict[str, Any]:
    """Both names are in use."""
    return {("reward_model", "reward_spec")[index % 2]: {"ground_truth": f"{2 * index}"}}


class SkyDataset:
    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> tuple[Any, Any, dict[str, Any], str]:
        return [{"role": "user", "content": f"What is {index} + {index}?"}], None, _sky_extras(index), str(index)

    def collate_fn(self, rows: list[Any]) -> list[dict[str, Any]]:
        return [dict(zip(("prompt", "env_class", "env_extras", "uid"), row, strict=True)) for row in rows]


# OpenRLHF


class OpenRLHFDataset:
    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> tuple[str, str, str, None]:
        return "default", f"What is {index} + {index}?", str(2 * index), None

    def collate_fn(self, rows: list[Any]) -> tuple[list[Any], ...]:
        return tuple(list(column) for column in zip(*rows, strict=True))


class SamplesGenerator:
    """Attempts at a batch of prompts, and a filter that drops groups whose mean score is 0 or 1."""

    def __init__(self, prompts_dataloader: Any, n_samples: int) -> None:
        self.prompts_dataloader = prompts_dataloader
        self.n_samples = n_samples

    def generate_samples(self, rewards: dict[str, float]) -> list[Any]:
        kept = []
        drawn = iter(self.prompts_dataloader)
        for _ in range(4):
            _, prompts, labels, _ = next(drawn)
            group = [
                self._process_response_into_experience({"prompt": prompts[0], "label": labels[0], **rewards})
                for _ in range(self.n_samples)
            ]
            if 0 < sum(response["scores"] for response in group) < self.n_samples:
                kept += group
        return kept

    def generate_eval_samples(self) -> None:
        self._process_response_into_experience({"prompt": "What is 0 + 0?", "label": "0", "scores": 0.0})

    def _process_response_into_experience(self, response: Any) -> Any:
        return response


def prepare_datasets(strategy: Any, tokenizer: Any) -> Any:
    return DataLoader(strategy.dataset), None, 10


@contextmanager
def traced() -> Iterator[None]:
    """Ray wraps the methods of an actor's class, so that they are functions of another module."""
    yield


class OpenRLHFTrainer:
    """As much of `PPOTrainer` as the adapter touches: it looks its parts up among its module's names."""

    @traced()
    def __init__(self, strategy: Any) -> None:
        self.prompts_dataloader, _, _ = prepare_datasets(strategy, None)
        self.samples_generator = SamplesGenerator(self.prompts_dataloader, strategy.args.rollout.n_samples_per_prompt)


def openrlhf_strategy(*, batch_size: int, n_samples: int) -> Any:
    rollout = SimpleNamespace(batch_size=batch_size, n_samples_per_prompt=n_samples)
    return SimpleNamespace(args=SimpleNamespace(rollout=rollout), dataset=OpenRLHFDataset(10))
