"""Decoder-only transformers, LLaMA and its kin, and their heads, written with tensor-parallel layers."""
