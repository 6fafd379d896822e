"""The Even Odds service: beliefs (domain), features (model), memory (storage) HTTP (api)."""
