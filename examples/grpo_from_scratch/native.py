"""The demo's policy in C, for trainings by the hundred: rollouts, update and exact success rates on one core.

`native.c` passes each question once for all attempts at it, and no token after an answer's END. `model` and `grpo`
stay the reference, which a test holds it to. It is compiled at first use with the system's C compiler; without one
`policy_of` says so and goes on with the reference, which takes several times as long.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from examples.grpo_from_scratch import grpo
from examples.grpo_from_scratch.grpo import Rollouts, advantages
from examples.grpo_from_scratch.model import Transformer, answers_of, questions_of, success_rates
from examples.grpo_from_scratch.task import Problem, is_right
from numpy.typing import NDArray

_SOURCE = Path(__file__).with_name("native.c")
_FLAGS = ("-O3", "-march=native", "-fPIC", "-shared")
_BETAS, _CLIP = (0.9, 0.95), 1.0
_CPU = torch.device("cpu")

Floats = NDArray[np.float32]
Ints = NDArray[np.int32]


class NoCompiler(RuntimeError):
    """The C part could not be compiled. The message holds what the compiler said."""


class Policy(Protocol):
    """A model in training by GRPO with Adam (betas .9 and .95, gradients clipped to norm 1)."""

    def roll_out(self, problems: Sequence[Problem], *, group_size: int, seed: int) -> Rollouts:
        """Answer each problem `group_size` times and have the answers verified."""

    def step(self, rollouts: Rollouts, *, learning_rate: float, n_groups: int) -> None:
        """Ascend the sum over attempts of advantage x log probability, divided by n_groups groups' attempts."""

    def success_rates(self, problems: Sequence[Problem]) -> NDArray[np.float64]:
        """Probability of drawing exactly the right answer at temperature 1, [n]."""


def policy_of(model: Transformer, folder: Path) -> Policy:
    """The model's policy, in C where there is a compiler. The model itself is left as it is.

    Args:
        folder: Where what was compiled is kept; made if it is missing.
    """
    try:
        return Native(model, compiled(folder))
    except NoCompiler as error:
        print(
            f"the reference stands in for the compiled trainer and takes several times as long: {error}",
            file=sys.stderr,
        )
        return Reference(model)


