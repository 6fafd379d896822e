"""`evenodds replay LOG`: what choosing would have saved in a trainer's log, or why the log cannot tell."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from tests.commands import written_logs as written
from tests.waiting import PATIENCE_SECONDS

from evenodds_service.__main__ import main
from evenodds_service.commands.formats.outcomes import LogRefused, Tally, Wishes
from evenodds_service.commands.replay.answer import LEARNING, Replayed, document, text
from evenodds_service.commands.replay.logged import LoggedRun, read_logged
from evenodds_service.commands.replay.saving import ChosenSteps, gain_over, saving_of
from evenodds_service.commands.replay.sources import read_sources
from evenodds_service.model.history import History
from evenodds_service.model.refit import TrainingData, fit_shared_model
from evenodds_service.model.snapshot import SharedModel
from evenodds_service.storage.engine import open_engine
from evenodds_service.storage.store import Store
from evenodds_service.worker import Worker

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
            "groups were left out of it because of their outcomes, so that silent groups are missing",
        ),
        (
            lambda folder: written.verl(
                folder, {s: {t: [0.0, 1.0] for t in groups} for s, groups in trained().items()}
            ),
            "none of its 576 groups is silent: silent groups were filtered before it was written, as dynamic "
            "sampling does",
        ),
        (
            lambda folder: written.verl(folder, trained(15)),
            "15 of its steps have 8 groups of 2 attempts or more; at least 16 are needed",
        ),
        (
            lambda folder: written.lm_eval(folder, [written.lm_eval_row(i, 1.0) for i in range(9)]),
            "lm-eval is an evaluation or a table: it has one model at one time, and no steps at which to choose",
        ),
        (
            lambda folder: written.write_lines(folder / "rates.jsonl", [{"id": "a", "pass_rate": 0.5}]),
            "table is an evaluation or a table: it has one model at one time, and no steps at which to choose",
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
        "groups of one attempt, which are neither silent nor informative": (1, "1.jsonl line 97"),
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


def chosen(n_informative: int, *, n_seeds: int = 3) -> list[ChosenSteps]:
    """Of 16 groups at each of 25 steps."""
    return [ChosenSteps(np.full(25, 16), np.full(25, n_informative), 1.0, is_refitted=True)] * n_seeds


def test_a_gain_is_what_the_other_choice_needs_more_of_and_its_interval_covers_the_truth() -> None:
    gain, interval = gain_over(chosen(12), chosen(9))
    assert (gain, *interval) == pytest.approx((0.25, 0.25, 0.25))
    chance = np.random.default_rng(0)
    n_covered = 0
    for _ in range(60):
        level_T = chance.uniform(0.2, 0.4, 60)
        ours, theirs = (
            [ChosenSteps(np.full(60, 16), chance.binomial(16, level_T + more), 1.0, is_refitted=True) for _ in range(3)]
            for more in (0.2, 0.1)
        )
        low, high = gain_over(ours, theirs)[1]
        n_covered += low <= 1 - 0.4 / 0.5 <= high

    assert n_covered >= 50


def test_logs_and_tables_are_sources_and_say_what_they_have_in_common(log: Path, tmp_path: Path) -> None:
    run = logged(log)
    own = [prompt.text for prompt in run.prompts[:20]]
    other = written.verl(tmp_path / "other", {3: {str(t).upper(): [1.0, 0.0, 0.0] for t in own}, 4: {"New?": [1.0]}})
    rows = [{"text": text, "a_rate": 0.25, "b_rate": "3/4"} for text in own]
    table = written.write_lines(tmp_path / "rates.jsonl", rows)
    numbered = written.write_lines(tmp_path / "numbered.jsonl", [{"id": i, "pass_rate": 0.5} for i in range(40)])

    sources = read_sources([other, table, numbered], Wishes(), Tally())

    assert [(source.name, len(source.prompts), source.n_in_common(run)) for source in sources] == [
        ("other", 21, 20),
        ("rates.jsonl (a_rate)", 20, 20),
        ("rates.jsonl (b_rate)", 20, 20),
        ("numbered.jsonl", 40, 0),
    ]
    counts = [{(k, n) for rows in source.outcomes.values() for _, k, n in rows} for source in sources]
    assert counts == [{(1.0, 3), (1.0, 1)}, {(2.0, 8)}, {(3.0, 4)}, {(4.0, 8)}]
    assert [source.has_guessed_attempts for source in sources] == [False, True, False, True]
    assert [source.cannot_tell(run) for source in sources[:3]] == [None] * 3
    assert str(sources[3].cannot_tell(run)).startswith("numbered.jsonl has no prompt id in common with the log")
    with pytest.raises(LogRefused, match="it has prompts and no outcomes"):
        read_sources([written.write_lines(tmp_path / "prompts.jsonl", [{"text": "A?"}])], Wishes(), Tally())


def test_a_source_is_read_by_the_reward_that_is_named_where_it_has_it(tmp_path: Path) -> None:
    groups = {0: {"1 + 1?": [0.5, 0.5]}}
    both, one = written.verl(tmp_path / "both", groups, acc=1.0), written.verl(tmp_path / "one", groups)
    several = written.trl(tmp_path / "several", groups, format_reward=1.0)

    sources = read_sources([both, one], Wishes(reward="acc"), Tally())

    assert [source.outcomes[0][0][1:] for source in sources] == [(2.0, 2), (1.0, 2)]
    with pytest.raises(LogRefused, match="several rewards; name the verifier's with --reward"):
        read_sources([several], Wishes(reward="acc"), Tally())
    assert read_sources([several], Wishes(reward="format_reward"), Tally())[0].outcomes[0][0][1] == 2.0


@pytest.mark.parametrize(
    ("n_informative", "said"),
    [
        (12, "25% fewer rollouts than gps without it (between 25% and 25%), for the same number of informative groups"),
        (9, "no difference to gps without it can be told (between 0% and 0% of the rollouts saved)"),
        (6, "50% more rollouts than gps without it (between 50% and 50%)"),
    ],
)
def test_what_learning_from_others_adds_is_said_with_its_interval_and_what_it_assumes(
    log: Path, tmp_path: Path, n_informative: int, said: str
) -> None:
    run = logged(log)
    rows = [{"text": prompt.text, "pass_rate": 0.5} for prompt in run.prompts[:48]]
    sources = read_sources([written.write_lines(tmp_path / "rates.jsonl", rows)], Wishes(), Tally())
    replayed = Replayed({"gps": chosen(9)[:1] * 2, LEARNING: chosen(n_informative)[:1] * 2}, sources, sources)
    run = replace(run, steps=tuple(run.steps[i % len(run.steps)] for i in range(25)))

    lines = "\n".join(text(run, replayed, share=0.5))
    told = document(run, replayed, share=0.5)["learn_from"]

    assert f"With learn_from rates.jsonl (50% of the prompts in common): {said}" in lines
    assert "all that the others showed was known before the first step" in lines
    assert "Rates of rates.jsonl came without a number of attempts: each counts as one of 8 attempts." in lines
    assert json.loads(json.dumps(told))["sources"] == [
        {"name": "rates.jsonl", "prompts": 48, "in_common": 48, "cannot_tell": None}
    ]


def test_where_learning_from_others_cannot_be_told_the_answer_says_why(log: Path, tmp_path: Path) -> None:
    run = logged(log)
    few = written.write_lines(tmp_path / "few.jsonl", [{"text": f"{i}?", "pass_rate": 0.5} for i in range(9)])
    sources = read_sources([few], Wishes(), Tally())
    reasons = [str(sources[0].cannot_tell(run))]
    run = replace(run, steps=tuple(run.steps[i % len(run.steps)] for i in range(25)))

    lines = "\n".join(text(run, Replayed({"gps": chosen(9)}, sources, cannot_tell=reasons), share=0.5))

    assert (
        "With learn_from, this log cannot tell: few.jsonl has outcomes of 9 prompts; at least 16 are needed." in lines
    )
    assert "than gps without it" not in lines


@pytest.mark.slow
def test_a_replay_that_learns_from_another_log_through_a_service_and_its_worker(
    running: Service, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of texts that tell nothing, each of which is tried once."""
    chance = np.random.default_rng(5)
    rates = {f"Toss coin {i}.": float(chance.choice([0.0, 0.5, 1.0])) for i in range(20 * 24)}
    steps = {
        step: {text: (chance.random(4) < rates[text]).astype(float).tolist() for text in [*rates][step::20]}
        for step in range(20)
    }
    log = written.verl(tmp_path / "rollouts", steps)
    rows = [{"text": text, "pass_rate": rate} for text, rate in rates.items()]
    table, figures = written.write_lines(tmp_path / "rates.jsonl", rows), tmp_path / "answer.json"
    arguments = ["--url", running.base_url, "--seeds", "2", "--predictors", "gps", "--json", str(figures)]
    store, stop = Store(open_engine(running.database_url, timeout_seconds=PATIENCE_SECONDS)), threading.Event()

    def of_sources_alone(data: TrainingData) -> SharedModel:
        return fit_shared_model(replace(data, history=History.empty()), device=torch.device("cpu"))

    worker = Worker(store, name="w", clock=lambda: datetime.now(timezone.utc), fit=of_sources_alone, poll_seconds=0.02)
    working = threading.Thread(target=worker.run, args=(stop,))
    working.start()
    try:
        assert main(["replay", str(log), *arguments, "--learn-from", str(table)]) == 0
    finally:
        stop.set()
        working.join()
        store.close()

    said, told = capsys.readouterr().out, json.loads(figures.read_text())
    gps, learning = told["predictors"]
    assert learning["predictor"] == LEARNING
    assert learning["informative"] > gps["informative"] + 0.2
    assert told["learn_from"]["saved_against_gps_interval"][0] > 0.2
    assert "With learn_from rates.jsonl (100% of the prompts in common): " in said
    assert list(running.client.runs()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--share", "1"), "--share 1: must lie between 0 and 1"),
        (("--seeds", "0"), "--seeds 0: must be at least 1"),
        (("--predictors", "uniform"), "--predictors uniform: a random choice needs no replay"),
        (("--predictors", "oracle"), "--predictors: 'oracle' is not a predictor"),
        (("--reward-range", "1", "1"), "--reward-range 1 1: the second must be above the first"),
        (("--learn-from", "rollouts"), "--learn-from rollouts: the log would predict itself: name another log"),
        (("--learn-from", "nothing"), "nothing: no such file or folder"),
        (("--learn-from", "nothing", "--predictors", "mopps"), "--learn-from: only gps learns from others"),
        (("--reward", "acc"), "1.jsonl line 1: it has no reward 'acc'; its rewards are: score"),
        (("--url", ADDRESS), "is the service running there?"),
    ],
)
def test_faults_are_one_line_on_standard_error(
    log: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(log.parent)

    assert main(["replay", str(log), *arguments]) == 1

    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err.splitlines()[-1]
