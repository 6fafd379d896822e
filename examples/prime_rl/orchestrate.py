"""prime-rl's orchestrator, with the tasks that the service chooses. Arguments are the orchestrator's."""

from __future__ import annotations

import os

from prime_rl.entrypoints.orchestrator import main

from evenodds.integrations.prime_rl import install

BATCH_SIZE = 64

if __name__ == "__main__":
    install(
        {"base_url": os.environ.get("EVENODDS_URL", "http://127.0.0.1:8000"), "run": "prime-rl"}, batch_size=BATCH_SIZE
    )
    main()
