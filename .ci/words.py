"""Whether the pages for users are in plain words: short sentences, and no turn that this project had to unlearn."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "docs/*.md")
LONGEST = 35
"""Words of a sentence. Tables, code and headings are not counted."""

INSTEAD = {
    "and such that": "name the subject again",
    "brings all": "installs everything",
    "by themselves": "say what makes it happen",
    "come what may": "always",
    "did not do its part": "is unavailable, or failed",
    "for ever": "never ... again, or always",
    "is made to wait": "waits",
    "lest": "so that ... not",
    "thereof": "of it",
    "whereof": "of which",
    "whosoever": "anyone who",
}
"""By turn, what to write in its place."""


def main() -> int:
    faults = [
        f"{path.relative_to(ROOT)}:{line}: {fault}"
        for pattern in PAGES
        for path in sorted(ROOT.glob(pattern))
        for line, fault in faults_of(path.read_text())
    ]
    sys.stderr.write("".join(f"{fault}\n" for fault in faults))
    return 1 if faults else 0


def faults_of(page: str) -> Iterator[tuple[int, str]]:
    """Line and fault of each sentence that is too long, and of each turn to avoid."""
    prose = re.sub(r"```.*?```|<!--.*?-->", lambda block: "\n" * block[0].count("\n"), page, flags=re.DOTALL)
    lines = ["" if re.match(r"\s*(\||#|!\[)", line) else line for line in prose.split("\n")]
    for number, line in enumerate(lines, 1):
        for turn, better in INSTEAD.items():
            if re.search(rf"\b{turn}\b", line, re.IGNORECASE):
                yield number, f"{turn!r}: {better}"
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


if __name__ == "__main__":
    sys.exit(main())
