"""A loop with a DataLoader, checkpoints and resumption. The "model" solves small sums more often than large ones."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from evenodds import PromptSelector
from evenodds.integrations.torch import PromptSampler, ranks

ROWS: Any = [
    {"prompt_id": f"{a}+{b}", "text": f"What is {a} + {b}?", "sum": a + b} for a in range(40) for b in range(40)
]
BATCH_SIZE, GROUP_SIZE, N_STEPS = 32, 8, 20


def main(base_url: str, checkpoint: str = "checkpoint.pt") -> None:
    selector = PromptSelector(
        base_url,
        "torch-sums",
        [{"prompt_id": row["prompt_id"], "text": row["text"]} for row in ROWS],
        run_settings={"group_size": GROUP_SIZE},
        **ranks(),
    )
    selector.wait_until_ready()
    sampler = PromptSampler(selector, BATCH_SIZE, n_steps=N_STEPS)
    if Path(checkpoint).is_file():
        sampler.load_state_dict(torch.load(checkpoint))
    loader: DataLoader[list[dict[str, Any]]] = DataLoader(ROWS, batch_size=BATCH_SIZE, sampler=sampler, collate_fn=list)
    for rows in loader:
        step = sampler.newest_step
        rewards = {
            row["prompt_id"]: [float(random.random() > row["sum"] / 80) for _ in range(GROUP_SIZE)] for row in rows
        }
        selector.observe(step, rewards)
        # A dictionary of floats: wandb.log(figures, step=step), mlflow.log_metrics(figures, step=step), or, for
        # TensorBoard, writer.add_scalar(name, value, step) for each of figures.items().
        figures = selector.metrics()
        print(f"step {step}: informative {figures['evenodds/informative_share']:.2f}")
        if step % 5 == 4:
            torch.save(sampler.state_dict(), checkpoint)
    selector.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
