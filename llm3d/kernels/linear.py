"""The matrix products of linear layers, each by the fastest library that PyTorch brings for it.

On a CPU there are two for fp32: BLAS, which torch.mm calls (MKL in PyTorch's wheels for x86, whose code for processors
of other makers is its slower one), and oneDNN. Which is faster depends on the processor, the product and its sizes:
`faster_by_onednn` finds it out, `take` keeps it. On a GPU, and in bf16, for which PyTorch takes oneDNN itself, there is
torch.mm alone.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from llm3d.kernels.accumulate import accumulate_
from llm3d.kernels.paper import is_cuda

Kind = Literal["forward", "input gradient", "weight gradient"]
KINDS: tuple[Kind, ...] = ("forward", "input gradient", "weight gradient")

MIN_ROWS = 64  # below, as where text is written token by token, no product is worth a second library
MIN_WEIGHTS = 2**18  # of a matrix: the gain on smaller ones is small, and hard to measure
_GAIN = 1.25  # that is worth it, and that noise does not give: the same machine chooses the same each time
_MULTIPLICATIONS, _ROUNDS = 2**27, 5  # of a product that is timed, and how often it is


class Product(NamedTuple):
    """One of the products with a weight [out_features, in_features]."""

    kind: Kind
    out_features: int
    in_features: int


_by_onednn = frozenset[Product]()


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [rows, in] weight^T -> [rows, out]."""
    if _by_onednn and _is_by_onednn("forward", x, weight):
        return _onednn(x, weight)
    return x @ weight.t()


def linear_input_gradient(grad_output: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """grad_output [rows, out] weight -> [rows, in], in `out` where it is given."""
    if _by_onednn and _is_by_onednn("input gradient", grad_output, weight):
        product = _onednn(grad_output, weight.t())
        return product if out is None else out.copy_(product)
    return torch.mm(grad_output, weight) if out is None else torch.mm(grad_output, weight, out=out)


def add_linear_weight_gradient_(total: Tensor, grad_output: Tensor, x: Tensor, replace: bool = False) -> None:
    """total [out, in] += grad_output^T x. replace: what total holds counts as zero, whatever it is.

    total: of the dtype of grad_output [rows, out] and x [rows, in], or fp32. The sum is rounded to total's dtype once;
    on a CPU a product in bf16 is rounded to that before it is added.
    """
    transposed, beta = grad_output.t(), 0 if replace else 1
    if _by_onednn and _is_by_onednn("weight gradient", grad_output, total):
        _add(total, _onednn(transposed, x.t()), replace)
    elif grad_output.dtype == total.dtype:
        total.addmm_(transposed, x, beta=beta)
    elif not is_cuda(grad_output):
        _add(total, transposed @ x, replace)
    elif _adds_to_fp32(total.device):
        torch.addmm(total, transposed, x, out_dtype=total.dtype, beta=beta, out=total)
    else:
        _add(total, torch.mm(transposed, x, out_dtype=total.dtype), replace)


@functools.cache
def faster_by_onednn(out_features: int, in_features: int) -> tuple[Kind, ...]:
    """The products with a weight [out, in] that oneDNN computes faster here, on the threads that there are.

    Takes some tens of milliseconds, once.
    """
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return ()
    rows = max(MIN_ROWS, min(1024, _MULTIPLICATIONS // (out_features * in_features)))
    x, weight = torch.ones(rows, in_features), torch.ones(out_features, in_features)
    grad_output, total = torch.ones(rows, out_features), torch.zeros_like(weight)
    products: dict[Kind, Callable[[], object]] = {
        "forward": lambda: linear(x, weight),
        "input gradient": lambda: linear_input_gradient(grad_output, weight),
        "weight gradient": lambda: add_linear_weight_gradient_(total, grad_output, x),
    }
    return tuple(
        kind for kind in KINDS if _is_faster(Product(kind, out_features, in_features), products[kind])
    )


def take(shape: tuple[int, int], by_onednn: Iterable[Kind]) -> None:
    """Have oneDNN compute these products with weights of a shape [out, in] from now on, and BLAS the others."""
    global _by_onednn
    others = (product for product in _by_onednn if product[1:] != shape)
    _by_onednn = frozenset((*others, *(Product(kind, *shape) for kind in by_onednn)))


def describe() -> str | None:
    """What oneDNN computes, for people; None: nothing."""
    by_kind = {kind: sorted(p[1:] for p in _by_onednn if p.kind == kind) for kind in KINDS}
    parts = [
        f"{kind} {', '.join(f'{out}x{into}' for out, into in shapes)}"
        for kind, shapes in by_kind.items()
        if shapes
    ]
    return "; ".join(parts) or None


def _is_by_onednn(kind: Kind, rows: Tensor, weight: Tensor) -> bool:
    return (
        Product(kind, *weight.shape) in _by_onednn
        and len(rows) >= MIN_ROWS
        and rows.dtype == weight.dtype == torch.float32
        and rows.device.type == weight.device.type == "cpu"
    )


def _onednn(x: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def _add(total: Tensor, product: Tensor, replace: bool) -> None:
    if replace:
        total.copy_(product)
    else:
        accumulate_(total, product)


@functools.cache
def _adds_to_fp32(device: torch.device) -> bool:
    """Whether a product in bf16 can be added to an fp32 sum as it is made, which newer versions of PyTorch can.

    On paper it is not, so that the memory that is planned suffices for any version.
    """
    if device.type == "meta":
        return False
    total, ones = torch.ones(16, 16, device=device), torch.ones(16, 16, device=device, dtype=torch.bfloat16)
    try:
        torch.addmm(total, ones, ones, out_dtype=total.dtype, out=total)
    except (RuntimeError, TypeError):
        return False
    return bool((total == 17).all())


def _is_faster(product: Product, compute: Callable[[], object]) -> bool:
    """Whether a product takes oneDNN less time, the shortest of some rounds; what else runs disturbs both alike."""
    global _by_onednn
    before = _by_onednn
    times: dict[bool, list[float]] = {False: [], True: []}
    try:
        for _ in range(1 + _ROUNDS):
            for by_onednn, taken in times.items():
                _by_onednn = frozenset({product}) if by_onednn else frozenset()
                started = time.perf_counter()
                compute()
                taken.append(time.perf_counter() - started)
    finally:
        _by_onednn = before
    blas, onednn = (min(taken[1:]) for taken in times.values())
    return blas > _GAIN * onednn
