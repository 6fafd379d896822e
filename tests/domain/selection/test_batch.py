from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from evenodds_service.domain.arrays import BoolArray, FloatArray, IntArray
from evenodds_service.domain.distributions import informative_moments, target_moments
from evenodds_service.domain.selection.batch import Candidates, Choice, Shares, choose
from evenodds_service.domain.selection.eligibility import rest_steps, resting
from evenodds_service.domain.selection.pickers import Good, Likeness, MostUnlike, greedy_diverse
from evenodds_service.domain.selection.scores import scores
from evenodds_service.domain.selection.selection import REPROBE_SHARE, picker_of
from evenodds_service.domain.settings import Acquisition
from evenodds_service.errors import NotEnoughPrompts

quick = settings(max_examples=30)
SEED = st.integers(0, 2**32 - 1)


def unit(rng: np.random.Generator, n: int, d: int = 5) -> FloatArray:
    rows = rng.normal(size=(n, d))
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True))


class Shop:
    """A pool with random scores, to choose from."""

    def __init__(self, seed: int, n: int = 200) -> None:
        rng = np.random.default_rng(seed)
        self.n = n
        self.scores_N: FloatArray = rng.random(n)
        self.informative_N: FloatArray = rng.random(n)
        self.eligible_N: BoolArray = rng.random(n) < 0.7
        self.last_seen_N: IntArray = rng.integers(-1, 20, size=n)
        self.directions_N_D = unit(rng, n)
        self.recent: tuple[IntArray, ...] = (rng.integers(0, n, size=10), rng.integers(0, n, size=10))
        self.groups: dict[str, tuple[float, BoolArray]] = {}
        self.groups_at_most: dict[str, tuple[float, BoolArray]] = {}
        self.are_groups_strict = True
        self.reprobe_share: float | None = None
        self.control_share = 0.0
        self.control_eligible_N: BoolArray | None = None

    def choose(self, batch_size: int, *, seed: int = 0, diverse: bool = True, diversity: float = 0.1) -> Choice:
        control_N = self.eligible_N if self.control_eligible_N is None else self.control_eligible_N
        reprobe = self.reprobe_share
        if reprobe is None:
            reprobe = REPROBE_SHARE if diverse else 0.0
        return choose(
            self.scores_N,
            self.informative_N,
            Candidates(self.eligible_N, control_N, self.last_seen_N),
            Shares(self.groups, self.groups_at_most, self.are_groups_strict, reprobe, self.control_share),
            batch_size=batch_size,
            picker=picker_of(
                "yield" if diverse else "uniform", diversity, self.recent, self.directions_N_D.__getitem__
            ),
            generator=np.random.default_rng(seed),
        )


def slow_pad_to(shop: Shop, choice: Choice) -> int | None:
    """Take the batch, then the others one by one from the best score down."""
    size = len(choice.prompts)
    expected = shop.informative_N[choice.prompts].sum()
    if expected >= size - 1e-9:
        return size
    others = [i for i in np.argsort(-shop.scores_N) if shop.eligible_N[i] and i not in set(choice.prompts.tolist())]
    for count, i in enumerate(others, start=size + 1):
        expected += shop.informative_N[i]
        if expected >= size - 1e-9:
            return count
    return None


def slow_greedy(scores_S: FloatArray, directions: FloatArray, n: int, anchors: FloatArray | None) -> list[int]:
    """One at a time, every distance anew."""
    unit = 0.1 * max(scores_S.std(), 1e-3)

    def in_spreads(others: FloatArray) -> FloatArray:
        distances = np.array([np.mean([1 - x @ y for y in others]) for x in directions])
        spread = distances.std()
        return (distances - distances.mean()) / spread if spread > 1e-6 else np.zeros(len(directions))

    chosen: list[int] = []
    while len(chosen) < n:
        gains = scores_S.copy()
        if chosen:
            gains = gains + unit * in_spreads(directions[chosen])
        if anchors is not None:
            gains = gains + 0.5 * unit * in_spreads(anchors)
        gains[chosen] = -math.inf
        chosen.append(int(np.argmax(gains)))
    return chosen


