"""The translation of beliefs into the words of the wire, and what every route needs for it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from datetime import datetime, timezone

from evenodds.schemas import FILL_FIELDS, ObserveRequest, Prediction, SelectReply, SelectRequest
from evenodds_service.domain.arrays import FloatArray
from evenodds_service.domain.distributions import informative_moments, mean_and_std


def now() -> datetime:
    """The one clock of the API."""
    return datetime.now(timezone.utc)


def observed_hash(body: ObserveRequest) -> str:
    """What a repetition of the report must agree with."""
    return _hash(body.model_dump_json(by_alias=True, exclude={"run", "request_id"}, exclude_none=True))


def selected_hash(body: SelectRequest) -> str:
    """What a repetition of the choice must agree with; a fork's too, which has another name."""
    unsaid = {name for name in FILL_FIELDS if getattr(body, name) is None}  # hashes are older than these fields
    return _hash(body.model_dump_json(by_alias=True, exclude={"run", *unsaid}))


def recorded_reply(reply: str) -> str:
    """The JSON of a recorded choice. Those that earlier releases recorded lack the categories' present name."""
    if '"category":' in reply:  # a name: inside of a value its quotes are escaped
        return reply
    told = SelectReply.model_validate({**json.loads(reply), "run": "unnamed", "replayed": True})
    return told.model_dump_json(exclude={"run", "replayed"})


def _hash(content: str) -> str:
    """Of a body under the first names of its fields, in their order: the hashes of earlier releases are stored."""
    return hashlib.sha256(content.encode()).hexdigest()


def predictions(
    ids: Sequence[str],
    a: FloatArray,
    b: FloatArray,
    seen: FloatArray,
    group_size: int,
    intervals: tuple[FloatArray, FloatArray],
) -> tuple[Prediction, ...]:
    """Beliefs in the words of the wire. `seen` holds the attempts observed; all arrays are [n].

    Args:
        intervals: From `credible_intervals`.
    """
    mean, std = mean_and_std(a, b)
    informative, _ = informative_moments(a, b, group_size)
    columns = (
        mean.tolist(),
        std.tolist(),
        intervals[0].tolist(),
        intervals[1].tolist(),
        informative.tolist(),
        seen.tolist(),
    )
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
