"""Causal attention over packed sequences against fp64 softmax under an explicit mask."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.attention
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from llm3d.errors import InputError
from llm3d.kernels.attention import AttentionFunction, attention, describe, parts, use
from tests.kernels.exactness import assert_as_exact_as, assert_close, randn

LENGTHS = [
    [1],
    [7],
    [1, 1, 1],
    [5, 5, 5],
    [13, 1, 2, 31, 1],
    list(range(1, 18)),
]
HEADS = [(1, 1), (3, 3), (6, 2), (5, 1)]  # of queries, of keys and values


def tensors(lengths: list[int], heads: int, kv_heads: int) -> list[Tensor]:
    """q, k, v and the output's gradient."""
    counts = (heads, kv_heads, kv_heads, heads)
    return [randn(sum(lengths), count, 8, seed=i) for i, count in enumerate(counts)]


def ours(lengths: list[int], q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> list[Tensor]:
    """The output, then the gradients of q, k and v."""
    bounds = torch.tensor([0, *lengths], device=q.device).cumsum(0).int()
    qkv = torch.cat([q, k, v], dim=1).requires_grad_()
    out = attention(qkv, q.shape[1], bounds, max(lengths))
    (grad_qkv,) = torch.autograd.grad(out, qkv, grad)
    assert grad_qkv.is_contiguous(), "rotary positions and the projection go on with it as it is"
    return [out.detach(), *parts(grad_qkv, q.shape[1])]


def by_autograd(lengths: list[int], q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> list[Tensor]:
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    q, k, v = inputs
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(q.device)
    at = torch.arange(len(q), device=q.device)
    visible = (sequence[:, None] == sequence) & (at[:, None] >= at)
    scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    out = torch.einsum("hqk,khd->qhd", weights, v)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]


@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_fp32_is_the_definition(lengths: list[int], heads: int, kv_heads: int) -> None:
    inputs = tensors(lengths, heads, kv_heads)
    actual = ours(lengths, *(x.float() for x in inputs))
    largest = max(float(x.abs().max()) for x in inputs)
    for ours_, exact in zip(actual, by_autograd(lengths, *inputs), strict=True):
        assert float((ours_ - exact).abs().max()) <= 1e-5 * largest


@pytest.mark.parametrize(("heads", "kv_heads"), HEADS[2:])
@pytest.mark.parametrize("lengths", LENGTHS[3:], ids=str)
def test_bf16_is_as_exact_as_torch(lengths: list[int], heads: int, kv_heads: int) -> None:
    inputs = tensors(lengths, heads, kv_heads)
    narrow = [x.bfloat16() for x in inputs]
    results = zip(
        ours(lengths, *narrow), by_autograd(lengths, *narrow), by_autograd(lengths, *inputs), strict=True
    )
    for actual, theirs, exact in results:
        assert_as_exact_as(theirs, actual, exact)


def test_scores_of_any_size_stay_finite() -> None:
    lengths = [3, 11]
    inputs = tensors(lengths, 4, 2)
    inputs[0] *= 1e3
    for actual, exact in zip(
        ours(lengths, *(x.float() for x in inputs)), by_autograd(lengths, *inputs), strict=True
    ):
        assert_close(actual, exact, tolerance=1e-3)


def test_under_no_grad_it_is_the_same() -> None:
    q, k, v, _ = tensors([13, 1, 2], 6, 2)
    qkv = torch.cat([q, k, v], dim=1).float()
    bounds = torch.tensor([0, 13, 14, 16], dtype=torch.int32)
    with torch.no_grad():
        alone = attention(qkv, 6, bounds, 13)
    assert torch.equal(alone, attention(qkv.requires_grad_(), 6, bounds, 13))


class Operations(TorchDispatchMode):
    """The names of the operations that run, and of which shapes; not those that ask a tensor what it is."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, list[tuple[int, ...]]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        shapes = [tuple(x.shape) for x in args if isinstance(x, Tensor)]
        if func.namespace == "aten":
            self.seen.append((func.overloadpacket.__name__, shapes))
        return func(*args, **(kwargs or {}))


class Kept:
    """What forward leaves for backward."""

    def save_for_backward(self, *tensors: Tensor) -> None:
        self.saved_tensors = tensors


def test_a_gpu_gets_grouped_heads_as_they_are_and_one_gradient() -> None:
    """On tensors without data: what would be launched."""
    kept, tokens, heads, kv_heads, size = Kept(), 13, 6, 2, 64
    with FakeTensorMode(), torch.no_grad(), Operations() as operations:
        qkv = torch.empty(tokens, heads + 2 * kv_heads, size, dtype=torch.bfloat16, device="cuda")
        bounds = torch.empty(3, dtype=torch.int32, device="cuda")
        out = AttentionFunction.forward(kept, qkv, heads, bounds, 7)
        grad_qkv, *_ = AttentionFunction.backward(kept, torch.empty_like(out))
    assert out.shape == (tokens, heads, size)
    assert grad_qkv.shape == qkv.shape and grad_qkv.is_contiguous()
    bytes_of_activations = sum(x.nbytes for x in kept.saved_tensors if x.numel() > 4)
    assert bytes_of_activations == qkv.nbytes + out.nbytes + 4 * tokens * heads, "and log-sum-exp in fp32"
    work = [(name, shapes) for name, shapes in operations.seen if not name.startswith(("empty", "split"))]
    assert [name for name, _ in work] == ["_flash_attention_forward", "_flash_attention_backward", "cat"]
    keys = (tokens, kv_heads, size)
    assert work[0][1][1:3] == work[1][1][2:4] == [keys, keys]


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A GPU that there is not; -> what PyTorch was told to put in place of its flash attention."""
    active: list[str] = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", active.append)
    monkeypatch.setattr(torch.nn.attention, "restore_flash_attention_impl", active.clear)
    yield active
    use("auto", "cuda")


def test_the_back_end_is_chosen_and_said(hopper: list[str]) -> None:
    for choice, said, activated in (
        ("auto", "fa2", []),
        ("fa3", "fa3", ["FA3"]),
        ("cudnn", "cudnn", []),
        ("fa4", "fa4", ["FA4"]),
        ("fa2", "fa2", []),
    ):
        use(choice, "cuda")
        assert (describe("cuda"), hopper) == (said, activated)


def test_a_cpu_has_no_choice() -> None:
    for choice in ("fa3", "cudnn", "auto"):
        use(choice, "cpu")
        assert describe("cuda") == "fa2"


@pytest.mark.parametrize(
    ("choice", "capability", "deterministic", "said"),
    [
        ("fa3", (8, 0), False, "fa3 is for GPUs of compute capability 9.x; this one has 8.0"),
        ("fa3", (9, 0), True, "fa3 needs the module flash_attn_interface, which cannot be imported"),
        ("fa4", (9, 0), False, "fa4 needs the module flash_attn.cute, which cannot be imported"),
        ("cudnn", (9, 0), True, "cudnn is not deterministic; train.deterministic=false allows it"),
    ],
)
def test_what_is_not_there_is_told_with_the_setting(
    choice: str,
    capability: tuple[int, int],
    deterministic: bool,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    with pytest.raises(InputError, match=rf"^kernels\.attention: {said}"):
        use(choice, "cuda")
    assert describe("cuda") == "fa2"


def test_an_older_torch_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.delattr(torch.nn.attention, "activate_flash_attention_impl")
    with pytest.raises(InputError, match=r"^kernels\.attention: fa3 needs a newer PyTorch"):
        use("fa3", "cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("choice", ["fa2", "fa3", "fa4", "cudnn"])
@pytest.mark.parametrize("lengths", [[7], [5, 5, 5], [13, 1, 2, 31, 1]], ids=str)
def test_bf16_on_a_gpu_is_as_exact_as_torch(lengths: list[int], choice: str) -> None:
    try:
        use(choice, "cuda")
    except InputError as missing:
        pytest.skip(str(missing))
    inputs = [torch.cat([x] * 8, dim=-1).cuda() for x in tensors(lengths, 6, 2)]
    narrow = [x.bfloat16() for x in inputs]
    try:
        found = ours(lengths, *narrow)
    finally:
        use("auto", "cuda")
    results = zip(found, by_autograd(lengths, *narrow), by_autograd(lengths, *inputs), strict=True)
    for actual, theirs, exact in results:
        assert_as_exact_as(theirs, actual, exact)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_same_bits_again_where_it_is_to() -> None:
    lengths = [300, 1, 77]
    inputs = [torch.cat([x] * 8, dim=-1).cuda().bfloat16() for x in tensors(lengths, 6, 2)]
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        first, *others = (ours(lengths, *inputs) for _ in range(4))
    finally:
        torch.use_deterministic_algorithms(before)
    for other in others:
        assert all(torch.equal(x, y) for x, y in zip(first, other, strict=True))
