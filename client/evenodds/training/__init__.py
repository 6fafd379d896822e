"""The trainer's side: a selector that never stops or slows a training run, and what it stands on."""
