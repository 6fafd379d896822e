from __future__ import annotations

from collections.abc import Iterator

import pytest

from evenodds_service.model.embedder import Embedder, open_embedder


@pytest.fixture(scope="session")
def builtin() -> Embedder:
    return open_embedder("builtin")


@pytest.fixture(scope="session")
def offline() -> Iterator[None]:
    """No model hub for the libraries that are imported under this fixture."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("HF_HUB_OFFLINE", "1")
        yield


@pytest.fixture(scope="session")
def minilm(minilm_folder: str, offline: None) -> Embedder:
    return open_embedder(minilm_folder)


@pytest.fixture(params=["builtin", "minilm"])
def embedder(request: pytest.FixtureRequest) -> Embedder:
    opened: Embedder = request.getfixturevalue(request.param)
    return opened
