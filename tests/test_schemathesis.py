"""The whole interface under generated requests, valid and not: the service keeps to its own description.

One check knows an exception: rules between fields (a budget that does not pay for the minimum, say) are beyond JSON
Schema, so a request that keeps to the schema may be answered 422. And 503 is an answer: to a deadline too short, say.
Streams of events are described as the text that they are: before OpenAPI 3.2 a description has no word for one event.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.waiting import PATIENCE_SECONDS

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.conftest import Service

HOOKS = Path(__file__).with_name("schemathesis_hooks.py")
CONFIGURATION = """
[checks]
enabled = true

[checks.not_a_server_error]
expected-statuses = ["2xx", "3xx", "4xx", 503]

[checks.positive_data_acceptance]
expected-statuses = ["2xx", "3xx", 401, 403, 404, 409, 410, 413, 422, 429, "5xx"]

[[operations]]
include-path-regex = "/events$"
checks.response_schema_conformance.enabled = false
"""
EXAMPLES = int(os.environ.get("EVENODDS_SCHEMATHESIS_EXAMPLES", "30"))
SEED = int(os.environ.get("EVENODDS_SCHEMATHESIS_SEED", "1"))
RUN = "seeded"  # as the hooks know them
PROMPTS = [f"seeded-{i}" for i in range(12)]


@pytest.mark.slow
def test_no_generated_request_breaks_the_contract(
    tmp_path: Path, start_service: Callable[..., Service], pytestconfig: pytest.Config, database_url: str
) -> None:
    service = start_service(database_url)
    service.client.put_run(RUN, embedder="none")
    service.client.add_prompts(RUN, [{"prompt_id": prompt, "text": f"What is {prompt}?"} for prompt in PROMPTS])
    chosen = service.client.select_batch(RUN, 0, 4)
    outcomes = [{"prompt_id": prompt.prompt_id, "successes": 1, "attempts": 2} for prompt in chosen.prompts]
    service.client.observe(RUN, 0, outcomes, selection_id=chosen.selection_id)
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
            "--mode=all",
            "--phases=examples,coverage,fuzzing",
            f"--max-examples={EXAMPLES}",
            f"--seed={SEED}",
            f"--request-timeout={PATIENCE_SECONDS}",  # how long it takes says how busy the machine is
            f"--max-response-time={PATIENCE_SECONDS}",
            "--suppress-health-check=too_slow",
            "--no-color",
            *os.environ.get("EVENODDS_SCHEMATHESIS_OPTIONS", "").split(),
        ],
        cwd=tmp_path,
        env={**os.environ, "SCHEMATHESIS_HOOKS": HOOKS.stem, "PYTHONPATH": str(HOOKS.parent)},
        capture_output=True,
        text=True,
        check=False,
        timeout=900 * max(1, EXAMPLES // 30),
    )

    said = done.stdout + done.stderr
    pytestconfig.get_terminal_writer().line(said[said.find("API Operations:") :])  # pytest -s shows it
    assert done.returncode == 0, said
    for fault in ("Failures:", "Errors:", "Warnings:.*Serialization"):
        assert not re.search(f"^{fault}", said, re.MULTILINE), said
    assert re.search(r"Tested: (\d+)", said), said
