"""One short file for each stage of training, and what they share."""
