"""Fails a test run that leaves files in the working folder: tests write into their temporary folders only.

Hooks of pytest, for a `conftest.py` to import. Caches of tools are no such files. Needs no git.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

IGNORED = frozenset(
    {
        *(".git", ".venv", ".venv-audit"),
        *("__pycache__", ".hypothesis", ".import_linter_cache", ".mypy_cache", ".pytest_cache", ".ruff_cache"),
    }
)
"""Folders by name, wherever they are."""

_BEFORE = pytest.StashKey[frozenset[str]]()
_LEFT = pytest.StashKey[list[str]]()


def pytest_sessionstart(session: pytest.Session) -> None:
    if not hasattr(session.config, "workerinput"):  # the process that starts the others looks for all of them
        session.config.stash[_BEFORE] = _paths(session.config.rootpath)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    before = session.config.stash.get(_BEFORE, None)
    if before is None:
        return
    left = session.config.stash[_LEFT] = sorted(_paths(session.config.rootpath) - before)
    if left and exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    left = config.stash.get(_LEFT, [])
    if left:
        terminalreporter.section("files left in the working folder", red=True)
        terminalreporter.line(f"{', '.join(left[:20])}: tests write into their temporary folders only (tmp_path)")


def _paths(folder: Path) -> frozenset[str]:
    found: set[str] = set()
    for base, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in IGNORED]
        found.update(os.path.relpath(os.path.join(base, name), folder) for name in (*folders, *files))
    return frozenset(found)
