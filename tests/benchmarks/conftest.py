from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))  # benchmarks is a folder of scripts, not an installed package

from benchmarks.worlds import World

from evenodds import PromptIn
from evenodds_service.commands.replay.driving import Plan
from evenodds_service.commands.replay.recordings import Recording
from evenodds_service.model.ngrams import ngram_matrix
from evenodds_service.model.surface import surface_features

N, VISITS, G = 60, 9, 8


@pytest.fixture(scope="session")
def world() -> World:
    """Sixty prompts: the first third is never solved, the last always, and those between half of the time."""
    texts = tuple(f"{'add' if i % 2 else 'divide'} {i} and {i * i}" for i in range(N))
    successes = np.tile(np.repeat([0, 4, 8], N // 3), (VISITS, 1))
    recording = Recording(
        name="made",
        kind="run",
        prompts=tuple(PromptIn(prompt_id=f"p{i}", text=text, category=f"g{i % 5}") for i, text in enumerate(texts)),
        left_out=0,
        successes_V_N=successes,
        attempts_V_N=np.full_like(successes, G),
        stages=tuple(f"visit {i}" for i in range(VISITS)),
    )
    embeddings = np.random.default_rng(0).normal(size=(N, 4)).astype(np.float32)
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    return World(recording, texts, surface_features(texts), embeddings, ngram_matrix(texts))


@pytest.fixture(scope="session")
def plan(world: World) -> Plan:
    return Plan(world.recording, VISITS, 12, 12, 0, G, repeats=True)
