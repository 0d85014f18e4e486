"""Tokenizers and chat templates: from conversations to tokens, and from tokens to text as they come."""
