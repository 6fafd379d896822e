"""What stands in the outbox after crashes, in many processes, on broken disks."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.waiting import PATIENCE_SECONDS, until

from evenodds import PromptSelector
from evenodds.training import outbox as outbox_module
from evenodds.training.outbox import Delivery, Outbox, OutboxBroken

WRITE = """
import sys
from pathlib import Path
from evenodds.training import outbox as module
from evenodds.training.outbox import Delivery, Outbox

module.BUSY_SECONDS = 600.0  # four processes take turns at one file, on a disk that may be busy
outbox = Outbox(Path(sys.argv[1]), "r")
for i in range(int(sys.argv[3])):
    outbox.put([Delivery("observe", i, f"{sys.argv[2]}-{i}")])
    print(f"{sys.argv[2]}-{i}", flush=True)
"""


def delivery(request_id: str, step: int = 1) -> Delivery:
    return Delivery("observe", step, request_id, None, '[{"prompt_id":"a","rewards":[1]}]')


def request_ids(outbox: Outbox) -> list[str]:
    return [waiting.request_id for waiting in outbox.waiting()]


def test_it_hands_out_in_order_until_a_delivery_is_confirmed(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path, "r")
    outbox.put([delivery("a"), delivery("b")])
    first = outbox.first()
    assert first is not None
    again = outbox.first()

    outbox.remove(first)

    assert again == first
    assert (first.request_id, first.body) == ("a", '[{"prompt_id":"a","rewards":[1]}]')
    assert request_ids(outbox) == ["b"]


def test_a_request_id_stands_in_it_once(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path, "r")

    outbox.put([delivery("a")])
    outbox.put([delivery("a"), delivery("b")])

    assert request_ids(outbox) == ["a", "b"]


def test_going_back_forgets_what_is_later_and_keeps_the_rest(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path, "r")
    outbox.put([delivery("a", 1), Delivery("rewind", 1, "b"), delivery("c", 2), delivery("d", 3)])
    outbox.put([Delivery("rewind", 3, "e")])

    outbox.forget_after(2)

    assert request_ids(outbox) == ["a", "b", "c"]
    assert outbox.is_rewinding()


def test_what_is_refused_is_set_aside_until_the_next_start(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path, "r")
    outbox.put([delivery("a"), delivery("b")])
    first = outbox.first()
    assert first is not None

    outbox.refuse(first, "no such prompt")

    assert request_ids(outbox) == ["b"]
    assert [(refused.request_id, reason) for refused, reason in outbox.refusals()] == [("a", "no such prompt")]
    outbox.close()
    assert request_ids(Outbox(tmp_path, "r")) == ["a", "b"]


def test_parts_take_the_place_of_the_whole_unless_it_was_removed(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path, "r")
    outbox.put([delivery("a", 3), delivery("b", 2)])
    first = outbox.first()
    assert first is not None

    outbox.split(first, [delivery("a0"), delivery("a1")])

    assert [(waiting.request_id, waiting.step) for waiting in outbox.waiting()] == [("a0", 3), ("a1", 3), ("b", 2)]
    first = outbox.first()
    assert first is not None
    outbox.forget_after(2)
    outbox.split(first, [delivery("a00"), delivery("a01")])
    assert request_ids(outbox) == ["b"]


def test_one_at_a_time_is_the_sender(tmp_path: Path) -> None:
    one, two = Outbox(tmp_path, "r"), Outbox(tmp_path, "r")
    two.put([delivery("a")])

    assert one.first() is not None
    assert two.first() is None
    one.close()
    assert two.first() is not None


def test_runs_have_outboxes_of_their_own_in_one_folder(tmp_path: Path) -> None:
    one, two = Outbox(tmp_path, "math.v1"), Outbox(tmp_path, "math.v2")

    one.put([delivery("a")])

    assert two.is_empty()
    assert one.first() is not None
    two.put([delivery("b")])
    assert two.first() is not None


def test_processes_that_are_killed_lose_nothing_that_was_put_and_break_nothing(tmp_path: Path) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WRITE, str(tmp_path), str(number), "100000" if number < 3 else "40"],
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(4)
    ]
    said, _ = processes[3].communicate()  # goes through while the others write and are killed

    put = said.split()
    for process in processes[:3]:
        process.send_signal(signal.SIGKILL)
        more, _ = process.communicate()
        put += [line for line in more.splitlines(keepends=True) if line.endswith("\n")]

    kept = request_ids(Outbox(tmp_path, "r"))
    put = [line.strip() for line in put]
    assert len(put) > 40
    assert set(put) <= set(kept)
    assert len(kept) <= len(put) + 3  # put, but killed before it could say so
    assert len(set(kept)) == len(kept)


def test_a_file_that_is_no_outbox_is_named(tmp_path: Path) -> None:
    (tmp_path / "r.outbox").write_text("something else entirely, " * 100)

    with pytest.raises(OutboxBroken, match=r"r\.outbox: file is not a database"):
        Outbox(tmp_path, "r")


def test_a_selector_works_on_without_a_usable_disk(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "r.outbox").write_text("something else entirely, " * 100)
    (tmp_path / "file").write_text("")
    for folder, fault in ((tmp_path, "file is not a database"), (tmp_path / "file" / "below", "Not a directory")):
        caplog.clear()
        with PromptSelector(None, "r", ["a"], outbox=folder, deadline_seconds=120) as selector:
            selector.observe(1, {"a": [1]})
            selector.observe(2, {"a": [0]})

            assert [waiting["step"] for waiting in selector.state_dict()["undelivered"]] == [1, 2]
        (record,) = caplog.records
        assert fault in record.getMessage()
        assert "are kept in memory until they are delivered" in record.getMessage()


def test_a_disk_that_was_away_at_the_start_is_used_once_it_is_back(tmp_path: Path) -> None:
    (tmp_path / "mount").write_text("not mounted yet")
    folder = tmp_path / "mount" / "below"

    with PromptSelector(None, "r", ["a"], outbox=folder, deadline_seconds=120) as selector:
        selector.observe(1, {"a": [1]})
        (tmp_path / "mount").unlink()
        selector.observe(2, {"a": [0]})

        assert [waiting["step"] for waiting in selector.state_dict()["undelivered"]] == [2, 1]
    assert [delivery.step for delivery in Outbox(folder, "r").waiting()] == [2], "on disk, beyond the process's end"


FULL = """
import resource, sys
from pathlib import Path
from evenodds import PromptSelector

