"""What a process holds of each run, and how requests share it. Knows no HTTP."""
