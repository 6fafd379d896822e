"""A disk that is full: honest 503s, a /readyz that says why, nothing half written; on it goes when there is room."""

from __future__ import annotations

import os
import resource
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from benchmarks.bad_weather import Town, Writers, count, postgresql, prepare
from tests.waiting import PATIENCE_SECONDS, until

from evenodds import Client
from evenodds_service.storage.engine import open_engine

if TYPE_CHECKING:
    from tests.conftest import Service


def assert_nothing_is_lost(database_url: str, writers: Writers, client: Client) -> None:
    engine = open_engine(database_url, timeout_seconds=PATIENCE_SECONDS)
    counted = count(engine, writers, client)
    engine.dispose()
    assert (counted.lost, counted.duplicated, counted.faults) == (0, 0, [])
    assert counted.acknowledged > 0


def until_unavailable(client: Client) -> tuple[str, ...]:
    """Wait until /readyz says so; the reasons that it gives."""
    return until(lambda: client.readyz().reasons, "a /readyz that names a reason")


def until_ready(client: Client) -> None:
    until(lambda: client.readyz().status == "ok", "a service that is ready again")


def until_refused(writers: Writers) -> None:
    """Wait until a writer has met the full disk too: /readyz may see it, and room be made, between two writes."""
    until(lambda: writers.refusals, "a write that is refused")


def test_sqlite_goes_on_when_there_is_room_again(tmp_path: Path) -> None:
    """No file of the process may grow: for SQLite that is a write that the disk did not take."""
    town = Town(f"sqlite:///{tmp_path}/evenodds.db", tmp_path)
    try:
        town.start("serve")
        with Client(town.base_url, timeout_seconds=PATIENCE_SECONDS) as client:
            prepare(client)
            with Writers([town.base_url], 3, seed=0) as writers:
                writers.bring_home(5)
                written = (tmp_path / "evenodds.db-wal").stat().st_size
                resource.prlimit(town.pid("serve"), resource.RLIMIT_FSIZE, (written, resource.RLIM_INFINITY))
                reasons = until_unavailable(client)
                alive = client.healthz()
                until_refused(writers)
                resource.prlimit(town.pid("serve"), resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
                until_ready(client)
                writers.bring_home(5)

            assert alive.status == "ok"
            assert reasons[0].startswith("the database is unavailable (")
            assert set(writers.refusals) == {"store_unavailable"}
            assert_nothing_is_lost(f"sqlite:///{tmp_path}/evenodds.db", writers, client)
    finally:
        town.stop()


@pytest.fixture
def small_disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A disk of as many MB as the test's parameter says."""
    disk = tmp_path / "disk"
    disk.mkdir(mode=0o755)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={request.param}m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount a file system")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def fill(disk: Path) -> Path:
    """The file that takes all the room that is left."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        try:
            while file.write(b"x" * 65_536):
                pass
        except OSError:
            return ballast
    raise AssertionError("the disk has no end")


def weather_the_full_disk(service: Service, disk: Path) -> tuple[Writers, tuple[str, ...]]:
    prepare(service.client)
    with Writers([service.base_url], 3, seed=0) as writers:
        writers.bring_home(5)
        ballast = fill(disk)
        reasons = until_unavailable(service.client)
        assert service.client.healthz().status == "ok"
        until_refused(writers)
        ballast.unlink()
        until_ready(service.client)
        writers.bring_home(5)
    return writers, reasons


@pytest.mark.parametrize("small_disk", [6], indirect=True)
def test_sqlite_on_a_full_disk(small_disk: Path, start_service: Callable[..., Service]) -> None:
    url = f"sqlite:///{small_disk}/evenodds.db"
    service = start_service(url)

    writers, reasons = weather_the_full_disk(service, small_disk)

    assert reasons == ("the database is unavailable (database or disk is full): repeat the call later",)
    assert set(writers.refusals) == {"store_unavailable"}
    assert_nothing_is_lost(url, writers, service.client)
    service.stop()


@pytest.mark.slow
@pytest.mark.parametrize("small_disk", [130], indirect=True)
def test_postgresql_on_a_full_disk(small_disk: Path, start_service: Callable[..., Service]) -> None:
    with postgresql(small_disk) as server:
        service = start_service(server.url)

        writers, reasons = weather_the_full_disk(service, small_disk)

        assert "No space left on device" in reasons[0]
        assert set(writers.refusals) == {"store_unavailable"}
        assert_nothing_is_lost(server.url, writers, service.client)
        service.stop()
