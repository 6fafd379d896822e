"""Trinity-RFT's own taskset scheduler, reader, formatter and operator as installed, with guesses for its explorer.

`python trinity_program.py URL RUN FOLDER FIRST END` reads the batches of the steps from FIRST to before END. FOLDER
keeps the data, the outbox and the scheduler's state of each step, from which a later FIRST goes on. Prints a task's
row, the step and its right answers on each line.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
from pathlib import Path
from typing import Any

from trinity.buffer.operators.mappers.pass_rate_calculator import PassRateCalculator
from trinity.buffer.task_scheduler import get_taskset_scheduler
from trinity.common.config import Config, DataSelectorConfig, FormatConfig, StorageConfig
from trinity.common.experience import Experience
from trinity.utils.plugin_loader import load_plugin_from_dirs

N_TASKS, BATCH_SIZE, N_ATTEMPTS = 24, 4, 4
PLUGINS = Path(__file__).resolve().parents[2] / "examples" / "trinity" / "plugins"


def configuration(url: str, run: str, folder: Path) -> Any:
    rows = [{"question": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(N_TASKS)]
    data = folder / "data"
    data.mkdir(exist_ok=True)
    (data / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    selection = {
        "base_url": url,
        "run": run,
        "group_size": N_ATTEMPTS,
        "outbox": str(folder / "outbox"),
        "deadline_seconds": 60,
    }
    taskset = StorageConfig(
        name="sums",
        path=str(data),
        batch_size=BATCH_SIZE,
        format=FormatConfig(prompt_key="question", response_key="answer"),
        default_workflow_type="math_workflow",
        data_selector=DataSelectorConfig(selector_type="evenodds", kwargs=selection),
        total_epochs=9,
        wrap_in_ray=False,
    )
    config = Config()
    config.buffer.batch_size, config.buffer.total_epochs = BATCH_SIZE, 9
    config.buffer.explorer_input.tasksets = [taskset]
    return config


async def explore(scheduler: Any, folder: Path, steps: range) -> None:
    """As the explorer goes through its tasks."""
    for step in steps:
        tasks = await scheduler.read()
        groups = {int(task.index["index"]): [float(random.random() < 0.5) for _ in range(N_ATTEMPTS)] for task in tasks}
        experiences = [
            Experience(tokens=[1, 2], reward=reward, info={"task_index": task.index})
            for task in tasks
            for reward in groups[int(task.index["index"])]
        ]
        _, metrics = PassRateCalculator().process(experiences)
        scheduler.feedback(metrics)
        (folder / f"state-{step}.json").write_text(json.dumps(scheduler.state_dict()))
        for row, rewards in groups.items():
            sys.stdout.write(f"explored {row} {step} {sum(rewards)}\n")


def main(url: str, run: str, folder: Path, steps: range) -> None:
    load_plugin_from_dirs(str(PLUGINS))
    config = configuration(url, run, folder)
    state: dict[str, Any] = {}
    if steps.start > 0:
        saved = json.loads((folder / f"state-{steps.start - 1}.json").read_text())
        state = {"latest_iteration": steps.start, "taskset_states": saved}
    scheduler = get_taskset_scheduler(state, config)
    selector = scheduler.tasksets[0].reader.selector._connection.selector
    assert selector.wait_until_ready()
    asyncio.run(explore(scheduler, folder, steps))
    assert selector.flush()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), range(int(sys.argv[4]), int(sys.argv[5])))
