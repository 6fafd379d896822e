"""The arithmetic that this machine can be made to calculate with, and a run of the tests marked `numbers` under each.

    python -m tests.kernels

OpenBLAS reads its kernel and its number of threads when it is loaded, numpy its instructions, so each is a process.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from numpy._core._multiarray_umath import (  # type: ignore[import-not-found]  # numpy types no private module
    __cpu_dispatch__,
    __cpu_features__,
)

_NEEDS = {
    "Prescott": ("SSE3",),
    "Nehalem": ("SSE42",),
    "Sandybridge": ("AVX",),
    "Haswell": ("AVX2",),
    "Zen": ("AVX2",),
    "SkylakeX": ("AVX512_SKX", "X86_V4"),
}
_THREADS = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS")
_AT_ONCE = 2
_TESTS = Path(__file__).parent

_PYTEST = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "_hypothesis_pytestplugin", "-m", "numbers"]
_NO_PLUGINS = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
_LEAN = ["--confcutdir=tests/domain", "--hypothesis-profile=kernels", "-k", "not log_k"]
"""Without the service, which the fixtures of all tests import and which takes longer than the tests, as other plugins
and torch do; with few examples of hypothesis, the same at any load; and without bounds on losses, which hold with a
margin."""


def environments() -> dict[str, Mapping[str, str]]:
    """By name, what to set for a process: every kernel with one and with two threads, and numpy without its SIMD code.

    On processors that are none of x86 the one kernel that OpenBLAS chooses.
    """
    kernels = [name for name, features in _NEEDS.items() if any(__cpu_features__.get(f) for f in features)]
    found: dict[str, Mapping[str, str]] = {}
    for kernel in kernels or [""]:
        for threads in "1", "2":
            settings = dict.fromkeys(_THREADS, threads)
            if kernel:
                settings["OPENBLAS_CORETYPE"] = kernel
            found[f"{kernel or 'own kernel'}, threads: {threads}"] = settings
    dispatched = [feature for feature in __cpu_dispatch__ if __cpu_features__.get(feature)]
    if dispatched:
        found["numpy without " + " ".join(dispatched)] = {"NPY_DISABLE_CPU_FEATURES": " ".join(dispatched)}
    return found


def marked(*rooms: str) -> list[str]:
    """The files of these rooms' tests that hold tests marked `numbers`: what the others import takes seconds."""
    files = (file for room in rooms for file in sorted((_TESTS / room).rglob("test_*.py")))
    return [str(file) for file in files if "pytest.mark.numbers" in file.read_text()]


def run(command: list[str], settings: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Run this Python with the arguments under these settings."""
    inherited = {k: v for k, v in os.environ.items() if k not in (*_THREADS, "OPENBLAS_CORETYPE")}
    return subprocess.run([sys.executable, *command], env={**inherited, **settings}, capture_output=True, text=True)


def main() -> int:
    failed = 0
    with ThreadPoolExecutor(_AT_ONCE) as processes:

        def timed(command: list[str], settings: Mapping[str, str]) -> tuple[subprocess.CompletedProcess[str], float]:
            started = time.monotonic()
            return run([*_PYTEST, *command], {**_NO_PLUGINS, **settings}), time.monotonic() - started

        computed = [*_LEAN, *marked("domain", "model")]
        tried = {name: (computed, settings) for name, settings in environments().items()}
        # What is kept takes no products: the oldest kernel and numpy's plain instructions are enough, on each backend.
        for name in (next(iter(tried)), list(tried)[-1]):
            tried[f"storage, {name}"] = (marked("storage"), tried[name][1])
        for name, (result, seconds) in zip(tried, processes.map(lambda job: timed(*job), tried.values()), strict=True):
            last = (result.stdout.strip() or result.stderr.strip()).splitlines()[-1]
            sys.stdout.write(f"{name:36} {seconds:5.1f} s  {last}\n")
            if result.returncode:
                failed += 1
                sys.stdout.write(result.stdout + result.stderr)
            sys.stdout.flush()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
