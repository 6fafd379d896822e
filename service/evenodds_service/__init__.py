"""The Even Odds service: beliefs (domain), features (model), memory (storage) and the HTTP hand (api)."""
