"""Trinity-RFT loads every file of its plugin folder: this one registers the data selector `evenodds`."""

from evenodds.integrations.trinity import EvenOddsSelector

__all__ = ["EvenOddsSelector"]
