"""A published model is an entry of the log: every service uses it from that position on, and none before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from tests.backends import mainly_sqlite

from evenodds_service.model.refit import TrainingData
from evenodds_service.model.snapshot import PAPER_CONCENTRATION, SharedModel

if TYPE_CHECKING:
    from tests.conftest import Service
    from tests.worker.conftest import Bench

    from evenodds import Client, PredictReply

NEW: list[Any] = [{"text": "Prove something about a triangle."}, {"text": "Compute something about a circle."}]
KNOWN: list[Any] = [f"p{i}" for i in range(160)]


def finite(reply: PredictReply) -> bool:
    return all(
        0 < p.success_rate < 1
        and 0 < p.std < 0.6
        and 0 <= p.interval[0] < p.interval[1] <= 1
        and 0 <= p.informative_probability <= 1
        for p in reply.predictions
    )


@pytest.mark.parametrize("predictor", ["gps", "gps-paper"])
@pytest.mark.usefixtures("few_updates")
def test_every_service_switches_at_the_same_position_and_answers_alike(
    bench: Bench, start_service: Callable[[str], Service], predictor: str
) -> None:
    one, two = (start_service(bench.database_url).client for _ in range(2))
    bench.learned("math", predictor=predictor)
    before = one.predict("math", [*KNOWN, *NEW])

    bench.worker().work_once()
    after = [client.predict("math", [*KNOWN, *NEW]) for client in (one, two, start_service(bench.database_url).client)]

    assert (before.model_version, after[0].model_version) == (0, 1)
    assert after[0].log_position == before.log_position + 1
    assert after == [after[0]] * 3
    assert all(
        new.success_rate != old.success_rate for new, old in zip(after[0].predictions, before.predictions, strict=True)
    )
    assert finite(after[0])


def test_services_that_take_turns_over_several_snapshots_fold_the_same_history(
    bench: Bench, start_service: Callable[[str], Service]
) -> None:
    one, two = (start_service(bench.database_url).client for _ in range(2))
    bench.learned("math")
    worker = bench.worker()

    for step, client in enumerate((one, two, one), start=4):
        bench.store.request_refit(bench.store.run("math").id, now=bench.clock())
        worker.work_once()
        learn(client, step)
        bench.load("math", 10, first=150 + 10 * step)
    predicted = [client.predict("math", [*KNOWN, "p219", *NEW]) for client in (one, two)]
    chosen = one.select_batch("math", 9, 16)

    assert predicted[0] == predicted[1]
    assert predicted[0].model_version == chosen.model_version == one.run("math").model_version == 3
    assert chosen == two.select_batch("math", 9, 16).model_copy(update={"replayed": False})


def learn(client: Client, step: int) -> None:
    batch = client.select_batch("math", step, 16)
    rows = [{"prompt_id": p.prompt_id, "successes": int(p.prompt_id[1:]) % 9, "attempts": 8} for p in batch.prompts]
    assert client.observe("math", step, rows, selection_id=batch.selection_id).model_version == batch.model_version


@mainly_sqlite
def test_the_published_model_is_the_belief_about_known_prompts_and_new_texts(
    bench: Bench, start_service: Callable[[str], Service]
) -> None:
    client = start_service(bench.database_url).client
    bench.learned("paper", 60, 60, predictor="gps-paper")
    flat = client.predict("paper", ["p0", *NEW])
    bench.store.request_refit(bench.store.run("paper").id, now=bench.clock())
    bench.worker().work_once()

    reply = client.predict("paper", [*KNOWN[:60], *NEW])

    assert [p.success_rate for p in flat.predictions] == [0.5] * 3
    snapshot = bench.store.snapshot(bench.store.run("paper").id, 1)
    model = SharedModel.from_bytes(snapshot.weights, embedder=snapshot.embedder)
    known = [p.success_rate for p in reply.predictions[:60]]
    assert known == pytest.approx(model.priors["paper"].means_N.tolist(), abs=1e-6)
    stds = [(p * (1 - p) / (PAPER_CONCENTRATION + 1)) ** 0.5 for p in known]
    assert [p.std for p in reply.predictions[:60]] == pytest.approx(stds)
    assert known[1::2] < known[0::2]
    prove, compute = (p.success_rate for p in reply.predictions[60:])
    assert prove < compute


@mainly_sqlite
@pytest.mark.usefixtures("few_updates")
def test_a_gps_paper_run_trains_from_the_first_batch_on(bench: Bench, start_service: Callable[[str], Service]) -> None:
    client = start_service(bench.database_url).client
    client.put_run("paper", predictor="gps-paper", refit={"every_observations": 8})
    client.add_prompts("paper", [{"prompt_id": f"p{i}", "text": f"Compute the number {i}."} for i in range(40)])
    worker = bench.worker()
    versions = []

    for step in range(4):
        batch = client.select_batch("paper", step, 8)
        rows = [{"prompt_id": p.prompt_id, "successes": int(p.prompt_id[1:]) % 9, "attempts": 8} for p in batch.prompts]
        client.observe("paper", step, rows, selection_id=batch.selection_id)
        assert worker.work_once()
        versions.append(batch.model_version)

    run = client.run("paper")
    assert (run.acquisition, run.predictor) == ("paper", "gps-paper")
    assert versions == [0, 1, 2, 3]
    newest = client.refits("paper").refits[0]
    assert newest.report is not None
    assert newest.report["paper.last_step"] == 3
    assert -2 < newest.report["paper.elbo_per_attempt"] < 0


@mainly_sqlite
@pytest.mark.parametrize("predictor", ["gps", "gps-paper"])
@pytest.mark.usefixtures("few_updates")
def test_prompts_newer_than_the_snapshot_are_answered_and_chosen(
    bench: Bench, start_service: Callable[[str], Service], predictor: str
) -> None:
    client = start_service(bench.database_url).client
    bench.learned("math", predictor=predictor)
    bench.worker().work_once()

    client.add_prompts("math", [{"prompt_id": f"late{i}", "text": f"Prove that {i} is late."} for i in range(8)])
    client.add_prompts("math", [{"prompt_id": "nameless"}])
    late = [f"late{i}" for i in range(8)]
    reply = client.predict("math", [*KNOWN, *late, "nameless", *NEW])
    chosen = client.select_batch("math", 9, 9, candidates=[*late, "nameless"])

    assert reply.model_version == 1
    assert finite(reply)
    assert {p.prompt_id for p in chosen.prompts} == {*late, "nameless"}
    client.observe("math", 9, [{"prompt_id": i, "successes": 0, "attempts": 8} for i in late])
    assert finite(client.predict("math", [*KNOWN, *late, *NEW]))


@mainly_sqlite
def test_a_snapshot_of_another_embedder_is_logged_and_the_answers_are_as_without_one(
    bench: Bench, start_service: Callable[[str], Service], caplog: pytest.LogCaptureFixture
) -> None:
    client = start_service(bench.database_url).client
    bench.learned("math")
    before = client.predict("math", [*KNOWN, *NEW])

    def fit(data: TrainingData) -> SharedModel:
        return replace(bench.real(data), embedder="another-model")

    bench.worker(fit).work_once()
    replies = [c.predict("math", [*KNOWN, *NEW]) for c in (client, start_service(bench.database_url).client)]

    assert [reply.predictions for reply in replies] == [before.predictions] * 2
    assert (replies[0].model_version, replies[0].log_position) == (1, before.log_position + 1)
    (refused,) = {message for message in caplog.messages if "another-model" in message}
    assert "the snapshot was fitted on embedder 'another-model', the run's vectors come from 'builtin" in refused


@mainly_sqlite
def test_after_an_unusable_snapshot_the_next_one_is_used(bench: Bench, start_service: Callable[[str], Service]) -> None:
    client = start_service(bench.database_url).client
    bench.learned("math")

    def fit(data: TrainingData) -> SharedModel:
        return replace(bench.real(data), embedder="another-model")

    bench.worker(fit).work_once()
    before = client.predict("math", NEW)
    bench.store.request_refit(bench.store.run("math").id, now=bench.clock())
    bench.worker().work_once()
    reply = client.predict("math", NEW)

    assert reply.model_version == 2
    assert not np.allclose(
        [p.success_rate for p in reply.predictions], [p.success_rate for p in before.predictions], atol=1e-6
    )
