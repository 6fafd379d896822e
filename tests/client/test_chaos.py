"""A service that is slow, dead, wrong or restarted: the loop goes on in time, and every outcome counts once."""

from __future__ import annotations

import itertools
import json
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import pytest
from benchmarks.bad_weather import Town
from tests.client.proxy import MODES, SLOW_SECONDS, Mode, Proxy, proxy_before
from tests.waiting import PATIENCE_SECONDS, until

from evenodds import Client, PromptSelector

if TYPE_CHECKING:
    from tests.conftest import Service

N_PROMPTS = 60
PROMPTS = [{"prompt_id": f"p{i}", "text": f"What is {i} + {i}?"} for i in range(N_PROMPTS)]
IDS = [prompt["prompt_id"] for prompt in PROMPTS]
SETTINGS = {"embedder": "none", "group_size": 4}
DEADLINE_SECONDS = 0.5
Outcome = tuple[str, int, float, int]


def observed_by(client: Client, run: str) -> Counter[Outcome]:
    """All that the service's log holds: (prompt, step, successes, attempts), and how often."""
    return Counter(
        (prompt_id, visit.step, visit.successes, visit.attempts)
        for prompt_id in IDS
        for visit in client.prompt(run, prompt_id).history
    )


@pytest.mark.parametrize(("seed", "rounds"), [(0, 1), pytest.param(1, 3, marks=pytest.mark.slow)])
def test_no_fault_of_the_service_stops_the_loop_or_costs_an_outcome(
    start_service: Callable[[str], Service], tmp_path: Path, caplog: pytest.LogCaptureFixture, seed: int, rounds: int
) -> None:
    database_url = f"sqlite:///{tmp_path}/evenodds.db"
    service = start_service(database_url)
    chance = Random(seed)
    told: list[Outcome] = []
    longest = 0.0
    with proxy_before(service.base_url) as proxy:
        selector = PromptSelector(
            proxy.base_url,
            "chaos",
            PROMPTS,
            run_settings=SETTINGS,
            deadline_seconds=DEADLINE_SECONDS,
            outbox=tmp_path / "outbox",
            prefetch=seed == 1,
        )
        assert selector.wait_until_ready()
        modes = [*MODES, "restarted"] * rounds
        chance.shuffle(modes)
        step = 0
        for mode in modes:
            if mode == "restarted":
                service.stop()
                proxy.mode = "fine"
            else:
                proxy.mode = mode  # type: ignore[assignment]  # one of MODES
            for _ in range(3):
                started = time.monotonic()
                batch = selector.select(step, 6)
                seconds = [time.monotonic() - started]
                outcomes = {prompt_id: [float(chance.random() < 0.5) for _ in range(4)] for prompt_id in batch}
                started = time.monotonic()
                selector.observe(step, outcomes)
                seconds.append(time.monotonic() - started)
                longest = max(longest, *seconds)
                told += [(prompt_id, step, sum(rewards), 4) for prompt_id, rewards in outcomes.items()]
                step += 1
            if mode == "restarted":
                service = start_service(database_url)
                proxy.target = service.base_url
            else:
                until_met(proxy, proxy.mode)
        proxy.mode = "fine"
        proxy.release()

        assert selector.flush(PATIENCE_SECONDS)
        later_steps = itertools.count(step)
        until(lambda: selector.select(next(later_steps), 6).source == "service", "a batch of the service")
        counts = selector.counts()
        selector.close()
    assert longest < SLOW_SECONDS / 10  # a slow reply takes far longer
    assert observed_by(service.client, "chaos") == Counter(told)
    assert service.client.run("chaos").observations == len(told)
    assert counts.uniform_batches > 0
    lines = [line for record in caplog.records if (line := record.getMessage()).startswith("Even Odds at")]
    kinds = ["answers again for run" in line for line in lines]  # the others are of the disk, which may be slow
    assert kinds == [i % 2 == 1 for i in range(len(kinds))]  # a warning, a note, a warning, a note


def until_met(proxy: Proxy, mode: Mode) -> None:
    """Wait until the proxy has treated a call in this way."""
    calls = ("observe", "select_batch", "prompts")
    until(lambda: any(proxy.met[mode, call] for call in calls), f"a call that the proxy treats as {mode!r}")


CRASH = """
import sys
from evenodds import PromptSelector

base_url, outbox, stop = sys.argv[1:]
# A disk that is slower than the deadline keeps nothing in time, and the selector says so: it is not what is tried here.
selector = PromptSelector(base_url, "chaos", [f"p{i}" for i in range(60)], outbox=outbox, deadline_seconds=60.0)
for step in range(10_000):
    batch = selector.select(step, 4)
    selector.observe(step, {prompt_id: [1, 0] for prompt_id in batch})
    for prompt_id in batch:
        print(prompt_id, step, flush=True)
"""


