"""The training loop and what it stands on: trainer, optimiser, learning-rate schedules, reports."""
