"""What a step of a trainer costs the database: transactions, and statements in them (SQLite's BEGIN is one).

What is done after a reply counts with its request. The application is called in this process, so that it has done that
when the call returns.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import Engine, event
from tests.waiting import PATIENCE_SECONDS

from evenodds_service.api.app import create_app
from evenodds_service.storage.engine import open_engine
from evenodds_service.storage.migration import upgrade
from evenodds_service.storage.store import Store


@dataclass
class Counted:
    transactions: int = 0
    statements: int = 0


@contextmanager
def counting(engine: Engine) -> Iterator[Counted]:
    """What the database does while the body runs."""
    counted = Counted()

    def began(*_: Any) -> None:
        counted.transactions += 1

    def executed(*_: Any) -> None:
        counted.statements += 1

    event.listen(engine, "begin", began)
    event.listen(engine, "before_cursor_execute", executed)
    try:
        yield counted
    finally:
        event.remove(engine, "begin", began)
        event.remove(engine, "before_cursor_execute", executed)


class Trainer:
    """Calls the application and counts what each call costs."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.http = TestClient(create_app(Store(engine)), base_url="http://localhost")

    def cost(self, path: str, **body: Any) -> tuple[int, int]:
        """Transactions and statements of one call."""
        with counting(self.engine) as counted:
            reply = self.http.post(path, json={"run": "math", **body})
        assert reply.status_code == 200, reply.text
        # The driver of PostgreSQL sends its BEGIN unseen.
        begins = counted.transactions if self.engine.dialect.name == "postgresql" else 0
        return counted.transactions, counted.statements + begins


@pytest.fixture
def trainer(database_url: str) -> Iterator[Trainer]:
    """With eight prompts in the pool, and a step done: the process has read the run with its prompts."""
    engine = open_engine(database_url, timeout_seconds=PATIENCE_SECONDS)
    upgrade(engine)
    trainer = Trainer(engine)
    trainer.http.put("/runs/math", json={"group_size": 4}).raise_for_status()
    prompts = [{"prompt_id": f"p{i}", "text": f"What is {i} + {i}?"} for i in range(8)]
    trainer.http.post("/runs/math/prompts", json={"prompts": prompts}).raise_for_status()
    trainer.cost("/select_batch", step=0, batch_size=2)
    trainer.cost("/observe", step=0, request_id="0", observations=[seen("p0"), seen("first", text="Who is first?")])
    yield trainer
    engine.dispose()


def seen(prompt_id: str, **more: Any) -> dict[str, Any]:
    return {"prompt_id": prompt_id, "successes": 1, "attempts": 4, **more}


def test_a_report_is_one_transaction(trainer: Trainer) -> None:
    """It takes the run's row, looks for an earlier answer, writes the entry and moves the run on."""
    first = trainer.cost("/observe", step=1, request_id="1", observations=[seen("p1"), seen("p2")])
    again = trainer.cost("/observe", step=1, request_id="1", observations=[seen("p1"), seen("p2")])
    with_text = trainer.cost("/observe", step=1, request_id="2", observations=[seen("p3", text="What is 3 + 3?")])

    assert first == (1, 5)
    assert again == (1, 3)
    assert with_text == (1, 6)  # which is compared with the pool's


def test_a_report_of_a_new_text_is_three_transactions(trainer: Trainer) -> None:
    """Which vectors are missing; the report; the new prompt's features, as others read them."""
    assert trainer.cost("/observe", step=1, request_id="1", observations=[seen("new", text="Who?")]) == (3, 12)


def test_a_choice_is_two_transactions(trainer: Trainer) -> None:
    """The run with what was chosen before, and the record; what this process wrote meanwhile is not read back."""
    trainer.cost("/observe", step=1, request_id="1", observations=[seen("p1")])

    first = trainer.cost("/select_batch", step=1, batch_size=2)
    again = trainer.cost("/select_batch", step=1, batch_size=2)

    assert first == (2, 9)
    assert again == (1, 3)


def test_what_another_process_wrote_is_read_once(trainer: Trainer) -> None:
    elsewhere = TestClient(create_app(Store(trainer.engine)), base_url="http://localhost")
    elsewhere.post("/observe", json={"run": "math", "step": 1, "observations": [seen("p1")]}).raise_for_status()

    report = trainer.cost("/observe", step=1, request_id="1", observations=[seen("p2")])
    question = trainer.cost("/predict", prompts=[{"prompt_id": "p1"}])

    assert report == (2, 7)
    assert question == (1, 2)
