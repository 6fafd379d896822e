"""Replicas on unlike machines tell the same numbers: one log, replayed under every arithmetic that this machine has."""

from __future__ import annotations

import json
import pickle
import platform
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.kernels import environments, run
from tests.replaying import GROUP_SIZE, LOADED, Log, Replay, hashed, made_texts

from evenodds_service.domain.log_entries import ObserveEntry, PoolEntry, SelectEntry, SnapshotEntry
from evenodds_service.model.embedder import BUILTIN_NAME
from evenodds_service.model.history import History
from evenodds_service.model.ngrams import ngram_matrix
from evenodds_service.model.refit import TrainingData, fit_shared_model

N_STEPS, GROWN_AT, REFITTED_AT = 30, 8, (12, 22)


def made_log() -> Log:
    """A run as this process lives it: selections, outcomes, a pool that grows, two refits."""
    log = Log(made_texts(LOADED[-1]))
    replay = Replay(log)
    chance = np.random.default_rng(1)
    rates_N = np.clip([chance.beta(0.4 + 0.4 * (i % 5), 1.0 + 0.01 * len(t)) for i, t in enumerate(log.texts)], 0, 1)

    def append(entry: PoolEntry | SelectEntry | ObserveEntry | SnapshotEntry) -> None:
        log.entries.append(entry)
        replay.fold(entry)

    def position() -> int:
        return len(log.entries) + 1

    append(PoolEntry(position(), LOADED[0]))
    for step in range(N_STEPS):
        if step == GROWN_AT:
            append(PoolEntry(position(), LOADED[1]))
        if step in REFITTED_AT:
            version = 1 + REFITTED_AT.index(step)
            log.snapshots[version] = refit(log, replay)
            append(SnapshotEntry(position(), version))
        chosen = replay.choose(step)
        prompts, control = chosen.choice.prompts, chosen.choice.control
        append(SelectEntry(position(), step, prompts, str(step), 0.1, control, chosen.a, chosen.b))
        n = np.full(len(prompts), float(GROUP_SIZE))
        k = chance.binomial(GROUP_SIZE, rates_N[prompts]).astype(np.float64)
        append(ObserveEntry(position(), step, prompts, k, n, (k > 0) & (k < n), str(step), step))
    return log


def refit(log: Log, replay: Replay) -> bytes:
    basis, pool = replay.live.state.basis, replay.live.pool
    assert basis is not None
    reports = [entry for entry in log.entries if isinstance(entry, ObserveEntry)]
    history = History(
        prompts=np.concatenate([report.prompts for report in reports]),
        steps=np.concatenate([np.full(len(report.prompts), report.step) for report in reports]),
        successes=np.concatenate([report.successes for report in reports]),
        attempts=np.concatenate([report.attempts for report in reports]),
        informative=np.concatenate([report.informative for report in reports]),
    )
    data = TrainingData(
        embedder=BUILTIN_NAME,
        predictor="gps",
        group_size=GROUP_SIZE,
        basis=basis,
        x_N_d=pool.matrix(basis, pool.n),
        embeddings_N_D=pool.raw(0, pool.n).embedding_N_D,
        ngrams=ngram_matrix(log.texts[: pool.n]),
        history=history,
    )
    return fit_shared_model(data, device=torch.device("cpu")).to_bytes()


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("kernels") / "log"
    path.write_bytes(pickle.dumps(made_log()))
    return path


def recorded(log: Path) -> list[list[str]]:
    """The selections as the process that made the log chose them."""
    entries = pickle.loads(log.read_bytes()).entries
    chosen = [entry for entry in entries if isinstance(entry, SelectEntry)]
    return [[f"selection {e.step}", hashed(e.prompts, e.control, e.a, e.b)] for e in chosen]


@pytest.mark.slow
def test_one_log_gives_the_same_bits_under_every_kernel_on_one_and_on_two_threads(log: Path) -> None:
    replay_under(environments(), log)


def replay_under(tried: Mapping[str, Mapping[str, str]], log: Path) -> None:
    command = ["-m", "tests.replaying", str(log)]
    with ThreadPoolExecutor(2) as processes:
        results = dict(zip(tried, processes.map(lambda settings: run(command, settings), tried.values()), strict=True))

    assert {name: result.stderr for name, result in results.items() if result.returncode} == {}
    told = {name: [json.loads(line) for line in result.stdout.splitlines()] for name, result in results.items()}
    if "x86" in platform.machine():
        assert len({answers[0][1] for answers in told.values()}) > 1  # a plain product has other last bits
    (name, first), *others = told.items()
    assert [answer for answer in first if answer[0].startswith("selection")] == recorded(log)
    assert len(first) == 2 + 2 * N_STEPS + 3 * N_STEPS // 10
    assert [what for what, bits in first if bits == "False"] == []
    for other, answers in others:
        unlike = [what for (what, bits), (_, theirs) in zip(first[1:], answers[1:], strict=True) if bits != theirs]
        assert unlike == [], f"{name} and {other} disagree on {len(unlike)} answers"
