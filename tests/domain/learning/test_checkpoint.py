from __future__ import annotations

import io
import json
from typing import TYPE_CHECKING

import numpy as np
import pytest

from evenodds_service.domain.learning.checkpoint import FORMAT, block_from_bytes, block_to_bytes, from_bytes, to_bytes
from evenodds_service.domain.learning.features import Pool
from evenodds_service.domain.learning.fold import fold
from evenodds_service.domain.learning.prediction import beliefs_of
from evenodds_service.domain.learning.state import State
from evenodds_service.domain.log_entries import Entry, ObserveEntry, PoolEntry, SelectEntry, SnapshotEntry
from evenodds_service.domain.prompts import NO_RATES, NamedRates
from evenodds_service.errors import CheckpointUnusable

if TYPE_CHECKING:
    from tests.domain.conftest import MakeBlock

pytestmark = pytest.mark.numbers


@pytest.fixture(scope="module")
def pool(make_block: MakeBlock) -> Pool:
    rng = np.random.default_rng(0)
    pool = Pool(surface_width=3, embedding_width=6)
    pool.append(
        make_block(
            120,
            surface=rng.normal(size=(120, 3)),
            embedding=rng.normal(size=(120, 6)),
            groups=tuple("ab"[i % 2] for i in range(120)),
            numeric=({"depth": 1.0},) * 120,
            prior_rates=rng.random(120),
            named_rates=NamedRates.of([{f"model {j}": rng.random() for j in range(i % 10)} for i in range(120)]),
        )
    )
    pool.attach(2, {})
    return pool


@pytest.fixture(scope="module")
def entries() -> list[Entry]:
    """A log in which the pool grows, and its basis with it, after the middle."""
    rng = np.random.default_rng(1)
    log: list[Entry] = [PoolEntry(1, 20)]
    for step in range(8):
        n = 20 if step < 5 else 120
        prompts = rng.choice(n, size=15, replace=False)
        counts = rng.choice([1.0, 8.0], size=15)
        control = rng.random(15) < 0.3
        a, b = rng.uniform(0.5, 4.0, size=(2, 15))
        log.append(SelectEntry(len(log) + 1, step, prompts, f"s{step}", 0.3, control, a, b))
        log.append(
            ObserveEntry(
                len(log) + 1, step, prompts, counts * rng.integers(0, 5, size=15) / 4, counts, np.ones(15, dtype=bool)
            )
        )
        part = prompts[:4]  # more of the selection's outcomes, in a call of their own
        log.append(ObserveEntry(len(log) + 1, step, part, np.ones(4), np.full(4, 2.0), np.ones(4, dtype=bool), "s0"))
        if step == 3:
            log.append(SnapshotEntry(len(log) + 1, 2))
        if step == 4:
            log.append(PoolEntry(len(log) + 1, 120))
    return log


def folded(entries: list[Entry], pool: Pool, state: State | None = None) -> State:
    state = State() if state is None else state
    for entry in entries:
        fold(state, entry, pool)
    return state


@pytest.fixture(scope="module")
def whole(pool: Pool, entries: list[Entry]) -> State:
    return folded(entries, pool)


@pytest.mark.parametrize("cut", [0, 1, 2, 3, 9, 13, 14, 16, 18, 27])
def test_a_checkpoint_and_the_tail_give_the_bits_of_the_whole_log(
    pool: Pool, entries: list[Entry], whole: State, cut: int
) -> None:
    resumed = folded(entries[cut:], pool, from_bytes(to_bytes(folded(entries[:cut], pool))))

    assert to_bytes(resumed) == to_bytes(whole)
    for one, other in zip(beliefs_of(resumed, pool), beliefs_of(whole, pool), strict=True):
        assert np.array_equal(one, other)


def test_folding_on_does_not_reach_into_the_bytes(pool: Pool, entries: list[Entry]) -> None:
    content = to_bytes(folded(entries[:9], pool))

    folded(entries[9:], pool, from_bytes(content))

    assert to_bytes(from_bytes(content)) == content


