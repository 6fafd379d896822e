"""A training of SkyRL's trainer as installed, but for its model: its configuration, dataset, loop and checkpoints.

`python skyrl_program.py URL RUN FOLDER [SETTING...]` trains as SkyRL's settings say, over its own `train`. FOLDER keeps
the data, the outbox, SkyRL's checkpoints and, in `groups.jsonl`, what a guess at each prompt gained. With FILL batches
are filled.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
import typing
from pathlib import Path
from typing import Any

import typing_extensions

typing.TypedDict = typing_extensions.TypedDict  # SkyRL's own fails before Python 3.12

from skyrl.train.config import SkyRLTrainConfig  # noqa: E402
from skyrl.train.dataset import PromptDataset  # noqa: E402
from skyrl.train.generators.base import GeneratorInterface  # noqa: E402
from skyrl.train.trainer import RayPPOTrainer  # noqa: E402
from skyrl.train.utils.tracking import Tracking  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import PreTrainedTokenizerFast  # noqa: E402

from evenodds.integrations.skyrl import following  # noqa: E402

N_PROMPTS, BATCH_SIZE, N_ATTEMPTS = 48, 4, 4


class Guess(GeneratorInterface):  # type: ignore[misc]  # not installed where this is checked
    """In the place of a model: half of its answers are right; every fourth prompt is always answered right.

    An attempt has two turns, of which only the last is rewarded, with `generator.step_wise_trajectories`.
    """

    def __init__(self, folder: Path, n_turns: int) -> None:
        self._folder, self._n_turns = folder, n_turns

    async def generate(self, input_batch: Any) -> Any:
        attempts = input_batch["trajectory_ids"]
        correct = [float(random.random() < 0.5 or int(extra["index"]) % 4 == 0) for extra in input_batch["env_extras"]]
        with (self._folder / "groups.jsonl").open("a") as file:
            for n in range(0, len(attempts), N_ATTEMPTS):
                index = input_batch["env_extras"][n]["index"]
                step = input_batch["batch_metadata"].global_step
                file.write(json.dumps([index, step, sum(correct[n : n + N_ATTEMPTS])]) + "\n")
        turns = [(n, turn) for n in range(len(attempts)) for turn in range(self._n_turns)]
        is_last = [turn == self._n_turns - 1 for _, turn in turns]
        output: dict[str, Any] = {
            "prompt_token_ids": [[1, 2] for _ in turns],
            "response_ids": [[3, 4] for _ in turns],
            "rewards": [correct[n] if last else 0.0 for (n, _), last in zip(turns, is_last, strict=True)],
            "loss_masks": [[1, 1] for _ in turns],
            "stop_reasons": ["stop" for _ in turns],
            "rollout_metrics": {},
            "rollout_logprobs": [[-1.0, -1.0] for _ in turns],
        }
        if self._n_turns > 1:
            output |= {"trajectory_ids": [attempts[n] for n, _ in turns], "is_last_step": is_last}
            output["rewards"] = [[0.0, reward] for reward in output["rewards"]]
        return output


class NoModel:
    """In the place of the workers that hold the model: nothing is to be done."""

    async def save_weights_for_sampler(self) -> None: ...

    def get_lcm_dp_size(self) -> int:
        return 1

    def get_node_ids(self) -> list[str]:
        return []

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


class Trainer(RayPPOTrainer):  # type: ignore[misc]
    """SkyRL's, without what asks a model."""

    def init_weight_sync_state(self) -> None:
        self.dispatch = NoModel()

    def fwd_logprobs_values_reward(self, training_input: Any) -> Any:
        training_input["values"] = None
        return training_input

    def train_critic_and_policy(self, data: Any) -> dict[str, float]:
        return {}


def data(folder: Path) -> Path:
    path = folder / "train.jsonl"
    rows = [
        {
            "prompt": [{"role": "user", "content": f"What is {i} + {i} ?"}],
            "env_class": "sums",
            "reward_spec": {"method": "rule", "ground_truth": str(2 * i)},
            "index": f"{i}",
        }
        for i in range(N_PROMPTS)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def tokenizer() -> Any:
    words = Tokenizer(models.WordLevel({"<unk>": 0, "<eos>": 1}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<eos>", pad_token="<eos>")
    made.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return made


def main(url: str, run: str, folder: Path, settings: list[str]) -> None:
    config = SkyRLTrainConfig.from_cli_overrides(
        [
            f"trainer.train_batch_size={BATCH_SIZE}",
            f"trainer.policy_mini_batch_size={BATCH_SIZE}",
            f"trainer.ckpt_path={folder / 'checkpoints'}",
            "trainer.ckpt_interval=1",
            "trainer.eval_interval=-1",
            "trainer.epochs=9",
            "trainer.placement.colocate_all=false",
            "trainer.enable_ray_gpu_monitor=false",
            "generator.inference_engine.enable_ray_prometheus_stats=false",
            "trainer.algorithm.advantage_estimator=grpo",
            f"generator.n_samples_per_prompt={N_ATTEMPTS}",
            "data.dataloader.num_workers=0",
            *settings,
        ]
    )
    words = tokenizer()
    selection = {
        "base_url": url,
        "run": run,
        "id_key": "index",
        "outbox": str(folder / "outbox"),
        "deadline_seconds": 60,
        "fill": "FILL" in os.environ,
    }
    trainer = following(Trainer, selection)(
        cfg=config,
        tracker=Tracking("evenodds", run, "console"),
        tokenizer=words,
        train_dataset=PromptDataset(str(data(folder)), words, 512, num_workers=1),
        inference_engine_client=None,
        generator=Guess(folder, 2 if config.generator.step_wise_trajectories else 1),
    )
    assert trainer._evenodds.selector.wait_until_ready()
    asyncio.run(trainer.train())
    assert trainer._evenodds.selector.flush()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), sys.argv[4:])
