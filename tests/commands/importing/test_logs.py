"""`evenodds import` of logs and tables, through a real service: what is stored, what is joined, and nothing twice."""

from __future__ import annotations

import itertools
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.commands import written_logs as written
from tests.commands.written_logs import question
from tests.waiting import until

from evenodds_service.__main__ import main

if TYPE_CHECKING:
    from tests.conftest import Service

Q1, Q2, Q3 = question(1), question(2), question(3)
_numbers = itertools.count()

Import = Callable[..., tuple[int, list[str], str]]


@pytest.fixture
def run(service: Service) -> str:
    """A fresh run with two prompts."""
    name = f"imported-log-{next(_numbers)}"
    service.client.put_run(name, embedder="none")
    service.client.add_prompts(name, [{"prompt_id": "one", "text": f" {Q1}\n"}, {"prompt_id": "two", "text": Q2}])
    return name


@pytest.fixture
def load(service: Service, run: str, capsys: pytest.CaptureFixture[str]) -> Import:
    """Imports: the exit status, the lines that were printed, and the last line of standard error."""

    def load(file: Path, *options: str) -> tuple[int, list[str], str]:
        status = main(["import", run, str(file), "--url", service.base_url, *options])
        said = capsys.readouterr()
        return status, said.out.strip().splitlines(), said.err.strip().splitlines()[-1] if said.err.strip() else ""

    return load


def history(service: Service, run: str, prompt_id: str) -> list[tuple[int, float, int]]:
    visits = service.client.prompt(run, prompt_id).history
    return [(visit.step, visit.successes, visit.attempts) for visit in reversed(visits)]


def prompts(service: Service, run: str) -> list[tuple[str, str | None, Any]]:
    told = (prompt.model_dump() for prompt in service.client.prompts(run))
    return [(prompt["prompt_id"], prompt["text"], prompt["prior_rates"]) for prompt in told]


def test_outcomes_are_joined_to_the_pool_by_text_and_a_second_import_counts_nothing_twice(
    service: Service, run: str, load: Import, tmp_path: Path
) -> None:
    log = written.verl(
        tmp_path / "rollouts", {1: {Q1: [1.0, 0.0], Q3: [1.0, 1.0]}, 2: {Q2: [0.0, 0.0], Q3: [1.0, 0.0]}}
    )

    first, again = load(log), load(log)

    assert first[:2] == (0, ["verl: 4 groups with 8 attempts, steps 1 to 2; 3 prompts, 2 of them in the pool before"])
    assert again[:2] == (
        0,
        [
            "verl: 4 groups with 8 attempts, steps 1 to 2; 3 prompts, 3 of them in the pool before",
            "4 of the groups were imported before and count once",
        ],
    )
    new = prompts(service, run)[2]
    assert new[1] == Q3
    assert history(service, run, "one") == [(1, 1, 2)]
    assert history(service, run, "two") == [(2, 0, 2)]
    assert history(service, run, new[0]) == [(1, 2, 2), (2, 1, 2)]
    assert service.client.run(run).observations == 4


@pytest.mark.parametrize("format_", ["verl", "trl", "prime-rl", "nemo-rl", "lm-eval", "inspect-ai", "table"])
def test_every_format_goes_in_by_one_command(
    service: Service, run: str, load: Import, tmp_path: Path, format_: str
) -> None:
    groups = {Q1: [1.0, 0.0], Q3: [1.0, 1.0]}
    episodes = [written.episode(text, {"correct": r}, policy=4) for text, rewards in groups.items() for r in rewards]
    logs: dict[str, Callable[[Path], Path]] = {
        "verl": lambda folder: written.verl(folder, {4: groups}),
        "trl": lambda folder: written.trl(folder, {4: groups}),
        "prime-rl": lambda folder: written.prime_rl(folder, {6: episodes}),
        "nemo-rl": lambda folder: written.nemo_rl(folder, {4: groups}),
        "lm-eval": lambda folder: written.lm_eval(folder, [written.lm_eval_row(i, float(i == 3)) for i in (1, 3)]),
        "inspect-ai": lambda folder: written.inspect_ai(folder, [written.inspect_sample(i, "C") for i in (1, 3)]),
        "table": lambda folder: written.write_lines(
            folder / "k.jsonl", [{"id": "one", "k": 3, "n": 4, "difficulty": "x"}]
        ),
    }
    path = logs[format_](tmp_path / "log")

    status, said, fault = load(path, "--step", "4", *(["--as", "outcomes"] if format_ == "table" else []))

    assert (status, said[0].split(":")[0]) == (0, format_), fault
    assert [(step, n) for step, _, n in history(service, run, "one")] == [
        (4, {"lm-eval": 1, "inspect-ai": 1, "table": 4}.get(format_, 2))
    ]
    assert service.client.run(run).pool_size == (2 if format_ == "table" else 3)


