"""A shared model crosses the store as bytes: exactly, without pickle, and only to whom it was fitted for."""

from __future__ import annotations

import json
import pickle
import struct
import sys
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.numpy import load, save

from evenodds_service.domain.learning.features import Basis
from evenodds_service.domain.learning.predictors import PAPER
from evenodds_service.domain.prompts import FittedPrior, RawBlock
from evenodds_service.domain.settings import PredictorName
from evenodds_service.errors import SnapshotUnusable, TorchMissing
from evenodds_service.model import paper_fit, paper_network
from evenodds_service.model.history import History
from evenodds_service.model.ngrams import NGRAMS, ngram_matrix
from evenodds_service.model.paper_fit import fit_paper, predict_paper
from evenodds_service.model.paper_network import NetworkSize, size_of
from evenodds_service.model.refit import TrainingData, fit_shared_model
from evenodds_service.model.snapshot import FORMAT, PAPER_CONTEXT, SharedModel
from evenodds_service.model.surface import surface_features

EMBEDDER = "caller"
N, D, G = 60, 5, 8
TEXTS = [f"{'Prove' if i % 2 else 'Compute'} something about the number {i}." for i in range(N)]
NEW = ["Prove something about a triangle.", "Compute something about a circle.", None]


def block_of(texts: list[str | None]) -> RawBlock:
    n = len(texts)
    surface = surface_features([text or "" for text in texts])
    return RawBlock(
        first=0,
        prompt_ids=tuple(f"p{i}" for i in range(n)),
        groups=(None,) * n,
        numeric=(None,) * n,
        prior_rates_N=np.full(n, np.nan, np.float32),
        surface_N_S=surface.astype(np.float32),
        embedding_N_D=np.random.default_rng(n).normal(size=(n, D)).astype(np.float32),
    )


def training_data(predictor: PredictorName = "gps", *, n_observed: int = N, group_size: int = G) -> TrainingData:
    """Prove is mostly not solved and Compute mostly is, in two steps."""
    block = block_of(list(TEXTS))
    basis = Basis.of(block)
    prompts = np.arange(n_observed)
    successes = np.where(prompts % 2, prompts % 3, G - prompts % 4).astype(np.float64)
    history = History(
        prompts=prompts,
        steps=prompts * 2 // N,
        successes=successes,
        attempts=np.full(n_observed, float(G)),
        informative=(successes > 0) & (successes < G),
    )
    return TrainingData(
        embedder=EMBEDDER,
        predictor=predictor,
        group_size=group_size,
        basis=basis,
        x_N_d=basis.project(block),
        embeddings_N_D=block.embedding_N_D,
        ngrams=ngram_matrix(TEXTS),
        history=history,
    )


def fitted(data: TrainingData) -> SharedModel:
    return fit_shared_model(data, device=torch.device("cpu"))