@quick
@given(SEED, st.integers(1, 60), st.booleans())
def test_a_batch_has_the_size_asked_for_no_prompt_twice_and_only_eligible_ones(
    seed: int, batch_size: int, diverse: bool
) -> None:
    shop = Shop(seed)
    shop.groups = {"even": (0.3, np.arange(shop.n) % 2 == 0), "odd": (0.2, np.arange(shop.n) % 2 == 1)}

    prompts = shop.choose(batch_size, diverse=diverse).prompts

    assert prompts.dtype == np.int64
    assert len(prompts) == len(set(prompts.tolist())) == batch_size
    assert shop.eligible_N[prompts].all()


def test_all_that_is_eligible_may_be_chosen_at_once() -> None:
    shop = Shop(0)

    prompts = shop.choose(int(shop.eligible_N.sum())).prompts

    assert np.sort(prompts).tolist() == np.flatnonzero(shop.eligible_N).tolist()


@quick
@given(SEED, SEED, st.booleans())
def test_a_choice_is_the_same_for_the_same_state_arguments_and_seed(seed: int, choice: int, diverse: bool) -> None:
    one, other = (Shop(seed).choose(20, seed=choice, diverse=diverse) for _ in range(2))

    assert one.prompts.tolist() == other.prompts.tolist()
    assert one.pad_to == other.pad_to


@pytest.mark.parametrize("diverse", [True, False])
def test_ties_are_broken_by_the_seed_and_not_by_position(diverse: bool) -> None:
    shop = Shop(0, n=5_000)
    shop.scores_N[:] = 0.5
    shop.last_seen_N[:] = -1
    shop.directions_N_D[:] = 1.0

    batches = [shop.choose(20, seed=seed, diverse=diverse).prompts for seed in range(30)]

    assert len({tuple(sorted(b.tolist())) for b in batches}) == 30
    assert np.mean(batches) == pytest.approx(2_500, abs=350)


@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_without_directions_the_best_scores_are_taken_best_first(batch_size: int) -> None:
    shop = Shop(1)

    prompts = shop.choose(batch_size, diverse=False).prompts

    ranked = [i for i in np.argsort(-shop.scores_N) if shop.eligible_N[i]]
    assert prompts.tolist() == ranked[:batch_size]


@quick
@given(SEED, st.booleans(), st.sampled_from([1.0, -3.0]))
def test_adding_a_constant_to_all_scores_changes_nothing(seed: int, diverse: bool, constant: float) -> None:
    shop, raised = Shop(seed), Shop(seed)
    raised.scores_N = raised.scores_N + constant

    assert shop.choose(20, diverse=diverse).prompts.tolist() == raised.choose(20, diverse=diverse).prompts.tolist()


def test_too_large_a_batch_is_refused_with_what_there_is() -> None:
    shop = Shop(0, n=5)
    shop.eligible_N[:] = [True, False, True, True, False]

    with pytest.raises(NotEnoughPrompts, match=r"^batch_size asks for 4 prompts, 3 may be selected$") as caught:
        shop.choose(4)

    assert (caught.value.asked, caught.value.eligible, caught.value.group) == (4, 3, None)


def test_too_large_a_share_of_a_group_is_refused_with_what_there_is() -> None:
    shop = Shop(0, n=50)
    shop.eligible_N[:] = True
    members = np.arange(50) < 2
    shop.groups = {"math": (0.3, members)}

    message = r"^categories: the share of 'math' asks for 3 prompts, 2 may be selected$"
    with pytest.raises(NotEnoughPrompts, match=message) as caught:
        shop.choose(10)

    assert (caught.value.asked, caught.value.eligible, caught.value.group) == (3, 2, "math")


def test_advice_ends_the_refusal() -> None:
    error = NotEnoughPrompts(asked=4, eligible=3, advice=": load more")

    assert str(error) == "batch_size asks for 4 prompts, 3 may be selected: load more"


