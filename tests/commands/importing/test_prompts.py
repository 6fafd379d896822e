"""`evenodds import`: a file of any size into a pool, through a real service, also when either side stops on the way."""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import text
from tests.slow_database import REQUEST_SECONDS, outlast_a_request, stalls
from tests.waiting import PATIENCE_SECONDS, in_background, until

from evenodds import Client
from evenodds_service.__main__ import main
from evenodds_service.commands.importing import prompts
from evenodds_service.commands.importing.prompts import BLOCK_LINES, ImportRefused, read_blocks
from evenodds_service.storage.engine import WRITES, open_engine
from evenodds_service.storage.migration import upgrade

if TYPE_CHECKING:
    from tests.conftest import Service

RUN = "imported"
N = 2 * BLOCK_LINES + 10


def lines(n: int, first: int = 0) -> list[str]:
    return [json.dumps({"prompt_id": f"p{i}", "text": f"What is {i} + {i}?"}) for i in range(first, first + n)]


@pytest.fixture
def target(service: Service) -> Service:
    service.client.put_run(RUN, embedder="none")
    service.client.delete_run(RUN)
    service.client.put_run(RUN, embedder="none")
    return service


@pytest.fixture
def load(target: Service, capsys: pytest.CaptureFixture[str]) -> Callable[[str | Path], tuple[int, str, str]]:
    """Imports a file: the exit status, what was printed, and the last line of standard error."""

    def run(file: str | Path, name: str = RUN) -> tuple[int, str, str]:
        status = main(["import", name, str(file), "--url", target.base_url])
        said = capsys.readouterr()
        return status, said.out.strip(), said.err.strip().splitlines()[-1] if said.err.strip() else ""

    return run


def pool_size(service: Service) -> int:
    return service.client.run(RUN).pool_size


@pytest.mark.parametrize("packed", [False, True])
def test_a_file_is_imported_in_blocks_and_may_be_imported_again(
    target: Service, load: Callable[..., tuple[int, str, str]], tmp_path: Path, packed: bool
) -> None:
    content = "\n".join(lines(N)).encode()
    file = tmp_path / "pool"
    file.write_bytes(gzip.compress(content) if packed else content)

    first, again = load(file), load(file)

    assert first[:2] == (0, f"{N:,} prompts added, 0 were there already; the pool has {N:,}")
    assert again[:2] == (0, f"0 prompts added, {N:,} were there already; the pool has {N:,}")
    assert target.client.run(RUN).log_position == 3


def test_standard_input_is_read_as_it_comes(target: Service, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "evenodds_service", "import", RUN, "-", "--url", target.base_url]

    done = subprocess.run(
        command,
        input="\n".join(lines(5)),
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        timeout=PATIENCE_SECONDS,
    )

    assert (done.returncode, done.stdout) == (0, "5 prompts added, 0 were there already; the pool has 5\n"), done.stderr


def test_a_faulty_line_is_named_by_its_number_in_the_file_and_earlier_blocks_stay(
    target: Service, load: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    file = tmp_path / "pool.jsonl"
    file.write_text("\n".join([*lines(BLOCK_LINES), "", '{"prompt_id": 7}', *lines(3, BLOCK_LINES)]))

    status, _, said = load(file)

    assert status == 1
    assert said == (
        f"evenodds import: {file}: line {BLOCK_LINES + 2}.prompt_id: Input should be a valid string, got 7; "
        f"no line from {BLOCK_LINES + 1} on was stored"
    )
    assert pool_size(target) == BLOCK_LINES

    file.write_text("\n".join(lines(BLOCK_LINES + 3)))
    assert load(file)[1].startswith(f"3 prompts added, {BLOCK_LINES:,} were there already")


def test_a_prompt_that_the_pool_has_with_another_text_is_named(
    load: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    file = tmp_path / "pool.jsonl"
    file.write_text("\n".join(lines(BLOCK_LINES)))
    load(file)
    file.write_text("\n".join([*lines(BLOCK_LINES), '{"prompt_id": "p3", "text": "other"}']))

    status, _, said = load(file)

    assert status == 1
    assert f"{file}: line {BLOCK_LINES + 1}: prompt 1 of 1: id 'p3' is in the pool with another text" in said


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it has no prompt: put one JSON object on each line"),
        (b"\n \n", "it has no prompt: put one JSON object on each line"),
        (gzip.compress("\n".join(lines(9)).encode())[:-20], "it cannot be read beyond line "),
    ],
)
def test_a_file_that_cannot_be_read_is_explained(
    load: Callable[..., tuple[int, str, str]], tmp_path: Path, content: bytes, message: str
) -> None:
    file = tmp_path / "pool.jsonl.gz"
    file.write_bytes(content)

    status, _, said = load(file)

    assert (status, said[: len(f"evenodds import: {file}: {message}")]) == (1, f"evenodds import: {file}: {message}")


def test_a_missing_file_and_an_unknown_run_are_named(load: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    file = tmp_path / "pool.jsonl"
    file.write_text("\n".join(lines(1)))

    missing, unknown = load(tmp_path / "nowhere"), load(file, "unknown-run")

    assert missing[2] == f"evenodds import: {tmp_path}/nowhere: no such file or folder: check the path"
    assert "run 'unknown-run' does not exist: create it first" in unknown[2]


def test_who_waits_for_a_service_that_is_away_is_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(prompts, "RETRIES", 0)  # or it would ask for minutes, as the first line says
    (tmp_path / "pool.jsonl").write_text("\n".join(lines(1)))
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        assert main(["import", RUN, str(tmp_path / "pool.jsonl"), "--url", url]) == 1

    first, last = capsys.readouterr().err.splitlines()
    assert url in first
    assert first.endswith("asked again for some minutes: start it meanwhile, or stop with Ctrl-C and check --url")
    assert last.endswith("no line was stored: run the same command again to go on from there")


def test_a_line_without_an_end_is_not_held_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "MAX_LINE_BYTES", 100)

    with pytest.raises(ImportRefused, match="line 2 is longer than 100 bytes"):
        list(read_blocks(io.BytesIO(b"{}\n" + b"x" * 500)))