@pytest.fixture(scope="module", autouse=True)
def few_updates() -> Iterator[None]:
    """The published model learns little from a batch: enough to differ, and soon done."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paper_fit, "UPDATES_PER_STEP", 2)
        yield


@pytest.fixture(scope="module")
def models(few_updates: None) -> dict[str, SharedModel]:
    """By predictor."""
    return {"gps": fitted(training_data("gps")), "gps-paper": fitted(training_data("gps-paper"))}


@pytest.fixture(scope="module", params=["gps", "gps-paper"])
def model(request: pytest.FixtureRequest, models: dict[str, SharedModel]) -> SharedModel:
    return models[request.param]


def test_a_model_comes_back_from_its_bytes(model: SharedModel) -> None:
    back = SharedModel.from_bytes(model.to_bytes(), embedder=EMBEDDER)

    assert (back.embedder, back.group_size, back.report) == (EMBEDDER, G, model.report)
    assert back.priors.keys() == model.priors.keys()
    assert back.weights.keys() == model.weights.keys()
    for name, weights in model.weights.items():
        assert back.weights[name].keys() == weights.keys()
        for part, array in weights.items():
            np.testing.assert_array_equal(back.weights[name][part], array)
    for name, prior in model.priors.items():
        np.testing.assert_allclose(back.priors[name].means_N, prior.means_N, atol=3e-4)
        np.testing.assert_allclose(back.priors[name].concentrations_N, prior.concentrations_N, rtol=1e-3)
    (ours, our_arrays), (theirs, their_arrays) = model.basis.to_arrays(), back.basis.to_arrays()
    assert theirs == ours
    for name, array in our_arrays.items():
        np.testing.assert_array_equal(their_arrays[name], array)


def test_bytes_taken_twice_are_the_same(model: SharedModel) -> None:
    content = model.to_bytes()

    assert SharedModel.from_bytes(content, embedder=EMBEDDER).to_bytes() == content


def test_a_model_predicts_the_same_after_its_bytes(model: SharedModel) -> None:
    block = block_of(list(NEW))

    ours = model.predict(NEW, block)
    theirs = SharedModel.from_bytes(model.to_bytes(), embedder=EMBEDDER).predict(NEW, block)

    assert ours.keys() == theirs.keys() == model.priors.keys()
    for name, prior in ours.items():
        np.testing.assert_array_equal(prior.means_N, theirs[name].means_N)
        np.testing.assert_array_equal(prior.concentrations_N, theirs[name].concentrations_N)
        assert ((prior.means_N > 0) & (prior.means_N < 1)).all()
        assert (prior.concentrations_N > 0).all()


def test_without_torch_only_the_published_model_cannot_speak_of_other_prompts(
    models: dict[str, SharedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)

    assert models["gps"].predict(NEW, block_of(list(NEW))).keys() == models["gps"].priors.keys()
    with pytest.raises(TorchMissing, match=r"install evenodds\[service\] there, or load the prompts into the pool"):
        models["gps-paper"].predict(NEW, block_of(list(NEW)))


@pytest.mark.parametrize("predictor", ["gps", "gps-paper"])
def test_a_fit_is_deterministic(models: dict[str, SharedModel], predictor: PredictorName) -> None:
    assert fitted(training_data(predictor)).to_bytes() == models[predictor].to_bytes()


def test_a_model_knows_what_tells_hard_from_easy(models: dict[str, SharedModel]) -> None:
    (ngrams, latent) = (models["gps"].priors[name].means_N for name in ("ngrams", "latent"))
    told = models["gps"].predict(NEW, block_of(list(NEW)))["ngrams"].means_N

    assert ngrams[1::2].mean() < 0.5 < ngrams[0::2].mean()
    assert latent[1::2].mean() < 0.5 < latent[0::2].mean()
    assert told[0] < told[1]


def test_with_too_little_to_learn_from_a_model_has_no_priors() -> None:
    model = fitted(training_data(n_observed=20))

    assert dict(model.priors) == {}
    assert model.predict(NEW, block_of(list(NEW))) == {}
    assert SharedModel.from_bytes(model.to_bytes(), embedder=EMBEDDER).priors == {}


def test_single_attempts_are_enough_to_learn_from() -> None:
    given = training_data()
    single = replace(
        given,
        group_size=1,
        history=replace(
            given.history,
            successes=(given.history.successes > 4).astype(np.float64),
            attempts=np.ones(N),
            informative=np.zeros(N, dtype=bool),
        ),
    )

    model = fitted(single)

    assert model.priors.keys() == {"ngrams", "latent"}
    for prior in model.priors.values():
        assert np.isfinite([prior.means_N, prior.concentrations_N]).all()


def test_the_published_model_goes_on_from_the_one_before(models: dict[str, SharedModel]) -> None:
    given = training_data("gps-paper")
    later = replace(given.history, steps=given.history.steps + 2)

    model = fitted(replace(given, history=History.gathered([given.history, later]), warm_start=models["gps-paper"]))

    assert model.last_step == model.report["paper.last_step"] == 3
    np.testing.assert_array_equal(model.weights["paper context"]["successes_C"], later.successes[N // 2 :])
    moved = [
        not np.array_equal(array, models["gps-paper"].weights[PAPER][k]) for k, array in model.weights[PAPER].items()
    ]
    assert any(moved)


def test_a_published_model_of_another_size_starts_anew_on_the_whole_history(
    models: dict[str, SharedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    larger = NetworkSize(width=96)  # an update of twenty million weights takes a second
    monkeypatch.setattr(paper_network, "PUBLISHED", larger)
    given = replace(training_data("gps-paper"), model_size="published")

    after_small = fitted(replace(given, warm_start=models["gps-paper"]))

    assert size_of(after_small.weights[PAPER]) == larger
    cold = fitted(given)
    for name, array in after_small.weights[PAPER].items():
        np.testing.assert_array_equal(array, cold.weights[PAPER][name])


def test_a_published_model_says_of_a_text_what_it_says_of_the_pools_prompt(models: dict[str, SharedModel]) -> None:
    model = models["gps-paper"]

    told = model.predict(list(TEXTS), block_of(list(TEXTS)))[PAPER]

    np.testing.assert_allclose(told.means_N, model.priors[PAPER].means_N, atol=1e-4)


def test_a_published_model_of_an_earlier_release_which_saw_embeddings_alone_is_used_and_then_fitted_anew() -> None:
    given = training_data("gps-paper")
    batches = given.history.batches()
    rows = given.embeddings_N_D
    weights = fit_paper(batches, rows, seed=0, device=torch.device("cpu")).weights
    context = {
        "embeddings_C_D": rows[batches[-1].prompts],
        "successes_C": batches[-1].successes,
        "attempts_C": batches[-1].attempts,
    }
    older = replace(fitted(given), weights={PAPER: weights, PAPER_CONTEXT: context})

    told = older.predict(list(TEXTS), block_of(list(TEXTS)))[PAPER]
    anew = fitted(replace(given, warm_start=older))

    expected = predict_paper(weights, batches[-1], rows, rows, seed=0, device=torch.device("cpu"))
    np.testing.assert_allclose(told.means_N, expected, atol=1e-4)
    cold = fitted(given)
    for name, array in anew.weights[PAPER].items():
        np.testing.assert_array_equal(array, cold.weights[PAPER][name])


def test_the_bytes_are_safetensors_and_no_pickle(model: SharedModel) -> None:
    content = model.to_bytes()

    (length,) = struct.unpack("<Q", content[:8])
    described = json.loads(content[8 : 8 + length])
    assert {"header", "basis/means"} < described.keys()
    with pytest.raises(pickle.UnpicklingError):
        pickle.loads(content)


class Bomb:
    """Would be made by whoever unpickles it."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return pytest.fail, ("a pickle was loaded",)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no snapshot",
        pickle.dumps(Bomb()),
        pickle.dumps({"header": np.zeros(3)}),
        save({"weights": np.zeros(3)}),
        save({"header": np.frombuffer(b"no json", dtype=np.uint8)}),
        save({"header": np.frombuffer(b"[1, 2]", dtype=np.uint8)}),
        save({"header": np.frombuffer(b"{}", dtype=np.uint8)}),
    ],
    ids=["nothing", "text", "bomb", "pickle", "no header", "no JSON", "a list", "an empty header"],
)
def test_other_bytes_are_refused(content: bytes) -> None:
    with pytest.raises(SnapshotUnusable, match=rf"(?s)^{len(content)} bytes are no snapshot \(.*\): refit the run$"):
        SharedModel.from_bytes(content, embedder=EMBEDDER)


