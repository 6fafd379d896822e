"""A trainer's loop with `PromptSelector`, over a real service: what is chosen, what is remembered, what is said."""

from __future__ import annotations

import itertools
import json
import logging
import multiprocessing
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from benchmarks.latency import service as served
from tests.client.proxy import SLOW_SECONDS, proxy_before
from tests.client.training.child import observe_in_child
from tests.client.training.ranks import broadcast_from_rank_zero
from tests.waiting import PATIENCE_SECONDS, until

from evenodds import Batch, Client, ConfigurationError, InvalidRequest, PromptSelector
from evenodds.schemas import Observation

if TYPE_CHECKING:
    from tests.conftest import Service

_numbers = itertools.count(1)
PROMPTS = [{"prompt_id": f"p{i}", "text": f"What is {i} + {i}?"} for i in range(40)]
IDS = [prompt["prompt_id"] for prompt in PROMPTS]
NOBODY = "http://127.0.0.1:9"
SETTINGS = {"embedder": "none", "group_size": 4}

Make = Callable[..., PromptSelector]


@pytest.fixture
def make(service: Service, tmp_path: Path) -> Iterator[Make]:
    """Makes selectors of one run, which share an outbox; all are closed after the test."""
    made: list[PromptSelector] = []
    run = f"selected-{next(_numbers)}"

    def make_one(base_url: str | None = service.base_url, **options: Any) -> PromptSelector:
        options = {
            "run_settings": SETTINGS,
            "outbox": tmp_path / "outbox",
            "deadline_seconds": PATIENCE_SECONDS,
            **options,
        }
        made.append(PromptSelector(base_url, run, options.pop("prompts", PROMPTS), **options))
        return made[-1]

    yield make_one
    for selector in made:
        selector.close(timeout_seconds=0)


def history(client: Client, selector: PromptSelector) -> list[tuple[str, int, float, int]]:
    """All that the service has observed of the selector's run: (prompt, step, successes, attempts), sorted."""
    return sorted(
        (prompt_id, visit.step, visit.successes, visit.attempts)
        for prompt_id in selector.prompt_ids
        for visit in client.prompt(selector.run, prompt_id).history
    )


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_the_run_is_made_and_its_pool_loaded(service: Service, make: Make) -> None:
    selector = make()

    assert selector.wait_until_ready()

    run = service.client.run(selector.run)
    assert (run.pool_size, run.group_size, run.embedder) == (40, 4, "none")


def test_the_service_chooses_and_learns_what_came_of_it(service: Service, make: Make) -> None:
    selector = make()

    batch = selector.select(3, 5)
    selector.observe(3, {prompt_id: [1, 0, 1, 1] for prompt_id in batch})

    assert selector.flush()
    assert len(set(batch.prompt_ids)) == len(batch) == 5
    assert (batch.source, set(batch.arms)) == ("service", {"policy"})
    assert batch.forecast is not None
    assert 0 <= batch.forecast.informative_share <= 1
    assert history(service.client, selector) == sorted((prompt_id, 3, 3.0, 4) for prompt_id in batch)
    visit = service.client.prompt(selector.run, batch.prompt_ids[0]).history[0]
    assert visit.selection_id == batch.selection_id
    assert selector.counts().delivered == 5


def test_outcomes_may_be_counts_arrays_and_new_prompts(service: Service, make: Make) -> None:
    import numpy as np

    selector = make()

    selector.observe(np.int64(1), {"p0": np.array([0.5, 1.0], dtype=np.float32)})
    selector.observe(1, [{"prompt_id": "p1", "successes": 2, "attempts": 8}])
    selector.observe(1, [{"prompt_id": "new", "text": "What is new?", "rewards": [1]}])

    assert selector.flush()
    assert history(service.client, selector) == [("p0", 1, 1.5, 2), ("p1", 1, 2.0, 8)]
    assert service.client.prompt(selector.run, "new").visits == 1


def test_the_same_seed_gives_the_same_batches(make: Make) -> None:
    def chosen(seed: int, base_url: str | None) -> list[tuple[str, ...]]:
        selector = make(base_url, seed=seed)
        return [selector.select(step, 6).prompt_ids for step in range(3)]

    assert chosen(1, None) == chosen(1, NOBODY)
    assert chosen(1, None) != chosen(2, None)


