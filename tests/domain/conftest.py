"""Pools made of arrays: what the tests of this room stand on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np
import pytest
from hypothesis import settings

from evenodds_service.domain.arrays import FloatArray
from evenodds_service.domain.prompts import NO_ANSWERS, NO_RATES, NamedRates, RawBlock

# The same examples each time, and fewer: the same tests run once more under each kernel.
settings.register_profile("kernels", settings.get_profile("ci"), max_examples=30)


class MakeBlock(Protocol):
    def __call__(
        self,
        n: int,
        *,
        first: int = 0,
        surface: FloatArray | None = None,
        embedding: FloatArray | None = None,
        groups: tuple[str | None, ...] | None = None,
        numeric: tuple[Mapping[str, float] | None, ...] | None = None,
        prior_rates: FloatArray | None = None,
        named_rates: NamedRates = NO_RATES,
        answers: FloatArray = NO_ANSWERS,
    ) -> RawBlock: ...


@pytest.fixture(scope="session")
def make_block() -> MakeBlock:
    """A block of n prompts named p<index>; what is left out is absent."""

    def make(
        n: int,
        *,
        first: int = 0,
        surface: FloatArray | None = None,
        embedding: FloatArray | None = None,
        groups: tuple[str | None, ...] | None = None,
        numeric: tuple[Mapping[str, float] | None, ...] | None = None,
        prior_rates: FloatArray | None = None,
        named_rates: NamedRates = NO_RATES,
        answers: FloatArray = NO_ANSWERS,
    ) -> RawBlock:
        return RawBlock(
            first=first,
            prompt_ids=tuple(f"p{first + i}" for i in range(n)),
            groups=groups or (None,) * n,
            numeric=numeric or (None,) * n,
            prior_rates_N=np.full(n, np.nan, np.float32) if prior_rates is None else prior_rates.astype(np.float32),
            surface_N_S=np.zeros((n, 0), np.float32) if surface is None else surface.astype(np.float32),
            embedding_N_D=np.zeros((n, 0), np.float32) if embedding is None else embedding.astype(np.float32),
            named_rates=named_rates,
            answers_N_A=answers.astype(np.float32),
        )

    return make
