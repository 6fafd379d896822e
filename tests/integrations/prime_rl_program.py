"""Steps of prime-rl's own train source, curriculum, train sink and checkpoints, from a checkout, with guessed episodes.

No registry has prime-rl, and it wants Python 3.12, so this is run by hand, beside a service, with a checkout of
`verifiers` and the packages that the orchestrator imports (`pip install CHECKOUT-OF-VERIFIERS renderers
prime-pydantic-config torch wandb loguru`, and what an ImportError still names):

    PYTHONPATH=CHECKOUT/src:CHECKOUT/packages/prime-rl-configs/src python tests/integrations/prime_rl_program.py \\
        http://127.0.0.1:8000 RUN FOLDER

Two environments, four steps with groups that end in another order, fail in part, or are dropped as stale; then the
state that was saved after the second is loaded anew, and the others are made again. It ends with an error where the
service has observed anything else than what the sink has shown. Groups that were under way at the checkpoint and ended
before the training went back may count: the policy that made them is hardly newer than that of the checkpoint.
"""

from __future__ import annotations

import asyncio
import random
import sys
import uuid
from collections import deque
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import verifiers.v1 as vf
from by_hand import observed  # type: ignore[import-not-found]  # it lies beside this file
from prime_rl.configs.algorithm import GRPOAlgoConfig
from prime_rl.configs.orchestrator import CheckpointConfig, TrainSourceConfig
from prime_rl.orchestrator.ckpt import CheckpointManager
from prime_rl.orchestrator.envs import TrainEnvs
from prime_rl.orchestrator.train_sink import TrainSink
from prime_rl.orchestrator.train_source import TrainSource
from prime_rl.orchestrator.types import GroupCancellation, Progress

from evenodds import Client
from evenodds.integrations import prime_rl

N_TASKS, BATCH_SIZE, GROUP_SIZE, UNDER_WAY = 24, 4, 4, 6
ENVIRONMENTS = ("sums", "products")


class Data(vf.TaskData):  # type: ignore[misc]  # not installed where this is checked
    answer: str


class Task(vf.Task[Data, Any, Any]):  # type: ignore[misc]
    @property
    def key(self) -> str:
        return f"q{self.data.idx}"


class Sums(vf.Taskset[Task, vf.TasksetConfig]):  # type: ignore[misc]
    def load(self) -> list[Task]:
        return [Task(Data(idx=i, prompt=f"What is {i} + 0?", answer=str(i))) for i in range(N_TASKS)]


__all__ = ["Sums"]
"""What prime-rl finds under the name of this file."""


def environments() -> TrainEnvs:
    env = {"taskset": {"id": Path(__file__).stem}}
    configs = [
        TrainSourceConfig(name=name, env=env, group_size=GROUP_SIZE, algo=GRPOAlgoConfig()) for name in ENVIRONMENTS
    ]
    envs = TrainEnvs(configs, {("train", name): "unused" for name in ENVIRONMENTS}, policy_pool=None)
    for env in envs:  # as `start` does once the server of the environment answers
        tasks = list(vf.load_taskset(env.config.env.taskset))
        env.tasks, env.num_tasks = iter(tasks), len(tasks)
    return envs


