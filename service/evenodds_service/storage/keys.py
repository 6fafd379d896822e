"""API keys: who may call, and what. Only a hash of each secret is stored."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from datetime import datetime

from sqlalchemy import RowMapping, insert, select, update

from evenodds_service.errors import KeyConflict, KeyUnknown
from evenodds_service.storage.tables import api_keys
from evenodds_service.storage.transactions import Transactions
from evenodds_service.storage.values import ApiKey, Scope


class KeyMethods(Transactions):
    def create_key(
        self,
        name: str,
        *,
        secret_hash: str,
        scopes: frozenset[Scope],
        runs: str,
        requests_per_minute: int | None,
        max_body_bytes: int | None,
        now: datetime,
        expires_at: datetime | None = None,
    ) -> ApiKey:
        """Store a key. A revoked key keeps its name, so that a name in the log always means one key.

        Args:
            secret_hash: Hexadecimal SHA-256 of the secret, which has 256 random bits.
            runs: Pattern of run names, with `*` and `?`.

        Raises:
            KeyConflict: the name is taken.
        """
        row = {
            "name": name,
            "secret_hash": secret_hash,
            "scopes": " ".join(sorted(scopes)),
            "runs": runs,
            "requests_per_minute": requests_per_minute,
            "max_body_bytes": max_body_bytes,
            "created_at": now,
            "expires_at": expires_at,
        }
        with self._writing() as connection:
            taken = connection.execute(select(api_keys.c.created_at).where(api_keys.c.name == name)).scalar()
            if taken is not None:
                raise KeyConflict(
                    f"key {name!r} was created on {taken:%Y-%m-%d}, and a name can be used only once: choose another "
                    "name"
                )
            created = connection.execute(insert(api_keys).values(row).returning(api_keys)).mappings().one()
        return _key_of(created)

    def api_keys(self) -> tuple[ApiKey, ...]:
        """All keys by name, also the revoked ones."""
        with self._reading() as connection:
            rows = connection.execute(select(api_keys).order_by(api_keys.c.name)).mappings().all()
        return tuple(_key_of(row) for row in rows)

    def rotate_key(self, name: str, *, secret_hash: str) -> ApiKey:
        """Give the key another secret; the present one works on beside it, and one before that no longer.

        Raises:
            KeyUnknown: there is none of this name, or it was revoked.
        """
        changed = {"second_hash": api_keys.c.secret_hash, "secret_hash": secret_hash}
        return self._changed(name, changed)

    def finish_rotation(self, name: str) -> ApiKey:
        """Let the newest secret alone open anything. Raises KeyUnknown as `rotate_key`."""
        return self._changed(name, {"second_hash": None})

    def note_key_uses(self, names: Collection[str], *, now: datetime) -> None:
        """Keep when these keys were last used."""
        with self._writing() as connection:
            connection.execute(update(api_keys).where(api_keys.c.name.in_(names)).values(last_used_at=now))

    def _changed(self, name: str, values: Mapping[str, object]) -> ApiKey:
        standing = (api_keys.c.name == name, api_keys.c.revoked_at.is_(None))
        with self._writing() as connection:
            statement = update(api_keys).where(*standing).values(values).returning(api_keys)
            row = connection.execute(statement).mappings().one_or_none()
        if row is None:
            raise KeyUnknown(f"no valid key has the name {name!r}: `evenodds keys list` shows all keys")
        return _key_of(row)

    def revoke_key(self, name: str, *, now: datetime) -> ApiKey:
        """Revoke it for good; a key that was revoked before stays as it is. Raises KeyUnknown."""
        is_meant = api_keys.c.name == name
        with self._writing() as connection:
            connection.execute(update(api_keys).where(is_meant, api_keys.c.revoked_at.is_(None)).values(revoked_at=now))
            row = connection.execute(select(api_keys).where(is_meant)).mappings().one_or_none()
        if row is None:
            raise KeyUnknown(f"no key has the name {name!r}: `evenodds keys list` shows all keys")
        return _key_of(row)


def _key_of(row: RowMapping) -> ApiKey:
    return ApiKey(**{**row, "scopes": frozenset(row["scopes"].split())})
