"""From raw text files to shuffled token files in Megatron's format, and to a tokenizer trained on them."""
