"""Nine kinds of arithmetic as a small language model meets it, three shots before each, and a tenth to be judged by.

How hard a problem is shows in its text, to who knows what sums are. Every problem has one right answer, so that rewards
are verified. Knows nothing of models or of the service.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

SHOTS = "4 + 3 = 7\n12 - 5 = 7\n6 * 2 = 12\n"
"""Before every question, so that a model knows what is asked for. None of the three is a problem."""

ANSWER_TOKENS = 6
"""Most tokens of an attempt. SmolLM2 writes a space, each digit and the line's end as one token each."""

KINDS = {
    "add1": ("+", (1, 10), (1, 10)),
    "add21": ("+", (10, 100), (1, 10)),
    "add2": ("+", (10, 100), (10, 100)),
    "add3": ("+", (100, 1_000), (100, 1_000)),
    "sub21": ("-", (10, 100), (1, 10)),
    "sub2": ("-", (10, 100), (10, 100)),
    "mul1": ("*", (2, 10), (2, 10)),
    "mul21": ("*", (10, 100), (2, 10)),
    "mul22": ("*", (10, 100), (10, 100)),
}
"""Sign and the ranges of both numbers, by kind; the upper ends are excluded."""

OF_ANOTHER_KIND = ("-", (100, 1_000), (100, 1_000))
"""`sub3`: no pool holds it."""

MOST = 100_000
"""Problems in all. Those of three digits are more, and would be nearly all of a larger pool."""


@dataclass(frozen=True, slots=True)
class Problem:
    """A question and its only right answer, as in `12 - 5 =` and `7`."""

    text: str
    kind: str
    answer: str

    @property
    def line(self) -> str:
        """What a model should write: the rest of the question's line."""
        return f" {self.answer}\n"


@dataclass(frozen=True, slots=True)
class Problems:
    """Distinct problems: to choose among, to be judged by, of another kind, and to warm up on."""

    pool: tuple[Problem, ...]
    held_out: tuple[Problem, ...]
    of_another_kind: tuple[Problem, ...]
    warm_up: tuple[Problem, ...]


def problems(*, n_pool: int, n_held_out: int, n_of_another_kind: int, n_warm_up: int, seed: int = 0) -> Problems:
    """A function of its arguments.

    Raises:
        ValueError: more than `MOST`.
    """
    n = n_pool + n_held_out + n_of_another_kind + n_warm_up
    if n > MOST:
        raise ValueError(f"{n:,} problems are asked for, {MOST:,} are the most: take a smaller pool")
    chance = random.Random(f"problems {seed}")
    every = _distinct(chance, list(KINDS), n_pool + n_held_out + n_warm_up)
    chance.shuffle(every)  # those of small kinds come first: they soon repeat
    held_out, warm_up = every[:n_held_out], every[n_held_out : n_held_out + n_warm_up]
    return Problems(
        pool=tuple(every[n_held_out + n_warm_up :]),
        held_out=tuple(held_out),
        of_another_kind=tuple(_distinct(chance, ["sub3"], n_of_another_kind)),
        warm_up=tuple(warm_up),
    )


def is_right(problem: Problem, written: str) -> bool:
    """The verifier: the answer stands on the first line, alone, and the line ends."""
    line, end, _ = written.partition("\n")
    return bool(end) and line.strip() == problem.answer


def draw(kind: str, chance: random.Random) -> Problem:
    """A problem of this kind. Differences are not negative."""
    sign, first, second = OF_ANOTHER_KIND if kind == "sub3" else KINDS[kind]
    a, b = chance.randrange(*first), chance.randrange(*second)
    if sign == "-" and a < b:
        a, b = b, a
    result = a + b if sign == "+" else a - b if sign == "-" else a * b
    return Problem(f"{a} {sign} {b} =", kind, str(result))


def _distinct(chance: random.Random, kinds: Sequence[str], n: int) -> list[Problem]:
    found: dict[str, Problem] = {}
    while len(found) < n:
        problem = draw(chance.choice(kinds), chance)
        if f"{problem.text}{problem.line}" not in SHOTS:
            found.setdefault(problem.text, problem)
    return list(found.values())
