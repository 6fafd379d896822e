"""Feature vectors on their way in and out: one per (embedder, key), kept as little-endian 16-bit floats."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from sqlalchemy import Connection, select, tuple_

from evenodds_service.domain.arrays import FloatArray
from evenodds_service.domain.prompts import Vector
from evenodds_service.errors import EmbeddingWidthConflict, VectorsGone, VectorUnstorable
from evenodds_service.storage.tables import embeddings
from evenodds_service.storage.transactions import chunks, insert_or_ignore

_STORED = np.dtype("<f2")


def store_vectors(connection: Connection, vectors: Sequence[Vector]) -> None:
    """Insert the vectors under their embedders' names; one that is stored already stays as it is.

    Raises:
        VectorUnstorable: a value is not finite, or beyond 65,504.
    """
    rows = {}
    for number, vector in enumerate(vectors, start=1):
        with np.errstate(over="ignore"):
            stored = np.asarray(vector.values, dtype=_STORED)
        if not np.isfinite(stored).all():
            raise VectorUnstorable(
                f"vector {number} of {len(vectors)} (key {vector.key!r}): every value must be finite and "
                "within ±65504: scale the vector to unit length"
            )
        row = {
            "embedder": vector.embedder,
            "key": vector.key,
            "width": len(stored),
            "vector": stored.tobytes(),
        }
        rows[vector.embedder, vector.key] = row
    # In the order of their keys: two transactions with the same vectors wait for each other instead of
    # deadlocking.
    if rows:
        connection.execute(insert_or_ignore(connection, embeddings), [rows[names] for names in sorted(rows)])


def hold_vectors(connection: Connection, stored: Sequence[tuple[str, str]]) -> None:
    """Keep these vectors (embedder, key) from being erased until the transaction ends.

    Raises:
        VectorsGone: some are not there any more.
    """
    for some in chunks(sorted(stored)):
        there = select(embeddings.c.key).where(tuple_(embeddings.c.embedder, embeddings.c.key).in_(some))
        found = connection.execute(there.with_for_update(read=True, key_share=True)).all()
        if len(found) < len(some):
            raise VectorsGone(f"{len(some) - len(found)} vectors were erased meanwhile: repeat the call")


def absent_vectors(connection: Connection, embedders: Sequence[str], keys: Sequence[str]) -> frozenset[tuple[str, str]]:
    """The pairs (embedder, key) of these under which there is no vector."""
    absent = {(embedder, key) for embedder in embedders for key in keys}
    for some in chunks(sorted(set(keys))):
        stored = select(embeddings.c.embedder, embeddings.c.key).where(
            embeddings.c.embedder.in_(embedders), embeddings.c.key.in_(some)
        )
        absent.difference_update((row.embedder, row.key) for row in connection.execute(stored))
    return frozenset(absent)


def read_vectors(stored: Sequence[bytes | None], *, embedder: str, default_width: int) -> FloatArray:
    """The stored vectors as rows.

    Args:
        default_width: Number of columns where no vector is there to tell, at least 0.

    Returns:
        float32 [n, D]; a row of NaN for each None.

    Raises:
        EmbeddingWidthConflict: the vectors are of different lengths.
    """
    present = [number for number, vector in enumerate(stored) if vector is not None]
    found = [vector for vector in stored if vector is not None]
    widths = sorted({len(vector) // _STORED.itemsize for vector in found}) or [default_width]
    if len(widths) > 1:
        raise EmbeddingWidthConflict(
            f"embedder {embedder!r} has stored vectors of different lengths {widths}: "
            "create a run with another embedder"
        )
    rows = np.full((len(stored), widths[0]), np.nan, dtype=np.float32)
    rows[present] = np.frombuffer(b"".join(found), dtype=_STORED).reshape(len(found), widths[0])
    return rows
