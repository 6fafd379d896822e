"""The same model, rollouts and update in a third of the time, for trainings by the hundred on a processor.

Exact savings, no approximation: a question is passed once for all attempts at it, tokens after an answer's END not at
all, and logits are computed where a token was drawn. `model` and `grpo` stay the reference, whose numbers these
functions give up to rounding; their samples are others, for they draw in another order. Shapes as in `model`, with n
problems, G attempts at each, and T live tokens: those whose successor was drawn.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from examples.grpo_from_scratch.grpo import Rollouts, advantages, update
from examples.grpo_from_scratch.model import Transformer, answers_of, questions_of
from examples.grpo_from_scratch.task import END, PAD, Problem, is_right
from torch import Tensor, nn

_CHUNK = 64
"""Problems whose success rates are computed together: their activations stay in the processor's cache."""


def roll_out(
    model: Transformer, problems: Sequence[Problem], *, group_size: int, generator: torch.Generator
) -> Rollouts:
    """Answer each problem `group_size` times and have the answers verified."""
    questions = questions_of(problems, model.levels, _device(model))
    answers = _sample(model, questions, attempts=group_size, generator=generator)
    rewards = [
        [float(is_right(problem, tokens)) for tokens in group]
        for problem, group in zip(problems, answers.tolist(), strict=True)
    ]
    return Rollouts(tuple(problems), answers, torch.tensor(rewards, device=questions.device))


def step(model: Transformer, optimizer: torch.optim.Optimizer, rollouts: Rollouts, *, n_groups: int) -> None:
    """One update, as `grpo.step` does it.

    Args:
        n_groups: By how many groups the sum over attempts is divided: those rolled out, or those asked for.
    """
    moving = rollouts.only(rollouts.informative.nonzero()[:, 0])
    if not moving.problems:
        return
    questions = questions_of(moving.problems, model.levels, _device(model))
    log_p = log_probabilities(model, questions, moving.answers)  # [m, G]
    update(model, optimizer, -(advantages(moving.rewards) * log_p).sum() / (n_groups * log_p.shape[1]))


@torch.no_grad()
def success_rates(model: Transformer, problems: Sequence[Problem]) -> Tensor:
    """Probability of drawing exactly the right answer at temperature 1, [n]."""
    parts = []
    for first in range(0, len(problems), _CHUNK):
        some = problems[first : first + _CHUNK]
        answers = answers_of([problem.answer for problem in some], model.levels, _device(model))
        questions = questions_of(some, model.levels, _device(model))
        parts.append(log_probabilities(model, questions, answers[:, None])[:, 0].exp())
    return torch.cat(parts)


def log_probabilities(model: Transformer, questions: Tensor, answers: Tensor) -> Tensor:
    """Log probability of each whole answer up to and with its END, [n, G]. Differentiable.

    A problem's question and all its answers are one sequence of P = Q + G L places, of which each answer sees the
    question and itself; only attention works on places, all else on the T' = n Q + T tokens that are there.

    Args:
        questions: int64 [n, Q].
        answers: int64 [n, G, A], PAD after END.
    """
    (n, q_length), attempts = questions.shape, answers.shape[1]
    drawn = answers[:, :, 1:] != PAD  # the token before is passed where this one was drawn
    length = int(drawn.any(0).any(0).sum())  # L
    live = drawn[:, :, :length]
    tokens = torch.cat((questions, answers[:, :, :length].flatten(1)), dim=1)  # [n, P]
    of_answers = torch.arange(q_length, q_length + length, device=tokens.device).repeat(attempts)
    positions = torch.cat((torch.arange(q_length, device=tokens.device), of_answers))  # [P]
    is_there = torch.cat((torch.ones_like(questions, dtype=torch.bool), live.flatten(1)), dim=1)
    there = is_there.flatten().nonzero()[:, 0]  # [T']
    hidden = _hidden(positions, q_length, length)
    x = model.tokens(tokens.flatten()[there]) + model.positions(positions.repeat(n)[there])  # [T', D]
    is_read = torch.ones_like(is_there)
    is_read[:, : q_length - 1] = False  # of a question only the last place predicts a token of an answer
    read = is_read.flatten()[there].nonzero()[:, 0]
    for i, block in enumerate(model.blocks):
        seen = _attend(block, block.norm_attention(x), there, hidden, n)
        if i + 1 == len(model.blocks):
            x, seen = x[read], seen[read]
        x = x + block.out(seen)
        x = x + block.mlp(block.norm_mlp(x))
    log_p = model.head(model.norm(x)).log_softmax(-1)  # [n + T, V]
    is_last = (there % len(positions))[read] == q_length - 1
    first = log_p[is_last].gather(1, answers[:, :, 0])  # [n, G]
    chosen = log_p[~is_last].gather(1, answers[:, :, 1 : length + 1][live][:, None])[:, 0]  # [T]
    return first + torch.zeros(live.shape, device=chosen.device).masked_scatter(live, chosen).sum(2)


