"""Take the Dockerfile's own steps in clean root file systems, start what they give, measure size and cold start.

    sudo .venv/bin/python benchmarks/image.py

No container engine is needed: root, Linux and `debootstrap` are (Debian: apt-get install debootstrap). Every stage
becomes a folder, RUN a command under chroot, and FROM python:X-slim a fresh Debian 12 with its Python 3.11. A mirror of
packages is named as to pip: PIP_* variables and /etc/pip.conf hold inside; `--bind` shows local folders to it.

Prints what the thin client, the API and the worker add to an image with Python, and per start the seconds from exec
to the first 200 of /readyz, with the image's files dropped from the page cache before (cold) and not (warm). The
service runs as the image's user, which is checked, on an empty SQLite file that it migrates on the way.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_PACKAGES = "ca-certificates,python3,python3-pip,python3-venv"
_SHOWN_TO_PIP = ("/etc/pip.conf", "/etc/ssl/certs/ca-certificates.crt")
_GIVE_UP_SECONDS = 120.0


@dataclass
class Image:
    """A built stage: a root file system, and how a process starts in it."""

    folder: Path
    environment: dict[str, str] = field(
        default_factory=lambda: {"PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"}
    )
    folder_inside: str = "/"
    user: str = "0:0"
    command: Sequence[str] = ()
    healthcheck: Sequence[str] = ()

    def copy(self, folder: Path) -> Image:
        """The same in a folder of its own."""
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run(["cp", "--archive", "--reflink=auto", str(self.folder), str(folder)], check=True)
        return Image(folder, dict(self.environment), self.folder_inside, self.user, self.command, self.healthcheck)

    def arguments(
        self, command: Sequence[str], *, environment: Mapping[str, str] | None = None, bind: Sequence[str] = ()
    ) -> list[str]:
        """A command line that runs `command` inside. Its mounts go when it ends: they are in a namespace of its own."""
        mounts = [f"mount -t proc proc {shlex.quote(str(self.folder / 'proc'))}"]
        for path in bind:
            inside = self.folder / path.lstrip("/")
            if Path(path).is_dir():
                inside.mkdir(parents=True, exist_ok=True)
            else:
                inside.parent.mkdir(parents=True, exist_ok=True)
                inside.touch()
            mounts.append(f"mount --bind {shlex.quote(path)} {shlex.quote(str(inside))}")
        variables = [f"{name}={value}" for name, value in (self.environment | dict(environment or {})).items()]
        enter = ["chroot", f"--userspec={self.user}", str(self.folder), "/usr/bin/env", "-i", *variables]
        inner = ["/bin/sh", "-c", f'cd {shlex.quote(self.folder_inside)} && exec "$@"', "sh", *command]
        script = "; ".join(["set -e", *mounts, f"exec {shlex.join([*enter, *inner])}"])
        return ["unshare", "--mount", "/bin/sh", "-c", script]


def instructions(dockerfile: str) -> list[tuple[str, str]]:
    """Words and arguments of a Dockerfile, in order."""
    lines = [line for line in dockerfile.splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [
        (word, rest.strip()) for word, _, rest in (line.strip().partition(" ") for line in joined.split("\n")) if word
    ]


def build(base: Path, work: Path, arguments: Mapping[str, str], bind: Sequence[str]) -> dict[str, Image]:
    """All stages of the Dockerfile by name."""
    stages: dict[str, Image] = {}
    given: dict[str, str] = {}
    image = Image(base)
    for word, rest in instructions((ROOT / "Dockerfile").read_text()):
        print(f"{word} {rest[:110]}", file=sys.stderr)
        if word == "FROM":
            parent, _, name = rest.split()
            image, given = stages.get(parent, Image(base)).copy(work / name), {}
            stages[name] = image
        elif word == "ARG":
            name, _, default = rest.partition("=")
            given[name] = arguments.get(name, default)
        elif word == "ENV":
            image.environment |= dict(part.split("=", 1) for part in shlex.split(rest))
        elif word == "WORKDIR":
            image.folder_inside = rest
            (image.folder / rest.lstrip("/")).mkdir(parents=True, exist_ok=True)
        elif word == "USER":
            image.user = rest
        elif word == "COPY":
            _copy(image, rest.split(), stages)
        elif word == "RUN":
            pip = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
            command = image.arguments(["/bin/sh", "-c", rest], environment=pip | given, bind=bind)
            subprocess.run(command, check=True, stdout=sys.stderr)
        elif word == "CMD":
            image.command = json.loads(rest)
        elif word == "HEALTHCHECK":
            image.healthcheck = json.loads(rest.partition("CMD ")[2])
        elif word != "EXPOSE":
            raise SystemExit(f"Dockerfile: {word} is not known to this script; add it there")
    return stages


def _copy(image: Image, words: Sequence[str], stages: Mapping[str, Image]) -> None:
    source = ROOT
    if words[0].startswith("--from="):
        source, words = stages[words[0].removeprefix("--from=")].folder, words[1:]
    *paths, target = words
    inside = image.folder / os.path.join(image.folder_inside, target).lstrip("/")
    for path in paths:
        taken = source / path.lstrip("/")
        into = inside / taken.name if target.endswith("/") else inside
        into.parent.mkdir(parents=True, exist_ok=True)
        if taken.is_dir():
            shutil.copytree(
                taken, into, symlinks=True, ignore=shutil.ignore_patterns("__pycache__") if source == ROOT else None
            )
        else:
            shutil.copy2(taken, into)


def size_mb(folder: Path) -> float:
    """Millions of bytes of a folder's files, each counted once."""
    sizes = {}
    for parent, _, names in os.walk(folder):
        for name in names:
            status = os.lstat(os.path.join(parent, name))
            sizes[status.st_ino] = status.st_size
    return sum(sizes.values()) / 1e6


