"""`evenodds keys`: create, list and revoke API keys."""

from __future__ import annotations

import argparse
import sys

from evenodds_service.commands.opening import Refused, fault, opened


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `keys` with its actions."""
    keys = commands.add_parser("keys", help="create, list and revoke API keys")
    actions = keys.add_subparsers(required=True, metavar="ACTION")
    create = actions.add_parser("create", help="create a key and show its secret, once")
    create.add_argument("name", help="names the key for ever, also in logs")
    create.add_argument(
        "--scope",
        action="append",
        choices=("read", "write", "admin"),
        help="read: predict and look; write: observe, select, load, refit; admin: delete. May be repeated (default: "
        "read and write)",
    )
    create.add_argument(
        "--runs", default="*", metavar="PATTERN", help="run names it may touch, with * and ? (default: all)"
    )
    create.add_argument("--requests-per-minute", type=positive, metavar="N", help="in each process (default: no limit)")
    create.add_argument(
        "--max-body-mb", type=positive, metavar="N", help="of one request (default: the service's limit)"
    )
    create.set_defaults(command=create_key)
    listing = actions.add_parser("list", help="show the keys, not their secrets")
    listing.set_defaults(command=list_keys)
    revoke = actions.add_parser("revoke", help="revoke a key for good; it works for 2 seconds more at most")
    revoke.add_argument("name")
    revoke.set_defaults(command=revoke_key)


def create_key(options: argparse.Namespace) -> int:
    from datetime import datetime, timezone

    from evenodds_service.api.middleware.access import hash_of, new_secret
    from evenodds_service.errors import StoreError

    secret = new_secret()
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
            now=datetime.now(timezone.utc),
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
    print(f"{'name':24} {'scopes':18} {'runs':24} {'created':12} revoked")
    for key in keys:
        revoked = f"{key.revoked_at:%Y-%m-%d}" if key.revoked_at is not None else ""
        scopes = ",".join(sorted(key.scopes))
        print(f"{key.name:24} {scopes:18} {key.runs:24} {key.created_at:%Y-%m-%d}   {revoked}".rstrip())
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
    print(f"key {key.name!r} is revoked since {key.revoked_at:%Y-%m-%d %H:%M} UTC")
    return 0


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value
