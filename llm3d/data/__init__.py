"""Corpora, tokenizers and the order of samples. Import the module that you need: nothing is imported here."""
