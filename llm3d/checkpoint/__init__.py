"""Weights on disk: checkpoints, Hugging Face and PEFT directories, under any layout."""