def test_a_step_asked_for_again_has_its_batch_again(service: Service, make: Make) -> None:
    with proxy_before(service.base_url) as proxy:
        selector = make(proxy.base_url)
        selector.wait_until_ready()
        proxy.mode = "500"
        uniform = selector.select(1, 4)
        proxy.mode = "fine"
        chosen = selector.select(2, 4)

        again = [selector.select(1, 4), selector.select(2, 4)]

        selector.close()
    assert (uniform.source, chosen.source) == ("uniform", "service")
    assert again == [uniform, chosen]


def test_candidates_exclusions_and_groups_are_kept(service: Service, make: Make) -> None:
    prompts = [{**prompt, "category": "even" if i % 2 == 0 else "odd"} for i, prompt in enumerate(PROMPTS)]
    for base_url in (service.base_url, None):
        selector = make(base_url, prompts=prompts)

        among = selector.select(1, 3, candidates=IDS[:5], exclude=IDS[:2])
        odd = selector.select(2, 4, categories={"odd": 1.0})

        assert set(among) == set(IDS[2:5])
        if base_url is not None:
            assert {int(prompt_id[1:]) % 2 for prompt_id in odd} == {1}


def test_offline_is_uniform_silent_and_keeps_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)

    with PromptSelector(None, "offline", IDS, deadline_seconds=PATIENCE_SECONDS) as selector:
        batch = selector.select(0, 8)
        selector.observe(0, {prompt_id: [1.0] for prompt_id in batch})

        counts = selector.counts()

    assert (batch.source, set(batch.arms), batch.forecast) == ("uniform", {"uniform"}, None)
    assert (counts.uniform_batches, counts.observed, counts.delivered) == (1, 8, 0)
    assert warnings(caplog) == []
    assert list(tmp_path.iterdir()) == []


def test_what_was_observed_offline_is_delivered_by_a_later_selector(service: Service, make: Make) -> None:
    offline = make(None)
    offline.observe(7, {"p3": [1, 0]})
    offline.close()

    selector = make()

    assert selector.flush()
    assert history(service.client, selector) == [("p3", 7, 1.0, 2)]


