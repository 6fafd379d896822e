"""The page that a newcomer reads first, against the code: its tree exists, and its journeys are calls."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/architecture.md").read_text()
STEP = re.compile(r"^- `(?P<path>[\w/]+\.py):(?P<name>\w+)`", flags=re.MULTILINE)


def journeys() -> dict[str, list[tuple[str, str]]]:
    """Steps (path, function) by the name of the journey."""
    told = PAGE.partition("<!-- journeys -->")[2].partition("<!-- end -->")[0]
    parts = re.split(r"^\*\*(\w+)\*\*", told, flags=re.MULTILINE)[1:]
    return {name: STEP.findall(text) for name, text in zip(parts[::2], parts[1::2], strict=True)}


JOURNEYS = journeys()


def functions(path: str) -> dict[str, str]:
    """The source of every function and method of a module, several of one name together."""
    source = (ROOT / path).read_text()
    found: dict[str, str] = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found[node.name] = found.get(node.name, "") + (ast.get_source_segment(source, node) or "")
    return found


def reached(path: str, name: str) -> str:
    """The source of a function, and of those of its module that it names, and so on.

    With `__init__`, which hands methods of an object to what calls them.
    """
    among = functions(path)
    todo = [each for each in (name, "__init__") if each in among]
    seen = set(todo)
    while todo:
        for other in set(re.findall(r"\w+", among[todo.pop()])) & set(among) - seen:
            seen.add(other)
            todo.append(other)
    return "\n".join(among[each] for each in seen)


def test_there_are_the_five_journeys() -> None:
    assert set(JOURNEYS) == {"Observe", "Predict", "Select", "Refit", "Budget"}
    assert all(len(steps) >= 4 for steps in JOURNEYS.values())


@pytest.mark.parametrize("journey", JOURNEYS)
def test_every_step_of_a_journey_is_a_function_that_an_earlier_one_calls(journey: str) -> None:
    before = ""
    for path, name in JOURNEYS[journey]:
        assert name in functions(path), f"{path} has no function {name}"
        assert not before or re.search(rf"\b{name}\(|\b{name}, |\b{name}\)", before), f"nothing before calls {name}"
        before += reached(path, name)


def test_the_tree_names_what_there_is() -> None:
    tree = PAGE.partition("```\n")[2].partition("```")[0]
    folders: list[str] = []
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        named = re.split(r"\s{3,}", line.strip(), maxsplit=1)[0].split()
        folders = folders[:depth]
        for name in named:
            assert (ROOT / "/".join(folders) / name).exists(), f"{'/'.join([*folders, name])} does not exist"
        if named and named[0].endswith("/") and len(named) == 1:
            folders.append(named[0].strip("/"))
