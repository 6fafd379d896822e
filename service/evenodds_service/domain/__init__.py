"""What it means: beliefs, evidence and choice. numpy only; no I/O, no clock, no hidden randomness."""
