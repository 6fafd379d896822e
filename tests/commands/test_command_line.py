"""The command line as a user runs it: real processes, real ports, both databases."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
from sqlalchemy import text
from tests.waiting import PATIENCE_SECONDS

from evenodds import Client, Invalid
from evenodds_service.__main__ import main
from evenodds_service.storage.engine import open_engine
from evenodds_service.storage.migration import downgrade, upgrade
from evenodds_service.storage.revisions import current_revision, head_revision

ROOT = Path(__file__).parents[2]
COMMAND = (sys.executable, "-m", "evenodds_service")
NOT_FOR_A_START = {
    *("alembic", "evenodds_service.storage.migration"),  # of a database that is at the head
    *("httpx", "evenodds.client"),
    *("torch", "sentence_transformers", "tokenizers", "scipy.sparse", "scipy.optimize", "matplotlib"),
}
"""What `serve` imports when it is first used, if ever: each takes a tenth of a second or more."""
LISTENING = re.compile(r"running on (http://127\.0\.0\.1:\d+)")


def environment(settings: Mapping[str, str]) -> dict[str, str]:
    """Ours, the packages of this repository, and these settings only."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("EVENODDS_")}
    paths = os.pathsep.join(str(ROOT / folder) for folder in ("client", "service"))
    return {**kept, "PYTHONPATH": paths, **settings}