def test_a_dry_run_reads_all_and_sends_nothing(service: Service, run: str, load: Import, tmp_path: Path) -> None:
    log = written.verl(tmp_path / "rollouts", {1: {Q1: [1.0, None], Q3: [1.0, 1.0]}})
    before = service.client.run(run)

    status, said, _ = load(log, "--dry-run")

    assert status == 0
    assert said == [
        "verl: 2 groups with 3 attempts, step 1; 2 prompts, 1 of them in the pool before",
        "dry run: nothing was sent",
        "left out: 1 attempts without a reward (first: 1.jsonl line 2)",
    ]
    assert service.client.run(run) == before


def test_a_dry_run_of_prompts_checks_every_line(service: Service, run: str, load: Import, tmp_path: Path) -> None:
    file = tmp_path / "pool.jsonl"
    file.write_text('{"prompt_id": "three"}\n\n{"prompt_id": 4}\n')

    status, _, fault = load(file, "--dry-run")
    file.write_text('{"prompt_id": "three"}\n')

    assert (status, fault) == (1, f"evenodds import: {file}: line 3.prompt_id: Input should be a valid string")
    assert load(file, "--dry-run")[:2] == (0, ["dry run: nothing was sent; 1 lines are prompts; the pool has 2"])
    assert service.client.run(run).pool_size == 2


def test_a_file_that_has_changed_since_is_refused_with_what_to_do(
    service: Service, run: str, load: Import, tmp_path: Path
) -> None:
    written.verl(tmp_path / "rollouts", {1: {Q1: [1.0, 0.0]}})
    load(tmp_path / "rollouts")
    written.verl(tmp_path / "rollouts", {1: {Q1: [1.0, 0.0, 0.0]}})

    status, _, fault = load(tmp_path / "rollouts")
    (request_id,) = re.findall(r"request_id '([^']+)'", fault)
    service.client.retract(run, request_id=request_id)

    assert status == 1
    assert "1.jsonl, step 1: this part of 'rollouts' was imported before with other content" in fault
    assert load(tmp_path / "rollouts")[0] == 0
    assert history(service, run, "one") == [(1, 1, 3)]
    assert load(tmp_path / "rollouts", "--source", "a second run")[0] == 0
    assert history(service, run, "one") == [(1, 1, 3), (1, 1, 3)]


def test_rates_of_a_table_become_prior_rates_and_prompts_that_are_there_are_left_out(
    service: Service, run: str, load: Import, tmp_path: Path
) -> None:
    rows = [
        {"problem": Q1, "qwen_pass_rate": 0.5, "llama_pass_rate": "1/4"},
        {"problem": Q3, "qwen_pass_rate": 0.5, "llama_pass_rate": "1/4"},
    ]
    table = written.write_table(tmp_path / "rates.parquet", rows)

    first, again = load(table), load(table)

    reason = "prompts that the pool has with other prior rates or none, which a run keeps as it was loaded"
    assert first[:2] == (
        0,
        [
            "table: known rates of 1 prompts; 1 prompts, 0 of them in the pool before",
            f"left out: 1 {reason} (first: rates.parquet line 1)",
        ],
    )
    assert again[0] == 0
    assert prompts(service, run)[2][1:] == (
        Q3,
        {"qwen_pass_rate": 0.5, "llama_pass_rate": {"successes": 1, "attempts": 4}},
    )
    assert len(prompts(service, run)) == 3


def test_an_evaluation_may_be_known_beforehand_and_a_training_may_not(
    service: Service, run: str, load: Import, tmp_path: Path
) -> None:
    evaluation = written.inspect_ai(tmp_path, [written.inspect_sample(3, "C"), written.inspect_sample(3, "I", epoch=2)])
    training = written.verl(tmp_path / "rollouts", {1: {Q1: [1.0]}})

    assert load(evaluation, "--as", "prior")[0] == 0
    prompt_id, text, rates = prompts(service, run)[2]
    assert (prompt_id, text) == ("arithmetic/q3", Q3)
    assert list(rates.values()) == [{"successes": 1, "attempts": 2}]
    assert (
        "a verl log is of a policy that changes, so a prompt has no single rate in it"
        in load(training, "--as", "prior")[2]
    )


