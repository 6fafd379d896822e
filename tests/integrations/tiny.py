"""The smallest training of TRL that is one: a model of some thousand weights that learns to say digits.

As a program it is one rank of a training: `python tiny.py URL RUN FOLDER`, with options as JSON in TINY_TRAINING.
"""

from __future__ import annotations

import json
import os
import string
import sys
import time
from pathlib import Path
from typing import Any

ROWS = [
    {"prompt_id": f"digit-{i}-{n}", "prompt": f"{i}" * n + "=", "digit": str(i)} for i in range(8) for n in (1, 2, 3)
]
PROMPTS = [{"prompt_id": row["prompt_id"], "text": row["prompt"]} for row in ROWS]


def config(folder: Path, **options: Any) -> Any:
    from trl import GRPOConfig

    return GRPOConfig(
        **{
            "output_dir": str(folder / "trained"),
            "use_cpu": True,
            "bf16": False,
            "report_to": "none",
            "max_steps": 4,
            "per_device_train_batch_size": 8,
            "gradient_accumulation_steps": 2,
            "num_generations": 4,
            "max_completion_length": 6,
            "shuffle_dataset": False,
            "ignore_data_skip": True,
            "logging_steps": 1,
            "disable_tqdm": True,
            "save_strategy": "no",
            "learning_rate": 1e-3,
            **options,
        }
    )


def tiny_model(characters: str = "=" + string.digits, *, hidden_size: int = 16) -> tuple[Any, Any]:
    """A causal transformer of some thousand weights, of SmolLM2's class, and a tokenizer of single characters."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", "<unk>", *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(vocabulary),
            hidden_size=hidden_size,
            intermediate_size=2 * hidden_size,
            num_hidden_layers=1,
            num_attention_heads=hidden_size // 8,
            num_key_value_heads=2,
            max_position_embeddings=96,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=None,
        )
    )
    return model, PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def says_the_digit(prompts: list[str], completions: list[str], digit: list[str], **_: Any) -> list[float]:
    """1 for a completion that says the prompt's digit."""
    return [float(wanted in completion) for wanted, completion in zip(digit, completions, strict=True)]


def main(base_url: str, run: str, folder: Path) -> None:
    """Train, and write into `folder` what this rank has rewarded: [step, prompt id, reward] for each attempt."""
    from tests.waiting import PATIENCE_SECONDS
    from trl import GRPOTrainer

    from evenodds import PromptSelector
    from evenodds.integrations.trl import GRPOSelection

    given = json.loads(os.environ["TINY_TRAINING"])
    arguments = config(folder, **given["config"])
    rank = arguments.process_index
    rewarded: list[tuple[int, str, float]] = []

    def reward(prompts: list[str], completions: list[str], prompt_id: list[str], **columns: Any) -> list[float]:
        step = columns["trainer_state"].global_step
        if step in given["halts"]:
            (folder / f"reached-{step}-{rank}").touch()
            while not (folder / f"go-on-{step}").exists():
                time.sleep(0.02)
        rewards = says_the_digit(prompts, completions, **columns)
        rewarded.extend((step, i, r) for i, r in zip(prompt_id, rewards, strict=True))
        return rewards

    model, tokenizer = tiny_model()
    outbox = folder / f"outbox-{rank}" if given["outboxes"] else folder / "outbox"
    with PromptSelector(
        base_url,
        run,
        PROMPTS,
        run_settings={"embedder": "none", "group_size": arguments.num_generations},
        outbox=outbox,
        deadline_seconds=given["deadline_seconds"],
    ) as selector:
        selector.wait_until_ready()
        selection = GRPOSelection(selector, arguments)
        trainer = GRPOTrainer(
            model,
            args=arguments,
            processing_class=tokenizer,
            train_dataset=selection.dataset(ROWS),
            reward_funcs=[selection.observed(reward)],
            callbacks=[selection.callback()],
        )
        trainer.train(resume_from_checkpoint=given["resume"])
        assert selector.flush(PATIENCE_SECONDS)
        (folder / f"{given['name']}-{rank}.json").write_text(json.dumps(rewarded))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
