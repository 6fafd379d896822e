"""What Prometheus reads: the runs of a process, few labels, and rules and a dashboard that name what exists."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.api.conftest import Caller
    from tests.conftest import Service

DEPLOY = Path(__file__).parents[2] / "deploy"
PROMTOOL = shutil.which("promtool")


def samples(service: Service, run: str) -> dict[str, float]:
    """Of one run, by name and other labels."""
    families = text_string_to_metric_families(service.http.get("/metrics").text)
    return {
        " ".join([sample.name, *(v for k, v in sorted(sample.labels.items()) if k != "run")]): sample.value
        for family in families
        for sample in family.samples
        if sample.labels.get("run") == run
    }


def test_a_run_is_measured_as_far_as_the_process_has_folded_it(caller: Caller, service: Service) -> None:
    caller.load_texts("a", "b", "c")
    caller.predict("a")
    caller.load_texts("d")
    after_write = samples(service, caller.run)
    batch = caller.select(3, 4)
    caller.observe(
        3,
        *({"prompt_id": p["prompt_id"], "successes": 4, "attempts": 8} for p in batch["prompts"]),
        selection_id=batch["selection_id"],
    )

    caller.predict("a")
    after_read = samples(service, caller.run)

    assert after_write["evenodds_run_head_lag"] > 0
    assert after_read["evenodds_run_head_lag"] == 0
    assert after_read["evenodds_run_head_step"] == 3
    assert after_read["evenodds_run_observations"] == 4
    assert after_read["evenodds_run_pool_prompts"] == 4
    assert after_read["evenodds_run_coverage"] == 1
    assert after_read["evenodds_run_informative_share policy"] == 1
    assert after_read["evenodds_run_refit_open"] == 0


def test_what_was_observed_is_folded_before_anyone_asks(caller: Caller, service: Service) -> None:
    caller.load_texts("a")

    caller.observe(0, {"prompt_id": "a", "successes": 1, "attempts": 2})

    until(lambda: samples(service, caller.run)["evenodds_run_observations"], "the observation to be folded")
    assert samples(service, caller.run)["evenodds_run_head_lag"] == 0


def test_a_deleted_run_is_no_longer_shown(caller: Caller, service: Service) -> None:
    caller.load_texts("a")
    caller.predict("a")
    assert samples(service, caller.run)

    service.http.delete(f"/runs/{caller.run}")

    assert samples(service, caller.run) == {}


def known_names(service: Service) -> set[str]:
    return set(re.findall(r"^# TYPE (\S+)", service.http.get("/metrics").text, re.MULTILINE))


def used_names(expressions: list[str]) -> set[str]:
    return {
        re.sub(r"_(bucket|sum|count)$", "", name)
        for expression in expressions
        for name in re.findall(r"evenodds_\w+", expression)
    }


def dashboard_expressions() -> list[str]:
    dashboard = json.loads((DEPLOY / "grafana/dashboard.json").read_text())
    return [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]


def rules() -> list[dict[str, Any]]:
    loaded = yaml.safe_load((DEPLOY / "prometheus/alerts.yml").read_text())
    return [rule for group in loaded["groups"] for rule in group["rules"]]


@pytest.mark.parametrize("service", ["sqlite"], indirect=True)
@pytest.mark.parametrize("expressions", [dashboard_expressions, lambda: [rule["expr"] for rule in rules()]])
def test_dashboard_and_alerts_ask_for_what_is_measured(
    caller: Caller, service: Service, expressions: Callable[[], list[str]]
) -> None:
    used = used_names(expressions())

    assert used
    assert used <= known_names(service)


@pytest.mark.skipif(PROMTOOL is None, reason="no promtool on this machine")
def test_prometheus_accepts_the_configuration_and_the_rules() -> None:
    assert PROMTOOL is not None
    for arguments in (("check", "rules", "alerts.yml"), ("check", "config", "prometheus.yml")):
        done = subprocess.run(
            [PROMTOOL, *arguments], cwd=DEPLOY / "prometheus", capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
