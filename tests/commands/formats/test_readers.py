"""Each reader on a log of its shape: what counts, what is left out, and what is said."""

from __future__ import annotations

import csv
import gzip
import json
import math
import struct
import zipfile
import zlib
from pathlib import Path

import pyarrow
import pytest
from tests.commands import written_logs as written
from tests.commands.written_logs import chatml, question

from evenodds_service.commands.formats.chat import plain_text, text_of
from evenodds_service.commands.formats.outcomes import Entry, Group, KnownRates, LogRefused, Tally, Wishes
from evenodds_service.commands.formats.reading import FORMATS, PROMPTS, open_log
from evenodds_service.commands.importing import arguments

Q1, Q2 = question(1), question(2)


def read(path: Path, **wishes: object) -> tuple[list[Group], Tally]:
    entries, tally = read_any(path, **wishes)
    assert all(isinstance(entry, Group) for entry in entries)
    return entries, tally  # type: ignore[return-value]  # as was just asserted


def read_table(path: Path, **wishes: object) -> tuple[list[KnownRates], Tally]:
    entries, tally = read_any(path, **wishes)
    assert all(isinstance(entry, KnownRates) for entry in entries)
    return entries, tally  # type: ignore[return-value]  # as was just asserted


def read_any(path: Path, **wishes: object) -> tuple[list[Entry], Tally]:
    tally = Tally()
    log = open_log(path)
    entries = [entry for _, found in log.entries(Wishes(**wishes), tally) for entry in found]  # type: ignore[arg-type]
    assert log.position == log.size
    return entries, tally


def outcomes(groups: list[Group]) -> list[tuple[int, str | None, tuple[float, ...]]]:
    return [(group.step, group.text, group.rewards) for group in groups]


def counts(tally: Tally) -> dict[str, int]:
    return {reason: n for reason, (n, _) in tally.left_out.items()}


def test_the_arguments_name_the_formats_that_exist() -> None:
    assert sorted(arguments.FORMATS) == sorted(FORMATS)


# verl


def test_verl_steps_are_read_in_their_order_and_rows_of_one_input_are_a_group(tmp_path: Path) -> None:
    written.verl(tmp_path, {10: {Q1: [1.0, 1.0]}, 9: {Q1: [1.0, 0.0], Q2: [0.0, 0.0]}}, data_source="gsm8k")

    groups, tally = read(tmp_path)

    assert outcomes(groups) == [(9, Q1, (1, 0)), (9, Q2, (0, 0)), (10, Q1, (1, 1))]
    assert {(group.category, group.prompt_id) for group in groups} == {("gsm8k", None)}
    assert not tally.is_filtered
    assert not tally.left_out


def test_verl_v1_groups_by_its_ids_and_says_that_filtered_groups_are_missing(tmp_path: Path) -> None:
    written.verl(tmp_path, {1: {Q1: [1.0, 0.0]}, 2: {Q1: [0.0, 1.0]}}, uid=True)
    rows = [json.loads(line) for line in (tmp_path / "1.jsonl").read_text().splitlines()]
    last = rows[1] | {"uid": rows[1]["uid"][:-1] + "1", "score": 1.0}  # a second output of the second rollout
    written.write_lines(tmp_path / "1.jsonl", [*rows, last])

    groups, tally = read(tmp_path)

    assert outcomes(groups) == [(1, Q1, (1, 1)), (2, Q1, (0, 1))]
    assert tally.is_filtered
    assert counts(tally) == {"earlier outputs of a rollout that has several outputs": 1}
    assert "groups that were filtered or evicted are not in this log" in tally.notes[0]


def test_a_reward_that_misses_its_end_by_rounding_is_read_as_the_end(tmp_path: Path) -> None:
    written.verl(tmp_path, {1: {Q1: [1 + 1e-7, -1e-7]}})

    assert outcomes(read(tmp_path)[0]) == [(1, Q1, (1, 0))]


