"""The release of this distribution, as its metadata states it (written once, in pyproject.toml)."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("evenodds")
except PackageNotFoundError:  # imported from a source tree that is not installed
    __version__ = "0+source"
