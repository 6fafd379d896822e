"""`data.custom_dataloader=select_prompts.dataloader`: the prompts that the service chooses."""

from __future__ import annotations

import os

from evenodds.integrations.nemo_rl import SelectedDataloader

dataloader = SelectedDataloader(
    {
        "base_url": os.environ.get("EVENODDS_URL", "http://127.0.0.1:8000"),
        "run": "nemo-rl-math",
        "run_settings": {"group_size": 16},  # grpo.num_generations_per_prompt
    },
    n_prompts=32,  # grpo.num_prompts_per_step
)
