"""The pool: prompts in order of arrival.

A prompt's surface features are the vector under its `text_key`, its embedding the one under its `vector_key`. What is
read of a prompt for its features never changes, so that whoever has read a block may keep it, packed, for those who
start later.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

import numpy as np
from sqlalchemy import ColumnElement, Connection, RowMapping, and_, delete, insert, null, or_, select, update

from evenodds_service.domain.arrays import FloatArray
from evenodds_service.domain.log_entries import PoolEntry
from evenodds_service.domain.prompts import (
    NO_ANSWERS,
    Answer,
    KnownRate,
    NamedRates,
    NewPrompt,
    NewPrompts,
    Prompt,
    RawBlock,
    Vector,
    answer_text,
    join_key,
)
from evenodds_service.domain.settings import CALLER
from evenodds_service.errors import (
    EmbedderFixed,
    EmbeddingWidthConflict,
    PromptConflict,
    PromptUnknown,
    RateNamesLimit,
    RunUnknown,
)
from evenodds_service.storage.entries import append_entries, seconds_of
from evenodds_service.storage.runs import keep_run, lock_run, settings_to_json, stored_embedder
from evenodds_service.storage.tables import embeddings, pool_blocks, prompts, runs
from evenodds_service.storage.transactions import Transactions, chunks, insert_or_ignore
from evenodds_service.storage.values import PromptsAdded, Run
from evenodds_service.storage.vectors import absent_vectors, hold_vectors, read_vectors, store_vectors

MAX_RATE_NAMES = 64
"""Most others whose rates the prompts of one run bring along."""


class PoolMethods(Transactions):
    def add_prompts(
        self,
        run_id: int,
        prompts: Sequence[NewPrompt],
        vectors: Sequence[Vector] = (),
        *,
        embedder: str | None = None,
        embedding_width: int | None = None,
        keeps_existing: bool = False,
        now: datetime,
    ) -> PromptsAdded:
        """Add what the pool does not have; all or nothing. Takes one log position if any prompt is new.

        `embedder` and `embedding_width` are written to the run where it has none yet. A prompt whose id the
        pool has counts as existing if nothing that it states (text, answer, group, features, prior rates) differs.

        Args:
            vectors: Of the new prompts' texts. Those of embedder `caller` become the run's own.
            keeps_existing: Prompts that the pool has with another content are left as they are and answered as
                `conflicts`, with what differs; nothing is raised for them.

        Raises:
            RunUnknown: also where the run was deleted since the caller looked it up.
            PromptConflict: a prompt id is in the pool, or earlier in this call, with another text, answer,
                category, features or prior rates; names the item's position in the call and the id.
            RateNamesLimit: the prompts bring rates of more others than a run may know.
            EmbedderFixed: `embedder` differs from the run's: another caller decided first.
            EmbeddingWidthConflict: `embedding_width`, or a vector of the run's embedder, differs from the
                run's width.
            VectorUnstorable: a value is not finite, or beyond 65,504.
        """
        new = NewPrompts(prompts, vectors, embedder, embedding_width, keeps_existing)
        return self.add_prepared(run_id, new, now=now)

    def add_prepared(self, run_id: int, new: NewPrompts, *, now: datetime) -> PromptsAdded:
        """As `add_prompts`.

        Raises:
            VectorsGone: vectors that the caller found stored were erased since.
        """
        with self._writing(in_bulk=True) as connection:
            run = lock_run(connection, run_id)
            grown = grow_pool(connection, run, new, now=now)
            if grown.entry is not None:
                run = append_entries(connection, run, [grown.entry], now=now)
        return PromptsAdded(
            added=grown.added,
            existing=len(new.prompts) - grown.added - len(grown.conflicts),
            pool_size=run.pool_size,
            log_position=run.log_position,
            conflicts=grown.conflicts,
        )

    def prompts(
        self, run_id: int, *, first: int = 0, limit: int = 100, containing: str | None = None
    ) -> tuple[Prompt, ...]:
        """Prompts with index >= first, in order of index; those whose id or text contains `containing`, in any case."""
        statement = (
            select(prompts)
            .where(prompts.c.run_id == run_id, prompts.c.index >= first, prompts.c.retired_at.is_(None))
            .order_by(prompts.c.index)
            .limit(limit)
        )
        if containing is not None:
            statement = statement.where(
                or_(
                    prompts.c.prompt_id.icontains(containing, autoescape=True),
                    prompts.c.text.icontains(containing, autoescape=True),
                )
            )
        with self._reading() as connection:
            rows = connection.execute(statement).mappings().all()
        return tuple(_prompt_of(row) for row in rows)

    def prompts_at(self, run_id: int, indices: Sequence[int]) -> tuple[Prompt, ...]:
        """The prompts of these indices, in this order; those that do not exist are left out. At most 500."""
        asked = (prompts.c.run_id == run_id, prompts.c.index.in_(indices), prompts.c.retired_at.is_(None))
        statement = select(prompts).where(*asked)
        with self._reading() as connection:
            found = {row["index"]: _prompt_of(row) for row in connection.execute(statement).mappings()}
        return tuple(found[index] for index in indices if index in found)

    def prompt(self, run_id: int, prompt_id: str) -> Prompt:
        """Raises PromptUnknown."""
        asked = (prompts.c.run_id == run_id, prompts.c.prompt_id == prompt_id, prompts.c.retired_at.is_(None))
        statement = select(prompts).where(*asked)
        with self._reading() as connection:
            row = connection.execute(statement).mappings().one_or_none()
        if row is None:
            raise PromptUnknown(f"prompt {prompt_id!r} is not in the pool: add it, or send its text")
        return _prompt_of(row)

    def pool_block(
        self, run_id: int, *, first: int, last: int, surface: str, embedder: str | None, as_of: int | None = None
    ) -> RawBlock:
        """Raw features of prompts first <= index < last that are in the pool, as far as the pool goes.

        Those that were retired by log position `as_of` are left out; by now, without it.

        `surface` and `embedder` name the vectors to join: surface features by `text_key`, embeddings by
        `vector_key`. Without an embedder D is 0. Where no prompt of the block has the vector, S is 0 and D
        the run's `embedding_width` (0 without one).

        Raises:
            RunUnknown
            EmbeddingWidthConflict: an embedder's vectors are of different lengths.
        """
        surfaces, vectors = embeddings.alias("surfaces"), embeddings.alias("vectors")
        is_there: ColumnElement[bool] = prompts.c.retired_at.is_(None)
        if as_of is not None:
            is_there = or_(is_there, prompts.c.retired_at > as_of)
        asked = and_(prompts.c.run_id == runs.c.id, prompts.c.index >= first, prompts.c.index < last, is_there)
        joined = runs.outerjoin(prompts, asked)
        joined = joined.outerjoin(surfaces, and_(surfaces.c.embedder == surface, surfaces.c.key == prompts.c.text_key))
        embedding: Any = null()
        if embedder is not None:
            name = stored_embedder(embedder, run_id)
            joined = joined.outerjoin(vectors, and_(vectors.c.embedder == name, vectors.c.key == prompts.c.vector_key))
            embedding = vectors.c.vector
        told = (prompts.c.prior_rate, prompts.c.prior_rates)
        columns = (prompts.c.prompt_id, prompts.c.group, prompts.c.features, *told)
        answers = prompts.c.answer_features
        statement = (
            select(*columns, surfaces.c.vector, embedding, runs.c.embedding_width, answers)
            .select_from(joined)
            .where(runs.c.id == run_id)
            .order_by(prompts.c.index)
        )
        with self._reading() as connection:
            rows = connection.execute(statement).all()
        if not rows:
            raise RunUnknown(f"run with id {run_id} does not exist: create it first")
        width = (rows[0][7] or 0) if embedder is not None else 0
        rows = [row for row in rows if row[0] is not None]  # a run without such prompts is one row without a prompt
        return RawBlock(
            first=first,
            prompt_ids=tuple(row[0] for row in rows),
            groups=tuple(row[1] for row in rows),
            numeric=tuple(_features_of(row[2]) for row in rows),
            prior_rates_N=np.asarray([row[3] for row in rows], dtype=np.float32),  # None becomes NaN
            surface_N_S=read_vectors([row[5] for row in rows], embedder=surface, default_width=0),
            embedding_N_D=read_vectors([row[6] for row in rows], embedder=embedder or "", default_width=width),
            named_rates=_named_rates([row[4] for row in rows]),
            answers_N_A=_answers([row[8] for row in rows]),
        )

    def save_packed_block(self, run_id: int, content: bytes, *, first: int, last: int, features: str) -> None:
        """Keep the features of prompts first <= index < last as these bytes. A block that is there stays as it is.

        Args:
            features: Names what is packed and how. Blocks of another name give way.

        Raises:
            RunUnknown: also where the run was deleted since the caller looked it up.
        """
        row = {"run_id": run_id, "first": first, "last": last, "features": features, "content": content}
        with self._writing() as connection:
            keep_run(connection, run_id)
            others = (pool_blocks.c.run_id == run_id, pool_blocks.c.features != features)
            connection.execute(delete(pool_blocks).where(*others))
            connection.execute(insert_or_ignore(connection, pool_blocks).values(row))

    def packed_blocks(self, run_id: int, *, features: str) -> frozenset[int]:
        """Of each packed block of this name the index of its first prompt."""
        named = (pool_blocks.c.run_id == run_id, pool_blocks.c.features == features)
        with self._reading() as connection:
            return frozenset(connection.execute(select(pool_blocks.c.first).where(*named)).scalars())

    def packed_block(self, run_id: int, *, first: int, features: str) -> bytes | None:
        """The packed block of this name that starts at prompt `first`; None where there is none."""
        statement = select(pool_blocks.c.content).where(
            pool_blocks.c.run_id == run_id, pool_blocks.c.first == first, pool_blocks.c.features == features
        )
        with self._reading() as connection:
            return connection.execute(statement).scalar()

    def missing_vectors(self, embedders: Sequence[str], keys: Sequence[str]) -> frozenset[tuple[str, str]]:
        """The pairs (embedder, key) of these under which nothing is stored. Not for vectors that callers sent."""
        with self._reading() as connection:
            return absent_vectors(connection, embedders, keys)


@dataclass(frozen=True, slots=True)
class GrownPool:
    """What a call did to a pool.

    Attributes:
        indices: The index of every prompt of the call by its id.
        entry: The log entry that is due; None where nothing was new.
        conflicts: What differs, by the id of each prompt that kept another content.
    """

    added: int
    indices: Mapping[str, int]
    entry: PoolEntry | None
    conflicts: Mapping[str, str] = field(default_factory=dict)


def grow_pool(connection: Connection, run: Run, new: NewPrompts, *, now: datetime) -> GrownPool:
    """Add what the pool does not have. The caller holds the run's lock, and appends the log entry.

    Raises:
        VectorsGone: vectors that the caller found stored were erased since.

    And as add_prompts.
    """
    _settle_embedder(connection, run, new)
    new_prompts = new.prompts
    known = _known_prompts(connection, run.id, [prompt.prompt_id for prompt in new_prompts])
    rows: list[dict[str, object]] = []
    conflicts: dict[str, str] = {}
    for item, prompt in enumerate(new_prompts):
        twin = known.get(prompt.prompt_id)
        if twin is None:
            index = run.n_prompts + len(rows)
            known[prompt.prompt_id] = _Known(
                index,
                prompt.text_key,
                prompt.group,
                prompt.features,
                prompt.prior_rate,
                prompt.prior_rates,
                prompt.answer if run.settings.keep_text else None,
                prompt.answer_features,
            )
            rows.append(_row_of(run, index, prompt))
            continue
        attribute = _difference(twin, prompt)
        if attribute is not None and new.keeps_existing:
            conflicts[prompt.prompt_id] = attribute
        elif attribute is not None:
            raise PromptConflict(
                item=item,
                n_items=len(new_prompts),
                prompt_id=prompt.prompt_id,
                attribute=attribute,
                earlier_in_call=twin.index >= run.n_prompts,
            )
    _settle_rate_names(
        connection, run, [prompt for prompt in new_prompts if known[prompt.prompt_id].index >= run.n_prompts]
    )
    own_names = [
        replace(vector, embedder=stored_embedder(CALLER, run.id)) if vector.embedder == CALLER else vector
        for vector in new.vectors
    ]
    store_vectors(connection, own_names)
    entry = None
    if rows:
        connection.execute(insert(prompts), rows)
        entry = PoolEntry(run.log_position + 1, run.n_prompts + len(rows), seconds_of(now))
        hold_vectors(connection, new.stored)
    indices = {prompt_id: prompt.index for prompt_id, prompt in known.items()}
    return GrownPool(added=len(rows), indices=indices, entry=entry, conflicts=conflicts)


@dataclass(frozen=True, slots=True)
class _Known:
    """What a prompt of the pool, or an earlier one of the same call, states."""

    index: int
    text_key: str | None
    group: str | None
    features: Mapping[str, float] | None
    prior_rate: float | None
    prior_rates: Mapping[str, KnownRate] | None
    answer: Answer
    answer_features: tuple[float, ...] | None


def _settle_rate_names(connection: Connection, run: Run, fresh: Sequence[NewPrompt]) -> None:
    """Keep the names of all whose rates the run's prompts have.

    Raises:
        RateNamesLimit: they would be more than `MAX_RATE_NAMES`.
    """
    names = dict.fromkeys(run.rate_names)
    for prompt in fresh:
        names.update(dict.fromkeys(prompt.prior_rates or ()))
    if len(names) == len(run.rate_names):
        return
    if len(names) > MAX_RATE_NAMES:
        raise RateNamesLimit(
            f"run {run.name!r} would have prior_rates of {len(names)} others, and the limit is {MAX_RATE_NAMES} (the "
            "first "
            f"above it is {list(names)[MAX_RATE_NAMES]!r}): leave some out, or send one name for all checkpoints of "
            "a model"
        )
    connection.execute(update(runs).where(runs.c.id == run.id).values(rate_names=json.dumps(list(names))))


def _settle_embedder(connection: Connection, run: Run, new: NewPrompts) -> None:
    """Keep the embedder and the length of its vectors, where the run has none yet.

    Raises:
        EmbedderFixed, EmbeddingWidthConflict: the run has others.
    """
    embedder, embedding_width, vectors = new.embedder, new.embedding_width, new.vectors
    settled = run.settings.embedder or embedder
    if embedder not in (None, settled):
        raise EmbedderFixed(
            f"run {run.name!r} has embedder {settled!r}, and this call sends vectors of {embedder!r}: "
            "send vectors of the run's embedder"
        )
    width = run.embedding_width or embedding_width
    if embedding_width not in (None, width):
        raise EmbeddingWidthConflict(
            f"run {run.name!r} has embeddings of {width} values, this call sends {embedding_width}: send {width} values"
        )
    for number, vector in enumerate(vectors, start=1):
        if vector.embedder not in (CALLER, settled):
            continue
        width = width or len(vector.values)
        if len(vector.values) != width:
            raise EmbeddingWidthConflict(
                f"vector {number} of {len(vectors)} (key {vector.key!r}) has {len(vector.values)} values, "
                f"run {run.name!r} has embeddings of {width}: send {width} values"
            )
    if (settled, width) != (run.settings.embedder, run.embedding_width):
        settings = settings_to_json(replace(run.settings, embedder=settled))
        connection.execute(update(runs).where(runs.c.id == run.id).values(settings=settings, embedding_width=width))


def _known_prompts(connection: Connection, run_id: int, prompt_ids: Sequence[str]) -> dict[str, _Known]:
    told = (prompts.c.prior_rate, prompts.c.prior_rates)
    answered = (prompts.c.answer, prompts.c.answer_features)
    columns = (prompts.c.index, prompts.c.text_key, prompts.c.group, prompts.c.features, *told, *answered)
    known = {}
    for some in chunks(prompt_ids):
        statement = select(prompts.c.prompt_id, *columns).where(
            prompts.c.run_id == run_id, prompts.c.prompt_id.in_(some), prompts.c.retired_at.is_(None)
        )
        for prompt_id, index, text_key, group, features, rate, rates, *answer in connection.execute(statement):
            told_rates = (rate, _rates_of(rates))
            known[prompt_id] = _Known(index, text_key, group, _features_of(features), *told_rates, *_answer_of(*answer))
    return known


def _difference(known: _Known, prompt: NewPrompt) -> str | None:
    """The first thing that the prompt states otherwise. What it leaves out is no difference."""
    if prompt.text_key not in (None, known.text_key):
        return "text"
    if prompt.group not in (None, known.group):
        return "category"
    if prompt.features and dict(prompt.features) != known.features:
        return "features"
    if prompt.prior_rate not in (None, known.prior_rate):
        return "prior_rate"
    if prompt.prior_rates and dict(prompt.prior_rates) != known.prior_rates:
        return "prior_rates"
    if prompt.answer is not None and not _is_same_answer(known, prompt):
        return "answer"
    return None


def _is_same_answer(known: _Known, prompt: NewPrompt) -> bool:
    """By their texts; by their features alone where the run does not keep the answer."""
    if known.answer is None:
        return prompt.answer_features == known.answer_features
    return answer_text(known.answer) == answer_text(prompt.answer)


def _row_of(run: Run, index: int, prompt: NewPrompt) -> dict[str, object]:
    return {
        "run_id": run.id,
        "index": index,
        "prompt_id": prompt.prompt_id,
        "text": prompt.text if run.settings.keep_text else None,
        "text_key": prompt.text_key,
        "join_key": None if prompt.text is None else join_key(prompt.text),
        "group": prompt.group,
        "features": json.dumps(dict(prompt.features), allow_nan=False) if prompt.features else None,
        "prior_rate": prompt.prior_rate,
        "prior_rates": json.dumps(dict(prompt.prior_rates), allow_nan=False) if prompt.prior_rates else None,
        "vector_key": prompt.vector_key,
        "answer": json.dumps(prompt.answer) if run.settings.keep_text and prompt.answer is not None else None,
        "answer_features": None if prompt.answer_features is None else json.dumps(prompt.answer_features),
    }


def _features_of(stored: str | None) -> dict[str, float] | None:
    return None if stored is None else json.loads(stored)


def _rates_of(stored: str | None) -> dict[str, KnownRate] | None:
    if stored is None:
        return None
    told = json.loads(stored).items()
    return {name: (rate[0], rate[1]) if isinstance(rate, list) else rate for name, rate in told}


def _answer_of(answer: str | None, features: str | None) -> tuple[Answer, tuple[float, ...] | None]:
    """The answer and its features, each where it is stored."""
    return None if answer is None else json.loads(answer), None if features is None else tuple(json.loads(features))


def _answers(stored: Sequence[str | None]) -> FloatArray:
    """Features of answers as rows, float32 [n, A]; a row of NaN for each None, `NO_ANSWERS` where all are."""
    known = {row: json.loads(features) for row, features in enumerate(stored) if features is not None}
    if not known:
        return NO_ANSWERS
    answers_n_A = np.full((len(stored), len(next(iter(known.values())))), np.nan, dtype=np.float32)
    answers_n_A[list(known)] = list(known.values())
    return answers_n_A


def _named_rates(stored: Sequence[str | None]) -> NamedRates:
    return NamedRates.of([_rates_of(rates) for rates in stored])


def _prompt_of(row: RowMapping) -> Prompt:
    values = {name: value for name, value in row.items() if name not in ("run_id", "retired_at")}
    told = {"features": _features_of(values["features"]), "prior_rates": _rates_of(values["prior_rates"])}
    answer, features = _answer_of(values["answer"], values["answer_features"])
    return Prompt(**{**values, **told, "answer": answer, "answer_features": features})
