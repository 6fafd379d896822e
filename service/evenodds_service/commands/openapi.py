"""`evenodds openapi`: the description of the HTTP interface as JSON."""

from __future__ import annotations

import argparse
import json


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `openapi`."""
    parser = commands.add_parser("openapi", help="print the OpenAPI document")
    parser.set_defaults(command=print_openapi)


def print_openapi(_: argparse.Namespace) -> int:
    from evenodds_service.api.app import create_app
    from evenodds_service.storage.engine import open_engine
    from evenodds_service.storage.store import Store

    app = create_app(Store(open_engine("sqlite:///openapi-is-never-opened.db")))
    print(json.dumps(app.openapi(), indent=2, sort_keys=True))
    return 0
