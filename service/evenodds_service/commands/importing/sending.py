"""Sends what readers found through the doors that everybody uses: outcomes to /observe, known rates to the pool.

Each report has an id made of where its content stands, so that a repetition counts once and a changed file is noticed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from pydantic import ValidationError

from evenodds import Client, Observation, PromptIn
from evenodds.schemas import MAX_ITEMS
from evenodds_service.commands.formats.outcomes import Entry, Group, KnownRates, LogRefused, Tally, Wishes
from evenodds_service.commands.formats.reading import Log
from evenodds_service.commands.importing.known_prompts import KnownPrompts, NamedPrompt

BATCH_OBSERVATIONS = 1_000
BATCH_CHARACTERS = 4_000_000
_ID_CHARACTERS = 200


@dataclass(slots=True)
class Sent:
    """What was sent so far.

    Attributes:
        source: What the run calls the log.
        is_dry: Nothing is sent; all else is as if it were.
        place, request_id: Of the report that was sent last.
    """

    source: str
    is_dry: bool
    n_groups: int = 0
    n_attempts: int = 0
    n_rates: int = 0
    n_repeated: int = 0
    steps: tuple[int, int] | None = None
    new: set[str] = field(default_factory=set)
    known: set[str] = field(default_factory=set)
    place: str = ""
    request_id: str = ""

    def count(self, prompt: NamedPrompt) -> None:
        (self.new if prompt.is_new else self.known).add(prompt.prompt_id)

    @property
    def in_short(self) -> str:
        return f"{self.n_groups or self.n_rates:,} {'groups' if self.n_groups else 'rates'}"

    @property
    def so_far(self) -> str:
        if self.is_dry:
            return "it was a dry run"
        return f"{self.in_short} are stored, up to {self.place}" if self.place else "nothing was stored"

    def lines(self, format_: str) -> list[str]:
        """The report, in lines."""
        prompts = f"{len(self.new | self.known):,} prompts, {len(self.known - self.new):,} of them in the pool before"
        if self.n_groups:
            first, last = self.steps or (0, 0)
            at = f"step {first}" if first == last else f"steps {first} to {last}"
            what = f"{self.n_groups:,} groups with {self.n_attempts:,} attempts, {at}"
        else:
            what = f"known rates of {self.n_rates:,} prompts"
        lines = [f"{format_}: {what}; {prompts}"]
        if self.n_repeated:
            lines.append(f"{self.n_repeated:,} of the groups were imported before and count once")
        return [*lines, "dry run: nothing was sent"] if self.is_dry else lines


@dataclass(slots=True)
class _Batch:
    """Observations of one step of one file that are sent together."""

    step: int
    part: int = 0
    observations: list[Observation] = field(default_factory=list)
    n_characters: int = 0

    @property
    def is_full(self) -> bool:
        return len(self.observations) >= BATCH_OBSERVATIONS or self.n_characters >= BATCH_CHARACTERS


def send_outcomes(
    client: Client,
    run: str,
    log: Log,
    wishes: Wishes,
    *,
    tally: Tally,
    known: KnownPrompts,
    sent: Sent,
    advance: Callable[[], None],
) -> None:
    """Report every group of the log at its step.

    Raises what the client raises, and LogRefused.
    """

    def flush(file: str, batch: _Batch) -> None:
        if not batch.observations:
            return
        sent.place, sent.request_id = f"{file}, step {batch.step}", _request_id(sent.source, file, batch)
        n = len(batch.observations)
        if not sent.is_dry:
            reply = client.observe(run, batch.step, batch.observations, request_id=sent.request_id)
            sent.n_repeated += n if reply.replayed else 0
        sent.n_groups += n
        sent.n_attempts += sum(_attempts(observation) for observation in batch.observations)
        first, last = sent.steps or (batch.step, batch.step)
        sent.steps = (min(first, batch.step), max(last, batch.step))
        batch.part, batch.observations, batch.n_characters = batch.part + 1, [], 0
        advance()

    for file, entries in log.entries(wishes, tally):
        batches: dict[int, _Batch] = {}
        for group in _groups(entries, wishes, tally):
            observation = _observation(group, known, sent, tally)
            if observation is None:
                continue
            step = group.step
            batch = batches.setdefault(step, _Batch(step))
            batch.observations.append(observation)
            batch.n_characters += len(observation.text or "")
            if batch.is_full:
                flush(file.name, batch)
        for step in sorted(batches):
            flush(file.name, batches[step])
        advance()


def send_rates(
    client: Client,
    run: str,
    log: Log,
    wishes: Wishes,
    *,
    tally: Tally,
    known: KnownPrompts,
    sent: Sent,
    advance: Callable[[], None],
) -> None:
    """Add every prompt of the log with its known rates, by the names of its columns, as `prior_rates`.

    A prompt that the pool has keeps what it was loaded with: it is left out unless that is the same.

    Raises what the client raises, and LogRefused.
    """
    batch: list[PromptIn] = []

    def flush(file: str) -> None:
        if batch:
            sent.place = f"{file}, {batch[-1].prompt_id}"
            if not sent.is_dry:
                added = client.add_prompts(run, batch)
                sent.n_repeated += added.existing
            sent.n_rates += len(batch)
            batch.clear()
        advance()

    for file, entries in log.entries(wishes, tally):
        for rates in _rates(entries, file.name):
            prompt = known.named(rates)
            if prompt is None:
                continue
            if not prompt.is_new and prompt.prior_rates != dict(rates.rates):
                reason = "prompts that the pool has with other prior rates or none, which a run keeps as it was loaded"
                tally.leave_out(reason, rates.place)
                continue
            row: dict[str, object] = {"prompt_id": prompt.prompt_id, "text": prompt.text, "category": prompt.category}
            row["answer"] = prompt.answer
            try:
                batch.append(PromptIn.model_validate(row | {"prior_rates": rates.rates}))
            except ValidationError as error:
                tally.leave_out(_not_storable(error), rates.place)
                continue
            sent.count(prompt)
            if len(batch) >= BATCH_OBSERVATIONS:
                flush(file.name)
        flush(file.name)


def _groups(entries: Iterator[Entry], wishes: Wishes, tally: Tally) -> Iterator[Group]:
    """Groups as they are; of a table, its counts as groups of one step."""
    for entry in entries:
        if isinstance(entry, Group):
            yield entry
            continue
        if len(entry.rates) > 1:
            raise LogRefused(
                f"{entry.place}: outcomes are of one model, and this table has {', '.join(entry.rates)}: name the "
                "column by --rate"
            )
        (rate,) = entry.rates.values()
        if isinstance(rate, float):
            tally.leave_out("rates without a number of attempts, which are no outcomes", entry.place)
            continue
        k, n = rate["successes"], int(rate["attempts"])
        whole = int(k)
        rest = (k - whole,) if whole < n else ()
        rewards = (1.0,) * whole + rest + (0.0,) * (n - whole - len(rest))
        yield Group(
            wishes.step,
            rewards,
            entry.prompt_id,
            entry.text,
            category=entry.category,
            place=entry.place,
            answer=entry.answer,
        )


def _rates(entries: Iterator[Entry], name: str) -> Iterator[KnownRates]:
    """Known rates as they are; of an evaluation, the attempts at each prompt together."""
    for entry in entries:
        if isinstance(entry, KnownRates):
            yield entry
            continue
        counts = {"successes": sum(entry.rewards), "attempts": float(len(entry.rewards))}
        yield KnownRates({name: counts}, entry.prompt_id, entry.text, entry.category, entry.place, entry.answer)


def _observation(group: Group, known: KnownPrompts, sent: Sent, tally: Tally) -> Observation | None:
    prompt = known.named(group)
    if prompt is None:
        tally.leave_out("groups without an id or a text", group.place)
        return None
    row: dict[str, object] = {"prompt_id": prompt.prompt_id, "text": prompt.text, "category": prompt.category}
    row["answer"] = prompt.answer
    if len(group.rewards) <= MAX_ITEMS:
        row["rewards"] = group.rewards
    else:
        row |= {"successes": sum(group.rewards), "attempts": len(group.rewards)}
    try:
        observation = Observation.model_validate(row)
    except ValidationError as error:
        tally.leave_out(_not_storable(error), group.place)
        return None
    sent.count(prompt)
    return observation


def _attempts(observation: Observation) -> int:
    return len(observation.rewards) if observation.rewards is not None else observation.attempts or 0


def _not_storable(error: ValidationError) -> str:
    fault = error.errors()[0]
    return f"prompts that cannot be stored: {'.'.join(map(str, fault['loc']))}: {fault['msg']}"


def _request_id(source: str, file: str, batch: _Batch) -> str:
    """Names the report by where its content stands; hashed where that is long."""
    place = f"{source}/{file}" if source != file else file
    if len(place) > _ID_CHARACTERS or not place.isprintable():
        place = hashlib.sha256(place.encode(errors="surrogateescape")).hexdigest()
    return f"import:{place}:{batch.step}:{batch.part}"