def _hidden(positions: Tensor, q_length: int, length: int) -> Tensor:
    """What a place must not look at, as a term of the scores: 0 or minus infinity, [P, P]."""
    places = torch.arange(len(positions), device=positions.device)
    attempt = torch.where(places < q_length, -1, (places - q_length) // max(1, length))
    is_seen = (attempt == attempt[:, None]) | (attempt == -1)
    is_seen &= positions <= positions[:, None]
    return torch.zeros(is_seen.shape, device=positions.device).masked_fill(~is_seen, -torch.inf)


def _attend(block: nn.Module, x: Tensor, there: Tensor, hidden: Tensor, n: int) -> Tensor:
    """Attention of the tokens that are there, [T', D]. Empty places come after those of their answer: unseen."""
    places, width, heads = len(hidden), x.shape[1], block.heads
    qkv = block.qkv(x)  # [T', 3 D]
    if len(there) < n * places:
        qkv = qkv.new_zeros(n * places, 3 * width).index_copy(0, there, qkv)
    q, k, v = qkv.view(n, places, 3, heads, width // heads).permute(2, 0, 3, 1, 4)  # each [n, H, P, D / H]
    weights = (q @ (k * k.shape[-1] ** -0.5).transpose(2, 3) + hidden).softmax(3)
    seen = (weights @ v).transpose(1, 2).reshape(n * places, width)
    return seen[there] if len(there) < n * places else seen


@torch.no_grad()
def _sample(model: Transformer, questions: Tensor, *, attempts: int, generator: torch.Generator) -> Tensor:
    """As `model.sample`, passing no token of an answer that has ended."""
    levels, n = model.levels, questions.shape[0] * attempts
    logits, cache = model(questions)
    rows = torch.arange(n, device=questions.device)
    cache = [(k.repeat_interleave(attempts, 0), v.repeat_interleave(attempts, 0)) for k, v in cache]
    following = logits[:, -1].repeat_interleave(attempts, 0)  # [open, V]
    answers = torch.full((n, levels.answer_length), PAD, device=questions.device)
    for i in range(levels.answer_length):
        below = following.softmax(-1).cumsum(-1)  # [open, V]
        level = torch.rand(len(rows), 1, generator=generator, device=below.device) * below[:, -1:]
        token = torch.searchsorted(below, level, right=True)[:, 0].clamp(max=levels.vocabulary - 1)
        answers[rows, i] = token
        is_open = token != END
        if not bool(is_open.all()):
            rows, token = rows[is_open], token[is_open]
            cache = [(k[is_open], v[is_open]) for k, v in cache]
        if i + 1 == levels.answer_length or not len(rows):
            break
        logits, cache = model(token[:, None], cache)
        following = logits[:, -1]
    return answers.view(-1, attempts, levels.answer_length)


def _device(model: Transformer) -> torch.device:
    return next(model.parameters()).device
