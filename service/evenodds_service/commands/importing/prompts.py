"""A pool from a file of prompts, one JSON object a line.

Reads and sends the file in blocks: neither side ever holds more than one of them. Each block is stored whole or not at
all, and one that is stored already is recognised: after an interruption of either side the same command goes on where
it stopped. Speaks to the service over HTTP only.
"""

from __future__ import annotations

import argparse
import gzip
import os
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, BinaryIO, cast

from pydantic import ValidationError

from evenodds import Client, EvenOddsError, Invalid, ProblemError, PromptIn, ServerError, TransportError

BLOCK_LINES = 2_000
BLOCK_BYTES = 4_000_000
MAX_LINE_BYTES = 8 * 2**20
RETRIES = 60
"""With the client's waits, some minutes of a service that restarts."""

TIMEOUT_SECONDS = 120.0
_PROBE_SECONDS = 10.0
_INTERRUPTED = 130


class ImportRefused(Exception):
    """The file cannot be read, or a line of it cannot be stored. The message says which and what to do."""


@dataclass(frozen=True, slots=True)
class Block:
    """Consecutive lines of the file as they are; `first_line` counts from 1."""

    first_line: int
    n_lines: int
    content: bytes


@dataclass(slots=True)
class _Progress:
    added: int = 0
    existing: int = 0
    lines_stored: int = 0

    def __str__(self) -> str:
        if not self.lines_stored:
            return "no line was stored"
        return f"lines 1 to {self.lines_stored} are stored"


def run(options: argparse.Namespace) -> int:
    """Import as the arguments say.

    Returns:
        The exit status: 0, 1 after a fault that was explained on standard error, 130 after an interruption.
    """
    progress = _Progress()
    again = "run the same command again to go on from there" if options.file != "-" else "send it again to go on"
    try:
        tell_if_away(options.url)
        with Client(options.url, timeout_seconds=TIMEOUT_SECONDS, retries=RETRIES) as client:
            pool = client.run(options.run).pool_size
            send = _check if options.dry_run else _send
            with _opened(options.file) as (source, bar):
                for block in read_blocks(source):
                    send(client, options.run, block, progress)
                    bar(progress)
            if not progress.lines_stored:
                raise ImportRefused("it has no prompt: put one JSON object on each line")
            pool = client.run(options.run).pool_size
    except ImportRefused as error:
        return fault(f"{_name(options.file)}: {error}")
    except (EvenOddsError, KeyboardInterrupt) as error:
        return ended(error, str(progress), again)
    if options.dry_run:
        print(f"dry run: nothing was sent; {progress.added:,} lines are prompts; the pool has {pool:,}")
        return 0
    print(f"{progress.added:,} prompts added, {progress.existing:,} were there already; the pool has {pool:,}")
    return 0


def read_blocks(source: BinaryIO) -> Iterator[Block]:
    """The lines of the source in blocks of at most `BLOCK_LINES` lines and about `BLOCK_BYTES` bytes.

    Raises:
        ImportRefused: a line is too long, or the source cannot be read or unpacked to its end.
    """
    line = 0
    while True:
        lines: list[bytes] = []
        n_bytes = 0
        while len(lines) < BLOCK_LINES and n_bytes < BLOCK_BYTES:
            try:
                content = source.readline(MAX_LINE_BYTES + 1)
            except (OSError, EOFError, zlib.error) as error:
                raise ImportRefused(f"it cannot be read beyond line {line + len(lines)} ({error})") from error
            if not content:
                break
            if len(content) > MAX_LINE_BYTES:
                raise ImportRefused(
                    f"line {line + len(lines) + 1} is longer than {MAX_LINE_BYTES:,} bytes: put each prompt on a "
                    "line of its own"
                )
            lines.append(content)
            n_bytes += len(content)
        if not lines:
            return
        if any(content.strip() for content in lines):
            yield Block(line + 1, len(lines), b"".join(lines))
        line += len(lines)


def _send(client: Client, run: str, block: Block, progress: _Progress) -> None:
    """Raises ImportRefused where the service refuses a line, with what it says of it."""
    try:
        stored = client.add_prompt_lines(run, block.content, first_line=block.first_line)
    except ProblemError as error:
        if isinstance(error, Invalid) or error.detail.startswith("line "):
            raise ImportRefused(error.detail) from error
        raise
    progress.added += stored.added
    progress.existing += stored.existing
    progress.lines_stored = block.first_line + block.n_lines - 1


def _check(client: Client, run: str, block: Block, progress: _Progress) -> None:
    """What `_send` does before it sends. Raises ImportRefused where a line is no prompt."""
    for line, content in enumerate(block.content.splitlines(), start=block.first_line):
        if not content.strip():
            continue
        try:
            PromptIn.model_validate_json(content)
        except ValidationError as error:
            fault = error.errors()[0]
            place = ".".join(["", *map(str, fault["loc"])])
            raise ImportRefused(f"line {line}{place}: {fault['msg']}") from error
        progress.added += 1
    progress.lines_stored = block.first_line + block.n_lines - 1


@contextmanager
def _opened(file: str) -> Iterator[tuple[BinaryIO, _Bar]]:
    """The unpacked lines of the file, and a bar to show how far they are."""
    try:
        raw = open(0, "rb", closefd=False) if file == "-" else open(file, "rb")  # noqa: SIM115 - closed below
    except OSError as error:
        raise ImportRefused(f"it cannot be opened ({error.strerror})") from error
    with raw:
        is_packed = raw.peek(2)[:2] == b"\x1f\x8b"
        source = cast("BinaryIO", gzip.GzipFile(fileobj=raw)) if is_packed else raw
        with _Bar(raw) as bar:
            yield source, bar


class _Bar:
    """Shows how much of the file was read, by its bytes on disk; of a stream, how many prompts."""

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw = raw
        from tqdm import tqdm  # needed here only: the arguments of every command are known without it

        total = os.fstat(raw.fileno()).st_size if raw.seekable() else None
        self._is_sized = bool(total)
        self._tqdm = tqdm(total=total or None, unit="B" if total else " prompts", unit_scale=True, file=sys.stderr)

    def __call__(self, progress: _Progress) -> None:
        stored = progress.added + progress.existing
        done = self._raw.tell() if self._is_sized else stored
        if self._is_sized:
            self._tqdm.set_postfix_str(f"{stored:,} prompts, {progress.added:,} of them new", refresh=False)
        self._tqdm.update(done - self._tqdm.n)

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self._tqdm.close()


def _name(file: str) -> str:
    return "standard input" if file == "-" else file


def tell_if_away(url: str) -> None:
    """Say on standard error where the service does not answer: an import asks again for minutes, without a word."""
    try:
        with Client(url, timeout_seconds=_PROBE_SECONDS, retries=0) as client:
            client.healthz()
    except (TransportError, ServerError) as error:
        fault(f"{error}; it is asked again for some minutes: start it meanwhile, or stop with Ctrl-C and check --url")


def ended(error: EvenOddsError | KeyboardInterrupt, so_far: str, again: str) -> int:
    """Say on standard error why an import ended early. Returns its exit status.

    Args:
        so_far: What is stored.
        again: How to go on, where that may help.
    """
    if isinstance(error, KeyboardInterrupt):
        fault(f"interrupted; {so_far}: {again}")
        return _INTERRUPTED
    if isinstance(error, (TransportError, ServerError)):
        return fault(f"{error}; {so_far}: {again}")
    return fault(f"{error}; {so_far}")


def fault(message: str) -> int:
    """Say on standard error what is wrong. Returns the exit status of it."""
    print(f"evenodds import: {message}", file=sys.stderr)
    return 1
