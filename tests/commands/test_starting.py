"""What keeps `evenodds serve` from starting is named, with the place and what to do, and so are odd variables."""

from __future__ import annotations

import os
import socket
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.commands.test_command_line import main_with

from evenodds_service.errors import DatabaseUrlUnusable
from evenodds_service.settings import unknown_variables
from evenodds_service.storage.engine import check_file, open_engine
from evenodds_service.storage.migration import upgrade

__all__ = ["main_with"]  # a fixture


def said(main_with: Callable[..., int], capsys: pytest.CaptureFixture[str], **settings: str) -> str:
    assert main_with("serve", **settings) == 1
    return capsys.readouterr().err


def test_a_missing_folder_is_named(
    main_with: Callable[..., int], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    line = said(main_with, capsys, EVENODDS_DATABASE_URL=f"sqlite:///{tmp_path}/nowhere/evenodds.db")

    assert f"the SQLite file {tmp_path}/nowhere/evenodds.db: its folder does not exist: create it" in line


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (lambda content: content[: len(content) // 2], "its end is missing: restore it from a backup"),
        (lambda content: content[:50], "its end is missing: restore it from a backup"),
        (lambda content: b"junk" + content[4:], "is not a SQLite database: restore it from a backup"),
    ],
)
def test_a_damaged_file_is_named(
    main_with: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    damage: Callable[[bytes], bytes],
    fault: str,
) -> None:
    file = tmp_path / "evenodds.db"
    engine = open_engine(f"sqlite:///{file}")
    upgrade(engine)
    engine.dispose()
    check_file(f"sqlite:///{file}")  # sound so far
    file.write_bytes(damage(file.read_bytes()))

    line = said(main_with, capsys, EVENODDS_DATABASE_URL=f"sqlite:///{file}")

    assert str(file) in line
    assert fault in line
    assert "EVENODDS_DATABASE_URL" in line


def test_a_file_that_may_not_be_written_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As on a file system that is read-only, where the tests' own user may be one that no rights bind."""
    monkeypatch.setattr(os, "access", lambda place, mode: False)

    with pytest.raises(DatabaseUrlUnusable, match=f"{tmp_path} is not writable"):
        check_file(f"sqlite:///{tmp_path}/evenodds.db")


def test_a_busy_port_is_named_before_anything_has_started(
    main_with: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        line = said(main_with, capsys, EVENODDS_PORT=str(port))

    assert f"EVENODDS_PORT {port} (Address already in use): stop" in line
    assert "startup complete" not in line


def test_a_variable_that_is_no_setting_is_told(
    main_with: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    line = said(main_with, capsys, EVENODDS_DATABASE_ULR="x", EVENODDS_PORT="99999")

    assert "EVENODDS_DATABASE_ULR is not a setting of the service: did you mean EVENODDS_DATABASE_URL?" in line


def test_variables_of_the_client_and_of_compose_are_known() -> None:
    known = {"EVENODDS_API_KEY": "x", "EVENODDS_REPLICAS": "2", "EVENODDS_PORT": "1", "PATH": "/"}

    assert unknown_variables(known) == ()
    assert unknown_variables({"EVENODDS_COLOUR": "red"}) == (
        "EVENODDS_COLOUR is not a setting of the service: it has no effect",
    )


def test_a_file_that_is_damaged_while_the_service_runs_is_no_500(tmp_path: Path) -> None:
    from evenodds_service.errors import StoreUnavailable
    from evenodds_service.storage.store import Store

    file = tmp_path / "evenodds.db"
    engine = open_engine(f"sqlite:///{file}")
    upgrade(engine)
    engine.dispose()
    with sqlite3.connect(file) as database:
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    database.close()
    content = bytearray(file.read_bytes())
    content[4_096:] = bytes(len(content) - 4_096)
    file.write_bytes(content)
    store = Store(engine)

    with pytest.raises(StoreUnavailable, match="damaged"):
        store.runs()
    store.close()