@quick
@given(SEED, st.floats(0, 0.6), st.floats(0, 0.4), st.integers(1, 40), st.booleans())
def test_each_group_gets_its_least_share(seed: int, one: float, other: float, batch_size: int, diverse: bool) -> None:
    shop = Shop(seed)
    hopeless = np.arange(shop.n) % 3 == 0
    shop.scores_N[hopeless] -= 10
    shop.groups = {"hopeless": (one, hopeless), "second": (other, np.arange(shop.n) % 3 == 1)}

    prompts = shop.choose(batch_size, diverse=diverse).prompts

    for share, members in shop.groups.values():
        assert members[prompts].sum() >= math.floor(share * batch_size)


def test_a_group_share_that_is_a_whole_number_is_not_lost_to_rounding() -> None:
    shop = Shop(0)
    hopeless = np.arange(shop.n) % 3 == 0
    shop.scores_N[hopeless] -= 10
    shop.groups = {"hopeless": (0.29, hopeless)}  # .29 * 100 is 28.999999999999996

    assert hopeless[shop.choose(100, diverse=False).prompts].sum() == 29


def test_five_in_a_hundred_are_the_least_recently_seen() -> None:
    shop = Shop(0)
    shop.eligible_N[:] = True
    shop.last_seen_N[:] = 10
    forgotten, never = [3, 50, 90], [7, 120]
    shop.last_seen_N[forgotten], shop.last_seen_N[never] = 2, -1
    shop.scores_N[forgotten + never] = -10

    assert set(forgotten + never) <= set(shop.choose(100).prompts.tolist())
    assert not set(forgotten + never) & set(shop.choose(100, diverse=False).prompts.tolist())
    of_twenty = [set(shop.choose(20, seed=seed).prompts.tolist()) for seed in range(40)]
    assert all(len(batch & set(forgotten + never)) == 1 for batch in of_twenty)
    assert 4 <= sum(bool(batch & set(forgotten)) for batch in of_twenty) <= 16


def test_a_quarter_of_the_floor_is_for_prompts_that_were_seen_though_many_never_were() -> None:
    shop = Shop(0, n=1_000)
    shop.eligible_N[:] = True
    shop.last_seen_N[:] = -1
    shop.last_seen_N[:50] = np.arange(50)
    shop.scores_N[:50] = -10
    shop.reprobe_share = 0.2

    for _ in range(5):
        batch = shop.choose(100).prompts
        hopeless = np.sort(batch[batch < 50])

        assert hopeless.tolist() == np.argsort(shop.last_seen_N[:50])[:5].tolist()
        shop.last_seen_N[batch] = 99


@pytest.mark.parametrize("diverse", [True, False])
def test_the_floor_is_a_share_of_the_batch_whatever_the_acquisition(diverse: bool) -> None:
    shop = Shop(0)
    shop.eligible_N[:] = True
    old = np.arange(30)
    shop.last_seen_N[:], shop.last_seen_N[old], shop.scores_N[old] = 10, 1, -10

    counts = {}
    for shop.reprobe_share in (0.0, 0.1, 0.5):
        counts[shop.reprobe_share] = int((shop.choose(40, diverse=diverse).prompts < 30).sum())

    assert counts == {0.0: 0, 0.1: 4, 0.5: 20}


