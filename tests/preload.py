"""What the pool's processes have imported before they are forked, once for all of them."""

import torch
import torch.distributed

import llm3d.train.trainer  # noqa: F401

torch.set_num_threads(1)
