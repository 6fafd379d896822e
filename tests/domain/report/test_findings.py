"""Alarms and notes: when they come, what they say, and when they go. Everything is folded from a log."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import pytest

from evenodds_service.domain.arrays import FloatArray, IntArray
from evenodds_service.domain.learning.checkpoint import from_bytes, to_bytes
from evenodds_service.domain.learning.features import Pool
from evenodds_service.domain.learning.fold import fold
from evenodds_service.domain.learning.guardrails import BLOCK_OBSERVATIONS, SKILL_BLOCKS
from evenodds_service.domain.learning.state import State
from evenodds_service.domain.log_entries import ObserveEntry, PoolEntry, SelectEntry
from evenodds_service.domain.report.alarms import KINDS, Alarm, Remedy
from evenodds_service.domain.report.findings import alarms, notes
from evenodds_service.domain.report.report import report
from evenodds_service.domain.report.verdict import summarised
from evenodds_service.domain.settings import RunSettings

if TYPE_CHECKING:
    from tests.domain.conftest import MakeBlock

SIZE, BATCH, CERTAINTY = 8, 32, 12.0
SETTINGS = RunSettings(group_size=SIZE)
MATH, CODE = 0, 1
WARM = 8
"""Steps after which forecasts are judged."""

Rates = float | FloatArray


class Log:
    """A run of two categories whose forecasts and true rates the test says. Prompts come in turn."""

    def __init__(
        self,
        make_block: MakeBlock,
        *,
        n: int = 4_000,
        seed: int = 0,
        names: tuple[str | None, str | None] = ("math", "code"),
    ) -> None:
        self.pool = Pool(surface_width=0, embedding_width=0)
        self.pool.append(make_block(n, groups=tuple(names[i % 2] for i in range(n))))
        self.state = fold(State(), PoolEntry(1, n), self.pool)
        self.rng, self.n, self.next_step, self._next = np.random.default_rng(seed), n, 0, 0

    def select(
        self,
        forecast: Rates,
        *,
        prompts: IntArray | None = None,
        control: float = 0.0,
        unseen_share: float | None = None,
    ) -> IntArray:
        """A batch whose success rates are forecast so."""
        if prompts is None:
            prompts = np.arange(self._next, self._next + BATCH) % self.n
            self._next += BATCH
        m = np.broadcast_to(np.asarray(forecast, dtype=np.float64), prompts.shape)
        entry = SelectEntry(
            self.state.position + 1,
            self.next_step,
            prompts,
            f"s{self.next_step}",
            control,
            np.arange(len(prompts)) < control * len(prompts) if control else None,
            m * CERTAINTY,
            (1 - m) * CERTAINTY,
            unseen_share,
        )
        fold(self.state, entry, self.pool)
        self.next_step += 1
        return prompts

    def observe(self, step: int, prompts: IntArray, k: FloatArray, *, size: int = SIZE, selection: bool = True) -> None:
        entry = ObserveEntry(
            self.state.position + 1,
            step,
            prompts,
            k,
            np.full(len(prompts), float(size)),
            (k > 0) & (k < size),
            f"s{step}" if selection else None,
            step if selection else None,
        )
        fold(self.state, entry, self.pool)

    def drawn(self, forecast: Rates, prompts: IntArray) -> FloatArray:
        """Successes as they are if the forecast is right: the prompts' rates are spread around it."""
        m = np.broadcast_to(np.asarray(forecast, dtype=np.float64), prompts.shape)
        rates = self.rng.beta(m * CERTAINTY, (1 - m) * CERTAINTY)
        return self.rng.binomial(SIZE, rates).astype(np.float64)

    def steps(self, n: int, forecast: Rates = 0.5, *, true: Rates | None = None, control: float = 0.0) -> None:
        """Steps whose outcomes are drawn with the forecast, or with other rates."""
        for _ in range(n):
            prompts = self.select(forecast, control=control)
            self.observe(self.next_step - 1, prompts, self.drawn(forecast if true is None else true, prompts))

    def alarms(self, settings: RunSettings = SETTINGS) -> dict[str, Alarm]:
        found = alarms(self.state, self.pool, settings)
        for alarm in found:
            assert alarm.code in KINDS
            assert alarm.message.endswith(f" {alarm.next_step}")
            assert not alarm.message[0].islower()
            assert alarm.message.endswith(".")
        return {alarm.code: alarm for alarm in found}

    def notes(self) -> dict[str, Alarm]:
        return {note.code: note for note in notes(self.state, SETTINGS)}


@pytest.fixture
def log(make_block: MakeBlock) -> Log:
    return Log(make_block)