def forget(folder: Path) -> None:
    """Drop a folder's files from the page cache, and only them."""
    os.sync()
    for parent, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(parent, name)
            if os.path.isfile(path) and not os.path.islink(path):
                file = os.open(path, os.O_RDONLY)
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(file)


def start(image: Image, *, is_cold: bool) -> tuple[float, float]:
    """Seconds to the first 200 of /readyz, and millions of bytes in memory then."""
    data = image.folder / image.folder_inside.lstrip("/")
    for file in data.glob("evenodds.db*"):
        file.unlink()
    if is_cold:
        forget(image.folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {"EVENODDS_ACCESS": "open", "EVENODDS_PORT": str(port)}
    began = time.perf_counter()
    process = subprocess.Popen(
        image.arguments(image.command, environment=environment), stderr=subprocess.PIPE, text=True
    )
    try:
        _await_ready(process, f"http://127.0.0.1:{port}/readyz")
        seconds = time.perf_counter() - began
        status = dict(line.split(":", 1) for line in Path(f"/proc/{process.pid}/status").read_text().splitlines())
        user = image.user.split(":")[0]
        assert status["Uid"].split() == [user] * 4, f"runs as {status['Uid']} instead of {user}"
        subprocess.run(image.arguments(image.healthcheck, environment=environment), check=True)
        return seconds, int(status["VmRSS"].split()[0]) * 1024 / 1e6
    finally:
        process.terminate()
        process.wait(timeout=20)


def _await_ready(process: subprocess.Popen[str], url: str) -> None:
    give_up = time.monotonic() + _GIVE_UP_SECONDS
    while time.monotonic() < give_up:
        if process.poll() is not None:
            raise SystemExit(f"the service ended: {process.stderr.read() if process.stderr else ''}")
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.01)
    raise SystemExit(f"no 200 from {url} for {_GIVE_UP_SECONDS:.0f} seconds")


def start_worker(image: Image) -> float:
    """Seconds until the worker says on which device it fits."""
    forget(image.folder)
    began = time.perf_counter()
    process = subprocess.Popen(image.arguments(image.command), stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        for line in process.stderr:
            if "fits on" in line:
                return time.perf_counter() - began
        raise SystemExit("the worker ended before it looked for work")
    finally:
        process.terminate()
        process.wait(timeout=20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("/tmp/evenodds-image"), help="folder for the file systems")
    parser.add_argument("--base", type=Path, help="a root file system to start from (default: made by debootstrap)")
    parser.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE", help="as to docker build")
    parser.add_argument("--bind", action="append", default=[], metavar="PATH", help="shown to RUN at the same path")
    parser.add_argument("--starts", type=int, default=5, help="starts of each kind to measure")
    options = parser.parse_args()
    if os.geteuid() != 0:
        raise SystemExit("benchmarks/image.py: chroot needs root: run it with sudo")
    options.work.mkdir(parents=True, exist_ok=True)
    base = options.base or options.work / "base"
    if not base.exists():
        subprocess.run(["debootstrap", "--variant=minbase", f"--include={_PACKAGES}", "bookworm", base], check=True)
    python = base / "usr/local/bin/python"
    if not python.is_symlink():
        python.symlink_to("/usr/bin/python3")
    bind = [path for path in _SHOWN_TO_PIP if os.path.exists(path)] + options.bind
    arguments = dict(pair.split("=", 1) for pair in options.build_arg)
    stages = build(base, options.work, arguments, bind)

    # The thin client is installed as the image's first stage installs, without an extra.
    client = stages["build-api"].copy(options.work / "client")
    shutil.rmtree(client.folder / "opt/evenodds")
    step = "python -m venv --without-pip /opt/evenodds && python -m pip --python /opt/evenodds/bin/python install -q "
    pip = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
    install = ["/bin/sh", "-c", f"{step} --no-cache-dir --constraint constraints.txt ."]
    subprocess.run(client.arguments(install, environment=pip, bind=bind), check=True, stdout=sys.stderr)

    print("| | installed, MB |\n|---|---|")
    for name, image in (("thin client", client), ("API", stages["api"]), ("worker", stages["worker"])):
        print(f"| {name} | {size_mb(image.folder / 'opt/evenodds'):,.0f} |", flush=True)
    for kind, is_cold in (("cold", True), ("warm", False)):
        starts = [start(stages["api"], is_cold=is_cold) for _ in range(options.starts)]
        seconds = [s for s, _ in starts]
        print(
            f"{kind} start to /readyz = 200: median {statistics.median(seconds):.2f} s, {min(seconds):.2f} to "
            f"{max(seconds):.2f} s, n = {len(seconds)}; {starts[-1][1]:.0f} MB resident",
            flush=True,
        )
    seconds = [start_worker(stages["worker"]) for _ in range(options.starts)]
    print(f"cold start of the worker: median {statistics.median(seconds):.2f} s, n = {len(seconds)}")


if __name__ == "__main__":
    main()
