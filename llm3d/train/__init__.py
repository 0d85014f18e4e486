"""The training loop and what it stands on: trainer, optimizer, learning-rate schedules, reports."""
