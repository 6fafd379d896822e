"""The demo's trainer in C does what the one in torch does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from examples.grpo_from_scratch.grpo import Rollouts, pretrain, roll_out
from examples.grpo_from_scratch.model import Transformer, log_probabilities, questions_of
from examples.grpo_from_scratch.native import Native, NoCompiler, Reference, compiled, policy_of
from examples.grpo_from_scratch.task import END, PAD, Levels, World

CPU = torch.device("cpu")
LEVELS = Levels(digits=4, languages=3, words=4)


@pytest.fixture(scope="module")
def world() -> World:
    return World(LEVELS, seed=0)


@pytest.fixture(scope="module")
def model(world: World) -> Transformer:
    """Solves short problems and fails at long ones."""
    torch.manual_seed(0)
    model = Transformer(LEVELS, width=32, layers=2, heads=2)
    pretrain(model, world, steps=150, batch_size=32, learning_rate=5e-3, seed=0)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the compiled part is kept."""
    return tmp_path_factory.mktemp("native")


@pytest.fixture(scope="module")
def native(model: Transformer, folder: Path) -> Native:
    return Native(model, compiled(folder))


@pytest.fixture(scope="module")
def rollouts(model: Transformer, world: World) -> Rollouts:
    """More problems than are passed together, of all kinds of answers."""
    pool, _ = world.problems(100, 0)
    return roll_out(model, pool, group_size=5, generator=torch.Generator().manual_seed(0))


def flat(model: Transformer) -> np.ndarray:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()]).numpy()


def test_log_probabilities_and_their_gradient_are_those_of_torch(
    native: Native, model: Transformer, rollouts: Rollouts
) -> None:
    weights = torch.randn(rollouts.rewards.shape, generator=torch.Generator().manual_seed(1))
    questions = questions_of(rollouts.problems, LEVELS, CPU).repeat_interleave(5, 0)
    expected = log_probabilities(model, questions, rollouts.answers.flatten(0, 1)).sum(1).view_as(weights)
    gradients = torch.autograd.grad((weights * expected).sum(), list(model.parameters()))
    expected_gradient = torch.cat([gradient.flatten() for gradient in gradients]).numpy()

    answers = rollouts.answers.numpy().astype(np.int32)
    log_p, gradient = native.log_probabilities(rollouts.problems, answers, weights.numpy())

    assert gradient is not None
    np.testing.assert_allclose(log_p, expected.detach().numpy(), atol=2e-5)
    np.testing.assert_allclose(gradient, expected_gradient, atol=1e-5 * np.abs(expected_gradient).max())


def test_success_rates_are_those_of_torch(native: Native, model: Transformer, rollouts: Rollouts) -> None:
    rates = native.success_rates(rollouts.problems)

    np.testing.assert_allclose(rates, Reference(model).success_rates(rollouts.problems), atol=5e-6)
    assert rates.max() > 0.5
    assert rates.min() < 0.1


def test_an_update_is_that_of_torch(model: Transformer, rollouts: Rollouts, folder: Path) -> None:
    ours, reference = Native(model, compiled(folder)), Reference(model)
    before = flat(model)

    for _ in range(2):
        for policy in (ours, reference):
            policy.step(rollouts, learning_rate=1e-3, n_groups=64)

    moved, expected = ours.parameters - before, flat(reference.model) - before
    assert np.abs(expected).max() > 1e-3
    # Adam's first steps are as long for a gradient that is all rounding as for others: these few may differ.
    assert np.quantile(np.abs(moved - expected), 0.99) < 1e-6
    assert np.corrcoef(moved, expected)[0, 1] > 0.9999
    assert (flat(model) == before).all()


def test_groups_that_are_all_equal_do_not_move_the_policy(model: Transformer, rollouts: Rollouts, folder: Path) -> None:
    policy = Native(model, compiled(folder))

    policy.step(Rollouts(rollouts.problems, rollouts.answers, torch.ones(100, 5)), learning_rate=1.0, n_groups=100)

    assert (policy.parameters == flat(model)).all()


def test_answers_are_drawn_as_often_as_they_are_probable(native: Native, rollouts: Rollouts) -> None:
    problems = rollouts.problems[:8]

    drawn = native.roll_out(problems, group_size=2_000, seed=0)

    assert drawn.rewards.mean(1).tolist() == pytest.approx(native.success_rates(problems).tolist(), abs=0.05)
    ended = (drawn.answers == END).cumsum(-1) - (drawn.answers == END).int() > 0
    assert ended.any()
    assert (drawn.answers[ended] == PAD).all()


def test_the_same_seed_draws_the_same_answers(native: Native, rollouts: Rollouts) -> None:
    first, second, other = (native.roll_out(rollouts.problems, group_size=4, seed=seed).answers for seed in (1, 1, 2))

    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_without_a_compiler_the_reference_stands_in_and_it_is_said(
    model: Transformer,
    rollouts: Rollouts,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")

    policy = policy_of(model, tmp_path)

    assert "no C compiler 'no-such-compiler' on PATH; install one, or name it in CC" in capsys.readouterr().err
    rolled_out = policy.roll_out(rollouts.problems, group_size=4, seed=0)
    policy.step(rolled_out, learning_rate=1e-3, n_groups=8)
    assert policy.success_rates(rollouts.problems).shape == (100,)


def test_a_compiler_that_fails_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "false")

    with pytest.raises(NoCompiler, match=r"^false .* ended with status 1"):
        compiled(tmp_path)


def test_a_shape_that_it_cannot_do_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="width 24 with 2 heads, 1 layers: the compiled trainer needs a width that is"):
        Native(Transformer(LEVELS, width=24, layers=1, heads=2), compiled(folder))
