"""The LLaMA transformer and its heads, written with tensor-parallel layers."""
