"""A small causal transformer, its sampling with a key-value cache, and exact probabilities of answers.

A sequence is the question and the answer, each padded on the right to a fixed length: every answer starts at the same
position. PAD is a token like others; the model learns to pass over it. Shapes: n sequences, Q
question tokens, A answer tokens, V tokens of the vocabulary, H heads, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from examples.grpo_from_scratch.task import END, PAD, Levels, Problem
from torch import Tensor, nn
from torch.nn import functional

_CHUNK = 512

Cache = list[tuple[Tensor, Tensor]]
"""Keys and values of each layer, [n, H, length, D / H] both."""


class Transformer(nn.Module):
    """Pre-norm decoder with learned positions.

    Args:
        levels: Fix the vocabulary and the longest sequence.
        width: D, a multiple of heads.
    """

    def __init__(self, levels: Levels, *, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.levels = levels
        self.tokens = nn.Embedding(levels.vocabulary, width)
        self.positions = nn.Embedding(levels.question_length + levels.answer_length, width)
        self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, levels.vocabulary)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, tokens: Tensor, cache: Cache | None = None) -> tuple[Tensor, Cache]:
        """Logits of the next token at each given position.

        Args:
            tokens: int64 [n, length], right after what the cache holds.

        Returns:
            Logits [n, length, V], and the cache with these tokens.
        """
        start = cache[0][0].shape[2] if cache else 0
        x = self.tokens(tokens) + self.positions.weight[start : start + tokens.shape[1]]  # [n, length, D]
        grown: Cache = []
        for i, block in enumerate(self.blocks):
            x, pair = block(x, cache[i] if cache else None)
            grown.append(pair)
        return self.head(self.norm(x)), grown


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, past: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        n, length, width = x.shape
        qkv = self.qkv(self.norm_attention(x)).view(n, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [n, H, length, D / H]
        if past is not None:
            k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)
        # With a cache there is one new token, which sees everything before it.
        seen = functional.scaled_dot_product_attention(q, k, v, is_causal=past is None)
        x = x + self.out(seen.transpose(1, 2).reshape(n, length, width))
        return x + self.mlp(self.norm_mlp(x)), (k, v)


def questions_of(problems: Sequence[Problem], levels: Levels, device: torch.device) -> Tensor:
    """int64 [n, Q], padded on the right."""
    return _padded([problem.question for problem in problems], levels.question_length, device)


def answers_of(answers: Sequence[tuple[int, ...]], levels: Levels, device: torch.device) -> Tensor:
    """int64 [n, A], padded on the right."""
    return _padded(answers, levels.answer_length, device)


def _padded(rows: Sequence[tuple[int, ...]], length: int, device: torch.device) -> Tensor:
    return torch.tensor([row + (PAD,) * (length - len(row)) for row in rows], device=device)


@torch.no_grad()
def sample(model: Transformer, questions: Tensor, *, attempts: int, generator: torch.Generator) -> Tensor:
    """Draw answers at temperature 1, each until END.

    Args:
        questions: [n, Q].
        attempts: Answers to each question.

    Returns:
        int64 [n, attempts, A], PAD after END.
    """
    n = questions.shape[0] * attempts
    logits, cache = model(questions)
    cache = [(k.repeat_interleave(attempts, 0), v.repeat_interleave(attempts, 0)) for k, v in cache]
    following = logits[:, -1].repeat_interleave(attempts, 0)  # [n, V]
    answers = torch.full((n, model.levels.answer_length), PAD, device=questions.device)
    is_open = torch.ones(n, dtype=torch.bool, device=questions.device)
    for i in range(model.levels.answer_length):
        token = torch.multinomial(following.softmax(-1), 1, generator=generator)  # [n, 1]
        answers[:, i] = torch.where(is_open, token[:, 0], PAD)
        is_open &= token[:, 0] != END
        if i + 1 == model.levels.answer_length or not bool(is_open.any()):
            break
        logits, cache = model(token, cache)
        following = logits[:, -1]
    return answers.view(-1, attempts, model.levels.answer_length)


def log_probabilities(model: Transformer, questions: Tensor, answers: Tensor) -> Tensor:
    """Log probability of each answer token, [n, A]; 0 at PAD. Differentiable."""
    logits, _ = model(torch.cat((questions, answers[:, :-1]), dim=1))
    log_p = logits[:, questions.shape[1] - 1 :].log_softmax(-1)  # [n, A, V]
    chosen: Tensor = log_p.gather(2, answers[:, :, None])[:, :, 0]
    return chosen.masked_fill(answers == PAD, 0.0)


@torch.no_grad()
def success_rates(model: Transformer, questions: Tensor, answers: Tensor) -> Tensor:
    """Probability of drawing exactly the right answer, [n]: what accuracy at temperature 1 converges to."""
    parts = [
        log_probabilities(model, questions[i : i + _CHUNK], answers[i : i + _CHUNK]).sum(1).exp()
        for i in range(0, len(questions), _CHUNK)
    ]
    return torch.cat(parts)
