"""inspect-ai: a log `.eval` (an archive) or `.json` of one evaluation, a sample for each id and epoch.

| here | in the file |
|---|---|
| step | none: `--step`, 0 by default. The run stands for the model that was evaluated |
| id | the sample's `id`, after the task's name |
| text | `input`, a text or its user messages |
| answer | `target` |
| group | the epochs of an id |
| reward | `value` of the one scorer; `--reward NAME` where there are several |
| category | `eval.task` |

Values C, P, I and N are 1, 1/2, 0 and 0; yes and no are 1 and 0; numbers are themselves.
Samples that ended with an `error` or at a `limit`, and those that were invalidated, are left out. A `.json` is read
whole. Archives packed by zstandard need pyarrow to unpack.
"""

from __future__ import annotations

import json
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from evenodds_service.commands.formats.chat import text_of
from evenodds_service.commands.formats.files import LogFile, Row
from evenodds_service.commands.formats.grouping import Grouping
from evenodds_service.commands.formats.outcomes import (
    Group,
    LogRefused,
    Tally,
    Wishes,
    chosen_reward,
    number_of,
    scaled,
)

NAME = "inspect-ai"
_VALUES = {"C": 1.0, "P": 0.5, "I": 0.0, "N": 0.0, "yes": 1.0, "no": 0.0}
_ZSTANDARD = 93
_LOCAL_HEADER = struct.Struct("<26xHH")
"""Of a file in an archive: lengths of its name and its extra field, after which its content begins."""


def files_of(folder: Path) -> list[Path]:
    """Logs of one model, say of several tasks."""
    return sorted(folder.glob("*.eval"))


class Reader:
    def __init__(self, wishes: Wishes, tally: Tally) -> None:
        self._wishes, self._tally = wishes, tally

    def read(self, file: LogFile) -> Iterator[Group]:
        """Raises LogRefused."""
        grouping = Grouping(self._tally)
        task: str | None = None
        for content in _contents(file):
            if "samples" not in content and "epoch" not in content:
                task = (content.get("eval") or {}).get("task")
                continue
            place = f"{file.name} sample {content.get('id')}, epoch {content.get('epoch')}"
            if content.get("invalidation"):
                self._tally.leave_out("samples that were invalidated", place)
            elif content.get("error"):
                self._tally.leave_out("samples that ended with an error", place)
            elif content.get("limit"):
                self._tally.leave_out("samples that ended at a limit", place)
            elif content.get("id") is None:
                self._tally.leave_out("samples without an id", place)
            else:
                prompt_id = f"{task}/{content['id']}" if task else str(content["id"])
                text = text_of(content.get("input"))
                about = Group(
                    self._wishes.step,
                    (),
                    prompt_id=prompt_id,
                    text=text,
                    category=task,
                    place=place,
                    answer=content.get("target"),
                )
                grouping.add(content["id"], self._reward(content, place), about)
        yield from grouping.groups()

    def _reward(self, sample: Row, place: str) -> float | None:
        scores = sample.get("scores") or {}
        if not scores:
            return None
        value = (scores[chosen_reward(list(scores), self._wishes, place)] or {}).get("value")
        number = _VALUES.get(value) if isinstance(value, str) else None
        number = number_of(value) if number is None else number
        return None if number is None else scaled(number, self._wishes, place, others=list(scores))


def _contents(file: LogFile) -> Iterator[Row]:
    """The header, then each sample."""
    try:
        if file.path.suffix == ".json":
            log = json.loads(file.path.read_text(encoding="utf-8"))
            yield {"eval": log.get("eval")}
            yield from log.get("samples") or ()
            return
        with zipfile.ZipFile(file.path) as archive, file.path.open("rb") as raw:
            names = {member.filename: member for member in archive.infolist()}
            header = names.get("header.json") or names.get("_journal/start.json")
            if header is not None:
                yield json.loads(_member(archive, raw, header, file))
            for name, member in names.items():
                is_whole = name.startswith("samples/") and name.count("/") == 1
                if is_whole or (name.startswith("samples/") and name.endswith("/sample.json")):
                    file.position = member.header_offset
                    yield json.loads(_member(archive, raw, member, file))
    except (OSError, zipfile.BadZipFile, ValueError, zlib.error, AttributeError) as error:
        raise LogRefused(
            f"{file.name}: it cannot be read as a log of inspect-ai ({' '.join(str(error).split())[:200]})"
        ) from error


def _member(archive: zipfile.ZipFile, raw: Any, member: zipfile.ZipInfo, file: LogFile) -> bytes:
    """A file of the archive, unpacked; the standard library knows zstandard from Python 3.14 on only."""
    if member.compress_type != _ZSTANDARD:
        return archive.read(member)
    try:
        import pyarrow
    except ModuleNotFoundError as error:
        raise LogRefused(
            f"{file.name}: it is packed by zstandard, which needs pyarrow: pip install 'evenodds[parquet]', or convert "
            "it by `inspect log convert --to json`"
        ) from error
    raw.seek(member.header_offset)
    name_length, extra_length = _LOCAL_HEADER.unpack(raw.read(_LOCAL_HEADER.size))
    raw.seek(name_length + extra_length, 1)
    with pyarrow.CompressedInputStream(pyarrow.BufferReader(raw.read(member.compress_size)), "zstd") as stream:
        return bytes(stream.read())
