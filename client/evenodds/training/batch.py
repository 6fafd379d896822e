"""What a selector gives a trainer: the prompts of a step, and who chose them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

from evenodds.schemas import FillForecast, Forecast, SelectReply

Arm: TypeAlias = Literal["policy", "control", "uniform"]


@dataclass(frozen=True)
class Batch:
    """The prompts of a step. Iterating gives their ids.

    Attributes:
        prompt_ids: As many as were asked for, or as it takes to fill the batch; all different.
        arms: For each prompt: `policy` or `control` as the service chose, `uniform` where it did not choose.
        reply: All that the service said; None for a uniform batch.
        incarnation: Names the training since it began or last went back to a checkpoint, for all ranks that get this
            batch; None where a rank other than 0 chose it for itself.
        held: Why the outcomes of this training are held back in the outbox, as rank 0 tells the others; None: they are
            delivered.
    """

    step: int
    prompt_ids: tuple[str, ...]
    arms: tuple[Arm, ...]
    reply: SelectReply | None = None
    incarnation: str | None = None
    held: str | None = None

    @property
    def source(self) -> Literal["service", "uniform"]:
        """Who chose it."""
        return "uniform" if self.reply is None else "service"

    @property
    def selection_id(self) -> str | None:
        """The service's name for it."""
        return None if self.reply is None else self.reply.selection_id

    @property
    def forecast(self) -> Forecast | None:
        """What the service expects of it."""
        return None if self.reply is None else self.reply.forecast

    @property
    def fill(self) -> FillForecast | None:
        """What the service expects of a batch of `select_informative`."""
        return None if self.reply is None else self.reply.fill

    def __iter__(self) -> Iterator[str]:
        return iter(self.prompt_ids)

    def __len__(self) -> int:
        return len(self.prompt_ids)
