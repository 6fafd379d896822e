"""The distribution as a user gets it: what the wheel holds and asks for, and how little the client needs."""

from __future__ import annotations

import ast
import email.message
import email.parser
import importlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import evenodds

ROOT = Path(__file__).parents[2]
CLIENT = ROOT / "client"
HEAVY = {"torch", "sqlalchemy", "numpy", "fastapi"}
LIST_MODULES = "import json, sys; print(json.dumps(sorted(sys.modules)))"


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**{k: v for k, v in os.environ.items() if k != "PYTHONPATH"}, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def python310() -> str:
    """The oldest Python that is supported, if this machine has it; else the running one."""
    versions = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    found = [*sorted(versions.glob("3.10*/bin/python3.10")), shutil.which("python3.10")]
    for candidate in (str(path) for path in found if path):
        if subprocess.run([candidate, "--version"], capture_output=True, check=False).returncode == 0:
            return candidate
    return sys.executable


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, cwd=ROOT)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", folder, cwd=ROOT)
    (built,) = folder.glob("*.tar.gz")
    return built


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> email.message.Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return email.parser.Parser().parsestr(archive.read(name).decode())


def test_the_wheel_holds_client_service_and_migrations_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}

    assert {name.split("/")[0] for name in names} == {"evenodds", "evenodds_service"}
    assert {"evenodds/py.typed", "evenodds/schemas/__init__.py", "evenodds_service/__main__.py"} <= names
    assert "evenodds_service/migrations/env.py" in names
    assert any(name.startswith("evenodds_service/migrations/versions/") for name in names)
    assert not [name for name in names if "tests" in name.split("/") or name.endswith(".pyc")]


def test_the_sdist_holds_what_the_wheel_is_built_from_and_builds_the_same_wheel(
    sdist: Path, wheel: Path, tmp_path: Path
) -> None:
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
        archive.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.iterdir()
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path / "built", cwd=unpacked)

    files = {"LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml", "PKG-INFO", ".gitignore"}
    assert {name.split("/")[0] for name in names} == {"client", "service", "migrations", *files}
    assert "migrations/env.py" in names
    assert any(name.startswith("migrations/versions/") for name in names)
    (built,) = (tmp_path / "built").glob("*.whl")
    with zipfile.ZipFile(built) as one, zipfile.ZipFile(wheel) as other:
        assert set(one.namelist()) == set(other.namelist())


def test_the_license_comes_along_and_is_named(wheel: Path, metadata: email.message.Message) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/licenses/LICENSE")]
        text = archive.read(name).decode()

    assert (metadata["License-Expression"], metadata.get_all("License-File")) == ("Apache-2.0", ["LICENSE"])
    assert "Apache License" in text
    assert "Copyright 2026 The Even Odds authors" in text


def test_the_base_install_asks_for_httpx_and_pydantic_only(metadata: email.message.Message) -> None:
    requirements = metadata.get_all("Requires-Dist", [])

    assert [line for line in requirements if "extra ==" not in line] == ["httpx>=0.27", "pydantic>=2.7"]
    assert metadata["Requires-Python"] == ">=3.10"


@pytest.mark.slow
def test_the_client_installs_from_the_wheel_and_imports_without_the_rest(wheel: Path, tmp_path: Path) -> None:
    run(python310(), "-m", "venv", "--without-pip", "venv", cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python, "--quiet", "--disable-pip-version-check")

    run(*pip, "install", "--no-compile", wheel, cwd=tmp_path)

    find = "import importlib.util, sys; print([n for n in sys.argv[1:] if importlib.util.find_spec(n)])"
    say = "import evenodds; print(evenodds.__version__, evenodds.Client().__class__.__name__)"
    version = wheel.name.split("-")[1]
    assert run(python, "-c", find, *sorted(HEAVY), cwd=tmp_path) == "[]\n"
    assert run(python, "-W", "error", "-c", say, cwd=tmp_path) == f"{version} Client\n"
    command = python.parent / "evenodds"
    assert run(command, "--help", cwd=tmp_path).startswith("usage: evenodds")
    refused = subprocess.run([command, "serve"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (refused.returncode, refused.stderr) == (
        1,
        "evenodds: uvicorn is not installed: pip install 'evenodds[service]', "
        "or in a checkout pip install '.[service]'\n",
    )


def test_importing_the_package_loads_neither_pydantic_nor_httpx() -> None:
    modules = json.loads(
        run(sys.executable, "-c", f"import evenodds; {LIST_MODULES}", cwd=ROOT, PYTHONPATH=str(CLIENT))
    )

    assert "evenodds.errors" in modules
    assert not {"pydantic", "httpx", "asyncio", "evenodds.client", "evenodds.schemas"} & set(modules)


def test_importing_all_of_the_client_loads_nothing_heavy() -> None:
    """Holds where the service is installed too."""
    every_name = f"from evenodds import *; {LIST_MODULES}"

    modules = json.loads(run(sys.executable, "-c", every_name, cwd=ROOT, PYTHONPATH=str(CLIENT)))

    assert "evenodds.client" in modules
    assert not HEAVY & set(modules)
    assert not [name for name in modules if name.startswith("evenodds_service")]


def test_a_name_is_imported_when_it_is_used_and_a_wrong_one_is_refused() -> None:
    assert evenodds.Client is importlib.import_module("evenodds.client").Client
    assert evenodds.schemas is importlib.import_module("evenodds.schemas")
    assert {"Client", "Observation", "agreement", "__version__"} <= set(dir(evenodds))
    with pytest.raises(AttributeError, match=r"^module 'evenodds' has no attribute 'Cleint'$"):
        getattr(evenodds, "Cleint")  # noqa: B009  # mypy would say so of the plain form


@pytest.mark.parametrize("path", sorted(CLIENT.rglob("*.py")), ids=lambda path: path.name)
def test_the_client_is_written_in_python_310(path: Path) -> None:
    ast.parse(path.read_text(), filename=str(path), feature_version=(3, 10))
