"""prime-rl: `rollouts/step_{N}/train/all/traces.jsonl` of a run's folder, a row for each episode.

| here | in the file |
|---|---|
| step | `run.work.policy.start`, the version of the policy when the episode began |
| id | `task.key`, else `task.hash` |
| text | `task.data.prompt`, a text or its user messages |
| answer | `task.data.answer`, where the task's data has such a field |
| group | `group.id` |
| reward | `score` of the one reward of the trainable trace; `--reward NAME` where there are several |
| category | `env.name`, else `env.id` |

`all` has every episode that came back, also of groups that were never trained on. Where a step has `effective` only,
that is read, and said: it has survivors. Evaluations, episodes of a frozen policy and episodes that are not `ok` are
left out: they do not say what this policy can do. An episode with several trainable traces counts each as an attempt.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from evenodds_service.commands.formats.chat import text_of
from evenodds_service.commands.formats.files import LogFile, Row
from evenodds_service.commands.formats.grouping import NO_REWARD, Grouping
from evenodds_service.commands.formats.outcomes import Group, Tally, Wishes, chosen_reward, number_of, scaled

NAME = "prime-rl"
KEYS = frozenset({"env", "task", "traces"})


def recognises(row: Row) -> bool:
    return row.keys() >= KEYS


def files_of(folder: Path) -> list[Path]:
    """One file of each step, in their order, of a run's folder or of its `rollouts`."""
    found = []
    for step in sorted([*folder.glob("step_*"), *folder.glob("rollouts/step_*")], key=_number):
        files = [step / "train" / subset / "traces.jsonl" for subset in ("all", "effective")]
        found += [path for path in files if path.exists()][:1]
    return found


def _number(step: Path) -> int:
    digits = step.name.removeprefix("step_")
    return int(digits) if digits.isdigit() else -1


class Reader:
    def __init__(self, wishes: Wishes, tally: Tally) -> None:
        self._wishes, self._tally = wishes, tally

    def read(self, file: LogFile) -> Iterator[Group]:
        """Raises LogRefused."""
        if file.path.parent.name == "effective":
            self._tally.is_filtered = True
            self._tally.note(
                "`effective` has the episodes that were trained on: groups without a signal are missing. Read the "
                "run's folder, which finds `all`"
            )
        grouping = Grouping(self._tally)
        for line, row in file.json_lines(self._tally):
            place = file.at(line)
            about = self._about(row, place)
            if about is None:
                continue
            group = row.get("group") or {}
            for trace in row["traces"]:
                if _is_trainable(trace):
                    reward = self._reward(trace, place)
                    grouping.add((about.step, about.prompt_id, group.get("id")), reward, about)
        yield from grouping.groups()

    def _about(self, row: Row, place: str) -> Group | None:
        """What an episode is about; None where it does not count."""
        task, work = row.get("task") or {}, (row.get("run") or {}).get("work") or {}
        policy = work.get("policy") or {}
        if work.get("type") != "train":
            self._tally.leave_out("episodes of evaluations", place)
        elif not row.get("ok"):
            self._tally.leave_out("episodes that failed for other reasons than the policy", place)
        elif not isinstance(policy.get("start"), int):
            self._tally.leave_out("episodes of a frozen policy", place)
        elif not (task.get("key") or task.get("hash")):
            self._tally.leave_out("episodes without a task", place)
        elif not any(_is_trainable(trace) for trace in row.get("traces") or ()):
            self._tally.leave_out(NO_REWARD, place)
        else:
            env, data = row.get("env") or {}, task.get("data") or {}
            return Group(
                policy["start"],
                (),
                prompt_id=str(task.get("key") or task["hash"]),
                text=text_of(data.get("prompt")),
                answer=data.get("answer"),
                category=env.get("name") or env.get("id") or None,
                place=place,
            )
        return None

    def _reward(self, trace: Row, place: str) -> float | None:
        rewards = trace.get("rewards") or {}
        if not rewards or not trace.get("ok", True):
            return None
        weighted = [name for name, reward in rewards.items() if reward is None or reward.get("weight", 1.0)]
        names = list(rewards) if self._wishes.reward is not None else weighted or list(rewards)
        reward = rewards[chosen_reward(names, self._wishes, place)]
        number = None if reward is None else number_of(reward.get("score"))
        return None if number is None else scaled(number, self._wishes, place, others=list(rewards))


def _is_trainable(trace: object) -> bool:
    return isinstance(trace, dict) and bool((trace.get("agent") or {}).get("trainable", True))
