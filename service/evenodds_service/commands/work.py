"""`evenodds work`: the process that refits shared models."""

from __future__ import annotations

import argparse
import os
import threading

from evenodds_service.commands.opening import Refused, fault, opened, set_up_logging


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `work`."""
    parser = commands.add_parser(
        "work", help="run a worker, which refits shared models in the background, on a GPU if there is one"
    )
    parser.add_argument("--exit-with", type=int, metavar="PID", help="end when the process with this PID ends")
    parser.add_argument("--once", action="store_true", help="end as soon as no refit is due")
    parser.set_defaults(command=work)


def work(options: argparse.Namespace) -> int:
    import logging
    import signal
    import socket
    import threading
    from datetime import datetime, timedelta, timezone

    from evenodds_service.errors import DeviceUnavailable
    from evenodds_service.model.paper_network import open_device
    from evenodds_service.model.refit import fit_shared_model
    from evenodds_service.storage.engine import WORKER_PATIENCE
    from evenodds_service.worker import Worker

    try:
        settings, store = opened(WORKER_PATIENCE)
    except Refused as error:
        return fault(str(error))
    set_up_logging(settings)
    try:
        device = open_device(settings.device)
    except DeviceUnavailable as error:
        store.close()
        return fault(f"EVENODDS_DEVICE: {error}")
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    if options.exit_with is not None:
        threading.Thread(target=_stop_with_parent, args=(stop, options.exit_with), daemon=True).start()
    worker = Worker(
        store,
        name=f"{socket.gethostname()}-{os.getpid()}",
        clock=lambda: datetime.now(timezone.utc),
        fit=lambda data: fit_shared_model(data, device=device),
        lease=timedelta(seconds=settings.worker_lease_seconds),
        poll_seconds=settings.worker_poll_seconds,
    )
    logging.info("worker %s fits on %s", f"{socket.gethostname()}-{os.getpid()}", device)
    try:
        if options.once:
            worker.run_until_idle(stop)
        else:
            worker.run(stop)
    finally:
        store.close()
    return 0


def _stop_with_parent(stop: threading.Event, parent: int) -> None:
    """Where a process dies, the system gives its children another parent, also before they ask who it is."""
    while not stop.wait(1.0):
        if os.getppid() != parent:
            stop.set()