def evenodds(*arguments: str, cwd: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own."""
    return subprocess.run(
        [*COMMAND, *arguments],
        cwd=cwd,
        env=environment(settings),
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_SECONDS,
    )


@pytest.fixture
def main_with(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., int]]:
    """Runs a command in this process, which spares the imports, in an empty folder and with these settings only.

    A command sends the log to the standard error of its test, which later tests no longer have.
    """
    for name in environment({}).keys() ^ os.environ.keys():
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str, **settings: str) -> int:
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        return main(arguments)

    hooks = sys.excepthook, threading.excepthook
    yield run
    sys.excepthook, threading.excepthook = hooks
    root = logging.getLogger()
    root.handlers = [handler for handler in root.handlers if type(handler) is not logging.StreamHandler]


@dataclass
class Server:
    """A process of `evenodds serve`."""

    process: subprocess.Popen[str]
    base_url: str
    said: list[str] = field(default_factory=list)

    def end(self, number: signal.Signals) -> int:
        """Send the signal and wait. Returns the exit status, negative where the signal ended the process."""
        self.process.send_signal(number)
        assert self.process.stderr is not None
        self.said += self.process.stderr.readlines()
        return self.process.wait(PATIENCE_SECONDS)


@contextmanager
def serving(cwd: Path, settings: Mapping[str, str]) -> Iterator[Server]:
    process = subprocess.Popen(
        [*COMMAND, "serve"],
        cwd=cwd,
        env=environment({"EVENODDS_PORT": "0", **settings}),
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    with process:
        try:
            said = []
            for line in process.stderr:
                said.append(line)
                found = LISTENING.search(line)
                if found:
                    yield Server(process, found.group(1), said)
                    return
            raise AssertionError("".join(said))
        finally:
            if process.poll() is None:
                process.kill()


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Starts `evenodds serve` in a folder of the test's own and waits until it listens."""
    with ExitStack() as stack:
        yield lambda **settings: stack.enter_context(serving(tmp_path, settings))


def imported(server: Server) -> set[str]:
    """Modules that it had imported when it began to listen, if it was started with PYTHONPROFILEIMPORTTIME."""
    return {line.rpartition("|")[2].strip() for line in server.said if line.startswith("import time:")}


def revision(database_url: str) -> str | None:
    engine = open_engine(database_url, timeout_seconds=PATIENCE_SECONDS)
    try:
        return current_revision(engine)
    finally:
        engine.dispose()


def test_serve_makes_its_sqlite_database_answers_and_stops_at_sigterm(
    tmp_path: Path, serve: Callable[..., Server]
) -> None:
    server = serve(PYTHONPROFILEIMPORTTIME="1")

    assert "psycopg" not in imported(server)
    with Client(server.base_url) as client:
        client.put_run("math")
        client.add_prompts("math", [{"prompt_id": "a", "text": "What is a?"}])
        client.observe("math", 0, [{"prompt_id": "a", "rewards": [1, 0]}])
        assert client.readyz().status == "ok"
    status = server.end(signal.SIGTERM)

    assert status in (0, -signal.SIGTERM)
    assert "Application shutdown complete" in "".join(server.said)
    assert "Traceback" not in "".join(server.said)
    assert revision(f"sqlite:///{tmp_path}/evenodds.db") == head_revision()


@pytest.mark.slow
def test_a_request_in_flight_is_answered_before_the_service_stops(serve: Callable[..., Server]) -> None:
    server = serve()
    with Client(server.base_url) as client:
        client.put_run("math", embedder="none")
    host, port = server.base_url.removeprefix("http://").split(":")
    body = b'{"prompt_id": "a"}\n'
    head = f"POST /runs/math/prompts HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/x-ndjson\r\n"
    with socket.create_connection((host, int(port)), timeout=PATIENCE_SECONDS) as connection:
        connection.sendall(f"{head}Content-Length: {len(body)}\r\nExpect: 100-continue\r\n\r\n".encode())
        assert connection.recv(1_000).startswith(b"HTTP/1.1 100")  # the service reads the body

        server.process.send_signal(signal.SIGTERM)
        assert server.process.stderr is not None
        while "Shutting down" not in (line := server.process.stderr.readline()):
            assert line
        connection.sendall(body)

        assert connection.recv(1_000).startswith(b"HTTP/1.1 200")
    assert server.process.wait(PATIENCE_SECONDS) in (0, -signal.SIGTERM)


def test_migrate_works_and_may_be_repeated(
    new_database_url: str, main_with: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    statuses = [main_with("migrate", EVENODDS_DATABASE_URL=new_database_url) for _ in range(2)]

    assert statuses == [0, 0]
    first, again = capsys.readouterr().out.splitlines()
    assert first == f"the database is at revision {head_revision()}"
    assert again == f"the database is at revision {head_revision()} already"
    assert revision(new_database_url) == head_revision()


def test_serve_answers_over_a_migrated_postgresql_database(postgresql_url: str, serve: Callable[..., Server]) -> None:
    server = serve(EVENODDS_DATABASE_URL=postgresql_url, PYTHONPROFILEIMPORTTIME="1")

    assert {"fastapi", "psycopg"} <= imported(server)
    assert not NOT_FOR_A_START & imported(server)
    assert httpx.get(f"{server.base_url}/readyz", timeout=PATIENCE_SECONDS).json() == {"status": "ok", "reasons": []}


@pytest.fixture
def postgresql_url(postgresql_server: str) -> Iterator[str]:
    """A migrated PostgreSQL database, emptied afterwards."""
    engine = open_engine(postgresql_server, timeout_seconds=PATIENCE_SECONDS)
    upgrade(engine)
    yield postgresql_server
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = :head"), {"head": head_revision()})
    downgrade(engine, "base")
    with engine.begin() as connection:
        connection.execute(text("DROP TABLE alembic_version"))
    engine.dispose()


def test_serve_refuses_an_empty_postgresql_database_and_prints_the_command(
    postgresql_server: str, tmp_path: Path
) -> None:
    refused = evenodds("serve", cwd=tmp_path, EVENODDS_DATABASE_URL=postgresql_server)

    assert refused.returncode == 1
    assert refused.stderr == (
        f"evenodds: database is empty, this release needs revision {head_revision()}: run `evenodds migrate`\n"
    )


@pytest.mark.slow
def test_serve_refuses_a_postgresql_database_of_another_release(postgresql_url: str, tmp_path: Path) -> None:
    engine = open_engine(postgresql_url, timeout_seconds=PATIENCE_SECONDS)
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999_future'"))
    engine.dispose()

    refused = [evenodds(name, cwd=tmp_path, EVENODDS_DATABASE_URL=postgresql_url) for name in ("serve", "migrate")]

    for done in refused:
        assert done.returncode == 1
        assert done.stderr.startswith("evenodds: database is at revision 9999_future, ")
        assert head_revision() in done.stderr
        assert "Traceback" not in done.stderr


def test_serve_says_that_the_database_does_not_answer(
    main_with: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main_with("serve", EVENODDS_DATABASE_URL="postgresql://nobody@127.0.0.1:1/nothing") == 1

    assert capsys.readouterr().err.startswith("evenodds: the database is unavailable (")


@pytest.mark.parametrize("command", ["serve", "migrate"])
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("EVENODDS_PORT", "eighty", "EVENODDS_PORT: Input should be a valid integer"),
        ("EVENODDS_PORT", "65536", "EVENODDS_PORT: Input should be less than or equal to 65535, got '65536'"),
        ("EVENODDS_POOL_SIZE", "0", "EVENODDS_POOL_SIZE: Input should be greater than or equal to 1, got '0'"),
        (
            "EVENODDS_ROOT_PATH",
            "odds/",
            "EVENODDS_ROOT_PATH: 'odds/' is not a path: begin each part with a slash and end with none, as in ",
        ),
        (
            "EVENODDS_TEXT_RULE",
            "{odds",
            "EVENODDS_TEXT_RULE: it has to be JSON with fields of evenodds.TextRule, such as "
            """{"context_characters": 0}, got '{odds'""",
        ),
        (
            "EVENODDS_TEXT_RULE",
            '{"odds": 1}',
            "EVENODDS_TEXT_RULE, field odds: there is no field of this name, got 1",
        ),
        (
            "EVENODDS_ALLOWED_HOSTS",
            "odds:8000",
            "EVENODDS_ALLOWED_HOSTS: 'odds:8000' is not the name of a host: write it without scheme, port and slash",
        ),
        ("EVENODDS_DATABASE_URL", "mysql://x/y", "the database URL starts with 'mysql': use sqlite:///FILE or "),
        (
            "EVENODDS_DATABASE_URL",
            "sqlite://",
            "a SQLite database in memory loses everything when the process ends: name a file",
        ),
    ],
)
def test_a_bad_setting_is_named(
    main_with: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    command: str,
    name: str,
    value: str,
    message: str,
) -> None:
    assert main_with(command, **{name: value}) == 1

    assert capsys.readouterr().err.startswith(f"evenodds: {message}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_models_that_runs_may_name_are_listed_with_commas(serve: Callable[..., Server]) -> None:
    server = serve(EVENODDS_EMBEDDERS=" /models/small, some/model,")

    with Client(server.base_url) as client, pytest.raises(Invalid) as refused:
        client.put_run("math", embedder="some/other")

    assert refused.value.code == "embedder_not_allowed"
    assert refused.value.detail.endswith("(listed at present: '/models/small', 'some/model')")


@pytest.mark.parametrize("arguments", [(), ("dance",)])
def test_a_missing_or_unknown_command_exits_2_with_those_that_exist(
    main_with: Callable[..., int], capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main_with(*arguments)

    said = capsys.readouterr().err
    assert exit_.value.code == 2
    assert said.startswith("usage: evenodds ")
    assert "COMMAND" in said


def test_openapi_prints_the_committed_description_and_opens_no_database(
    main_with: Callable[..., int], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main_with("openapi") == 0

    printed, committed = json.loads(capsys.readouterr().out), json.loads((ROOT / "openapi.json").read_text())
    printed["info"].pop("version")  # of the installed distribution
    committed["info"].pop("version")
    assert printed == committed
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_what_was_acknowledged_survives_kill_9(serve: Callable[..., Server]) -> None:
    acknowledged = 0
    for cycle in range(3):
        server = serve()
        with Client(server.base_url, retries=0) as client:
            client.put_run("math", predictor="mopps", embedder="none")
            client.add_prompts("math", [{"prompt_id": "a"}])
            for report in range(10):
                client.observe("math", cycle, [{"prompt_id": "a", "rewards": [1, 0]}], request_id=f"{cycle}-{report}")
                acknowledged += 1
        assert server.end(signal.SIGKILL) == -signal.SIGKILL

    with Client(serve().base_url) as client:
        (prediction,) = client.predict("math", ["a"]).predictions
        assert prediction.attempts_seen == 2 * acknowledged
        assert prediction.success_rate == 0.5
        assert client.run("math").log_position == 1 + acknowledged
        assert client.observe("math", 2, [{"prompt_id": "a", "rewards": [1, 0]}], request_id="2-9").replayed
