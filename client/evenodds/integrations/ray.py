"""Ray: the service and its refits on a cluster that a trainer has already (verl, SkyRL, NeMo-RL, OpenRLHF, slime).

    base_url = start("sqlite:////shared/evenodds.db", num_gpus=0.5)

The service is a detached, named actor: it outlives the driver, and a driver that starts again finds it under its name.
What it knows is in the database, on a path or a PostgreSQL that all who may run it reach. `evenodds[service]` has to be
installed where it runs.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from evenodds.client import Client
from evenodds.errors import ConfigurationError, EvenOddsError

NAME = "evenodds"
_START_RETRIES = 30


def start(
    database_url: str,
    *,
    name: str = NAME,
    host: str = "127.0.0.1",
    port: int = 8000,
    num_gpus: float = 0.0,
    look_seconds: float = 30.0,
    environment: Mapping[str, str] | None = None,
    scheduling_strategy: Any = None,
) -> str:
    """Start the service on the cluster that this process is connected to, or find it. Returns its base URL.

    Where it runs already, it stays as it was started, whatever the arguments.

    Args:
        database_url: `sqlite:////path/evenodds.db` or `postgresql://...`; the path must outlive the actor's node if
            that may go.
        name: Of the actor, in the namespace `evenodds`. One for each service.
        host: Where it listens. On loopback only processes of its node reach it; any other address asks for API keys,
            which `evenodds keys create` makes, unless `environment` says EVENODDS_ACCESS=open.
        port: Where it listens; it must be free there.
        num_gpus: Of a refit, which is a task of its own and holds them only while it works. 0 is a CPU.
        look_seconds: Between two looks at whether there is something new to fit.
        environment: Further EVENODDS_* settings of the service and its refits.
        scheduling_strategy: Where the actor is placed, as Ray has it; by default on the node of this process.

    Raises:
        ConfigurationError: Ray is not initialised, or the service does not start; its last words are in the message.
    """
    if not ray.is_initialized():
        raise ConfigurationError("Ray is not initialised: connect to the cluster first, with ray.init()")
    if scheduling_strategy is None:
        here = ray.get_runtime_context().get_node_id()
        scheduling_strategy = NodeAffinitySchedulingStrategy(node_id=here, soft=False)
    settings = {
        **(environment or {}),
        "EVENODDS_DATABASE_URL": database_url,
        "EVENODDS_HOST": host,
        "EVENODDS_PORT": str(port),
    }
    actor = _Service.options(  # type: ignore[attr-defined]  # what the decorator adds
        name=name,
        namespace=NAME,
        lifetime="detached",
        get_if_exists=True,
        max_restarts=-1,
        scheduling_strategy=scheduling_strategy,
    ).remote(settings, num_gpus, look_seconds)
    try:
        base_url: str = ray.get(actor.base_url.remote())
    except ray.exceptions.RayActorError as error:
        raise ConfigurationError(f"the service {name!r} did not start: {error}") from error
    return base_url


def stop(name: str = NAME) -> None:
    """End the service, wherever it runs. What it knows stays in the database. Repeating is safe."""
    try:
        actor = ray.get_actor(name, namespace=NAME)
    except ValueError:
        return
    ray.get(actor.stop.remote())
    ray.kill(actor, no_restart=True)


@ray.remote(num_cpus=0)
class _Service:
    """`evenodds serve` as a process of the actor's, started again whenever it ends, and refits as tasks."""

    def __init__(self, settings: Mapping[str, str], num_gpus: float, look_seconds: float) -> None:
        self._environment = {**os.environ, **settings}
        self._stopped = threading.Event()
        host = settings["EVENODDS_HOST"]
        reached = ray.util.get_node_ip_address() if host in ("0.0.0.0", "::") else host
        self._base_url = f"http://{reached}:{settings['EVENODDS_PORT']}"
        self._refit = _refit.options(num_gpus=num_gpus)
        self._process = self._started()
        threading.Thread(target=self._keep_running, daemon=True).start()
        threading.Thread(target=self._refit_what_is_new, args=(look_seconds,), daemon=True).start()

    def base_url(self) -> str:
        return self._base_url

    def pid(self) -> int:
        """Of the service's process."""
        return self._process.pid

    def stop(self) -> None:
        self._stopped.set()
        self._process.terminate()
        self._process.wait()

    def _started(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "evenodds_service"]
        if not self._environment["EVENODDS_DATABASE_URL"].startswith("sqlite"):
            subprocess.run([*command, "migrate"], env=self._environment, check=True)
        process = subprocess.Popen([*command, "serve"], env=self._environment, stderr=subprocess.PIPE)
        try:
            with Client(self._base_url, retries=_START_RETRIES) as client:
                client.healthz()
        except EvenOddsError as error:
            process.kill()
            said = process.communicate()[1].decode(errors="replace")
            raise ConfigurationError(f"{error}; the process wrote: {said[-2_000:]}") from error
        assert process.stderr is not None
        threading.Thread(target=_pass_on, args=(process.stderr,), daemon=True).start()
        return process

    def _keep_running(self) -> None:
        while not self._stopped.is_set():
            self._process.wait()
            if not self._stopped.wait(1.0):
                try:
                    self._process = self._started()
                except (ConfigurationError, subprocess.CalledProcessError) as error:
                    sys.stderr.write(f"evenodds: {error}\n")

    def _refit_what_is_new(self, look_seconds: float) -> None:
        """A refit decides itself what is due; none is started where nothing was observed since the last one."""
        fitted: dict[str, int] = {}
        while not self._stopped.wait(look_seconds):
            fitted = self._refitted(fitted)

    def _refitted(self, fitted: dict[str, int]) -> dict[str, int]:
        """The number of observations of each run that were there at the newest refit."""
        try:
            with Client(self._base_url, api_key=self._environment.get("EVENODDS_API_KEY")) as client:
                seen = {run.run: run.observations for run in client.runs()}
            if any(n and fitted.get(run) != n for run, n in seen.items()):
                ray.get(self._refit.remote(self._environment))
                fitted = seen
        except Exception as error:  # whatever it is, the next look may find it gone
            sys.stderr.write(f"evenodds: no refit: {error}\n")
        return fitted


@ray.remote(num_cpus=1)  # type: ignore[untyped-decorator]  # ray is not installed where this is checked
def _refit(environment: Mapping[str, str]) -> None:
    """Fit what is due, on the device that Ray gave to this task."""
    given = {name: os.environ[name] for name in ("CUDA_VISIBLE_DEVICES",) if name in os.environ}
    command = [sys.executable, "-m", "evenodds_service", "work", "--once"]
    subprocess.run(command, env={**environment, **given}, check=True)


def _pass_on(lines: Any) -> None:
    """The service's log becomes the actor's, which Ray keeps."""
    for line in lines:
        sys.stderr.write(line.decode(errors="replace"))
