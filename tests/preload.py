"""What the pool's processes have imported before they are forked, once for all of them."""

import gc

import torch
import torch._dynamo
import torch.distributed

import llm3d.rl.learner
import llm3d.stages.run
import llm3d.train.trainer  # noqa: F401

# torch._dynamo is what the first operation under a TorchDispatchMode imports, as that which counts memory is one, and
# the first message of a gathered tensor imports sympy: seconds of every rank of every pool.

torch.set_num_threads(1)

# What is imported stays: looking for garbage need not pass it, in any process that is forked from here.
gc.collect()
gc.freeze()