class Orchestration:
    """What prime-rl's orchestrator does between two steps, with a guess in the place of the environments' servers."""

    def __init__(self, folder: Path) -> None:
        self.envs = environments()
        self.source = TrainSource(self.envs)
        self.progress = Progress()
        config = SimpleNamespace(max_off_policy_steps=8, train=SimpleNamespace(filter_zero_advantages=True))
        self.sink = TrainSink(
            config,
            tokenizer=None,
            train_envs=self.envs,
            mm_token_type_ids_mapping=None,
            progress=self.progress,
            batch_size=BATCH_SIZE * GROUP_SIZE,
            token_batch_size=None,
            on_result=self.source.on_result,
        )
        self.checkpoints = CheckpointManager(folder, CheckpointConfig())
        self.under_way: deque[Any] = deque()
        self.shown: dict[tuple[str, str, int], tuple[float, int]] = {}

    @property
    def samplers(self) -> dict[str, prime_rl.EvenOddsSampler]:
        return {name: curriculum.sampler for name, curriculum in self.source.curricula.items()}

    async def step(self) -> None:
        """Groups until the sink has a batch."""
        while True:
            while len(self.under_way) < UNDER_WAY:
                request = self.source.next_task(step=self.progress.step)
                sampler = self.samplers[request.env_name]
                self.under_way.append((request, sampler._step_of[request.task.key]))
            self.under_way.rotate(random.randrange(UNDER_WAY))
            if await self.finished(*self.under_way.popleft()) is not None:
                break
        self.progress.step += 1

    async def finished(self, request: Any, chosen_at: int) -> Any:
        """A group: half of the attempts are right, at every third task all. Some fail, some groups are stale."""
        group, number = str(uuid.uuid4()), request.task.data.idx
        if number % 7 == 3:
            marker = GroupCancellation("train", request.env_name, group, GROUP_SIZE, "stale")
            return await self.sink.cancel(marker)
        batch, rewards = None, []
        for attempt in range(GROUP_SIZE):
            fails = number % 5 == 0 and attempt == 0
            reward = float(number % 3 == 0 or random.random() < 0.5)
            if not fails:
                rewards.append(reward)
            if attempt == GROUP_SIZE - 1 and rewards:  # before the sink shows the group
                self.shown[request.env_name, request.task.key, chosen_at] = (sum(rewards), len(rewards))
            batch = await self.sink.add(self.episode(request, group, 0.0 if fails else reward, ok=not fails)) or batch
        return batch

    def episode(self, request: Any, group: str, reward: float, *, ok: bool) -> vf.Episode:
        answer = vf.MessageNode(
            message=vf.AssistantMessage(content="3"),
            token_ids=[1, 2],
            mask=[True, True],
            logprobs=[0.0, 0.0],
            sampled=True,
        )
        task = request.task
        trace = vf.Trace(
            task=vf.TraceTask(type="Task", data=task.data, key=task.key, hash=task.hash),
            agent=vf.AgentInfo(config=vf.AgentConfig()),
            nodes=[answer],
            rewards={"reward": vf.Reward(score=reward)},
            ok=ok,
            errors=[] if ok else [vf.Error(type="ProviderError", message="the engine is gone")],
        )
        policy = vf.PolicySpan(start=self.progress.step - 1, end=self.progress.step - 1)
        return vf.Episode(
            env=vf.EnvInfo(id=request.env_name, name=request.env_name),
            task=trace.task,
            group=vf.GroupInfo(id=group),
            run=vf.TrainRunInfo(id="run", work=vf.TrainWorkInfo(step=request.step, policy=policy)),
            ok=ok,
            errors=trace.errors,
            traces=[trace],
        )


def install(url: str, run: str, folder: Path) -> None:
    settings = {"base_url": url, "run": run, "deadline_seconds": 60, "outbox": str(folder / "outbox")}
    prime_rl.install(settings, batch_size=BATCH_SIZE)


def main(url: str, run: str, folder: Path) -> None:
    sys.modules[Path(__file__).stem] = sys.modules["__main__"]
    folder.mkdir(parents=True, exist_ok=True)
    install(url, run, folder)
    first = Orchestration(folder)
    for sampler in first.samplers.values():
        assert sampler._connection.selector.wait_until_ready()
    for step in range(4):
        asyncio.run(first.step())
        if step == 1:
            first.checkpoints.save(first.progress, first.source, 2)
            kept = dict(first.shown)
            newest = {name: sampler._connection.next_step - 1 for name, sampler in first.samplers.items()}
    for sampler in first.samplers.values():
        assert sampler._connection.selector.flush()
        sampler._connection.selector.close()

    install(url, run, folder)
    second = Orchestration(folder)
    second.checkpoints.load(second.progress, second.source, 2)
    assert second.progress.step == 3
    second.shown.update(kept)
    for _ in range(2):
        asyncio.run(second.step())
    assert second.source.metrics()
    for sampler in second.samplers.values():
        assert sampler._connection.selector.flush()

    with Client(url) as client:
        runs = {ENVIRONMENTS[0]: run, ENVIRONMENTS[1]: f"{run}-2"}
        seen = [(name, *group) for name, its_run in runs.items() for group in observed(client, its_run)]
        assert {client.run(its_run).group_size for its_run in runs.values()} == {GROUP_SIZE}
    made = {(*key, *outcome) for key, outcome in second.shown.items()}
    late = {(*key, *outcome) for key, outcome in first.shown.items() if key not in kept and key[2] <= newest[key[0]]}
    assert made <= set(seen) <= made | late, f"{seen} is not {sorted(made)} and of {sorted(late)}"
    assert len(set(seen)) == len(seen)
    sys.stdout.write(f"right: {len(seen)} groups of {len(runs)} environments\n")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
