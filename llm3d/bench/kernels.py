"""How fast each operation is, beside PyTorch and others: what `llm3d bench kernels` prints."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import torch

from llm3d.bench.cases import EAGER, Case, Functions, Prepare, Results, Sizes, make_cases
from llm3d.kernels import backend


@dataclass(frozen=True)
class Measured:
    """Seconds of each round, by contender; the contenders took turns."""

    name: str
    dtype: str
    backend: str
    least_bytes: int
    moved_bytes: int
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def median(self, contender: str = "llm3d") -> float:
        return statistics.median(self.seconds[contender])

    def speedup(self, over: str) -> tuple[float, float, float]:
        """Median, least and largest of the rounds' ratios: how many times as fast as `over` llm3d is."""
        pairs = zip(self.seconds[over], self.seconds["llm3d"], strict=True)
        ratios = [theirs / ours for theirs, ours in pairs]
        return statistics.median(ratios), min(ratios), max(ratios)


def measure_kernels(
    sizes: Sizes, dtypes: Sequence[torch.dtype], device: torch.device, rounds: int, compiled: bool
) -> list[Measured]:
    """Each operation in each dtype, every contender once a round after two rounds to warm up."""
    others = {"PyTorch": EAGER}
    if compiled:
        compile_: Callable[[Any], Any] = partial(torch.compile, dynamic=False)
        others["compiled"] = Functions(*map(compile_, EAGER))
    if (liger := _liger(device)) is not None:
        others["Liger"] = liger
    return [
        _measure(dict(zip(others, cases, strict=True)), dtype, device, rounds)
        for dtype in dtypes
        # One operation at a time: its tensors are freed before the next one's are made.
        for cases in zip(*(make_cases(sizes, dtype, device, its) for its in others.values()), strict=True)
    ]


def bandwidth(device: torch.device, rounds: int = 15) -> float:
    """Bytes a second, read and written: the most seen in copying a tensor of 2 GiB and in adding to it in place."""
    x = torch.zeros(2**29, device=device)
    y = torch.zeros_like(x)
    runs: list[Callable[[], object]] = [lambda: y.copy_(x), lambda: x.add_(1.0)]
    return 2 * x.numel() * x.element_size() / min(_timed(run, device) for run in runs for _ in range(rounds))


def _measure(cases: dict[str, Case], dtype: torch.dtype, device: torch.device, rounds: int) -> Measured:
    case = next(iter(cases.values()))
    name = str(dtype).removeprefix("torch.")
    contenders: dict[str, Prepare] = {"llm3d": case.ours}
    contenders |= {other: its.theirs for other, its in cases.items() if its.theirs is not None}
    measured = Measured(
        case.name,
        name,
        backend.of(case.op, device),
        case.least_bytes,
        case.moved_bytes,
        {contender: [] for contender in contenders},
    )
    for number in range(-2, rounds):
        for contender, prepare in contenders.items():
            seconds = _timed(prepare(), device)
            if number >= 0:
                measured.seconds[contender].append(seconds)
    return measured


def _timed(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cpu":
        started = time.perf_counter()
        run()
        return time.perf_counter() - started
    # Empties the second-level cache; and while it runs the host is ahead, so that no launch is waited for.
    torch.empty(2**26, device=device).zero_()
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    stop.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(stop) / 1000


def _liger(device: torch.device) -> Functions | None:
    """Liger-Kernel's functions, where it and a GPU are there."""
    if device.type != "cuda" or find_spec("liger_kernel") is None:
        return None
    from liger_kernel.transformers import functional

    fused_add = getattr(functional, "liger_fused_add_rms_norm", None)

    def add_rms_norm(x: Any, residual: Any, weight: Any, eps: float) -> Results:
        y, total = fused_add(x, residual, weight, eps, in_place=False)  # type: ignore[misc]
        return total, y

    return Functions(
        rms_norm=lambda x, weight, eps: functional.liger_rms_norm(x, weight, eps, in_place=False),
        add_rms_norm=add_rms_norm if fused_add is not None else None,
        rope=None,  # takes queries and keys in another layout
        swiglu=functional.liger_swiglu,
        cross_entropy=lambda logits, targets: functional.liger_cross_entropy(
            logits, targets, reduction="none"
        ),
    )


def print_measured(results: Sequence[Measured], streaming: float) -> None:
    """A row an operation; forward and backward together; and in a last line what share of the peak is reached."""
    others = dict.fromkeys(other for result in results for other in result.seconds if other != "llm3d")
    header = f"{'':28} {'':9} {'':19} {'ms':>8} {'traffic':>7} {'GB/s':>7} {'of peak':>7}"
    print(header + "".join(f" {other + ' / llm3d':>27}" for other in others))
    for result in results:
        speed = result.least_bytes / result.median()
        traffic = result.moved_bytes / result.least_bytes
        row = (
            f"{result.name:28} {result.dtype:9} {result.backend:19} {result.median() * 1e3:8.3f} {traffic:7.2f}"
            f" {speed / 1e9:7.1f} {speed / streaming:7.0%}"
        )
        print(row + "".join(_ratio(result, other) for other in others))
    print("\nforward and backward together")
    for forward, backward in pairwise(results):
        family = forward.name.removesuffix(" forward")
        if backward.name == f"{family} backward":
            ours = forward.median() + backward.median()
            row = f"{family:28} {forward.dtype:9} {'':19} {ours * 1e3:8.3f}"
            for other in forward.seconds:
                if other != "llm3d":
                    theirs = forward.median(other) + backward.median(other)
                    row += f"   {other} / llm3d {theirs / ours:.2f}"
            print(row)
    worst = min(results, key=lambda result: result.least_bytes / result.median())
    shares = sorted(result.least_bytes / result.median() / streaming for result in results)
    print(
        f"\n{len(results)} operations at {statistics.median(shares):.0%} of the peak bandwidth in the median, "
        f"at {shares[0]:.0%} the slowest, {worst.name} in {worst.dtype}"
    )


def _ratio(result: Measured, other: str) -> str:
    if other not in result.seconds:
        return f" {'':>27}"
    median, least, largest = result.speedup(other)
    return f" {f'{median:.2f} ({least:.2f}-{largest:.2f})':>27}"
