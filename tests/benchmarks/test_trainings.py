"""Trainings in regimes: the arms, a run that is kept and gone on with, and the figures."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from benchmarks.arms import Arm, Oracle, Pools, Rule, Ruled, Shuffled, arm_named
from benchmarks.contenders import Gps
from benchmarks.trainings import REGIMES, Class, Regime, Run, Task, Training, file_of, load, main, run_seed, seeds_of
from benchmarks.trainings_report import Curves, Interval, figures, interval, meeting, paired, table
from benchmarks.worlds import World
from examples.grpo_from_scratch.task import DIGIT, END, Levels, Operations, is_right
from examples.grpo_from_scratch.task import World as Lessons

from evenodds_service.domain.arrays import FloatArray, IntArray

SMALL = Levels(digits=4, languages=5, words=3)
TINY = Regime("tiny", "tiny", Task("tiny", SMALL, Lessons, 20), batch_size=4, pool_size=60, steps=4, evaluate_every=2)


@dataclass
class Fixed:
    """A course of exact rates that do not move."""

    world: World
    batch_size: int = 6
    seed: int = 0

    def rates(self, prompts: IntArray) -> FloatArray:
        return np.repeat([0.0, 0.5, 1.0], 20)[prompts]


def ask(method: Gps | Shuffled | Pools | Oracle, step: int, *, n: int = 6, seed: int = 0) -> IntArray:
    return method.select(np.arange(60), n, step=step, generator=np.random.default_rng([seed, step]))


def tell(method: Gps | Shuffled | Pools | Oracle, step: int, prompts: IntArray) -> None:
    successes = np.repeat([0.0, 4.0, 8.0], 20)[prompts]
    method.observe(step, prompts, successes, np.full(len(prompts), 8.0))


def chosen(method: Gps | Shuffled | Pools | Oracle, n_steps: int, *, n: int = 6) -> Iterator[IntArray]:
    for step in range(n_steps):
        prompts = ask(method, step, n=n)
        tell(method, step, prompts)
        yield prompts


# Arms.


def test_uniform_goes_through_the_pool_before_a_prompt_comes_again() -> None:
    batches = list(chosen(Shuffled(60), 20, n=7))

    flat = np.concatenate(batches)
    assert sorted(flat[:60]) == sorted(flat[60:120]) == list(range(60))
    assert all(len(set(batch)) == 7 for batch in batches)


def test_difficulty_pools_leave_out_what_was_easy_or_hard_until_too_few_are_left() -> None:
    method = Pools(60)
    tell(method, 0, np.arange(60))

    assert set(ask(method, 1, n=20)) == set(range(20, 40))
    assert len(ask(method, 2, n=21)) == 21


def test_the_oracle_takes_prompts_that_are_informative(world: World) -> None:
    method = Oracle(Fixed(world))

    assert all(20 <= prompt < 40 for prompt in ask(method, 0))
    assert len(set(ask(method, 1, n=25))) == 25


def test_the_rule_of_the_service_chooses_as_the_service_does(world: World) -> None:
    service, ours = Gps(world), Ruled(Fixed(world), Rule())

    for theirs, mine in zip(chosen(service, 6), chosen(ours, 6), strict=True):
        assert theirs.tolist() == mine.tolist()


@pytest.mark.parametrize(("rest", "cap", "rests"), [(3, 1.0, 3), (8, 0.4, 4), (0, 1.0, 0)])
def test_a_chosen_prompt_rests_for_so_many_steps_within_its_share_of_an_epoch(
    world: World, rest: int, cap: float, rests: int
) -> None:
    """An epoch has 10 steps."""
    batches = list(chosen(Ruled(Fixed(world), Rule(rest=rest, cap=cap, draw="gd3")), 12))

    gaps = [
        later - step
        for step, batch in enumerate(batches)
        for later in range(step + 1, 12)
        if set(batch) & set(batches[later])
    ]
    assert min(gaps) == rests + 1


@pytest.mark.parametrize("draw", ["gd3", "pd1", "pd6"])
def test_a_draw_prefers_informative_prompts_and_is_a_function_of_its_seed(world: World, draw: str) -> None:
    methods = [Ruled(Fixed(world), Rule(rest=0, draw=draw)) for _ in range(2)]
    for method in methods:
        for step in range(3):
            tell(method, step, np.arange(60))

    batches = [[ask(method, 3 + i, seed=i).tolist() for i in range(20)] for method in methods]

    assert batches[0] == batches[1]
    assert all(len(set(batch)) == 6 for batch in batches[0])
    share = np.mean([[20 <= prompt < 40 for prompt in batch] for batch in batches[0]])
    assert share > (0.5 if draw == "pd1" else 0.85)


def test_fill_asks_for_as_many_as_make_a_batch_of_informative_groups(world: World) -> None:
    method = Ruled(Fixed(world, batch_size=3), Rule(rest=1, fill=1.0))

    sizes = [len(batch) for batch in chosen(method, 16, n=3)]

    assert sizes[0] == 6  # one half is expected to be informative at first
    assert max(sizes) <= 18
    assert 3 <= np.mean(sizes[8:]) < 6


def test_names_of_arms_are_read() -> None:
    arm = arm_named("gps+rest=25+cap=.4+draw=pd3+fill=1")

    assert (arm.name, arm.keeps_informative, arm.reads_prior) == ("gps+rest=25+cap=.4+draw=pd3+fill=1", True, True)
    assert not arm_named("gps").keeps_informative
    assert arm_named("dynamic").in_waves


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gsp", "arm 'gsp' is none of uniform, dynamic, mopps, gps-paper, prime-rl, oracle, gps, gps"),
        ("mopps+rest=3", "arm 'mopps.rest=3' is none of"),
        ("gps+pause=3", "field 'pause' of arm 'gps.pause=3' is none of rest, cap, draw, fill, most, refit, optimism"),
        ("gps+draw=all", "'draw=all' of arm .*: draw 'all' is none of service, gd<k>, pd<k>"),
        ("gps+rest=x", "'rest=x' of arm .*: invalid literal"),
        ("gps+rest=0+fill=1", "'fill=1' of arm .*: fill without a rest asks for the same prompts again and again"),
    ],
)
def test_an_arm_that_does_not_exist_is_said(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        arm_named(name)


# Runs.


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where runs and pretrained models are kept."""
    return tmp_path_factory.mktemp("trainings")


