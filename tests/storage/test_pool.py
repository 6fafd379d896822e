from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime

import numpy as np
import pytest
from sqlalchemy import Engine, select

from evenodds_service.domain.log_entries import PoolEntry
from evenodds_service.domain.prompts import NewPrompt, Prompt, Vector, text_key
from evenodds_service.domain.settings import CALLER, RunSettings
from evenodds_service.errors import (
    EmbedderFixed,
    EmbeddingWidthConflict,
    PromptConflict,
    PromptUnknown,
    RunUnknown,
    VectorUnstorable,
)
from evenodds_service.storage.store import PromptsAdded, Run, Store
from evenodds_service.storage.tables import embeddings

FULL = NewPrompt(
    "a",
    text="What is 1 + 1? ✓",
    text_key=text_key("What is 1 + 1? ✓"),
    group="arithmetic",
    features={"length": 0.1, "depth": -3.0},
    prior_rate=0.30000000000000004,
    prior_rates={"b": 0.1, "a": (2.5, 8)},
    vector_key="v",
    answer=[2, "two"],
    answer_features=(1.0, 0.30029296875),
)


def test_prompts_come_back_as_they_were_added_in_order_of_arrival(store: Store, run: Run, now: datetime) -> None:
    added = store.add_prompts(run.id, [FULL, NewPrompt("b")], now=now)
    more = store.add_prompts(run.id, [NewPrompt("0")], now=now)

    assert added == PromptsAdded(added=2, existing=0, pool_size=2, log_position=1)
    assert more == PromptsAdded(added=1, existing=0, pool_size=3, log_position=2)
    first = Prompt(
        FULL.prompt_id,
        FULL.text,
        FULL.text_key,
        FULL.group,
        FULL.features,
        FULL.prior_rate,
        FULL.prior_rates,
        FULL.vector_key,
        FULL.answer,
        FULL.answer_features,
        index=0,
    )
    assert store.prompts(run.id) == (first, Prompt("b", index=1), Prompt("0", index=2))
    assert store.prompts(run.id, first=1, limit=1) == (Prompt("b", index=1),)
    assert store.prompt(run.id, "a") == first
    assert store.entries(run.id, after=0) == (PoolEntry(1, 2), PoolEntry(2, 3))
    assert store.run("math").n_prompts == 3


def test_repeated_prompts_count_as_existing_and_take_no_log_position(store: Store, run: Run, now: datetime) -> None:
    store.add_prompts(run.id, [FULL], now=now)

    again = store.add_prompts(run.id, [FULL, NewPrompt("a")], now=now)

    assert again == PromptsAdded(added=0, existing=2, pool_size=1, log_position=1)


def test_prompt_twice_in_one_call_is_added_once(store: Store, run: Run, now: datetime) -> None:
    added = store.add_prompts(run.id, [NewPrompt("b"), FULL, FULL, NewPrompt("a")], now=now)

    assert added == PromptsAdded(added=2, existing=2, pool_size=2, log_position=1)


@pytest.mark.parametrize(
    ("other", "differs"),
    [
        (NewPrompt("a", text="What is 2?", text_key=text_key("What is 2?")), "text"),
        (NewPrompt("a", group="algebra"), "category"),
        (NewPrompt("a", features={"length": 0.2, "depth": -3.0}), "features"),
        (NewPrompt("a", prior_rate=0.3), "prior rate"),
        (NewPrompt("a", answer="2", answer_features=FULL.answer_features), "answer"),
    ],
)
def test_prompt_id_with_other_content_names_the_item_and_writes_nothing(
    store: Store, run: Run, now: datetime, other: NewPrompt, differs: str
) -> None:
    store.add_prompts(run.id, [FULL], now=now)
    before = store.run("math")
    vector = Vector("surface", "k", np.ones(2))

    with pytest.raises(
        PromptConflict,
        match=f"^prompt 2 of 3: id 'a' is in the pool with another {differs}: send it under another prompt_id, "
        f"or leave the {differs} out$",
    ) as raised:
        store.add_prompts(run.id, [NewPrompt("n"), other, NewPrompt("m")], [vector], now=now)

    assert (raised.value.item, raised.value.prompt_id) == (1, "a")
    assert store.run("math") == before
    assert store.missing_vectors(["surface"], ["k"]) == {("surface", "k")}


