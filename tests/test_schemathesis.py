"""The whole interface under generated requests, valid and not: the service keeps to its own description.

One check knows an exception: rules between fields (a budget that does not pay for the minimum, say) are beyond JSON
Schema, so a request that keeps to the schema may be answered 422. And 503 is an answer: to a deadline too short, say.
"""

from __future__ import annotations

import re
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.conftest import Service

CONFIGURATION = """
[checks.not_a_server_error]
expected-statuses = ["2xx", "3xx", "4xx", 503]

[checks.positive_data_acceptance]
expected-statuses = ["2xx", "3xx", 401, 403, 404, 409, 413, 422, 429, "5xx"]
"""
EXAMPLES = 30


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_no_generated_request_breaks_the_contract(
    tmp_path: Path, start_service: Callable[..., Service], seed: int
) -> None:
    service = start_service(f"sqlite:///{tmp_path}/evenodds.db")
    (tmp_path / "schemathesis.toml").write_text(CONFIGURATION)

    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "schemathesis.cli",
            "--config-file",
            str(tmp_path / "schemathesis.toml"),
            "run",
            f"{service.base_url}/openapi.json",
            "--checks=all",
            "--mode=all",
            "--phases=examples,coverage,fuzzing",
            f"--max-examples={EXAMPLES}",
            f"--seed={seed}",
            "--no-color",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )

    said = done.stdout + done.stderr
    assert not re.search(r"^Failures:", said, re.MULTILINE), said
    assert re.search(r"Tested: (\d+)", said), said
