"""What Prometheus reads: all runs at any replica, few labels, and rules and a dashboard that name what exists."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import event, insert
from tests.waiting import until

from evenodds_service.api.run_metrics import GAUGES, RunMetrics
from evenodds_service.commands.alert_rules import alert_of, rules_file
from evenodds_service.domain.report.alarms import KINDS, Alarm
from evenodds_service.domain.report.summary import VERDICTS, Summary
from evenodds_service.domain.settings import RunSettings
from evenodds_service.runtime.live_runs import LiveRuns
from evenodds_service.runtime.run_states import RunStates
from evenodds_service.storage.engine import open_engine
from evenodds_service.storage.migration import upgrade
from evenodds_service.storage.runs import settings_to_json
from evenodds_service.storage.store import Store
from evenodds_service.storage.tables import runs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.api.conftest import Caller
    from tests.conftest import Service

DEPLOY = Path(__file__).parents[2] / "deploy"
PROMTOOL = shutil.which("promtool")
NOW = datetime(2026, 1, 2, tzinfo=timezone.utc)


@pytest.fixture
def service(start_service: Callable[[str], Service], tmp_path: Path) -> Service:
    """Without the runs of other tests: the more of them there are to save, the later a state is saved."""
    return start_service(f"sqlite:///{tmp_path}/evenodds.db")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """With no run yet."""
    store = Store(open_engine(f"sqlite:///{tmp_path}/runs.db"))
    upgrade(store._engine)
    yield store
    store.close()


def samples(service: Service, run: str) -> dict[str, float]:
    """Of one run, by name and other labels."""
    families = text_string_to_metric_families(service.http.get("/metrics").text)
    return {
        " ".join([sample.name, *(v for k, v in sorted(sample.labels.items()) if k != "run")]): sample.value
        for family in families
        for sample in family.samples
        if sample.labels.get("run") == run
    }


def test_a_run_is_measured_by_every_replica_until_it_is_deleted(
    caller: Caller, service: Service, start_service: Callable[[str], Service]
) -> None:
    caller.load([{"prompt_id": f"p{i}", "text": f"Say {i}."} for i in range(8)])
    for step in range(8):
        prompts = caller.chosen(step, 1)
    until(lambda: samples(service, caller.run).get("evenodds_run_alarm outcomes_stopped run"), "the alarm to be saved")
    assert samples(service, caller.run)["evenodds_run_state broken"] == 1
    caller.observe(8, {"prompt_id": prompts[0], "successes": 4, "attempts": 8})
    caller.predict(prompts[0])

    replica = start_service(service.database_url)  # which has never been asked for the run
    until(
        lambda: (
            samples(replica, caller.run).get("evenodds_run_observations") == 1
            and samples(replica, caller.run)["evenodds_run_state_lag"] == 0
        ),
        "the state to be saved",
    )
    shown, own = samples(replica, caller.run), samples(service, caller.run)

    assert shown["evenodds_run_state learning"] == 1
    assert sum(value for name, value in shown.items() if name.startswith("evenodds_run_state ")) == 1
    assert "evenodds_run_alarm outcomes_stopped run" not in shown
    assert shown["evenodds_run_head_step"] == 8
    assert shown["evenodds_run_pool_prompts"] == 8
    assert shown["evenodds_run_coverage"] == 1
    assert 0 <= shown["evenodds_run_idle_seconds"] < 3_600
    assert shown["evenodds_run_refit_open"] == 0
    assert own["evenodds_run_head_lag"] == 0
    assert "evenodds_run_head_lag" not in shown
    service.http.delete(f"/runs/{caller.run}")
    until(lambda: samples(replica, caller.run) == {}, "the run to be forgotten")


def test_the_state_is_saved_after_prompts_came_and_after_one_was_erased(caller: Caller, service: Service) -> None:
    """Else `EvenOddsStateOld` would fire for a run that nobody trains yet."""

    def is_saved(at_least: int) -> bool:
        shown = samples(service, caller.run)
        return shown["evenodds_run_log_position"] >= at_least and shown["evenodds_run_state_lag"] == 0

    caller.load([{"prompt_id": f"p{i}"} for i in range(8)])
    until(lambda: is_saved(1), "the state with the prompts to be saved")
    assert service.http.delete(f"/runs/{caller.run}/prompts/p3").status_code == 204
    until(lambda: is_saved(2), "the state without the prompt to be saved")


@pytest.mark.slow
def test_two_thousand_runs_are_two_thousand_states_and_three_statements(store: Store) -> None:
    rows = [{"name": f"run-{i}", "settings": settings_to_json(RunSettings()), "created_at": NOW} for i in range(2_000)]
    with store._engine.begin() as connection:
        ids = list(connection.execute(insert(runs).values(rows).returning(runs.c.id)).scalars())
    saved = [(run_id, 0, Summary(VERDICTS[i % len(VERDICTS)])) for i, run_id in enumerate(ids[1:])]
    store.save_run_states(saved, now=NOW)
    live_runs = LiveRuns(store, capacity=1)
    collector = RunMetrics(store, live_runs, RunStates(store, live_runs, now=lambda: NOW), lambda: NOW)
    registry, statements = CollectorRegistry(), []
    registry.register(collector)
    event.listen(store._engine, "before_cursor_execute", lambda *arguments: statements.append(arguments[2]))

    shown = [generate_latest(registry) for _ in range(2)]

    states = re.findall(rb'^evenodds_run_state\{run="run-\d+",state="(\w+)"\} 1.0$', shown[0], re.MULTILINE)
    assert len(states) == 2_000
    assert states.count(b"no_data") == len(saved) // len(VERDICTS) + 1  # and the run without a state
    assert shown[0] == shown[1]
    assert len([statement for statement in statements if statement.startswith("SELECT")]) == 3


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


@pytest.mark.parametrize("expressions", [dashboard_expressions, lambda: [rule["expr"] for rule in rules()]])
def test_dashboard_and_alerts_ask_for_what_is_measured(
    caller: Caller, service: Service, expressions: Callable[[], list[str]]
) -> None:
    used = used_names(expressions())

    assert used
    assert used <= known_names(service)


def test_the_dashboard_shows_every_metric_of_a_run_in_panels_that_do_not_overlap() -> None:
    panels = json.loads((DEPLOY / "grafana/dashboard.json").read_text())["panels"]
    places = [panel["gridPos"] for panel in panels]

    assert set(GAUGES) <= used_names(dashboard_expressions())
    assert len({panel["id"] for panel in panels}) == len({(place["x"], place["y"]) for place in places}) == len(panels)
    assert all((place["x"] % 8, place["y"] % 8, place["w"], place["h"]) == (0, 0, 8, 8) for place in places)


@pytest.mark.parametrize("file", ["prometheus/alerts.yml", "helm/evenodds/alerts.yml"])
def test_the_rules_are_those_that_the_command_prints(file: str) -> None:
    """If this fails: evenodds alert-rules > deploy/prometheus/alerts.yml, and copy it to deploy/helm/evenodds."""
    assert (DEPLOY / file).read_text() == rules_file()


def test_every_alarm_has_an_alert_and_what_breaks_a_run_is_urgent() -> None:
    severities = {rule["alert"]: rule["labels"]["severity"] for rule in rules()}

    for code, kind in KINDS.items():
        assert severities[alert_of(code)] == ("page" if kind.is_broken else "warn")
    paging = [rule["expr"] for rule in rules() if rule["labels"]["severity"] == "page" and "run_alarm" in rule["expr"]]
    assert all('scope="run"' in expression for expression in paging), "one category alone wakes nobody"
    assert severities["EvenOddsForecastOffInCategory"] == "warn"


def test_alarms_of_the_run_and_of_categories_are_told_apart(store: Store) -> None:
    run, _ = store.put_run("math", RunSettings(), now=NOW)
    of_run = Alarm("forecast_off", "Seen.", 3, 0.1, 0.2)
    of_categories = [replace(of_run, category=name, scope="category") for name in ("code", None)]
    store.save_run_states([(run.id, 0, Summary("broken", alarms=(of_run, *of_categories)))], now=NOW)
    live_runs = LiveRuns(store, capacity=1)
    metrics = RunMetrics(store, live_runs, RunStates(store, live_runs, now=lambda: NOW), lambda: NOW)

    told = [s.labels for family in metrics.collect() for s in family.samples if s.name == "evenodds_run_alarm"]

    assert told == [{"run": "math", "code": "forecast_off", "scope": scope} for scope in ("run", "category")]


def expression_of(alert: str) -> str:
    return str(next(rule["expr"] for rule in rules() if rule["alert"] == alert))


def test_a_service_that_prometheus_has_lost_is_down() -> None:
    assert expression_of("EvenOddsDown").endswith('or absent(up{job="evenodds"})')


def test_probes_neither_raise_the_alert_of_errors_nor_hide_it() -> None:
    selected = re.findall(r"evenodds_requests_total\{(.*?)\}", expression_of("EvenOddsErrors"))

    assert len(selected) == 2
    assert all('route!~"/healthz|/readyz|/metrics"' in labels for labels in selected)


@pytest.mark.parametrize("code", KINDS)
def test_an_alarm_of_a_run_that_nobody_trains_any_more_calls_nobody(code: str) -> None:
    assert expression_of(alert_of(code)).endswith(
        "== 1 unless on (run) min by (run) (evenodds_run_idle_seconds) > 86400"
    )


@pytest.mark.skipif(PROMTOOL is None, reason="no promtool on this machine")
def test_prometheus_accepts_the_configuration_and_the_rules() -> None:
    assert PROMTOOL is not None
    for arguments in (("check", "rules", "alerts.yml"), ("check", "config", "prometheus.yml")):
        done = subprocess.run(
            [PROMTOOL, *arguments], cwd=DEPLOY / "prometheus", capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
