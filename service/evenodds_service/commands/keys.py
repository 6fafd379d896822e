"""`evenodds keys`: create, list and revoke API keys."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from evenodds_service.commands.opening import Refused, fault, opened

if TYPE_CHECKING:
    from evenodds_service.storage.store import ApiKey


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `keys` with its actions."""
    keys = commands.add_parser("keys", help="create, list and revoke API keys")
    actions = keys.add_subparsers(required=True, metavar="ACTION")
    create = actions.add_parser("create", help="create a key and show its secret, once")
    create.add_argument("name", type=key_name, help="name of the key, shown in logs; a name can be used only once")
    create.add_argument(
        "--scope",
        action="append",
        choices=("read", "write", "admin"),
        help="what the key may do. read: predict and look; write: observe, select, load, refit; admin: delete. May be "
        "given several times (default: read and write)",
    )
    create.add_argument(
        "--runs",
        default="*",
        type=pattern,
        metavar="PATTERN",
        help="pattern of the runs that it may use, with * and ? (default: all)",
    )
    create.add_argument(
        "--expires-days", type=up_to(36_500), metavar="N", help="days until the key expires (default: never)"
    )
    create.add_argument(
        "--requests-per-minute",
        type=up_to(1_000_000),
        metavar="N",
        help="most requests a minute, counted in each service process (default: no limit)",
    )
    create.add_argument(
        "--max-body-mb",
        type=up_to(2_000),
        metavar="N",
        help="largest body of one request in MB (default: the service's limit)",
    )
    create.set_defaults(command=create_key)
    rotate = actions.add_parser("rotate", help="give a key a new secret; the present one goes on working")
    rotate.add_argument("name")
    rotate.add_argument("--finish", action="store_true", help="end the older secret, so that only the newest works")
    rotate.set_defaults(command=rotate_key)
    listing = actions.add_parser("list", help="show all keys, without their secrets")
    listing.set_defaults(command=list_keys)
    revoke = actions.add_parser("revoke", help="revoke a key for good, within 2 seconds")
    revoke.add_argument("name")
    revoke.set_defaults(command=revoke_key)


def create_key(options: argparse.Namespace) -> int:
    from datetime import datetime, timedelta, timezone

    from evenodds_service.api.middleware.access import hash_of, new_secret
    from evenodds_service.errors import StoreError

    secret = new_secret()
    now = datetime.now(timezone.utc)
    megabytes = options.max_body_mb
    try:
        _, store = opened()
        key = store.create_key(
            options.name,
            secret_hash=hash_of(secret),
            scopes=frozenset(options.scope or ("read", "write")),
            runs=options.runs,
            requests_per_minute=options.requests_per_minute,
            max_body_bytes=megabytes * 1_000_000 if megabytes is not None else None,
            now=now,
            expires_at=now + timedelta(days=options.expires_days) if options.expires_days else None,
        )
    except (Refused, StoreError) as error:
        return fault(str(error))
    store.close()
    print(
        f"key {key.name!r} for runs {key.runs!r}, scopes {', '.join(sorted(key.scopes))}; it is not shown again:",
        file=sys.stderr,
    )
    print(secret)
    return 0


def list_keys(_: argparse.Namespace) -> int:
    from evenodds_service.errors import StoreError

    try:
        _settings, store = opened()
        keys = store.api_keys()
    except (Refused, StoreError) as error:
        return fault(str(error))
    store.close()
    columns = ("name", "scopes", "runs", "a minute", "body MB", "created", "last used", "expires", "state")
    rows = [columns, *(_row(key) for key in keys)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0


def _row(key: ApiKey) -> tuple[str, ...]:
    from datetime import datetime, timezone

    def day(moment: datetime | None) -> str:
        return f"{moment:%Y-%m-%d}" if moment is not None else "-"

    state = "two secrets" if key.second_hash else ""
    if key.expires_at is not None and key.expires_at <= datetime.now(timezone.utc):
        state = "expired"
    if key.revoked_at is not None:
        state = f"revoked {day(key.revoked_at)}"
    return (
        key.name,
        ",".join(sorted(key.scopes)),
        key.runs,
        str(key.requests_per_minute or "-"),
        f"{key.max_body_bytes / 1_000_000:g}" if key.max_body_bytes else "-",
        day(key.created_at),
        f"{key.last_used_at:%Y-%m-%d %H:%M}" if key.last_used_at is not None else "-",
        day(key.expires_at),
        state,
    )


def rotate_key(options: argparse.Namespace) -> int:
    from evenodds_service.api.middleware.access import hash_of, new_secret
    from evenodds_service.errors import StoreError

    secret = new_secret()
    try:
        _, store = opened()
        if options.finish:
            store.finish_rotation(options.name)
        else:
            store.rotate_key(options.name, secret_hash=hash_of(secret))
    except (Refused, StoreError) as error:
        return fault(str(error))
    store.close()
    if options.finish:
        print(f"key {options.name!r}: only its newest secret works now")
        return 0
    print(
        f"key {options.name!r}: this secret is not shown again; the previous one works until "
        f"`evenodds keys rotate {options.name} --finish`",
        file=sys.stderr,
    )
    print(secret)
    return 0


def revoke_key(options: argparse.Namespace) -> int:
    from datetime import datetime, timezone

    from evenodds_service.errors import StoreError

    try:
        _, store = opened()
        key = store.revoke_key(options.name, now=datetime.now(timezone.utc))
    except (Refused, StoreError) as error:
        return fault(str(error))
    store.close()
    print(f"key {key.name!r} was revoked at {key.revoked_at:%Y-%m-%d %H:%M} UTC")
    return 0


def pattern(text: str) -> str:
    """Run names with * and ?. What else matters to patterns would match nothing, or more than it says."""
    import re

    if not re.fullmatch(r"[A-Za-z0-9._*?-]{1,128}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a pattern of run names: use letters, digits, . _ - and * ?")
    return text


def key_name(text: str) -> str:
    """What a log line and a table can show."""
    if not text.strip() or not text.isprintable() or len(text) > 128:
        raise argparse.ArgumentTypeError(f"{text!r} is no name: use 1 to 128 printable characters, such as trainer")
    return text


def up_to(most: int) -> Callable[[str], int]:
    """Whole numbers from 1 to this one."""

    def number(text: str) -> int:
        if not text.isdecimal() or not 1 <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"must be a whole number from 1 to {most:,}, got {text}")
        return int(text)

    return number
