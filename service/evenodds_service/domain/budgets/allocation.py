"""How many attempts each prompt deserves: closed forms under Beta(a, b), spent greedily (algorithm section 5).

What an attempt is worth depends on the objective. `solve`: best of k with a verifier or reward model, one success is
enough. `signal`: a training group of n, worth the probability that it is informative. The gain of each further attempt
falls, so buying attempts in the order of gain per cost is exact for equal costs. A *price* is the gain at which buying
stops: fitted on past traffic, it serves one request at a time. (x)_m is the rising factorial.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import Literal

import numpy as np

from evenodds_service.domain import exact
from evenodds_service.domain.arrays import FloatArray, IntArray
from evenodds_service.domain.distributions import log_rising
from evenodds_service.domain.settings import BudgetMode
from evenodds_service.errors import BudgetTooSmall

Objective = Literal["solve", "signal"]
Method = Literal["greedy", "bins"]

WORTHWHILE_LIFT = 0.02
"""A smaller relative gain over uniform spending is not worth it: the errors of real beliefs outweigh it."""
NEVER = 1.0
"""A price at which no attempt beyond the least is bought: no attempt gains so much."""

BIN_EDGES = (0.1, 0.5, 0.8)
BIN_WEIGHTS = (1.0, 4.0, 2.0, 1.0)
"""Of the method `bins`: relative attempts for predicted rates below .1 (near-hopeless), .5, .8 and above (easy)."""

_SLACK = 1e-9  # of sums of costs, relative
_FACTORS = 32_768


@dataclass(frozen=True, slots=True, eq=False)
class Spending:
    """How a budget is spent.

    Attributes:
        attempts_N: int64 [N].
        shortfall: By how much the expected total may lie below the best one for this budget, at least 0. 0 where all
            costs are equal; else less than the gain of one attempt, the first one that could not be paid.
    """

    attempts_N: IntArray
    shortfall: float


def gains(objective: Objective, a: FloatArray, b: FloatArray, most: int) -> FloatArray:
    """What the first, second, ... attempt adds to the expected total, [N, most], at least 0.

    With s = a + b, the attempt after j others gains
    solve:   a/(s+j) (b)_j/(s)_j                                    P(the first success comes with it)
    signal:  [ (a)_j b + (b)_j a ] / (s)_{j+1} for j >= 1, else 0   P(the group becomes informative with it)
    Gains fall with j, those of `signal` from the second attempt on.

    Args:
        a, b: Positive parameters of the beliefs, [N].
        most: K, attempts per prompt, at least 1.
    """
    j = np.arange(most, dtype=np.float64)
    a, b = np.asarray(a, dtype=np.float64)[:, None], np.asarray(b, dtype=np.float64)[:, None]
    total = a + b + j
    all_wrong = _ratios(b + j, total)
    if objective == "solve":
        return np.asarray(all_wrong * (a / total))
    gained = (_ratios(a + j, total) * b + all_wrong * a) / total
    gained[:, 0] = 0.0
    return gained


def bin_gains(mean_N: FloatArray, most: int) -> FloatArray:
    """Stand-ins for gains whose greedy spending is proportional to the weight of a prompt's difficulty bin, [N, most].

    The paper's rule (arXiv 2602.01970, Eq. 22-23): easy and near-hopeless bins get few attempts, challenging but
    solvable ones many. Its edges and shares are not published; these are ours. w / (k - 1/2) for the k-th attempt
    rounds proportional shares to whole attempts (Webster's method).
    """
    weight_N = np.asarray(BIN_WEIGHTS)[np.searchsorted(BIN_EDGES, mean_N, side="right")]
    return np.asarray(weight_N[:, None] / (np.arange(most) + 0.5))


def spend(
    gains_N_K: FloatArray, *, costs_N: FloatArray, minimum_N: IntArray, maximum_N: IntArray, budget: float
) -> Spending:
    """Spend the budget, the greatest gain per cost first.

    Equal costs: the expected total is the greatest there is, the budget is spent until no attempt is left that could
    be bought, and a larger budget takes no attempt away from any prompt. Unequal costs: what is left pays no further
    attempt, the expected total never falls as the budget grows, and it is optimal up to `shortfall`.

    Args:
        gains_N_K: Of each attempt, falling along K from the minimum on.
        costs_N: Of one attempt of each prompt, positive.
        minimum_N, maximum_N: 0 <= minimum <= maximum <= K.
        budget: In the unit of the costs.

    Raises:
        BudgetTooSmall: it does not pay for the minimum.
    """
    n_columns = gains_N_K.shape[1]
    least = float((costs_N * minimum_N).sum())
    spare = budget - least
    if spare < -_SLACK * max(budget, 1.0):
        raise BudgetTooSmall(
            f"budget {budget:g} is less than the minimum attempts of {len(costs_N)} prompts cost, {least:g}: "
            "raise it, or lower min_attempts"
        )
    spare = max(spare, 0.0) * (1.0 + _SLACK) + _SLACK
    column_K = np.arange(n_columns)
    is_open = (column_K >= minimum_N[:, None]) & (column_K < maximum_N[:, None])
    density = np.where(is_open, gains_N_K / costs_N[:, None], -1.0).ravel()
    affordable = min(int(is_open.sum()), int(spare / costs_N.min()))
    attempts_N = np.array(minimum_N, dtype=np.int64)
    if affordable == 0:
        return Spending(attempts_N, 0.0)
    # Only the best so many can be bought: sort those, not all, and the next one, which bounds what is missed.
    sorted_at_most = min(int(is_open.sum()), affordable + 1)
    threshold = np.partition(density, len(density) - sorted_at_most)[len(density) - sorted_at_most]
    best = np.flatnonzero(density >= max(threshold, 0.0))
    best = best[np.argsort(-density[best], kind="stable")]
    paid = np.cumsum(costs_N[best // n_columns])
    bought = int(np.searchsorted(paid, spare, side="right"))
    attempts_N += np.bincount(best[:bought] // n_columns, minlength=len(attempts_N))
    left = spare - (float(paid[bought - 1]) if bought else 0.0)
    if (costs_N == costs_N[0]).all():
        return Spending(attempts_N, 0.0)
    shortfall = float(density[best[bought]]) * left if bought < len(best) else 0.0
    _spend_rest(attempts_N, density.reshape(gains_N_K.shape), costs_N, maximum_N, left)
    return Spending(attempts_N, shortfall)


def expected(gains_N_K: FloatArray, attempts_N: FloatArray | IntArray) -> FloatArray:
    """Expected total of each prompt after so many attempts, [N]; fractions of an attempt count as chances of one."""
    share = np.clip(np.asarray(attempts_N)[:, None] - np.arange(gains_N_K.shape[1]), 0.0, 1.0)
    return np.asarray((gains_N_K * share).sum(axis=1))


def uniform_attempts(
    costs_N: FloatArray, minimum_N: IntArray, maximum_N: IntArray, budget: float, *, halvings: int = 60
) -> FloatArray:
    """The same number of attempts for all, as far as the limits allow, that spends this budget; fractional, [N]."""
    low, high = 0.0, float(maximum_N.max())
    for _ in range(halvings):
        middle = 0.5 * (low + high)
        if (costs_N * np.clip(middle, minimum_N, maximum_N)).sum() <= budget * (1.0 + _SLACK):
            low = middle
        else:
            high = middle
    return np.asarray(np.clip(low, minimum_N, maximum_N), dtype=np.float64)


def verdict(expected_total: float, uniform_total: float, *, n_observations: int, is_capped: bool) -> tuple[bool, str]:
    """Whether an allocation is worth it against uniform spending, and why.

    Args:
        n_observations: What the beliefs rest on.
        is_capped: Whether the budget gives every prompt its maximum.
    """
    if is_capped:
        return False, "the budget gives every prompt its maximum, so there is nothing to choose"
    if n_observations == 0:
        return (
            False,
            "no outcome has been observed yet, so the beliefs are guesses: spend uniformly and report outcomes",
        )
    lift = (expected_total - uniform_total) / max(uniform_total, 1e-12)
    if lift < WORTHWHILE_LIFT:
        return False, (
            f"the expected total changes by {100 * lift:+.1f}% against uniform spending, less than "
            f"{100 * WORTHWHILE_LIFT:.0f}%, which is within the errors of the beliefs: spend uniformly"
        )
    return True, f"the expected total rises by {100 * lift:.1f}% against uniform spending"


def attempts_at_price(
    mode: BudgetMode, a: FloatArray, b: FloatArray, price: float, *, minimum: int | IntArray, maximum: int | IntArray
) -> IntArray:
    """How many attempts the beliefs deserve at this price, int64 [N] in [minimum, maximum]; falls with the price.

    parallel:   all are made at once: buy the k-th while its gain under `solve` is at least the price.
    sequential: stop at the first success: after j failures the next attempt succeeds with a/(a+b+j); go on while that
                is at least the price. The number is how many failures are put up with.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if mode == "sequential":
        affordable = np.floor(a / max(price, 1e-300) * (1.0 + _SLACK) - a - b) + 1.0
    else:
        most = max(1, int(np.max(maximum)))
        affordable = (gains("solve", a, b, most) >= price * (1.0 - _SLACK)).sum(axis=1)
    return np.asarray(np.clip(affordable, minimum, maximum), dtype=np.int64)


def fit_price(
    mode: BudgetMode, a: FloatArray, b: FloatArray, target: float, *, minimum: int, maximum: int
) -> tuple[float, float]:
    """The lowest price at which beliefs like these spend at most `target` attempts on average.

    A request that stops at its first success is counted with the attempts that it is expected to make.

    Args:
        a, b: Beliefs of past traffic, [N], N at least 1.
        target: Attempts per request, at least `minimum`.

    Returns:
        The price in [0, 1], and the expected attempts per request at it.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    worth_N_K: FloatArray
    cost_N_K: FloatArray
    if mode == "sequential":
        j = np.arange(maximum, dtype=np.float64)
        total = a[:, None] + b[:, None] + j
        worth_N_K, cost_N_K = a[:, None] / total, _ratios(b[:, None] + j, total)
    else:
        worth_N_K = gains("solve", a, b, maximum)
        cost_N_K = np.ones_like(worth_N_K)
    spent = float(cost_N_K[:, :minimum].sum()) / len(a)
    if minimum == maximum:
        return 0.0, spent
    worth, cost = worth_N_K[:, minimum:].ravel(), cost_N_K[:, minimum:].ravel()
    order = np.argsort(-worth, kind="stable")
    falling, paid = worth[order], spent + np.cumsum(cost[order]) / len(a)
    last_of_its_worth = np.append(falling[1:] < falling[:-1] * (1.0 - 2.0 * _SLACK), True)
    within = np.flatnonzero(last_of_its_worth & (paid <= target * (1.0 + _SLACK)))
    if not len(within):
        return NEVER, spent
    last = int(within[-1])
    return (0.0 if last == len(falling) - 1 else float(falling[last])), float(paid[last])


def solve_probability(a: FloatArray, b: FloatArray, attempts: IntArray) -> FloatArray:
    """P(at least one of so many attempts succeeds) = 1 - (b)_k / (a+b)_k, elementwise."""
    most = int(attempts.max(initial=0))
    if attempts.size * most > _FACTORS:
        k = attempts.astype(np.float64)
        return np.asarray(1.0 - exact.exp(log_rising(b, k) - log_rising(np.asarray(a) + b, k)))
    # For few, the number of array operations is what costs: all factors at once.
    j = np.arange(most)
    a, b = np.asarray(a)[..., None], np.asarray(b)[..., None]
    return np.asarray(1.0 - np.where(j < attempts[..., None], (b + j) / (a + b + j), 1.0).prod(axis=-1))


def _spend_rest(
    attempts_N: IntArray, density_N_K: FloatArray, costs_N: FloatArray, maximum_N: IntArray, left: float
) -> None:
    """Buy, in place, what can still be paid after the first attempt that could not."""
    rows = np.flatnonzero((attempts_N < maximum_N) & (costs_N <= left))
    queue = [(-float(density_N_K[row, attempts_N[row]]), int(row)) for row in rows]
    heapq.heapify(queue)
    while queue:
        _, row = heapq.heappop(queue)
        if costs_N[row] > left:
            continue
        left -= float(costs_N[row])
        attempts_N[row] += 1
        if attempts_N[row] < maximum_N[row]:
            heapq.heappush(queue, (-float(density_N_K[row, attempts_N[row]]), row))


def _ratios(x_N_K: FloatArray, total_N_K: FloatArray) -> FloatArray:
    """(x)_j / (total)_j for j = 0 .. K - 1, given x + j and total + j, [N, K]."""
    ratios = np.ones_like(total_N_K)
    np.cumprod((x_N_K / total_N_K)[:, :-1], axis=1, out=ratios[:, 1:])
    return ratios
