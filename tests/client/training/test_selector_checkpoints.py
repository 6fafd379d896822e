"""The trainer's checkpoint and the service's memory go back together."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.client.proxy import proxy_before
from tests.client.training.ranks import broadcast_from_rank_zero
from tests.waiting import PATIENCE_SECONDS, until

from evenodds import ConfigurationError, InvalidRequest, PromptSelector

if TYPE_CHECKING:
    from tests.conftest import Service

_numbers = itertools.count(1)
PROMPTS = [{"prompt_id": f"p{i}", "text": f"What is {i} + {i}?"} for i in range(20)]
IDS = [str(prompt["prompt_id"]) for prompt in PROMPTS]
Make = Callable[..., PromptSelector]


@pytest.fixture
def make(service: Service, tmp_path: Path) -> Iterator[Make]:
    """Makes one trainer after another for the same run."""
    made: list[PromptSelector] = []
    run = f"resumed-{next(_numbers)}"

    def make_one(base_url: str = service.base_url, **options: Any) -> PromptSelector:
        options = {"outbox": tmp_path / "outbox", "deadline_seconds": PATIENCE_SECONDS, **options}
        made.append(PromptSelector(base_url, run, PROMPTS, run_settings={"embedder": "none"}, **options))
        assert made[-1].wait_until_ready()
        return made[-1]

    yield make_one
    for selector in made:
        selector.close(timeout_seconds=0)


def train(selector: PromptSelector, *steps: int) -> list[tuple[str, ...]]:
    """The batches of these steps; every attempt at each succeeds."""
    batches = []
    for step in steps:
        batch = selector.select(step, 4)
        selector.observe(step, {prompt_id: [1, 1] for prompt_id in batch})
        batches.append(batch.prompt_ids)
    return batches


def steps_observed(service: Service, run: str) -> list[int]:
    prompts = [service.client.prompt(run, str(prompt["prompt_id"])) for prompt in PROMPTS]
    return sorted(visit.step for prompt in prompts for visit in prompt.history)


def test_the_service_forgets_what_came_after_the_checkpoint(service: Service, make: Make) -> None:
    first = make()
    train(first, 1, 2)
    assert first.flush()
    checkpoint = json.loads(json.dumps(first.state_dict()))
    train(first, 3, 4)
    assert first.flush()
    first.close()

    second = make()
    second.load_state_dict(checkpoint)
    batch = second.select(3, 4)

    assert batch.source == "service"
    assert steps_observed(service, second.run) == [1] * 4 + [2] * 4
    assert second.state_dict() == checkpoint


def test_a_resumed_training_sees_the_batches_it_would_have_seen(service: Service, make: Make) -> None:
    first = make(seed=3)
    train(first, 1, 2)
    assert first.flush()
    checkpoint = first.state_dict()
    lived = []
    for step in (3, 4):
        lived += train(first, step)
        assert first.flush()
    first.close()

    second = make(seed=4)  # the checkpoint's seed counts
    second.load_state_dict(checkpoint)
    lived_again = []
    for step in (3, 4):
        lived_again += train(second, step)
        assert second.flush()

    assert lived_again == lived
    assert steps_observed(service, second.run) == [1] * 4 + [2] * 4 + [3] * 4 + [4] * 4


def test_what_was_not_delivered_before_the_crash_is_forgotten_or_delivered_as_the_checkpoint_says(
    service: Service, make: Make
) -> None:
    with proxy_before(service.base_url) as proxy:
        first = make(proxy.base_url)
        proxy.mode = "dead"
        train(first, 1, 2)
        checkpoint = first.state_dict()
        train(first, 3, 4)
        first.close(timeout_seconds=0)

    second = make()
    second.load_state_dict(checkpoint)
    train(second, 3)

    assert second.flush()
    assert steps_observed(service, second.run) == [1] * 4 + [2] * 4 + [3] * 4


def test_the_checkpoint_is_whole_where_the_outbox_is_lost(service: Service, make: Make, tmp_path: Path) -> None:
    with proxy_before(service.base_url) as proxy:
        first = make(proxy.base_url)
        train(first, 1)
        assert first.flush()
        proxy.mode = "lost reply"  # the service knows them, this trainer does not know that it does
        first.observe(2, {"p0": [1, 0]})
        until(lambda: proxy.met["lost reply", "observe"] > 0, "the outcomes at the service")
        checkpoint = first.state_dict()
        first.close(timeout_seconds=0)

    second = make(outbox=tmp_path / "another machine")
    second.load_state_dict(checkpoint)

    assert len(checkpoint["undelivered"]) == 1
    assert second.flush()
    assert steps_observed(service, second.run) == [1] * 4 + [2]


def test_batches_are_uniform_until_the_service_has_gone_back(service: Service, make: Make) -> None:
    first = make()
    train(first, 1, 2)
    assert first.flush()
    checkpoint = first.state_dict(step=1)
    first.close()
    with proxy_before(service.base_url) as proxy:
        second = make(proxy.base_url)
        proxy.mode = "500"

        second.load_state_dict(checkpoint)
        before = second.select(2, 4)
        proxy.mode = "fine"
        flushed = second.flush()
        after = second.select(3, 4)

        second.close()
    assert flushed
    assert (before.source, after.source) == ("uniform", "service")
    assert steps_observed(service, second.run) == [1] * 4


def test_what_another_rank_reports_before_rank_zero_could_go_back_is_kept(
    service: Service, make: Make, tmp_path: Path
) -> None:
    first = make()
    train(first, 1, 2)
    assert first.flush()
    checkpoint = first.state_dict(step=1)
    first.close()
    from_rank_zero = broadcast_from_rank_zero()

    with proxy_before(service.base_url) as proxy:
        ranks = [
            make(proxy.base_url if rank == 0 else service.base_url, rank=rank, outbox=tmp_path / f"{rank}")
            for rank in (0, 1)
        ]
        for rank, selector in enumerate(ranks):
            selector.use_ranks(rank, from_rank_zero)
        proxy.mode = "dead"
        for selector in ranks:
            selector.load_state_dict(checkpoint)
        batches = [selector.select(2, 4) for selector in ranks]
        ranks[1].observe(2, {batches[1].prompt_ids[0]: [1, 0]})
        assert ranks[1].flush()

        proxy.mode = "fine"
        ranks[0].observe(2, {batches[0].prompt_ids[1]: [1, 0]})
        assert ranks[0].flush()

        ranks[0].close()
    assert batches[0].source == "uniform"
    assert batches[0] == batches[1]
    assert steps_observed(service, first.run) == [1] * 4 + [2] * 2


def test_a_process_that_lives_on_after_its_training_has_gone_back_adds_nothing(
    service: Service, make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hung = make(outbox=tmp_path / "another machine")
    train(hung, 1)
    assert hung.flush()
    resumed = make()
    resumed.load_state_dict(hung.state_dict())
    assert resumed.flush()

    hung.observe(2, {"p0": [1, 0]})  # of a uniform batch, which has no selection
    assert hung.flush()
    train(resumed, 2)
    assert resumed.flush()

    assert steps_observed(service, resumed.run) == [1] * 4 + [2] * 4
    assert hung.counts().refused == 1
    assert "belong to a policy that the run has forgotten" in caplog.records[-1].getMessage()


def test_a_rank_without_broadcast_that_goes_back_is_warned(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint = make().state_dict(step=1)

    make(rank=1).load_state_dict(checkpoint)

    assert "rank 1 has no broadcast" in caplog.records[-1].getMessage()


def test_a_checkpoint_without_a_state_may_be_gone_back_to_by_its_step(service: Service, make: Make) -> None:
    selector = make()
    train(selector, 0, 1, 2)
    assert selector.flush()

    selector.rewind_to(0)
    assert selector.flush()
    after_one = steps_observed(service, selector.run)
    selector.rewind_to(-1)
    assert selector.flush()

    assert after_one == [0] * 4
    assert steps_observed(service, selector.run) == []
    with pytest.raises(InvalidRequest, match="rewind_to was not sent: step"):
        selector.rewind_to(-2)


def test_a_checkpoint_that_the_run_cannot_go_back_to_is_said_and_no_outcome_counts_twice(
    service: Service, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    first = make()
    train(first, 0, 1)
    assert first.flush()
    checkpoint = first.state_dict()
    lived = train(first, 2, 3)
    assert first.flush()
    first.close()
    service.client.delete_prompt(first.run, next(i for i in IDS if not any(i in batch for batch in lived)))
    n_observed = service.client.run(first.run).observations

    second = make()
    second.load_state_dict(checkpoint)
    batches = [second.select(step, 4) for step in (2, 3)]
    for batch in batches:
        second.observe(batch.step, {prompt_id: [1, 1] for prompt_id in batch})

    assert not second.flush()
    assert {batch.source for batch in batches} == {"uniform"}
    assert service.client.run(first.run).observations == n_observed
    assert [(delivery.kind, delivery.step) for delivery, _ in second.refusals()] == [("observe", 2), ("observe", 3)]
    (said,) = [line for record in caplog.records if "cannot go back" in (line := record.getMessage())]
    assert f"run {first.run!r} cannot go back to step 1: its log is compacted up to step 3" in said
    assert "go back to a step from 3 on, or begin a new run, for example as a fork of such a step" in said
    assert "The training goes on with uniform batches, and its outcomes stay in the outbox" in said
    second.close()
    third = make()
    assert third.select(4, 4).source == "service"
    assert third.flush()
    assert len(third.refusals()) == 2
    assert service.client.run(first.run).observations == n_observed


def test_going_back_twice_and_again_is_as_good_as_once(service: Service, make: Make) -> None:
    selector = make()
    train(selector, 1)
    assert selector.flush()
    checkpoint = selector.state_dict()

    for _ in range(3):
        train(selector, 2, 3)
        selector.load_state_dict(checkpoint)
        selector.load_state_dict(checkpoint)

    assert selector.flush()
    assert steps_observed(service, selector.run) == [1] * 4


def test_a_checkpoint_before_anything_was_observed_forgets_nothing(service: Service, make: Make) -> None:
    selector = make()
    checkpoint = selector.state_dict()

    selector.load_state_dict(checkpoint)

    assert checkpoint["step"] is None
    assert selector.select(1, 4).source == "service"


def test_a_checkpoint_before_anything_was_observed_is_no_way_around_existing(
    service: Service, make: Make, tmp_path: Path
) -> None:
    first = make()
    checkpoint = first.state_dict()
    train(first, 0, 1)
    assert first.flush()
    first.close()

    second = make(outbox=tmp_path / "another machine")
    second.load_state_dict(checkpoint)

    with pytest.raises(ConfigurationError, match="steps up to 1 already, and this training begins at step 0"):
        second.select(0, 4)
    assert steps_observed(service, second.run) == [0] * 4 + [1] * 4


def test_a_checkpoint_without_a_step_keeps_what_was_not_delivered(service: Service, make: Make, tmp_path: Path) -> None:
    second = make()
    offline: dict[str, Any] = {"run": second.run, "prompts": PROMPTS, "outbox": tmp_path / "another machine"}
    with PromptSelector(None, **offline) as crashed:
        crashed.observe(3, {"p0": [1, 0]})
    with PromptSelector(None, **offline) as restarted:
        checkpoint = restarted.state_dict()

    second.load_state_dict(checkpoint)

    assert second.flush()
    assert checkpoint["step"] is None
    assert steps_observed(service, second.run) == [3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"run": "other"}, "state: it belongs to run 'other', and this selector's run is 'resumed-"),
        ({"format": 9}, "state: format 9, this release reads format 1"),
        ({"step": "three"}, "state: it is not what state_dict returned"),
        ({"undelivered": [{"kind": "observe"}]}, "state: it is not what state_dict returned"),
    ],
)
def test_a_state_of_something_else_is_refused(make: Make, change: dict[str, Any], message: str) -> None:
    selector = make()

    with pytest.raises(ConfigurationError, match=message):
        selector.load_state_dict({**selector.state_dict(), **change})
    with pytest.raises(ConfigurationError, match="not what state_dict returned"):
        selector.load_state_dict({})
