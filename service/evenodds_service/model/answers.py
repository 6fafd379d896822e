"""Features of a reference answer: what kind of thing it is, and how long.

An answer says of which kind a problem is, and of which source. A pure function of the answer's text: it learns nothing
and keeps nothing. They were looked at on `math_qwen_multisample`; `benchmarks/unseen.py --answers` measures them on
others.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from evenodds_service.domain import exact

MAX_CHARACTERS = 2_000
"""Only so many characters of an answer are read; `length` is of the whole."""

ANSWER_NAMES = (
    "integer",
    "integer_size",
    "small_integer",
    "round_integer",
    "decimal",
    "negative",
    "fraction",
    "root",
    "pi",
    "power",
    "letter",
    "choice",
    "variable",
    "list",
    "list_items",
    "parentheses",
    "set",
    "matrix",
    "relation",
    "text",
    "yes_no",
    "unit",
    "numbers",
    "commands",
    "length",
)
"""The A features, in the order of the columns."""

_LOGARITHMS = [ANSWER_NAMES.index(name) for name in ("integer_size", "list_items", "numbers", "commands", "length")]
_INTEGER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)")
_DECIMAL = re.compile(r"[-+]?\d*\.\d+")
_FRACTION = re.compile(r"\\[dt]?frac|\d\s*/\s*\d")
_RELATION = re.compile(r"[=<>]|\\(?:le|ge|leq|geq|in|ne|neq|equiv|infty)\b")
_UNIT = re.compile(r"[%°]|\\(?:%|circ|degree)|\\\$|^\$\d")
_COMMAND = re.compile(r"\\[A-Za-z]+")
_NUMBER = re.compile(r"\d+(?:\.\d+)?")
_WORD = re.compile(r"[^\W\d_]{3,}")
_LETTER = re.compile(r"[^\W\d_]")
_CHOICE = re.compile(r"\(?([A-J])[).]?")
_YES_NO = frozenset({"yes", "no", "true", "false"})
_LARGEST = 1e30


def answer_features(answers: Sequence[str]) -> NDArray[np.float32]:
    """Describe each answer by A features of the order of one, each in [0, 20]. Finite for every text.

    Returns:
        float32 [n, A], columns in the order of `ANSWER_NAMES`. Row i depends on `answers[i]` alone.
    """
    table_n_A = np.array([_row(answer) for answer in answers], dtype=np.float64).reshape(-1, len(ANSWER_NAMES))
    table_n_A[:, _LOGARITHMS] = exact.log(1.0 + table_n_A[:, _LOGARITHMS])
    table_n_A[:, ANSWER_NAMES.index("integer_size")] /= 4.0
    return table_n_A.astype(np.float32)


def _row(whole: str) -> list[float]:
    """The features of one answer in the order of `ANSWER_NAMES`, before any logarithm is taken."""
    text = _bare(whole[:MAX_CHARACTERS])
    is_integer = _INTEGER.fullmatch(text) is not None
    size = min(abs(float(text.replace(",", ""))), _LARGEST) if is_integer else 0.0
    plain = _COMMAND.sub(" ", text)
    has_words = "\\text" in text or "\\mbox" in text or _WORD.search(plain) is not None
    n_items = 0 if is_integer else text.count(",") + text.count(";") + text.count("\\text{ and }")
    return [
        is_integer,
        size,
        is_integer and size <= 10,
        is_integer and size > 0 and size % 10 == 0,
        _DECIMAL.fullmatch(text) is not None,
        text.startswith("-"),
        _FRACTION.search(text) is not None,
        "sqrt" in text or "√" in text,
        "\\pi" in text or "π" in text,
        "^" in text or "**" in text,
        _LETTER.fullmatch(text) is not None,
        _CHOICE.fullmatch(text) is not None,
        not has_words and _LETTER.search(plain) is not None,
        n_items > 0,
        n_items,
        text.startswith(("(", "[", "\\left(", "\\left[")),
        text.startswith(("{", "\\{", "\\left\\{")),
        "matrix}" in text or text.startswith("[["),
        _RELATION.search(text) is not None,
        has_words,
        text.lower() in _YES_NO,
        _UNIT.search(whole[:MAX_CHARACTERS]) is not None,
        len(_NUMBER.findall(text)),
        text.count("\\"),
        len(whole),
    ]


def _bare(answer: str) -> str:
    """Without white space, dollar signs and a box around it."""
    text = answer.strip()
    if text.startswith("\\boxed{") and text.endswith("}"):
        text = text[len("\\boxed{") : -1]
    return text.strip("$ \t\n").removesuffix(".")