def test_seeds_are_read() -> None:
    assert seeds_of("200-202,7") == [200, 201, 202, 7]
    with pytest.raises(ValueError, match="seeds 'a-3' are not of the form 200-203,207"):
        seeds_of("a-3")


def test_a_run_is_kept_and_what_is_there_is_not_trained_again(out: Path) -> None:
    arms = ["uniform", "dynamic", "gps+rest=2+fill=1"]

    said = list(run_seed(out, TINY, arms, 0))
    again = list(run_seed(out, TINY, [*arms, "mopps"], 0))

    assert [line.split()[1] for line in said] == arms
    assert [line.split()[1] for line in again] == ["mopps"]
    runs = {name: load(file_of(out, TINY, arm_named(name), 0)) for name in arms}
    uniform, dynamic = runs["uniform"], runs["dynamic"]
    assert uniform is not None
    assert dynamic is not None
    assert uniform.evaluated_at == [0, 2, 4]
    assert uniform.accuracy[0] == dynamic.accuracy[0]  # the same pretrained model
    assert uniform.groups == uniform.updated == [4] * 4
    assert uniform.distinct == 16
    assert dynamic.updated == [min(4, n) for n in dynamic.informative]
    assert sum(dynamic.groups) > 16


def test_late_outcomes_are_told_late_and_move_the_policy_late(out: Path) -> None:
    steps: list[tuple[int, int]] = []

    class Listening(Shuffled):
        def select(
            self, candidates: IntArray, batch_size: int, *, step: int, generator: np.random.Generator
        ) -> IntArray:
            self.now = step
            return super().select(candidates, batch_size, step=step, generator=generator)

        def observe(self, step: int, prompts: IntArray, successes: FloatArray, attempts: FloatArray) -> None:
            steps.append((step, self.now))

    arm = Arm("listening", lambda course: Listening(course.world.n_prompts))
    late = replace(TINY, delay=2, evaluate_every=1)

    run = Training(Class(late, 0, out / "models"), arm).run()

    assert steps == [(0, 2), (1, 3)]
    assert run.accuracy[0] == run.accuracy[1] == run.accuracy[2]