def test_a_trainer_that_is_killed_has_lost_nothing_that_it_observed(
    start_service: Callable[[str], Service], tmp_path: Path
) -> None:
    service = start_service(f"sqlite:///{tmp_path}/evenodds.db")
    service.client.put_run("chaos", embedder="none")
    service.client.add_prompts("chaos", PROMPTS)
    told: Counter[Outcome] = Counter()
    with proxy_before(service.base_url) as proxy:
        modes: tuple[Mode, ...] = ("lost reply", "dead", "fine")
        for mode in modes:
            proxy.mode = mode
            trainer = subprocess.Popen(
                [sys.executable, "-c", CRASH, proxy.base_url, str(tmp_path / "outbox"), mode],
                stdout=subprocess.PIPE,
                text=True,
            )
            assert trainer.stdout is not None
            lines = [trainer.stdout.readline() for _ in range(24)]
            trainer.send_signal(signal.SIGKILL)
            lines += trainer.stdout.read().splitlines(keepends=True)
            trainer.stdout.close()
            trainer.wait()
            said = [line.split() for line in lines if line.endswith("\n")]
            told.update((prompt_id, int(step), 1.0, 2) for prompt_id, step in said)
        service.client.run("chaos")

        with PromptSelector(proxy.base_url, "chaos", IDS, outbox=tmp_path / "outbox") as next_trainer:
            assert next_trainer.flush(PATIENCE_SECONDS)

    kept = observed_by(service.client, "chaos")
    assert told - kept == Counter()
    assert sum((kept - told).values()) <= 3 * 4  # observed, but killed before it could say so


PREEMPTED = """
import json, os, random, sys
from pathlib import Path
from evenodds import PromptSelector

base_url, folder = sys.argv[1], Path(sys.argv[2])
checkpoint = folder / "checkpoint.json"
selector = PromptSelector(
    base_url,
    "preempted",
    [{"prompt_id": f"p{i}", "text": f"What is {i} + {i}?"} for i in range(60)],
    run_settings={"embedder": "none", "group_size": 4},
    outbox=folder / "outbox",
    deadline_seconds=60.0,
)
step, told = 0, []
if checkpoint.exists():
    state = json.loads(checkpoint.read_text())
    step, told = state["step"], state["told"]
    selector.load_state_dict(state["selector"])
while True:
    written = checkpoint.with_suffix(".new")
    written.write_text(json.dumps({"step": step, "told": told, "selector": selector.state_dict(step=step)}))
    os.replace(written, checkpoint)
    print(step, flush=True)
    step += 1
    outcomes = {prompt_id: [float(random.random() < 0.5) for _ in range(4)] for prompt_id in selector.select(step, 6)}
    selector.observe(step, outcomes)
    told += [(prompt_id, step, sum(rewards), 4) for prompt_id, rewards in outcomes.items()]
"""


@pytest.mark.parametrize("times", [3, pytest.param(100, marks=pytest.mark.slow)])
def test_a_trainer_and_its_service_that_are_killed_together_go_on_from_the_trainers_checkpoint(
    tmp_path: Path, times: int
) -> None:
    chance = Random(times)
    checkpoint = tmp_path / "checkpoint.json"
    town = Town(f"sqlite:///{tmp_path}/evenodds.db", tmp_path)
    reached = 0
    try:
        for _ in range(times):
            town.start("serve")
            trainer = subprocess.Popen(
                [sys.executable, "-c", PREEMPTED, town.base_url, str(tmp_path)], stdout=subprocess.PIPE, text=True
            )
            assert trainer.stdout is not None
            said = [trainer.stdout.readline() for _ in range(chance.randint(2, 5))]
            time.sleep(chance.uniform(0.0, 0.03))  # somewhere within a step
            trainer.kill()
            town.kill("serve")
            trainer.stdout.close()
            trainer.wait()
            assert int(said[0]) >= reached  # it began where its checkpoint was
            reached = int(said[-1])
        town.start("serve")
        state = json.loads(checkpoint.read_text())
        with (
            Client(town.base_url) as client,
            PromptSelector(
                town.base_url, "preempted", PROMPTS, outbox=tmp_path / "outbox", deadline_seconds=PATIENCE_SECONDS
            ) as selector,
        ):
            selector.load_state_dict(state["selector"])
            batch = selector.select(state["step"] + 1, 6)
            assert selector.flush(PATIENCE_SECONDS)
            kept = observed_by(client, "preempted")
            n_observations = client.run("preempted").observations
    finally:
        town.stop()

    assert batch.source == "service"
    assert kept == Counter(tuple(outcome) for outcome in state["told"])
    assert n_observations == len(state["told"]) >= 6 * times
