"""Reading files piece by piece: JSON lines (perhaps packed with gzip), CSV, and parquet by its own library."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from evenodds_service.commands.formats.outcomes import LogRefused, Tally

Row = dict[str, Any]

MAX_LINE_BYTES = 64 * 2**20
_PARQUET_ROWS = 1_024
_UNREADABLE = "lines that are not a JSON object"


@dataclass(slots=True)
class LogFile:
    """A file of a log.

    Attributes:
        path: Where it is.
        name: How messages and request ids call it: below the folder that was named.
        position: How far it was read, in bytes on disk.
    """

    path: Path
    name: str
    position: int = 0

    @property
    def size(self) -> int:
        return self.path.stat().st_size

    def json_lines(self, tally: Tally) -> Iterator[tuple[int, Row]]:
        """Rows by the number of their line, from 1 on. Lines that are no JSON object are counted and left out.

        Raises:
            LogRefused: the file cannot be read or unpacked to its end, or has a line that is too long.
        """
        line = 0
        try:
            with self.path.open("rb") as raw:
                source = _unpacked(raw)
                while content := source.readline(MAX_LINE_BYTES + 1):
                    line += 1
                    self.position = raw.tell()
                    if len(content) > MAX_LINE_BYTES:
                        raise LogRefused(f"{self.name} line {line} is longer than {MAX_LINE_BYTES:,} bytes")
                    if not content.strip():
                        continue
                    row = _parsed(content)
                    if row is None:
                        tally.leave_out(_UNREADABLE, self.at(line))
                    else:
                        yield line, row
        except (OSError, EOFError, zlib.error) as error:
            raise LogRefused(f"{self.name}: it cannot be read beyond line {line} ({_reason(error)})") from error

    def csv_rows(self) -> Iterator[tuple[int, Row]]:
        """Rows by the number of their line; the first line has the names of the columns.

        Raises:
            LogRefused: the file cannot be read, or is not CSV in UTF-8.
        """
        line = 1
        try:
            with self.path.open("rb") as raw:
                reader = csv.DictReader(io.TextIOWrapper(_unpacked(raw), encoding="utf-8-sig", newline=""))
                for row in reader:
                    line = reader.line_num
                    self.position = raw.tell()
                    yield line, {name: value for name, value in row.items() if name is not None}
        except (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error) as error:
            raise LogRefused(f"{self.name}: it cannot be read beyond line {line} ({_reason(error)})") from error

    def parquet_columns(self) -> list[str]:
        """Raises LogRefused: pyarrow is not installed, or this is no parquet file."""
        with _parquet(self) as file:
            return [str(name) for name in file.schema_arrow.names]

    def parquet_rows(self, columns: Sequence[str] | None = None) -> Iterator[tuple[int, Row]]:
        """Rows by their number, from 1 on, a thousand in memory at a time.

        Args:
            columns: Only these.

        Raises:
            LogRefused: pyarrow is not installed, or this is no parquet file.
        """
        with _parquet(self) as file:
            total = max(file.metadata.num_rows, 1)
            number = 0
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
                self.position = self.size * number // total

    def at(self, line: int) -> str:
        return f"{self.name} line {line}"

    def first_row(self) -> Row | None:
        """The first JSON object; None where the file does not begin with one."""
        try:
            with self.path.open("rb") as raw:
                source = _unpacked(raw)
                while content := source.readline(MAX_LINE_BYTES + 1):
                    if content.strip():
                        return _parsed(content)
        except (OSError, EOFError, zlib.error) as error:
            raise LogRefused(f"{self.name}: it cannot be read ({_reason(error)})") from error
        return None


def _unpacked(raw: IO[bytes]) -> IO[bytes]:
    is_packed = cast("io.BufferedReader", raw).peek(2)[:2] == b"\x1f\x8b"
    return cast("IO[bytes]", gzip.GzipFile(fileobj=raw)) if is_packed else raw


def _parsed(content: bytes) -> Row | None:
    try:
        row = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _parquet(file: LogFile) -> Any:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ModuleNotFoundError as error:
        raise LogRefused(
            f"{file.name}: reading parquet needs pyarrow: run pip install 'evenodds[parquet]', or in a checkout "
            "pip install '.[parquet]'"
        ) from error
    try:
        return ParquetFile(file.path)
    except (ArrowException, OSError) as error:
        raise LogRefused(f"{file.name}: it cannot be read as parquet ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or " ".join(str(error).split())[:200] or type(error).__name__
