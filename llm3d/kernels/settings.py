"""What the settings choose, for the whole process, of the code that computes."""

from __future__ import annotations

import torch

from llm3d.config import Config
from llm3d.kernels import attention, backend
from llm3d.kernels.numerics import use_numerics


def use_settings(config: Config, device: torch.device) -> None:
    """kernels.backend, train.deterministic and kernels.attention. Raises InputError for what the device has not got."""
    backend.use(config.kernels.backend, device)
    use_numerics(device, config.train.deterministic)
    attention.use(config.kernels.attention, device)
