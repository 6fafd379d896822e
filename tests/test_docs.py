"""What docs/ says is so: every block runs, every link leads somewhere, and what is named exists.

Blocks of a page run from top to bottom in one folder against a service of their own: `sh` in bash, `python` in this
process with the page's names so far. Blocks that cannot run here (another machine's tools, commands that never end)
are `text`.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import pytest

from evenodds.client import API_KEY_VARIABLE
from evenodds.schemas import OLDER_NAMES, RunUpdate
from evenodds_service import errors
from evenodds_service.__main__ import parser
from evenodds_service.api.problems import HTTP_CODES, STATUS_OF
from evenodds_service.api.run_metrics import GAUGES
from evenodds_service.commands.alert_rules import SERVICE_RULES
from evenodds_service.domain.report.alarms import KINDS
from evenodds_service.errors import ServiceError
from evenodds_service.settings import Settings

if TYPE_CHECKING:
    from tests.conftest import Service

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
LINKED = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "benchmarks" / "README.md",
    *PAGES,
]
ALL = "\n".join(page.read_text() for page in PAGES)
ADDRESS = "http://127.0.0.1:8000"
OPERATIONS = json.loads((ROOT / "openapi.json").read_text())["paths"]
OPEN_PAGES = {"/", "/docs", "/openapi.json"}
"""Served, and no part of the described interface."""

WITH_A_WORKER = "learning.md"
STARTS_MANY_PROCESSES = {"operations.md", "import.md"}

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=pytest.mark.slow) if page.name in STARTS_MANY_PROCESSES else page
        for page in PAGES
        if page.name != WITH_A_WORKER
    ],
    ids=name_of,
)
def test_the_blocks_of_a_page_run_from_top_to_bottom(
    page: Path, service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_blocks(page, service, tmp_path, monkeypatch)


def test_the_blocks_run_of_a_page_that_needs_a_worker(
    start_service: Callable[..., Service], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over a database of its own, whose worker has nothing else to do."""
    service = start_service(f"sqlite:///{tmp_path}/evenodds.db")

    run_blocks(DOCS / WITH_A_WORKER, service, tmp_path, monkeypatch)


def run_blocks(page: Path, service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EVENODDS_DATABASE_URL", service.database_url)
    commands = tmp_path / "commands"
    commands.mkdir()
    (commands / "evenodds").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m evenodds_service "$@"\n')
    (commands / "evenodds").chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}{os.pathsep}{os.environ['PATH']}")
    names: dict[str, Any] = {"__name__": page.stem}
    text = page.read_text()

    for block in BLOCK.finditer(text):
        language, content = block[1], block[2].replace(ADDRESS, service.base_url)
        if language == "sh":
            content = content.replace("curl ", "curl --silent --show-error --fail-with-body ")
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", content], capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, f"{block[2]}\n{done.stdout}{done.stderr}"
        elif language == "python":
            line = text[: block.start()].count("\n") + 1
            exec(compile("\n" * line + content, str(page), "exec"), names)  # faults name the page's own line


def test_every_block_says_whether_it_runs() -> None:
    languages = {page.name: {block[1] for block in BLOCK.finditer(page.read_text())} for page in PAGES}

    assert {language for found in languages.values() for language in found} == {"sh", "python", "text"}, languages


@pytest.mark.parametrize("page", LINKED, ids=name_of)
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", BLOCK.sub("", page.read_text())):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        found = (page.parent / file).resolve() if file else page
        assert found.exists(), target
        if anchor:
            assert anchor in anchors(found), target