def test_bytes_cut_short_are_refused(model: SharedModel) -> None:
    content = model.to_bytes()

    with pytest.raises(SnapshotUnusable, match="bytes are no snapshot"):
        SharedModel.from_bytes(content[:-1], embedder=EMBEDDER)


def test_a_snapshot_of_another_embedder_is_refused_with_both_names(model: SharedModel) -> None:
    with pytest.raises(SnapshotUnusable) as caught:
        SharedModel.from_bytes(model.to_bytes(), embedder="builtin")

    assert str(caught.value) == (
        "the snapshot was fitted on embedder 'caller', the run's vectors come from 'builtin': refit the run"
    )
    assert caught.value.code == "snapshot_unusable"


def test_a_snapshot_of_another_format_is_refused(model: SharedModel) -> None:
    arrays = load(model.to_bytes())
    header = json.loads(arrays["header"].tobytes()) | {"format": FORMAT + 1}
    arrays["header"] = np.frombuffer(json.dumps(header).encode(), dtype=np.uint8)

    message = f"^the snapshot has format {FORMAT + 1}, this release reads {FORMAT}: refit the run$"
    with pytest.raises(SnapshotUnusable, match=message):
        SharedModel.from_bytes(save(arrays), embedder=EMBEDDER)


def test_a_model_takes_over_an_equal_basis_and_what_that_projected(model: SharedModel) -> None:
    block, own = block_of(list(TEXTS)), block_of(list(NEW))
    equal, other = Basis.of(block), Basis.of(block_of(list(TEXTS[:-1])))

    found = model.on(equal)

    assert found.basis is equal
    assert model.on(other) is model
    told, alone = found.predict(NEW, own, equal.project(own)), model.predict(NEW, own)
    for name, prior in alone.items():
        assert np.array_equal(told[name].means_N, prior.means_N)
        assert np.array_equal(told[name].concentrations_N, prior.concentrations_N)


def test_a_published_model_that_has_its_newest_step_among_its_figures_knows_it(models: dict[str, SharedModel]) -> None:
    arrays = load(models["gps-paper"].to_bytes())
    header = json.loads(arrays["header"].tobytes())
    assert header.pop("last_step") == 1
    arrays["header"] = np.frombuffer(json.dumps(header).encode(), dtype=np.uint8)

    assert SharedModel.from_bytes(save(arrays), embedder=EMBEDDER).last_step == 1


def test_a_snapshot_of_other_columns_is_refused_with_both_names(model: SharedModel) -> None:
    arrays = load(model.to_bytes())
    header = json.loads(arrays["header"].tobytes()) | {"ngrams": "ngrams/0"}
    arrays["header"] = np.frombuffer(json.dumps(header).encode(), dtype=np.uint8)

    with pytest.raises(SnapshotUnusable) as caught:
        SharedModel.from_bytes(save(arrays), embedder=EMBEDDER)

    assert str(caught.value) == (
        f"the snapshot was fitted on columns 'ngrams/0', this release has {NGRAMS!r}: refit the run"
    )


def test_priors_cross_in_half_precision() -> None:
    means = np.array([0.0001, 0.25, 0.9999], dtype=np.float32)
    prior = FittedPrior(means, np.array([0.05, 2.0, 64.0], dtype=np.float32))
    model = replace(fitted(training_data(n_observed=0)), priors={"ngrams": prior})

    back = SharedModel.from_bytes(model.to_bytes(), embedder=EMBEDDER).priors["ngrams"]

    assert back.means_N.dtype == back.concentrations_N.dtype == np.float32
    np.testing.assert_array_equal(back.means_N, means.astype(np.float16))
