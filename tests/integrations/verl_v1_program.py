"""A training of verl 0.9.1's V1 trainer as installed, but for its model: a local Ray, its queue, workers and buffers.

`python verl_v1_program.py URL RUN FOLDER [SETTING...]` trains as verl's settings say, over its own `fit`. FOLDER keeps
the data, the outbox, verl's checkpoints, its figures (`figures.jsonl`) and each session's answer (`sessions.jsonl`).
An answer is a guess, sometimes in two outputs of one session; every seventh session fails where FAILING is set.
"""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray
import transfer_queue as tq
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast
from verl.experimental.agent_loop.agent_loop import AgentLoopBase, AgentLoopMetrics, AgentLoopOutput
from verl.experimental.reward_loop import RewardLoopManager
from verl.trainer.ppo.v1 import AgentLoopManagerTQ, get_trainer_cls

N_PROMPTS, BATCH_SIZE, N_ATTEMPTS = 24, 4, 4


class Guess(AgentLoopBase):  # type: ignore[misc]  # not installed where this is checked
    """In the place of a model: the right sum or another, half of the time each; some sums are always right."""

    async def run(self, sampling_params: dict[str, Any], **row: Any) -> Any:
        index, folder = row["extra_info"]["index"], Path(os.environ["VERL_PROGRAM_FOLDER"])
        fails = "FAILING" in os.environ and (index + row["session_id"]) % 7 == 0
        correct = index % 3 == 0 or random.random() < 0.5
        line = {"uid": row["uid"], "prompt": index, "correct": None if fails else correct, "step": row["global_steps"]}
        with (folder / "sessions.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        if fails:
            raise TimeoutError("the verifier did not answer")
        said = self.tokenizer.encode(row["reward_model"]["ground_truth"] if correct else "0")
        prompt = self.tokenizer.encode(row["raw_prompt"][0]["content"])
        outputs = [
            AgentLoopOutput(
                prompt_ids=prompt,
                response_ids=said,
                response_mask=[1] * len(said),
                response_logprobs=[-1.0] * len(said),
                num_turns=2,
                metrics=AgentLoopMetrics(),
                extra_fields={"min_global_steps": row["global_steps"], "max_global_steps": row["global_steps"]},
            )
            for _ in range(1 + index % 2)
        ]
        return outputs if len(outputs) > 1 else outputs[0]


def score(data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None) -> dict[str, float]:
    """The verifier: its score holds a penalty, so that success stands under a key of its own."""
    correct = float(solution_str.strip() == ground_truth)
    return {"score": correct - 0.5, "acc": correct}


class NoModel:
    """In the place of the workers that hold the model and of the engines that serve it: nothing is to be done."""

    def __init__(self) -> None:
        self._dispatch_info = {"actor": [0]}

    def update_actor(self, batch: Any) -> dict[str, Any]:
        return {"metrics": {"mfu": [0.0]}}

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


def files(folder: Path) -> tuple[Path, Path]:
    """A data set as verl's own preparation scripts write it, and the folder of a tokenizer whose tokens are words."""
    rows = [
        {
            "data_source": "sums",
            "prompt": [{"role": "user", "content": f"What is {i} + {i + 1} ?"}],
            "reward_model": {"style": "rule", "ground_truth": str(2 * i + 1)},
            "extra_info": {"index": i, "split": "train"},
        }
        for i in range(N_PROMPTS)
    ]
    data, model = folder / "train.parquet", folder / "model"
    pq.write_table(pa.Table.from_pylist(rows), data)
    vocabulary = ["<unk>", "<eos>", "What", "is", "+", "?", *map(str, range(2 * N_PROMPTS))]
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<eos>", pad_token="<eos>")
    made.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    made.save_pretrained(model)
    LlamaConfig(architectures=["LlamaForCausalLM"], num_hidden_layers=1).save_pretrained(model)
    return data, model


def configuration(folder: Path, url: str, run: str, settings: list[str]) -> Any:
    data, model = files(folder)
    agents = folder / "agents.yaml"
    agents.write_text(f"- name: guess\n  _target_: {Path(__file__).stem}.Guess\n")
    rollout = "actor_rollout_ref.rollout"
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose(
            "ppo_trainer",
            [
                "algorithm.adv_estimator=grpo",
                "algorithm.rollout_correction.bypass_mode=true",
                f"data.train_files={data}",
                f"data.val_files={data}",
                f"data.train_batch_size={BATCH_SIZE}",
                f"+data.cache_dir={folder / 'cache'}",
                f"+data.evenodds.base_url={url}",
                f"+data.evenodds.run={run}",
                f"+data.evenodds.outbox={folder / 'outbox'}",
                "+data.evenodds.deadline_seconds=60",
                "+data.evenodds.reward_key=acc",
                f"actor_rollout_ref.model.path={model}",
                "+actor_rollout_ref.model.override_config.attn_implementation=eager",
                f"actor_rollout_ref.actor.ppo_mini_batch_size={BATCH_SIZE}",
                "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1",
                f"{rollout}.name=vllm",
                f"{rollout}.n={N_ATTEMPTS}",
                f"{rollout}.agent.num_workers=1",
                f"{rollout}.agent.default_agent_loop=guess",
                f"{rollout}.agent.agent_loop_config_path={agents}",
                "reward.num_workers=1",
                f"reward.custom_reward_function.path={__file__}",
                "reward.custom_reward_function.name=score",
                "transfer_queue.enable=true",
                "transfer_queue.backend.SimpleStorage.num_data_storage_units=1",
                "transfer_queue.backend.SimpleStorage.total_storage_size=10000",
                "trainer.device=cpu",
                "trainer.n_gpus_per_node=1",
                "trainer.val_before_train=false",
                "trainer.test_freq=-1",
                "trainer.save_freq=1",
                "trainer.logger=[file]",
                f"trainer.default_local_dir={folder / 'checkpoints'}",
                "trainer.total_epochs=100",
                *settings,
            ],
        )
    OmegaConf.resolve(config)
    return config


def trainer(config: Any) -> Any:
    """verl's own trainer, made as its `_setup` does, without the workers that need a model."""
    made = get_trainer_cls(config.trainer.v1.trainer_mode)(config)
    made._init_tokenizer()
    made._init_dataloader()
    made._init_dump_executor()
    made._init_resource_pool_mgr()
    made.actor_rollout_wg = made.checkpoint_manager = NoModel()
    made.reward_loop_manager = RewardLoopManager(config=config, rm_resource_pool=None)
    made._load_checkpoint()
    made.on_init_end()
    return made


def main(url: str, run: str, folder: Path, settings: list[str]) -> None:
    os.environ["VERL_PROGRAM_FOLDER"] = str(folder)
    os.environ["VERL_FILE_LOGGER_PATH"] = str(folder / "figures.jsonl")
    config = configuration(folder, url, run, settings)
    ray.init(num_cpus=8, include_dashboard=False, _temp_dir=os.environ["RAY_SOCKETS"])
    tq.init(config.transfer_queue)
    made = trainer(config)
    manager = AgentLoopManagerTQ.create(
        config=config,
        llm_client=None,
        teacher_client=None,
        reward_loop_worker_handles=made.get_reward_handles(),
    )
    made.fit(manager)
    assert made._evenodds.selector.flush()
    tq.close()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), sys.argv[4:])