@quick
@given(SEED, st.integers(1, 60), st.floats(0, 0.5), st.booleans())
def test_limits_hold_for_the_whole_batch_with_its_control_arm(
    seed: int, batch_size: int, control_share: float, diverse: bool
) -> None:
    shop = Shop(seed)
    thirds = [np.arange(shop.n) % 3 == i for i in range(3)]
    shop.groups = {"one": (0.2, thirds[0]), "two": (0.3, thirds[1])}
    shop.groups_at_most = {"one": (0.4, thirds[0]), "three": (0.1, thirds[2])}
    shop.scores_N[thirds[2]] += 10
    shop.control_share, shop.reprobe_share = control_share, 0.2

    choice = shop.choose(batch_size, diverse=diverse)

    prompts = choice.prompts
    assert len(set(prompts.tolist())) == batch_size
    assert shop.eligible_N[prompts].all()
    one, two, three = (int(members[prompts].sum()) for members in thirds)
    assert math.floor(0.2 * batch_size + 1e-9) <= one <= math.ceil(0.4 * batch_size - 1e-9)
    assert two >= math.floor(0.3 * batch_size + 1e-9)
    assert three <= math.ceil(0.1 * batch_size - 1e-9)
    assert int(choice.control.sum()) <= math.ceil(control_share * batch_size)


def test_the_control_arm_leaves_room_for_what_groups_are_owed() -> None:
    shop = Shop(0)
    thirds = [np.arange(shop.n) % 3 == i for i in range(3)]
    shop.groups = {"one": (0.6, thirds[0]), "two": (0.4, thirds[1])}
    shop.control_share = 0.5

    choice = shop.choose(20)

    assert [int(members[choice.prompts].sum()) for members in thirds] == [12, 8, 0]
    assert choice.control.sum() == 10


def test_a_group_at_most_nought_is_never_chosen() -> None:
    shop = Shop(0)
    barred = np.arange(shop.n) % 2 == 0
    shop.scores_N[barred] += 10
    shop.last_seen_N[barred] = -1
    shop.groups_at_most = {"barred": (0.0, barred)}
    shop.control_share, shop.reprobe_share = 0.3, 0.3

    assert not barred[shop.choose(40).prompts].any()


def test_limits_that_leave_too_few_prompts_are_refused() -> None:
    shop = Shop(0)
    shop.groups_at_most = {"all": (0.5, np.ones(shop.n, dtype=bool))}

    with pytest.raises(NotEnoughPrompts, match=r"^batch_size asks for 40 prompts, 20 may be selected$"):
        shop.choose(40)


def test_a_share_of_nought_of_an_empty_group_is_no_fault() -> None:
    shop = Shop(0)
    shop.groups = {"empty": (0.01, np.zeros(shop.n, dtype=bool))}

    assert len(shop.choose(40).prompts) == 40


def test_a_loose_least_share_takes_what_there_is() -> None:
    shop = Shop(0)
    few = np.zeros(shop.n, dtype=bool)
    few[np.flatnonzero(shop.eligible_N)[:3]] = True
    shop.scores_N[few] = -10
    shop.groups = {"few": (0.5, few)}

    message = r"^categories: the share of 'few' asks for 20 prompts, 3 may be selected$"
    with pytest.raises(NotEnoughPrompts, match=message):
        shop.choose(40)
    shop.are_groups_strict = False
    assert few[shop.choose(40).prompts].sum() == 3


def test_the_control_arm_is_marked_and_every_eligible_prompt_is_as_likely_to_be_in_it() -> None:
    shop = Shop(0, n=60)
    shop.eligible_N = np.arange(60) < 40
    shop.control_share = 0.23
    times, sizes = np.zeros(60), []

    for seed in range(2_000):
        choice = shop.choose(10, seed=seed)
        times[choice.prompts[choice.control]] += 1
        sizes.append(int(choice.control.sum()))

    assert set(sizes) == {2, 3}
    assert np.mean(sizes) == pytest.approx(2.3, abs=0.05)
    assert times[40:].sum() == 0
    assert stats.chisquare(times[:40]).pvalue > 0.01


def test_without_a_control_share_nothing_else_changes_and_no_prompt_is_marked() -> None:
    shop = Shop(0)

    assert not shop.choose(20).control.any()


def test_in_the_long_run_every_prompt_is_chosen_however_hopeless() -> None:
    shop = Shop(0, n=40)
    shop.eligible_N[:] = True
    shop.last_seen_N[:] = -1
    shop.scores_N[::2] = -10

    for step in range(120):
        shop.last_seen_N[shop.choose(10, seed=step).prompts] = step

    assert (shop.last_seen_N >= 0).all()
    assert shop.last_seen_N.min() > 30


