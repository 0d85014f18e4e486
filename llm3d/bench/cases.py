"""Each operation at given sizes: as llm3d computes it and as one would write it in PyTorch.

`llm3d kernels --check` holds the two against fp64, `llm3d bench kernels` against the clock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from llm3d.kernels.accumulate import accumulate_
from llm3d.kernels.adamw import adamw_
from llm3d.kernels.cross_entropy import cross_entropy_backward_, softmax_stats
from llm3d.kernels.gradient_norm import squared_norm
from llm3d.kernels.paged_attention import kv_cache_append_, paged_decode_attention
from llm3d.kernels.rms_norm import add_rms_norm_forward, rms_norm_backward, rms_norm_forward
from llm3d.kernels.rope import inverse_frequencies, rope_tables, rotate_
from llm3d.kernels.swiglu import swiglu_backward_, swiglu_forward

Results = tuple[Tensor, ...]
Prepare = Callable[[], Callable[[], Results]]  # what is outside the clock -> what is inside


@dataclass(frozen=True)
class Sizes:
    tokens: int = 2048
    hidden: int = 4096
    heads: int = 32
    intermediate: int = 11008
    vocabulary: int = 32000
    parameters: int = 150_000_000
    context: int = 2048  # tokens of each of 16 sequences in the cache


class Functions(NamedTuple):
    """What llm3d is held against; None for what there is none of."""

    rms_norm: Callable[[Tensor, Tensor, float], Tensor] | None
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], Results] | None
    rope: Callable[[Tensor, Tensor, Tensor], Tensor] | None  # cos, sin: [tokens, 1, head_dim]
    swiglu: Callable[[Tensor, Tensor], Tensor] | None  # of gate and up, apart
    cross_entropy: Callable[[Tensor, Tensor], Tensor] | None  # of each token


@dataclass(frozen=True)
class Case:
    """op: its name in torch.ops.llm3d. least_bytes: inputs read once, outputs written once; moved_bytes: what llm3d's
    algorithm reads and writes, its workspace included."""

    name: str
    op: str
    ours: Prepare
    theirs: Prepare | None
    least_bytes: int
    moved_bytes: int


# ---- as one would write it in PyTorch ----


def _eager_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


def _eager_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Results:
    total = x + residual
    return total, F.rms_norm(total, weight.shape, weight, eps)


def _eager_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def _eager_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def _eager_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.to(wide), targets, reduction="none")


EAGER = Functions(_eager_rms_norm, _eager_add_rms_norm, _eager_rope, _eager_swiglu, _eager_cross_entropy)


# ---- cases ----


def make_cases(
    sizes: Sizes, dtype: torch.dtype, device: torch.device | str, functions: Functions = EAGER
) -> Iterator[Case]:
    """Cases in one dtype; the numbers are the same in every dtype from bf16 up."""
    for make in (_rms_norm, _add_rms_norm, _rope, _swiglu, _cross_entropy):
        yield from make(sizes, _Numbers(dtype, device), functions)
    for make_alone in (_accumulate, _adamw, _gradient_norm, _kv_cache_append, _decode):
        yield from make_alone(sizes, _Numbers(dtype, device), functions is EAGER)


class _Numbers:
    """Random numbers that bf16 can hold, drawn on the device; each call's are its own."""

    def __init__(self, dtype: torch.dtype, device: torch.device | str) -> None:
        self.dtype, self.device, self._generator = dtype, device, torch.Generator(device).manual_seed(0)
        self.wide = torch.promote_types(dtype, torch.float32)
        self.element_size = torch.empty((), dtype=dtype).element_size()

    def __call__(self, *shape: int, scale: float = 1.0) -> Tensor:
        values = torch.randn(*shape, generator=self._generator, dtype=torch.float32, device=self.device)
        return values.mul_(scale).bfloat16().to(self.dtype)


