"""The settings of a process with their defaults, and the only reader of the environment: `EVENODDS_*` variables."""

from __future__ import annotations

import re
from collections.abc import Mapping
from difflib import get_close_matches
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from evenodds import TextRule

_HOST = r"(?:[\w-]+(?:\.[\w-]+)*|\[[0-9A-Fa-f:.]+\])"
_NOT_SETTINGS = frozenset({"EVENODDS_API_KEY", "EVENODDS_REPLICAS"})
"""Of the client, and of docker-compose.yml."""


class Settings(BaseModel):
    """Settings of a process. What is not given has its default, whatever the environment says."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str = Field(default="127.0.0.1", description="address that the service listens on")
    port: int = Field(default=8000, ge=0, le=65_535, description="port that the service listens on; 0 takes a free one")
    database_url: str = Field(
        default="sqlite:///evenodds.db", description="sqlite:///FILE or postgresql://user:password@host/database"
    )
    pool_size: int = Field(default=10, ge=1, le=1_000, description="database connections of one process")
    access: Literal["auto", "keys", "open"] = Field(
        default="auto", description="who may call: auto requires API keys unless the service listens on loopback only"
    )
    allowed_hosts: str | None = Field(
        default=None,
        description="names that requests may give in Host, besides those of loopback, separated by commas; * allows "
        "any. None: loopback's alone where it listens on loopback, else any. Elsewhere than on loopback probes and "
        "scrapes may give any",
    )
    allowed_origins: str | None = Field(
        default=None, description="origins (https://host:port) whose web pages may call, separated by commas"
    )
    root_path: str | None = Field(
        default=None,
        description="path under which a proxy shows the service, such as /evenodds, whether it takes it off or not",
    )
    trusted_proxies: str | None = Field(
        default=None,
        description="addresses or networks (10.0.0.0/8) of proxies whose X-Forwarded-Prefix counts instead of "
        "root_path, separated by commas",
    )
    database_timeout_seconds: float = Field(
        default=10.0, gt=0, le=3_600, description="longest wait of a request for a lock, or for one statement"
    )
    max_body_mb: int = Field(
        default=64, ge=1, le=2_000, description="most millions of bytes of a request's body after decompression"
    )
    max_bodies_mb: int = Field(
        default=256, ge=1, le=100_000, description="most millions of bytes of the bodies of all requests at a time"
    )
    max_step_jump: int = Field(
        default=100_000,
        ge=1,
        le=2**53,
        description="most steps that a run may advance at once without confirm_step=true",
    )
    live_runs: int = Field(default=32, ge=1, le=10_000, description="most runs whose state one process keeps in memory")
    snapshots: int = Field(
        default=32,
        ge=1,
        le=1_000_000,
        description="most of its newest snapshots that a run keeps, for rewinds; older ones are dropped, save where a "
        "checkpoint needs one",
    )
    predict_staleness_ms: float = Field(
        default=0.0, ge=0, le=60_000, description="how far behind the log /predict may answer; 0 is exact"
    )
    budget_staleness_ms: float = Field(
        default=200.0, ge=0, le=60_000, description="how far behind the log /budget may answer; 0 is exact"
    )
    budget_deadline_ms: float = Field(
        default=500.0, gt=0, le=60_000, description="time after which a request for a budget is given up"
    )
    budget_queue: int = Field(
        default=256, ge=1, le=100_000, description="most requests for a budget that may wait at a time"
    )
    decisions: int = Field(
        default=500_000,
        ge=0,
        le=100_000_000,
        description="most decisions on budgets that the database keeps for verdicts, for 24 hours; 0 keeps none, and "
        "budgets have no decision_id",
    )
    text_rule: TextRule | None = Field(
        default=None,
        description="which text of a conversation /v1/chat/completions judges: JSON with fields of evenodds.TextRule",
    )
    embedders: str | None = Field(
        default=None,
        description="models that runs may name as their embedder besides the built-in one, separated by commas: names "
        "on the hub of sentence-transformers models, which are downloaded when first used, or folders",
    )
    worker_lease_seconds: float = Field(
        default=60.0,
        gt=0,
        le=3_600,
        description="time after which another worker takes over the refit of a worker that gives no sign of life",
    )
    worker_poll_seconds: float = Field(default=1.0, gt=0, le=3_600, description="how often a worker looks for work")
    log_format: Literal["json", "text"] | None = Field(
        default=None, description="format of log lines: text at a terminal, else json"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="least level of a log line; a request is info"
    )
    telemetry: bool = Field(default=False, description="send OpenTelemetry traces by OTLP, as the variables OTEL_* say")
    device: str | None = Field(default=None, description="torch device of the worker; CUDA where there is one")
    data: str | None = Field(
        default=None, description="folder of recorded success rates that `evenodds replay` takes if it is given none"
    )

    def allowed_embedders(self) -> tuple[str, ...]:
        """The names in `embedders`."""
        return _names(self.embedders)

    def host_names(self) -> tuple[str, ...]:
        """The names in `allowed_hosts`."""
        return _names(self.allowed_hosts)

    def origins(self) -> tuple[str, ...]:
        """The origins in `allowed_origins`, as browsers send them."""
        return tuple(name.lower() for name in _names(self.allowed_origins))

    def proxies(self) -> tuple[IPv4Network | IPv6Network, ...]:
        """The networks in `trusted_proxies`."""
        return tuple(ip_network(name) for name in _names(self.trusted_proxies))

    @field_validator("root_path")
    @classmethod
    def _is_path(cls, path: str | None) -> str | None:
        if path is not None and not re.fullmatch(r"(/[A-Za-z0-9._~-]+)*", path):
            raise ValueError(f"{path!r} is not a path: begin each part with a slash and end with none, as in /evenodds")
        return path

    @field_validator("trusted_proxies")
    @classmethod
    def _are_networks(cls, listed: str | None) -> str | None:
        try:
            for name in _names(listed):
                ip_network(name)
        except ValueError as error:
            raise ValueError(f"{error}: name addresses or networks, such as 10.0.0.0/8") from error
        return listed

    @field_validator("allowed_hosts")
    @classmethod
    def _are_hosts(cls, listed: str | None) -> str | None:
        for name in _names(listed):
            if name != "*" and not re.fullmatch(_HOST, name):
                raise ValueError(
                    f"{name!r} is not the name of a host: write it without scheme, port and slash, such as "
                    "evenodds.example.com, or * for any"
                )
        return listed

    @field_validator("allowed_origins")
    @classmethod
    def _are_origins(cls, listed: str | None) -> str | None:
        for name in _names(listed):
            if not re.fullmatch(rf"https?://{_HOST}(:\d{{1,5}})?", name.lower()):
                raise ValueError(
                    f"{name!r} is not an origin: write scheme and host, a port where it is not the scheme's own, and "
                    "no slash behind it, such as https://dash.example.com or http://localhost:9000"
                )
        return listed


def _names(listed: str | None) -> tuple[str, ...]:
    return tuple(name.strip() for name in (listed or "").split(",") if name.strip())


class _FromEnvironment(Settings, BaseSettings):
    model_config = SettingsConfigDict(env_prefix="EVENODDS_", frozen=True)


def unknown_variables(environment: Mapping[str, str]) -> tuple[str, ...]:
    """Sentences about variables that look like settings of the service and are none."""
    known = [f"EVENODDS_{name.upper()}" for name in Settings.model_fields]
    said = []
    for name in sorted(environment):
        if not name.startswith("EVENODDS_") or name in known or name in _NOT_SETTINGS:
            continue
        likely = get_close_matches(name, known, n=1, cutoff=0.8)
        hint = f"did you mean {likely[0]}?" if likely else "it has no effect"
        said.append(f"{name} is not a setting of the service: {hint}")
    return tuple(said)


def settings_from_environment() -> Settings:
    """The settings of this process: every field is an environment variable with the prefix `EVENODDS_`.

    Raises:
        pydantic.ValidationError: a variable has a value that its setting cannot have.
    """
    return _FromEnvironment()