def test_what_is_stored_keeps_the_names_of_its_format(pool: Pool, entries: list[Entry]) -> None:
    """Names in the code may change; a checkpoint that was stored before has to open all the same."""
    with np.load(io.BytesIO(to_bytes(folded(entries, pool)))) as stored:
        header, names = json.loads(bytes(stored["header"])), {*stored}

    assert FORMAT == 10
    assert {
        "position",
        "head_step",
        "running_counts",
        "log_guard",
        "n_recent",
        "basis",
        "record",
        "rails",
        "watch",
        "constant",
        "repeats",
    } <= {*header}
    assert {"first_step", "width", "n_selections", "open_ids"} == {*header["record"]}
    assert {"skill_step", "found", "fallback_since"} < {*header["rails"]}
    assert {"successes_L_N", "outstanding_step_N", "log_weights", "record.arms", "rails.silence"} < names
    assert {"embedding_weights", "surface_precision", "surface_prior_precision", "recent_0"} < names


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04 nor this", b"\x93NUMPY"])
def test_other_bytes_are_refused(content: bytes) -> None:
    with pytest.raises(CheckpointUnusable, match=f"^{len(content)} bytes are no checkpoint: "):
        from_bytes(content)


def test_a_checkpoint_cut_short_is_refused(pool: Pool, entries: list[Entry]) -> None:
    content = to_bytes(folded(entries, pool))

    with pytest.raises(CheckpointUnusable, match=r"^\d+ bytes are no checkpoint: "):
        from_bytes(content[: len(content) // 2])


def test_a_checkpoint_of_another_format_is_refused() -> None:
    header = json.dumps({"format": FORMAT + 1}).encode()
    buffer = io.BytesIO()
    np.savez(buffer, header=np.frombuffer(header, dtype=np.uint8))

    message = rf"^the checkpoint has format {FORMAT + 1}, this release reads {FORMAT}$"
    with pytest.raises(CheckpointUnusable, match=message):
        from_bytes(buffer.getvalue())


@pytest.mark.parametrize("numeric", [None, {"depth": 0.1, "length": -1e300}])
@pytest.mark.parametrize("embedding_width", [0, 5])
@pytest.mark.parametrize("named_rates", [NO_RATES, NamedRates.of([{"b": 0.5}, None] * 10 + [{"a": (3, 8)}] * 20)])
def test_a_packed_block_comes_back_as_it_was(
    make_block: MakeBlock, numeric: dict[str, float] | None, embedding_width: int, named_rates: NamedRates
) -> None:
    rng = np.random.default_rng(0)
    embedding = rng.normal(size=(40, embedding_width))
    embedding[3] = np.nan
    taken = Pool(surface_width=3, embedding_width=embedding_width)
    taken.append(
        make_block(
            40,
            surface=rng.normal(size=(40, 3)),
            embedding=embedding,
            groups=tuple(("b", "ä", None)[i % 3] for i in range(40)),
            numeric=(None, numeric) * 20,
            prior_rates=np.where(rng.random(40) < 0.5, rng.random(40), np.nan),
            named_rates=named_rates,
            answers=rng.normal(size=(40, 5 if numeric else 0)),
        )
    )
    block = taken.raw(10, 40)

    again = block_from_bytes(block_to_bytes(block))

    assert (again.first, again.prompt_ids, again.groups) == (10, block.prompt_ids, block.groups)
    assert again.numeric == block.numeric
    for name in ("prior_rates_N", "surface_N_S", "embedding_N_D", "answers_N_A"):
        ours, expected = getattr(again, name), getattr(block, name)
        assert ours.dtype == expected.dtype
        np.testing.assert_array_equal(ours, expected)
    assert again.named_rates.names == block.named_rates.names
    np.testing.assert_array_equal(again.named_rates.rates_N_R, block.named_rates.rates_N_R)
    np.testing.assert_array_equal(again.named_rates.attempts_N_R, block.named_rates.attempts_N_R)


def test_bytes_that_are_no_block_are_refused(pool: Pool, entries: list[Entry]) -> None:
    content = block_to_bytes(pool.raw(0, 120))

    with pytest.raises(CheckpointUnusable, match=r"^\d+ bytes are no checkpoint: "):
        block_from_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointUnusable, match=r"^\d+ bytes are no packed block: KeyError\('prompt_ids'\)$"):
        block_from_bytes(to_bytes(folded(entries, pool)))