def test_a_reward_outside_of_the_range_stops_the_reading_and_names_what_else_there_is(tmp_path: Path) -> None:
    written.verl(tmp_path, {1: {Q1: [1.0, -1.0]}}, acc=True)

    with pytest.raises(LogRefused) as refused:
        read(tmp_path)

    assert str(refused.value) == (
        "1.jsonl line 2: reward -1 lies outside of [0, 1]: name the rewards that mean failure and success, "
        "for example with --reward-range -1 1, or choose another reward with --reward (acc)"
    )
    assert outcomes(read(tmp_path, low=-1.0)[0]) == [(1, Q1, (1, 0))]
    assert outcomes(read(tmp_path, reward="acc")[0]) == [(1, Q1, (1, 1))]


@pytest.mark.parametrize("absent", [None, math.nan, "none"])
def test_an_absent_reward_is_no_failure(tmp_path: Path, absent: object) -> None:
    written.verl(tmp_path, {1: {Q1: [1.0, absent], Q2: [absent, absent]}})

    groups, tally = read(tmp_path)

    assert outcomes(groups) == [(1, Q1, (1,))]
    assert tally.left_out == {"attempts without a reward": (3, "1.jsonl line 2")}


def test_lines_that_are_cut_off_are_counted_and_the_rest_is_read(tmp_path: Path) -> None:
    written.verl(tmp_path, {1: {Q1: [1.0, 0.0]}})
    file = tmp_path / "1.jsonl"
    file.write_text(file.read_text() + '{"input": "cut o')

    groups, tally = read(tmp_path)

    assert outcomes(groups) == [(1, Q1, (1, 0))]
    assert tally.left_out == {"lines that are not a JSON object": (1, "1.jsonl line 3")}


def test_a_single_packed_file_is_read_too(tmp_path: Path) -> None:
    written.verl(tmp_path, {1: {Q1: [1.0, 0.0]}})
    packed = tmp_path / "1.jsonl.gz"
    packed.write_bytes(gzip.compress((tmp_path / "1.jsonl").read_bytes()))

    assert outcomes(read(packed)[0]) == [(1, Q1, (1, 0))]

    packed.write_bytes(packed.read_bytes()[:-12])
    with pytest.raises(LogRefused, match=r"1\.jsonl\.gz: it cannot be read beyond line"):
        read(packed)


# TRL


def test_trl_files_are_groups_of_one_prompt_and_a_generation_that_is_written_twice_counts_once(tmp_path: Path) -> None:
    first: written.Groups = {Q1: [1.0, 0.0], Q2: [0.0, math.nan]}
    written.trl(tmp_path, {1: first, 2: first, 3: {Q1: [1.0, 1.0]}})

    groups, tally = read(tmp_path)

    assert outcomes(groups) == [(1, Q1, (1, 0)), (1, Q2, (0,)), (3, Q1, (1, 1))]
    assert counts(tally) == {
        "attempts without a reward": 1,
        "completions that the file before has: one generation for several steps": 4,
    }
    assert not tally.notes


def test_trl_with_several_rewards_asks_which_and_missing_steps_are_said(tmp_path: Path) -> None:
    written.trl(tmp_path, {10: {Q1: [1.0, 0.0]}, 20: {Q1: [1.0, 1.0]}}, format_reward=0.2)

    with pytest.raises(
        LogRefused,
        match="this log has several rewards; name the verifier's with --reward; its rewards are: accuracy_reward, f",
    ):
        read(tmp_path)
    with pytest.raises(LogRefused, match="it has no reward 'other'; its rewards are: accuracy_reward, format_reward"):
        read(tmp_path, reward="other")
    groups, tally = read(tmp_path, reward="accuracy_reward")

    assert outcomes(groups) == [(10, Q1, (1, 0)), (20, Q1, (1, 1))]
    assert "steps are missing between the files (logging_steps above 1)" in tally.notes[0]


# prime-rl


def test_prime_rl_counts_episodes_at_the_version_of_the_policy_that_made_them(tmp_path: Path) -> None:
    episode = written.episode
    written.prime_rl(
        tmp_path,
        {
            10: [episode(Q1, {"correct": 1.0}, policy=8), episode(Q2, {"correct": 0.0}, policy=9)],
            9: [episode(Q1, {"correct": 0.0}, policy=8), episode(Q1, {"correct": 1.0}, policy=8)],
        },
    )
    written.prime_rl(tmp_path, {9: [episode(Q2, {"correct": 1.0})]}, subset="effective")

    groups, tally = read(tmp_path)

    assert outcomes(groups) == [(8, Q1, (0, 1)), (8, Q1, (1,)), (9, Q2, (0,))]
    assert {(group.prompt_id, group.category) for group in groups[:1]} == {(f"key of {Q1}", "gsm8k")}
    assert not tally.is_filtered


