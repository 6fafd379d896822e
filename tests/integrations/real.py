"""Frameworks as the package registry has them, in environments of their own beside this one."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path


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
