"""Text out of a model: a key-value cache, a schedule of sequences, and tokens drawn from a spread vocabulary."""
