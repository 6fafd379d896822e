"""Settings are plain values; only the commands ask the environment for them."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from evenodds_service.commands.opening import opened
from evenodds_service.settings import Settings, settings_from_environment
from evenodds_service.storage.checkpoints import KEPT_SNAPSHOTS


def test_the_environment_counts_where_it_is_asked_for_and_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVENODDS_LIVE_RUNS", "7")
    monkeypatch.setenv("EVENODDS_EMBEDDERS", "one, two")

    assert Settings().live_runs == 32
    assert Settings().snapshots == KEPT_SNAPSHOTS
    assert Settings(max_body_mb=3).allowed_embedders() == ()
    assert settings_from_environment().live_runs == 7
    assert settings_from_environment().allowed_embedders() == ("one", "two")


def test_commands_open_a_store_that_keeps_so_many_snapshots(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EVENODDS_DATABASE_URL", f"sqlite:///{tmp_path}/evenodds.db")
    monkeypatch.setenv("EVENODDS_SNAPSHOTS", "5")

    _, store = opened()
    store.close()

    assert store._keep_snapshots == 5


def test_what_is_no_setting_is_refused() -> None:
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        Settings(live_run=1)  # type: ignore[call-arg]  # the fault that is tested


@pytest.mark.parametrize(
    ("setting", "listed", "fault"),
    [
        ("allowed_hosts", "a.example, https://b.example", "'https://b.example' is not the name of a host"),
        ("allowed_hosts", "b.example:8443", "'b.example:8443' is not the name of a host"),
        ("allowed_hosts", "b.example/", "'b.example/' is not the name of a host"),
        ("allowed_hosts", "*.example", r"'\*.example' is not the name of a host"),
        ("allowed_origins", "https://a.example, b.example", "'b.example' is not an origin"),
        ("allowed_origins", "https://b.example/", "'https://b.example/' is not an origin"),
        ("allowed_origins", "*", r"'\*' is not an origin"),
    ],
)
def test_a_name_or_origin_that_no_request_can_have_is_refused(setting: str, listed: str, fault: str) -> None:
    with pytest.raises(ValidationError, match=fault):
        Settings.model_validate({setting: listed})


def test_names_and_origins_are_taken_as_requests_have_them() -> None:
    hosts = ("*", "odds.example", "10.1.2.3", "[fd00::1]", "odds_service")

    assert Settings(allowed_hosts=", ".join(hosts)).host_names() == hosts
    assert Settings(allowed_origins="https://Dash.example, http://[::1]:9000").origins() == (
        "https://dash.example",
        "http://[::1]:9000",
    )