def test_prompt_id_with_other_content_in_one_call_is_a_conflict(store: Store, run: Run, now: datetime) -> None:
    with pytest.raises(PromptConflict, match="prompt 2 of 2: id 'a' stands earlier in this call with another category"):
        store.add_prompts(run.id, [NewPrompt("a", group="x"), NewPrompt("a", group="y")], now=now)

    assert store.prompts(run.id) == ()


def test_same_prompt_id_in_two_runs_are_two_prompts(store: Store, run: Run, now: datetime) -> None:
    other = store.put_run("other", RunSettings(), now=now)[0]
    store.add_prompts(run.id, [NewPrompt("a", group="x")], now=now)

    added = store.add_prompts(other.id, [NewPrompt("a", group="y")], now=now)

    assert added.added == 1


def test_unknown_prompt_is_named(store: Store, run: Run) -> None:
    with pytest.raises(PromptUnknown, match=r"^prompt 'zz' is not in the pool: add it, or send its text$"):
        store.prompt(run.id, "zz")


def test_first_prompt_decides_embedder_and_width(store: Store, run: Run, now: datetime) -> None:
    store.add_prompts(run.id, [NewPrompt("a")], embedder="builtin", embedding_width=4, now=now)

    decided = store.run("math")
    assert (decided.settings.embedder, decided.embedding_width) == ("builtin", 4)

    with pytest.raises(
        EmbedderFixed, match="run 'math' has embedder 'builtin', and this call sends vectors of 'caller'"
    ):
        store.add_prompts(run.id, [NewPrompt("b")], embedder="caller", now=now)
    with pytest.raises(EmbeddingWidthConflict, match="embeddings of 4 values, this call sends 5: send 4 values"):
        store.add_prompts(run.id, [NewPrompt("b")], embedding_width=5, now=now)

    assert store.run("math") == decided


def test_vector_of_another_length_names_its_place_and_writes_nothing(store: Store, run: Run, now: datetime) -> None:
    prompts = [NewPrompt(name, vector_key=name) for name in "ab"]
    vectors = [Vector(CALLER, "a", np.ones(3)), Vector(CALLER, "b", np.ones(2))]

    with pytest.raises(
        EmbeddingWidthConflict,
        match=r"vector 2 of 2 \(key 'b'\) has 2 values, run 'math' has embeddings of 3: send 3 values",
    ):
        store.add_prompts(run.id, prompts, vectors, embedder=CALLER, now=now)

    assert store.run("math") == run


@pytest.mark.parametrize("value", [np.nan, np.inf, 70_000.0])
def test_vector_that_cannot_be_stored_is_refused(store: Store, run: Run, now: datetime, value: float) -> None:
    with pytest.raises(VectorUnstorable, match=r"vector 1 of 1 \(key 'k'\): every value must be finite and within"):
        store.add_prompts(run.id, [NewPrompt("a")], [Vector("surface", "k", np.array([value]))], now=now)

    assert store.run("math") == run


def test_vectors_are_stored_once_per_embedder_and_key(store: Store, run: Run, now: datetime) -> None:
    twice = [Vector("e", "k", np.ones(2)), Vector("e", "k", np.ones(2))]
    store.add_prompts(run.id, [NewPrompt("a", vector_key="k")], twice, now=now)
    again = [Vector("e", "k", np.zeros(2)), Vector("e", "l", np.zeros(2))]
    store.add_prompts(run.id, [NewPrompt("b", vector_key="l")], again, now=now)

    block = store.pool_block(run.id, first=0, last=2, surface="surface", embedder="e")

    assert block.embedding_N_D.tolist() == [[1, 1], [0, 0]]
    many = [f"{n}" for n in range(1_200)]
    assert store.missing_vectors(["e", "f"], ["k", "m"]) == {("e", "m"), ("f", "k"), ("f", "m")}
    assert store.missing_vectors(["e"], many) == {("e", key) for key in many}
    assert store.missing_vectors(["e"], []) == frozenset()


