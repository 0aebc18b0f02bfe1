"""Objectives: pure functions from per-candidate log-probabilities or scores and a ProcessBatch to a loss."""
