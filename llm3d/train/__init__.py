"""The training loop and what it stands on: optimiser, learning-rate schedules, checkpoints, metrics."""