def anchors(page: Path) -> set[str]:
    """Of the page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", BLOCK.sub("", page.read_text()), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def rows(page: str, heading: str) -> dict[str, list[str]]:
    """Rows of the first table below a heading by what their first cell holds in backticks; the other cells."""
    text = (DOCS / page).read_text().partition(f"# {heading}\n")[2]
    assert text, f"{page} has no heading {heading!r}"
    found: dict[str, list[str]] = {}
    for line in re.search(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)[0].splitlines()[2:]:  # type: ignore[index]  # there is one
        first, *others = [cell.strip() for cell in line.strip("|").split(" | ")]
        found |= dict.fromkeys(re.findall(r"`([^`]+)`", first), others)
    return found


def test_every_setting_is_documented_with_its_default_and_no_other_is_named() -> None:
    documented = rows("operations.md", "Settings")
    fields = {f"EVENODDS_{name.upper()}": field for name, field in Settings.model_fields.items()}

    assert set(documented) == set(fields)
    for name, field in fields.items():
        if field.default is not None:
            default = str(field.default).lower() if isinstance(field.default, bool) else str(field.default)
            assert documented[name][0] == default.removesuffix(".0"), name
    compose = set(re.findall(r"EVENODDS_\w+", (ROOT / "docker-compose.yml").read_text()))  # it has some of its own
    proxy = set(re.findall(r"EVENODDS_\w+", (ROOT / "examples/litellm/config.yaml").read_text()))
    shim = set(re.findall(r"EVENODDS_\w+", (ROOT / "examples/http_shim/shim.py").read_text()))
    known = set(fields) | compose | proxy | shim | {API_KEY_VARIABLE}
    assert set(fields) <= set(re.findall(r"EVENODDS_[A-Z_]*[A-Z]", ALL)) <= known


def test_every_setting_of_a_run_is_documented() -> None:
    assert set(rows("concepts.md", "Settings of a run")) == RunUpdate.model_fields.keys() - OLDER_NAMES.keys()


def test_every_alarm_and_alert_is_documented() -> None:
    assert set(rows("operations.md", "Alarms of a run")) == set(KINDS)
    assert set(rows("operations.md", "Alerts of the service")) == {rule.alert for rule in SERVICE_RULES}


def test_every_metric_of_a_run_is_documented_and_no_other_is_named() -> None:
    of_requests = {"evenodds_requests_total", "evenodds_request_seconds"}

    assert set(rows("operations.md", "What to watch")) == set(GAUGES) | of_requests
    assert set(re.findall(r"\bevenodds_[a-z_]+[a-z]", ALL)) <= set(GAUGES) | of_requests | {
        "evenodds_service",
        "evenodds_hook",
    }


def test_every_command_that_is_named_exists() -> None:
    (subcommands,) = (action for action in parser()._actions if hasattr(action, "choices") and action.choices)
    known = set(subcommands.choices or ())
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))

    named = set(re.findall(r"(?:^|`)(?:EVENODDS_\w+=\S+ )?evenodds ([a-z-]+)", ALL, flags=re.MULTILINE))
    made = set(re.findall(r"(?:^|`)make ([a-z-]+)", ALL, flags=re.MULTILINE))

    assert {"serve", "work", "keys", "migrate", "import", "replay"} <= named <= known
    assert made <= targets


def test_every_command_line_that_is_shown_is_one_that_the_parser_takes() -> None:
    lines = {line for page in [*LINKED, ROOT / "SECURITY.md"] for line in command_lines(page.read_text())}

    assert len(lines) > 25
    for line in sorted(lines - {"evenodds replay --help"}):
        words = shlex.split(line.partition(" &")[0], comments=True)
        try:
            parser().parse_args(words[1:])
        except SystemExit:
            pytest.fail(line)


def command_lines(text: str) -> Iterator[str]:
    """Of `evenodds`, in blocks, and with an argument in sentences, where the name alone stands for the command."""
    for block in BLOCK.finditer(text):
        if block[1] in ("sh", "text"):
            yield from re.findall(r"^(?:EVENODDS_\w+=\S+ |\$ )*(evenodds [a-z].*)$", block[2], flags=re.MULTILINE)
    for line in re.findall(r"`(evenodds [a-z-]+ [^`]+)`", BLOCK.sub("", text)):
        if not re.fullmatch(r"evenodds keys \w+", line):
            yield line


def test_every_operation_that_is_named_exists() -> None:
    existing = {f"{method.upper()} {path}" for path, methods in OPERATIONS.items() for method in methods}
    named = {
        f"{method} {re.sub('[?].*', '', path)}"
        for method, path in re.findall(r"\b(GET|POST|PUT|DELETE) (/[\w./{}?=-]*)", ALL)
    }
    paths = (
        set(re.findall(r"`(/[\w/{}-]+)`", ALL)) - OPEN_PAGES - {"/v1", "/data", "/evenodds"}
    )  # prefixes, and a folder

    assert named <= existing
    assert paths <= set(OPERATIONS)


def test_the_table_of_operations_is_that_of_the_description() -> None:
    table = (DOCS / "api.md").read_text().partition("<!-- operations -->\n")[2].partition("<!-- end -->")[0]

    assert table == "".join(operations_table()), "docs/api.md: put what this test expects between its two marks"


def operations_table() -> Iterator[str]:
    yield "| operation | what it does | scope |\n|---|---|---|\n"
    for path, methods in sorted(OPERATIONS.items()):
        for method, operation in sorted(methods.items()):
            yield f"| `{method.upper()} {path}` | {operation['summary']} | {scope(method.upper(), path)} |\n"


def scope(method: str, path: str) -> str:
    from evenodds_service.api.middleware.access import _OPEN_PATHS, scope_of

    return "" if path in _OPEN_PATHS else scope_of(method, path)


def test_every_error_that_a_caller_can_meet_is_documented_with_its_status_and_no_other_is() -> None:
    documented = rows("api.md", "Errors")
    sent = {(code, str(status)) for code, status in [*STATUS_OF.items(), *((c, s) for s, c in HTTP_CODES.items())]}

    assert set(documented) == {code for code, _ in sent}
    assert [(code, status) for code, status in sorted(sent) if status not in documented[code][0].split(", ")] == []


def test_every_message_that_the_questions_explain_is_one_that_the_code_has() -> None:
    """`...` stands for what is filled in; the rest stands in a string of the sources."""
    table = re.findall(r"^\| `(.+?)` \|", (DOCS / "faq.md").read_text(), flags=re.MULTILINE)
    said = [text for folder in ("client", "service") for text in texts_of(ROOT / folder)]

    assert len(table) > 30
    for message in table:
        pieces = [piece.strip() for piece in message.split("...")]
        pattern = re.compile(".*".join(map(re.escape, pieces)), flags=re.DOTALL)
        assert any(pattern.search(text) for text in said), message


def texts_of(folder: Path) -> Iterator[str]:
    """Every string of the modules below; what an f-string fills in is a blank."""
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                yield "".join(str(part.value) if isinstance(part, ast.Constant) else " " for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_the_tree_of_errors_is_the_one_that_its_module_prints() -> None:
    def below(kind: type[ServiceError]) -> Iterator[type[ServiceError]]:
        yield kind
        for child in kind.__subclasses__():
            yield from below(child)

    printed = re.findall(r"^    [│├└─ ]*(\w+) +([a-z_]+)(?:  |$)", errors.__doc__ or "", flags=re.MULTILINE)

    assert sorted(printed) == sorted((kind.__name__, kind.code) for kind in below(ServiceError))
    assert set(STATUS_OF) <= {code for _, code in printed}
    assert all(kind.__doc__ for kind in below(ServiceError))


def test_every_error_of_the_client_is_documented() -> None:
    import evenodds

    errors = {
        name
        for name in evenodds.__all__
        if isinstance(found := getattr(evenodds, name), type) and issubclass(found, Exception)
    }

    assert {name for name in errors if f"`{name}`" not in ALL} == set()


@pytest.mark.parametrize("picture", sorted(DOCS.glob("*.svg")), ids=name_of)
def test_a_picture_has_words_for_those_who_cannot_see_it_and_loads_nothing(picture: Path) -> None:
    drawing = ElementTree.parse(picture).getroot()
    names = {element.tag.rpartition("}")[2] for element in drawing.iter()}

    assert {"title", "desc"} <= names
    assert not names & {"script", "image", "foreignObject"}
    assert "prefers-color-scheme: dark" in picture.read_text()
    assert not re.search(r"(?:href|src)=|url\((?!#)", picture.read_text())
    assert picture.name in ALL
