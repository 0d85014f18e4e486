"""Marks of tests that need a GPU: ON_GPU, and RUNS_ON_GPU for those that train or write there."""

import pytest
import torch

ON_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
RUNS_ON_GPU = [*ON_GPU, pytest.mark.usefixtures("world_of_one")]
