"""The arms of `trainings`: who chooses the batches of a training run.

An arm is a `rivals.Method` (`select` prompts, `observe` outcomes, `predict`) made for one course, and how its trainer
rolls out what it chose. `gps` is the service's own fold and choice, as in `contenders`; its rules of choice that the
service does not have are tried here first, and chosen on tuning seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Protocol

import numpy as np
from benchmarks.contenders import Gps, GpsPaper, Parts
from benchmarks.rivals import Forecast, Method, MoPPS, Uniform
from benchmarks.worlds import World

from evenodds_service.domain import exact
from evenodds_service.domain.arrays import BoolArray, FloatArray, IntArray
from evenodds_service.domain.distributions import informative_moments
from evenodds_service.domain.learning.fold import fold
from evenodds_service.domain.learning.prediction import beliefs_of
from evenodds_service.domain.log_entries import SelectEntry
from evenodds_service.domain.refits import FIRST_FIT_OBSERVATIONS
from evenodds_service.domain.selection.batch import Candidates, Choice, Shares, choose
from evenodds_service.domain.selection.eligibility import held_back, rest_steps, resting
from evenodds_service.domain.selection.fill import Calibration, Fill, filled
from evenodds_service.domain.selection.pickers import DRAWN, Good, Likeness, MostUnlike, Picker, best
from evenodds_service.domain.selection.selection import REPROBE_SHARE, picker_of

WORKER_MOST = 2_048
"""Observations between two refits at most, as a run's settings have it by default."""

TOLERANCE = 0.1
"""How far below the best score a prompt is as good as the best: `diversity` of a run by default."""

SERVICE = "service"
PROGRESS_STEPS = 10
_EASY, _HARD = 0.95, 0.05


class Course(Protocol):
    """What an arm may know of the run it chooses for."""

    world: World
    batch_size: int
    seed: int

    def rates(self, prompts: IntArray) -> FloatArray:
        """Exact success rates of these prompts under the policy as it is now. For the oracle."""


