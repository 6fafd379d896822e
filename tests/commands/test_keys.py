"""`evenodds keys`, and whom `evenodds serve` lets in: nobody without a key beyond this machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest
from tests.commands.test_command_line import evenodds, main_with, serve
from tests.waiting import PATIENCE_SECONDS

from evenodds import Client

if TYPE_CHECKING:
    from tests.commands.test_command_line import Server

__all__ = ["main_with", "serve"]  # fixtures


def test_a_key_is_shown_once_and_opens_the_service_until_it_is_revoked(
    tmp_path: Path, serve: Callable[..., Server], main_with: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main_with("keys", "create", "trainer", "--scope", "read", "--runs", "math-*") == 0
    shown = capsys.readouterr()
    assert main_with("keys", "list") == 0
    listed = capsys.readouterr()
    server = serve(EVENODDS_ACCESS="keys")

    with Client(server.base_url, api_key=shown.out.strip()) as client:
        runs = client.runs_page().runs
    without = httpx.get(f"{server.base_url}/runs", timeout=PATIENCE_SECONDS)
    assert main_with("keys", "revoke", "trainer") == 0

    assert runs == ()
    assert without.status_code == 401
    assert shown.out.startswith("eo_")
    assert shown.err == "key 'trainer' for runs 'math-*', scopes read; it is not shown again:\n"
    assert "trainer" in listed.out
    assert shown.out.strip() not in listed.out
    assert capsys.readouterr().out.startswith("key 'trainer' is revoked since 20")


def test_beyond_loopback_serve_wants_a_key_to_exist(tmp_path: Path) -> None:
    refused = evenodds("serve", cwd=tmp_path, EVENODDS_HOST="0.0.0.0", EVENODDS_PORT="0")

    assert refused.returncode == 1
    assert refused.stderr.splitlines()[-1] == (
        "evenodds: EVENODDS_HOST 0.0.0.0 with EVENODDS_ACCESS=auto asks for API keys, and there is none: "
        "create one with `evenodds keys create NAME`, or set EVENODDS_ACCESS=open where the network keeps strangers out"
    )


def test_on_loopback_nobody_is_asked_and_serve_says_so(serve: Callable[..., Server]) -> None:
    server = serve()

    assert httpx.get(f"{server.base_url}/runs", timeout=PATIENCE_SECONDS).status_code == 200
    assert (
        "evenodds: no API key is asked for: anyone on this machine may read and change every run "
        "(EVENODDS_ACCESS=keys asks for keys)\n"
    ) in server.said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("revoke", "nobody"), "evenodds: there is no key 'nobody': `evenodds keys list` shows those that exist\n"),
        (("create", "twice"), "evenodds: key 'twice' exists since "),
    ],
)
def test_what_cannot_be_done_with_a_key_is_explained(
    main_with: Callable[..., int], capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    main_with("keys", "create", "twice")
    capsys.readouterr()

    assert main_with("keys", *arguments) == 1

    assert capsys.readouterr().err.startswith(message)


def test_a_limit_below_one_is_refused(main_with: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main_with("keys", "create", "none", "--requests-per-minute", "0")

    assert "must be at least 1, got 0" in capsys.readouterr().err
