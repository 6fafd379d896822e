"""`evenodds serve`: the HTTP service, with a worker beside it where that is asked for."""

from __future__ import annotations

import argparse
import gc
import os
import subprocess
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

from evenodds_service.commands.opening import Refused, fault, opened, set_up_logging

_NOT_STARTED = 3

if TYPE_CHECKING:
    from evenodds_service.settings import Settings
    from evenodds_service.storage.store import Store


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `serve`."""
    parser = commands.add_parser("serve", help="run the HTTP service (settings: EVENODDS_* variables)")
    parser.add_argument("--with-worker", action="store_true", help="also run a worker, as a separate process")
    parser.set_defaults(command=serve)


def serve(options: argparse.Namespace) -> int:
    # The matrices of one request are small: threads inside them cost more than they give, and requests run side by
    # side anyway. Has to be said before numpy is imported.
    threads = os.environ.get("OPENBLAS_NUM_THREADS")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # Nearly all that a start makes stays. Searching it for garbage, again and again, would take a fifth of the start.
    gc.disable()
    try:
        return _served(options, threads)
    finally:
        gc.enable()


def _served(options: argparse.Namespace, threads: str | None) -> int:
    import uvicorn

    from evenodds_service.api.app import create_app

    try:
        settings, store = opened()
    except Refused as error:
        return fault(str(error))
    set_up_logging(settings)
    try:
        _check_port(settings)
        asks_for_keys = _asks_for_keys(settings, store)
    except Refused as error:
        store.close()
        return fault(str(error))
    worker = None
    if options.with_worker:
        environment = {name: value for name, value in os.environ.items() if name != "OPENBLAS_NUM_THREADS"}
        environment |= {"OPENBLAS_NUM_THREADS": threads} if threads else {}
        command = [sys.executable, "-m", "evenodds_service", "work", "--exit-with", str(os.getpid())]
        worker = subprocess.Popen(command, env=environment)
    try:
        app = create_app(store, settings, asks_for_keys=asks_for_keys)
        # What is there by now stays. Without this, each full search for garbage looks through all of it, and every
        # request waits a tenth of a second meanwhile.
        gc.freeze()
        gc.enable()
        server = uvicorn.Server(
            uvicorn.Config(
                app,
                host=settings.host,
                port=settings.port,
                log_config=None,
                access_log=False,
                proxy_headers=False,  # of X-Forwarded-* only the prefix is looked at, by middleware/prefix.py
                timeout_graceful_shutdown=10,
            )
        )
        app.state.is_ending = lambda: server.should_exit  # streams of events end then, or the end would wait for them
        with suppress(KeyboardInterrupt):
            server.run()
        if not server.started:
            return _NOT_STARTED
    finally:
        store.close()
        if worker is not None:
            worker.terminate()
            worker.wait()
    return 0


def _check_port(settings: Settings) -> None:
    """Raises Refused where nobody can listen there: uvicorn would say so after it said that all has started."""
    import socket

    try:
        places = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, kind, protocol, _, address in places:
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
                probe.listen(1)  # another listener may share a bound address, and no listening one
    except OSError as error:
        raise Refused(
            f"cannot listen on EVENODDS_HOST {settings.host}, EVENODDS_PORT {settings.port} ({error.strerror}): "
            "stop the process that uses the port, or set another port"
        ) from error


def _asks_for_keys(settings: Settings, store: Store) -> bool:
    """Whether callers need an API key. Raises Refused if nobody could call, or everybody could without a key."""
    from evenodds_service.api.middleware.browsers import is_loopback

    is_local = is_loopback(settings.host)
    if settings.access == "open" or (settings.access == "auto" and is_local):
        whoever = "on this machine" if is_local else f"who can reach {settings.host}"
        print(
            f"evenodds: no API key is required: anyone {whoever} may read and change every run "
            "(EVENODDS_ACCESS=keys requires keys)",
            file=sys.stderr,
        )
        return False
    if all(key.revoked_at is not None for key in store.api_keys()):
        raise Refused(
            f"EVENODDS_HOST {settings.host} with EVENODDS_ACCESS={settings.access} requires API keys, and none exists: "
            "create one with `evenodds keys create NAME`, or set EVENODDS_ACCESS=open if only trusted callers can "
            "reach this address"
        )
    return True