def test_what_cannot_be_stored_is_left_out_and_said(service: Service, run: str, load: Import, tmp_path: Path) -> None:
    log = written.verl(tmp_path / "rollouts", {1: {Q1: [1.0, 0.0], "x" * 200_001: [1.0, 0.0]}})

    status, said, _ = load(log)

    assert status == 0
    reason = "prompts that cannot be stored: text: String should have at most 200000 characters"
    assert said[1:] == [f"left out: 1 {reason} (first: 1.jsonl line 3)"]
    assert service.client.run(run).observations == 1


def test_a_log_without_outcomes_is_a_failure(load: Import, tmp_path: Path) -> None:
    log = written.verl(tmp_path / "rollouts", {1: {Q1: [None]}})

    status, said, _ = load(log)

    assert status == 1
    assert "left out: 1 attempts without a reward (first: 1.jsonl line 1)" in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--reward-range", "1", "0"), "--reward-range 1 0: the second must be above the first"),
        (("--step", "-1"), "--step -1: must be at least 0"),
        (("--of", "0"), "--of 0: must be at least 1"),
    ],
)
def test_arguments_that_contradict_themselves_are_named(
    load: Import, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    log = written.verl(tmp_path / "rollouts", {1: {Q1: [1.0]}})

    assert load(log, *options) == (1, [], f"evenodds import: {message}")


def test_a_run_that_keeps_no_text_takes_outcomes_and_a_second_import_counts_nothing_twice(
    service: Service, load: Import, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"imported-log-{next(_numbers)}"
    service.client.put_run(name, embedder="none", keep_text=False)
    log = written.prime_rl(tmp_path, {0: [written.episode(Q1, {"correct": 1.0})]})
    verl = written.verl(tmp_path / "verl", {1: {Q2: [1.0, 0.0]}})

    for _ in range(2):
        for path in (log, verl):
            assert main(["import", name, str(path), "--url", service.base_url]) == 0, capsys.readouterr().err

    assert service.client.run(name).observations == 2
    assert service.client.run(name).pool_size == 2


@pytest.mark.slow
def test_an_import_that_was_killed_goes_on_and_counts_nothing_twice(service: Service, run: str, tmp_path: Path) -> None:
    n_steps, n_prompts = 40, 400
    steps = {step: {question(step * n_prompts + i): [1.0, 0.0] for i in range(n_prompts)} for step in range(n_steps)}
    log = written.verl(tmp_path / "rollouts", steps)
    command = [sys.executable, "-m", "evenodds_service", "import", run, str(log), "--url", service.base_url]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ)
    until(lambda: service.client.run(run).observations >= 3 * n_prompts, "three steps")
    process.send_signal(signal.SIGKILL)
    process.wait()
    stored = service.client.run(run).observations
    assert 0 < stored < n_steps * n_prompts

    assert main(["import", run, str(log), "--url", service.base_url]) == 0

    assert service.client.run(run).observations == n_steps * n_prompts
    texts = {prompt.text: prompt.prompt_id for prompt in service.client.prompts(run)}
    assert len(texts) == n_steps * n_prompts  # the two of the pool are among them
    assert history(service, run, texts[question(0)]) == [(0, 1, 2)]


@pytest.mark.parametrize("keep_text", [True, False])
def test_answers_come_with_new_prompts_and_a_repeated_import_is_the_same(
    service: Service, run: str, load: Import, tmp_path: Path, keep_text: bool
) -> None:
    service.client.put_run(run, embedder="none", keep_text=keep_text)
    log = written.verl(tmp_path / "rollouts", {1: {Q1: [1.0, 0.0], Q3: [1.0, 1.0]}, 2: {Q3: [1.0, 0.0]}})

    first, again = load(log), load(log)

    assert (first[0], again[0]) == (0, 0), (first, again)
    told = {prompt.prompt_id: prompt.answer for prompt in service.client.prompts(run)}
    assert told.pop("one") is None, "the pool has it without an answer, and keeps it so"
    assert set(told.values()) == ({None, "42"} if keep_text else {None})