@quick
@given(SEED, st.integers(2, 40), st.booleans())
def test_greedy_diversity_is_exact_for_small_batches(seed: int, n: int, anchored: bool) -> None:
    rng = np.random.default_rng(seed)
    scores_S, directions = np.sort(rng.random(45))[::-1], unit(rng, 45)
    anchors = unit(rng, 6) if anchored else None

    order = greedy_diverse(scores_S, directions, n, anchor_D=None if anchors is None else anchors.mean(axis=0))

    assert order.tolist() == slow_greedy(scores_S, directions, n, anchors)


def test_greedy_diversity_is_exact_up_to_64() -> None:
    rng = np.random.default_rng(0)
    scores_S, directions = np.sort(rng.random(80))[::-1], unit(rng, 80)

    assert greedy_diverse(scores_S, directions, 64).tolist() == slow_greedy(scores_S, directions, 64, None)


@pytest.mark.parametrize("n", [127, 128, 500])
def test_greedy_diversity_in_rounds_gains_nearly_as_much_as_one_by_one(n: int) -> None:
    rng = np.random.default_rng(0)
    scores_S, directions = np.sort(rng.random(600))[::-1], unit(rng, 600)

    order = greedy_diverse(scores_S, directions, n)

    def spread(chosen: IntArray) -> float:
        return float(1 - np.linalg.norm(directions[chosen].mean(axis=0)) ** 2)

    assert len(set(order.tolist())) == n
    assert scores_S[order].mean() > scores_S[:n].mean() - 0.02
    assert spread(order) >= spread(np.arange(n)) - 1e-3


def test_diversity_keeps_a_crowd_of_look_alikes_from_filling_the_batch() -> None:
    """A hundred problems of one kind, all at the frontier, against others that are nearly as good."""
    shop = Shop(0, n=400)
    shop.eligible_N[:] = True
    crowd, nearly = np.arange(400) < 100, np.arange(400) >= 200
    shop.directions_N_D[crowd] = shop.directions_N_D[0]
    shop.scores_N = np.minimum(shop.scores_N, 0.98)
    shop.scores_N[crowd], shop.scores_N[nearly] = 0.99, 0.9
    shop.scores_N[100:200] = np.minimum(shop.scores_N[100:200], 0.7)
    shop.recent = ()

    batches = [shop.choose(16, diversity=diversity).prompts for diversity in (0.0, 0.05, 0.1)]

    in_crowd = [int(crowd[batch].sum()) for batch in batches]
    assert 15 <= in_crowd[0] <= 16  # one may be the least recently seen
    assert in_crowd[1] == in_crowd[0]
    assert 1 <= in_crowd[2] <= 4
    assert (shop.scores_N[batches[2]] >= 0.9).sum() >= 15


@quick
@given(seed=SEED, n=st.integers(1, 40), diversity=st.floats(0, 1))
def test_diversity_gives_up_no_more_of_the_score_than_it_says(seed: int, n: int, diversity: float) -> None:
    shop = Shop(seed, n=200)
    shop.reprobe_share = 0.0
    ranked = np.sort(shop.scores_N[shop.eligible_N])[::-1]

    by_score = shop.choose(n, diversity=0.0).prompts
    chosen = shop.choose(n, diversity=diversity).prompts

    assert sorted(shop.scores_N[by_score], reverse=True) == ranked[:n].tolist()
    assert shop.scores_N[chosen].min() >= min(ranked[n - 1], ranked[0] - diversity) - 1e-8


def test_where_few_are_good_the_score_alone_decides() -> None:
    shop = Shop(0, n=400)
    shop.reprobe_share = 0.0
    shop.scores_N = np.where(np.arange(400) < 20, 0.9, 0.1 + 0.5 * shop.scores_N)
    shop.eligible_N[:] = True

    by_score, diverse = (set(shop.choose(64, diversity=d).prompts.tolist()) for d in (0.0, 0.1))

    assert diverse == by_score