def test_a_siblings_outcomes_are_known_at_the_start_and_others_share_the_runs_without_it(out: Path) -> None:
    regime = replace(TINY, name="known", has_sibling=True, same_as="tiny")

    rates = Class(regime, 0, out / "models").world.prior_rates_N

    assert rates is not None
    assert set(np.round(rates * 10)) <= set(range(1, 10))
    assert len(set(rates)) > 1
    assert file_of(out, regime, arm_named("mopps"), 3) == out / "tiny" / "mopps" / "3.json"
    assert file_of(out, regime, arm_named("gps"), 3) == out / "known" / "gps" / "3.json"


def test_withheld_kinds_are_in_no_pool(tmp_path: Path) -> None:
    for task in (TINY.task, Task("ops", Levels(digits=4, languages=1, words=1), Operations, 1)):
        pool, held_out, other = Class(replace(TINY, task=task, pool_size=200), 0, tmp_path).problems

        kinds, of_another_kind = ({problem.text.split()[-0] for problem in some} for some in (pool, other))
        assert (len(pool), len(held_out), len(other)) == (200, 320, 128)
        assert not {problem.text for problem in pool} & {problem.text for problem in held_out}
        if task.name == "ops":
            assert not kinds & of_another_kind
        else:
            languages, others = ({p.text.split()[1] for p in some if p.group == "translate"} for some in (pool, other))
            assert others
            assert not languages & others


# Operations.


def test_operations_are_performed_as_their_key_word_says() -> None:
    lessons = Operations(Levels(digits=4, languages=1, words=1), seed=0)
    pool, _ = lessons.problems(200, 0)

    for problem in pool:
        word = problem.question[0] - DIGIT - 10
        factor, shift, mistake, turns = lessons.operations[word]
        digits = [token - DIGIT for token in problem.question[1:]]
        results = [(factor * digit + shift) % 10 for digit in digits]
        assert is_right(problem, [*(DIGIT + r for r in (reversed(results) if turns else results)), END])
        assert mistake != shift
        assert problem.group == ("turn" if turns else "keep")


# Figures.


def run_of(accuracy: list[float], *, groups: int = 8, informative: int = 4, updated: int = 8) -> Run:
    n = 10 * (len(accuracy) - 1)
    return Run(
        evaluated_at=list(range(0, n + 1, 10)),
        accuracy=accuracy,
        of_another_kind=accuracy,
        groups=[groups] * n,
        informative=[informative] * n,
        updated=[updated] * n,
        tokens=[100 * groups] * n,
        forecasts=[0.25] * n,
        distinct=50,
        repeats=0.5,
    )


def runs_of(fast: float) -> Mapping[str, Mapping[int, Run]]:
    """Uniform gains .1 in 40 steps; `fast` times as quick, and `slow` half as quick."""
    return {
        "uniform": {
            seed: run_of([0.1 + seed, 0.125 + seed, 0.15 + seed, 0.175 + seed, 0.2 + seed]) for seed in range(3)
        },
        "dynamic": {seed: run_of([0.1 + seed, 0.2 + seed, 0.3 + seed], groups=32) for seed in range(3)},
        "fast": {seed: run_of([0.1 + seed + 0.025 * fast * i for i in range(5)]) for seed in range(3)},
        "slow": {seed: run_of([0.1 + seed + 0.0125 * i for i in range(5)]) for seed in range(3)},
    }


