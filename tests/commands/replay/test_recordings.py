from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from evenodds_service.commands.replay.recordings import Recording, RecordingError, read_recording

WriteFolder = Callable[..., Path]
TEXTS = {"a": "1 + 1", "b": "2 + 2", "c": "3 + 3"}


def outcomes(recording: Recording, *, seed: int = 0, step: int, n_steps: int, group_size: int) -> list[int]:
    drawn = recording.outcomes(seed=seed, step=step, n_steps=n_steps, group_size=group_size)
    return [int(k) for k in drawn]


def test_recorded_run_gives_the_visit_whose_turn_it_is(write_folder: WriteFolder) -> None:
    rows = [
        ("a", 1, 7, 3, 8), ("b", 0, 1, 0, 8), ("a", 0, 2, 1, 8), ("b", 1, 9, 5, 8), ("b", 2, 12, 6, 8),
    ]  # fmt: skip
    folder = write_folder(TEXTS, ("prompt_id", "visit", "step", "n_success", "n_samples"), rows)

    recording = read_recording(folder)

    assert recording.kind == "run"
    assert [prompt.prompt_id for prompt in recording.prompts] == ["a", "b"]
    assert recording.left_out == 1
    assert recording.default_steps == 2
    assert outcomes(recording, step=0, n_steps=2, group_size=8) == [1, 0]
    assert outcomes(recording, step=1, n_steps=2, group_size=8) == [3, 5]


def test_recorded_run_without_visits_is_ordered_by_step(write_folder: WriteFolder) -> None:
    rows = [("a", 10, 4, 4), ("a", 9, 1, 4), ("b", 3, 2, 4), ("b", 30, 3, 4)]
    folder = write_folder(TEXTS, ("prompt_id", "step", "n_success", "n_samples"), rows)

    recording = read_recording(folder)

    assert outcomes(recording, step=0, n_steps=2, group_size=4) == [1, 2]
    assert outcomes(recording, step=1, n_steps=2, group_size=4) == [4, 3]


def test_smaller_group_is_drawn_from_the_recorded_attempts(write_folder: WriteFolder) -> None:
    rows = [(i, visit, k, 8) for i, k in (("a", 0), ("b", 8), ("c", 6)) for visit in (0, 1)]
    folder = write_folder(TEXTS, ("prompt_id", "visit", "n_success", "n_samples"), rows)

    recording = read_recording(folder)

    for seed in range(20):
        a, b, c = outcomes(recording, seed=seed, step=0, n_steps=2, group_size=4)
        assert (a, b) == (0, 4)
        assert 2 <= c <= 4


def test_recorded_run_refuses_more_steps_or_attempts_than_it_has(write_folder: WriteFolder) -> None:
    rows = [(i, visit, 1, 8) for i in TEXTS for visit in range(3)]
    recording = read_recording(write_folder(TEXTS, ("prompt_id", "visit", "n_success", "n_samples"), rows))

    with pytest.raises(RecordingError, match=r"--steps 4: every prompt of recorded was visited 3 times; ask for at"):
        recording.check(n_steps=4, group_size=8)
    with pytest.raises(RecordingError, match=r"--group-size 16: recorded records 8 attempts a visit; ask for at"):
        recording.check(n_steps=3, group_size=16)


def test_models_are_stages_from_weak_to_strong_and_the_policy_moves_between_them(
    write_folder: WriteFolder,
) -> None:
    rates = {"strong": (16, 16, 16), "weak": (0, 0, 0), "middling": (0, 16, 0)}
    rows = [(i, model, k, 16) for model, ks in rates.items() for i, k in zip(TEXTS, ks, strict=True)]
    recording = read_recording(write_folder(TEXTS, ("prompt_id", "model", "n_success", "n_samples"), rows))

    draws = [outcomes(recording, seed=s, step=1, n_steps=5, group_size=8) for s in range(400)]

    assert recording.kind == "models"
    assert recording.stages == ("weak", "middling", "strong")
    assert outcomes(recording, step=0, n_steps=5, group_size=8) == [0, 0, 0]
    assert outcomes(recording, step=2, n_steps=5, group_size=8) == [0, 8, 0]
    assert outcomes(recording, step=4, n_steps=5, group_size=8) == [8, 8, 8]
    assert np.mean(draws, axis=0) == pytest.approx([0, 4, 0], abs=0.3)


def test_models_with_few_samples_are_joined_with_their_neighbours(write_folder: WriteFolder) -> None:
    rows = [
        (i, f"model-{m}", int(m >= 4 * j + 2), 1) for m in range(10) for j, i in enumerate(TEXTS)
    ]  # model m solves j of the three prompts, more the larger m is
    recording = read_recording(write_folder(TEXTS, ("prompt_id", "model", "n_success", "n_samples"), rows))

    assert recording.attempts_V_N.tolist() == [[8, 8, 8]] * 3
    assert recording.successes_V_N.tolist() == [[6, 2, 0], [7, 3, 0], [8, 4, 0]]
    assert recording.stages[0] == "model-0 .. model-7"


