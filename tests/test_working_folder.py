"""A run of tests that leaves a file in the working folder fails and names the file."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests import working_folder


@pytest.mark.parametrize(("written", "status"), [(".evenodds/left.outbox", 1), ("__pycache__/left.pyc", 0)])
def test_a_run_fails_if_it_leaves_more_than_caches(tmp_path: Path, written: str, status: int) -> None:
    shutil.copy(working_folder.__file__, tmp_path / "conftest.py")
    (tmp_path / "test_one.py").write_text(
        "from pathlib import Path\n"
        "def test_one():\n"
        f"    Path({written!r}).parent.mkdir(exist_ok=True)\n"
        f"    Path({written!r}).touch()\n"
    )

    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--rootdir", str(tmp_path), str(tmp_path)],
        cwd=tmp_path,
        env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == status, done.stdout
    assert "1 passed" in done.stdout
    assert (f".evenodds, {written}: tests write into their temporary folders only" in done.stdout) == (status == 1)
