"""The offline check of dependencies finds what is not pinned, or pinned to another version."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import pytest
from tests.ci_scripts import loaded


@pytest.fixture
def pins() -> Any:
    return loaded("pins")


def test_what_packages_require_themselves_has_to_be_pinned_too(pins: Any) -> None:
    found = pins.brought_by(["httpx>=0.27"])

    assert {"httpx", "httpcore", "h11", "idna", "certifi"} <= found.keys()
    assert "h2" not in found  # of an extra that nobody asked for
    assert list(pins.faults_of(found, {name: installed for name, installed in found.items() if name != "h11"})) == [
        f"h11 is not pinned: add h11=={version('h11')}"
    ]


def test_extras_and_other_platforms_count_as_asked(pins: Any) -> None:
    assert "psycopg-binary" in pins.brought_by(["psycopg[binary]>=3"])
    assert pins.brought_by(["httpx; sys_platform == 'amiga'"]) == {}


def test_other_versions_and_missing_packages_are_named(pins: Any) -> None:
    pinned = pins.pinned("# said so\nH11==0.1\nTorch==2.1\n")

    assert list(pins.faults_of({"h11": "0.16.0", "torch": "2.1+cpu", "nobody": None}, pinned)) == [
        "h11 is pinned to 0.1, installed is 0.16.0: run `make setup`",
        "nobody is required, but not installed: run `make setup`",
    ]
