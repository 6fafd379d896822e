"""Which prompts of the pool a log speaks of: those of the same id, else of the same text, else new ones.

Texts are the same where nothing but Unicode form and white space tells them apart: 2+2 and 2-2 are not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from evenodds import Client
from evenodds.schemas import PromptInfo
from evenodds.training.text import answer_of
from evenodds_service.commands.formats.outcomes import Group, KnownRates, Rate
from evenodds_service.domain.prompts import Answer, answer_text, text_key

_BY_TEXT = "text:"
"""How the ids begin that the service makes of texts."""


@dataclass(frozen=True, slots=True)
class _Known:
    text_key: str | None
    category: str | None
    prior_rates: Mapping[str, Rate] | None
    answer: Answer


@dataclass(frozen=True, slots=True)
class NamedPrompt:
    """How a prompt is sent: by its id, with what the pool does not contradict.

    The same log gives the same, however much of it was imported before: a repeated report has the same content.

    Attributes:
        is_new: The pool did not have it when the import began, nor did an earlier entry.
        prior_rates: What the pool has; None where it has none.
    """

    prompt_id: str
    text: str | None
    category: str | None
    answer: Answer
    is_new: bool
    prior_rates: Mapping[str, Rate] | None


class KnownPrompts:
    """The prompts of a run's pool, by id and by text, read once; and those that came since."""

    def __init__(self, client: Client, run: str) -> None:
        """Raises what the client raises."""
        self.keeps_text = client.run(run).keep_text
        self._by_id: dict[str, _Known] = {}
        self._by_text: dict[str, str] = {}
        for prompt in client.prompts(run):
            key = text_key(prompt.text) if prompt.text is not None else None
            if key is None and prompt.prompt_id.startswith(_BY_TEXT):
                key = prompt.prompt_id.removeprefix(_BY_TEXT)
            self._add(prompt.prompt_id, _Known(key, prompt.category, _rates_of(prompt), prompt.answer))

    def named(self, entry: Group | KnownRates) -> NamedPrompt | None:
        """The entry's prompt; None where it has neither an id nor a text."""
        key = text_key(entry.text) if entry.text is not None else None
        answer = answer_of(entry.answer)
        prompt_id = self._found(entry, key)
        if prompt_id is None:
            prompt_id = entry.prompt_id or (_BY_TEXT + key if key is not None else None)
            if prompt_id is None:
                return None
            prior_rates = entry.rates if isinstance(entry, KnownRates) else None
            self._add(prompt_id, _Known(key, entry.category, prior_rates, answer))
            return NamedPrompt(prompt_id, entry.text, entry.category, answer, is_new=True, prior_rates=None)
        known = self._by_id[prompt_id]
        is_same_text = known.text_key == key or (known.text_key is None and not self.keeps_text)
        return NamedPrompt(
            prompt_id,
            entry.text if is_same_text else None,
            entry.category if entry.category == known.category else None,
            answer if self._is_same(answer, known.answer) else None,
            is_new=False,
            prior_rates=known.prior_rates,
        )

    def _is_same(self, answer: Answer, known: Answer) -> bool:
        if answer is None or known is None:
            return known is None and not self.keeps_text
        return answer_text(answer) == answer_text(known)

    def _found(self, entry: Group | KnownRates, key: str | None) -> str | None:
        if entry.prompt_id is not None and entry.prompt_id in self._by_id:
            return entry.prompt_id
        if key is not None and key in self._by_text:
            return self._by_text[key]
        templated = entry.templated if isinstance(entry, Group) else None
        return self._by_text.get(text_key(templated)) if templated is not None else None

    def _add(self, prompt_id: str, known: _Known) -> None:
        self._by_id[prompt_id] = known
        if known.text_key is not None:
            self._by_text.setdefault(known.text_key, prompt_id)


def _rates_of(prompt: PromptInfo) -> Mapping[str, Rate] | None:
    """As readers give them."""
    if prompt.prior_rates is None:
        return None
    return {
        name: rate if isinstance(rate, float) else {"successes": rate.successes, "attempts": float(rate.attempts)}
        for name, rate in prompt.prior_rates.items()
    }
