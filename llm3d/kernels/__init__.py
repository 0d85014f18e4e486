"""The model's elementwise and reduction operations, one file each, in plain PyTorch.

Storage may be fp32 or bf16; reductions are in fp32.
"""
