"""Processes that are killed or stopped under load: what was acknowledged is there, once."""

from __future__ import annotations

import signal
from collections.abc import Callable
from contextlib import ExitStack
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from benchmarks.bad_weather import Town, Writers, count, prepare, run
from tests.waiting import PATIENCE_SECONDS, until

from evenodds import Client, RefitState
from evenodds_service.domain.log_entries import SnapshotEntry
from evenodds_service.storage.engine import open_engine
from evenodds_service.storage.store import Store

if TYPE_CHECKING:
    from tests.conftest import Service


def test_a_killed_service_has_lost_and_doubled_nothing(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/evenodds.db"
    town = Town(url, tmp_path)
    try:
        town.start("serve")
        with Client(town.base_url) as client:
            prepare(client)
            with Writers([town.base_url], 3, seed=1) as writers:
                for _ in range(3):
                    writers.bring_home(5)
                    town.kill("serve")
                    town.start("serve")
            engine = open_engine(url, timeout_seconds=PATIENCE_SECONDS)
            counted = count(engine, writers, client)
            engine.dispose()
    finally:
        town.stop()

    assert (counted.lost, counted.duplicated, counted.faults) == (0, 0, [])
    assert counted.acknowledged >= 15
    assert counted.repeated > 0
    assert set(counted.refusals) <= {"TransportError", "Unreachable"}


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["sqlite", "postgresql"])
def test_a_storm_over_service_worker_and_database_has_lost_and_doubled_nothing(backend: str) -> None:
    weather, counted = run(backend, 15, seed=2)

    assert (counted.lost, counted.duplicated, counted.faults) == (0, 0, [])
    assert weather.kills.total() >= 15
    assert counted.acknowledged > 15


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_the_checker_finds_what_is_lost_or_doubled(database_url: str, start_service: Callable[[str], Service]) -> None:
    service = start_service(database_url)
    prepare(service.client)
    with Writers([service.base_url], 2, seed=3) as writers:
        writers.bring_home(40)
    engine = open_engine(database_url, timeout_seconds=PATIENCE_SECONDS)

    def counted(change: Callable[[Any], None]) -> tuple[int, int, int]:
        changed = deepcopy([w for w in writers.written if w.answer is not None])
        change(changed)
        writers_then, writers.written = writers.written, changed
        try:
            found = count(engine, writers)
        finally:
            writers.written = writers_then
        return found.lost, found.duplicated, len(found.faults)

    def observe(written: Any) -> Any:
        return next(w for w in written if w.kind == "observe")

    def at_another_position(written: Any) -> None:
        write = observe(written)
        write.answer = write.answer.model_copy(update={"log_position": write.answer.log_position + 1})

    def with_other_content(written: Any) -> None:
        write = observe(written)
        write.rows = tuple((prompt_id, successes + 1) for prompt_id, successes in write.rows)

    def never_sent(written: Any) -> None:
        written.remove(observe(written))

    def without_its_selection(written: Any) -> None:
        write = next(w for w in written if w.kind == "select")
        write.answer = write.answer.model_copy(update={"selection_id": "another"})

    assert counted(lambda written: None) == (0, 0, 0)
    assert counted(at_another_position) == (1, 0, 0)
    assert counted(with_other_content) == (1, 0, 0)
    assert counted(without_its_selection) == (1, 0, 0)
    assert counted(never_sent) == (0, 0, 1)
    with engine.begin() as connection:  # the same write again, under no request id
        connection.exec_driver_sql(
            "INSERT INTO log (run_id, position, kind, step, body, created_at) "
            "SELECT run_id, position + 1000000, kind, step, body, created_at FROM log WHERE kind = 'observe' LIMIT 1"
        )
    lost, duplicated, faults = counted(lambda written: None)
    assert (lost, duplicated) == (0, 1)
    assert faults > 0
    engine.dispose()


@pytest.mark.slow
def test_a_worker_that_was_paused_beyond_its_lease_publishes_nothing(
    database_url: str, tmp_path: Path, start_service: Callable[[str], Service]
) -> None:
    client = start_service(database_url).client
    client.put_run("math", refit={"every_observations": 10**7, "every_seconds": 10**7})
    ids = [f"p{i}" for i in range(3_000)]
    client.add_prompts("math", [{"prompt_id": i, "text": f"Compute the number {i} in {len(i)} ways."} for i in ids])
    client.observe("math", 0, [{"prompt_id": i, "successes": len(i) % 4, "attempts": 8} for i in ids])
    with ExitStack() as stack:
        towns = {name: Town(database_url, tmp_path) for name in ("first", "second")}
        for town in towns.values():
            stack.callback(town.stop)

        towns["first"].start("work")
        paused = pause_in_a_fit(client, towns["first"])
        towns["second"].start("work")
        taken_over = until_ended(client, paused.refit_id)
        towns["first"].signal("work", signal.SIGCONT)
        towns["second"].kill("work")
        following = until_ended(client, client.refit("math").refit_id)

    assert (taken_over.status, taken_over.attempts) == ("done", paused.attempts + 1)
    assert taken_over.worker != paused.worker
    assert following.worker == paused.worker  # it lives, and goes on with what is next
    assert following.model_version == (taken_over.model_version or 0) + 1
    said = (tmp_path / "work.log").read_text()
    assert f"attempt {paused.attempts} of worker {paused.worker!r} no longer holds its lease" in said
    assert snapshots(database_url) == list(range(1, (following.model_version or 0) + 1))


def pause_in_a_fit(client: Client, town: Town) -> RefitState:
    """The refit whose worker was stopped while it fitted."""
    for _ in range(20):
        asked = client.refit("math")
        until_taken_up(client, asked.refit_id)
        town.signal("work", signal.SIGSTOP)
        until(lambda: threads(town.pid("work")) == {"T"}, "a worker that stands still")
        if (refit := newest(client, asked.refit_id)).status == "running":
            return refit
        town.signal("work", signal.SIGCONT)  # it was quicker
    raise AssertionError("no fit took long enough to be paused")


def threads(pid: int) -> set[str]:
    """In which states the threads of the process are: T is stopped."""
    return {stat.read_text().rpartition(")")[2].split()[0] for stat in Path(f"/proc/{pid}/task").glob("*/stat")}


def until_taken_up(client: Client, refit_id: int) -> None:
    until(lambda: newest(client, refit_id).status != "pending", "a worker for the refit")


def until_ended(client: Client, refit_id: int) -> RefitState:
    until(lambda: newest(client, refit_id).status in ("done", "failed"), "the end of the refit")
    return newest(client, refit_id)


def newest(client: Client, refit_id: int) -> RefitState:
    return next(refit for refit in client.refits("math").refits if refit.refit_id == refit_id)


def snapshots(database_url: str) -> list[int]:
    """Versions in the order of the log."""
    store = Store(open_engine(database_url, timeout_seconds=PATIENCE_SECONDS))
    entries = store.entries(store.run("math").id, after=0)
    store.close()
    return [entry.version for entry in entries if isinstance(entry, SnapshotEntry)]
