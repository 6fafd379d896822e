"""Every command and program of the README runs, and every setting and endpoint that it names exists."""

from __future__ import annotations

import asyncio
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tests.waiting import PATIENCE_SECONDS

from evenodds import Client, GatewayBudget
from evenodds.client import API_KEY_VARIABLE
from evenodds_service.__main__ import parser
from evenodds_service.settings import Settings

if TYPE_CHECKING:
    from tests.conftest import Service

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
ADDRESS = "http://127.0.0.1:8000"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_each_command_of_an_operator_is_one_that_the_parser_takes() -> None:
    (block,) = blocks("text")
    commands = [shlex.split(line, comments=True) for line in block.splitlines()]
    ours = [words[1:] for words in commands if words[0] == "evenodds"]

    assert len(ours) == 3
    for words in ours:
        parser().parse_args(words)  # ends the process where it does not know an argument


def test_the_trainers_loop_runs_and_learns(service: Service, tmp_path: Path) -> None:
    program, _ = blocks("python")
    settings = 'run_settings={"group_size": 8}'
    assert settings in program
    patient = (
        f"{settings}, deadline_seconds={PATIENCE_SECONDS}"  # a busy machine has a batch later than a trainer waits
    )
    file = tmp_path / "loop.py"
    file.write_text(program.replace(ADDRESS, service.base_url).replace(settings, patient))

    loop = subprocess.run([sys.executable, str(file)], capture_output=True, text=True, check=False, cwd=tmp_path)

    assert loop.returncode == 0, loop.stderr
    assert len(re.findall(r"informative \S+, chosen by service", loop.stdout)) == 20, loop.stdout
    with Client(service.base_url) as client:
        assert client.run("sums").observations == 20 * 32


def test_the_gateways_function_answers_and_reports(service: Service) -> None:
    _, program = blocks("python")
    efforts: list[str | None] = []

    async def generate(text: str, effort: str | None) -> str:
        efforts.append(effort)
        return "7"

    names = {"generate": generate, "verify": lambda text, reply: float(reply == "7"), "MODEL_VERSION": 3}
    exec(program, names)  # the README's own function

    async def answer() -> object:
        async with GatewayBudget(service.base_url, run="readme-served", deadline_ms=10_000) as budgets:
            return await names["answer"](budgets, "What is 3 + 4?")  # type: ignore[operator]  # the README defines it

    with Client(service.base_url) as client:
        client.put_run("readme-served")
        assert asyncio.run(answer()) == "7"
        run = client.run("readme-served")

    assert efforts != [None]
    assert (run.observations, run.head_step) == (1, 3)


def test_it_is_short() -> None:
    """With its code and tables."""
    assert len(README.split()) < 950


def test_the_two_commands_are_targets_of_the_makefile() -> None:
    commands = re.findall(r"^make (\S+)", blocks("sh")[0], flags=re.MULTILINE)

    assert commands == ["serve", "test"]
    makefile = (ROOT / "Makefile").read_text()
    assert all(re.search(rf"^{command}:", makefile, flags=re.MULTILINE) for command in commands)


def test_every_setting_that_it_names_exists() -> None:
    named = set(re.findall(r"EVENODDS_[A-Z_]+", README)) - {API_KEY_VARIABLE}

    assert named <= {f"EVENODDS_{name.upper()}" for name in Settings.model_fields}
