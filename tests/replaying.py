"""A recorded log, and what a process answers while it folds it: the other half of `test_kernels`.

python -m tests.replaying LOG     prints a line of JSON for each answer: what it is, and a hash of its bits
"""

from __future__ import annotations

import hashlib
import json
import pickle
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from evenodds_service.domain.distributions import informative_moments
from evenodds_service.domain.learning.checkpoint import to_bytes
from evenodds_service.domain.learning.features import Pool
from evenodds_service.domain.learning.fold import fold
from evenodds_service.domain.log_entries import Entry, ObserveEntry, PoolEntry, SelectEntry, SnapshotEntry
from evenodds_service.domain.prompts import KnownRate, NamedRates, RawBlock
from evenodds_service.domain.selection.selection import Chosen, SelectionRequest
from evenodds_service.domain.settings import RunSettings
from evenodds_service.model.embedder import BUILTIN_NAME, open_embedder
from evenodds_service.model.snapshot import SharedModel
from evenodds_service.model.surface import SURFACE_NAMES, surface_features
from evenodds_service.runtime.live_run import LiveRun

GROUP_SIZE, BATCH_SIZE = 8, 32
SETTINGS = RunSettings(
    group_size=GROUP_SIZE, control_share=0.1, reprobe_share=0.05, groups={"g1": 0.25}, groups_at_most={"g2": 0.5}
)
LOADED = (200, 800)
"""The pool grows fourfold, so that its basis is derived anew and the regressions are carried over."""

_NEW = ("What is 17 + 25?", "Prove that there are infinitely many primes of the form 4k + 3.", "")
_WORDS = ("find", "the", "number", "of", "triangles", "integers", "such that", "angle", "prime", "$x^2$", "divisible")
_EMBEDDER = open_embedder("builtin")


@dataclass
class Log:
    """Texts and groups of the pool, its entries in order, and the bytes of its snapshots."""

    texts: list[str]
    entries: list[Entry] = field(default_factory=list)
    snapshots: dict[int, bytes] = field(default_factory=dict)


def made_texts(n: int) -> list[str]:
    chance = random.Random(0)
    return [
        " ".join(chance.choice((*_WORDS, str(chance.randint(1, 999)))) for _ in range(chance.randint(5, 60))) + "?"
        for _ in range(n)
    ]


def block(texts: Sequence[str], first: int, last: int) -> RawBlock:
    """The features of these prompts, from their texts, in the precision in which the store keeps them."""
    some, n = texts[first:last], last - first
    rates = np.full(n, np.nan, dtype=np.float32)
    rates[::3] = np.linspace(0.05, 0.95, len(rates[::3]))
    return RawBlock(
        first=first,
        prompt_ids=tuple(f"p{i}" for i in range(first, last)),
        groups=tuple(f"g{i % 5}" for i in range(first, last)),
        numeric=tuple({"length": float(len(text))} for text in some),
        prior_rates_N=rates,
        surface_N_S=surface_features(some).astype(np.float16),
        embedding_N_D=_EMBEDDER.embed(some).astype(np.float16),
        named_rates=NamedRates.of([_shown_by_others(text, first + i) for i, text in enumerate(some)]),
    )


def _shown_by_others(text: str, index: int) -> dict[str, KnownRate]:
    """By more than are read one by one, each on a part of the prompts."""
    n = 4.0 + len(text)
    return {f"model {j}": (n / (n + 9.0 * j) * 8.0, 8) for j in range(10) if (index + j) % 3}


class Replay:
    """A run as a process knows it."""

    def __init__(self, log: Log) -> None:
        self.log = log
        self.live = LiveRun(1)
        self.live.pool = Pool(surface_width=len(SURFACE_NAMES), embedding_width=_EMBEDDER.width)

    def fold(self, entry: Entry) -> None:
        live = self.live
        if isinstance(entry, PoolEntry):
            live.pool.append(block(self.log.texts, live.pool.n, entry.n_prompts))
        elif isinstance(entry, SnapshotEntry):
            live.model = SharedModel.from_bytes(self.log.snapshots[entry.version], embedder=BUILTIN_NAME)
            live.pool.attach(entry.version, live.model.priors)
        fold(live.state, entry, live.pool)

    def choose(self, step: int) -> Chosen:
        settings = replace(
            SETTINGS,
            acquisition="paper" if step % 5 == 4 else None,
            target_rate=0.6 if step % 7 == 6 else None,
        )
        return self.live.choose(settings, lambda: SelectionRequest(step=step, batch_size=BATCH_SIZE, seed=7))

    def answers(self) -> Iterator[tuple[str, str]]:
        """Every selection, forecasts after every tenth step, and the state at the end."""
        x = np.random.default_rng(0).standard_normal((300, 257)).astype(np.float32)
        yield "a plain product", hashed(x.T @ x)
        for entry in self.log.entries:
            if isinstance(entry, SelectEntry):
                chosen = self.choose(entry.step)
                choice = chosen.choice
                yield f"selection {entry.step}", hashed(choice.prompts, choice.control, chosen.a, chosen.b)
                yield f"its forecast {entry.step}", hashed(choice.informative_probabilities, choice.pad_to or -1)
            self.fold(entry)
            if isinstance(entry, ObserveEntry) and entry.step % 10 == 0:
                yield from self._forecasts(entry.step)
        yield "state", hashlib.sha256(to_bytes(self.live.state)).hexdigest()

    def _forecasts(self, step: int) -> Iterator[tuple[str, str]]:
        pool = self.live.beliefs("gps")
        yield f"forecasts {step}", hashed(*pool, *informative_moments(*pool, GROUP_SIZE))
        among = self.live.new_beliefs("gps", _NEW, block(_NEW, 0, len(_NEW)))[:2]
        yield f"forecasts of new texts {step}", hashed(*among)
        some = np.random.default_rng(step).integers(0, self.live.state.n_prompts, 3)
        alone = [np.concatenate(self.live.beliefs("gps", rows)) for rows in some[:, None]]
        first = self.live.new_beliefs("gps", _NEW[:1], block(_NEW, 0, 1))[:2]
        is_alike = all((np.array(pool)[:, i] == told).all() for i, told in zip(some, alone, strict=True))
        is_alike &= bool((np.array(first)[:, 0] == np.array(among)[:, 0]).all())
        yield f"alone as in company {step}", str(is_alike)


def hashed(*arrays: Any) -> str:
    """Of the bits of these arrays."""
    return hashlib.sha256(b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)).hexdigest()


if __name__ == "__main__":
    for answer in Replay(pickle.loads(Path(sys.argv[1]).read_bytes())).answers():
        sys.stdout.write(json.dumps(answer) + "\n")
