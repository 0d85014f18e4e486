"""Benchmarks are programs beside each other, not a package: they find each other as they do when they run."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