def test_blocks_hold_each_line_once_under_its_number() -> None:
    content = b"".join(b"%d\n" % i for i in range(N))

    blocks = list(read_blocks(io.BytesIO(content)))

    assert b"".join(block.content for block in blocks) == content
    assert [block.first_line for block in blocks] == [1, BLOCK_LINES + 1, 2 * BLOCK_LINES + 1]


@pytest.mark.slow
def test_an_import_that_was_killed_goes_on_where_it_stopped(target: Service, tmp_path: Path) -> None:
    file = tmp_path / "pool.jsonl"
    n = 20 * BLOCK_LINES
    file.write_text("\n".join(lines(n)))
    command = [sys.executable, "-m", "evenodds_service", "import", RUN, str(file), "--url", target.base_url]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, **quiet, env=os.environ)  # type: ignore[call-overload]  # two spellings of it
    until(lambda: pool_size(target) >= 2 * BLOCK_LINES, "two blocks of prompts")
    process.send_signal(signal.SIGKILL)
    process.wait()
    stored = pool_size(target)
    assert 0 < stored < n

    assert main(["import", RUN, str(file), "--url", target.base_url]) == 0

    ids = [prompt.prompt_id for prompt in target.client.prompts(RUN)]
    assert ids == [f"p{i}" for i in range(n)]


@pytest.mark.slow
def test_an_import_outlasts_a_service_that_is_killed_and_starts_again(database_url: str, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    settings = {**os.environ, "EVENODDS_PORT": str(port), "EVENODDS_DATABASE_URL": database_url}
    engine = open_engine(database_url, timeout_seconds=PATIENCE_SECONDS)
    upgrade(engine)
    engine.dispose()
    file, n = tmp_path / "pool.jsonl", 10 * BLOCK_LINES
    file.write_text("\n".join(lines(n)))

    def start(*arguments: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "evenodds_service", *arguments]
        return subprocess.Popen(command, env=settings, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    with ExitStack() as stack:
        stack.callback((service := start("serve")).kill)
        client = stack.enter_context(Client(url, retries=30))
        client.put_run(RUN, embedder="none")
        stack.callback((importing_ := start("import", RUN, str(file), "--url", url)).kill)
        until(lambda: client.run(RUN).pool_size >= BLOCK_LINES, "a block of prompts")
        service.kill()
        service.wait()
        stack.callback((again := start("serve")).wait)
        stack.callback(again.kill)

        assert importing_.wait(5 * PATIENCE_SECONDS) == 0
        assert [prompt.prompt_id for prompt in client.prompts(RUN)] == [f"p{i}" for i in range(n)]


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_an_import_outlives_a_slow_database_while_requests_are_told_to_come_back(
    database_url: str, start_service: Callable[..., Service], tmp_path: Path
) -> None:
    service = start_service(database_url, timeout_seconds=REQUEST_SECONDS)
    service.client.put_run(RUN, embedder="none")
    service.client.add_prompts(RUN, [{"prompt_id": "known"}])
    file = tmp_path / "pool"
    file.write_text("\n".join(lines(20)))
    outcome = {"run": RUN, "step": 0, "observations": [{"prompt_id": "known", "successes": 1, "attempts": 2}]}
    statuses: list[int] = []

    with stalls(database_url) as stalled:
        stalled.inserts("prompts")
        with in_background(lambda: statuses.append(main(["import", RUN, str(file), "--url", service.base_url]))):
            process = stalled.process()
            outlast_a_request(database_url)
            with stalled.hung(process):
                refused = service.http.post("/observe", json=outcome)
                read = service.http.get(f"/runs/{RUN}")
            stalled.release()

    assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
    assert (read.status_code, read.json()["pool_size"]) == (200, 1)
    assert statuses == [0]
    assert service.client.run(RUN).pool_size == 21
    assert service.client.run(RUN).log_position == 2  # one load, once
    assert service.http.post("/observe", json=outcome).status_code == 200


def test_an_import_that_finds_the_database_locked_comes_back_until_it_is_stored(
    database_url: str, start_service: Callable[..., Service], tmp_path: Path
) -> None:
    service = start_service(database_url, timeout_seconds=REQUEST_SECONDS)
    service.client.put_run(RUN, embedder="none")
    file = tmp_path / "pool"
    file.write_text("\n".join(lines(20)))
    statuses: list[int] = []
    engine = open_engine(database_url, timeout_seconds=PATIENCE_SECONDS)

    def is_refused() -> bool:
        return re.search(r'^evenodds_requests_total\{.*"503".*\}', service.http.get("/metrics").text, re.M) is not None

    with ExitStack() as locks:
        writer = locks.enter_context(engine.execution_options(**{WRITES: True}).begin())
        writer.execute(text("UPDATE runs SET n_prompts = n_prompts"))
        with in_background(lambda: statuses.append(main(["import", RUN, str(file), "--url", service.base_url]))):
            until(is_refused, "a refusal")
            locks.close()

    engine.dispose()
    assert statuses == [0]
    assert service.client.run(RUN).log_position == 1
    assert pool_size(service) == 20
