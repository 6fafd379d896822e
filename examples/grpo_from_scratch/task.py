"""Two families of generated problems: one whose difficulty shows in the text, and one whose difficulty does not.

*sort*: `sort 4 1 7 3` -> `1 3 4 7`. The longer a list, the more often the model's corpus sorted it the wrong way round;
whoever reads the text can see how long it is.

*translate*: `translate mu: mula mude mula` -> `3 1 3`. Every language has ten words, each of which means a secret
digit. How well the model knows a word depends on how reliable its corpus was there, which no text shows: prompts that
look alike differ in difficulty.

Every problem has one right answer, so that rewards are verified. Knows nothing of models or of the service.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product

PAD, END, SORT, TRANSLATE = range(4)
DIGIT = 4
WORD = DIGIT + 10
LANGUAGE_NAMES = tuple("".join(letters) for letters in product("bdfghjklmnprstvwxz", "aeiou"))
WORDS = 10
"""Words of a language."""
_STEMS = ("ba", "de", "fi", "go", "ku", "la", "me", "ni", "po", "tu")


@dataclass(frozen=True, slots=True)
class Problem:
    """A question and its only right answer.

    Attributes:
        text: What the service is told; it names all that the model sees.
        group: `sort` or `translate`.
        level: Number of digits or words, at least 1.
        question: Tokens.
        answer: Tokens up to and with END.
    """

    text: str
    group: str
    level: int
    question: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Levels:
    """How far the families reach: most digits to sort, number of languages, most words to translate."""

    digits: int
    languages: int
    words: int

    def __post_init__(self) -> None:
        if not 1 <= self.languages <= len(LANGUAGE_NAMES):
            raise ValueError(f"languages {self.languages} must lie in 1 .. {len(LANGUAGE_NAMES)}")
        if self.digits < 1 or self.words < 1:
            raise ValueError(f"digits {self.digits} and words {self.words} must be at least 1")

    @property
    def question_length(self) -> int:
        """Most tokens of a question."""
        return max(self.digits, self.words) + 1

    @property
    def answer_length(self) -> int:
        """Most tokens of an answer."""
        return max(self.digits, self.words) + 1

    @property
    def vocabulary(self) -> int:
        """How many tokens there are."""
        return WORD + self.languages * WORDS


@dataclass(frozen=True)
class World:
    """The secret meanings, and the corpus that knows them badly. A function of its seed.

    For each word the corpus is right with a probability of its own, else it always writes the same wrong digit: a model
    that learned the corpus must unlearn it, word by word.

    Attributes:
        meanings: The right digit of each word, [languages * WORDS].
        mistakes: The corpus's wrong digit, [languages * WORDS].
        reliabilities: How often the corpus is right, [languages * WORDS] in [0, 1].
    """

    levels: Levels
    seed: int
    meanings: list[int] = field(init=False, default_factory=list)
    mistakes: list[int] = field(init=False, default_factory=list)
    reliabilities: list[float] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        chance = random.Random(f"world {self.seed}")
        for _ in range(self.levels.languages):
            # Most languages are known well or hardly, as real pools are; their words scatter around that.
            of_language = chance.betavariate(0.2, 0.25)
            for _ in range(WORDS):
                meaning = chance.randrange(10)
                self.meanings.append(meaning)
                self.mistakes.append(chance.choice([digit for digit in range(10) if digit != meaning]))
                self.reliabilities.append(min(1.0, max(0.0, chance.gauss(of_language, 0.07))))

    def sort_reliability(self, level: int) -> float:
        """How often the corpus sorts so many digits the right way round, in (0, 1): half of the time half-way up."""
        return 1.0 / (1.0 + math.exp(2.0 * (level - self.levels.digits / 2)))

    def draw(self, chance: random.Random) -> Problem:
        """A problem of a random family, level and language."""
        if chance.random() < 0.5:
            return sort_problem([chance.randrange(10) for _ in range(chance.randint(1, self.levels.digits))])
        language = chance.randrange(self.levels.languages)
        words = [language * WORDS + chance.randrange(WORDS) for _ in range(chance.randint(1, self.levels.words))]
        return translate_problem(words, [self.meanings[word] for word in words])

    def written(self, problem: Problem, chance: random.Random) -> tuple[int, ...]:
        """The answer to the problem as the corpus writes it, right or not."""
        if problem.group == "sort":
            is_reliable = chance.random() < self.sort_reliability(problem.level)
            return problem.answer if is_reliable else (*problem.answer[-2::-1], END)
        words = [token - WORD for token in problem.question[1:]]
        digits = [
            self.meanings[word] if chance.random() < self.reliabilities[word] else self.mistakes[word] for word in words
        ]
        return (*(DIGIT + digit for digit in digits), END)

    def problems(self, n_pool: int, n_held_out: int) -> tuple[list[Problem], list[Problem]]:
        """Distinct problems: the pool to train on, and others of the same kinds to be judged by.

        Raises:
            ValueError: the levels do not have that many.
        """
        chance = random.Random(f"problems {self.seed}")
        n = n_pool + n_held_out
        distinct: dict[str, Problem] = {}
        for _ in range(100 * n):
            problem = self.draw(chance)
            distinct.setdefault(problem.text, problem)
            if len(distinct) == n:
                break
        else:
            raise ValueError(f"{self.levels} has hardly {n} distinct problems: ask for fewer or raise its levels")
        every = list(distinct.values())
        chance.shuffle(every)  # short ones come first: they soon repeat
        return every[:n_pool], every[n_pool:]


@dataclass(frozen=True)
class Operations(World):
    """Another world: each word is the name of an operation on digits, which the corpus knows up to some length.

    *ops*: `mude 4 1 7` -> `5 8 2`. An operation replaces each digit d by (factor d + shift) mod 10, and half of them
    turn the list round as well. Up to a length of its own, anywhere between none and all, the corpus performs it the
    right way, beyond that with another shift. So the text shows the family by its key word and the difficulty by key
    word and length, where `World` hides one half of it.

    Attributes:
        operations: Factor, shift, mistaken shift and whether it turns the list, by word.
        reaches: The length at which the corpus is right half of the time, by word.
    """

    operations: list[tuple[int, int, int, bool]] = field(init=False, default_factory=list)
    reaches: list[float] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        chance = random.Random(f"operations {self.seed}")
        for word in range(self.levels.languages * WORDS):
            factor, shift = chance.choice((1, 3, 7, 9)), chance.randrange(10)
            self.operations.append((factor, shift, (shift + chance.randrange(1, 10)) % 10, word % 2 == 1))
            self.reaches.append(chance.uniform(-0.5, self.levels.digits + 1.5))

    def draw(self, chance: random.Random) -> Problem:
        """A problem of a random operation and length."""
        word, n = chance.randrange(len(self.operations)), chance.randint(1, self.levels.digits)
        digits = [chance.randrange(10) for _ in range(n)]
        return Problem(
            text=f"{LANGUAGE_NAMES[word // WORDS]}{_STEMS[word % WORDS]} {' '.join(map(str, digits))}",
            group="turn" if self.operations[word][3] else "keep",
            level=n,
            question=(WORD + word, *(DIGIT + digit for digit in digits)),
            answer=self._performed(word, digits, shift=self.operations[word][1]),
        )

    def written(self, problem: Problem, chance: random.Random) -> tuple[int, ...]:
        """The answer to the problem as the corpus writes it, right or not."""
        word = problem.question[0] - WORD
        if chance.random() < 1.0 / (1.0 + math.exp(2.0 * (problem.level - self.reaches[word]))):
            return problem.answer
        digits = [token - DIGIT for token in problem.question[1:]]
        return self._performed(word, digits, shift=self.operations[word][2])

    def _performed(self, word: int, digits: Sequence[int], *, shift: int) -> tuple[int, ...]:
        factor, _, _, turns = self.operations[word]
        results = [DIGIT + (factor * digit + shift) % 10 for digit in digits]
        return (*(reversed(results) if turns else results), END)


def sort_problem(digits: Sequence[int]) -> Problem:
    """Sort these digits."""
    return Problem(
        text=f"sort {' '.join(map(str, digits))}",
        group="sort",
        level=len(digits),
        question=(SORT, *(DIGIT + digit for digit in digits)),
        answer=(*(DIGIT + digit for digit in sorted(digits)), END),
    )


def translate_problem(words: Sequence[int], meanings: Sequence[int]) -> Problem:
    """Translate these words of one language, numbered through all languages."""
    name = LANGUAGE_NAMES[words[0] // WORDS]
    return Problem(
        text=f"translate {name}: {' '.join(name + _STEMS[word % WORDS] for word in words)}",
        group="translate",
        level=len(words),
        question=(TRANSLATE, *(WORD + word for word in words)),
        answer=(*(DIGIT + digit for digit in meanings), END),
    )


def is_right(problem: Problem, tokens: Sequence[int]) -> bool:
    """The verifier: the tokens begin with the right answer and its END."""
    return tuple(tokens[: len(problem.answer)]) == problem.answer
