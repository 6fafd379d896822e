"""Surface features of a prompt: what its text looks like, before anything is known about what it means.

Counts, shares and the vocabulary of a few topics, from one pass over the words and a few over the
characters. A pure function of the text: it learns nothing, standardises nothing and keeps nothing. Which
features stand here was chosen by held-out rank correlation; `benchmarks/features.py` says on which data,
and measures them on others.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from evenodds_service.domain import exact

SURFACE = "surface/1"
"""The name under which these vectors are stored. A change of any feature's value is a new name."""

MAX_CHARACTERS = 20_000
"""Only so many characters of a text are read; `characters` and `excess_length` describe the whole."""

_TOPIC_WORDS = {
    "geometry": """
        triangle triangles circle circles circumcircle incircle square rectangle rectangular polygon
        quadrilateral trapezoid parallelogram rhombus isosceles equilateral angle angles
        perpendicular parallel perp tangent radius diameter circumference area perimeter altitude
        median bisector vertices vertex edges faces hexagon pentagon ellipse hyperbola parabola
        chord arc inscribed circumscribed segment degrees diagram cube sphere cone cylinder pyramid
        prism tetrahedron octahedron volume surface plane overline circ widehat
    """,
    "points": """
        point points line lines coordinates coordinate axis slope distance midpoint origin lattice
        space intersect intersects intersection vector vectors matrix matrices grid board
    """,
    "number_theory": """
        integer integers divisible divisor divisors divides prime primes multiple multiples digit
        digits remainder modulo mod pmod bmod equiv congruent coprime relatively gcd lcm factor
        factors base binary factorial perfect units
    """,
    "counting": """
        ways arrangements arrange choose chosen select selected permutations permutation
        combinations subsets subset distinct different colored color colors coloring distinguishable
        tournament seated committee paths binom dbinom
    """,
    "probability": """
        probability probabilities random randomly uniformly expected expectation likely odds fair
        dice die rolled coin coins toss tossed flips marbles cards deck drawn
    """,
    "algebra": """
        equation equations polynomial polynomials monic linear quadratic cubic root roots zeros
        solution solutions solve coefficient coefficients variable variables degree expression
        factorization real complex
    """,
    "extremum": """
        maximum minimum maximal minimal maximize minimize maximise minimise max min greatest largest
        least smallest most best possible
    """,
    "analysis": """
        log ln logarithm exponential sin cos tan cot sec csc sine cosine arcsin arccos arctan
        trigonometric derivative differentiable integral lim limit limits converges infinite
        infinity infty pi
    """,
    "quantifiers": "all any each every exist exists exactly only whose no none never always at",
    "tasks": "find prove proof show explain justify determine",
    "everyday": """
        dollars dollar cents cost costs price money buys bought sells sold percent average hours
        hour minutes minute day days week weeks years old age miles mile feet foot inches inch
        meters pounds gallons speed people students school boys girls children apples books cars
    """,
    "code": """
        return returns parameter parameters args def class import raise exception string strings str
        int float dict dictionary json file path url data csv dataframe pandas numpy plot matplotlib
        code
    """,
    "radicals": "sqrt",
}
_TOPICS = tuple(_TOPIC_WORDS)
_TOPIC_OF = {word: _TOPICS.index(topic) for topic, words in _TOPIC_WORDS.items() for word in words.split()}

_COUNTS = (  # enter as log(1 + count)
    "characters",
    "distinct_words",
    "words_per_sentence",
    "lines",
    "numbers",
    "distinct_numbers",
    "decimals",
    "commands",
    "inline_formulas",
    "displayed_formulas",
    "drawings",
    "equals",
    "inequalities",
    "questions",
    "commas",
    "abbreviations",
    "code_marks",
    "aligned_spaces",
    "grid_lines",
    *_TOPICS,
)
_LEVELS = (  # enter as they are, of the order of one
    "excess_length",
    "largest_number",
    "distinct_word_share",
    "digit_share",
    "lower_share",
    "operator_share",
    "non_ascii_share",
    "multiple_choice",
    "opens_with_if",
    "ends_in_question",
)
SURFACE_NAMES: tuple[str, ...] = (*_COUNTS, *_LEVELS)
"""The S features, in the order of the columns."""