def test_a_dead_service_costs_one_warning_and_its_recovery_one_note(
    service: Service, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    with proxy_before(service.base_url) as proxy:
        selector = make(proxy.base_url)
        selector.wait_until_ready()
        proxy.mode = "dead"
        for step in range(4):
            selector.observe(step, {prompt_id: [1, 0, 1, 0] for prompt_id in selector.select(step, 4)})
        during = warnings(caplog)

        proxy.mode = "fine"
        after = selector.select(4, 4)
        assert selector.flush()

        selector.close()
    assert len(during) == 1
    assert proxy.base_url in during[0]
    assert "batches are drawn uniformly, and outcomes are kept" in during[0]
    assert after.source == "service"
    assert len(history(service.client, selector)) == 16
    assert warnings(caplog)[1:] == [
        f"Even Odds at {proxy.base_url} answers again for run {selector.run!r}; 4 batches were uniform meanwhile"
    ]


def test_a_call_takes_no_longer_than_the_deadline(service: Service, make: Make) -> None:
    with proxy_before(service.base_url) as proxy:
        selector = make(proxy.base_url, deadline_seconds=0.2)
        selector.wait_until_ready()
        proxy.mode = "slow"
        started = time.monotonic()

        for step in range(6):
            selector.observe(step, {prompt_id: [1, 0] for prompt_id in selector.select(step, 4)})
            selector.state_dict()

        seconds = time.monotonic() - started
        selector.close(timeout_seconds=0)
    assert seconds < SLOW_SECONDS / 10  # one request alone is held up for that long


@pytest.mark.parametrize("kind", ["mappings", "ids"])
def test_a_filtered_data_set_is_chosen_from_and_nothing_else(
    service: Service, make: Make, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    make().wait_until_ready()
    selector = make(prompts=PROMPTS[::2] if kind == "mappings" else IDS[::2])
    assert selector.wait_until_ready()

    batches = [selector.select(step, 3, exclude=["p0"]) for step in range(5)]

    assert {batch.source for batch in batches} == {"service"}
    assert {prompt_id for batch in batches for prompt_id in batch} <= set(IDS[2::2])
    assert warnings(caplog) == []


def test_a_run_to_learn_from_that_does_not_exist_costs_a_warning_and_nothing_else(
    service: Service, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    selector = make(run_settings={**SETTINGS, "learn_from": ["no-such-run"]})
    assert selector.wait_until_ready()
    selector.set_group_size(8)

    batch = selector.select(0, 4)
    selector.observe(0, {prompt_id: [1, 0] for prompt_id in batch})

    assert selector.flush()
    until(lambda: service.client.run(selector.run).group_size == 8, "the changed settings")
    assert batch.source == "service"
    assert len(history(service.client, selector)) == 4
    said = [line for line in warnings(caplog) if "learn_from" in line]
    assert len(said) == 1
    assert "refused run_settings['learn_from'] ['no-such-run'], and the run goes on without it: learn_from:" in said[0]
    assert "run 'no-such-run' does not exist: correct the name" in said[0]


def test_prompts_that_others_add_meanwhile_cost_one_batch_at_most(service: Service, make: Make) -> None:
    selector = make(prompts=PROMPTS[:4])
    assert selector.wait_until_ready()
    service.client.add_prompts(selector.run, PROMPTS[4:])

    def is_of_the_service(step: int) -> bool:
        return selector.select(step, 4).source == "service"

    steps = itertools.count()
    until(lambda: is_of_the_service(next(steps)), "a batch of the service")
    assert all(is_of_the_service(next(steps)) for _ in range(5))
    assert selector.counts().uniform_batches <= next(steps) - 6


def test_one_changed_text_is_named_and_all_other_prompts_are_loaded(
    service: Service, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    make(prompts=PROMPTS[:10]).wait_until_ready()

    selector = make(prompts=[{"prompt_id": "p3", "text": "What is three and three?"}, *PROMPTS[4:20]])

    assert selector.wait_until_ready()
    assert service.client.run(selector.run).pool_size == 20
    assert service.client.prompt(selector.run, "p3").text == "What is 3 + 3?"
    (warning,) = warnings(caplog)
    assert "1 of 17 prompts have changed since the pool was loaded" in warning
    assert "'p3' (another text). Give a changed prompt another prompt_id" in warning
    assert selector.select(1, 12).source == "service"


def test_readiness_is_told_only_where_all_prompts_are_there(
    service: Service, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    make().wait_until_ready()

    assert not make(prompts=["p0", "p1", "elsewhere"]).wait_until_ready()
    assert "the pool lacks 1 of this trainer's 3 prompts" in warnings(caplog)[0]
    assert "'elsewhere' ...; give the selector their texts" in warnings(caplog)[0]
    assert not make(run_settings={"embedder": "caller"}).wait_until_ready()
    assert "the service refused to change the run or its pool, and keeps them as they are" in warnings(caplog)[1]
    assert not make(NOBODY, prompts=["p0"], run_settings=None).wait_until_ready(0.5)


@pytest.mark.parametrize("kind", ["ids", "a refused pool"])
def test_a_pool_of_the_same_size_is_not_taken_for_the_trainers_own(
    service: Service, make: Make, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    make().wait_until_ready()
    renamed = [*PROMPTS[:-1], {"prompt_id": "renamed", "text": "What is new?"}]
    if kind == "ids":
        selector = make(prompts=[prompt["prompt_id"] for prompt in renamed])
    else:
        selector = make(prompts=renamed, run_settings={"embedder": "caller"})

    assert not selector.wait_until_ready()

    assert any("lacks 1 of this trainer's 40 prompts" in said and "'renamed'" in said for said in warnings(caplog))
    batch = selector.select(0, 39, exclude=["renamed"])
    assert batch.source == "service"
    assert "p39" not in batch


def test_a_second_training_under_a_name_is_refused_until_it_says_what_it_wants(
    service: Service, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    first = make()
    lived = [first.select(step, 4).prompt_ids for step in range(3)]
    for step, chosen in enumerate(lived):
        first.observe(step, {prompt_id: [1, 0] for prompt_id in chosen})
    assert first.flush()
    first.close()

    refused = make()
    with pytest.raises(
        ConfigurationError, match=r"has gone through steps up to 2 already, and this training begins at"
    ):
        refused.select(0, 4)
    with pytest.raises(ConfigurationError, match="existing: 'auto' forgets everything from step 0 on, 'resume'"):
        refused.select(0, 4)
    refused.close()
    resumed = make(existing="resume")
    assert resumed.select(0, 4).prompt_ids == lived[0]
    resumed.close()
    assert warnings(caplog) == []
    auto = make(existing="auto")
    batch = auto.select(0, 4)
    auto.observe(0, {prompt_id: [1, 1] for prompt_id in batch})
    assert auto.flush()

    assert batch.reply is not None
    assert not batch.reply.replayed
    assert history(service.client, auto) == sorted((prompt_id, 0, 2.0, 2) for prompt_id in batch)
    assert "what came from step 0 on is forgotten (existing='auto')" in warnings(caplog)[0]


def test_a_second_training_that_began_without_the_service_goes_on_and_keeps_its_outcomes_apart(
    service: Service, make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = make(outbox=tmp_path / "another machine")
    first.observe(0, {"p0": [1, 0]})
    first.observe(3, {"p1": [1, 0]})
    assert first.flush()
    first.close()
    from_rank_zero = broadcast_from_rank_zero()

    with proxy_before(service.base_url) as proxy:
        proxy.mode = "dead"
        second = make(proxy.base_url, broadcast=from_rank_zero)
        second.observe(0, {prompt_id: [1, 1] for prompt_id in second.select(0, 4)})
        proxy.mode = "fine"
        assert second.wait_until_ready()
        other = make(rank=1, broadcast=from_rank_zero, outbox=tmp_path / "rank 1")
        for step in (1, 2):
            batch = second.select(step, 4)
            second.observe(step, {batch.prompt_ids[0]: [1, 1]})
            other.observe(step, {other.select(step, 4).prompt_ids[1]: [0, 1]})
        assert not second.flush()
        assert not other.flush()

        assert batch.source == "uniform"
        assert history(service.client, first) == [("p0", 0, 1.0, 2), ("p1", 3, 1.0, 2)]
        assert [delivery.step for delivery, _ in second.refusals()] == [0, 1, 2]
        assert [delivery.step for delivery, _ in other.refusals()] == [1, 2]
        assert (second.counts().refused, second.metrics("")["undelivered"]) == (0, 6)
        second.close()
    said = next(line for line in warnings(caplog) if "existing='refuse'" in line)
    assert "has gone through steps up to 3 already, and this training begins at step 0" in said
    assert "The training goes on with uniform batches, and its outcomes stay in the outbox" in said

    later = make()
    assert later.flush()
    assert [delivery.step for delivery, _ in later.refusals()] == [0, 1, 2]
    later.close()
    mixed_in = make(existing="resume")
    assert mixed_in.flush()
    assert len(history(service.client, mixed_in)) == 2 + 6


@pytest.mark.parametrize("existing", ["refuse", "auto"])
def test_what_a_crash_left_in_the_outbox_is_of_the_runs_past_too(
    service: Service, make: Make, existing: str, caplog: pytest.LogCaptureFixture
) -> None:
    with proxy_before(service.base_url) as proxy:
        crashed = make(proxy.base_url)
        crashed.wait_until_ready()
        proxy.mode = "dead"
        crashed.observe(0, {"p0": [1, 0]})
        crashed.observe(1, {"p1": [1, 0]})
        crashed.close(timeout_seconds=0)

    again = make(existing=existing)
    if existing == "refuse":
        with pytest.raises(ConfigurationError, match="steps up to 1 already, and this training begins at step 0"):
            again.select(0, 4)
        return
    batch = again.select(0, 4)
    again.observe(0, {prompt_id: [1, 1] for prompt_id in batch})
    assert again.flush()

    assert history(service.client, again) == sorted((prompt_id, 0, 2.0, 2) for prompt_id in batch)
    assert any("what came from step 0 on is forgotten" in said for said in warnings(caplog))


def test_a_training_that_goes_on_behind_the_head_is_none_of_the_runs_past(make: Make) -> None:
    first = make()
    first.observe(2, {"p0": [1]})
    assert first.flush()
    first.close()

    assert make().select(3, 4).source == "service"


def test_what_is_no_observation_is_left_out_and_said_once(
    service: Service, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    selector = make()

    selector.observe(1, {"p0": [1, 0], "who": [1]})
    selector.observe(2, [{"prompt_id": "p1", "successes": 3, "attempts": 2}])

    assert selector.flush()
    assert history(service.client, selector) == [("p0", 1, 1.0, 2)]
    assert (selector.counts().observed, selector.counts().left_out) == (1, 2)
    (warning,) = warnings(caplog)
    assert "1 of 2 outcomes of step 1 are not valid" in warning
    assert "outcomes[1].prompt_id: 'who' is not among this selector's prompts" in warning


def test_an_attempt_without_a_reward_is_left_out_and_no_other(service: Service, make: Make) -> None:
    selector = make()

    rewards: dict[str, list[float | None]] = {"p0": [1, None, 0, float("nan")], "p1": [None], "p2": []}
    selector.observe(1, rewards)

    assert selector.flush()
    assert history(service.client, selector) == [("p0", 1, 1.0, 2)]
    assert (selector.counts().observed, selector.counts().left_out, selector.counts().without_reward) == (1, 0, 3)


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (-1, r"outcomes\[1\].rewards: the reward -1 of prompt 'p1' is outside \[0, 1\]: map rewards"),
        (1.4, "reward_range, for TRL also success="),
        (float("inf"), r"the reward inf of prompt 'p1' is outside \[0, 1\]"),
        ("one", r"outcomes\[1\].rewards: the reward 'one' is not a number, of prompt 'p1'"),
    ],
)
def test_a_reward_that_is_none_raises_and_nothing_of_the_step_is_kept(
    service: Service, make: Make, reward: Any, message: str
) -> None:
    selector = make()
    assert selector.wait_until_ready()

    with pytest.raises(InvalidRequest, match=message):
        selector.observe(1, {"p0": [1, 0], "p1": [1, reward]})

    assert selector.flush()
    assert history(service.client, selector) == []


@pytest.mark.parametrize(
    ("outcomes", "message"),
    [
        ({"p0": 1.0}, r"outcomes\[0\].rewards: 1.0 of prompt 'p0' is no list of rewards: send one reward for each"),
        ({"p0": "10"}, r"outcomes\[0\].rewards: '10' of prompt 'p0' is no list of rewards"),
        ([{"prompt_id": "p1", "rewards": True}], r"outcomes\[0\].rewards: True of prompt 'p1' is no list of rewards"),
        (1.0, "outcomes: 1.0 is neither rewards by prompt id nor a list of observations"),
        ("p0", "outcomes: 'p0' is neither"),
        (Observation(prompt_id="p0", rewards=(1.0,)), "outcomes: Observation.* is neither"),
    ],
)
def test_what_is_no_list_of_rewards_raises_and_says_what_to_send(make: Make, outcomes: Any, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        make(None).observe(1, outcomes)


def test_a_reward_that_misses_its_end_by_rounding_counts_as_the_end(service: Service, make: Make) -> None:
    selector = make()

    selector.observe(1, {"p0": [1 + 1e-9, -1e-9]})

    assert selector.flush()
    assert history(service.client, selector) == [("p0", 1, 1.0, 2)]


def test_what_the_service_refuses_holds_nothing_up_and_is_tried_at_the_next_start(
    service: Service, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    first = make()
    first.wait_until_ready()
    first.close()
    selector = make(prompts=[*IDS, "later"], run_settings=None)
    selector.observe(1, {"later": [1]})
    selector.observe(1, {"p0": [1]})
    assert selector.flush()
    ((refused, reason),) = selector.refusals()
    assert refused.step == 1
    assert "'later'" in reason
    assert selector.counts().refused == 1
    assert "service refused the observe call of step 1" in warnings(caplog)[-1]
    assert "tried again at the next start, when the pool may have their prompts" in warnings(caplog)[-1]
    selector.close()
    service.client.add_prompts(selector.run, [{"prompt_id": "later", "text": "Later?"}])

    again = make(prompts=[*IDS, "later"])

    assert again.flush()
    assert history(service.client, again) == [("later", 1, 1.0, 1), ("p0", 1, 1.0, 1)]


def test_a_prompt_that_the_pool_lacks_takes_no_other_outcome_along(
    service: Service, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    loader = make()
    loader.wait_until_ready()
    loader.close()
    known = [f"p{i}" for i in range(9)]
    selector = make(prompts=[*IDS, "new", "newer"], run_settings=None)
    for step in (1, 2):
        selector.observe(step, {prompt_id: [1, 0] for prompt_id in (*known[:4], "new", *known[4:], "newer")})

    assert selector.flush()

    assert history(service.client, loader) == sorted((i, step, 1.0, 2) for i in known for step in (1, 2))
    refused = [(delivery.step, json.loads(delivery.body)) for delivery, _ in selector.refusals()]
    assert sorted((step, item["prompt_id"]) for step, (item,) in refused) == [
        (step, prompt_id) for step in (1, 2) for prompt_id in ("new", "newer")
    ]
    assert (selector.counts().delivered, selector.counts().refused) == (18, 4)
    (said,) = [line for line in warnings(caplog) if "refused" in line]
    assert "2 prompts are not in the pool" in said
    assert "'new', 'newer'" in said
    selector.close()
    service.client.add_prompts(selector.run, [{"prompt_id": "newer", "text": "Newer?"}])
    again = make(prompts=[*IDS, "new", "newer"], run_settings=None)
    assert again.flush()
    assert again.counts().delivered == 2
    assert [visit.step for visit in service.client.prompt(again.run, "newer").history] == [1, 2]


def test_what_the_pool_lacks_altogether_is_asked_about_once(service: Service, make: Make) -> None:
    loader = make()
    loader.wait_until_ready()
    loader.close()
    with proxy_before(service.base_url) as proxy:
        selector = make(proxy.base_url, prompts=[*IDS, "new", "newer"], run_settings=None)
        for step in range(5):
            selector.observe(step, {"new": [1], "newer": [0]})

        assert selector.flush()

        assert proxy.met["fine", "observe"] == 3 + 4
        assert selector.counts().refused == 10
        selector.close()


def test_a_run_that_the_service_has_lost_is_made_again(service: Service, make: Make) -> None:
    selector = make()
    selector.wait_until_ready()
    service.client.delete_run(selector.run)

    selector.observe(2, {"p1": [1]})

    assert selector.flush()
    assert service.client.run(selector.run).pool_size == 40
    assert history(service.client, selector) == [("p1", 2, 1.0, 1)]


def test_the_next_batch_is_asked_for_when_the_outcomes_are_delivered(service: Service, make: Make) -> None:
    with proxy_before(service.base_url) as proxy:
        selector = make(proxy.base_url, prefetch=True)
        selector.observe(1, {prompt_id: [1, 0] for prompt_id in selector.select(1, 4)})
        until(lambda: service.client.run(selector.run).log_position == 4, "pool, selection, outcomes, selection")
        proxy.mode = "dead"

        batch = selector.select(2, 4)

        selector.close()
    assert batch.source == "service"
    assert batch.reply is not None
    assert batch.reply.log_position == 3  # it knows the outcomes of step 1


def test_a_batch_may_be_asked_for_ahead_of_time(service: Service, make: Make) -> None:
    with proxy_before(service.base_url) as proxy:
        selector = make(proxy.base_url)
        selector.wait_until_ready()
        selector.prefetch(9, 4)
        until(lambda: proxy.met["fine", "select_batch"] == 1, "the request for the batch")

        batch = selector.select(9, 4)

        selector.close()
    assert batch.source == "service"
    assert proxy.met["fine", "select_batch"] == 1


def mixed(selector: PromptSelector, batch: Batch) -> dict[str, list[int]]:
    """Outcomes of a batch: every other prompt of the pool is solved half of the time, the others never."""
    return {i: [1, 0, 1, 0] if selector.prompt_ids.index(i) % 2 else [0, 0, 0, 0] for i in batch}


def test_a_filled_batch_is_reported_whole_and_trained_on_where_it_teaches(service: Service, make: Make) -> None:
    selector = make()
    selector.wait_until_ready()
    batch = selector.select_informative(1, 5, update_cost=2.0)

    teaching = selector.informative(batch, mixed(selector, batch))

    assert batch.fill is not None
    assert batch.fill.informative_groups == 5
    assert batch.fill.pays is not None
    assert 5 <= len(batch) <= 30
    assert list(teaching) == [i for i in batch if IDS.index(i) % 2]
    assert selector.flush()
    assert len(history(service.client, selector)) == len(batch)
    assert selector.select_informative(1, 5, update_cost=2.0) == batch
    assert selector.select(2, 5).fill is None


def test_a_filled_batch_may_be_asked_for_ahead_and_follows_by_itself(service: Service, make: Make) -> None:
    with proxy_before(service.base_url) as proxy:
        selector = make(proxy.base_url, prefetch=True)
        selector.wait_until_ready()
        selector.prefetch(1, informative_groups=4, max_prompts=10)
        until(lambda: proxy.met["fine", "select_batch"] == 1, "the request for the batch")
        first = selector.select_informative(1, 4, max_prompts=10)
        selector.informative(first, mixed(selector, first))
        until(lambda: service.client.run(selector.run).log_position == 4, "pool, selection, outcomes, selection")
        proxy.mode = "dead"

        second = selector.select_informative(2, 4, max_prompts=10)

        selector.close()
    assert first.source == second.source == "service"
    assert second.fill is not None
    assert second.fill.informative_groups == 4


def test_all_ranks_draw_the_same_filled_batch(service: Service, make: Make) -> None:
    from_rank_zero = broadcast_from_rank_zero()

    ranks = [make(rank=rank, broadcast=from_rank_zero) for rank in range(2)]
    ranks[0].wait_until_ready()
    one, other = (selector.select_informative(0, 4) for selector in ranks)

    kept = []
    for rank, selector in enumerate(ranks):
        mine = dict(list(mixed(selector, one).items())[rank::2])
        kept.append(selector.informative(other, mine))

    assert one == other
    assert one.fill is not None
    assert sorted(kept[0] + kept[1]) == sorted(i for i in one if IDS.index(i) % 2)
    assert all(selector.flush() for selector in ranks)
    assert len(history(service.client, ranks[0])) == len(one)


def test_without_the_service_a_filled_batch_has_twice_as_many_prompts(make: Make) -> None:
    selector = make(None)

    assert len(selector.select_informative(1, 5)) == 10
    assert len(selector.select_informative(2, 5, fill_factor=0.5)) == 5
    assert len(selector.select_informative(3, 5, max_prompts=7)) == 7
    assert len(selector.select_informative(4, 30)) == 40


def test_a_trainer_that_needs_so_many_groups_gets_them(make: Make) -> None:
    selector = make(None)
    batch = selector.select(1, 8)
    outcomes = {i: [1, 0] if at in (1, 2, 6) else [1, 1] for at, i in enumerate(batch)}

    assert selector.informative(batch, outcomes, size=2) == (batch.prompt_ids[1], batch.prompt_ids[2])
    assert set(selector.informative(batch, outcomes, size=5)) > {batch.prompt_ids[at] for at in (1, 2, 6)}
    assert len(selector.informative(batch, outcomes, size=9)) == 8
    with pytest.raises(InvalidRequest, match="informative was not sent: size: 0 must be at least 1"):
        selector.informative(batch, outcomes, size=0)


def test_one_rank_asks_and_all_draw_the_same(service: Service, make: Make) -> None:
    from_rank_zero = broadcast_from_rank_zero()

    with proxy_before(service.base_url) as proxy:
        ranks = [make(proxy.base_url, rank=rank, broadcast=from_rank_zero) for rank in range(3)]
        ranks[0].wait_until_ready()

        chosen = [[ranks[rank].select(step, 4) for rank in range(3)] for step in range(2)]
        for step, batches in enumerate(chosen):
            for rank, batch in enumerate(batches):
                ranks[rank].observe(step, {batch.prompt_ids[rank]: [rank == 0]})
        flushed = [selector.flush() for selector in ranks]

        for selector in ranks:
            selector.close()
    assert all(len(set(batches)) == 1 for batches in chosen)
    assert proxy.met["fine", "select_batch"] == 2
    assert proxy.met["fine", "prompts"] == 1
    assert all(flushed)
    assert len(history(service.client, ranks[0])) == 6
    for rank in range(3):  # each reports under the selection of rank 0
        (visit,) = service.client.prompt(ranks[0].run, chosen[0][rank].prompt_ids[rank]).history[-1:]
        assert visit.selection_id == chosen[0][0].selection_id


@pytest.fixture(scope="module")
def own_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a service that is a process of its own: a child would inherit the locks that its threads hold."""
    with served(f"sqlite:///{tmp_path_factory.mktemp('own')}/evenodds.db") as base_url:
        yield base_url


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes_may_use_it(own_process: str, method: str, tmp_path: Path) -> None:
    with (
        Client(own_process) as client,
        PromptSelector(own_process, method, PROMPTS, run_settings=SETTINGS, outbox=tmp_path) as selector,
    ):
        selector.wait_until_ready()
        context: Any = multiprocessing.get_context(method)

        children = [context.Process(target=observe_in_child, args=(selector, step)) for step in (1, 2)]
        for child in children:
            child.start()
        selector.observe(3, {"p0": [0]})
        for child in children:
            child.join(PATIENCE_SECONDS)

        assert [child.exitcode for child in children] == [0, 0]
        assert selector.flush()
        assert sorted(step for _, step, _, _ in history(client, selector)) == [1] * 4 + [2] * 4 + [3]


def test_threads_may_share_one(service: Service, make: Make) -> None:
    selector = make()
    selector.wait_until_ready()

    def train(thread: int) -> None:
        for step in range(thread, 24, 4):
            selector.observe(step, {prompt_id: [1, 0] for prompt_id in selector.select(step, 3)})

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(train, range(4)))

    assert selector.flush()
    assert sorted(step for _, step, _, _ in history(service.client, selector)) == [
        s for s in range(24) for _ in range(3)
    ]
    assert selector.counts().service_batches == 24


PROGRAM = """
import sys
from evenodds import PromptSelector

selector = PromptSelector(sys.argv[1], sys.argv[2], ["p0"], outbox=sys.argv[3])
selector.observe(1, {"p0": [1, 0, 0]})
"""


def test_a_program_that_ends_delivers_what_it_observed(service: Service, make: Make, tmp_path: Path) -> None:
    selector = make()
    selector.wait_until_ready()
    selector.close()

    arguments = [service.base_url, selector.run, str(tmp_path / "outbox")]
    subprocess.run([sys.executable, "-W", "error", "-c", PROGRAM, *arguments], check=True)

    assert history(service.client, selector) == [("p0", 1, 1.0, 3)]


def test_a_closed_selector_says_so(make: Make) -> None:
    selector = make(None)
    selector.close()
    selector.close()

    for call in (lambda: selector.select(1, 1), lambda: selector.observe(1, {}), selector.state_dict, selector.counts):
        with pytest.raises(ConfigurationError, match="is closed: make a new one"):
            call()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"run": "a b"}, "run: String should match pattern"),
        ({"prompts": []}, "prompts: at least 1 prompt is needed, got none"),
        ({"prompts": "p0"}, "prompts: a list of prompts is needed, got a single prompt"),
        ({"prompts": ["a", "b", "a"]}, "prompts: the prompt_id 'a' stands there 2 times: ids must differ"),
        ({"prompts": ["a", {"prompt_id": "b"}]}, "prompts: 1 are mappings and 1 ids: send one kind"),
        ({"prompts": [{"text": "x"}]}, r"prompts\[0\].prompt_id: missing; a trainer's prompts need ids"),
        ({"prompts": [{"prompt_id": "a", "txt": "x"}]}, r"prompts\[0\].txt: there is no field of this name"),
        ({"seed": -1}, r"seed -1 must be in \[0, 2\*\*63\)"),
        ({"rank": -1}, "rank -1 must be at least 0"),
        ({"existing": "rewind"}, "existing 'rewind' must be one of refuse, auto, resume"),
        ({"deadline_seconds": 0.0}, "deadline_seconds 0.0 must be finite and above 0"),
        ({"base_url": "ftp://x"}, "base_url 'ftp://x' must start with http:// or https://"),
        ({"run_settings": {"group_size": 0}}, "run_settings.group_size: Input should be greater than or equal to 1"),
    ],
)
def test_a_mistake_in_the_program_raises_at_once(options: dict[str, Any], message: str) -> None:
    arguments = {"base_url": None, "run": "r", "prompts": ["a"], **options}

    with pytest.raises(ConfigurationError, match=message):
        PromptSelector(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"step": -1}, "select was not sent: step: Input should be greater than or equal to 0, got -1"),
        ({"step": 1.5}, "step: Input should be a valid integer"),
        ({"batch_size": 0}, "batch_size: Input should be greater than or equal to 1, got 0"),
        ({"batch_size": 41}, "batch_size: 41 prompts asked for, 40 to choose from"),
        ({"exclude": IDS[:38]}, "batch_size: 4 prompts asked for, 2 to choose from"),
        ({"candidates": ["who", *IDS]}, "candidates: not among this selector's prompts: 'who'; leave"),
    ],
)
def test_a_batch_that_can_never_be_had_raises(make: Make, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        make(None).select(**{"step": 1, "batch_size": 4, **arguments})


def test_a_step_that_is_none_raises(make: Make) -> None:
    with pytest.raises(InvalidRequest, match="observe was not sent: step: Input should be less than"):
        make(None).observe(2**63, {"p0": [1]})


def test_it_survives_pickling(make: Make) -> None:
    selector = make(None, seed=5)

    copy = pickle.loads(pickle.dumps(selector))

    assert copy.select(1, 4) == selector.select(1, 4)
    copy.close()


def test_the_figures_of_a_step_are_those_of_its_batch_and_outcomes(service: Service, make: Make) -> None:
    selector = make()
    assert selector.wait_until_ready()
    before = selector.metrics()
    batch = selector.select(0, 4)
    silent, *others = batch.prompt_ids

    selector.observe(0, {silent: [1, 1]})
    more: dict[str, list[float | None]] = {prompt_id: [1, 0] for prompt_id in others[:2]}
    more[silent] = [1, 1 + 1e-9]
    selector.observe(0, more)
    selector.observe(0, [{"prompt_id": others[2], "successes": 4, "attempts": 4}])
    assert selector.flush()
    figures = selector.metrics(prefix="")

    assert before == {}
    assert batch.forecast is not None
    assert figures.pop("select_seconds") < PATIENCE_SECONDS
    assert figures == {
        "coverage": 4 / 40,
        "from_service": 1.0,
        "informative_share": 0.5,
        "forecast_share": batch.forecast.informative_share,
        "forecast_error": 0.5 - batch.forecast.informative_share,
        "uniform_batches": 0.0,
        "undelivered": 0.0,
    }
