"""`evenodds replay LOG`: what choosing would have saved in a trainer's log, or why the log cannot tell."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree

import numpy as np
import pytest
from tests.commands import written_logs as written

from evenodds_service.__main__ import main
from evenodds_service.commands.formats.outcomes import Wishes
from evenodds_service.commands.replay.logged import LoggedRun, read_logged
from evenodds_service.commands.replay.saving import ChosenSteps, saving_of

if TYPE_CHECKING:
    from tests.conftest import Service

ADDRESS = "http://127.0.0.1:9"
"""Nobody listens there."""


def trained(n_steps: int = 24, *, n_prompts: int = 96, batch: int = 24) -> dict[int, written.Groups]:
    """Groups of four attempts by step; short sums are always solved, long ones never, and a third is in between."""
    chance = np.random.default_rng(3)
    lengths = chance.permutation(np.resize([2, 12, 40], n_prompts))
    texts = [" + ".join(str(chance.integers(10, 99)) for _ in range(n)) + " = ?" for n in lengths]
    rates = {2: 1.0, 12: 0.5, 40: 0.0}
    return {
        step: {
            texts[i]: (chance.random(4) < rates[int(lengths[i])]).astype(float).tolist()
            for i in chance.choice(n_prompts, batch, replace=False)
        }
        for step in range(1, n_steps + 1)
    }


def logged(path: Path) -> LoggedRun:
    return read_logged(path, Wishes())


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return written.verl(tmp_path / "rollouts", trained())


@pytest.fixture
def running(start_service: Callable[[str], Service], tmp_path: Path) -> Service:
    return start_service(f"sqlite:///{tmp_path}/evenodds.db")


def test_a_log_is_answered_in_words_with_intervals_and_what_they_assume(
    running: Service, log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures, picture = tmp_path / "answer.json", tmp_path / "answer.svg"
    arguments = ["--url", running.base_url, "--seeds", "2", "--json", str(figures), "--picture", str(picture)]

    assert main(["replay", str(log), *arguments]) == 0

    said = capsys.readouterr().out
    document = json.loads(figures.read_text())
    gps, mopps = document["predictors"]
    groups = [rewards for step in trained().values() for rewards in step.values()]
    silent = np.mean([len(set(rewards)) == 1 for rewards in groups])
    assert document["log"]["silent_share"] == pytest.approx(silent)
    assert said.startswith("rollouts (verl): 2,304 rollouts in 576 groups of 96 prompts, 24 steps (1 to 24), ")
    assert f"{silent:.1%} of the 2,304 rollouts were in silent groups" in said
    assert (gps["predictor"], mopps["predictor"]) == ("gps", "mopps-yield")
    for figure in ("informative", "saved"):
        low, high = gps[f"{figure}_interval"]
        assert low <= gps[figure] <= high
    assert gps["saved_interval"][0] > 0.1  # the text tells which sums are in between
    assert gps["saved"] == pytest.approx(1 - (1 - silent) / gps["informative"], abs=0.03)
    assert "gps: the same number of informative groups for " in said
    assert "the policy is taken as it was" in said
    assert "No worker was running" in said
    assert list(running.client.runs()) == []
    drawing = ElementTree.parse(picture).getroot()
    assert {"title", "desc", "polyline"} <= {element.tag.rpartition("}")[2] for element in drawing.iter()}


def test_a_log_of_coins_shows_no_saving(running: Service, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chance = np.random.default_rng(0)
    steps = {
        step: {f"Toss coin {i}.": (chance.random(2) < 0.5).astype(float).tolist() for i in chance.permutation(80)[:16]}
        for step in range(24)
    }
    log = written.nemo_rl(tmp_path / "coins", steps)

    assert main(["replay", str(log), "--url", running.base_url, "--seeds", "1", "--predictors", "mopps-yield"]) == 0

    assert "mopps-yield: no saving can be told from none" in capsys.readouterr().out


def test_only_the_first_steps_are_replayed_where_so_many_are_asked_for(log: Path) -> None:
    assert len(read_logged(log, Wishes(), n_steps=17).steps) == 17


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (
            lambda folder: written.verl(folder, trained(), uid=True),
            "groups are missing from it because of their outcomes, so that it does not show the silent ones",
        ),
        (
            lambda folder: written.verl(
                folder, {s: {t: [0.0, 1.0] for t in groups} for s, groups in trained().items()}
            ),
            "none of its 576 groups is silent: those were filtered before it was written, as dynamic sampling does",
        ),
        (
            lambda folder: written.verl(folder, trained(15)),
            "15 of its steps have 8 groups of 2 attempts or more; at least 16 are needed",
        ),
        (
            lambda folder: written.lm_eval(folder, [written.lm_eval_row(i, 1.0) for i in range(9)]),
            "lm-eval is an evaluation or a table: one model at one time, and no steps to choose at",
        ),
        (
            lambda folder: written.write_lines(folder / "rates.jsonl", [{"id": "a", "pass_rate": 0.5}]),
            "table is an evaluation or a table: one model at one time, and no steps to choose at",
        ),
    ],
)
def test_a_log_that_cannot_tell_is_told_so_and_gets_no_figure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], write: Callable[[Path], Path], reason: str
) -> None:
    path, figures = write(tmp_path / "log"), tmp_path / "answer.json"

    assert main(["replay", str(path), "--url", ADDRESS, "--json", str(figures)]) == 0

    said = capsys.readouterr().out
    assert "What choosing would have saved, this log cannot tell:" in said
    assert f"- {reason}." in said
    assert "fewer rollouts" not in said
    assert json.loads(figures.read_text())["predictors"] == []


def test_groups_that_show_nothing_are_counted_and_passed_over(tmp_path: Path) -> None:
    steps = trained(17)
    few = dict(list(steps[2].items())[:7])
    log = written.verl(tmp_path / "rollouts", steps | {2: few})
    rows = (log / "1.jsonl").read_text().splitlines()
    (log / "1.jsonl").write_text("\n".join([*rows, json.dumps(json.loads(rows[0]) | {"input": "alone"})]))

    run = logged(log)

    assert len(run.steps) == 16
    assert run.tally.left_out == {
        "groups of one attempt, which cannot be told silent from not": (1, "1.jsonl line 97"),
        "steps of fewer than 8 groups": (1, "1.jsonl"),
    }


def test_a_second_group_of_a_prompt_at_a_step_is_left_out(tmp_path: Path) -> None:
    episodes = [written.episode(f"sum {i}", {"correct": float(a)}) for i in range(9) for a in range(2)]
    again = [{**episode, "group": {"id": "another"}} for episode in episodes[:2]]
    run = logged(written.prime_rl(tmp_path, {0: [*episodes, *again]}))

    assert run.n_groups == 9
    assert set(run.tally.left_out) == {"further groups of a prompt at the same step"}


def test_the_saving_is_what_a_random_choice_needs_more_of() -> None:
    steps = ChosenSteps(np.full(25, 4), np.full(25, 3), 1.0, is_refitted=False)

    saving = saving_of([steps, steps], np.full(25, 0.5))

    assert saving.informative == 0.75
    assert saving.saved == pytest.approx(1 / 3)
    assert saving.saved_interval == pytest.approx((1 / 3, 1 / 3))


def test_the_interval_of_a_saving_covers_the_truth() -> None:
    chance = np.random.default_rng(0)
    n_covered = 0
    for _ in range(60):
        random_T = chance.uniform(0.3, 0.5, 60)
        seeds = [
            ChosenSteps(np.full(60, 16), chance.binomial(16, np.minimum(random_T + 0.2, 1)), 1.0, is_refitted=False)
            for _ in range(3)
        ]
        low, high = saving_of(seeds, random_T).saved_interval
        n_covered += low <= 1 - 0.4 / 0.6 <= high

    assert n_covered >= 50


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--share", "1"), "--share 1: must lie between 0 and 1"),
        (("--seeds", "0"), "--seeds 0: must be at least 1"),
        (("--predictors", "uniform"), "--predictors uniform: a random choice needs no replay"),
        (("--predictors", "oracle"), "--predictors: 'oracle' is not a predictor"),
        (("--reward-range", "1", "1"), "--reward-range 1 1: the second must be above the first"),
        (("--reward", "acc"), "1.jsonl line 1: no reward 'acc'; there are: score"),
        (("--url", ADDRESS), "is the service running there?"),
    ],
)
def test_faults_are_one_line_on_standard_error(
    log: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    assert main(["replay", str(log), *arguments]) == 1

    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err.splitlines()[-1]
