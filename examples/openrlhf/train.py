"""OpenRLHF's PPO program, with the prompts that the service chooses. Arguments are OpenRLHF's."""

from __future__ import annotations

import os
import runpy
import sys

import ray
from openrlhf.trainer import ppo_trainer

from evenodds.integrations.openrlhf import following

SETTINGS = {"base_url": os.environ.get("EVENODDS_URL", "http://127.0.0.1:8000"), "run": "openrlhf-math"}

if __name__ == "__main__":
    if "--train.async_enable" in sys.argv:
        sys.exit("--train.async_enable: PPOTrainerAsync samples where the selection does not reach; leave it out")
    trainer = ppo_trainer.PPOTrainer.__ray_metadata__.modified_class
    ppo_trainer.PPOTrainer = ray.remote(following(trainer, SETTINGS))
    runpy.run_module("openrlhf.cli.train_ppo_ray", run_name="__main__")
