"""Behind the proxies of `deploy`, each run is at home on one replica: it is in the memory of that one alone."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from benchmarks.nginx import NGINX, free_address, running_nginx
from tests.waiting import PATIENCE_SECONDS

from evenodds import Client
from evenodds.client import RUN_HEADER

if TYPE_CHECKING:
    from tests.conftest import Service

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
behind_nginx = pytest.mark.skipif(NGINX is None, reason="no nginx on this machine")
RUNS = [f"run-{i}" for i in range(16)]
PROMPTS = [f"p{i}" for i in range(4)]
SERVED = re.compile(r"run=(\S+) replica=(?:\S+, )?(\S+) status=200")


def train(client: Client, run: str) -> None:
    client.put_run(run, embedder="none", group_size=4)
    client.add_prompts(run, [{"prompt_id": i, "text": i} for i in PROMPTS])
    batch = client.select_batch(run, 0, 2)
    client.observe(run, 0, [{"prompt_id": p.prompt_id, "successes": 1, "attempts": 4} for p in batch.prompts])
    client.predict(run, PROMPTS)
    client.report(run)


def homes(log: Path) -> dict[str, set[str]]:
    """Addresses that answered for each run."""
    found = defaultdict(set)
    for run, replica in SERVED.findall(log.read_text()):
        found[run].add(replica)
    return dict(found)


def in_memory(service: Service) -> set[str]:
    return set(re.findall(r'^evenodds_run_head_lag\{run="([^"]+)"\}', service.http.get("/metrics").text, re.MULTILINE))


@pytest.mark.slow
@behind_nginx
@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_each_run_is_in_the_memory_of_one_replica_until_that_one_ends(
    start_service: Callable[[str], Service], database_url: str, tmp_path: Path
) -> None:
    replicas = {s.base_url.removeprefix("http://"): s for s in (start_service(database_url) for _ in range(2))}
    proxy = free_address()
    config = (DEPLOY / "nginx.conf").read_text()
    for shown, here in zip(("127.0.0.1:8001", "127.0.0.1:8002", "127.0.0.1:8000"), (*replicas, proxy), strict=True):
        assert config.count(shown) == 1
        config = config.replace(shown, here)
    log = tmp_path / "access.log"

    with running_nginx(config, tmp_path, proxy), Client(f"http://{proxy}", timeout_seconds=PATIENCE_SECONDS) as client:
        for run in RUNS:
            train(client, run)
        before = homes(log)
        forecasts = {run: client.predict(run, PROMPTS) for run in RUNS}
        held = {address: in_memory(service) for address, service in replicas.items()}
        nameless = {run for run, _ in SERVED.findall(log.read_text()) if run not in RUNS}
        ending = next(iter(before[RUNS[0]]))
        replicas.pop(ending).stop()
        log.write_text("")
        after_forecasts = {run: client.predict(run, PROMPTS) for run in RUNS}
        after = homes(log)

    (staying,) = replicas
    assert all(len(home) == 1 for home in before.values()), before
    assert {address for home in before.values() for address in home} == {ending, staying}, "both serve"
    assert held == {address: {run for run in RUNS if before[run] == {address}} for address in (ending, staying)}
    assert not nameless
    assert after == {run: {staying} for run in RUNS}
    assert after_forecasts == forecasts


def test_every_proxy_reads_the_header_that_the_client_sends() -> None:
    variable = RUN_HEADER.lower().replace("-", "_")
    values = (DEPLOY / "helm/evenodds/values.yaml").read_text()

    assert f"req.hdr({RUN_HEADER})" in (DEPLOY / "haproxy.cfg").read_text()
    assert f"map $http_{variable} $run" in (DEPLOY / "nginx.conf").read_text()
    assert f"nginx.ingress.kubernetes.io/upstream-hash-by: $http_{variable}" in values