def test_an_arm_is_as_fast_as_its_steps_to_uniforms_accuracy_are_fewer() -> None:
    runs = runs_of(2.0)

    fast, slow, dynamic = (figures(runs, arm) for arm in ("fast", "slow", "dynamic"))

    for name in ("half", "end"):
        assert value(fast[f"speed, {name}"]) == pytest.approx(2.0)
        assert value(slow[f"speed, {name}"]) == pytest.approx(0.5)  # never there: by its own best accuracy
    assert value(fast["rollouts, end"]) == pytest.approx(0.5)
    assert value(dynamic["rollouts, end"]) == pytest.approx(1.0)
    assert value(fast["rollouts, of dynamic's"]) == pytest.approx(0.5)
    # 10 steps of 32 groups and 8 updated ones, against 40 of 8 and 8.
    assert value(dynamic["cost 1, end"]) == pytest.approx((320 + 80) / (320 + 320))
    assert value(fast["accuracy, difference"]) == pytest.approx(0.1)
    assert value(slow["least difference"]) == pytest.approx(-0.05)
    assert value(fast["forecast error"]) == pytest.approx(0.25)


def test_intervals_hold_the_figure_and_are_narrow_where_seeds_agree() -> None:
    steps = np.arange(0.0, 50.0, 10.0)
    uniform = Curves(steps, np.linspace(0.1, 0.2, 5) + np.zeros((6, 1)), {})
    alike = Curves(steps, np.linspace(0.1, 0.3, 5) + np.zeros((6, 1)), {})
    slopes = np.linspace(0.15, 0.45, 6)[:, None]
    scattered = Curves(steps, 0.1 + slopes * np.linspace(0.0, 1.0, 5), {})

    def speed(arm: Curves, baseline: Curves) -> float:
        at, baseline_at = meeting(arm, baseline, 1.0)
        return baseline_at / at

    narrow, wide = (interval(speed, arm, uniform) for arm in (alike, scattered))

    assert narrow.low == pytest.approx(narrow.high)
    assert wide.low < wide.value < wide.high
    assert wide.high - wide.low > 0.2
    assert paired(np.array([1.0, 2.0, 3.0])).low == pytest.approx(2.0 - 4.303 / 3**0.5, abs=1e-3)


def test_the_table_has_a_line_for_each_arm_that_has_runs() -> None:
    text = table(runs_of(2.0), ["uniform", "fast", "slow", "absent"])

    assert [line.split("|")[1].strip() for line in text.splitlines()[2:]] == ["uniform", "fast", "slow"]


def test_the_report_writes_tables_figures_and_the_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arm, by_seed in runs_of(2.0).items():
        name = {"fast": "gps", "slow": "gps+rest=25"}.get(arm, arm)
        for seed, run in by_seed.items():
            file = file_of(tmp_path, REGIMES["c"], arm_named(name), seed)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps({field: getattr(run, field) for field in run.__slots__}))

    main(["report", str(tmp_path), "--results", str(tmp_path / "results" / "trainings")])

    said = capsys.readouterr().out
    assert [line.split("|")[1].strip() for line in said.splitlines() if line.startswith("| ")][1:] == [
        "uniform",
        "dynamic",
        "gps",
        "gps+rest=25",
    ]
    assert (tmp_path / "results" / "trainings.md").read_text() in said
    assert set(json.loads((tmp_path / "results" / "trainings.json").read_text())["c"]) >= {"gps", "uniform"}
    assert (tmp_path / "results" / "trainings.png").read_bytes().startswith(b"\x89PNG")


def value(figure: Interval | float | int) -> float:
    return figure.value if isinstance(figure, Interval) else float(figure)


@pytest.mark.slow
def test_the_command_trains_in_processes_and_reports(tmp_path: Path) -> None:
    """A whole regime of one seed, by the command."""
    main(["run", str(tmp_path), "--regimes", "a", "--arms", "uniform", "gps+refit=1", "--seeds", "100", "--jobs", "2"])

    assert all(file_of(tmp_path, REGIMES["a"], arm_named(name), 100).exists() for name in ("uniform", "gps+refit=1"))