def test_pool_block_joins_what_is_there_and_leaves_the_rest_nan(store: Store, run: Run, now: datetime) -> None:
    prompts = [
        FULL,
        NewPrompt("b", text="x", text_key="kx", vector_key="missing"),
        NewPrompt("c", group="g", vector_key="w"),
    ]
    surfaces = [Vector("surface", text_key("What is 1 + 1? ✓"), np.array([0.5, -2.0]))]
    vectors = [Vector("e", "v", np.array([1.0, 0.0, 0.25])), Vector("e", "w", np.array([0.0, 1.0, 0.1]))]
    store.add_prompts(run.id, prompts, [*surfaces, *vectors], embedder="e", embedding_width=3, now=now)

    block = store.pool_block(run.id, first=0, last=3, surface="surface", embedder="e")

    nan = np.nan
    assert block.first == 0
    assert block.prompt_ids == ("a", "b", "c")
    assert block.groups == ("arithmetic", None, "g")
    assert block.numeric == ({"length": 0.1, "depth": -3.0}, None, None)
    np.testing.assert_array_equal(block.prior_rates_N, np.array([0.3, nan, nan], dtype=np.float32))
    np.testing.assert_array_equal(block.surface_N_S, [[0.5, -2.0], [nan, nan], [nan, nan]])
    np.testing.assert_array_equal(
        block.embedding_N_D, np.array([[1, 0, 0.25], [nan] * 3, [0, 1, np.float16(0.1)]], dtype=np.float32)
    )
    assert {block.surface_N_S.dtype, block.embedding_N_D.dtype} == {np.dtype(np.float32)}


def test_pool_block_takes_a_range_and_ends_with_the_pool(store: Store, run: Run, now: datetime) -> None:
    store.add_prompts(run.id, [NewPrompt(name) for name in "abcd"], embedding_width=3, now=now)

    middle = store.pool_block(run.id, first=1, last=3, surface="surface", embedder="e")
    beyond = store.pool_block(run.id, first=3, last=99, surface="surface", embedder=None)
    empty = store.pool_block(run.id, first=4, last=99, surface="surface", embedder=None)

    assert (middle.first, middle.prompt_ids) == (1, ("b", "c"))
    assert (middle.surface_N_S.shape, middle.embedding_N_D.shape) == ((2, 0), (2, 3))
    assert np.isnan(middle.embedding_N_D).all()
    assert (beyond.prompt_ids, beyond.embedding_N_D.shape) == (("d",), (1, 0))
    assert (empty.first, empty.prompt_ids, empty.surface_N_S.shape) == (4, (), (0, 0))
    with pytest.raises(RunUnknown, match="run with id 0 does not exist"):
        store.pool_block(0, first=0, last=1, surface="surface", embedder=None)


def test_vectors_of_callers_are_their_runs_own(store: Store, engine: Engine, run: Run, now: datetime) -> None:
    other = store.put_run("other", RunSettings(), now=now)[0]
    for owner, values in ((run, [1.0, 0.0]), (other, [0.0, 1.0])):
        vector = Vector(CALLER, "a", np.array(values))
        store.add_prompts(owner.id, [NewPrompt("a", vector_key="a")], [vector], embedder=CALLER, now=now)

    blocks = [store.pool_block(owner.id, first=0, last=1, surface="surface", embedder=CALLER) for owner in (run, other)]

    assert [block.embedding_N_D.tolist() for block in blocks] == [[[1.0, 0.0]], [[0.0, 1.0]]]
    assert store.run("math").embedding_width == 2
    with engine.connect() as connection:
        names = set(connection.execute(select(embeddings.c.embedder)).scalars())
    assert names == {f"caller:{run.id}", f"caller:{other.id}"}


