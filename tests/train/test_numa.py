"""A GPU's processors are those that the kernel lists for its NUMA node."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm3d.train.numa import processors_near

ADDRESS = "0000:1b:00.0"


@pytest.mark.parametrize(
    ("node", "listed", "expected"),
    [
        ("1\n", "4-7\n", [4, 5, 6, 7]),
        ("0\n", "0-2,8,10-11\n", [0, 1, 2, 8, 10, 11]),
        ("-1\n", "0-3\n", []),  # the kernel does not know
        ("0\n", "\n", []),
    ],
)
def test_the_processors_of_its_node(tmp_path: Path, node: str, listed: str, expected: list[int]) -> None:
    device = tmp_path / "bus/pci/devices" / ADDRESS
    device.mkdir(parents=True)
    (device / "numa_node").write_text(node)
    nodes = tmp_path / f"devices/system/node/node{max(0, int(node))}"
    nodes.mkdir(parents=True)
    (nodes / "cpulist").write_text(listed)
    assert processors_near(ADDRESS, tmp_path) == expected
    assert processors_near("0000:ff:00.0", tmp_path) == []
