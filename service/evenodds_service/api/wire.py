"""The translation of beliefs into the words of the wire, and what every route needs for it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import datetime, timezone

from scipy.special import betaincinv

from evenodds.schemas import Prediction
from evenodds_service.domain.arrays import FloatArray
from evenodds_service.domain.distributions import informative_moments, mean_and_std

_INTERVAL = (0.05, 0.95)


def now() -> datetime:
    """The one clock of the API."""
    return datetime.now(timezone.utc)


def content_hash(content: str) -> str:
    return hashlib.sha256(content.encode()).hexdigest()


def predictions(
    ids: Sequence[str], a: FloatArray, b: FloatArray, seen: FloatArray, group_size: int
) -> tuple[Prediction, ...]:
    """Beliefs in the words of the wire. `seen` holds the attempts observed; all arrays are [n]."""
    mean, std = mean_and_std(a, b)
    informative, _ = informative_moments(a, b, group_size)
    low, high = (betaincinv(a, b, tail) for tail in _INTERVAL)
    columns = (mean.tolist(), std.tolist(), low.tolist(), high.tolist(), informative.tolist(), seen.tolist())
    return tuple(
        Prediction(
            prompt_id=prompt_id,
            success_rate=rate,
            std=deviation,
            interval=(lower, upper),
            informative_probability=probability,
            attempts_seen=int(attempts),
        )
        for prompt_id, rate, deviation, lower, upper, probability, attempts in zip(ids, *columns, strict=True)
    )