def test_callers_that_add_the_same_prompts_at_once_share_them(store: Store, run: Run, now: datetime) -> None:
    """Also with the same vectors in opposite order, over two runs: nobody deadlocks."""
    other = store.put_run("other", RunSettings(), now=now)[0]
    names = [f"p{number:03}" for number in range(200)]
    together = threading.Barrier(6)

    def add(caller: int) -> int:
        mine = names if caller % 2 else names[::-1]
        vectors = [Vector("e", name, np.ones(4)) for name in mine]
        prompts = [NewPrompt(name, vector_key=name) for name in mine]
        together.wait()
        return store.add_prompts((run, other)[caller % 2].id, prompts, vectors, now=now).added

    with ThreadPoolExecutor(6) as callers:
        added = list(callers.map(add, range(6)))

    assert sorted(added) == [0, 0, 0, 0, 200, 200]
    assert [prompt.index for prompt in store.prompts(run.id, limit=999)] == list(range(200))
    assert store.missing_vectors(["e"], names) == frozenset()


def test_thousands_of_prompts_are_added_and_read_whole(store: Store, run: Run, now: datetime) -> None:
    names = [f"p{number:05}" for number in range(3_000)]
    values = np.random.default_rng(0).normal(size=(3_000, 16)).astype(np.float16)
    prompts = [NewPrompt(name, text=name, text_key=name, vector_key=name) for name in names]
    vectors = [Vector("e", name, row) for name, row in zip(names, values, strict=True)]

    added = store.add_prompts(run.id, prompts, vectors, embedder="e", embedding_width=16, now=now)
    again = store.add_prompts(run.id, prompts, now=now)

    block = store.pool_block(run.id, first=0, last=3_000, surface="e", embedder="e")
    assert (added.added, again.existing) == (3_000, 3_000)
    assert block.prompt_ids == tuple(names)
    np.testing.assert_array_equal(block.embedding_N_D, values.astype(np.float32))
    np.testing.assert_array_equal(block.surface_N_S, block.embedding_N_D)


def test_packed_blocks_are_kept_once_and_found_by_name(store: Store, run: Run) -> None:
    assert store.packed_blocks(run.id, features="1") == frozenset()

    for first, content in ((0, b"\x00a"), (10, b"b"), (0, b"another")):
        store.save_packed_block(run.id, content, first=first, last=first + 10, features="1")

    assert store.packed_blocks(run.id, features="1") == {0, 10}
    assert [store.packed_block(run.id, first=first, features="1") for first in (0, 10, 5, 20)] == [
        b"\x00a",
        b"b",
        None,
        None,
    ]
    assert (store.packed_blocks(run.id, features="2"), store.packed_block(run.id, first=0, features="2")) == (
        frozenset(),
        None,
    )


def test_packed_blocks_of_other_features_give_way(store: Store, run: Run, now: datetime) -> None:
    other = store.put_run("other", RunSettings(), now=now)[0]
    for run_id in (run.id, other.id):
        for first in (0, 10):
            store.save_packed_block(run_id, b"old", first=first, last=first + 10, features="1")

    store.save_packed_block(run.id, b"new", first=0, last=10, features="2")

    assert [store.packed_blocks(run.id, features=name) for name in "12"] == [frozenset(), {0}]
    assert store.packed_block(run.id, first=0, features="2") == b"new"
    assert store.packed_blocks(other.id, features="1") == {0, 10}


def test_packed_block_of_an_unknown_run_is_refused(store: Store) -> None:
    with pytest.raises(RunUnknown, match="run with id 0 does not exist"):
        store.save_packed_block(0, b"content", first=0, last=10, features="1")
