"""A state of a run and its pool's features as bytes, so that a process may start from them instead of from the
log's beginning and from every prompt's rows.

Exact: a state that went through bytes folds on bit for bit as the original would, and a pool of packed blocks gives the
features of the one that they were taken from. Arrays are stored as numpy's npz, read without pickle; `FORMAT` changes
whenever the fold changes, and bytes of another format are refused; `pool_of_bytes` takes from them what every format
has. Blocks change with `BLOCK_FORMAT` only, which is part of the name that they are kept under.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import numpy as np

from evenodds_service.domain.learning.features import Basis
from evenodds_service.domain.learning.guardrails import Constant, Guardrails, Repeats
from evenodds_service.domain.learning.known_rates import RateColumns
from evenodds_service.domain.learning.mixture import Mixture
from evenodds_service.domain.learning.regression import OnlineLogistic
from evenodds_service.domain.learning.sequential import Watch
from evenodds_service.domain.learning.state import State, grow
from evenodds_service.domain.learning.tallies import Tallies
from evenodds_service.domain.prompts import NO_ANSWERS, NO_RATES, NamedRates, RawBlock
from evenodds_service.errors import CheckpointUnusable

FORMAT = 10
BLOCK_FORMAT = 1
_SCALARS = tuple(field.name for field in fields(State) if field.type in ("int", "float"))
_ARRAYS = tuple(field.name for field in fields(State) if field.type in ("IntArray", "FloatArray"))
_BASIS = "basis_"
_COLUMNS = "columns_"
_REGRESSIONS = ("surface", "quick", "embedding", "stack", "runs")
_OF_POOL = ("position", "n_prompts", "n_retired", "head_step", "n_observations", "model_version")
_OF_POOL_ARRAYS = ("serials_N", "touched_N")
"""Fields that every format has, under these names."""
_REGRESSION_ARRAYS = ("weights", "precision", "prior_precision")
_COUNTED: dict[str, tuple[str, Any]] = {
    "tallies": ("record", Tallies),
    "guardrails": ("rails", Guardrails),
    "watch": ("watch", Watch),
    "constant": ("constant", Constant),
    "repeats": ("repeats", Repeats),
}
"""Fields that are stored value by value, under the names that they were first stored under."""
_BLOCK_ARRAYS = ("prior_rates_N", "surface_N_S", "embedding_N_D")
_RATE_ARRAYS = ("rates_N_R", "attempts_N_R")


def to_bytes(state: State) -> bytes:
    """The state as bytes."""
    header: dict[str, Any] = {"format": FORMAT} | {name: getattr(state, name) for name in _SCALARS}
    header["log_guard"] = state.mixture.log_guard
    header["n_recent"] = len(state.recent_batches)
    header |= {"group_names": state.group_names, "tellers": state.tellers}
    arrays = {name: getattr(state, name) for name in _ARRAYS} | {"log_weights": state.mixture.log_weights}
    arrays |= {f"recent_{i}": batch for i, batch in enumerate(state.recent_batches)}
    if state.basis is not None:
        header["basis"], basis_arrays = state.basis.to_arrays()
        arrays |= {f"{_BASIS}{name}": array for name, array in basis_arrays.items()}
    if state.columns is not None:
        header["columns"], column_arrays = state.columns.to_arrays()
        arrays |= {f"{_COLUMNS}{name}": array for name, array in column_arrays.items()}
    for which in _REGRESSIONS:
        regression = getattr(state, which)
        if regression is not None:
            arrays |= {f"{which}_{name}": getattr(regression, name) for name in _REGRESSION_ARRAYS}
    for which, (stored, kind) in _COUNTED.items():
        values = {field.name: getattr(getattr(state, which), field.name) for field in fields(kind)}
        arrays |= {f"{stored}.{name}": value for name, value in values.items() if isinstance(value, np.ndarray)}
        header[stored] = {name: value for name, value in values.items() if not isinstance(value, np.ndarray)}
    return _packed(header, arrays)


def from_bytes(content: bytes) -> State:
    """The state that `to_bytes` took.

    Raises:
        CheckpointUnusable: no checkpoint, one of another format, or one whose parts do not fit together.
    """
    header, arrays = _unpacked(content)
    found = header.get("format")
    if found != FORMAT:
        raise CheckpointUnusable(f"the checkpoint has format {found}, this release reads {FORMAT}")
    try:
        state = _state_of(header, arrays)
        n = state.n_prompts
        if any(getattr(state, name).shape[-1] != n for name in _ARRAYS if name.endswith("_N")):
            raise ValueError(f"its arrays are not of {n} prompts")
    except Exception as error:  # bytes that were damaged may hold anything
        raise CheckpointUnusable(f"{len(content)} bytes are no checkpoint: {error!r:.200}") from error
    return state


def pool_of_bytes(content: bytes) -> State:
    """A state that knows which prompts are in the pool, where it stands and which snapshot is in use, and has learned
    nothing: what bytes of any format tell.

    Raises:
        CheckpointUnusable: no checkpoint, or its parts do not fit together.
    """
    header, arrays = _unpacked(content)
    try:
        state, known = State(), {name: int(header[name]) for name in _OF_POOL}
        state.n_retired = known["n_retired"]
        grow(state, known["n_prompts"] + known["n_retired"], at=0)
        for name, value in known.items():
            setattr(state, name, value)
        for name in _OF_POOL_ARRAYS:
            getattr(state, name)[:] = arrays[name]
    except Exception as error:  # bytes that were damaged may hold anything
        raise CheckpointUnusable(f"{len(content)} bytes are no checkpoint: {error!r:.200}") from error
    return state


def _state_of(header: Mapping[str, Any], arrays: Mapping[str, Any]) -> State:
    state = State(**{name: header[name] for name in _SCALARS}, **{name: arrays[name] for name in _ARRAYS})
    state.mixture = Mixture(arrays["log_weights"], header["log_guard"])
    state.group_names, state.tellers = tuple(header["group_names"]), tuple(header["tellers"])
    state.recent_batches = tuple(arrays[f"recent_{i}"] for i in range(header["n_recent"]))
    if "basis" in header:
        parts = {name.removeprefix(_BASIS): array for name, array in arrays.items() if name.startswith(_BASIS)}
        state.basis = Basis.from_arrays(header["basis"], parts)
    if "columns" in header:
        parts = {name.removeprefix(_COLUMNS): array for name, array in arrays.items() if name.startswith(_COLUMNS)}
        state.columns = RateColumns.from_arrays(header["columns"], parts)
    for which in _REGRESSIONS:
        if f"{which}_weights" in arrays:
            setattr(state, which, OnlineLogistic(*(arrays[f"{which}_{name}"] for name in _REGRESSION_ARRAYS)))
    for which, (stored, kind) in _COUNTED.items():
        sums = {name.removeprefix(f"{stored}."): arrays[name] for name in arrays if name.startswith(f"{stored}.")}
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in header[stored].items()}
        setattr(state, which, kind(**sums, **values))
    return state


def block_to_bytes(block: RawBlock) -> bytes:
    """A block of a pool's features as bytes."""
    names = tuple(dict.fromkeys(block.groups))
    code = {name: i for i, name in enumerate(names)}
    header = {
        "first": block.first,
        "prompt_ids": block.prompt_ids,
        "group_names": names,
        "numeric": [features and dict(features) for features in block.numeric] if any(block.numeric) else None,
    }
    arrays = {name: getattr(block, name) for name in _BLOCK_ARRAYS}
    if block.answers_N_A.shape[1]:
        arrays["answers_N_A"] = block.answers_N_A
    if block.serials_N is not None:
        arrays["serials_N"] = block.serials_N
    if block.named_rates.names:
        header["rate_names"] = block.named_rates.names
        arrays |= {name: getattr(block.named_rates, name) for name in _RATE_ARRAYS}
    arrays["group_codes"] = np.fromiter(map(code.__getitem__, block.groups), dtype=np.int32, count=len(block.groups))
    return _packed(header, arrays)


