"""`evenodds import`: prompts, known rates and outcomes out of files into a run of a running service, over HTTP."""