def test_a_new_run_has_no_alarms_and_no_data(log: Log) -> None:
    assert log.alarms() == {}
    assert log.notes() == {}
    assert summarised(log.state, log.pool, SETTINGS).verdict == "no_data"


class TestForecastOff:
    def test_a_dead_verifier_is_told_at_its_first_step_with_the_call_that_takes_it_back(self, log: Log) -> None:
        log.steps(20)
        assert log.alarms() == {}

        log.steps(1, true=1e-9)

        alarm = log.alarms()["forecast_off"]
        assert alarm.message == (
            "The run: since step 20, success rates have been far lower than forecast: 0.00 on average over 32 prompts, "
            "where 0.50 was forecast. Check the verifier and the trainer's log at step 20. If these outcomes are "
            'wrong, make the run forget them: POST /runs/{run}/retract with {"from_step": 20, "to_step": 20}.'
        )
        assert (alarm.since_step, alarm.value, alarm.category) == (20, 0.0, None)
        assert alarm.limit == pytest.approx(1 / (1 + np.e))
        assert alarm.remedy == Remedy("retract", {"from_step": 20, "to_step": 20})

    def test_it_stands_while_the_model_adapts_and_ends_with_outcomes_as_forecast(self, log: Log) -> None:
        log.steps(20)
        log.steps(3, 1e-3, true=1e-9)  # forecast already, hardly surprising
        assert "forecast_off" not in log.alarms()
        log.steps(2, true=1e-9)
        log.steps(30, 1e-3, true=1e-9)
        assert log.alarms()["forecast_off"].remedy == Remedy("retract", {"from_step": 20, "to_step": 54})

        log.steps(4)

        assert "forecast_off" not in log.alarms()
        note = log.notes()["forecast_was_off"]
        assert note.remedy == Remedy("retract", {"from_step": 20, "to_step": 54})
        assert note.message.startswith("From step 20 to step 54, outcomes were far from their forecasts. They are as ")

    def test_flipped_outcomes_are_told_though_their_mean_is_as_forecast(self, log: Log) -> None:
        spread = np.linspace(0.2, 0.8, BATCH)
        log.steps(20, spread)
        assert log.alarms() == {}

        log.steps(3, spread, true=1 - spread)

        alarm = log.alarms()["forecast_off"]
        assert alarm.since_step == 20
        assert alarm.message.startswith(
            "The run: since step 20, prompts that were forecast to be easy have been hard, and the hard ones easy, "
        )

    def test_outcomes_that_come_back_after_a_fault_are_not_blamed_themselves(self, log: Log) -> None:
        log.steps(20)
        log.steps(3, true=1e-9)
        log.steps(3, 0.02, true=0.5)  # the model expects what the fault has taught it

        alarm = log.alarms()["forecast_off"]
        assert alarm.since_step == 23
        assert alarm.remedy == Remedy("retract", {"from_step": 20, "to_step": 22})
        assert alarm.next_step.startswith(
            "This follows a fault from step 20 to step 22, and the run has learned from it."
        )

    @pytest.mark.parametrize("shift", [-0.12, 0.12])
    def test_forecasts_that_are_a_little_off_raise_nothing(self, log: Log, shift: float) -> None:
        for _ in range(100):
            log.steps(1, 0.5, true=0.5 + shift)
            assert log.alarms() == {}

    def test_a_run_that_knows_nothing_yet_is_not_judged(self, log: Log) -> None:
        batches = [log.select(0.5) for _ in range(WARM)]  # all chosen before the first outcome

        for step, prompts in enumerate(batches):
            log.observe(step, prompts, log.drawn(0.04, prompts))

        assert log.alarms().keys() <= {"outcomes_stopped"}

    @pytest.mark.parametrize("name", ["code", None])
    def test_a_category_alone_may_be_off_and_does_not_break_the_run(
        self, make_block: MakeBlock, name: str | None
    ) -> None:
        log = Log(make_block, names=("math", name))
        log.steps(20)
        for _ in range(3):
            prompts = log.select(0.5)
            log.observe(log.next_step - 1, prompts, np.where(prompts % 2 == CODE, 7.0, log.drawn(0.5, prompts)))

        alarm = log.alarms()["forecast_off"]
        assert (alarm.scope, alarm.category, alarm.since_step, alarm.remedy) == ("category", name, 20, None)
        said = f"Category {name!r}" if name else "Prompts without a category"
        assert alarm.message.startswith(f"{said}: since step 20, success rates have been far higher than forecast")
        assert summarised(log.state, log.pool, SETTINGS).verdict == "learning"


