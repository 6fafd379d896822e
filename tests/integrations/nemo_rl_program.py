"""Steps of NeMo-RL's own data loaders, collation and rollouts, from a checkout, with guesses for its engines.

No registry has NeMo-RL, so this is run by hand, beside a service, with the packages that its rollouts import (Python
3.12, `transformers<5.12`, `datasets hydra-core ray torch torchdata wandb`, and what an ImportError still names):

    PYTHONPATH=CHECKOUT python tests/integrations/nemo_rl_program.py http://127.0.0.1:8000 RUN FOLDER

Three steps over two data sets, with the line that the example's README adds to `grpo.py`; then the state that was kept
after the second is loaded anew, and the third is made again. It ends with an error where the service has observed
anything else than what was attempted.
"""

from __future__ import annotations

import random
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import ray
import torch
from by_hand import observed  # type: ignore[import-not-found]  # it lies beside this file
from nemo_rl.data.collate_fn import rl_collate_fn
from nemo_rl.data.dataloader import MultipleDataloaderWrapper
from nemo_rl.data.datasets.processed_dataset import AllTaskProcessedDataset
from nemo_rl.data.interfaces import TaskDataSpec
from nemo_rl.data.processors import math_data_processor
from nemo_rl.distributed.batched_data_dict import BatchedDataDict
from nemo_rl.environments.interfaces import EnvironmentReturn
from nemo_rl.experience.rollouts import run_multi_turn_rollout
from tokenizers import Tokenizer, models, pre_tokenizers
from torchdata.stateful_dataloader import StatefulDataLoader
from transformers import PreTrainedTokenizerFast

from evenodds import Client
from evenodds.integrations.nemo_rl import ID, STEP, SelectedDataloader

N_PROMPTS, BATCH_SIZE, GROUP_SIZE = 12, 4, 4
TASKS = ("sums", "products")
dataloader: SelectedDataloader
"""What NeMo-RL finds under the name of this file."""


class Guess:
    """In the place of NeMo-RL's engines: one token, "right" or "wrong"."""

    cfg: dict[str, Any] = {}  # noqa: RUF012  # as NeMo-RL reads it

    def __init__(self, tokenizer: Any) -> None:
        self._words = tokenizer.convert_tokens_to_ids(["right", "wrong"])

    def generate(self, data: Any, *, greedy: bool) -> BatchedDataDict[Any]:
        given, lengths = data["input_ids"], data["input_lengths"]
        output = torch.cat([given, torch.zeros(len(given), 1, dtype=given.dtype)], dim=1)
        for row, length in enumerate(lengths.tolist()):
            output[row, length] = random.choice(self._words)
        return BatchedDataDict(
            output_ids=output,
            generation_lengths=torch.ones_like(lengths),
            unpadded_sequence_lengths=lengths + 1,
            logprobs=torch.zeros(output.shape),
        )


@ray.remote
class Judge:
    """An environment that asks once: what was said last decides, and at every third prompt all are right."""

    def step(self, message_logs: list[Any], metadata: list[Any]) -> EnvironmentReturn:
        rewards = [
            float(int(about["ground_truth"]) % 3 == 0 or log[-1]["content"].strip() == "right")
            for log, about in zip(message_logs, metadata, strict=True)
        ]
        n = len(rewards)
        said = [{"role": "environment", "content": "done"} for _ in rewards]
        return EnvironmentReturn(said, metadata, [None] * n, torch.tensor(rewards), torch.ones(n), [None] * n)


def tokenizer_of() -> Any:
    words = {"<unk>": 0, "<eos>": 1, "right": 2, "wrong": 3}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", eos_token="<eos>", pad_token="<eos>")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return tokenizer


def loaders_of(tokenizer: Any) -> dict[str, StatefulDataLoader]:
    loaders = {}
    for task in TASKS:
        rows = [
            {"problem": f"What is {i} {task} 0?", "expected_answer": str(i), "task_name": task}
            for i in range(N_PROMPTS)
        ]
        of_task = {task: (TaskDataSpec(task_name=task), math_data_processor)}
        dataset = AllTaskProcessedDataset(rows, tokenizer, TaskDataSpec(task_name=task), of_task, max_seq_length=64)
        loaders[task] = StatefulDataLoader(dataset, batch_size=BATCH_SIZE, shuffle=True, collate_fn=rl_collate_fn)
    return loaders


class Training:
    def __init__(self, settings: dict[str, Any]) -> None:
        global dataloader
        dataloader = SelectedDataloader(settings, n_prompts=BATCH_SIZE)
        self.tokenizer = tokenizer_of()
        data = {"custom_dataloader": f"{Path(__file__).stem}.dataloader"}
        self.batches = MultipleDataloaderWrapper(BATCH_SIZE, data, loaders_of(self.tokenizer))
        self.judges = {task: Judge.remote() for task in TASKS}  # type: ignore[attr-defined]
        self.attempts: dict[tuple[str, int], list[float]] = defaultdict(list)

    def step(self) -> None:
        """As much of a step of `grpo_train` as the adapter sees."""
        repeated = next(self.batches).repeat_interleave(GROUP_SIZE)
        policy = Guess(self.tokenizer)
        repeated, _ = run_multi_turn_rollout(policy, repeated, self.tokenizer, self.judges, 64, max_rollout_turns=1)
        dataloader.observe(repeated, repeated["total_reward"].tolist())
        for prompt_id, step, reward in zip(repeated[ID], repeated[STEP], repeated["total_reward"], strict=True):
            self.attempts[prompt_id, int(step)].append(float(reward))


def main(url: str, run: str, folder: Path) -> None:
    sys.modules[Path(__file__).stem] = sys.modules["__main__"]
    folder.mkdir(parents=True, exist_ok=True)
    ray.init(num_cpus=2, include_dashboard=False, logging_level="error")
    settings = {"base_url": url, "run": run, "deadline_seconds": 60, "outbox": str(folder / "outbox")}
    settings["run_settings"] = {"group_size": GROUP_SIZE}

    first = Training(settings)
    for _ in range(2):
        first.step()
    state, kept = dataloader.state_dict(), dict(first.attempts)
    first.step()
    assert dataloader._connection is not None
    assert dataloader._connection.selector.flush()
    dataloader._connection.selector.close()
    second = Training(settings)
    dataloader.load_state_dict(state, second.batches.dataloaders)
    second.step()
    assert dataloader._connection is not None
    assert dataloader._connection.selector.flush()

    with Client(url) as client:
        seen = observed(client, run)
        categories = {prompt.category for prompt in client.prompts(run)}
    made = sorted((*key, sum(rewards), len(rewards)) for key, rewards in (kept | second.attempts).items())
    assert seen == made, f"{seen} is not {made}"
    assert categories == set(TASKS)
    assert {n for *_, n in made} == {GROUP_SIZE}
    sys.stdout.write(f"right: {len(seen)} groups\n")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
