"""The values that cross rooms: settings, prompts and the entries of a run's log.

Validated where they are made (finite, in range), so that no later check is needed. Knows no HTTP and no SQL.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from evenodds_service.errors import SharesConflict

PredictorName = Literal["gps", "gps-paper", "mopps", "uniform"]
Acquisition = Literal["yield", "paper", "thompson", "uniform"]
ModelSize = Literal["small", "published"]

BudgetMode = Literal["parallel", "sequential"]

BUILTIN, CALLER, NO_EMBEDDER = "builtin", "caller", "none"


@dataclass(frozen=True, slots=True)
class EffortTier:
    """What requests of a success rate of `at_least` get, down from the next tier's: an effort by its label.

    `max_tokens_scale` multiplies the length limit that the caller would have used; positive.
    """

    label: str
    at_least: float
    max_tokens_scale: float = 1.0


DEFAULT_TIERS = (EffortTier("low", 0.8, 0.5), EffortTier("medium", 0.3, 1.0), EffortTier("high", 0.0, 2.0))


@dataclass(frozen=True, slots=True)
class BudgetPolicy:
    """How a gateway turns a belief into a budget; named, and with a new version whenever it changes.

    Attributes:
        version: From 1; 0 is the built-in policy of a run that has stored none.
        mode: `parallel`, all attempts at once; `sequential`, one after another until the first success.
        target_attempts: Attempts per request on average; recent traffic fits the price that keeps to it.
        min_attempts, max_attempts: Of each request, 1 <= min <= target <= max.
        price: A fixed price in [0, 1] instead of the fitted one.
        tiers: By falling `at_least`, the last one's is 0.
    """

    name: str = "default"
    version: int = 0
    mode: BudgetMode = "parallel"
    target_attempts: float = 4.0
    min_attempts: int = 1
    max_attempts: int = 32
    price: float | None = None
    tiers: tuple[EffortTier, ...] = DEFAULT_TIERS

    def tier(self, success_rate: float) -> EffortTier:
        """The first tier that this rate reaches."""
        return next((tier for tier in self.tiers if success_rate >= tier.at_least), self.tiers[-1])


@dataclass(frozen=True, slots=True)
class RunSettings:
    """What a caller may set on a run.

    Attributes:
        predictor: Which belief answers: `gps` the mixture of section 3, `gps-paper` the published model alone,
            `mopps` a flat prior with the prompt's own evidence, `uniform` none.
        group_size: Attempts per prompt in training, at least 1.
        target_rate: Success rate in (0, 1) to aim at; None aims at the likeliest to be informative.
        embedder: `builtin`, `caller`, `none`, or a sentence-transformers model; None until the first prompt
            decides between `builtin` and `caller`.
        embedder_prompt: Instruction put before each text by the embedder.
        acquisition: None follows the predictor (`yield`; `paper` under `gps-paper`, `thompson` under `mopps`,
            `uniform` under `uniform`).
        optimism: Weight of the standard deviation in the yield score.
        diversity: How much of the yield score may be given up for unlike prompts, in [0, 1]; under `paper` the
            spread of the diversity terms in units of the scores' spread.
        cooldown_steps: Steps that a chosen prompt always rests; None lets it rest for 25, at most .4 of an
            epoch, under `yield` while there are enough others, and not at all under the published acquisitions.
        lease_steps: For so many steps a chosen prompt is waited for and not chosen again before its outcome comes;
            0 waits for none.
        max_visits: A prompt is chosen at most so often while there are enough others; 0 sets no limit.
        keep_text: Whether the pool keeps the texts; without them only hashes and vectors are stored.
        model_size: Of the networks of `gps-paper`: `small` for a CPU, `published` has 20 million parameters.
        refit_every_observations: A refit is due after so many new observations (sooner while there are few).
        refit_every_seconds: A refit is due so long after the one before, if anything was observed since.
        control_share: Share of each batch that is chosen uniformly, in [0, .5].
        reprobe_share: Least share of each batch for the prompts least recently seen, in [0, 1]; None follows the
            acquisition (.05 under `yield` and `paper`, else none).
        groups, groups_at_most: Least and largest share of a batch by group.
        retain_prompts: The pool keeps so many prompts, and lets those go whose last outcome is the longest ago; 0 keeps
            all, None as well until the run answers a budget.
        is_retention_settled: Whether nobody has set that and the service has, because the run answered a budget. The
            first batch that it chooses takes it back.
        retain_days: It keeps a prompt for so long after its last outcome, in days above 0; None sets no limit.
        fallback: Choose uniformly while the mixture's skill against MoPPS stays negative.
        budget_policies: By name, one of each.
        learn_from: Names of runs, and patterns of names (`*`, `?`), whose outcomes are used.
        learn_within: Patterns that a name has to match as well, all of them: what the keys may touch that asked for it.
        data_set: Runs that name the same one have the same prompts under the same ids.
    """

    predictor: PredictorName = "gps"
    group_size: int = 8
    target_rate: float | None = None
    embedder: str | None = None
    embedder_prompt: str | None = None
    acquisition: Acquisition | None = None
    optimism: float = 0.5
    diversity: float = 0.1
    cooldown_steps: int | None = None
    lease_steps: int = 8
    max_visits: int = 0
    keep_text: bool = True
    model_size: ModelSize = "small"
    refit_every_observations: int = 2_048
    refit_every_seconds: int = 600
    control_share: float = 0.0
    reprobe_share: float | None = None
    groups: Mapping[str, float] | None = None
    groups_at_most: Mapping[str, float] | None = None
    retain_prompts: int | None = None
    is_retention_settled: bool = False
    retain_days: float | None = None
    fallback: bool = True
    budget_policies: tuple[BudgetPolicy, ...] = ()
    learn_from: tuple[str, ...] | None = None
    learn_within: tuple[str, ...] = ()
    data_set: str | None = None

    def learns_from(self, name: str) -> bool:
        """Whether the run of this name is one of those whose outcomes are used."""
        is_meant = any(fnmatchcase(name, pattern) for pattern in self.learn_from or ())
        return is_meant and all(fnmatchcase(name, pattern) for pattern in self.learn_within)


def check_shares(least: Mapping[str, float], most: Mapping[str, float]) -> None:
    """Raises SharesConflict."""
    for group in sorted(least.keys() & most.keys()):  # every process names the same one
        if least[group] > most[group]:
            raise SharesConflict(
                f"category {group!r} has a least share of {least[group]:g} (categories) above its largest "
                f"share of {most[group]:g} (categories_at_most): lower the first or raise the second"
            )
