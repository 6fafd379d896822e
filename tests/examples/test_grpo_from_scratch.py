"""The demo: its problems and verifier, its model, its GRPO step, its training over a live service, its figures."""

from __future__ import annotations

import copy
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from examples.grpo_from_scratch import grpo
from examples.grpo_from_scratch.grpo import Rollouts, advantages, pretrain, roll_out
from examples.grpo_from_scratch.model import (
    Transformer,
    answers_of,
    log_probabilities,
    questions_of,
    sample,
    success_rates,
)
from examples.grpo_from_scratch.report import picture, reached_at, smoothed, table
from examples.grpo_from_scratch.run import GREEDY, main
from examples.grpo_from_scratch.task import DIGIT, END, PAD, Levels, World, is_right, sort_problem
from examples.grpo_from_scratch.train import PREDICTORS, Method, Plan, Record, train

if TYPE_CHECKING:
    from tests.conftest import Service

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
LEVELS = Levels(digits=4, languages=3, words=4)
PLAN = Plan(steps=3, batch_size=4, group_size=4, learning_rate=1e-3, evaluate_every=3, refit_every=99, dynamic_rounds=3)


@pytest.fixture(scope="module")
def world() -> World:
    return World(LEVELS, seed=0)


@pytest.fixture(scope="module")
def pretrained(world: World) -> Transformer:
    """Solves short problems and fails at long ones."""
    torch.manual_seed(0)
    model = Transformer(LEVELS, width=32, layers=1, heads=2)
    pretrain(model, world, steps=150, batch_size=32, learning_rate=5e-3, seed=0)
    return model


# Problems.


def test_problems_are_distinct_and_those_held_out_are_not_in_the_pool(world: World) -> None:
    pool, held_out = world.problems(300, 100)

    texts = [problem.text for problem in pool + held_out]
    questions = [problem.question for problem in pool + held_out]
    assert len(set(texts)) == len(set(questions)) == 400
    assert {problem.group for problem in held_out} == {"sort", "translate"}


def test_a_world_is_a_function_of_its_seed() -> None:
    assert World(LEVELS, seed=1) == World(LEVELS, seed=1)
    assert World(LEVELS, seed=1).meanings != World(LEVELS, seed=2).meanings


def test_the_verifier_takes_the_right_answer_and_no_other() -> None:
    problem = sort_problem([3, 1, 2])

    assert problem.answer == (DIGIT + 1, DIGIT + 2, DIGIT + 3, END)
    assert is_right(problem, [*problem.answer, PAD])
    assert not is_right(problem, problem.answer[:-1])  # does not end
    assert not is_right(problem, (DIGIT + 1, DIGIT + 2, DIGIT + 3, DIGIT + 3, END))
    assert not is_right(problem, problem.question)


def test_the_corpus_is_right_as_often_as_it_is_reliable(world: World) -> None:
    chance = random.Random(0)
    of_word: dict[int, list[bool]] = {}
    of_level: dict[int, list[bool]] = {}
    for _ in range(6_000):
        problem = world.draw(chance)
        written = world.written(problem, chance)
        if problem.group == "sort":
            assert sorted(written[:-1]) == list(problem.answer[:-1])
            if len(set(written)) > 2:  # else both ways round are the same
                of_level.setdefault(problem.level, []).append(written == problem.answer)
            continue
        for token, ours, theirs in zip(problem.question[1:], problem.answer, written, strict=False):
            of_word.setdefault(token, []).append(ours == theirs)

    words, levels = ([sum(told) / len(told) for _, told in sorted(x.items())] for x in (of_word, of_level))

    assert words == pytest.approx(world.reliabilities, abs=0.12)
    assert levels == pytest.approx([world.sort_reliability(level) for level in (2, 3, 4)], abs=0.06)


def test_too_few_distinct_problems_are_said() -> None:
    with pytest.raises(ValueError, match="has hardly 500 distinct problems: ask for fewer"):
        World(Levels(digits=1, languages=1, words=1), seed=0).problems(450, 50)


def test_levels_out_of_range_are_said() -> None:
    with pytest.raises(ValueError, match=r"languages 91 must lie in 1 \.\. 90"):
        Levels(digits=1, languages=91, words=1)


# The model.


