"""The Python face of csrc: an operation a file, each beside the same in plain PyTorch.

Storage may be fp32, bf16 or fp16; arithmetic is in fp32.
"""