def block_from_bytes(content: bytes) -> RawBlock:
    """The block that `block_to_bytes` took.

    Raises:
        CheckpointUnusable: the bytes are no block.
    """
    header, arrays = _unpacked(content)
    try:
        n, names = len(header["prompt_ids"]), header["group_names"]
        if any(len(arrays[name]) != n for name in (*_BLOCK_ARRAYS, "group_codes")):
            raise ValueError(f"its arrays are not of {n} prompts")
        return RawBlock(
            first=header["first"],
            prompt_ids=tuple(header["prompt_ids"]),
            groups=tuple(map(names.__getitem__, arrays["group_codes"].tolist())),
            numeric=tuple(header["numeric"] or (None,) * n),
            **{name: arrays[name] for name in _BLOCK_ARRAYS},
            named_rates=_named_rates(header, arrays),
            answers_N_A=arrays.get("answers_N_A", NO_ANSWERS),
            serials_N=arrays.get("serials_N"),
        )
    except Exception as error:  # bytes that were damaged may hold anything
        raise CheckpointUnusable(f"{len(content)} bytes are no packed block: {error!r:.200}") from error


def _named_rates(header: Mapping[str, Any], arrays: Mapping[str, Any]) -> NamedRates:
    """Of the block; blocks that were packed before there were any do not speak of them."""
    if "rate_names" not in header:
        return NO_RATES
    return NamedRates(tuple(header["rate_names"]), *(arrays[name] for name in _RATE_ARRAYS))


def _packed(header: Mapping[str, Any], arrays: Mapping[str, Any]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, header=np.frombuffer(json.dumps(header).encode(), dtype=np.uint8), **arrays)
    return buffer.getvalue()


def _unpacked(content: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as stored:
            arrays = dict(stored)
        header = json.loads(bytes(arrays.pop("header")))
        if not isinstance(header, dict):
            raise ValueError("its header is no object")
    except Exception as error:  # bytes that were damaged may hold anything
        raise CheckpointUnusable(f"{len(content)} bytes are no checkpoint: {error!r:.200}") from error
    return header, arrays
