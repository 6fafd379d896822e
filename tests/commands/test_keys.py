"""`evenodds keys`, and whom `evenodds serve` lets in: nobody without a key beyond this machine."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest
from tests.commands.test_command_line import evenodds, main_with, serve
from tests.waiting import PATIENCE_SECONDS, until

from evenodds import Client
from evenodds_service.storage.engine import open_engine
from evenodds_service.storage.store import Store

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
    assert capsys.readouterr().out.startswith("key 'trainer' was revoked at 20")


def test_beyond_loopback_serve_wants_a_key_to_exist(tmp_path: Path) -> None:
    refused = evenodds("serve", cwd=tmp_path, EVENODDS_HOST="0.0.0.0", EVENODDS_PORT="0")

    assert refused.returncode == 1
    assert refused.stderr.splitlines()[-1] == (
        "evenodds: EVENODDS_HOST 0.0.0.0 with EVENODDS_ACCESS=auto requires API keys, and none exists: "
        "create one with `evenodds keys create NAME`, or set EVENODDS_ACCESS=open if only trusted callers can reach "
        "this address"
    )


def test_on_loopback_nobody_is_asked_and_serve_says_so(serve: Callable[..., Server]) -> None:
    server = serve()

    assert httpx.get(f"{server.base_url}/runs", timeout=PATIENCE_SECONDS).status_code == 200
    assert (
        "evenodds: no API key is required: anyone on this machine may read and change every run "
        "(EVENODDS_ACCESS=keys requires keys)\n"
    ) in server.said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("revoke", "nobody"), "evenodds: no key has the name 'nobody': `evenodds keys list` shows all keys\n"),
        (("create", "twice"), "evenodds: key 'twice' was created on "),
    ],
)
def test_what_cannot_be_done_with_a_key_is_explained(
    main_with: Callable[..., int], capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    main_with("keys", "create", "twice")
    capsys.readouterr()

    assert main_with("keys", *arguments) == 1

    assert capsys.readouterr().err.startswith(message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("none", "--requests-per-minute", "0"), "must be a whole number from 1 to 1,000,000, got 0"),
        (("none", "--requests-per-minute", "1e3"), "must be a whole number from 1 to 1,000,000, got 1e3"),
        (("none", "--expires-days", "10000000"), "must be a whole number from 1 to 36,500, got 10000000"),
        (("none", "--max-body-mb", "10000000000000"), "must be a whole number from 1 to 2,000, got 10000000000000"),
        (("",), "'' is no name: use 1 to 128 printable characters, such as trainer"),
        (("two\nlines",), "'two\\nlines' is no name"),
    ],
)
def test_a_name_or_limit_that_no_key_can_have_is_refused(
    main_with: Callable[..., int], capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    with pytest.raises(SystemExit):
        main_with("keys", "create", *arguments)

    assert message in capsys.readouterr().err


def test_a_key_gets_a_new_secret_while_the_old_one_works_on(
    tmp_path: Path, serve: Callable[..., Server], main_with: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    def secret(*arguments: str) -> str:
        assert main_with("keys", *arguments) == 0
        return capsys.readouterr().out.strip()

    first = secret("create", "trainer")
    second = secret("rotate", "trainer")
    server = serve(EVENODDS_ACCESS="keys")

    def opens(key: str) -> bool:
        headers = {"Authorization": f"Bearer {key}"}
        return httpx.get(f"{server.base_url}/runs", headers=headers, timeout=PATIENCE_SECONDS).status_code == 200

    assert second.startswith("eo_")
    assert (opens(first), opens(second)) == (True, True)
    secret("rotate", "trainer", "--finish")
    until(lambda: not opens(first), "the end of the older secret")
    assert opens(second)
    store = Store(open_engine(f"sqlite:///{tmp_path}/evenodds.db"))
    assert store.api_keys()[0].last_used_at is not None
    store.close()


@pytest.mark.parametrize("pattern", ["[", "math-[ab]", "", "a b", "x" * 129, "!a"])
def test_a_pattern_that_means_something_else_is_refused(
    main_with: Callable[..., int], capsys: pytest.CaptureFixture[str], pattern: str
) -> None:
    with pytest.raises(SystemExit):
        main_with("keys", "create", "bound", "--runs", pattern)

    assert "is not a pattern of run names: use letters, digits" in capsys.readouterr().err


def test_the_list_shows_limits_and_ends(main_with: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    main_with("keys", "create", "small", "--requests-per-minute", "60", "--max-body-mb", "2", "--expires-days", "1")
    main_with("keys", "create", "plain")
    main_with("keys", "rotate", "plain")
    capsys.readouterr()

    assert main_with("keys", "list") == 0

    head, plain, small = capsys.readouterr().out.splitlines()
    tomorrow = datetime.now(timezone.utc) + timedelta(days=1)
    assert head.split()[3:] == ["a", "minute", "body", "MB", "created", "last", "used", "expires", "state"]
    assert small.split()[:5] == ["small", "read,write", "*", "60", "2"]
    assert small.split()[-1] == f"{tomorrow:%Y-%m-%d}"
    assert plain.endswith("two secrets")


def test_a_key_that_was_revoked_gets_no_secret(
    main_with: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    main_with("keys", "create", "gone")
    main_with("keys", "revoke", "gone")
    capsys.readouterr()

    assert main_with("keys", "rotate", "gone") == 1

    assert capsys.readouterr().err.startswith("evenodds: no valid key has the name 'gone'")
