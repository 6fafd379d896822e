"""A training of verl 0.7.1 as installed, but for its model: its configuration, dataset, data loader and batches.

`python verl_program.py URL RUN FOLDER FIRST END` trains at the steps from FIRST to before END. FOLDER keeps the data,
the outbox, and the data loader's checkpoint of each step, from which a later FIRST goes on. Prints a prompt, its step
and its right answers on each line.
"""

from __future__ import annotations

import itertools
import random
import sys
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from hydra import compose, initialize_config_module
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from verl import DataProto
from verl.trainer.ppo.ray_trainer import RayPPOTrainer

N_PROMPTS, BATCH_SIZE, N_ATTEMPTS = 24, 4, 4


def tokenizer() -> PreTrainedTokenizerFast:
    """Words are tokens. Its template is a chat's content."""
    words = Tokenizer(models.WordLevel({"<unk>": 0, "<eos>": 1}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<eos>", pad_token="<eos>")
    made.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return made


def data(folder: Path) -> Path:
    """A data set as verl's own preparation scripts write it."""
    rows = [
        {
            "data_source": "sums",
            "prompt": [{"role": "user", "content": f"What is {i} + {i}?"}],
            "reward_model": {"style": "rule", "ground_truth": str(2 * i)},
            "extra_info": {"index": i, "split": "train"},
        }
        for i in range(N_PROMPTS)
    ]
    path = folder / "train.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def trainer(folder: Path, url: str, run: str) -> Any:
    """verl's own trainer with all that the data need: its workers, which hold the model, are never started."""
    path = data(folder)
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose(
            "ppo_trainer",
            [
                f"data.train_files={path}",
                f"data.val_files={path}",
                f"data.train_batch_size={BATCH_SIZE}",
                "data.dataloader_num_workers=0",
                "data.sampler.class_path=pkg://evenodds.integrations.verl",
                "data.sampler.class_name=EvenOddsSampler",
                f"+data.evenodds.base_url={url}",
                f"+data.evenodds.run={run}",
                f"+data.evenodds.outbox={folder / 'outbox'}",
                "+data.evenodds.deadline_seconds=60",
                "+data.evenodds.reward_key=acc",
                f"+data.evenodds.run_settings.group_size={N_ATTEMPTS}",
                f"actor_rollout_ref.rollout.n={N_ATTEMPTS}",
                f"+data.cache_dir={folder / 'cache'}",
            ],
        )
    made = object.__new__(RayPPOTrainer)
    made.config, made.tokenizer, made.processor = config, tokenizer(), None
    made._create_dataloader(None, None, None, None)
    return made


def train(made: Any, folder: Path, steps: range) -> None:
    """As `RayPPOTrainer.fit` goes through its batches, with guesses in place of a model's answers."""
    loader = made.train_dataloader
    if steps.start > 1:
        loader.load_state_dict(torch.load(folder / f"data-{steps.start - 1}.pt", weights_only=False))
    epochs = itertools.chain.from_iterable(itertools.repeat(loader))
    for step, columns in zip(steps, epochs, strict=False):
        batch = DataProto.from_single_dict(columns)
        batch.non_tensor_batch["uid"] = np.array([str(uuid.uuid4()) for _ in range(len(batch))], dtype=object)
        batch = batch.repeat(repeat_times=made.config.actor_rollout_ref.rollout.n, interleave=True)
        correct = [float(random.random() < 0.5) for _ in range(len(batch))]
        batch.batch["token_level_scores"] = torch.tensor([[0.0, right - 0.5] for right in correct])  # a penalty in it
        batch.non_tensor_batch["acc"] = np.array(correct, dtype=object)
        loader.sampler.update(batch=batch)
        torch.save(loader.state_dict(), folder / f"data-{step}.pt")
        ids = [f"{extra['index']}" for extra in batch.non_tensor_batch["extra_info"]]
        for prompt in dict.fromkeys(ids):
            right = sum(r for i, r in zip(ids, correct, strict=True) if i == prompt)
            sys.stdout.write(f"trained {prompt} {step} {right}\n")


if __name__ == "__main__":
    url, run, folder, first, end = sys.argv[1:]
    running = trainer(Path(folder), url, run)
    train(running, Path(folder), range(int(first), int(end)))
    assert running.train_dataloader.sampler._connection.selector.flush()
