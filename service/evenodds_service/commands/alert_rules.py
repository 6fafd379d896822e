"""`evenodds alert-rules`: rules for Prometheus, one for each alarm that a run may have, and those of the service.

Made from the definitions that the service itself uses, so that no alarm is without a rule. `deploy/` holds what this
prints, once for Prometheus and once for the chart.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass

_NO_PROBE = 'route!~"/healthz|/readyz|/metrics"'
_UNLESS_IDLE = "unless on (run) min by (run) (evenodds_run_idle_seconds) > 86400"
"""Nobody mends a run that has ended: after a day without a batch or an outcome its alarms stay on the page alone."""

HEADER = "# Made by `evenodds alert-rules`. Check with `promtool check rules`.\n"


def _is_on(labels: str) -> str:
    """Whether a run has an alarm with these labels."""
    return f"max by (run) (evenodds_run_alarm{{{labels}}}) == 1 {_UNLESS_IDLE}"


@dataclass(frozen=True, slots=True)
class Rule:
    """One alert: `lasts` is how long the expression has to hold, and `severity` is page or warn."""

    alert: str
    expression: str
    lasts: str
    severity: str
    summary: str
    description: str


SERVICE_RULES = (
    Rule(
        "EvenOddsDown",
        'up{job="evenodds"} == 0 or absent(up{job="evenodds"})',
        "1m",
        "page",
        "{{ if $labels.instance }}{{ $labels.instance }} does not answer"
        "{{ else }}Prometheus knows no replica of the service{{ end }}",
        "Trainers go on with uniform batches meanwhile, and keep their observations.",
    ),
    Rule(
        "EvenOddsErrors",
        f'sum(rate(evenodds_requests_total{{status=~"5..",{_NO_PROBE}}}[5m])) by (job) '
        f"/ sum(rate(evenodds_requests_total{{{_NO_PROBE}}}[5m])) by (job) > 0.01",
        "5m",
        "page",
        "{{ $value | humanizePercentage }} of requests fail",
        "The log has the code of each by its request id. 503 store_unavailable: the database did not answer in time. "
        "503 overloaded or deadline_passed: more requests came than the replicas can answer.",
    ),
    Rule(
        "EvenOddsSlow",
        'histogram_quantile(0.99, sum(rate(evenodds_request_seconds_bucket{route="/predict"}[5m])) by (le)) > 0.25',
        "10m",
        "warn",
        "99% of /predict take up to {{ $value | humanizeDuration }}",
        "Add replicas, or look at the database's latency.",
    ),
    Rule(
        "EvenOddsRefitFailed",
        "max by (run) (evenodds_run_refit_failed) == 1",
        "5m",
        "warn",
        "run {{ $labels.run }}: its last refit failed",
        "GET /runs/{{ $labels.run }}/refits has the error. Predictions go on with the snapshot before.",
    ),
    Rule(
        "EvenOddsRefitWaits",
        "max by (run) (evenodds_run_refit_waiting_seconds) > 900",
        "1m",
        "warn",
        "run {{ $labels.run }}: a refit has been due or open for a quarter of an hour",
        "Check that a worker (`evenodds work`) is running and that its machine is large enough.",
    ),
    Rule(
        "EvenOddsStateOld",
        "min by (run) (evenodds_run_state_lag) > 0",
        "15m",
        "warn",
        "run {{ $labels.run }}: its state has not been saved for a quarter of an hour",
        "Its alarms may be old until the next call to the run. The service's log says why states are not saved.",
    ),
)

CATEGORY_RULE = Rule(
    "EvenOddsForecastOffInCategory",
    _is_on('code="forecast_off",scope="category"'),
    "10m",
    "warn",
    "run {{ $labels.run }}: outcomes of a category are far from their forecasts",
    "GET /runs/{{ $labels.run }} names the category, since which step, and what to do.",
)
"""The one kind that breaks a run where it speaks of the whole of it, and not where it speaks of a category."""


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `alert-rules`."""
    parser = commands.add_parser("alert-rules", help="print alert rules for Prometheus, one for each alarm of a run")
    parser.set_defaults(command=print_rules)


def print_rules(_: argparse.Namespace) -> int:
    print(rules_file(), end="")
    return 0


def rules() -> tuple[Rule, ...]:
    """Those of the service, then those of runs, the most urgent first."""
    from evenodds_service.domain.report.alarms import KINDS

    of_runs = (
        Rule(
            alert_of(code),
            _is_on(f'code="{code}",scope="run"' if kind.is_broken else f'code="{code}"'),
            "1m" if kind.is_broken else "10m",
            "page" if kind.is_broken else "warn",
            f"run {{{{ $labels.run }}}}: {kind.title}",
            "GET /runs/{{ $labels.run }} says what was seen, since which step, and what to do.",
        )
        for code, kind in KINDS.items()
    )
    return (*SERVICE_RULES, *of_runs, CATEGORY_RULE)


def alert_of(code: str) -> str:
    """Name of the alert of an alarm: `forecast_off` is `EvenOddsForecastOff`."""
    return "EvenOdds" + "".join(word.capitalize() for word in code.split("_"))


def rules_file() -> str:
    """The rules as a file for Prometheus. Strings are written as JSON, which is YAML too."""
    lines = [HEADER, "groups:\n", "  - name: evenodds\n", "    rules:\n"]
    for rule in rules():
        lines += [
            f"      - alert: {rule.alert}\n",
            f"        expr: {json.dumps(rule.expression)}\n",
            f"        for: {rule.lasts}\n",
            f"        labels: {{severity: {rule.severity}}}\n",
            "        annotations:\n",
            f"          summary: {json.dumps(rule.summary)}\n",
            f"          description: {json.dumps(rule.description)}\n",
        ]
    return "".join(lines)
