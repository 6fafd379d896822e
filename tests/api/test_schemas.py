"""What the wire and the service each say for themselves, since neither may import the other's words, agrees."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import get_args

import pytest

from evenodds import schemas
from evenodds_service.domain import settings
from evenodds_service.domain.budgets import allocation
from evenodds_service.domain.report import alarms, lift, report, summary
from evenodds_service.storage import values


@pytest.mark.parametrize(
    ("of_the_wire", "of_the_service"),
    [
        (schemas.Predictor, settings.PredictorName),
        (schemas.Acquisition, settings.Acquisition),
        (schemas.ModelSize, settings.ModelSize),
        (schemas.BudgetMode, settings.BudgetMode),
        (schemas.Objective, allocation.Objective),
        (schemas.AllocationMethod, allocation.Method),
        (schemas.RefitStatus, values.RefitStatus),
        (schemas.Verdict, summary.Verdict),
    ],
)
def test_both_know_the_same_words(of_the_wire: object, of_the_service: object) -> None:
    assert get_args(of_the_wire) == get_args(of_the_service) != ()


def test_a_budget_policy_that_says_nothing_is_the_built_in_one() -> None:
    sent, built_in = schemas.PolicyUpdate(), settings.BudgetPolicy()

    names = set(schemas.PolicyUpdate.model_fields) - {"tiers"}
    assert {name: getattr(sent, name) for name in names} == {name: getattr(built_in, name) for name in names}
    assert [(tier.label, tier.at_least, tier.max_tokens_scale) for tier in sent.tiers] == [
        (tier.label, tier.at_least, tier.max_tokens_scale) for tier in built_in.tiers
    ]


def test_a_refit_policy_that_says_nothing_is_that_of_a_new_run() -> None:
    policy, new = schemas.RefitPolicy(), settings.RunSettings()

    assert (policy.every_observations, policy.every_seconds) == (
        new.refit_every_observations,
        new.refit_every_seconds,
    )


def test_the_report_of_the_wire_has_the_figures_of_the_domain() -> None:
    of_the_wire = {
        name: set(getattr(schemas, name).model_fields)
        for name in dir(schemas)
        if name[0].isupper()
        if hasattr(getattr(schemas, name), "model_fields")
    }
    of_the_domain = {
        name: {field.name for field in fields(made)}
        for module in (report, lift, alarms)
        for name, made in vars(module).items()
        if is_dataclass(made) and made.__module__ == module.__name__ and name not in {"Kind", "StepsReport"}
    }
    assert issubclass(report.WindowReport, report.StepsReport)
    assert issubclass(report.RecentReport, report.StepsReport)

    for name, figures in of_the_domain.items():
        more = {"category"} if name == "GroupReport" else set()
        if name == "Report":
            name, more = (
                "RunReport",
                {"run", "log_position", "model_version", "observations", "fallback", "verdict", "notes"},
            )
            more |= {"categories", "other_categories"}
        assert of_the_wire[name] == figures | more, name
