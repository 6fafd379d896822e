"""Breaks a service in every room and lets it log; run by `test_observability.py` in a process of its own.

    python -m tests.breaking DATABASE-URL

What it sends holds `CANARY_TEXT` and `CANARY_KEY`, which may not be found in what it says, in either format. It prints
the rooms that were broken.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
import threading
from dataclasses import replace
from datetime import datetime, timezone
from typing import Any

import httpx
import uvicorn
from sqlalchemy import text as sql
from tests.waiting import PATIENCE_SECONDS

from evenodds_service.api.app import create_app
from evenodds_service.domain.settings import RunSettings
from evenodds_service.logs import configure_logging
from evenodds_service.storage.engine import WRITES, open_engine
from evenodds_service.storage.migration import upgrade
from evenodds_service.storage.store import Store
from evenodds_service.worker import Worker

CANARY_TEXT = "a canary sings; it's yellow"
CANARY_KEY = "eo_" + "canary-" * 6
PROMPT = {"prompt_id": "a", "text": CANARY_TEXT, "answer": {"of": "the canary", "or": ["yellow"]}}
HEADERS = {"Authorization": f"Bearer {CANARY_KEY}", "X-Request-ID": CANARY_KEY}


class Quoting:
    """An embedder whose failures quote what they were given."""

    name, width = "builtin", 8

    def embed(self, texts: Any) -> Any:
        raise ValueError(f"no vector of {texts[0]!r} with {CANARY_KEY}\ninput was: {texts[0]}")


def quoting_fit(_: Any) -> Any:
    raise ValueError(f"no fit of {CANARY_TEXT!r}")


async def broken(database_url: str) -> list[str]:
    engine = open_engine(database_url, timeout_seconds=PATIENCE_SECONDS)
    upgrade(engine)
    store = Store(engine)
    for name in ("sound", "fitted"):
        store.put_run(name, RunSettings(embedder="none"), now=datetime.now(timezone.utc))
    app = create_app(store)
    services = app.state.services
    broken = []
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False))
    serving = asyncio.create_task(server.serve(sockets=[listening]))
    base_url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    async with httpx.AsyncClient(base_url=base_url, headers=HEADERS, timeout=PATIENCE_SECONDS) as http:

        async def fails(room: str, path: str, body: dict[str, Any]) -> None:
            reply = await http.post(path, json=body)
            assert reply.status_code == 500, (room, reply.status_code, reply.text)
            assert CANARY_TEXT not in reply.text
            broken.append(room)

        for run in ("sound", "fitted"):
            reply = await http.post(f"/runs/{run}/prompts", json={"prompts": [PROMPT]})
            assert reply.status_code == 200, reply.text
        ask = {"run": "sound", "prompts": [{"text": CANARY_TEXT, "answer": "a canary"}]}

        live = services.live_runs.at_head("sound").live
        live.state.mixture = None  # as no process would have it
        await fails("domain", "/predict", ask)
        services.live_runs.forget("sound")

        app.state.services = replace(services, live_runs=None)
        await fails("api", "/predict", ask)

        services.featurizer._embedders[("builtin", None)] = Quoting()
        app.state.services = services
        store.put_run("embedded", RunSettings(), now=datetime.now(timezone.utc))
        await fails("runtime", "/runs/embedded/prompts", {"prompts": [PROMPT]})

        fit = Worker(store, name="w", clock=lambda: datetime.now(timezone.utc), fit=quoting_fit)
        store.request_refit(store.run("fitted").id, now=datetime.now(timezone.utc))
        assert fit.work_once()
        assert CANARY_TEXT not in str(store.refits(store.run("fitted").id))
        broken.append("worker")

        with engine.execution_options(**{WRITES: True}).begin() as connection:
            if engine.dialect.name == "sqlite":
                connection.execute(
                    sql("CREATE TRIGGER t BEFORE INSERT ON prompts BEGIN SELECT RAISE(ABORT, 'broken'); END")
                )
            else:
                connection.execute(sql("ALTER TABLE prompts ADD CONSTRAINT broken CHECK (text IS NULL) NOT VALID"))
        await fails("storage", "/runs/sound/prompts", {"prompts": [{**PROMPT, "prompt_id": "b"}]})

    async def forgotten() -> None:
        raise KeyError(CANARY_TEXT, CANARY_KEY)

    task = asyncio.ensure_future(forgotten())
    await asyncio.sleep(0)
    del task
    server.should_exit = True
    await serving
    store.close()
    return broken


def ended() -> None:
    given = CANARY_TEXT + CANARY_KEY
    int(given)


if __name__ == "__main__":
    configure_logging("text", "DEBUG")
    text = logging.getLogger().handlers
    configure_logging("json", "DEBUG")
    logging.getLogger().handlers += text
    sys.stdout.write(" ".join(asyncio.run(broken(sys.argv[1]))))
    logging.getLogger("httpx").warning("sent %s to postgresql://user:canary@host/name", HEADERS)
    thread = threading.Thread(target=ended, name="thread")
    thread.start()
    thread.join()
    ended()
