"""Starts the service on the Ray cluster of this node, or finds it, and prints its address."""

from __future__ import annotations

import os
from pathlib import Path

import ray

from evenodds.integrations.ray import start

if __name__ == "__main__":
    ray.init(address="auto")
    database = os.environ.get("EVENODDS_DATABASE_URL", f"sqlite:///{Path.home()}/evenodds.db")
    print(start(database, num_gpus=float(os.environ.get("REFIT_GPUS", "0"))))