_WORD = re.compile(r"[^\W\d_]+|[0-9]+(?:,[0-9]{3}\b)*(?:\.[0-9]+)?")
_ABBREVIATION = re.compile(r"[A-Z][A-Z]+")
_DIGITS = b"0123456789"
_LOWER = b"abcdefghijklmnopqrstuvwxyz"
_OPERATORS = b"+-*/=<>^_|"
_ASCII = bytes(range(128))
_LONG = float(exact.log(1.0 + 200.0))  # characters, where the effect of length on difficulty bends
_THOUSAND = 3.0 * float(exact.log(10.0))
_CHARACTERS = _COUNTS.index("characters")
_EXCESS_LENGTH, _LARGEST_NUMBER = (len(_COUNTS) + _LEVELS.index(name) for name in ("excess_length", "largest_number"))
_LOGARITHMS = [*range(len(_COUNTS)), _LARGEST_NUMBER]


def surface_features(texts: Sequence[str]) -> NDArray[np.float32]:
    """Describe each text by S features of the order of one, each in [0, 15].

    Finite for every text, also an empty one, one without a letter, and one with lone surrogates. Row i
    depends on `texts[i]` alone.

    Returns:
        float32 [n, S], columns in the order of `SURFACE_NAMES`.
    """
    rows = [_row(text) for text in texts]
    table_N_S = np.array(rows, dtype=np.float64).reshape(len(rows), len(SURFACE_NAMES))
    table_N_S[:, _LOGARITHMS] = exact.log(1.0 + table_N_S[:, _LOGARITHMS])
    table_N_S[:, _EXCESS_LENGTH] = np.maximum(table_N_S[:, _CHARACTERS] - _LONG, 0.0)
    table_N_S[:, _LARGEST_NUMBER] /= _THOUSAND
    return table_N_S.astype(np.float32)


def _row(whole: str) -> list[float]:
    """The features of one text in the order of `SURFACE_NAMES`, before any logarithm is taken."""
    text = whole[:MAX_CHARACTERS]
    count = text.count
    words = _WORD.findall(text.lower())
    numbers = [word for word in words if word < ":"]  # digits sort before ":", letters after it
    distinct_words = set(words)
    topics = [0.0] * len(_TOPICS)
    for word in words:
        if word in _TOPIC_OF:
            topics[_TOPIC_OF[word]] += 1.0
    largest = max([float(number.replace(",", "")) for number in numbers], default=0.0)
    utf8 = text.encode("utf-8", "replace")
    n_bytes = len(utf8) or 1
    lines = count("\n")
    return [
        len(whole),
        len(distinct_words),
        len(words) / (1 + count(". ") + count("? ") + count(".\n")),
        lines,
        len(numbers),
        len(set(numbers)),
        sum("." in number for number in numbers),
        count("\\"),
        count("$"),
        count("\\[") + count("$$"),
        count("[asy]"),
        count("="),
        count("<") + count(">"),
        count("?"),
        count(","),
        len(_ABBREVIATION.findall(text)),
        count("```") + count("def ") + count("import ") + count("return ") + count("Args:"),
        count("  "),
        _grid_lines(text) if lines else 0.0,
        *topics,
        0.0,  # the excess length comes from the number of characters
        min(largest, 1e30),
        len(distinct_words) / (len(words) or 1),
        1.0 - len(utf8.translate(None, _DIGITS)) / n_bytes,
        1.0 - len(utf8.translate(None, _LOWER)) / n_bytes,
        1.0 - len(utf8.translate(None, _OPERATORS)) / n_bytes,
        0.0 if text.isascii() else len(utf8.translate(None, _ASCII)) / n_bytes,
        float("(A)" in text or "A) " in text or "(B)" in text),
        float(text.startswith("If ")),
        float(text.rstrip().endswith("?")),
    ]


def _grid_lines(text: str) -> float:
    """Lines of at least four cells, of about one or two characters: boards, matrices, tables of digits."""
    n_lines = 0.0
    for line in text.split("\n"):
        n_cells = len(line.split())
        if n_cells >= 4 and len(line.strip()) <= 3 * n_cells:
            n_lines += 1.0
    return n_lines