def of_categories(log: Log, math: Callable[[IntArray], FloatArray], code: Callable[[IntArray], FloatArray]) -> None:
    prompts = log.select(0.5)
    log.observe(log.next_step - 1, prompts, np.where(prompts % 2 == MATH, math(prompts), code(prompts)))


class TestSilentCategories:
    def test_none_of_61_against_a_forecast_of_a_third_is_told(self, log: Log) -> None:
        log.steps(20)
        hard = 0.046  # so that 31% of groups of eight are informative
        for n in (30, 31):
            prompts = np.arange(2 * n)
            m = np.where(prompts % 2 == CODE, hard, 0.5)
            log.select(m, prompts=prompts)
            log.observe(log.next_step - 1, prompts, np.where(prompts % 2 == CODE, 0.0, log.drawn(0.5, prompts)))

        alarm = log.alarms()["category_silent"]
        assert (alarm.category, alarm.since_step, alarm.value) == ("code", 20, 0.0)
        assert alarm.limit == pytest.approx(0.27 * 61, rel=0.1)
        assert alarm.message.startswith("Category 'code': since step 20, none of 61 groups was informative, where ")

    def test_one_informative_outcome_ends_it(self, log: Log) -> None:
        log.steps(20)
        for _ in range(4):
            of_categories(log, lambda p: log.drawn(0.5, p), lambda p: np.zeros(len(p)))
        assert log.alarms()["category_silent"].category == "code"

        of_categories(log, lambda p: log.drawn(0.5, p), lambda p: np.where(p == p[p % 2 == CODE][0], 4.0, 0.0))

        assert "category_silent" not in log.alarms()

    def test_a_dead_verifier_is_no_matter_of_a_category(self, log: Log) -> None:
        """Also where one category was silent a little longer than the others."""
        log.steps(20)
        of_categories(log, lambda p: log.drawn(0.5, p), lambda p: np.zeros(len(p)))
        for _ in range(10):
            log.steps(1, true=1e-9)
            assert "category_silent" not in log.alarms()

    def test_what_is_forecast_to_be_silent_may_be(self, log: Log) -> None:
        log.steps(20)
        for _ in range(10):
            prompts = log.select(np.where(np.arange(BATCH) % 2 == CODE, 0.002, 0.5))
            log.observe(log.next_step - 1, prompts, np.where(prompts % 2 == CODE, 0.0, log.drawn(0.5, prompts)))

        assert log.alarms() == {}

    def test_a_category_that_is_chosen_and_never_answered_is_told(self, log: Log) -> None:
        log.steps(20)
        for _ in range(9):
            prompts = log.select(0.5)
            math = prompts[prompts % 2 == MATH]
            log.observe(log.next_step - 1, math, log.drawn(0.5, math))

        alarm = log.alarms()["category_silent"]
        assert (alarm.category, alarm.value, alarm.limit) == ("code", 144, 128)
        assert "144 prompts were chosen and hardly an outcome came" in alarm.message


class TestConstantRewards:
    def test_they_are_told_as_long_as_no_other_reward_comes(self, log: Log) -> None:
        log.steps(20)
        log.steps(2, true=1e-9)
        assert log.alarms()["rewards_constant"].message.startswith(
            "Every reward since step 20 has been 0: 512 attempts at 64 prompts, of which the forecasts expected some to"
        )
        log.steps(40, 1e-3, true=1e-9)
        assert "rewards_constant" in log.alarms()

        log.steps(1)

        assert "rewards_constant" not in log.alarms()

    def test_also_from_the_first_step_on(self, log: Log) -> None:
        log.steps(3, true=1 - 1e-9)

        assert log.alarms()["rewards_constant"].since_step == 0
        assert "has been 1:" in log.alarms()["rewards_constant"].message

    def test_where_they_are_forecast_they_may_be_constant(self, log: Log) -> None:
        log.steps(20)
        log.steps(20, 0.9995, true=1 - 1e-9)

        assert log.alarms() == {}


