"""Which format a log has, its files in order, and its entries."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from evenodds import PromptIn
from evenodds_service.commands.formats import inspect_ai, lm_eval, nemo_rl, prime_rl, tables, trl, verl
from evenodds_service.commands.formats.files import LogFile
from evenodds_service.commands.formats.outcomes import Entry, LogRefused, Tally, Wishes

PROMPTS = "prompts"
"""Not a log: lines with the fields of a prompt, which the service reads itself."""


class Reader(Protocol):
    def read(self, file: LogFile) -> Iterator[Entry]: ...


_FOLDERS = (prime_rl, trl, nemo_rl, lm_eval, inspect_ai, verl)
"""In the order in which a folder is looked through: verl's names say least."""
_ROWS = (verl, prime_rl, nemo_rl, lm_eval)
OF_TRAININGS = frozenset({verl.NAME, trl.NAME, prime_rl.NAME, nemo_rl.NAME})
OF_EVALUATIONS = frozenset({lm_eval.NAME, inspect_ai.NAME})
_READERS = {module.NAME: module.Reader for module in (*_FOLDERS, tables)}


@dataclass(frozen=True, slots=True)
class Log:
    """A log that was found.

    Attributes:
        format: Its name, one of `FORMATS`.
        files: In the order of time, at least one.
    """

    format: str
    files: tuple[LogFile, ...]

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def position(self) -> int:
        """How far it was read, in bytes."""
        return sum(file.position for file in self.files)

    def entries(self, wishes: Wishes, tally: Tally) -> Iterator[tuple[LogFile, Iterator[Entry]]]:
        """The entries of each file, in order. Each is to be read to its end before the next.

        Raises:
            LogRefused: a file cannot be read, or not without further wishes.
        """
        reader = _READERS[self.format](wishes, tally)
        for file in self.files:
            yield file, reader.read(file)
            file.position = file.size


def open_log(path: Path, format_: str | None = None) -> Log:
    """Find out what the file or folder is.

    Args:
        format_: Its format, if the caller knows.

    Raises:
        LogRefused: there is no such file, it is a pickle, or nothing of a known format is there.
    """
    if not path.exists():
        raise LogRefused(f"{path}: no such file or folder: check the path")
    if path.is_dir():
        return _of_folder(path, format_)
    file = LogFile(path, path.name)
    if path.suffix in {".pt", ".pth", ".pkl", ".pickle"}:
        raise LogRefused(
            f"{path}: a pickle can run any code, so it is never loaded: if you trust it, convert it to JSON lines"
        )
    return Log(format_ or _format_of(file), (file,))


def _of_folder(folder: Path, format_: str | None) -> Log:
    for module in _FOLDERS:
        if format_ in (None, module.NAME) and (found := module.files_of(folder)):
            files = tuple(LogFile(path, path.relative_to(folder).as_posix()) for path in found)
            return Log(module.NAME, files)
    raise LogRefused(
        f"{folder}: no file in it has the name of a log of {format_ or 'a known format'}: name the file itself"
    )


def _format_of(file: LogFile) -> str:
    name = file.path.name.removesuffix(".gz")
    if name.endswith(".parquet"):
        return trl.NAME if trl.recognises(file.parquet_columns()) else tables.NAME
    if name.endswith(".csv"):
        return tables.NAME
    if name.endswith((".eval", ".json")):
        return inspect_ai.NAME
    row = file.first_row()
    if row is None or row.keys() <= PromptIn.model_fields.keys():
        return PROMPTS  # whose lines are checked one by one
    for module in _ROWS:
        if module.recognises(row):
            return str(module.NAME)
    return tables.NAME if tables.recognises(row) else PROMPTS


FORMATS = (PROMPTS, *_READERS)