def test_three_times_as_many_as_wanted_are_drawn_of_the_good_each_as_likely_as_the_other() -> None:
    good_N = np.arange(300) % 3 > 0
    scores_N, among_N = np.where(good_N, 0.95, 0.5), np.arange(300) < 240
    scores_N[:10] = 0.96
    times, sizes = np.zeros(300), set()

    for seed in range(600):
        drawn = Good(0.1)(scores_N, np.random.default_rng(seed).random(300), among_N, 8)
        times[drawn] += 1
        sizes.add(len(set(drawn.tolist())))

    assert sizes == {24}
    assert times[~(good_N & among_N | (np.arange(300) < 10))].sum() == 0
    assert stats.chisquare(times[times > 0]).pvalue > 0.01


def test_of_the_drawn_the_most_unlike_are_taken() -> None:
    cluster = np.repeat(np.arange(4), [85, 5, 5, 5])
    scores_N, among_N = np.full(100, 0.5), np.ones(100, dtype=bool)
    picker = MostUnlike(Good(0.1), Likeness(np.eye(4)[cluster].__getitem__, None))

    for seed in range(20):
        ties_N = np.random.default_rng(seed).random(100)
        drawn, picked = Good(0.1)(scores_N, ties_N, among_N, 8), picker(scores_N, ties_N, among_N, 8)

        assert set(picked.tolist()) <= set(drawn.tolist())
        assert set(cluster[picked].tolist()) == set(cluster[drawn].tolist())


def test_the_control_arm_may_take_prompts_that_rest() -> None:
    shop = Shop(0, n=100)
    shop.eligible_N = np.arange(100) < 50
    shop.control_eligible_N = np.ones(100, dtype=bool)
    shop.control_share = 0.5

    choices = [shop.choose(20, seed=seed) for seed in range(20)]

    resting = [int((choice.prompts[choice.control] >= 50).sum()) for choice in choices]
    assert 70 <= sum(resting) <= 130  # of 200, half of the pool
    assert not any((choice.prompts[~choice.control] >= 50).any() for choice in choices)


@pytest.mark.parametrize(
    ("n_prompts", "batch_size", "steps"),
    [(6_000, 8, 25), (50_000, 32, 25), (300, 8, 15), (1_209, 32, 15), (1_209, 128, 3), (10, 4, 1), (1, 1, 0)],
)
def test_a_prompt_rests_for_25_steps_or_four_tenths_of_an_epoch(n_prompts: int, batch_size: int, steps: int) -> None:
    assert rest_steps(n_prompts, batch_size) == steps


def test_greedy_diversity_leaves_the_scores_it_is_given() -> None:
    rng = np.random.default_rng(0)
    scores_S = np.sort(rng.random(30))[::-1].copy()
    before = scores_S.copy()

    greedy_diverse(scores_S, unit(rng, 30), 10)

    assert np.array_equal(scores_S, before)


@pytest.mark.parametrize("width", [0, 3, 88])
def test_where_all_directions_are_alike_the_scores_decide(width: int) -> None:
    scores_S = np.linspace(1, 0.99, 50)
    direction = unit(np.random.default_rng(0), 1, width) if width else np.zeros((1, 0))
    alike = np.tile(direction, (50, 1)).astype(np.float32)

    assert greedy_diverse(scores_S, alike, 20).tolist() == list(range(20))
    assert greedy_diverse(scores_S, np.zeros_like(alike), 20).tolist() == list(range(20))


def test_among_equal_scores_distinct_directions_are_preferred() -> None:
    cluster = np.repeat(np.arange(4), [40, 30, 20, 10])

    order = greedy_diverse(np.full(100, 0.5), np.eye(4)[cluster], 8)

    assert np.bincount(cluster[order], minlength=4).tolist() == [2, 2, 2, 2]
    assert len(set(cluster[order[:4]].tolist())) == 4