def test_sampling_with_the_cache_follows_the_same_probabilities(pretrained: Transformer, world: World) -> None:
    """How often the right answer is drawn agrees with its probability from one pass without a cache."""
    pool, _ = world.problems(8, 0)
    questions = questions_of(pool, LEVELS, CPU)
    rates = success_rates(pretrained, questions, answers_of([p.answer for p in pool], LEVELS, CPU))

    drawn = roll_out(pretrained, pool, group_size=2_000, generator=torch.Generator().manual_seed(0))

    assert drawn.rewards.mean(1).tolist() == pytest.approx(rates.tolist(), abs=0.05)
    assert float(rates.max()) > 0.5


def test_nothing_is_drawn_after_the_end(pretrained: Transformer, world: World) -> None:
    pool, _ = world.problems(16, 0)

    answers = sample(
        pretrained, questions_of(pool, LEVELS, CPU), attempts=8, generator=torch.Generator().manual_seed(0)
    )

    ended = (answers == END).cumsum(-1) - (answers == END).int() > 0
    assert ended.any()
    assert (answers[ended] == PAD).all()


# GRPO.


def test_advantages_are_standardised_within_each_group_and_zero_where_all_are_equal() -> None:
    rewards = torch.tensor([[1.0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]])

    result = advantages(rewards)

    assert result[1:].abs().max() == 0
    assert float(result[0].mean()) == pytest.approx(0, abs=1e-6)
    assert float(result[0].std(correction=0)) == pytest.approx(1, abs=1e-4)


def test_groups_that_are_all_equal_do_not_move_the_model(pretrained: Transformer, world: World) -> None:
    model = copy.deepcopy(pretrained)
    pool, _ = world.problems(4, 0)
    answers = answers_of([p.answer for p in pool], LEVELS, CPU)[:, None].repeat(1, 4, 1)

    grpo.step(model, torch.optim.SGD(model.parameters(), lr=1.0), Rollouts(tuple(pool), answers, torch.ones(4, 4)))

    for before, after in zip(pretrained.parameters(), model.parameters(), strict=True):
        assert torch.equal(before, after)


def test_a_step_raises_the_probability_of_what_was_rewarded(pretrained: Transformer, world: World) -> None:
    model = copy.deepcopy(pretrained)
    (problem,), _ = world.problems(1, 0)
    answers = answers_of([problem.answer, (END,)], LEVELS, CPU)

    def odds() -> float:
        questions = questions_of([problem] * 2, LEVELS, CPU)
        log_p = log_probabilities(model, questions, answers).sum(1)
        return float((log_p[0] - log_p[1]).detach())

    before = odds()
    rollouts = Rollouts((problem,), answers[None], torch.tensor([[1.0, 0.0]]))
    grpo.step(model, torch.optim.SGD(model.parameters(), lr=0.01), rollouts)

    assert odds() > before


# Training over a live service.


@pytest.mark.parametrize("name", PREDICTORS)
def test_the_service_hears_of_every_rollout(
    service: Service, pretrained: Transformer, world: World, name: str, request: pytest.FixtureRequest
) -> None:
    pool, held_out = world.problems(60, 20)
    run = f"demo-{name}-{service.database_url[:6]}"

    record = train(
        copy.deepcopy(pretrained),
        pool,
        held_out,
        method=Method.parse(name),
        plan=PLAN,
        client=service.client,
        run=run,
        seed=0,
    )

    state = service.client.run(run)
    assert (state.predictor, state.pool_size, state.head_step) == (PREDICTORS[name], 60, PLAN.steps - 1)
    assert state.observations * PLAN.group_size == sum(record.rollouts) == record.rollouts_at[-1]
    assert record.evaluated_at == [0, 3]
    assert len(record.informative) == len(record.forecasts) == PLAN.steps
    if name == "dynamic":
        assert all(48 >= n >= 16 and n % 16 == 0 for n in record.rollouts)
        assert max(record.rollouts) > 16
    else:
        assert record.rollouts == [16] * PLAN.steps


