"""How good the forecasts were, and what choosing brought."""