def test_among_equal_scores_directions_away_from_the_previous_batches_are_preferred() -> None:
    clusters = np.repeat(np.eye(2), [12, 8], axis=0)

    order = greedy_diverse(np.full(20, 0.5), clusters, 1, anchor_D=np.array([0.9, 0.1]))

    assert order[0] >= 12


def test_the_previous_batches_are_the_anchor_of_a_choice() -> None:
    shop = Shop(0, n=40)
    shop.eligible_N[:] = True
    shop.scores_N[:] = 0.5
    cluster = np.repeat([0, 1], [25, 15])
    shop.directions_N_D = np.eye(2)[cluster]

    for previous, expected in ((np.arange(5), 1), (np.arange(30, 35), 0)):
        shop.recent = (previous,)
        # Two in a batch: the quota of the least recently seen takes none of them under this seed.
        first = shop.choose(2, seed=0).prompts[0]
        assert cluster[first] == expected


@quick
@given(SEED, st.integers(1, 100), st.floats(0, 1.3), st.booleans())
def test_the_forecast_is_the_mean_probability_and_padding_the_least_count_that_is_enough(
    seed: int, batch_size: int, level: float, diverse: bool
) -> None:
    shop = Shop(seed)
    shop.informative_N = np.minimum(level * shop.informative_N, 1)

    choice = shop.choose(batch_size, diverse=diverse)

    assert choice.informative_probabilities.tolist() == shop.informative_N[choice.prompts].tolist()
    assert choice.informative_share == pytest.approx(shop.informative_N[choice.prompts].mean())
    assert choice.pad_to == slow_pad_to(shop, choice)


def test_padding_far_beyond_the_batch_is_the_least_count_that_is_enough() -> None:
    shop = Shop(0, n=4_000)
    shop.informative_N = 0.01 + 0.01 * shop.informative_N

    choice = shop.choose(30)

    assert choice.pad_to == slow_pad_to(shop, choice)
    assert choice.pad_to is not None
    assert choice.pad_to > 1_500


def test_a_sure_batch_needs_no_padding_and_a_hopeless_pool_cannot_give_it() -> None:
    shop = Shop(0)

    shop.informative_N[:] = 1
    assert shop.choose(20).pad_to == 20
    shop.informative_N[:] = 0.05
    assert shop.choose(20).pad_to is None


@pytest.mark.parametrize(("step", "rested"), [(5, True), (6, True), (7, True), (8, False)])
def test_a_prompt_rests_for_so_many_steps_after_it_was_seen(step: int, rested: bool) -> None:
    assert resting(np.array([-1, 5, 0]), step=step, rest=2).tolist() == [False, rested, False]


def test_without_a_rest_nobody_rests_and_who_was_never_seen_never_does() -> None:
    assert not resting(np.array([-1, 5, 0]), step=5, rest=0).any()
    assert not resting(np.array([-1]), step=0, rest=1_000).any()


def score(
    a: FloatArray,
    b: FloatArray,
    acquisition: Acquisition,
    *,
    target_rate: float | None = None,
    optimism: float = 0.5,
    seed: int = 0,
) -> FloatArray:
    return scores(
        a,
        b,
        *informative_moments(a, b, 8),
        acquisition=acquisition,
        target_rate=target_rate,
        optimism=optimism,
        generator=np.random.default_rng(seed),
    )


def test_yield_is_the_informative_probability_plus_optimism_times_its_deviation() -> None:
    a, b = np.array([1.0, 4, 0.2]), np.array([1.0, 30, 0.1])
    mean, deviation = informative_moments(a, b, 8)

    assert score(a, b, "yield", optimism=2) == pytest.approx(mean + 2 * deviation)
    assert score(a, b, "yield", optimism=0) == pytest.approx(mean)