def compiled(folder: Path) -> ctypes.CDLL:
    """The C part, compiled unless the folder has it.

    Raises:
        NoCompiler: there is no C compiler (`CC`, or cc), or it failed.
    """
    compiler = os.environ.get("CC", "cc")
    key = hashlib.sha256(" ".join((compiler, *_FLAGS)).encode() + _SOURCE.read_bytes()).hexdigest()[:16]
    file = folder / f"native-{key}.so"
    if not file.exists():
        if shutil.which(compiler) is None:
            raise NoCompiler(f"no C compiler {compiler!r} on PATH; install one, or name it in CC")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch) / "native.so"
            command = [compiler, *_FLAGS, "-o", str(made), str(_SOURCE), "-lm"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise NoCompiler(f"{' '.join(command)} ended with status {done.returncode}: {done.stderr[-2_000:]}")
            made.replace(file)
    return ctypes.CDLL(str(file))


class Native:
    """The policy in C.

    Raises:
        ValueError: the model's shape is not one that it can do.
    """

    def __init__(self, model: Transformer, library: ctypes.CDLL) -> None:
        levels, width, heads = model.levels, model.tokens.embedding_dim, model.blocks[0].heads
        n_heads, layers = int(heads), len(model.blocks)  # type: ignore[arg-type]  # torch knows no attribute's type
        if width % 16 or width % (8 * n_heads) or layers > 16 or levels.question_length + levels.answer_length > 500:
            raise ValueError(
                f"width {width} with {n_heads} heads, {layers} layers: the compiled trainer needs a width that is a "
                "multiple of 16, heads whose width is one of 8, at most 16 layers and 500 tokens"
            )
        self._library, self._levels = library, levels
        shape = (levels.vocabulary, width, n_heads, layers, levels.question_length, levels.answer_length)
        self._dims = (ctypes.c_int * len(shape))(*shape)
        self.parameters: Floats = torch.cat([p.detach().flatten() for p in model.parameters()]).numpy().copy()
        self._mean, self._square = np.zeros_like(self.parameters), np.zeros_like(self.parameters)
        self._n_updates = 0

    def roll_out(self, problems: Sequence[Problem], *, group_size: int, seed: int) -> Rollouts:
        """Answer each problem `group_size` times and have the answers verified."""
        n, length = len(problems), self._levels.answer_length
        levels = np.random.default_rng(seed).random((n, group_size, length), dtype=np.float32)
        answers = np.zeros((n, group_size, length), dtype=np.int32)
        self._library.sample(
            self._dims, _at(self.parameters), n, group_size, _at(self._questions(problems)), _at(levels), _at(answers)
        )
        rewards = [
            [float(is_right(problem, tokens)) for tokens in group]
            for problem, group in zip(problems, answers.tolist(), strict=True)
        ]
        return Rollouts(tuple(problems), torch.from_numpy(answers.astype(np.int64)), torch.tensor(rewards))

    def log_probabilities(
        self, problems: Sequence[Problem], answers: Ints, weights: Floats | None = None
    ) -> tuple[Floats, Floats | None]:
        """Log probability of each answer up to and with its END, [n, G].

        Args:
            answers: [n, G, A], PAD after END.
            weights: [n, G]; with them also the gradient of the sum of weight x log probability, in the order of the
                model's parameters.
        """
        n, group_size, _ = answers.shape
        log_p = np.zeros((n, group_size), dtype=np.float32)
        gradient = None if weights is None else np.zeros_like(self.parameters)
        self._library.log_probabilities(
            self._dims,
            _at(self.parameters),
            n,
            group_size,
            _at(self._questions(problems)),
            _at(np.ascontiguousarray(answers, dtype=np.int32)),
            None if weights is None else _at(np.ascontiguousarray(weights, dtype=np.float32)),
            _at(log_p),
            None if gradient is None else _at(gradient),
        )
        return log_p, gradient

    def step(self, rollouts: Rollouts, *, learning_rate: float, n_groups: int) -> None:
        """One update; groups whose rewards are all equal cost no pass."""
        moving = rollouts.only(rollouts.informative.nonzero()[:, 0])
        if not moving.problems:
            return
        weights: Floats = (-advantages(moving.rewards) / (n_groups * moving.rewards.shape[1])).numpy()
        _, gradient = self.log_probabilities(moving.problems, moving.answers.numpy().astype(np.int32), weights)
        assert gradient is not None  # weights were given
        self._n_updates += 1
        self._library.update(
            ctypes.c_long(len(self.parameters)),
            _at(self.parameters),
            _at(gradient),
            _at(self._mean),
            _at(self._square),
            self._n_updates,
            ctypes.c_double(learning_rate),
        )

    def success_rates(self, problems: Sequence[Problem]) -> NDArray[np.float64]:
        """Probability of drawing exactly the right answer at temperature 1, [n]."""
        answers = answers_of([problem.answer for problem in problems], self._levels, _CPU).numpy().astype(np.int32)
        log_p, _ = self.log_probabilities(problems, answers[:, None])
        return np.exp(log_p[:, 0].astype(np.float64))

    def _questions(self, problems: Sequence[Problem]) -> Ints:
        return questions_of(problems, self._levels, _CPU).numpy().astype(np.int32)


class Reference:
    """The same through torch, as the demo does it."""

    def __init__(self, model: Transformer) -> None:
        self.model = Transformer(
            model.levels,
            width=model.tokens.embedding_dim,
            layers=len(model.blocks),
            heads=int(model.blocks[0].heads),  # type: ignore[arg-type]  # torch knows no attribute's type
        )
        self.model.load_state_dict(model.state_dict())
        self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=1.0, betas=_BETAS, weight_decay=0.0)

    def roll_out(self, problems: Sequence[Problem], *, group_size: int, seed: int) -> Rollouts:
        """Answer each problem `group_size` times and have the answers verified."""
        generator = torch.Generator().manual_seed(seed)
        return grpo.roll_out(self.model, problems, group_size=group_size, generator=generator)

    def step(self, rollouts: Rollouts, *, learning_rate: float, n_groups: int) -> None:
        """One update."""
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        grpo.step(self.model, self._optimizer, rollouts, n_groups=n_groups)

    def success_rates(self, problems: Sequence[Problem]) -> NDArray[np.float64]:
        """Probability of drawing exactly the right answer at temperature 1, [n]."""
        levels = self.model.levels
        answers = answers_of([problem.answer for problem in problems], levels, _CPU)
        return success_rates(self.model, questions_of(problems, levels, _CPU), answers).double().numpy()


def _at(array: Floats | Ints) -> ctypes.c_void_p:
    return array.ctypes.data_as(ctypes.c_void_p)  # holds the array, too
