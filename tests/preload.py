"""What the pool's processes have imported before they are forked, once for all of them."""

import gc

import torch
import torch.distributed

import llm3d.train.trainer  # noqa: F401

torch.set_num_threads(1)

# What is imported stays: looking for garbage need not pass it, in any process that is forked from here.
gc.collect()
gc.freeze()