def test_prime_rl_leaves_out_what_says_nothing_of_the_policy(tmp_path: Path) -> None:
    episode = written.episode
    written.prime_rl(
        tmp_path,
        {
            1: [
                episode(Q1, {"correct": 1.0}),
                episode(Q1, {"correct": None}),
                episode(Q1, {"correct": 0.0}, ok=False),
                episode(Q1, {"correct": 0.0}, policy=None),
                episode(Q1, {"correct": 0.0}, work="eval"),
            ]
        },
    )

    groups, tally = read(tmp_path)

    assert outcomes(groups) == [(0, Q1, (1,))]
    assert counts(tally) == {
        "attempts without a reward": 1,
        "episodes that failed for other reasons than the policy": 1,
        "episodes of a frozen policy": 1,
        "episodes of evaluations": 1,
    }


def test_prime_rl_takes_the_reward_that_has_a_weight_or_the_named_one(tmp_path: Path) -> None:
    rewards = {"correct": 1.0, "length": 0.25}
    log = written.prime_rl(tmp_path / "a", {1: [written.episode(Q1, rewards, weights={"length": 0.0})]})
    several = written.prime_rl(tmp_path / "b", {1: [written.episode(Q1, rewards)]})

    assert outcomes(read(log)[0]) == [(0, Q1, (1,))]
    with pytest.raises(
        LogRefused,
        match="this log has several rewards; name the verifier's with --reward; its rewards are: correct, length",
    ):
        read(several)
    assert outcomes(read(several, reward="length")[0]) == [(0, Q1, (0.25,))]


def test_prime_rl_says_where_only_survivors_are_left(tmp_path: Path) -> None:
    written.prime_rl(tmp_path, {1: [written.episode(Q1, {"correct": 1.0})]}, subset="effective")

    groups, tally = read(tmp_path)

    assert len(groups) == 1
    assert tally.is_filtered
    assert "groups without a signal are missing" in tally.notes[0]


# NeMo-RL


def test_nemo_rl_groups_consecutive_samples_of_one_prompt(tmp_path: Path) -> None:
    written.nemo_rl(tmp_path, {2: {Q1: [1.0, 0.0]}, 10: {Q1: [1.0, 1.0], Q2: [0.0, 0.0]}})

    groups, tally = read(tmp_path)

    assert outcomes(groups) == [(2, Q1, (1, 0)), (10, Q1, (1, 1)), (10, Q2, (0, 0))]
    assert not tally.is_filtered


def test_nemo_rl_with_dynamic_sampling_takes_the_rows_own_rewards_and_says_what_is_missing(tmp_path: Path) -> None:
    written.nemo_rl(tmp_path, {1: {Q1: [1.0, 0.0]}}, is_filtered=True)

    groups, tally = read(tmp_path)

    assert outcomes(groups) == [(1, Q1, (1, 0))]
    assert tally.is_filtered
    assert "groups of equal rewards were dropped before this log was written" in tally.notes[0]


def test_nemo_rl_leaves_out_masked_samples(tmp_path: Path) -> None:
    written.nemo_rl(tmp_path, {1: {Q1: [1.0, 0.0]}})
    rows = [json.loads(line) for line in (tmp_path / "train_data_step1.jsonl").read_text().splitlines()]
    written.write_lines(tmp_path / "train_data_step1.jsonl", [rows[0], rows[1] | {"sample_loss_mask": [0.0]}])

    groups, tally = read(tmp_path)

    assert outcomes(groups) == [(1, Q1, (1,))]
    assert counts(tally) == {"samples that were masked out": 1}


# lm-eval


