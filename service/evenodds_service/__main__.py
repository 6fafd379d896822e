"""The command line: `evenodds serve | work | keys | migrate | import | replay | alert-rules`.

Each command is a module of `commands` that says its arguments and how it runs. These modules import what they need
inside their functions: the thin client is installed without the service's libraries.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from evenodds_service.commands import alert_rules, database, keys, openapi, serve, work
from evenodds_service.commands.importing import arguments as importing
from evenodds_service.commands.opening import fault
from evenodds_service.commands.replay import arguments as replay


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status: 0, or 1 after a fault that was explained on standard error."""
    options = parser().parse_args(arguments)
    try:
        return int(options.command(options) or 0)
    except ModuleNotFoundError as error:
        return fault(
            f"{error.name} is not installed: pip install 'evenodds[service]', or in a checkout pip install '.[service]'"
        )
    except KeyboardInterrupt:
        return 130


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    whole = argparse.ArgumentParser(
        prog="evenodds",
        description="Predicts how hard each prompt is for one language model as it is right now.",
    )
    commands = whole.add_subparsers(required=True, metavar="COMMAND")
    for module in (serve, work, keys, database, replay, importing, openapi, alert_rules):
        module.add_commands(commands)
    return whole


if __name__ == "__main__":
    sys.exit(main())
