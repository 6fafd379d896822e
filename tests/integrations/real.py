"""Frameworks as the package registry has them, in environments of their own beside this one."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def python_with(folder: Path, *requirements: str) -> str:
    """A Python that sees these packages, and all that is installed here. Their dependencies are named by hand."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = folder / "bin" / "python"
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "zz_beside.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    for sources in Path(sysconfig.get_paths()["purelib"]).glob("_evenodds.pth"):
        (site / sources.name).write_text(sources.read_text())
    subprocess.run(
        [str(python), "-m", "pip", "install", "--quiet", "--no-deps", *requirements], check=True, capture_output=True
    )
    return str(python)


def groups_made(command: Sequence[str], folder: Path, environment: dict[str, str]) -> list[Any]:
    """The lines that this program adds to groups.jsonl in the folder, one for each group. It has to end well."""
    groups = folder / "groups.jsonl"
    n_before = len(groups.read_text().splitlines()) if groups.exists() else 0
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3_000:]
    return [json.loads(line) for line in groups.read_text().splitlines()[n_before:]]