def test_lm_eval_counts_each_document_once_whatever_the_filters(tmp_path: Path) -> None:
    rows = [written.lm_eval_row(i, float(i % 2)) for i in range(3)]
    rows += [written.lm_eval_row(i, 1.0, filter_="flexible-extract") for i in range(3)]
    file = written.lm_eval(tmp_path, rows)

    groups, tally = read(file, step=7)
    others, _ = read(tmp_path, filter="flexible-extract")

    assert outcomes(groups) == [(7, question(0), (0,)), (7, question(1), (1,)), (7, question(2), (0,))]
    assert {(group.prompt_id, group.category) for group in groups[:1]} == {("d0c0000", "gsm8k")}
    assert counts(tally) == {"rows of the filter 'flexible-extract': the same answers under another filter": 3}
    assert [group.rewards for group in others] == [(1,), (1,), (1,)]


def test_lm_eval_with_several_metrics_asks_which_and_says_that_repeats_are_one_attempt(tmp_path: Path) -> None:
    file = written.lm_eval(tmp_path, [written.lm_eval_row(1, 1.0, metrics=("acc", "acc_norm"), n=4)])

    with pytest.raises(LogRefused, match="with --reward; its rewards are: acc, acc_norm"):
        read(file)
    groups, tally = read(file, reward="acc")

    assert [group.rewards for group in groups] == [(1,)]
    assert "counts as one attempt" in tally.notes[0]


def test_lm_eval_metrics_that_are_no_numbers_are_absent(tmp_path: Path) -> None:
    file = written.lm_eval(tmp_path, [written.lm_eval_row(1, [1, 2]), written.lm_eval_row(2, 1.0)])

    groups, tally = read(file)

    assert outcomes(groups) == [(0, Q2, (1,))]
    assert counts(tally) == {"attempts without a reward": 1}


# inspect-ai


def write_zstandard(path: Path) -> None:
    """Packs the files of an archive anew by zstandard, which the standard library cannot write before Python 3.14."""
    with zipfile.ZipFile(path) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    body, directory = b"", b""
    for name, content in contents.items():
        packed = pyarrow.compress(content, codec="zstd", asbytes=True)
        about = struct.pack(
            "<HHHHHIIIHH", 63, 0, 93, 0, 33, zlib.crc32(content), len(packed), len(content), len(name), 0
        )
        directory += (
            b"PK\x01\x02" + struct.pack("<H", 63) + about + struct.pack("<HHHII", 0, 0, 0, 0, len(body)) + name.encode()
        )
        body += b"PK\x03\x04" + about + name.encode() + packed
    end = struct.pack("<HHHHIIH", 0, 0, len(contents), len(contents), len(directory), len(body), 0)
    path.write_bytes(body + directory + b"PK\x05\x06" + end)


@pytest.mark.parametrize("packing", ["deflate", "zstandard", "json"])
def test_inspect_ai_groups_the_epochs_of_a_sample(tmp_path: Path, packing: str) -> None:
    samples = [
        written.inspect_sample(1, "C"),
        written.inspect_sample(1, "I", epoch=2),
        written.inspect_sample(2, "P"),
        written.inspect_sample(3, 0.25),
        written.inspect_sample(4, "N"),
    ]
    path = written.inspect_ai(tmp_path, samples)
    if packing == "zstandard":
        write_zstandard(path)
    elif packing == "json":
        path = tmp_path / "log.json"
        path.write_text(json.dumps({"version": 2, "eval": {"task": "arithmetic"}, "samples": samples}))

    groups, tally = read(path)

    assert outcomes(groups) == [
        (0, Q1, (1, 0)),
        (0, Q2, (0.5,)),
        (0, question(3), (0.25,)),
        (0, question(4), (0,)),
    ]
    assert [group.prompt_id for group in groups][:2] == ["arithmetic/q1", "arithmetic/q2"]
    assert not tally.left_out


def test_inspect_ai_leaves_out_what_did_not_end_by_itself(tmp_path: Path) -> None:
    samples = [
        written.inspect_sample(1, "C"),
        written.inspect_sample(2, "I", error={"message": "boom", "traceback": ""}),
        written.inspect_sample(3, "I", limit={"type": "token", "limit": 100}),
        written.inspect_sample(4, "I", scores=None),
        written.inspect_sample(5, "I", invalidation={"author": "me"}),
    ]

    groups, tally = read(written.inspect_ai(tmp_path, samples))

    assert outcomes(groups) == [(0, Q1, (1,))]
    assert counts(tally) == {
        "samples that ended with an error": 1,
        "samples that ended at a limit": 1,
        "attempts without a reward": 1,
        "samples that were invalidated": 1,
    }


