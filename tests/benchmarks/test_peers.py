from __future__ import annotations

import numpy as np
import pytest
from benchmarks.peers import Contender, Ours, Row, contenders, in_process, line_of
from benchmarks.scale import BATCH

N = 600


@pytest.mark.parametrize("contender", contenders(N), ids=lambda contender: contender.name)
def test_every_method_goes_through_a_course_of_training_steps(contender: Contender) -> None:
    row = in_process(contender, N, 2)

    assert (row.method, row.n_prompts, row.steps) == (contender.name, N, 2)
    assert row.select_ms is not None
    assert row.select_ms > 0.0


def test_ours_learns_from_what_it_is_told() -> None:
    method, everyone, generator = Ours(N), np.arange(N), np.random.default_rng(0)
    chosen = method.select(everyone, BATCH, step=0, generator=generator)

    method.observe(0, chosen, np.full(BATCH, 8.0), np.full(BATCH, 8.0))

    assert len(set(chosen.tolist())) == BATCH
    assert method.predict().mean_N[chosen].mean() > 0.8


def test_a_line_of_the_table_adds_both_parts_up_and_leaves_out_what_a_floor_lacks() -> None:
    assert line_of(Row("m", 29_115, 40.0, 20.0, 5, 45.0)) == "| m | 29,115 | 40.0 | 20.0 | 60.0 | 45.0 | 0.100% |"
    assert line_of(Row("floor", 1_000, 0.5, None, 5)) == "| floor | 1,000 | 0.5 |  | 0.5 |  | 0.001% |"