folder = Path(sys.argv[1])
with PromptSelector(None, "r", ["a"], outbox=folder, deadline_seconds=120) as selector:
    selector.observe(1, {"a": [1]})
    size = (folder / "r.outbox").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    for step in range(2, 2_000):
        selector.observe(step, {"a": [0]})
    assert [waiting["step"] for waiting in selector.state_dict()["undelivered"]] == list(range(1, 2_000))
"""


def test_a_full_disk_costs_nothing_that_fits_in_memory(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    assert done.stderr.count("outcomes that cannot be kept there are kept in memory until they are delivered") == 1
    assert len(Outbox(tmp_path, "r").waiting()) >= 1


def test_a_disk_that_hangs_while_an_offline_selector_is_closed_stops_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox_module, "BUSY_SECONDS", 600.0)
    selector = PromptSelector(None, "r", ["a"], outbox=tmp_path, deadline_seconds=0.2)
    selector.observe(1, {"a": [1]})
    until(lambda: selector.state_dict()["undelivered"], "the first outcome on disk")
    other = sqlite3.connect(tmp_path / "r.outbox", isolation_level=None, timeout=PATIENCE_SECONDS)
    other.execute("BEGIN EXCLUSIVE")
    selector.observe(2, {"a": [0]})

    selector.close(timeout_seconds=0)

    other.execute("ROLLBACK")
    other.close()
    outbox = Outbox(tmp_path, "r")
    until(lambda: len(outbox.waiting()) == 2, "both outcomes on disk")


def test_a_disk_that_hangs_holds_nothing_up_and_costs_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox_module, "BUSY_SECONDS", 600.0)  # so long SQLite alone would wait
    with PromptSelector(None, "r", ["a"], outbox=tmp_path, deadline_seconds=0.2) as selector:
        selector.observe(1, {"a": [1]})
        other = sqlite3.connect(tmp_path / "r.outbox", isolation_level=None, timeout=PATIENCE_SECONDS)
        other.execute("BEGIN EXCLUSIVE")
        started = time.monotonic()
        selector.observe(2, {"a": [0]})
        state = selector.state_dict()
        seconds = time.monotonic() - started
        other.execute("ROLLBACK")
        other.close()

        def steps_kept() -> list[int]:
            return [waiting["step"] for waiting in selector.state_dict()["undelivered"]]

        until(lambda: steps_kept() == [1, 2], "both outcomes on disk")
    assert seconds < outbox_module.BUSY_SECONDS / 10
    assert state["undelivered"] == []
    assert [record.getMessage() for record in caplog.records] == [
        f"run 'r': the outbox in {tmp_path} takes more than 0.2 s"
    ]
