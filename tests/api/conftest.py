"""A caller with a run of its own, who speaks raw JSON and holds every refusal to the rules that all of them keep."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from evenodds import Client, Problem

if TYPE_CHECKING:
    from tests.conftest import Service

_numbers = itertools.count(1)


@dataclass(frozen=True)
class Caller:
    """One run of a service. `client` is the typed way in, `http` the raw one."""

    http: httpx.Client
    client: Client
    run: str

    def create(self, **settings: Any) -> dict[str, Any]:
        return self.ok("PUT", f"/runs/{self.run}", json=settings)

    def load(self, prompts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return self.ok("POST", f"/runs/{self.run}/prompts", json={"prompts": prompts})

    def load_texts(self, *names: str) -> None:
        """Prompts with these ids, each with a text of its own."""
        self.load([{"prompt_id": name, "text": f"What is {name}?"} for name in names])

    def observe(self, step: int, *observations: Mapping[str, Any], **more: Any) -> dict[str, Any]:
        return self.ok("POST", "/observe", json=self.observed(step, *observations, **more))

    def observed(self, step: int, *observations: Mapping[str, Any], **more: Any) -> dict[str, Any]:
        return {"run": self.run, "step": step, "observations": observations, **more}

    def select(self, step: int, batch_size: int, **more: Any) -> dict[str, Any]:
        body = {"run": self.run, "step": step, "batch_size": batch_size, **more}
        return self.ok("POST", "/select_batch", json=body)

    def chosen(self, step: int, batch_size: int, **more: Any) -> list[str]:
        """The ids of a selection."""
        return [prompt["prompt_id"] for prompt in self.select(step, batch_size, **more)["prompts"]]

    def predict(self, *prompt_ids: str, **more: Any) -> list[dict[str, Any]]:
        """The predictions for prompts of the pool."""
        body = {"run": self.run, "prompts": [{"prompt_id": i} for i in prompt_ids], **more}
        predictions: list[dict[str, Any]] = self.ok("POST", "/predict", json=body)["predictions"]
        return predictions

    def state(self) -> dict[str, Any] | None:
        """The run as it stands; None where there is none. When it was last active is saved behind the calls."""
        reply = self.http.get(f"/runs/{self.run}")
        return None if reply.status_code == 404 else {**reply.json(), "active_at": None}

    def ok(self, method: str, path: str, **request: Any) -> dict[str, Any]:
        reply = self.http.request(method, path, **request)
        assert reply.status_code in (200, 201), reply.text
        return dict(reply.json())

    def refused(self, method: str, path: str, **request: Any) -> Problem:
        """The problem that the service answers. It is problem+json, names the request, and nothing was written."""
        before = self.state()

        reply = self.http.request(method, path, **request)

        assert reply.status_code >= 400, reply.text
        assert reply.headers["content-type"] == "application/problem+json"
        problem = Problem.model_validate_json(reply.content)
        assert problem.status == reply.status_code
        assert problem.request_id == reply.headers["x-request-id"]
        assert problem.detail
        assert self.state() == before
        return problem


@pytest.fixture
def caller(service: Service) -> Caller:
    """With a run that computes no vectors and holds no prompts yet."""
    caller = Caller(service.http, service.client, run=f"run-{next(_numbers)}")
    caller.create(embedder="none")
    return caller