def test_models_that_know_few_prompts_or_were_sampled_little_are_left_out(write_folder: WriteFolder) -> None:
    rows = [
        *((i, model, 5, 16) for model in ("one", "two") for i in TEXTS),
        ("a", "narrow", 16, 16),
        *((i, "greedy", 1, 1) for i in TEXTS),
    ]
    recording = read_recording(write_folder(TEXTS, ("prompt_id", "model", "n_success", "n_samples"), rows))

    assert sorted(recording.stages) == ["one", "two"]
    assert recording.n_prompts == 3


def test_models_can_be_chosen_by_name(write_folder: WriteFolder) -> None:
    rows = [(i, model, k, 16) for model, k in (("x-base", 1), ("x-tuned", 9), ("y", 5)) for i in TEXTS]
    folder = write_folder(TEXTS, ("prompt_id", "model", "n_success", "n_samples"), rows)

    assert read_recording(folder, models="x-").stages == ("x-base", "x-tuned")
    with pytest.raises(RecordingError, match=r"--models 'z': no model of .*rates.csv.gz has this in its name"):
        read_recording(folder, models="z")


def test_static_table_draws_at_the_rate_of_the_table(write_folder: WriteFolder) -> None:
    rows = [("a", 0, 128), ("b", 128, 128), ("c", 32, 128)]
    recording = read_recording(write_folder(TEXTS, ("prompt_id", "n_success", "n_samples"), rows))

    draws = [outcomes(recording, seed=s, step=3, n_steps=44, group_size=8) for s in range(400)]

    assert recording.kind == "static"
    assert np.mean(draws, axis=0) == pytest.approx([0, 8, 2], abs=0.3)


def test_outcomes_depend_on_seed_and_step_alone(sums_folder: Path, write_folder: WriteFolder) -> None:
    recording = read_recording(sums_folder)
    arguments = {"n_steps": 9, "group_size": 4}

    first = outcomes(recording, seed=1, step=5, **arguments)
    others = [outcomes(recording, seed=2, step=5, **arguments), outcomes(recording, seed=1, step=6, **arguments)]

    assert outcomes(read_recording(sums_folder), seed=1, step=5, **arguments) == first
    assert first not in others


@pytest.mark.parametrize(
    ("columns", "row", "message"),
    [
        (("prompt_id", "n_success"), ("a", 1), r"rates.csv.gz: no column n_samples; the columns are n_success, prom"),
        (("prompt_id", "n_success", "n_samples"), ("a", 9, 8), r"line 2: n_success 9 of n_samples 8; 0 <= n_success"),
        (("prompt_id", "n_success", "n_samples"), ("a", "x", 8), r"line 2: .*invalid literal.*; counts are integers"),
        (("prompt_id", "n_success", "n_samples"), ("z", 1, 8), r"no row belongs to a prompt of prompts.jsonl.gz"),
        (("prompt_id", "n_success", "n_samples"), ("a", 1, 8), r"1 prompts of prompts.jsonl.gz have outcomes; at le"),
        (("prompt_id", "visit", "n_success", "n_samples"), ("a", 0, 1, 8), r"needs 2 visits or more of every prompt"),
    ],
)
def test_faulty_rates_are_refused_by_name(
    write_folder: WriteFolder, columns: tuple[str, ...], row: tuple[object, ...], message: str
) -> None:
    folder = write_folder(TEXTS, columns, [row])

    with pytest.raises(RecordingError, match=message):
        read_recording(folder)


def test_missing_and_broken_files_are_refused_by_name(sums_folder: Path, tmp_path: Path) -> None:
    prompts = sums_folder / "prompts.jsonl.gz"

    with pytest.raises(
        RecordingError, match=r"nowhere: there is no such file or folder: name a trainer's log, or a folder with"
    ):
        read_recording(tmp_path / "nowhere")
    with gzip.open(prompts, "at", encoding="utf-8") as lines:
        lines.write('{"prompt_id": "no text"}\n')
    with pytest.raises(RecordingError, match=r"prompts.jsonl.gz line 61: KeyError: 'text'; each line is a JSON"):
        read_recording(sums_folder)
    prompts.write_bytes(b"plain text")
    with pytest.raises(RecordingError, match=r"prompts.jsonl.gz: BadGzipFile: Not a gzipped file"):
        read_recording(sums_folder)
    prompts.unlink()
    with pytest.raises(RecordingError, match=r"prompts.jsonl.gz: no such file; a folder to replay holds"):
        read_recording(sums_folder)
