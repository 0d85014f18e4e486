"""Which of a host's processors are next to a GPU."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch


def bind_to_gpu_node(gpu: torch.device) -> list[int]:
    """Let this process run only on the processors of the GPU's NUMA node, whose memory then is what it allocates; one
    thread for each that is its share of them. -> the processors; none where the host does not tell.

    Call it before host memory is pinned.
    """
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    near = [processors_near(_pci_address(i), Path("/sys")) for i in range(torch.cuda.device_count())]
    mine = near[gpu.index or 0]
    allowed = sorted(set(mine) & os.sched_getaffinity(0))
    if allowed:
        os.sched_setaffinity(0, allowed)
        sharing = near[:ranks].count(mine)  # ranks whose GPUs, one each, are on the same node
        torch.set_num_threads(max(1, len(allowed) // max(1, sharing)))
    return allowed


def _pci_address(gpu: int) -> str:
    of: Any = torch.cuda.get_device_properties(gpu)
    return f"{of.pci_domain_id:04x}:{of.pci_bus_id:02x}:{of.pci_device_id:02x}.0"


def processors_near(pci_address: str, sys: Path) -> list[int]:
    """Numbers of the processors of a PCI device's NUMA node; none where the kernel does not know it."""
    try:
        node = int((sys / "bus/pci/devices" / pci_address / "numa_node").read_text())
        listed = (sys / f"devices/system/node/node{node}/cpulist").read_text().strip()
    except (OSError, ValueError):
        return []
    ranges = [part.split("-") for part in listed.split(",") if part]
    return [n for first, *last in ranges for n in range(int(first), int(last[0] if last else first) + 1)]
