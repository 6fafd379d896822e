"""The same model and problems in TRL's own GRPOTrainer, its prompts chosen by the service.

    python -m examples.smollm2.with_trl [--url URL] [--steps 5]

Not named `trl.py`, which would hide TRL from a program beside it.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from examples.grpo_from_scratch.service import running_service
from examples.smollm2.model import ModelMissing, smollm2
from examples.smollm2.task import ANSWER_TOKENS, SHOTS, Problem, is_right, problems
from trl import GRPOConfig, GRPOTrainer

from evenodds import PromptSelector
from evenodds.integrations.trl import GRPOSelection


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # or the service would outlive the training
    try:
        model, tokenizer = smollm2(options.out / "model")
    except ModelMissing as error:
        print(f"with_trl: {error}", file=sys.stderr)
        return 1
    _end_answers_with_their_line(tokenizer)
    pool = problems(n_pool=options.pool, n_held_out=0, n_of_another_kind=0, n_warm_up=0).pool
    config = GRPOConfig(
        output_dir=str(options.out / "trl"),
        use_cpu=not torch.cuda.is_available(),
        bf16=False,
        max_steps=options.steps,
        per_device_train_batch_size=options.group_size,
        gradient_accumulation_steps=options.batch_size,
        num_generations=options.group_size,
        max_completion_length=ANSWER_TOKENS,
        learning_rate=1e-5,
        gradient_checkpointing=False,  # there is memory enough
        shuffle_dataset=False,
        ignore_data_skip=True,
        save_strategy="no",
        logging_steps=1,
        report_to="none",
    )
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="evenodds-demo-llm-")))
        selector = stack.enter_context(
            PromptSelector(
                options.url or stack.enter_context(running_service(folder)),
                options.evenodds_run,
                [{"prompt_id": str(i), "text": each.text, "category": each.kind} for i, each in enumerate(pool)],
                run_settings={"group_size": options.group_size},
                outbox=options.out / "outbox",
            )
        )
        selector.wait_until_ready()
        selection = GRPOSelection(selector, config)
        trainer = GRPOTrainer(
            model,
            args=config,
            processing_class=tokenizer,
            train_dataset=selection.dataset(_rows(pool)),
            reward_funcs=[selection.observed(_answers_rightly)],
            callbacks=[selection.callback()],
        )
        trainer.train()
        selector.flush()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="SmolLM2-135M in TRL's GRPOTrainer, with prompts chosen by Even Odds.")
    parser.add_argument("--url", help="of a service; one of its own by default")
    parser.add_argument("--evenodds-run", default="smollm2-trl")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=8, help="groups of a step")
    parser.add_argument("--group-size", type=int, default=8, help="attempts of a group")
    parser.add_argument("--pool", type=int, default=2_000)
    parser.add_argument(
        "--out", type=Path, default=Path("demo-llm-results"), help="folder for the model, and what is unsent"
    )
    return parser


def _end_answers_with_their_line(tokenizer: Any) -> None:
    """TRL stops at the end-of-text token, pads on the left, and learns from nothing behind that token."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    (line_end,) = tokenizer("\n", add_special_tokens=False)["input_ids"]
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(line_end)


def _rows(pool: Sequence[Problem]) -> list[dict[str, str]]:
    return [
        {"prompt_id": str(i), "prompt": SHOTS + each.text, "question": each.text, "answer": each.answer}
        for i, each in enumerate(pool)
    ]


def _answers_rightly(completions: list[str], question: list[str], answer: list[str], **_: Any) -> list[float]:
    """1 for the right answer alone. TRL has taken off the end of the line, as it does with the end of a text."""
    return [
        float(is_right(Problem(text, "", right), f"{said}\n"))
        for said, text, right in zip(completions, question, answer, strict=True)
    ]


if __name__ == "__main__":
    sys.exit(main())