def test_yield_prefers_middling_rates_and_then_unsure_beliefs() -> None:
    a, b = np.array([50.0, 5.0, 0.5, 1.0]), np.array([50.0, 95.0, 99.5, 199.0])

    assert np.argsort(-score(a, b, "yield", optimism=0)).tolist()[:2] == [0, 1]
    sure, unsure = score(np.array([8.0, 0.8]), np.array([192.0, 19.2]), "yield", optimism=3)
    assert unsure > sure


def test_with_a_target_rate_yield_is_the_expected_closeness() -> None:
    a, b = np.array([20.0, 50.0, 80.0]), np.array([80.0, 50.0, 20.0])
    mean, deviation = target_moments(a, b, 0.8)

    assert score(a, b, "yield", target_rate=0.8) == pytest.approx(mean + 0.5 * deviation)
    assert np.argsort(-score(a, b, "yield", target_rate=0.8)).tolist() == [2, 1, 0]


@pytest.mark.parametrize(("target_rate", "expected"), [(None, [2, 1, 3, 0]), (0.9, [3, 2, 1, 0])])
def test_thompson_prefers_draws_near_the_target(target_rate: float | None, expected: list[int]) -> None:
    rates = np.array([0.05, 0.35, 0.55, 0.8])

    drawn = score(1e6 * rates, 1e6 * (1 - rates), "thompson", target_rate=target_rate)

    assert np.argsort(-drawn).tolist() == expected
    assert drawn == pytest.approx(-np.abs(rates - (target_rate or 0.5)), abs=0.01)


def test_thompson_draws_each_belief_once() -> None:
    drawn = score(np.ones(20_000), np.ones(20_000), "thompson")

    assert drawn.min() >= -0.5
    assert drawn.max() <= 0
    assert drawn.mean() == pytest.approx(-0.25, abs=0.01)


def test_uniform_knows_nothing_of_beliefs() -> None:
    a, b = np.full(10_000, 1e-6), np.full(10_000, 1e6)

    drawn = score(a, b, "uniform")

    assert drawn.shape == (10_000,)
    assert 0 <= drawn.min() < 0.01
    assert 0.99 < drawn.max() < 1
    assert np.array_equal(drawn, score(b, a, "uniform"))


@pytest.mark.parametrize("acquisition", ["yield", "thompson", "uniform"])
def test_scores_are_finite_for_extreme_beliefs_and_differ_by_seed_only_where_chance_plays(
    acquisition: Acquisition,
) -> None:
    grid = 10.0 ** np.arange(-8, 7)
    a, b = (x.ravel() for x in np.meshgrid(grid, grid))

    one, again, other = (score(a, b, acquisition, seed=seed) for seed in (1, 1, 2))

    assert one.shape == a.shape
    assert np.isfinite(one).all()
    assert np.array_equal(one, again)
    assert np.array_equal(one, other) == (acquisition == "yield")


@pytest.mark.parametrize("spread", [1.0, 1e-12, 0.0])
def test_from_a_large_pool_the_same_are_chosen_as_by_sorting_all_of_it(spread: float) -> None:
    """Also where nearly all scores are equal and a sample says nothing."""
    rng = np.random.default_rng(0)
    shop = Shop(0, n=40_000)
    shop.scores_N = np.round(rng.random(shop.n), 3) * spread
    shop.scores_N[rng.choice(shop.n, 30, replace=False)] = 2.0

    choice = shop.choose(100, diverse=False)

    ties = np.random.default_rng(0).random(shop.n)
    order = np.lexsort((-(shop.scores_N + 1e-9 * ties), ~shop.eligible_N))
    assert set(choice.prompts.tolist()) == set(order[:100].tolist())


@pytest.mark.parametrize("level", [0.9, 0.01, 0.0])
def test_how_many_to_take_of_a_large_pool_agrees_with_taking_one_by_one(level: float) -> None:
    shop = Shop(1, n=40_000)
    shop.informative_N = shop.informative_N * level

    choice = shop.choose(300, diverse=False)

    assert choice.pad_to == slow_pad_to(shop, choice)
