"""Which prompts to spend rollouts on."""
