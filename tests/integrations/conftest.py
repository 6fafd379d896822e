"""Trainers of the frameworks, over a real service."""

from __future__ import annotations

import itertools
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from benchmarks.latency import service as served
from tests.integrations import by_hand
from tests.waiting import PATIENCE_SECONDS

from evenodds import Client, PromptSelector

_numbers = itertools.count(1)
PROMPTS = [{"prompt_id": f"p{i}", "text": f"What is {i} + {i}?"} for i in range(24)]


@dataclass(frozen=True)
class TrainersService:
    """A service in a process of its own, so that trainers may fork."""

    base_url: str
    client: Client


@pytest.fixture(scope="session")
def trainers_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrainersService]:
    """All tests share it, each with a run of its own. One database is enough: adapters speak through the selector."""
    url = f"sqlite:///{tmp_path_factory.mktemp('trainers')}/evenodds.db"
    with served(url) as base_url, Client(base_url) as client:
        yield TrainersService(base_url, client)


@pytest.fixture
def make_selector(trainers_service: TrainersService, tmp_path: Path) -> Iterator[Callable[..., PromptSelector]]:
    """Makes selectors of one run, which share an outbox, with their pool loaded."""
    made: list[PromptSelector] = []
    run = f"integrated-{next(_numbers)}"

    def make_one(**options: Any) -> PromptSelector:
        options = {"outbox": tmp_path / "outbox", "deadline_seconds": PATIENCE_SECONDS, **options}
        prompts = options.pop("prompts", PROMPTS)
        settings = {"embedder": "none", "group_size": 4}
        made.append(PromptSelector(trainers_service.base_url, run, prompts, run_settings=settings, **options))
        assert made[-1].wait_until_ready()
        return made[-1]

    yield make_one
    for selector in made:
        selector.close(timeout_seconds=0)


def observed(service: TrainersService, run: str) -> list[tuple[str, int, float, int]]:
    """All that the service has observed of a run: (prompt, step, successes, attempts), sorted."""
    return by_hand.observed(service.client, run)


def selected(service: TrainersService, run: str, *steps: int, batch_size: int = 4) -> list[list[str]]:
    """What the service has chosen for these steps."""
    return [[p.prompt_id for p in service.client.select_batch(run, step, batch_size).prompts] for step in steps]


@pytest.fixture
def unused_port() -> int:
    """A port of loopback that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