def _nbytes(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _forward(function: Callable[..., Tensor | Results] | None, *inputs: Tensor | float) -> Prepare | None:
    if function is None:
        return None

    def run() -> Results:
        with torch.no_grad():
            result = function(*inputs)
        return result if isinstance(result, tuple) else (result,)

    return lambda: run


def _backward(
    function: Callable[..., Tensor | Results] | None, grads: Results, inputs: Results, *constants: object
) -> Prepare | None:
    """The backward of `function` by autograd, without the forward pass: gradients of `inputs`."""
    if function is None:
        return None

    def prepare() -> Callable[[], Results]:
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        outputs = function(*leaves, *constants)
        return lambda: torch.autograd.grad(outputs, leaves, grads, retain_graph=True)

    return prepare


def _in_place(x: Tensor, function: Callable[[Tensor], object]) -> Prepare:
    """What overwrites x, on a fresh copy of it."""

    def prepare() -> Callable[[], Results]:
        copy = x.clone()

        def run() -> Results:
            function(copy)
            return (copy,)

        return run

    return prepare


def _always(function: Callable[[], Results]) -> Prepare:
    return lambda: function


def _rms_norm(sizes: Sizes, numbers: _Numbers, functions: Functions) -> Iterator[Case]:
    x, grad = numbers(sizes.tokens, sizes.hidden), numbers(sizes.tokens, sizes.hidden)
    weight, eps = numbers(sizes.hidden), 1e-5
    inverse_rms = rms_norm_forward(x, weight, eps)[1]
    moved = _nbytes(x, x, weight, inverse_rms)
    yield Case(
        "RMSNorm forward",
        "rms_norm_forward",
        _always(lambda: rms_norm_forward(x, weight, eps)[:1]),
        _forward(functions.rms_norm, x, weight, eps),
        moved,
        moved,
    )
    moved = _nbytes(x, grad, x, weight, inverse_rms) + 4 * sizes.hidden
    yield Case(
        "RMSNorm backward",
        "rms_norm_backward",
        _always(lambda: rms_norm_backward(grad, x, weight, inverse_rms)),
        _backward(functions.rms_norm, (grad,), (x, weight), eps),
        moved,
        moved + _partial_sums(sizes, numbers),
    )


def _partial_sums(sizes: Sizes, numbers: _Numbers) -> int:
    """Bytes of the weight gradient's parts, written and read: as many as backward has blocks of rows."""
    parts = min(64, -(-sizes.tokens // 32))
    if torch.device(numbers.device).type == "cuda":  # as csrc/rms_norm/cuda.cu has them for rows in registers
        threads = 32 * -(-sizes.hidden * numbers.element_size // (16 * 4 * 32))
        blocks = torch.cuda.get_device_properties(numbers.device).multi_processor_count * (512 // threads)
        parts = min(sizes.tokens, blocks)
    return 2 * 4 * sizes.hidden * parts


def _add_rms_norm(sizes: Sizes, numbers: _Numbers, functions: Functions) -> Iterator[Case]:
    x, residual = numbers(2, sizes.tokens, sizes.hidden)
    grad_sum, grad_y = numbers(2, sizes.tokens, sizes.hidden)
    weight, eps = numbers(sizes.hidden), 1e-5

    def prepare_forward() -> Callable[[], Results]:
        copy = x.clone()
        return lambda: (copy, add_rms_norm_forward(copy, residual, weight, eps)[0])

    def prepare_backward() -> Callable[[], Results]:
        total = x + residual
        inverse_rms = rms_norm_forward(total, weight, eps)[1]

        def run() -> Results:
            grad, grad_weight = rms_norm_backward(grad_y, total, weight, inverse_rms, grad_sum)
            return grad, grad, grad_weight

        return run

    moved = _nbytes(x, residual, x, x, weight) + 4 * sizes.tokens
    yield Case(
        "residual + RMSNorm forward",
        "add_rms_norm_forward",
        prepare_forward,
        _forward(functions.add_rms_norm, x, residual, weight, eps),
        moved,
        moved,
    )
    moved = _nbytes(x, grad_y, grad_sum, x, weight) + 4 * (sizes.tokens + sizes.hidden)
    yield Case(
        "residual + RMSNorm backward",
        "rms_norm_backward",
        prepare_backward,
        _backward(functions.add_rms_norm, (grad_sum, grad_y), (x, residual, weight), eps),
        moved,
        moved + _partial_sums(sizes, numbers),
    )


def _rope(sizes: Sizes, numbers: _Numbers, functions: Functions) -> Iterator[Case]:
    """Of queries and keys, in two sequences."""
    head_dim = sizes.hidden // sizes.heads
    x, grad = numbers(2, sizes.tokens, 2 * sizes.heads, head_dim)
    tables = rope_tables(sizes.tokens, inverse_frequencies(head_dim, 10000.0).to(numbers.device))
    first = sizes.tokens // 3
    positions = torch.cat([torch.arange(n, dtype=torch.int32) for n in (first, sizes.tokens - first)])
    positions = positions.to(numbers.device)
    cos, sin = (table[positions].to(numbers.dtype).repeat(1, 2)[:, None] for table in tables)
    moved = _nbytes(x, x) + 4 * sizes.tokens * head_dim
    yield Case(
        "RoPE forward",
        "rope_",
        _in_place(x, lambda x: rotate_(x, *tables, positions)),
        _forward(functions.rope, x, cos, sin),
        moved,
        moved,
    )
    yield Case(
        "RoPE backward",
        "rope_",
        _in_place(grad, lambda grad: rotate_(grad, *tables, positions, inverse=True)),
        _backward(functions.rope, (grad,), (x,), cos, sin),
        moved,
        moved,
    )


def _swiglu(sizes: Sizes, numbers: _Numbers, functions: Functions) -> Iterator[Case]:
    gate_up = numbers(sizes.tokens, 2 * sizes.intermediate)
    grad = numbers(sizes.tokens, sizes.intermediate)
    gate, up = (half.contiguous() for half in gate_up.chunk(2, dim=-1))
    moved = _nbytes(gate_up, grad)
    yield Case(
        "SwiGLU forward",
        "swiglu_forward",
        _always(lambda: (swiglu_forward(gate_up),)),
        _forward(functions.swiglu, gate, up),
        moved,
        moved,
    )

    def prepare_backward() -> Callable[[], Results]:
        copy = gate_up.clone()

        def run() -> Results:
            swiglu_backward_(grad, copy)
            return copy.chunk(2, dim=-1)

        return run

    moved = _nbytes(gate_up, grad, gate_up)
    yield Case(
        "SwiGLU backward",
        "swiglu_backward_",
        prepare_backward,
        _backward(functions.swiglu, (grad,), (gate, up)),
        moved,
        moved,
    )


def _cross_entropy(sizes: Sizes, numbers: _Numbers, functions: Functions) -> Iterator[Case]:
    logits = numbers(sizes.tokens, sizes.vocabulary, scale=3.0)
    targets = (torch.arange(sizes.tokens) * 31 % sizes.vocabulary).to(numbers.device)
    weight = torch.full((sizes.tokens,), 0.125, dtype=numbers.wide, device=numbers.device)

    def losses() -> Results:
        maximum, total, target, _ = softmax_stats(logits, targets)
        return (total.log() + (maximum - target),)

    moved = _nbytes(logits, targets) + 16 * sizes.tokens
    yield Case(
        "cross-entropy forward",
        "softmax_stats",
        _always(losses),
        _forward(functions.cross_entropy, logits, targets),
        moved,
        moved,
    )
    maximum, total = softmax_stats(logits, targets)[:2]
    factors = weight / total, -weight, torch.zeros_like(weight)
    moved = _nbytes(logits, logits, targets) + 16 * sizes.tokens
    yield Case(
        "cross-entropy backward",
        "cross_entropy_backward_",
        _in_place(logits, lambda logits: cross_entropy_backward_(logits, targets, maximum, *factors)),
        _backward(functions.cross_entropy, (weight,), (logits,), targets),
        moved,
        moved,
    )


def _accumulate(sizes: Sizes, numbers: _Numbers, with_torch: bool) -> Iterator[Case]:
    gradient = numbers(sizes.hidden, sizes.intermediate)
    total = numbers(sizes.hidden, sizes.intermediate).to(numbers.wide)
    moved = _nbytes(gradient, total, total)
    theirs = _in_place(total, lambda total: total.add_(gradient)) if with_torch else None
    ours = _in_place(total, lambda total: accumulate_(total, gradient))
    yield Case("sum of gradients", "accumulate_", ours, theirs, moved, moved)


def _adamw(sizes: Sizes, numbers: _Numbers, with_torch: bool) -> Iterator[Case]:
    """Gradients come in the dtype, parameters go out in it; in fp32 the parameters are the master weights."""
    device, wide, n = numbers.device, numbers.wide, sizes.parameters
    gradient = numbers(n, scale=1e-2)
    master, exp_avg = numbers(n).to(wide), numbers(n, scale=1e-2).to(wide)
    exp_avg_sq = gradient.to(wide).square() + 1e-6
    parameter = None if numbers.dtype == wide else torch.empty_like(gradient)
    step = torch.tensor(3, device=device)
    lr, scale = (torch.tensor(value, dtype=torch.float64, device=device) for value in (1e-3, 1.0))
    betas, eps, weight_decay = (0.9, 0.95), 1e-8, 0.1

    def prepare() -> Callable[[], Results]:
        weights, *moments = (value.clone() for value in (master, exp_avg, exp_avg_sq))
        tensors = (weights, moments[0], moments[1], gradient, parameter, step, lr, scale)

        def run() -> Results:
            adamw_(*tensors, betas=betas, eps=eps, weight_decay=weight_decay)
            return (weights,)

        return run

    def prepare_torch() -> Callable[[], Results]:
        leaf = master.clone().requires_grad_()
        cast = leaf.grad = gradient if parameter is None else torch.zeros_like(leaf)
        optimizer = torch.optim.AdamW(
            [leaf], lr=1e-3, betas=betas, eps=eps, weight_decay=weight_decay, fused=True
        )
        optimizer.state[leaf] = {
            "step": torch.tensor(2.0, device=device),
            "exp_avg": exp_avg.clone(),
            "exp_avg_sq": exp_avg_sq.clone(),
        }

        def run() -> Results:
            if parameter is None:
                optimizer.step()
            else:
                cast.copy_(gradient)
                optimizer.step()
                parameter.copy_(leaf.detach())
            return (leaf.detach(),)

        return run

    moved = 2 * _nbytes(master, exp_avg, exp_avg_sq) + _nbytes(gradient)
    moved += 0 if parameter is None else _nbytes(parameter)
    yield Case("AdamW", "adamw_", prepare, prepare_torch if with_torch else None, moved, moved)


def _gradient_norm(sizes: Sizes, numbers: _Numbers, with_torch: bool) -> Iterator[Case]:
    gradient = numbers(sizes.parameters)

    def by_torch() -> Results:
        return (torch.linalg.vector_norm(gradient, dtype=numbers.wide)[None],)

    moved = _nbytes(gradient)
    ours = _always(lambda: (squared_norm(gradient)[:1].sqrt(),))
    yield Case("gradient norm", "squared_norm", ours, _always(by_torch) if with_torch else None, moved, moved)


def _cache(sizes: Sizes, numbers: _Numbers) -> tuple[Tensor, Tensor]:
    """Keys and values of 16 sequences, 4 query heads to a key head, in blocks of 16 tokens; and the block table."""
    sequences, block = 16, 16
    blocks = -(-sizes.context // block)
    shape = (sequences * blocks, block, max(1, sizes.heads // 4), sizes.hidden // sizes.heads)
    table = torch.arange(shape[0], dtype=torch.int32, device=numbers.device).view(sequences, -1)
    return numbers(2, *shape), table


def _kv_cache_append(sizes: Sizes, numbers: _Numbers, with_torch: bool) -> Iterator[Case]:
    (keys, values), table = _cache(sizes, numbers)
    new_keys, new_values = numbers(2, len(table), *keys.shape[2:])
    slots = (table[:, -1] * keys.shape[1]).long()

    def ours() -> Results:
        kv_cache_append_(keys, values, new_keys, new_values, slots)
        return keys, values

    def by_torch() -> Results:
        keys.flatten(0, 1)[slots], values.flatten(0, 1)[slots] = new_keys, new_values
        return keys, values

    moved = 2 * _nbytes(new_keys, new_values) + _nbytes(slots)
    theirs = _always(by_torch) if with_torch else None
    yield Case("key-value cache append", "kv_cache_append_", _always(ours), theirs, moved, moved)


def _decode(sizes: Sizes, numbers: _Numbers, with_torch: bool) -> Iterator[Case]:
    (keys, values), table = _cache(sizes, numbers)
    kv_heads, head_dim = keys.shape[2:]
    q = numbers(len(table), sizes.heads, head_dim)
    lengths = torch.full((len(table),), sizes.context, dtype=torch.int32, device=numbers.device)

    def by_torch() -> Results:
        k, v = (
            part.view(len(table), -1, kv_heads, head_dim)[:, : sizes.context].transpose(1, 2)
            for part in (keys, values)
        )
        grouped = kv_heads != sizes.heads
        return (F.scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=grouped)[:, :, 0],)

    moved = _nbytes(keys, values, q, q, table, lengths)
    yield Case(
        "paged decode attention",
        "paged_decode_attention",
        _always(lambda: (paged_decode_attention(q, keys, values, table, lengths, head_dim**-0.5),)),
        _always(by_torch) if with_torch else None,
        moved,
        moved,
    )
