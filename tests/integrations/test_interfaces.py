"""The adapters fit what was read from their frameworks, and what was read is what the released packages hold."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from tests.integrations import frameworks

INTERFACES: dict[str, Any] = json.loads((Path(__file__).parent / "interfaces.json").read_text())
WHEELS = [name for name in INTERFACES if "==" in name]

FITS = [
    ("verl==0.7.1", "AbstractSampler.__init__", "verl", "EvenOddsSampler.__init__"),
    ("verl==0.7.1", "AbstractCurriculumSampler.update", "verl", "EvenOddsSampler.update"),
    ("verl==0.9.1", "PPOTrainer._init_dataloader", "verl_v1", "SelectsPrompts._init_dataloader"),
    ("verl==0.9.1", "PPOTrainer._fetch_one_gen_batch", "verl_v1", "SelectsPrompts._fetch_one_gen_batch"),
    ("verl==0.9.1", "PPOTrainer._compute_advantage", "verl_v1", "SelectsPrompts._compute_advantage"),
    *[
        ("trinity-rft==0.6.0", f"BaseSelector.{name}", "trinity", f"EvenOddsSelector.{name}")
        for name in ("__init__", "get_indices", "feedback", "state_dict", "load_state_dict")
    ],
    *[
        (repository, f"DataSource.{name}", "slime", f"EvenOddsDataSource.{name}")
        for repository in ("THUDM/slime", "radixark/miles")
        for name in ("get_samples", "save", "load")
    ],
    *[
        ("PrimeIntellect-ai/prime-rl", f"TaskSampler.{name}", "prime_rl", f"EvenOddsSampler.{name}")
        for name in ("__next__", "observe", "state_dict", "load_state_dict", "metrics")
    ],
    ("NVIDIA-NeMo/RL", "example_custom_dataloader", "nemo_rl", "SelectedDataloader.__call__"),
    ("tinker-cookbook==0.6.1", "RLDataset.get_batch", "tinker", "SelectedDataset.get_batch"),
    *[
        ("tinker-cookbook==0.6.1", f"EnvGroupBuilder.{name}", "tinker", f"ReportingBuilder.{name}")
        for name in ("make_envs", "compute_group_rewards", "cleanup", "logging_tags")
    ],
    *[
        ("skyrl==0.3.0", f"RayPPOTrainer.{name}", "skyrl", f"SelectsPrompts.{name}")
        for name in (
            "_build_train_dataloader_and_compute_training_steps",
            "handle_dynamic_sampling",
            "postprocess_generator_output",
        )
    ],
]
STANDINS = {
    **frameworks.VERL_071,
    **frameworks.verl_091(frameworks.TransferQueue()),
    **frameworks.SLIME,
    **frameworks.prime_rl(),
    **frameworks.trinity(frameworks.Registry()),
    **frameworks.TINKER,
    **frameworks.TORCHDATA,
}


def parameters(source: str) -> dict[str, list[str]]:
    """The parameters of every function and method of a module, with `*` or `**` before those that take many."""
    found: dict[str, list[str]] = {}

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef):
                visit(child, f"{prefix}{child.name}.")
            elif isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                given = child.args
                names = [argument.arg for argument in (*given.posonlyargs, *given.args)]
                names += [f"*{given.vararg.arg}"] if given.vararg else []
                names += [argument.arg for argument in given.kwonlyargs]
                names += [f"**{given.kwarg.arg}"] if given.kwarg else []
                found[prefix + child.name] = names

    visit(ast.parse(source), "")
    return found


def recorded(framework: str, name: str) -> list[str]:
    (names,) = [functions[name] for functions in INTERFACES[framework]["files"].values() if name in functions]
    return list(names)


@pytest.mark.parametrize(("framework", "theirs", "module", "ours"), FITS)
def test_a_method_takes_what_its_framework_gives(framework: str, theirs: str, module: str, ours: str) -> None:
    name = f"evenodds.integrations.{module}"
    with frameworks.installed(STANDINS, name):
        member: Any = importlib.import_module(name)
        for part in ours.split("."):
            member = getattr(member, part)

        wanted = [given.strip("*") for given in recorded(framework, theirs) if given not in ("self", "**kwargs")]
        taken = [given for given in inspect.signature(member).parameters if given not in ("self", "records")]

    assert taken == wanted


def test_every_source_is_named_with_its_release_or_commit() -> None:
    for name, interface in INTERFACES.items():
        source = interface["source"]
        assert source == f"wheel {name}" or len(source.removeprefix(f"https://github.com/{name} at ")) == 40


@pytest.mark.slow
@pytest.mark.parametrize("requirement", WHEELS)
def test_the_released_package_is_as_recorded(requirement: str, tmp_path: Path) -> None:
    """Needs the package registry; the wheel is read, not installed."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    subprocess.run([*pip, "--dest", str(tmp_path), requirement], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        for path, functions in INTERFACES[requirement]["files"].items():
            found = parameters(archive.read(path).decode())

            assert {name: found.get(name) for name in functions} == functions
