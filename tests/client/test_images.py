"""The container files: what they start, in which order, and that they say what the package says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]


@pytest.fixture
def services() -> dict[str, Any]:
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    return dict(compose["services"])


@pytest.fixture
def instructions() -> list[tuple[str, str]]:
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in lines)]


def test_compose_starts_database_migration_api_and_worker(services: dict[str, Any]) -> None:
    commands = {name: service.get("command") for name, service in services.items()}

    assert commands == {
        "postgres": None,
        "migrate": ["evenodds", "migrate"],
        "api": ["evenodds", "serve"],
        "worker": ["evenodds", "work"],
    }


def test_api_and_worker_wait_for_the_migration_and_it_for_the_database(services: dict[str, Any]) -> None:
    waits = {name: service.get("depends_on") for name, service in services.items()}

    assert waits == {
        "postgres": None,
        "migrate": {"postgres": {"condition": "service_healthy"}},
        "api": {"migrate": {"condition": "service_completed_successfully"}},
        "worker": {"migrate": {"condition": "service_completed_successfully"}},
    }
    assert "pg_isready" in services["postgres"]["healthcheck"]["test"]


def test_all_parts_use_the_database_that_compose_starts(services: dict[str, Any]) -> None:
    database = services["postgres"]["environment"]
    user, password, name = (database[f"POSTGRES_{part}"] for part in ("USER", "PASSWORD", "DB"))
    url = f"postgresql+psycopg://{user}:{password}@postgres:5432/{name}"

    ours = [services[part] for part in ("migrate", "api", "worker")]
    assert [part["environment"]["EVENODDS_DATABASE_URL"] for part in ours] == [url] * 3
    assert [part["build"] for part in ours] == ["."] * 3


def test_an_api_without_keys_is_published_on_this_machine_only(services: dict[str, Any]) -> None:
    assert services["api"]["ports"] == ["127.0.0.1:8000:8000"]
    assert [name for name, service in services.items() if "ports" in service] == ["api"]


def test_the_database_outlives_its_container(services: dict[str, Any]) -> None:
    assert services["postgres"]["volumes"] == ["database:/var/lib/postgresql/data"]


def test_the_image_serves_as_an_ordinary_user(instructions: list[tuple[str, str]]) -> None:
    last = dict(instructions)

    assert last["USER"] == "evenodds"
    assert last["CMD"] == '["evenodds", "serve"]'
    assert last["ENV"] == "EVENODDS_HOST=0.0.0.0"
    assert last["EXPOSE"] == "8000"
    assert "/readyz" in last["HEALTHCHECK"]


def test_the_image_is_given_what_it_copies_and_no_more(instructions: list[tuple[str, str]]) -> None:
    copied = {source for word, rest in instructions if word == "COPY" for source in rest.split()[:-1]}
    ignore = (ROOT / ".dockerignore").read_text().splitlines()

    assert copied == {line.removeprefix("!") for line in ignore if line.startswith("!")}
    assert all((ROOT / source).exists() for source in copied)


def test_the_image_installs_what_was_tested(instructions: list[tuple[str, str]]) -> None:
    installs = [rest for word, rest in instructions if word == "RUN" and "pip install" in rest]

    assert installs == ["pip install --no-cache-dir --constraint constraints.txt '.[service]'"]


def test_constraints_name_one_version_of_each_package_and_no_place_to_get_it() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]

    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9a-z.]*", line) for line in lines)
    assert "torch==2.13.0" in lines
