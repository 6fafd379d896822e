"""Rows that were damaged, or are another run's: a process starts from the log instead, and none gives 500."""

from __future__ import annotations

import contextlib
import io
import json
import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from safetensors.numpy import save
from sqlalchemy import update

from evenodds_service.domain.learning.checkpoint import block_from_bytes, from_bytes, pool_of_bytes, to_bytes
from evenodds_service.domain.learning.state import State
from evenodds_service.errors import CheckpointUnusable, SnapshotUnusable
from evenodds_service.model.history import History
from evenodds_service.model.snapshot import SharedModel
from evenodds_service.storage.tables import checkpoints, snapshots

if TYPE_CHECKING:
    from tests.worker.conftest import Bench

from tests.worker.conftest import bench

__all__ = ["bench"]  # a fixture


def npz(header: object, **arrays: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, header=np.frombuffer(json.dumps(header).encode(), dtype=np.uint8), **arrays)
    return buffer.getvalue()


def damaged(whole: bytes) -> list[bytes]:
    chance = random.Random(1)
    cut = [whole[: len(whole) * part // 7] for part in range(7)]
    flipped = []
    for _ in range(60):
        content = bytearray(whole)
        for place in chance.choices(range(len(content)), k=8):
            content[place] ^= 1 << chance.randrange(8)
        flipped.append(bytes(content))
    return [*cut, *flipped, b"", b"{}", b"PK\x03\x04", chance.randbytes(500), npz([]), npz({}), npz({"format": None})]


def outcomes(read: Callable[[bytes], object], whole: bytes, unusable: type[Exception]) -> None:
    """Every damage is either told as such, or did no harm."""
    for content in damaged(whole):
        with contextlib.suppress(unusable):
            read(content)


def test_no_bytes_make_a_checkpoint_fail_otherwise() -> None:
    whole = to_bytes(State())
    outcomes(from_bytes, whole, CheckpointUnusable)
    outcomes(pool_of_bytes, whole, CheckpointUnusable)
    outcomes(block_from_bytes, whole, CheckpointUnusable)
    outcomes(History.from_bytes, History.empty().to_bytes(), CheckpointUnusable)
    with pytest.raises(CheckpointUnusable):
        from_bytes("text")  # type: ignore[arg-type]  # as SQLite may hold in any column


def test_no_bytes_make_a_snapshot_fail_otherwise() -> None:
    def packed(header: object) -> bytes:
        return save({"header": np.frombuffer(json.dumps(header).encode(), dtype=np.uint8)})

    whole = packed({"format": 1, "embedder": "e"})
    outcomes(lambda content: SharedModel.from_bytes(content, embedder="e"), whole, SnapshotUnusable)
    headers: list[object] = [[], {}, {"format": 1}, {"format": 1, "embedder": "e", "group_size": 8}]
    for header in headers:
        with pytest.raises(SnapshotUnusable):
            SharedModel.from_bytes(packed(header), embedder="e")


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_run_answers_from_its_log_whatever_its_checkpoint_and_snapshot_hold(bench: Bench) -> None:
    from evenodds_service.runtime.live_runs import LiveRuns

    bench.learned("r")
    assert bench.worker(bench.constant(0.3)).work_once()
    run = bench.store.run("r")
    expected = LiveRuns(bench.store, capacity=2).at_head("r").live.beliefs("mopps")
    other = to_bytes(State())  # of another position

    for state in (b"", b"junk", other, npz({"format": 6})):
        with bench.engine.begin() as connection:
            connection.execute(update(checkpoints).values(state=state))
        found = LiveRuns(bench.store, capacity=2).at_head("r").live
        assert found.state.position == run.log_position
        np.testing.assert_array_equal(found.beliefs("mopps"), expected)
    with bench.engine.begin() as connection:
        connection.execute(update(snapshots).values(weights=b"junk"))
    assert LiveRuns(bench.store, capacity=2).at_head("r").live.model is None
    with bench.engine.begin() as connection:
        connection.execute(snapshots.delete())
    assert LiveRuns(bench.store, capacity=2).at_head("r").live.model is None
