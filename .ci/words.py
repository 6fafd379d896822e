"""Whether texts for people are in plain words: no turn that this project had to unlearn, and short sentences on pages.

Pages are read whole. Sources are read line by line, with messages, docstrings and comments. A turn that
a line break parts is missed there.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "docs/*.md", "deploy/helm/*/README.md")
LINES = (
    "client/**/*.py",
    "service/**/*.py",
    "service/**/*.js",
    "examples/**/*.py",
    "examples/**/*.md",
    "benchmarks/*.py",
)
LONGEST = 35
"""Words of a sentence on a page. Tables, code and headings are not counted."""

INSTEAD = {
    "and such that": "name the subject again",
    "brings (all|along|what)": "installs, or has",
    "by themselves": "say what makes it happen",
    "can(not)? be had": "is (not) possible",
    "come what may": "always",
    "did not do its part": "is unavailable, or failed",
    "for ever": "never ... again, or always",
    "in need of": "needs",
    "is made to wait": "waits",
    "(lower|raise|take) the one or": "the first ... the second",
    "lest": "so that ... not",
    "nobody is (asked|made)": "say what does not happen",
    "puts? right": "correct",
    "strangers": "callers that are not trusted",
    "thereof": "of it",
    "to be had": "available",
    "unasked": "without a key, or without a request",
    "whereof": "of which",
    "whosoever": "anyone who",
    "(end|begin|resume|happen|migrate)s? by itself": "say what makes it happen",
}
"""By turn, a regular expression, what to write in its place."""


def main() -> int:
    faults = [
        f"{path.relative_to(ROOT)}:{line}: {fault}"
        for pattern in PAGES
        for path in sorted(ROOT.glob(pattern))
        for line, fault in faults_of(path.read_text())
    ]
    faults += [
        f"{path.relative_to(ROOT)}:{line}: {fault}"
        for pattern in LINES
        for path in sorted(ROOT.glob(pattern))
        for line, fault in turns_in(path.read_text().split("\n"))
    ]
    sys.stderr.write("".join(f"{fault}\n" for fault in faults))
    return 1 if faults else 0


def faults_of(page: str) -> Iterator[tuple[int, str]]:
    """Line and fault of each sentence that is too long, and of each turn to avoid."""
    prose = re.sub(r"```.*?```|<!--.*?-->", lambda block: "\n" * block[0].count("\n"), page, flags=re.DOTALL)
    lines = ["" if re.match(r"\s*(\||#|!\[)", line) else line for line in prose.split("\n")]
    yield from turns_in(lines)
    start, n_words = 1, 0
    for number, line in enumerate([*lines, ""], 1):
        text = re.sub(r"^\s*([-*]|\d+\.) ", "", line)
        words: list[str | None] = list(text.split())
        if not words or text != line:
            words.insert(0, None)  # a new paragraph or point ends what was before it
        for word in words:
            start = number if n_words == 0 else start
            n_words += word is not None
            if word is None or re.search(r"[.:?!][)*_`\"]*$", word):
                if n_words > LONGEST:
                    yield start, f"a sentence of {n_words} words, {LONGEST} are the most: make two of it"
                n_words = 0


def turns_in(lines: Iterable[str]) -> Iterator[tuple[int, str]]:
    """Line and fault of each turn to avoid."""
    for number, line in enumerate(lines, 1):
        for turn, better in _TURNS:
            if found := turn.search(line):
                yield number, f"{found[0].lower()!r}: {better}"


_TURNS = [(re.compile(rf"\b{turn}(?!\w)", re.IGNORECASE), better) for turn, better in INSTEAD.items()]


if __name__ == "__main__":
    sys.exit(main())