@dataclass(frozen=True, slots=True)
class Arm:
    """How batches are chosen, and what a trainer does with them.

    Attributes:
        name: As given on the command line.
        in_waves: Further batches are chosen and rolled out in the same step until B groups are informative, eight at
            most (dynamic sampling, DAPO, arXiv 2503.14476); the update is made on the first B informative ones.
        keeps_informative: The update is made on informative groups only: they alone cost one. Else on the whole batch.
        reads_prior: Whether it reads what is known of prompts beforehand.
    """

    name: str
    make: Callable[[Course], Method]
    in_waves: bool = False
    keeps_informative: bool = False
    reads_prior: bool = False


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule of choice for `gps`; the one of the service by default.

    Attributes:
        rest: Steps for which a chosen prompt rests; -1 is the service's own rest.
        cap: The rest is at most this share of an epoch (N / B steps).
        draw: `service`, as the service; `gd<k>`, the most unlike of k n drawn at random among those within .1 of the
            best, the n best where these are fewer; `pd<k>`, the most unlike of 3 n drawn in proportion to
            u^k.
        fill: 0 asks for B prompts. Else for so many that B informative groups are expected, times this factor.
        most: Fill asks for at most so many times B.
        refit: 1 refits the shared model when a worker would.
        optimism: c in u = V_G + c sd(V_G).
        progress: This share of each batch is divided among the categories in proportion to their learning progress,
            the rise of their mean rate, as believed, within `PROGRESS_STEPS`.
    """

    rest: int = -1
    cap: float = 0.5
    draw: str = SERVICE
    fill: float = 0.0
    most: float = 6.0
    refit: int = 0
    optimism: float = 0.5
    progress: float = 0.0

    def __post_init__(self) -> None:
        if self.draw != SERVICE and not (
            self.draw[:2] in ("gd", "pd") and self.draw[2:].isdigit() and self.draw[2:] > "0"
        ):
            raise ValueError(f"draw {self.draw!r} is none of service, gd<k>, pd<k> with k of at least 1")
        if self.fill and self.rest == 0:
            raise ValueError("fill without a rest asks for the same prompts again and again: give a rest of 1 at least")


def arm_named(name: str) -> Arm:
    """The arm of that name; `gps` takes the fields of `Rule` with it, as in `gps+rest=25+draw=pd3+fill=1`.

    Raises:
        ValueError: no such arm, field or value.
    """
    base, *parts = name.split("+")
    if base != "gps":
        if base not in RIVALS or parts:
            raise ValueError(f"arm {name!r} is none of {', '.join(RIVALS)}, gps, gps+FIELD=VALUE")
        return RIVALS[base]
    known: Mapping[str, Callable[[str], object]] = {each.name: type(each.default) for each in fields(Rule)}
    rule = Rule()
    for part in parts:
        field, _, value = part.partition("=")
        if field not in known:
            raise ValueError(f"field {field!r} of arm {name!r} is none of {', '.join(known)}")
        try:
            rule = replace(rule, **{field: known[field](value)})  # type: ignore[arg-type]  # of the field's own type
        except ValueError as error:
            raise ValueError(f"{part!r} of arm {name!r}: {error}") from None
    return Arm(name, lambda course: Ruled(course, rule), keeps_informative=rule.fill > 0, reads_prior=True)


class Shuffled(Uniform):
    """The pool in random order, epoch after epoch, as trainers read it."""

    def __init__(self, n_prompts: int) -> None:
        super().__init__(n_prompts)
        self._left: IntArray = np.empty(0, dtype=np.int64)

    def select(self, candidates: IntArray, batch_size: int, *, step: int, generator: np.random.Generator) -> IntArray:
        chosen = self._left[:batch_size]
        self._left = self._left[batch_size:]
        if len(chosen) < batch_size:
            # What was just chosen, in this batch or an earlier one of the step, comes last in the new epoch.
            fresh = generator.permutation(np.setdiff1d(candidates, chosen))
            others = generator.permutation(np.setdiff1d(np.arange(self._n_prompts), fresh))
            epoch = np.concatenate((fresh, others))
            missing = batch_size - len(chosen)
            chosen, self._left = np.concatenate((chosen, epoch[:missing])), epoch[missing:]
        return chosen


class Pools(Uniform):
    """prime-rl's difficulty pools, by its documentation: chance among the prompts that the latest group did not show
    to be easy (mean reward of at least .95) or hard (at most .05); those are not drawn any more.

    When fewer than a batch are left, all come back: the tool's own answer is an error.
    """

    def __init__(self, n_prompts: int) -> None:
        super().__init__(n_prompts)
        self._is_normal_N = np.ones(n_prompts, dtype=bool)

    def observe(self, step: int, prompts: IntArray, successes: FloatArray, attempts: FloatArray) -> None:
        super().observe(step, prompts, successes, attempts)
        rates = successes / attempts
        self._is_normal_N[prompts] = (rates < _EASY) & (rates > _HARD)

    def select(self, candidates: IntArray, batch_size: int, *, step: int, generator: np.random.Generator) -> IntArray:
        normal = candidates[self._is_normal_N[candidates]]
        if len(normal) < batch_size:
            self._is_normal_N[:] = True
            normal = candidates
        return super().select(normal, batch_size, step=step, generator=generator)


class Oracle:
    """Knows the exact rates of the policy at each step, and draws among the prompts that are likely informative.

    Of 32 B random prompts, chance among those whose group is informative with a probability of at least .8; where
    these are too few, the best.
    """

    LOOKED_AT, ENOUGH = 32, 0.8

    def __init__(self, course: Course) -> None:
        self._course = course
        self._rates_N = np.full(course.world.n_prompts, 0.5)

    def observe(self, step: int, prompts: IntArray, successes: FloatArray, attempts: FloatArray) -> None:
        """Nothing is learned from outcomes."""

    def predict(self) -> Forecast:
        g = self._course.world.group_size
        return Forecast(self._rates_N, 1.0 - self._rates_N**g - (1.0 - self._rates_N) ** g)

    def select(self, candidates: IntArray, batch_size: int, *, step: int, generator: np.random.Generator) -> IntArray:
        some = generator.choice(candidates, min(self.LOOKED_AT * batch_size, len(candidates)), replace=False)
        self._rates_N[some] = self._course.rates(some)
        informative = self.predict().informative_N[some]
        order = np.lexsort((generator.random(len(some)), -np.minimum(informative, self.ENOUGH)))
        return some[order[:batch_size]]


@dataclass(frozen=True, slots=True, eq=False)
class InProportion:
    """`factor` n by chance in proportion to score^power, without replacement.

    The prompt whose exponential waiting time -log(tie) / score^power is the shortest comes first (the same draw as the
    greatest of log-weights with Gumbel noise).
    """

    power: int
    factor: int = DRAWN

    def __call__(self, scores_N: FloatArray, ties_N: FloatArray, among_N: BoolArray, n: int) -> IntArray:
        rows = np.flatnonzero(among_N)
        weights = np.maximum(scores_N[rows], 1e-9)
        waiting = -exact.log(1.0 - ties_N[rows])
        for _ in range(self.power):
            waiting /= weights
        return rows[best(-waiting, ties_N[rows], np.ones(len(rows), dtype=bool), self.factor * n)]


class Ruled(Gps):
    """`gps` with a rule of choice: that of the service, or one that is tried."""

    def __init__(self, course: Course, rule: Rule) -> None:
        super().__init__(course.world, Parts(optimism=rule.optimism))
        self._rule, self._epoch_steps = rule, course.world.n_prompts / course.batch_size
        self._fitted = 0
        self._kept: tuple[int, FloatArray, FloatArray, FloatArray] | None = None
        names = np.array([str(prompt.category) for prompt in course.world.recording.prompts])
        self._members = {str(name): names == name for name in np.unique(names)}
        self._group_means: list[FloatArray] = []  # by step

    def observe(self, step: int, prompts: IntArray, successes: FloatArray, attempts: FloatArray) -> None:
        super().observe(step, prompts, successes, attempts)
        if self._rule.refit:
            n = self._state.n_observations
            if n - self._fitted >= min(WORKER_MOST, max(FIRST_FIT_OBSERVATIONS, self._fitted)):
                self.refit(step)
                self._fitted = n

    def predict(self) -> Forecast:
        means, informative, _ = self._beliefs()
        return Forecast(means, informative)

    def select(self, candidates: IntArray, batch_size: int, *, step: int, generator: np.random.Generator) -> IntArray:
        rule, state = self._rule, self._state
        allowed = np.zeros(state.n_prompts, dtype=bool)
        allowed[candidates] = True
        _, informative, deviation = self._beliefs()
        scores = informative + rule.optimism * deviation
        last_seen = np.maximum(state.last_selected_N, state.last_step_N)
        rest = rest_steps(state.n_prompts, batch_size)
        if rule.rest >= 0:
            rest = min(rule.rest, math.floor(rule.cap * self._epoch_steps))
        held = resting(last_seen, step=step, rest=rest)
        picker = self._picker()
        shares = Shares(self._least(), is_least_strict=False, reprobe=REPROBE_SHARE)

        def of_size(n: int) -> Choice:
            rested = held_back(
                allowed, held, last_seen, scores_N=scores, batch_size=n, groups={}, caps={}, all_alike=True
            )
            among = Candidates(rested, rested, last_seen)
            return choose(scores, informative, among, shares, batch_size=n, picker=picker, generator=generator)

        if rule.fill:
            fill = Fill(round(rule.most * batch_size), rule.fill)
            calibration = Calibration(state.found_informative, state.foreseen_informative)
            prompts = filled(batch_size, fill, calibration, of_size, n_eligible=len(candidates)).prompts
        else:
            prompts = of_size(batch_size).prompts
        fold(state, SelectEntry(state.position + 1, step, prompts), self._pool)
        return prompts

    def _beliefs(self) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Of the whole pool: mean rates, and means and deviations of V_G. A selection does not move them."""
        version = self._state.n_observations + self._state.model_version
        if self._kept is None or self._kept[0] != version:
            a, b = beliefs_of(self._state, self._pool)
            self._kept = (version, a / (a + b), *informative_moments(a, b, self._group_size))
        return self._kept[1:]

    def _least(self) -> dict[str, tuple[float, BoolArray]]:
        """Least shares of the categories by their learning progress. Beliefs are pooled and shrunken already."""
        if not self._rule.progress:
            return {}
        means_N, _, _ = self._beliefs()
        self._group_means.append(np.array([means_N[members].mean() for members in self._members.values()]))
        if len(self._group_means) <= PROGRESS_STEPS:
            return {}
        rise = np.maximum(self._group_means[-1] - self._group_means[-1 - PROGRESS_STEPS], 0.0)
        if not rise.any():
            return {}
        shares = self._rule.progress * rise / rise.sum()
        return {
            name: (float(share), members) for share, (name, members) in zip(shares, self._members.items(), strict=True)
        }

    def _picker(self) -> Picker:
        draw, recent = self._rule.draw, self._state.recent_batches
        if draw == SERVICE:
            return picker_of("yield", TOLERANCE, recent, self._directions)
        kind, k = draw[:2], int(draw[2:])
        likeness = Likeness.to(recent, self._directions)
        return MostUnlike(Good(TOLERANCE, factor=k) if kind == "gd" else InProportion(k), likeness)


RIVALS: Mapping[str, Arm] = {
    arm.name: arm
    for arm in (
        Arm("uniform", lambda course: Shuffled(course.world.n_prompts)),
        Arm("dynamic", lambda course: Shuffled(course.world.n_prompts), in_waves=True, keeps_informative=True),
        Arm("mopps", lambda course: MoPPS(course.world.n_prompts, course.world.group_size)),
        Arm("gps-paper", lambda course: GpsPaper(course.world, seed=course.seed)),
        Arm("prime-rl", lambda course: Pools(course.world.n_prompts)),
        Arm("oracle", Oracle),
    )
}
