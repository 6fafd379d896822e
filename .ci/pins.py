"""Whether constraints.txt pins what an install with all extras brings: each package, at the version installed here.

Knows nothing of vulnerabilities: those are listed on the internet only (`make audit`).
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import tomllib
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]


def main() -> int:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    found = brought_by(asked)
    found.pop(canonicalize_name(project["name"]), None)  # an extra may bring another one of the project's own
    faults = sorted(faults_of(found, pinned((ROOT / "constraints.txt").read_text())))
    for fault in faults:
        sys.stderr.write(f"constraints.txt: {fault}\n")
    return 1 if faults else 0


def pinned(text: str) -> dict[str, str]:
    """Version by package."""
    lines = [line.partition("#")[0].strip() for line in text.splitlines()]
    parts = [line.partition("==") for line in lines if line]
    return {canonicalize_name(name): version for name, _, version in parts}


def brought_by(lines: Iterable[str]) -> dict[str, str | None]:
    """Installed version, by package, of these requirements and of all that they require. None: not installed."""
    found: dict[str, str | None] = {}
    seen: set[tuple[str, str]] = set()
    waiting = [(Requirement(line), "") for line in lines]
    while waiting:
        requirement, of_extra = waiting.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": of_extra}):
            continue
        name = canonicalize_name(requirement.name)
        new = {(name, extra) for extra in ("", *requirement.extras)} - seen
        seen |= new
        try:
            installed = distribution(name)
        except PackageNotFoundError:
            found[name] = None
            continue
        found[name] = installed.version
        waiting += [(Requirement(line), extra) for _, extra in new for line in installed.requires or ()]
    return found


def faults_of(found: dict[str, str | None], pins: dict[str, str]) -> Iterator[str]:
    for name, version in found.items():
        if version is None:
            yield f"{name} is required, but not installed: run `make setup`"
        elif name not in pins:
            yield f"{name} is not pinned: add {name}=={version}"
        elif pins[name] != version.partition("+")[0]:  # a build's own mark, as in 2.13.0+cpu, is no version
            yield f"{name} is pinned to {pins[name]}, installed is {version}: run `make setup`"


if __name__ == "__main__":
    sys.exit(main())
