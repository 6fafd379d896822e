"""SkyRL's main program, with the prompts that the service chooses. Arguments are SkyRL's."""

from __future__ import annotations

import os
from typing import Any

from skyrl.train.entrypoints import main_base
from skyrl.train.trainer import RayPPOTrainer

from evenodds.integrations.skyrl import following

SETTINGS = {"base_url": os.environ.get("EVENODDS_URL", "http://127.0.0.1:8000"), "run": "skyrl-math"}


class Experiment(main_base.BasePPOExp):  # type: ignore[misc]  # SkyRL is not installed where this is checked
    def get_trainer(self, *args: Any, **kwargs: Any) -> Any:
        return following(RayPPOTrainer, SETTINGS)(*args, **kwargs)


if __name__ == "__main__":
    main_base.BasePPOExp = Experiment
    main_base.main()
