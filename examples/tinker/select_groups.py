"""tinker-cookbook: the training dataset of a recipe, with the groups that the service chooses."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from evenodds.integrations.tinker import SelectedDataset


def training_dataset(builders: Mapping[str, Any], texts: Mapping[str, str], *, group_size: int) -> SelectedDataset:
    """What the recipe's `RLDatasetBuilder` returns first: builders and texts by prompt id."""
    settings = {
        "base_url": os.environ.get("EVENODDS_URL", "http://127.0.0.1:8000"),
        "run": "tinker-math",
        "reward_key": "correct",
    }
    return SelectedDataset(builders, settings, batch_size=64, n_batches=500, texts=texts, group_size=group_size)