def test_the_same_seed_trains_the_same_model(service: Service, pretrained: Transformer, world: World) -> None:
    pool, held_out = world.problems(60, 20)

    curves = [
        train(
            copy.deepcopy(pretrained),
            pool,
            held_out,
            method=Method.parse("gps+cooldown_steps=1"),
            plan=PLAN,
            client=service.client,
            run=f"demo-again-{i}-{service.database_url[:6]}",
            seed=3,
        ).accuracies
        for i in range(2)
    ]

    assert curves[0] == curves[1]
    assert curves[0]["all"][0] != curves[0]["all"][-1]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gsp", "method 'gsp' is none of uniform, dynamic, mopps, gps-paper, gps"),
        (
            "gps+cooldown=2",
            "setting 'cooldown' in method 'gps.cooldown=2' is none of acquisition, candidates, cooldown_steps",
        ),
        ("gps+candidates=-1", "candidates -1 in method .* must be at least 0"),
        ("gps+cooldown_steps=x", "'cooldown_steps=x' in method .*: 'x' is not a number of that kind"),
    ],
)
def test_a_method_that_does_not_exist_is_said(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Method.parse(name)


# Figures.


def record_of(accuracies: list[float], *, rollouts: int = 10) -> Record:
    n = len(accuracies)
    return Record(
        evaluated_at=list(range(n)),
        rollouts_at=[rollouts * i for i in range(n)],
        accuracies={"all": accuracies, "sort": accuracies, "translate": accuracies},
        informative=[0.5] * n,
        forecasts=[0.25] * n,
        rollouts=[rollouts] * n,
        distinct=7,
        service_seconds=[0.01] * n,
        own_seconds=[0.1] * n,
    )


def test_the_aim_is_reached_between_two_evaluations_of_the_smoothed_curve() -> None:
    record = record_of([0.0, 0.0, 0.0, 0.3, 0.6])

    assert smoothed(record.accuracies["all"]) == pytest.approx([0, 0, 0, 0.1, 0.3])
    assert reached_at(record, 0.2, axis=record.evaluated_at) == pytest.approx(3.5)
    assert reached_at(record, 0.31, axis=record.evaluated_at) is None


def test_the_table_compares_with_uniform_and_dynamic_and_marks_who_never_got_there() -> None:
    records = {
        "uniform": {0: record_of([0.0, 0.0, 0.3, 0.6, 0.9, 0.9, 0.9])},
        "dynamic": {0: record_of([0.0, 0.9, 0.9, 0.9], rollouts=40)},
        "gps": {0: record_of([0.0, 0.9, 0.9, 0.9])},
        "mopps": {0: record_of([0.0, 0.1, 0.1, 0.1])},
    }

    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table(records).splitlines()]

    of = {row[0]: dict(zip(rows[0], row, strict=True)) for row in rows[2:]}
    assert (of["gps"]["steps to aim"], of["gps"]["fewer steps"]) == ("3 (1/1)", "2.00 x")
    assert (of["gps"]["rollouts to aim"], of["gps"]["of dynamic's"]) == ("30", "25%")
    assert (of["mopps"]["steps to aim"], of["mopps"]["fewer steps"]) == (">3 (0/1)", "<2.00 x")
    assert of["mopps"]["of dynamic's"] == ">25%"
    assert of["uniform"]["forecast error"] == "0.25"


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    file = tmp_path / "accuracy.png"

    picture({"gps": {0: record_of([0.0, 0.5]), 1: record_of([0.1, 0.5])}}, file, title="two seeds")

    assert file.read_bytes().startswith(b"\x89PNG")


# All together.


@pytest.mark.slow
def test_the_demo_runs_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    def demo(*methods: str) -> subprocess.CompletedProcess[str]:
        options = ["--steps", "6", "--pretrain-steps", "40", "--refit-every", "3", "--out", str(tmp_path)]
        command = [
            sys.executable,
            "-m",
            "examples.grpo_from_scratch.run",
            *options,
            "--seeds",
            "0",
            "--methods",
            *methods,
        ]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, timeout=600)

    first = demo("uniform", "gps")
    kept = (tmp_path / "seed-0-gps.json").read_bytes()
    second = demo(*PREDICTORS, GREEDY)

    assert first.returncode == 0, first.stderr
    assert second.returncode == 0, second.stderr
    assert (tmp_path / "seed-0-gps.json").read_bytes() == kept
    assert "pretraining" not in second.stderr
    assert all(f"| {name} " in second.stdout for name in (*PREDICTORS, GREEDY))
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "seed-0-gps-paper.json").read_text())["record"]["refit_seconds"] > 0


def test_the_demo_says_which_method_it_does_not_know(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--methods", "best", "--out", str(tmp_path)]) == 1

    said = capsys.readouterr().err
    assert said == "demo: method 'best' is none of uniform, dynamic, mopps, gps-paper, gps\n"