def test_an_archive_that_is_none_is_named(tmp_path: Path) -> None:
    path = tmp_path / "broken.eval"
    path.write_bytes(b"PK\x03\x04nothing")

    with pytest.raises(LogRefused, match=r"broken\.eval: it cannot be read as a log of inspect-ai \("):
        read(path)


# tables


def test_a_csv_with_ids_and_rates_of_two_models_gives_two_columns(tmp_path: Path) -> None:
    path = tmp_path / "rates.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "problem", "qwen_pass_rate", "llama_pass_rate"])
        writer.writerows([["a", Q1, "0.25", "3/4"], ["b", Q2, "", "50%"], ["c", Q2, "", ""]])

    rates, tally = read_table(path)

    assert [(entry.prompt_id, entry.text, dict(entry.rates)) for entry in rates] == [
        ("a", Q1, {"qwen_pass_rate": 0.25, "llama_pass_rate": {"successes": 3.0, "attempts": 4.0}}),
        ("b", Q2, {"llama_pass_rate": 0.5}),
    ]
    assert counts(tally) == {"rows without a rate": 1}


@pytest.mark.parametrize(
    ("row", "wishes", "rates"),
    [
        ({"problem": Q1, "llama8b_solve_rate": 0.125}, {}, {"llama8b_solve_rate": 0.125}),
        ({"problem": Q1, "difficulty": "6/8"}, {}, {"difficulty": {"successes": 6, "attempts": 8}}),
        ({"task_id": 7, "n_success": 3, "n_samples": 16}, {}, {"counts": {"successes": 3, "attempts": 16}}),
        ({"prompt": Q1, "accuracy": [1, 0, 1, None]}, {}, {"accuracy": {"successes": 2, "attempts": 3}}),
        (
            {"prompt": [{"role": "user", "content": Q1}], "extra_info": {"model_difficulty": {"qwen": 4, "llama": 16}}},
            {"rate_columns": ("extra_info.model_difficulty",), "of": 16, "counts_failures": True},
            {
                "extra_info.model_difficulty.qwen": {"successes": 12, "attempts": 16},
                "extra_info.model_difficulty.llama": {"successes": 0, "attempts": 16},
            },
        ),
        ({"question": Q1, "wrong_rate": 0.25}, {"counts_failures": True}, {"wrong_rate": 0.75}),
    ],
)
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_rates_in_the_shapes_that_people_keep_them_in(
    tmp_path: Path, row: dict[str, object], wishes: dict[str, object], rates: dict[str, object], kind: str
) -> None:
    path = tmp_path / f"table.{kind}"
    (written.write_lines if kind == "jsonl" else written.write_table)(path, [row])
    log = open_log(path, "table")

    found = [entry for _, entries in log.entries(Wishes(**wishes), Tally()) for entry in entries]  # type: ignore[arg-type]

    assert [dict(entry.rates) for entry in found if isinstance(entry, KnownRates)] == [rates]


@pytest.mark.parametrize(
    ("row", "wishes", "message"),
    [
        ({"id": "a", "pass_rate": 12}, {}, "pass_rate 12 is not a rate in [0, 1]: if the numbers are counts out of 16"),
        ({"id": "a", "pass_rate": 12}, {"of": 8}, "pass_rate: 12 of 8 is not a rate"),
        (
            {"id": "a", "level": 3},
            {},
            "no column has the name of a rate: name the columns with --rate; the columns are: id, level",
        ),
        (
            {"pass_rate": 0.5},
            {},
            "no column identifies the prompts: name one with --id or --text; the columns are: pass_rate",
        ),
        (
            {"id": "a", "pass_rate": 0.5},
            {"rate_columns": ("b",)},
            "there is no column 'b'; the columns are: id, pass_rate",
        ),
        ({"id": "a", "pass_rate": 0.5}, {"id_column": "b"}, "there is no column 'b'; the columns are: id, pass_rate"),
    ],
)
def test_a_table_that_cannot_be_understood_is_named_with_what_it_has(
    tmp_path: Path, row: dict[str, object], wishes: dict[str, object], message: str
) -> None:
    log = open_log(written.write_lines(tmp_path / "table.jsonl", [row]), "table")

    with pytest.raises(LogRefused) as refused:
        [entry for _, found in log.entries(Wishes(**wishes), Tally()) for entry in found]  # type: ignore[arg-type]

    assert str(refused.value).startswith(f"table.jsonl line 1: {message}")


