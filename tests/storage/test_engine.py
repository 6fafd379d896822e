from __future__ import annotations

from datetime import datetime
from pathlib import Path

import pytest
from sqlalchemy import Engine, text
from tests.conftest import open_durable_sqlite
from tests.waiting import until

from evenodds_service.domain.settings import RunSettings
from evenodds_service.errors import DatabaseUrlUnusable, StoreUnavailable
from evenodds_service.storage.engine import open_engine
from evenodds_service.storage.migration import upgrade
from evenodds_service.storage.revisions import check_schema
from evenodds_service.storage.store import Run, Store


def test_reachable_database_answers_the_probe(store: Store) -> None:
    store.probe()
    store.close()
    store.probe()


@pytest.mark.parametrize("password", ["", ":secret"])
def test_unreachable_postgresql_is_unavailable_and_keeps_the_password(password: str) -> None:
    engine = open_engine(f"postgresql://someone{password}@127.0.0.1:1/nowhere", timeout_seconds=2)

    for attempt in (Store(engine).probe, lambda: check_schema(engine), lambda: upgrade(engine)):
        with pytest.raises(StoreUnavailable, match=r"(?i)connection.*refused.*repeat the call later") as raised:
            attempt()
        assert "secret" not in str(raised.value)


def test_sqlite_file_that_cannot_be_opened_is_unavailable(tmp_path: Path) -> None:
    store = Store(open_engine(f"sqlite:///{tmp_path}/missing/evenodds.db"))

    with pytest.raises(StoreUnavailable, match=r"unable to open database file.*repeat the call later"):
        store.probe()


def test_writer_that_waits_too_long_for_another_is_told_to_repeat(
    store: Store, run: Run, engine: Engine, shared_database_url: str, now: datetime
) -> None:
    impatient = open_engine(shared_database_url, timeout_seconds=0.1)

    def repeated() -> bool:
        try:
            Store(impatient).put_run("math", RunSettings(group_size=4), now=now)
        except StoreUnavailable:  # a busy machine takes longer
            return False
        return True

    with engine.begin() as connection:
        connection.execute(text("UPDATE runs SET n_prompts = n_prompts"))
        with pytest.raises(StoreUnavailable, match="repeat the call later"):
            Store(impatient).put_run("math", RunSettings(group_size=2), now=now)

    until(repeated, "the call, repeated, to be taken")
    assert store.run("math").settings.group_size == 4
    impatient.dispose()


def test_caller_that_waits_too_long_for_a_connection_is_told_to_repeat(database_url: str) -> None:
    engine = open_engine(database_url, pool_size=1, timeout_seconds=1)

    with engine.connect(), pytest.raises(StoreUnavailable, match="repeat the call later"):
        Store(engine).probe()

    engine.dispose()


def test_reader_is_not_kept_waiting_by_a_writer(store: Store, run: Run, engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(text("UPDATE runs SET n_prompts = 5"))

        seen = store.run("math")

    assert seen.n_prompts == 0
    assert store.run("math").n_prompts == 5


@pytest.mark.parametrize("fixed", [("journal_mode", "wal"), ("synchronous", 2), ("foreign_keys", 1)])
def test_sqlite_is_set_up_to_keep_what_it_acknowledges(
    tmp_path: Path, fixed: tuple[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evenodds_service.storage.engine._open_sqlite", open_durable_sqlite)
    engine = open_engine(f"sqlite:///{tmp_path}/evenodds.db")

    with engine.connect() as connection:
        value = connection.execute(text(f"PRAGMA {fixed[0]}")).scalar()

    assert value == fixed[1]
    engine.dispose()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("mysql://someone:secret@host/name", "the database URL starts with 'mysql': use sqlite:///FILE or postgresql"),
        ("evenodds.db", "the database URL cannot be read: use sqlite:///FILE or postgresql"),
        (
            "sqlite://",
            "a SQLite database in memory loses everything when the process ends: name a file, sqlite:///FILE",
        ),
        ("sqlite:///:memory:", "a SQLite database in memory loses everything"),
    ],
)
def test_url_that_names_no_usable_database_is_refused(url: str, message: str) -> None:
    with pytest.raises(DatabaseUrlUnusable, match=f"^{message}") as raised:
        open_engine(url)

    assert "secret" not in str(raised.value)
