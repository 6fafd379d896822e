"""`evenodds replay` against the real service on loopback, on a world of 60 prompts."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import pytest

from evenodds import Client
from evenodds_service.__main__ import main

SMALL = ("--seeds", "1", "--observe-per-step", "6", "--batch-size", "8", "--candidates", "24")


class Service(Protocol):
    @property
    def base_url(self) -> str: ...

    @property
    def client(self) -> Client: ...


@pytest.fixture
def running(start_service: Callable[[str], Service], tmp_path: Path) -> Service:
    return start_service(f"sqlite:///{tmp_path}/evenodds.db")


def cells_by_predictor(printed: str, header: str) -> dict[str, list[float]]:
    """The means of the rows of the table below the line that starts with `header`."""
    lines = printed.splitlines()
    start = next(i for i, line in enumerate(lines) if line.strip().startswith(header))
    rows = [line.split() for line in lines[start + 2 : start + 4]]
    return {row[0]: [float(cell) for cell in row[1:] if cell != "-"] for row in rows}


def test_replay_compares_predictors_and_leaves_no_runs_behind(
    running: Service, sums_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = tmp_path / "figures.json"
    arguments = ["--url", running.base_url, "--predictors", "gps,mopps,mopps-yield", "--json", str(written)]

    status = main(["replay", str(sums_folder), *arguments, *SMALL])

    printed = capsys.readouterr()
    assert status == 0, printed.err
    assert "recorded: 60 prompts, a recorded training run, 9 visits of each prompt." in printed.out
    ranks = cells_by_predictor(printed.out, "rank correlation")
    assert set(ranks) == {"gps", "mopps"}
    assert all(-1 <= value <= 1 for row in ranks.values() for value in row)
    assert ranks["gps"][0] > ranks["mopps"][0]  # the text tells; own evidence is scarce
    selections = cells_by_predictor(printed.out, "informative share")
    assert all(0 <= value <= 1 for row in selections.values() for value in row[:6])
    document: dict[str, Any] = json.loads(written.read_text())
    by_name = {entry["predictor"]: entry for entry in document["predictors"]}
    figures = by_name["mopps"]["seeds"][0]
    assert figures["never-seen prompts first"] == 0.0  # one belief about all of them ranks nothing
    assert figures["use coverage"] * 60 * figures["use visits"] == pytest.approx(9 * 8)
    assert by_name["gps"]["milliseconds"]["select_batch"]["calls"] == 9
    assert list(running.client.runs()) == []


def test_every_predictor_meets_the_same_outcomes(running: Service, sums_folder: Path) -> None:
    arguments = ["--url", running.base_url, "--predictors", "gps,mopps", "--keep", "--steps", "4"]

    assert main(["replay", str(sums_folder), *arguments, "--group-size", "4", *SMALL]) == 0

    client = running.client
    runs = [state.run for state in client.runs()]
    met: defaultdict[tuple[str, int], list[float]] = defaultdict(list)
    for run in runs:
        for prompt in list(client.prompts(run))[:20]:
            for visit in client.prompt(run, prompt.prompt_id).history:
                met[prompt.prompt_id, visit.step].append(visit.successes)
    assert len(runs) == 4
    assert all(run.startswith("replay-recorded-") for run in runs)
    assert any(len(successes) > 1 for successes in met.values())
    assert all(len(set(successes)) == 1 for successes in met.values())


def test_without_repeats_no_prompt_is_visited_twice_and_the_replay_stops_with_the_pool(
    running: Service, sums_folder: Path, tmp_path: Path
) -> None:
    written = tmp_path / "figures.json"
    arguments = ["--url", running.base_url, "--predictors", "gps,uniform", "--no-repeats", "--json", str(written)]

    assert main(["replay", str(sums_folder), *arguments, *SMALL]) == 0

    for entry in json.loads(written.read_text())["predictors"]:
        assert entry["seeds"][0]["use visits"] == 1.0
        assert entry["seeds"][0]["use coverage"] == pytest.approx(7 * 8 / 60)  # 60 prompts hold 7 batches of 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--predictors", "gps,oracle"],
            "--predictors: 'oracle' is not a predictor: choose from gps, mopps, mopps-yield",
        ),
        (["--seeds", "0"], "--seeds 0: must be at least 1"),
        (["--batch-size", "61", "--candidates", "0"], "--batch-size 61: recorded has 60 prompts"),
        (["--batch-size", "8", "--candidates", "4"], "--candidates 4: fewer than --batch-size 8"),
        (["--steps", "10", "--batch-size", "8"], "--steps 10: every prompt of recorded was visited 9 times"),
        (["--group-size", "9", "--batch-size", "8"], "--group-size 9: recorded records 8 attempts a visit"),
        (["--url", "nowhere", "--batch-size", "8"], "base_url 'nowhere' must start with http:// or https://"),
        (["--url", "http://127.0.0.1:9", "--batch-size", "8"], "is the service running there?"),
    ],
)
def test_faults_are_one_line_on_standard_error(
    sums_folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    status = main(["replay", str(sums_folder), *arguments])

    printed = capsys.readouterr()
    assert status == 1
    assert printed.out == ""
    assert printed.err.startswith("evenodds replay: ")
    assert message in printed.err
    assert printed.err.count("\n") == 1


def test_missing_folder_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["replay", str(tmp_path / "nowhere")])

    assert status == 1
    assert f"{tmp_path}/nowhere: there is no such file or folder: name a trainer's log" in capsys.readouterr().err


def test_the_folder_of_the_environment_is_replayed_if_none_is_named(
    running: Service, sums_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EVENODDS_DATA", str(sums_folder))

    status = main(["replay", "--url", running.base_url, "--predictors", "mopps", "--steps", "2", *SMALL])

    printed = capsys.readouterr()
    assert status == 0, printed.err
    assert "recorded: 60 prompts" in printed.out


@pytest.mark.parametrize("data", [None, ""])
def test_without_any_folder_the_two_ways_to_name_one_are_told(
    data: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("EVENODDS_DATA", raising=False)
    if data is not None:
        monkeypatch.setenv("EVENODDS_DATA", data)

    assert main(["replay"]) == 1
    assert capsys.readouterr().err == (
        "evenodds replay: name a trainer's log or a folder of recorded success rates as LOG, or set EVENODDS_DATA to "
        "a folder\n"
    )


def test_a_faulty_setting_is_named_where_the_folder_is_looked_up(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EVENODDS_PORT", "high")

    assert main(["replay"]) == 1
    assert capsys.readouterr().err.startswith("evenodds replay: EVENODDS_PORT: ")
