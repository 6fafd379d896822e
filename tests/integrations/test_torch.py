"""DataLoaders that follow the service, with and without workers, through checkpoints, on several ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from tests.integrations.conftest import PROMPTS, TrainersService, observed, selected
from tests.waiting import PATIENCE_SECONDS
from torch.utils.data import DataLoader

from evenodds import ConfigurationError, PromptSelector
from evenodds.integrations.torch import PromptDataset, PromptSampler, ranks

Make = Callable[..., PromptSelector]
IDS = [prompt["prompt_id"] for prompt in PROMPTS]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_with_the_sampler_loads_what_the_service_chose(
    trainers_service: TrainersService, make_selector: Make, workers: int
) -> None:
    selector = make_selector()
    sampler = PromptSampler(selector, 4, first_step=2, n_steps=5)

    batches = list(DataLoader(IDS, batch_size=4, sampler=sampler, num_workers=workers))  # type: ignore[arg-type]

    assert batches == selected(trainers_service, selector.run, *range(2, 7))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_with_the_dataset_yields_the_steps_in_order(
    trainers_service: TrainersService, make_selector: Make, workers: int
) -> None:
    selector = make_selector()
    dataset = PromptDataset(selector, PROMPTS, 4, n_steps=5)
    loader: Any = DataLoader(dataset, batch_size=4, num_workers=workers)

    batches = [(batch["step"].tolist(), batch["prompt_id"], batch["text"]) for batch in loader]

    texts = {prompt["prompt_id"]: prompt["text"] for prompt in PROMPTS}
    assert batches == [
        ([step] * 4, ids, [texts[i] for i in ids])
        for step, ids in enumerate(selected(trainers_service, selector.run, *range(5)))
    ]


@pytest.mark.parametrize("kind", ["sampler", "dataset"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_loader_continues_after_the_newest_observed_step(
    trainers_service: TrainersService, make_selector: Make, kind: str, workers: int
) -> None:
    def loaded(selector: PromptSelector) -> tuple[Any, Any]:
        stateful: Any = (
            PromptSampler(selector, 4, n_steps=6)
            if kind == "sampler"
            else PromptDataset(selector, PROMPTS, 4, n_steps=6)
        )
        if kind == "sampler":
            return stateful, DataLoader(IDS, batch_size=4, sampler=stateful, num_workers=workers)  # type: ignore[arg-type]
        return stateful, DataLoader(stateful, batch_size=4, num_workers=workers)

    def ids(batch: Any) -> list[str]:
        return list(batch if kind == "sampler" else batch["prompt_id"])

    first = make_selector()
    stateful, loader = loaded(first)
    batches = iter(loader)
    for step in range(3):
        first.observe(step, {prompt_id: [1, 0] for prompt_id in ids(next(batches))})
    assert first.flush()
    checkpoint = stateful.state_dict()
    first.observe(3, {prompt_id: [1, 0] for prompt_id in ids(next(batches))})
    assert first.flush()
    del batches
    first.close()

    second = make_selector()
    stateful, loader = loaded(second)
    stateful.load_state_dict(checkpoint)
    rest = [ids(batch) for batch in loader]

    assert rest == selected(trainers_service, second.run, 3, 4, 5)
    assert {step for _, step, _, _ in observed(trainers_service, second.run)} == {0, 1, 2}


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_loader_that_is_iterated_again_goes_on_behind_the_newest_observed_step(
    trainers_service: TrainersService, make_selector: Make, workers: int
) -> None:
    selector = make_selector()
    loader: Any = DataLoader(PromptDataset(selector, PROMPTS, 4, n_steps=5), batch_size=4, num_workers=workers)
    batches = iter(loader)
    for step in range(2):
        selector.observe(step, {prompt_id: [1, 0] for prompt_id in next(batches)["prompt_id"]})
    del batches

    again = [(batch["step"].tolist(), batch["prompt_id"]) for batch in loader]

    assert again == [
        ([step] * 4, ids) for step, ids in enumerate(selected(trainers_service, selector.run, 2, 3, 4), start=2)
    ]


def test_workers_that_live_on_repeat_no_step(make_selector: Make) -> None:
    dataset = PromptDataset(make_selector(), PROMPTS, 4, n_steps=5)
    loader: Any = DataLoader(dataset, batch_size=4, num_workers=2, persistent_workers=True)

    steps = [batch["step"].tolist()[0] for _ in range(2) for batch in loader]

    assert steps == list(range(5))


@pytest.mark.parametrize(
    ("existing", "context"),
    [
        ("refuse", "fork"),
        ("auto", "fork"),
        ("resume", "fork"),
        pytest.param("refuse", "spawn", marks=pytest.mark.slow),  # it imports torch anew
    ],
)
def test_workers_do_not_repeat_what_another_training_has_gone_through(
    trainers_service: TrainersService, make_selector: Make, existing: str, context: str
) -> None:
    first = make_selector()
    first.observe(1, {"p0": [1, 0]})
    assert first.flush()
    first.close()
    second = make_selector(existing=existing)
    dataset = PromptDataset(second, PROMPTS, 4, n_steps=2)
    loader: Any = DataLoader(dataset, batch_size=4, num_workers=1, multiprocessing_context=context)

    if existing != "resume":
        with pytest.raises(ConfigurationError, match=r"up to 1 already.* begins at step 0 .*call rewind_to\(-1\)"):
            next(iter(loader))
        second.rewind_to(-1)
        assert second.flush()
    assert [batch["step"].tolist()[0] for batch in loader] == [0, 1]


def test_shards_of_a_batch_are_disjoint_and_make_it_whole(
    trainers_service: TrainersService, make_selector: Make
) -> None:
    selector = make_selector()

    shards = [[IDS[i] for i in PromptSampler(selector, 4, n_steps=1, shard=(k, 2))] for k in range(2)]

    (batch,) = selected(trainers_service, selector.run, 0)
    assert [shards[0][0], shards[1][0], shards[0][1], shards[1][1]] == batch
    assert len(PromptSampler(selector, 4, n_steps=3, shard=(0, 2))) == 6


RANK = """
import sys, torch.distributed
from evenodds import PromptSelector
from evenodds.integrations.torch import ranks

torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
url = sys.argv[1] if rank == 0 else "http://127.0.0.1:9"  # who is not rank 0 needs no way to the service
prompts = [f"p{i}" for i in range(24)]
options = {"outbox": f"{sys.argv[2]}/{rank}", "deadline_seconds": 120, **ranks()}
with PromptSelector(url, sys.argv[3], prompts, **options) as selector:
    for step in range(3):
        print(selector.select(step, 4).prompt_ids, flush=True)
    torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_all_ranks_draw_what_rank_zero_was_given(
    trainers_service: TrainersService, make_selector: Make, tmp_path: Any, unused_port: int
) -> None:
    selector = make_selector()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, trainers_service.base_url, str(tmp_path), selector.run],
            env={
                **os.environ,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(unused_port),
                "RANK": str(rank),
                "WORLD_SIZE": "2",
            },
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]

    said = [process.communicate(timeout=5 * PATIENCE_SECONDS)[0] for process in processes]

    assert [process.returncode for process in processes] == [0, 0]
    assert said[0] == said[1]
    assert said[0].splitlines() == [str(tuple(batch)) for batch in selected(trainers_service, selector.run, 0, 1, 2)]


def test_without_torch_distributed_there_is_one_rank() -> None:
    assert ranks() == {}


def test_what_cannot_be_sampled_is_refused() -> None:
    with PromptSelector(None, "r", ["a", "b"]) as selector:
        with pytest.raises(ConfigurationError, match="batch_size 0 must be at least 1"):
            PromptSampler(selector, 0)
        with pytest.raises(ConfigurationError, match="first_step -1 must be at least 0"):
            PromptDataset(selector, [{}, {}], 1, first_step=-1)
        with pytest.raises(ConfigurationError, match=r"shard \(2, 2\) must be \(k, n\) with 0 <= k < n"):
            PromptSampler(selector, 2, shard=(2, 2))
        with pytest.raises(ConfigurationError, match="rows: 1, but the selector has 2 prompts"):
            PromptDataset(selector, [{}], 1)
        with pytest.raises(ConfigurationError, match="state: it is not what state_dict returned"):
            PromptSampler(selector, 2).load_state_dict({})
        with pytest.raises(TypeError, match="no length without n_steps"):
            len(PromptSampler(selector, 2))
