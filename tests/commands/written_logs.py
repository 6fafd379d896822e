"""Logs in the shapes that other tools write them in, small, for the tests of readers, `import` and `replay`.

Keys and nesting are those of the tools' own writers; what a reader does not look at is there as well.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

SYSTEM = "You are a helpful assistant."


def question(i: int) -> str:
    return f"What is {i} + {2 * i}?"


def chatml(text: str) -> str:
    """A prompt as Qwen's template leaves it after decoding without special tokens."""
    return f"system\n{SYSTEM}\nuser\n{text}\nassistant\n"


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    return path


Groups = Mapping[str, Sequence[Any]]
"""Rewards by the prompt's text."""


def verl(folder: Path, steps: Mapping[int, Groups], *, uid: bool = False, **extra: Any) -> Path:
    """`rollout_data_dir`; with `uid` as the V1 trainers write it."""
    for step, groups in steps.items():
        rows = []
        for number, (text, rewards) in enumerate(groups.items()):
            for attempt, reward in enumerate(rewards):
                row = {
                    "input": chatml(text),
                    "output": f"It is {reward}.",
                    "gts": "42",
                    "score": reward,
                    "step": step,
                    **extra,
                }
                rows.append(row | ({"uid": f"6c1f-{step}-{number}_{attempt}_0"} if uid else {}))
        write_lines(folder / f"{step}.jsonl", rows)
    return folder


def trl(folder: Path, steps: Mapping[int, Groups], *, reward: str = "accuracy_reward", **extra: Any) -> Path:
    """`output_dir` with `log_completions`."""
    for step, groups in steps.items():
        rows = [
            {
                "step": step,
                "prompt": chatml(text),
                "completion": f"{text} number {attempt}",
                reward: value,
                **extra,
                "advantage": 0.5,
            }
            for text, rewards in groups.items()
            for attempt, value in enumerate(rewards)
        ]
        write_table(folder / "completions" / f"completions_{step:05d}.parquet", rows)
    return folder


def episode(
    text: str,
    rewards: Mapping[str, float | None],
    *,
    step: int = 0,
    policy: int | None = 0,
    ok: bool = True,
    work: str = "train",
    weights: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """A row of prime-rl's `traces.jsonl`."""
    task = {
        "type": "MathTask",
        "data": {"idx": 3, "prompt": text, "answer": "3"},
        "key": f"key of {text}",
        "hash": f"hash of {text}",
    }
    scored = {
        name: None if score is None else {"score": score, "weight": (weights or {}).get(name, 1.0)}
        for name, score in rewards.items()
    }
    trace = {
        "version": 3,
        "id": "a3f0",
        "verifiers": {"version": "1.2.0"},
        "task": task,
        "agent": {"config": {}, "name": "agent", "trainable": True},
        "nodes": [{"parent": None, "message": {"role": "user", "content": text}}],
        "rewards": scored,
        "metrics": {"num_turns": 1.0},
        "ok": ok,
        "errors": [],
    }
    span = {"policy": {"start": policy, "end": policy + 1}} if policy is not None else {}
    return {
        "id": "7b20",
        "env": {"id": "single-turn+gsm8k", "name": "gsm8k"},
        "task": task,
        "group": {"id": f"group of {text} at {step}"},
        "run": {"type": "train", "id": "r1", "name": "math", "work": {"type": work, "step": step, **span}},
        "ok": ok,
        "errors": [] if ok else [{"type": "SandboxError", "message": "gone"}],
        "traces": [trace] if ok else [],
    }


def prime_rl(folder: Path, steps: Mapping[int, Sequence[Mapping[str, Any]]], subset: str = "all") -> Path:
    for step, episodes in steps.items():
        write_lines(folder / "rollouts" / f"step_{step}" / "train" / subset / "traces.jsonl", episodes)
    return folder


def nemo_rl(folder: Path, steps: Mapping[int, Groups], *, is_filtered: bool = False) -> Path:
    for step, groups in steps.items():
        rows: list[dict[str, Any]] = []
        for text, rewards in groups.items():
            prompt = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
            for reward in rewards:
                row = {"content": [[prompt, "It is 3."]], "rewards": [0.25 if is_filtered else reward]}
                row |= {"filtered_rewards": [reward]} if is_filtered else {}
                row |= {"token_ids": [[1, 2]], "sample_loss_mask": [1.0], "advantages": [[0.0, 0.1]], "idx": len(rows)}
                rows.append(row)
        write_lines(folder / f"train_data_step{step}.jsonl", rows)
    return folder


def lm_eval_row(
    i: int, value: Any, *, filter_: str = "strict-match", metrics: Sequence[str] = ("exact_match",), n: int = 1
) -> dict[str, Any]:
    sent = f"Question: 1 + 1?\nAnswer: 2\n\nQuestion: {question(i)}\nAnswer:"
    return {
        "doc_id": i,
        "doc": {"question": question(i), "answer": f"#### {3 * i}"},
        "target": f"{3 * i}",
        "arguments": {"gen_args_0": {"arg_0": sent, "arg_1": {"until": ["\n"]}}},
        "resps": [[f"{3 * i}"] * n],
        "filtered_resps": [f"{3 * i}"],
        "filter": filter_,
        "metrics": list(metrics),
        "doc_hash": f"d0c{i:04}",
        "prompt_hash": f"9a{i}",
        "target_hash": f"77{i}",
        **dict.fromkeys(metrics, value),
    }


def lm_eval(folder: Path, rows: Sequence[Mapping[str, Any]], task: str = "gsm8k") -> Path:
    return write_lines(folder / f"samples_{task}_2026-08-21T10-56-54.123456.jsonl", rows)


def inspect_sample(i: int, value: Any, *, epoch: int = 1, scorer: str = "match", **extra: Any) -> dict[str, Any]:
    return {
        "id": f"q{i}",
        "epoch": epoch,
        "input": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question(i)}],
        "target": f"{3 * i}",
        "messages": [],
        "scores": {scorer: {"value": value, "answer": "3", "history": []}},
        "metadata": {},
        **extra,
    }


def inspect_ai(folder: Path, samples: Sequence[Mapping[str, Any]], *, compression: int = zipfile.ZIP_DEFLATED) -> Path:
    """A log in an archive, `.eval`."""
    path = folder / "2026-08-22T12-01-19+00-00_arithmetic_Ab3.eval"
    path.parent.mkdir(parents=True, exist_ok=True)
    header = {"version": 2, "status": "success", "eval": {"task": "arithmetic", "model": "openai/gpt-x"}}
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("_journal/start.json", json.dumps({"version": 2, "eval": header["eval"], "plan": {}}))
        for sample in samples:
            archive.writestr(f"samples/{sample['id']}_epoch_{sample['epoch']}.json", json.dumps(sample))
        archive.writestr("summaries.json", "[]")
        archive.writestr("header.json", json.dumps(header))
    return path
