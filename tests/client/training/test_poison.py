"""Nothing blocks an outbox for good: what can never be delivered is set aside with its reason, the rest goes on."""

from __future__ import annotations

import itertools
import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.client.training.test_selector import IDS, NOBODY, PROMPTS, SETTINGS, Make, history, make
from tests.waiting import PATIENCE_SECONDS

from evenodds import ConfigurationError, PromptSelector
from evenodds.training.inputs import MAX_CALL_BYTES
from evenodds.training.outbox import Delivery, Outbox

if TYPE_CHECKING:
    from tests.conftest import Service

__all__ = ["make"]  # a fixture

one_backend = pytest.mark.parametrize("service", ["sqlite"], indirect=True)
_numbers = itertools.count(1)
SOUND = json.dumps([{"prompt_id": "p0", "rewards": [1]}])


def put(file: Path, row: dict[str, object]) -> None:
    """A row as a broken disk or another release may have left it."""
    row = {"kind": "observe", "step": 1, "request_id": "a", "body": SOUND, **row}
    with sqlite3.connect(file) as database:
        columns, marks = ", ".join(row), ", ".join("?" * len(row))
        database.execute(f"INSERT INTO deliveries ({columns}) VALUES ({marks})", list(row.values()))
    database.close()


LONG = [{"prompt_id": "p0", "text": "x" * 200_001, "rewards": [1]}]
POISON: dict[str, dict[str, object]] = {
    "an over-long selection id": {"selection_id": "s" * 257},
    "an over-long request id": {"request_id": "r" * 257},
    "an empty request id": {"request_id": ""},
    "a NUL character": {"selection_id": "s\0"},
    "bytes that are no UTF-8": {"body": b"\xff\xfe"},
    "half of a surrogate pair": {"body": '[{"prompt_id": "\\ud800", "rewards": [1]}]'},
    "a body cut short": {"body": SOUND[:-5]},
    "a body of another version": {"body": '{"observations": []}'},
    "an item of another version": {"body": '[{"id": "p0", "rewards": [1]}]'},
    "a nested body": {"body": "[" * 100_000 + "]" * 100_000},
    "no observations": {"body": "[]"},
    "a step that is none": {"step": "first"},
    "a negative step": {"kind": "rewind", "step": -3, "body": "[]"},
    "a step beyond all": {"step": 2**53 + 1},
    "a text that is too long": {"body": json.dumps(LONG)},
}


@one_backend
@pytest.mark.parametrize("poison", POISON)
def test_a_poisoned_row_holds_nothing_up(service: Service, tmp_path: Path, poison: str) -> None:
    run = f"poisoned-{next(_numbers)}"
    outbox = Outbox(tmp_path, run)
    outbox.put([Delivery("observe", 1, "first", None, SOUND)])
    put(tmp_path / f"{run}.outbox", POISON[poison])
    outbox.put([Delivery("observe", 2, "last", None, json.dumps([{"prompt_id": "p1", "rewards": [0]}]))])
    outbox.close()

    selector = PromptSelector(
        service.base_url, run, PROMPTS, run_settings=SETTINGS, outbox=tmp_path, deadline_seconds=PATIENCE_SECONDS
    )

    assert selector.flush()
    assert history(service.client, selector) == [("p0", 1, 1.0, 1), ("p1", 2, 0.0, 1)]
    ((_, reason),) = selector.refusals()
    assert reason
    json.dumps(selector.state_dict())
    selector.close(timeout_seconds=PATIENCE_SECONDS)


@one_backend
@pytest.mark.parametrize("selection_id", ["s" * 257, "", "a\0b", "\ud800", 7, object()])
def test_a_selection_id_that_is_none_costs_no_outcome(service: Service, make: Make, selection_id: Any) -> None:
    selector = make()

    selector.observe(1, {"p0": [1]}, selection_id=selection_id)

    assert selector.flush()
    assert history(service.client, selector) == [("p0", 1, 1.0, 1)]
    assert selector.refusals() == ()


def test_a_checkpoint_with_other_deliveries_is_refused_whole(make: Make) -> None:
    selector = make(None)
    state = selector.state_dict()
    state["undelivered"] = [{"kind": "observe", "step": {}, "request_id": "a"}]

    with pytest.raises(ConfigurationError, match="not what state_dict returned"):
        selector.load_state_dict(state)


@one_backend
def test_long_texts_are_sent_in_calls_that_the_service_takes(
    start_service: Callable[..., Service], service: Service, tmp_path: Path
) -> None:
    small = start_service(f"sqlite:///{tmp_path}/evenodds.db", max_body_mb=1)
    selector = PromptSelector(
        small.base_url, "long", IDS, run_settings={"embedder": "none"}, outbox=tmp_path / "outbox", deadline_seconds=60
    )
    outcomes = [{"prompt_id": f"n{i}", "text": f"{i} " * 20_000, "rewards": [1, 0]} for i in range(100)]

    selector.observe(1, outcomes)

    assert selector.flush(timeout_seconds=60)
    state = small.client.run("long")
    assert (state.observations, state.pool_size, selector.refusals()) == (100, 100, ())
    selector.close()


def test_calls_are_cut_by_bytes_too(tmp_path: Path) -> None:
    selector = PromptSelector(NOBODY, "cut", IDS, outbox=tmp_path, deadline_seconds=60)

    selector.observe(1, [{"prompt_id": f"n{i}", "text": "x" * 100_000, "rewards": [1]} for i in range(200)])

    waiting = Outbox(tmp_path, "cut").waiting()
    selector.close(timeout_seconds=0)
    assert [len(json.loads(delivery.body)) for delivery in waiting] == [79, 79, 42]
    assert all(len(delivery.body) <= MAX_CALL_BYTES + 100 for delivery in waiting)
