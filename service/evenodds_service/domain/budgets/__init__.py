"""How many attempts requests deserve at inference."""