def test_a_second_row_of_a_prompt_is_left_out(tmp_path: Path) -> None:
    rows = [{"id": "a", "pass_rate": 0.5}, {"id": "a", "pass_rate": 0.75}]

    rates, tally = read_table(written.write_lines(tmp_path / "table.jsonl", rows))

    assert [entry.rates for entry in rates] == [{"pass_rate": 0.5}]
    assert tally.left_out == {"rows of a prompt that an earlier row has already": (1, "table.jsonl line 2")}


# what a file is


def test_prompts_are_no_log(tmp_path: Path) -> None:
    rows = [{"prompt_id": "a", "text": Q1, "prior_rate": 0.5}]

    assert open_log(written.write_lines(tmp_path / "pool.jsonl", rows)).format == PROMPTS


def test_a_pickle_is_never_opened(tmp_path: Path) -> None:
    (tmp_path / "0.pt").write_bytes(b"PK")

    with pytest.raises(LogRefused, match="a pickle can run any code, so it is never loaded"):
        open_log(tmp_path / "0.pt")


def test_a_folder_without_a_log_and_a_missing_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(LogRefused, match="no file in it has the name of a log of a known format"):
        open_log(tmp_path)
    with pytest.raises(LogRefused, match="no such file or folder"):
        open_log(tmp_path / "nowhere")


# texts


@pytest.mark.parametrize(
    "templated",
    [
        chatml(Q1),
        f"user\n{Q1}\nassistant\n",
        f"<|im_start|>system\n{written.SYSTEM}<|im_end|>\n<|im_start|>user\n{Q1}<|im_end|>\n<|im_start|>assistant\n<think>\n",
        f"system\n\nCutting Knowledge Date: December 2023\n\nuser\n\n{Q1}assistant\n\n",
        f"<start_of_turn>user\n{Q1}<end_of_turn>\n<start_of_turn>model\n",
        f"  {Q1}\n",
    ],
)
def test_the_chat_template_is_taken_off_a_prompt(templated: str) -> None:
    assert plain_text(templated) == Q1


def test_a_conversation_of_several_turns_stays_as_it_is() -> None:
    several = f"user\n{Q1}\nassistant\n3\nuser\n{Q2}\nassistant\n"

    assert plain_text(several) == several.strip()


def test_the_text_of_messages_is_what_the_user_says() -> None:
    parts = [{"type": "text", "text": Q2}, {"type": "image_url", "image_url": {}}]
    messages = [{"role": "system", "content": "x"}, {"role": "user", "content": Q1}, {"role": "user", "content": parts}]

    assert text_of(messages) == f"{Q1}\n\n{Q2}"
    assert text_of(None) is None


# Answers


def test_a_reader_tells_the_reference_answer_where_its_log_has_one(tmp_path: Path) -> None:
    logs = {
        "42": written.verl(tmp_path / "verl", {1: {Q1: [1.0, 0.0]}}),
        "four": written.trl(tmp_path / "trl", {1: {Q1: [1.0, 0.0]}}, solution="four"),
        "3": written.prime_rl(tmp_path / "prime", {0: [written.episode(Q1, {"correct": 1.0})]}),
        "6": written.lm_eval(tmp_path / "lm-eval", [written.lm_eval_row(2, 1.0)]),
        "9": written.inspect_ai(tmp_path / "inspect", [written.inspect_sample(3, "C")]),
        None: written.nemo_rl(tmp_path / "nemo", {1: {Q1: [1.0, 0.0]}}),
    }
    rows = [
        {"problem": Q1, "pass_rate": 0.5, "answer": "", "reward_model": {"ground_truth": ["2", "two"]}},
        {"problem": Q2, "pass_rate": 0.5},
    ]

    told = {answer: {group.answer for group in read(log)[0]} for answer, log in logs.items()}
    table, _ = read_table(written.write_lines(tmp_path / "rates.jsonl", rows))

    assert told == {answer: {answer} for answer in logs}
    assert [known.answer for known in table] == [["2", "two"], None]
