"""API keys in the store: made, listed, revoked; a secret itself is never seen."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import pytest

from evenodds_service.errors import KeyConflict, KeyUnknown
from evenodds_service.storage.store import ApiKey, Store


def create(store: Store, name: str, now: datetime, **changes: Any) -> ApiKey:
    values: dict[str, Any] = {
        "secret_hash": f"{abs(hash(name)):064x}",
        "scopes": frozenset({"read", "write"}),
        "runs": "math-*",
        "requests_per_minute": None,
        "max_body_bytes": None,
    }
    return store.create_key(name, **(values | changes), now=now)


def test_a_key_comes_back_as_it_was_made(store: Store, now: datetime) -> None:
    made = create(store, "trainer", now, requests_per_minute=600, max_body_bytes=1_000_000)

    assert store.api_keys() == (made,)
    assert made.scopes == {"read", "write"}
    assert (made.requests_per_minute, made.max_body_bytes, made.revoked_at) == (600, 1_000_000, None)


def test_a_revoked_key_stays_revoked_and_keeps_its_name(store: Store, now: datetime) -> None:
    create(store, "trainer", now)
    later = now + timedelta(days=1)

    revoked = store.revoke_key("trainer", now=later)
    again = store.revoke_key("trainer", now=later + timedelta(days=1))

    assert revoked.revoked_at == again.revoked_at == later
    with pytest.raises(
        KeyConflict, match="key 'trainer' was created on 2026-01-02, and a name can be used only once: choose another"
    ):
        create(store, "trainer", later, secret_hash="f" * 64)


def test_an_unknown_key_cannot_be_revoked(store: Store, now: datetime) -> None:
    with pytest.raises(KeyUnknown, match="no key has the name 'nobody'"):
        store.revoke_key("nobody", now=now)
