"""The scripts of `.ci`, which is no package, as modules."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType


def loaded(name: str) -> ModuleType:
    """`.ci/<name>.py`."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[1] / ".ci" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
