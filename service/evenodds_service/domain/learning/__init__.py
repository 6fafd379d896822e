"""What a run learns by streaming: the fold of its log and the beliefs that follow from it."""