class TestGroupSize:
    @pytest.mark.parametrize("size", [4, 16])
    def test_another_number_of_attempts_is_told_after_three_batches(self, log: Log, size: int) -> None:
        raised = []
        for step in range(5):
            prompts = log.select(0.5)
            log.observe(step, prompts, np.minimum(log.drawn(0.5, prompts), size), size=size)
            raised.append("group_size_mismatch" in log.alarms())

        assert raised == [False, False, False, True, True]
        alarm = log.alarms()["group_size_mismatch"]
        assert (alarm.since_step, alarm.value, alarm.limit) == (0, size, SIZE)
        assert f'PUT /runs/{{run}} with {{"group_size": {size}}}' in alarm.next_step
        assert "group_size_mismatch" not in log.alarms(RunSettings(group_size=size))

    def test_attempts_in_several_calls_and_lost_ones_are_no_mismatch(self, log: Log) -> None:
        for step in range(8):
            prompts = log.select(0.5)
            half = np.minimum(log.drawn(0.5, prompts), 4.0)
            log.observe(step, prompts, half, size=4)
            assert "group_size_mismatch" not in log.alarms()
            log.observe(step, prompts[3:], half[3:], size=4)  # some are lost

        assert "group_size_mismatch" not in log.alarms()


class TestRestart:
    def test_steps_that_are_reported_again_are_told_with_the_rewind(self, log: Log) -> None:
        batches = [log.select(0.5) for _ in range(6)]
        for step, prompts in enumerate(batches):
            log.observe(step, prompts, log.drawn(0.5, prompts))
        for step in (2, 3):
            log.observe(step, batches[step], log.drawn(0.5, batches[step]))
            assert "run_restarted" not in log.alarms()

        log.observe(4, batches[4], log.drawn(0.5, batches[4]))

        alarm = log.alarms()["run_restarted"]
        assert alarm.remedy == Remedy("rewind", {"step": 1})
        assert alarm.message.startswith("Steps 2 to 4 have been reported a second time, with the same prompts.")

    def test_it_ends_where_the_run_goes_on(self, log: Log) -> None:
        batches = [log.select(0.5) for _ in range(6)]
        for step in (*range(6), 2, 3, 4):
            log.observe(step, batches[step], log.drawn(0.5, batches[step]))

        log.steps(1)

        assert "run_restarted" not in log.alarms()

    def test_late_outcomes_and_outcomes_in_parts_are_no_restart(self, log: Log) -> None:
        batches = [log.select(0.5) for _ in range(12)]
        for step in (0, 4, 1, 5, 2, 6, 3, 7):
            half = np.minimum(log.drawn(0.5, batches[step]), 4.0)
            log.observe(step, batches[step], half, size=4)
            log.observe(step, batches[step], half, size=4)
            assert "run_restarted" not in log.alarms()


class TestLift:
    def test_a_choice_that_is_no_better_than_chance_is_told_once_it_is_certain(self, log: Log) -> None:
        raised = []
        for _ in range(250):
            log.steps(1, 0.2, control=0.5)
            raised.append("lift_not_positive" in log.alarms())

        assert not any(raised[:60])
        assert raised[-1]
        assert summarised(log.state, log.pool, SETTINGS).verdict == "not_helping"

    def test_a_dead_verifier_says_nothing_about_the_choice(self, log: Log) -> None:
        good = np.where(np.arange(BATCH) < 8, 0.02, 0.5)  # the control arm meets hopeless prompts
        log.steps(20, good, control=0.25)
        before = summarised(log.state, log.pool, SETTINGS)
        log.steps(40, good, true=1e-9, control=0.25)
        log.steps(1, good, control=0.25)

        after = summarised(log.state, log.pool, SETTINGS)

        assert "lift_not_positive" not in log.alarms()
        assert before.verdict == "helping"
        assert before.rollouts_saved is not None
        assert after.rollouts_saved is not None
        assert after.rollouts_saved.value == pytest.approx(before.rollouts_saved.value, rel=0.15)


