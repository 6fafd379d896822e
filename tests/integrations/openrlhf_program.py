"""OpenRLHF's own trainer as a Ray actor, its prompt data set, samples generator, filter and checkpoints, with guesses.

    python openrlhf_program.py URL RUN FOLDER STEPS

Its engines need a GPU: `vllm`, `deepspeed` and `flash_attn` are empty here, the attempts come from a Ray actor with the
methods of an engine, and a training step trains nothing. Each group that was made is a line of FOLDER/groups.jsonl.
A second start with more STEPS goes on from the checkpoint.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ray
from left_empty import leave_empty  # type: ignore[import-not-found]  # it lies beside this file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from evenodds.integrations.openrlhf import following, id_of

N_PROMPTS, BATCH_SIZE, N_SAMPLES = 24, 4, 4


class Engine:
    """Guesses: half are right, those at every third prompt all."""

    def get_num_unfinished_requests(self) -> int:
        return 0

    def generate_responses(self, *, prompt: str, label: str, num_samples: int, **_: Any) -> list[dict[str, Any]]:
        won = [float(int(label) % 3 == 0 or random.random() < 0.5) for _ in range(num_samples)]
        return [
            {
                "prompt": prompt,
                "label": label,
                "observation_tokens": [0, 0, 1],
                "action_ranges": [(2, 3)],
                "rollout_log_probs": None,
                "reward": 2 * score - 1,
                "scores": score,
            }
            for score in won
        ]


class Actors:
    """The model's actors: as much of them as keeps the states of checkpoints."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "_actor" / "states.json"

    def async_run_method(self, method_name: str, **options: Any) -> list[Any]:
        if method_name == "save_checkpoint":
            self.file.parent.mkdir(exist_ok=True)
            self.file.write_text(json.dumps(options["client_states"]))
        return [ray.put(json.loads(self.file.read_text()) if method_name == "get_checkpoint_states" else None)]


def strategy_of(folder: Path) -> Any:
    rows = folder / "prompts.jsonl"
    made = [{"input": f"What is {i} + 0?", "label": str(i)} for i in range(N_PROMPTS)]
    rows.write_text("".join(json.dumps(row) + "\n" for row in made))
    data = {
        "prompt_dataset": str(rows),
        "prompt_probs": None,
        "max_samples": 1_000,
        "prompt_split": "train",
        "input_template": None,
        "input_key": "input",
        "label_key": "label",
        "apply_chat_template": False,
        "dataloader_num_workers": 0,
        "disable_fast_tokenizer": False,
    }
    args = SimpleNamespace(
        data=SimpleNamespace(**data),
        eval=SimpleNamespace(steps=-1, dataset=None),
        ckpt=SimpleNamespace(save_steps=1, best_metric_key="none", path=str(folder), load_enable=True),
        train=SimpleNamespace(seed=1, batch_size=BATCH_SIZE * N_SAMPLES, num_episodes=100, max_epochs=1),
        rollout=SimpleNamespace(batch_size=BATCH_SIZE, n_samples_per_prompt=N_SAMPLES, vllm_generate_batch_size=None),
        algo=SimpleNamespace(
            dynamic_filtering_enable=True,
            dynamic_filtering_range=(0.0, 1.0),
            kl=SimpleNamespace(target=None, init_coef=0.0),
            advantage=SimpleNamespace(is_correction_level="off", estimator="rloo"),
        ),
        vllm=SimpleNamespace(enable_sleep=False),
        logger=SimpleNamespace(wandb=SimpleNamespace(key=None), tensorboard_dir=None, logging_steps=1),
    )
    return SimpleNamespace(
        args=args,
        print=lambda *_: None,
        is_rank_0=lambda: False,
        setup_dataloader=lambda dataset, size, _, shuffle, collate, **__: DataLoader(
            dataset, batch_size=size, shuffle=shuffle, collate_fn=collate
        ),
    )


class Enough(Exception):
    """So many steps are made."""


def no_gpu() -> None:
    leave_empty("vllm", "deepspeed", "flash_attn")


def trainer_of(n_steps: int, folder: Path) -> type[Any]:
    from openrlhf.trainer import ppo_trainer

    class Trainer(ppo_trainer.PPOTrainer.__ray_metadata__.modified_class):  # type: ignore[misc]  # not installed here
        def train_step(self, rollout_samples: list[Any], global_step: int) -> tuple[dict[str, Any], int]:
            if global_step == n_steps:
                raise Enough
            assert len(rollout_samples) == BATCH_SIZE * N_SAMPLES
            scores = [sample.scores.item() for sample in rollout_samples]
            for first in range(0, len(scores), N_SAMPLES):
                assert 0 < sum(scores[first : first + N_SAMPLES]) < N_SAMPLES
            return {}, global_step + 1

        def broadcast_to_vllm(self) -> None: ...

        def fit_and_note(self) -> None:
            loader, generator = self.prompts_dataloader, self.samples_generator
            assert loader.connection.selector.wait_until_ready()
            process, attempts = generator._process_response_into_experience, dict[str, list[float]]()

            def noted(response: dict[str, Any], **options: Any) -> Any:
                prompt_id = id_of(response["prompt"], response["label"])
                attempts.setdefault(prompt_id, []).append(response["scores"])
                if len(attempts[prompt_id]) == N_SAMPLES:
                    group = [prompt_id, loader._chosen_at[prompt_id], sum(attempts.pop(prompt_id))]
                    with (folder / "groups.jsonl").open("a") as file:
                        file.write(json.dumps(group) + "\n")
                return process(response, **options)

            generator._process_response_into_experience = noted
            try:
                self.fit()
            except Enough:
                assert loader.connection.selector.flush()

    return Trainer


def main(url: str, run: str, folder: Path, n_steps: int) -> None:
    no_gpu()
    words = Tokenizer(models.WordLevel({"<unk>": 0, "<eos>": 1}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<eos>").save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    settings = {"base_url": url, "run": run, "deadline_seconds": 60, "outbox": str(folder / "outbox")}
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        logging_level="error",
        runtime_env={
            "worker_process_setup_hook": no_gpu,
            "env_vars": {"PYTHONPATH": str(Path(__file__).parent)},  # where `left_empty` lies
        },
    )
    engine = ray.remote(Engine).remote()
    trainer = ray.remote(following(trainer_of(n_steps, folder), settings)).remote(
        str(folder), strategy_of(folder), Actors(folder), None, None, None, [engine]
    )
    ray.get(trainer.fit_and_note.remote())


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))
