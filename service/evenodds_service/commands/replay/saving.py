"""What choosing would have saved: a log replayed off-policy, and what came of it with its interval.

At each step of the log a predictor chooses a share of the groups that were rolled out there, before it sees what came
of them; the outcomes of its choice are the log's own. Nothing is drawn, extrapolated or weighted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evenodds import Client, Observation
from evenodds_service.commands.replay.logged import LoggedRun
from evenodds_service.commands.replay.scoring import FloatArray

RESAMPLES = 2_000
REFITS = 10
"""Refits during a replay, which waits for them: a training leaves the worker time, a replay does not."""
_WORKER_SECONDS, _REFIT_SECONDS = 10.0, 300.0
_BOOTSTRAP_SEED = 0


@dataclass(frozen=True, slots=True)
class ChosenSteps:
    """What one seed's choice was.

    Attributes:
        chosen_T, informative_T: Groups chosen at each step, and how many of them were informative.
        coverage: The share of the log's prompts that were ever chosen.
        is_refitted: Whether a worker fitted the shared model on the way.
    """

    chosen_T: NDArray[np.int64]
    informative_T: NDArray[np.int64]
    coverage: float
    is_refitted: bool


@dataclass(frozen=True, slots=True)
class Saving:
    """Figures over all steps and seeds.

    Attributes:
        informative: Share of informative groups among the chosen, in [0, 1].
        saved: Share of the rollouts that a random choice needs more of for the same number of informative groups.
        informative_interval, saved_interval: 95%, by block resampling of steps and seeds.
    """

    informative: float
    informative_interval: tuple[float, float]
    saved: float
    saved_interval: tuple[float, float]


def choose_within(
    client: Client,
    run: str,
    logged: LoggedRun,
    *,
    share: float,
    seed: int,
    is_refitted: bool,
    advance: Callable[[], object],
) -> ChosenSteps:
    """Choose `share` of each step's groups, at least one, and observe what came of those.

    Args:
        is_refitted: Whether to ask for refits on the way. It ends with the first that no worker takes up.
    """
    ids = [str(prompt.prompt_id) for prompt in logged.prompts]
    chosen_T: list[int] = []
    informative_T: list[int] = []
    seen: set[str] = set()
    every = math.ceil(len(logged.steps) / REFITS)
    for number, step in enumerate(logged.steps):
        rewards = dict(zip((ids[i] for i in step.prompts), step.rewards, strict=True))
        n = max(1, round(share * len(rewards)))
        reply = client.select_batch(run, step.step, n, seed=seed, candidates=list(rewards))
        outcomes = [
            Observation(prompt_id=prompt.prompt_id, rewards=rewards[prompt.prompt_id]) for prompt in reply.prompts
        ]
        client.observe(run, step.step, outcomes, selection_id=reply.selection_id)
        seen.update(prompt.prompt_id for prompt in reply.prompts)
        chosen_T.append(len(outcomes))
        informative_T.append(sum(len(set(rewards[prompt.prompt_id])) > 1 for prompt in reply.prompts))
        if is_refitted and (number + 1) % every == 0:
            is_refitted = refitted(client, run)
        advance()
    tried = {i for step in logged.steps for i in step.prompts}
    return ChosenSteps(np.array(chosen_T), np.array(informative_T), len(seen) / len(tried), is_refitted)


def refitted(client: Client, run: str) -> bool:
    """Fit the shared model to all that was observed. False where no worker takes it up, or it fails."""
    state = client.refit(run, wait_seconds=_WORKER_SECONDS)
    if state.status == "running":
        state = client.refit(run, wait_seconds=_REFIT_SECONDS)
    return state.status == "done"


def random_share_T(logged: LoggedRun) -> FloatArray:
    """The share of informative groups at each step, which a random choice among them has on average."""
    return np.array([np.mean(step.informative) for step in logged.steps])


def saving_of(seeds: Sequence[ChosenSteps], random_T: FloatArray) -> Saving:
    """The figures of the replays of one predictor.

    The interval resamples blocks of about sqrt(T) consecutive steps, each of a random seed, because neighbouring steps
    have much in common.
    """
    chosen_S_T, informative_S_T = _counts(seeds)
    n_seeds, n_steps = chosen_S_T.shape
    which, steps = _resampled(n_seeds, n_steps)
    all_seeds, all_steps = (each.reshape(1, -1) for each in np.indices((n_seeds, n_steps)))
    informative, saved = _figures(chosen_S_T, informative_S_T, random_T, all_seeds, all_steps)
    resampled = _figures(chosen_S_T, informative_S_T, random_T, which, steps)
    return Saving(float(informative[0]), _interval(resampled[0]), float(saved[0]), _interval(resampled[1]))


def gain_over(seeds: Sequence[ChosenSteps], others: Sequence[ChosenSteps]) -> tuple[float, tuple[float, float]]:
    """Share of the rollouts that a choice saves against another one, for the same number of informative groups, with
    its 95% interval. Both have the same seeds, which are resampled together with the blocks of steps.
    """
    chosen_S_T, informative_S_T = _counts(seeds)
    other_chosen_S_T, other_informative_S_T = _counts(others)
    which, steps = _resampled(*chosen_S_T.shape)

    def gain(*rows: NDArray[np.int64] | slice) -> FloatArray:
        rate = informative_S_T[rows].sum(axis=-1) / chosen_S_T[rows].sum(axis=-1)
        other = other_informative_S_T[rows].sum(axis=-1) / other_chosen_S_T[rows].sum(axis=-1)
        return np.asarray(np.where(rate > 0, 1.0 - other / np.maximum(rate, 1e-9), -np.inf))

    all_seeds, all_steps = (each.reshape(-1) for each in np.indices(chosen_S_T.shape))
    return float(gain(all_seeds, all_steps)), _interval(gain(which, steps))


def _counts(seeds: Sequence[ChosenSteps]) -> tuple[FloatArray, FloatArray]:
    """Groups chosen and informative ones, [S, T] each."""
    chosen_S_T = np.array([seed.chosen_T for seed in seeds], dtype=float)
    return chosen_S_T, np.array([seed.informative_T for seed in seeds], dtype=float)


def _resampled(n_seeds: int, n_steps: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Seeds and steps of each resample, [R, T] each: blocks of about sqrt(T) consecutive steps, each of one seed."""
    generator = np.random.default_rng(_BOOTSTRAP_SEED)
    length = max(1, math.isqrt(n_steps))
    n_blocks = math.ceil(n_steps / length)
    starts = generator.integers(0, n_steps, (RESAMPLES, n_blocks))
    steps = ((starts[:, :, None] + np.arange(length)) % n_steps).reshape(RESAMPLES, -1)[:, :n_steps]
    which = np.repeat(generator.integers(0, n_seeds, (RESAMPLES, n_blocks)), length, axis=1)[:, :n_steps]
    return which, steps


def _figures(
    chosen_S_T: FloatArray,
    informative_S_T: FloatArray,
    random_T: FloatArray,
    seeds: NDArray[np.int64],
    steps: NDArray[np.int64],
) -> tuple[FloatArray, FloatArray]:
    """Share of informative groups, and share of rollouts saved, [R] each, over these R rows of seeds and steps."""
    n = chosen_S_T[seeds, steps].sum(axis=1)
    k = informative_S_T[seeds, steps].sum(axis=1)
    at_random = (chosen_S_T[seeds, steps] * random_T[steps]).sum(axis=1)  # informative groups of a random choice
    saved = np.where(k > 0, 1.0 - at_random / np.maximum(k, 1.0), -np.inf)
    return np.asarray(k / n), np.asarray(saved)


def _interval(values: FloatArray) -> tuple[float, float]:
    low, high = np.quantile(values, (0.025, 0.975))
    return float(low), float(high)