class TestOthers:
    def test_eight_batches_without_an_outcome_are_told_until_one_comes(self, log: Log) -> None:
        for _ in range(8):
            assert log.alarms() == {}
            prompts = log.select(0.5)

        assert log.alarms()["outcomes_stopped"] == Alarm(
            "outcomes_stopped",
            "8 batches were selected since step 0 and no outcome was observed. Check that the trainer reports to POST "
            "/observe of this run, and that no filter drops all outcomes.",
            since_step=0,
            value=8,
            limit=8,
            next_step="Check that the trainer reports to POST /observe of this run, and that no filter drops all "
            "outcomes.",
        )
        assert summarised(log.state, log.pool, SETTINGS).verdict == "broken"
        log.observe(3, prompts[:1], np.ones(1), selection=False)
        assert log.alarms() == {}

    @pytest.mark.parametrize(("n_chosen", "is_told"), [(8, True), (4_000, False)])
    def test_batches_without_new_prompts_are_told_where_some_were_never_tried(
        self, log: Log, n_chosen: int, is_told: bool
    ) -> None:
        for i in range(17):
            prompts = (np.arange(8) + 8 * i) % n_chosen
            log.select(0.5, prompts=prompts)
            log.observe(i, prompts, log.drawn(0.5, prompts))

        assert ("coverage_stalls" in log.alarms()) == is_told
        if is_told:
            assert log.alarms()["coverage_stalls"].message == (
                "Since step 1, 0 of the 128 prompts in 16 batches were new, although 100% of the pool was never tried. "
                "Raise reprobe_share or optimism, or set max_visits."
            )

    @pytest.mark.parametrize(("unseen_share", "is_told"), [(0.0, False), (0.5, True)])
    def test_batches_bring_nothing_new_where_nothing_new_might_be_chosen(
        self, log: Log, unseen_share: float, is_told: bool
    ) -> None:
        for i in range(17):
            prompts = log.select(0.5, prompts=np.arange(8), unseen_share=unseen_share)
            log.observe(i, prompts, log.drawn(0.5, prompts))

        assert ("coverage_stalls" in log.alarms()) == is_told
        if is_told:
            assert "although 50% of the prompts that might be chosen were" in log.alarms()["coverage_stalls"].message

    def test_a_skill_that_is_not_positive_is_a_note_and_a_fallback_an_alarm(self, log: Log) -> None:
        for step in range(SKILL_BLOCKS):
            assert log.notes() == {}
            log.state.guardrails.compare(step, -0.1, BLOCK_OBSERVATIONS)

        assert log.alarms() == {}
        note = log.notes()["skill_not_positive"]
        assert (note.since_step, note.limit) == (7, 0.0)
        assert "Nothing needs to be done" in note.message
        for step in range(SKILL_BLOCKS):
            log.state.guardrails.compare(8 + step, -10.0, BLOCK_OBSERVATIONS)
        assert log.alarms()["fallback"].message.startswith("Over the newest 512 observations the model's skill ")
        assert log.alarms(RunSettings(fallback=False)) == {}
        assert log.alarms(RunSettings(predictor="mopps")) == {}


@pytest.mark.parametrize(
    ("true", "control", "verdict"), [(None, 0.0, "learning"), (1e-9, 0.0, "broken"), (None, 0.25, "helping")]
)
def test_the_verdict_says_how_the_run_stands(log: Log, true: float | None, control: float, verdict: str) -> None:
    good = np.where(np.arange(BATCH) < 8, 0.02, 0.5)
    log.steps(12, good, control=control)
    log.steps(2, good, true=true, control=control)

    summary = summarised(log.state, log.pool, SETTINGS)

    assert summary.verdict == verdict
    assert summary.head_step == 13
    assert [(point.first_step, point.last_step) for point in summary.informative_shares] == [(i, i) for i in range(14)]
    assert (summary.lift is not None) == (control > 0)


@pytest.mark.parametrize("control", [0.0, 0.25])
def test_the_figures_of_a_summary_are_those_of_the_report(log: Log, control: float) -> None:
    log.steps(40, np.where(np.arange(BATCH) < 8, 0.02, 0.5), control=control)

    summary, found = summarised(log.state, log.pool, SETTINGS), report(log.state, log.pool)

    last, newest, lift = found.windows[-1], found.newest, found.lift
    assert newest is not None
    assert (lift is not None) == (control > 0)
    arms = {"policy": last.policy_informative_share, "control": last.control_informative_share}
    expected = {
        "coverage": found.coverage.tried_share,
        "skill": found.skill.per_observation,
        "rollouts_saved_share": lift.rollouts_saved_share if lift else None,
        "forecast_error": newest.forecast_error,
        "rank_correlation": newest.rank_correlation,
        **{f"informative_share_{arm}": share.value if share else None for arm, share in arms.items()},
    }
    assert summary.figures == {name: value for name, value in expected.items() if value is not None}
    shares = [(w.first_step, w.last_step, w.informative_share) for w in found.windows]
    assert [(point.first_step, point.last_step, point.share) for point in summary.informative_shares] == shares
    assert (summary.rollouts_saved and summary.rollouts_saved.value) == (lift and lift.rollouts_saved)


def test_a_replica_that_starts_from_a_checkpoint_raises_the_same_alarms(make_block: MakeBlock) -> None:
    log, other = Log(make_block), Log(make_block)
    for each in (log, other):
        each.steps(21, np.linspace(0.2, 0.8, BATCH))
        each.steps(1, 0.5, true=1e-9)
    other.state = from_bytes(to_bytes(other.state))
    for each in (log, other):
        each.steps(4, 0.3, true=1e-9)

    assert other.alarms() == log.alarms()
    assert to_bytes(other.state) == to_bytes(log.state)
