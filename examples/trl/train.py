"""GRPO on sums, with the prompts that the service chooses. Any causal language model will do."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from trl import GRPOConfig, GRPOTrainer

from evenodds import PromptSelector
from evenodds.integrations.trl import GRPOSelection, prompts_of

ROWS = [
    {"prompt_id": f"{a}+{b}", "prompt": f"What is {a} + {b}? Answer with the number alone: ", "answer": str(a + b)}
    for a in range(1, 100, 7)
    for b in range(1, 100, 7)
]


def answers_rightly(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """1 for a completion that starts with the answer."""
    return [float(said.strip().startswith(right)) for said, right in zip(completions, answer, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("base_url")
    parser.add_argument("--model", default="Qwen/Qwen2.5-0.5B-Instruct")
    parser.add_argument("--evenodds-run", default="trl-sums")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--output", default="trl-sums")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in the output folder")
    arguments = parser.parse_args()
    config = GRPOConfig(
        output_dir=arguments.output,
        use_cpu=not torch.cuda.is_available(),
        bf16=torch.cuda.is_available(),
        max_steps=arguments.steps,
        per_device_train_batch_size=16,
        gradient_accumulation_steps=2,
        num_generations=8,
        max_completion_length=8,
        shuffle_dataset=False,
        ignore_data_skip=True,
        save_steps=50,
        logging_steps=1,
        report_to="none",
    )
    with PromptSelector(
        arguments.base_url,
        arguments.evenodds_run,
        prompts_of(ROWS),
        run_settings={"group_size": config.num_generations},
    ) as selector:
        selector.wait_until_ready()
        selection = GRPOSelection(selector, config)
        trainer = GRPOTrainer(
            arguments.model,
            args=config,
            train_dataset=selection.dataset(ROWS),
            reward_funcs=[selection.observed(answers_rightly)],
            callbacks=[selection.callback()],
        )
        trainer.train(resume_from_checkpoint=arguments.resume)
        selector.flush()
        print(selector.counts())


if __name__ == "__main__":
    main()
