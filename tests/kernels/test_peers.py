"""transformer-engine and apex behind our faces: the arguments mean what ours mean, and their absence is said."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor

from llm3d.errors import InputError
from llm3d.kernels import backend, swiglu
from llm3d.kernels import rms_norm as ours
from tests.kernels.exactness import randn

PACKAGES = {"transformer_engine": "transformer-engine", "apex": "apex"}
EPS = 1e-5


@pytest.mark.parametrize("name", PACKAGES)
def test_a_package_that_is_not_there_is_named(name: str) -> None:
    if importlib.util.find_spec(name) is not None:
        pytest.skip(f"{name} is installed")
    message = rf"^kernels\.backend: {name} needs the package {PACKAGES[name]}, which is not installed$"
    before = backend.describe("cpu")
    with pytest.raises(InputError, match=message):
        backend.use(name)
    assert backend.describe("cpu") == before


def test_a_package_without_its_kernels_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """apex can be installed without compiling anything."""
    python_only = ModuleType("apex")
    python_only.__spec__ = importlib.util.spec_from_loader("apex", None)
    monkeypatch.setitem(sys.modules, "apex", python_only)
    monkeypatch.setitem(sys.modules, "fused_layer_norm_cuda", None)
    monkeypatch.delitem(sys.modules, "llm3d.kernels.apex", raising=False)
    with pytest.raises(
        InputError, match=r"needs the package apex, which cannot be imported: .*fused_layer_norm"
    ):
        backend.use("apex")


# ---- stand-ins with the packages' signatures, so that the adapters run where there is no GPU ----


def norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    inverse_rms = (x.float().square().mean(-1) + eps).rsqrt()
    return (x.float() * inverse_rms[:, None] * weight.float()).to(x.dtype), inverse_rms


def norm_backward(grad: Tensor, x: Tensor, inverse_rms: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    assert inverse_rms.shape == (len(x),) and inverse_rms.dtype == torch.float32
    with backend.using("reference"):
        grad_x, grad_weight = ours.rms_norm_backward(grad, x, weight, inverse_rms[:, None])
    return grad_x, grad_weight.to(weight.dtype)


class TransformerEngine(ModuleType):
    """As in transformer_engine_torch's pybind.cpp, 2.x."""

    @staticmethod
    def rmsnorm_fwd(
        input: Tensor,  # noqa: A002
        weight: Tensor,
        eps: float,
        ln_out: None,
        quantizer: None,
        otype: str,
        sm_margin: int,
        zero_centered_gamma: bool,
    ) -> tuple[Tensor, None, Tensor]:
        assert (ln_out, quantizer, otype, sm_margin, zero_centered_gamma) == (None, None, "bf16", 0, False)
        y, inverse_rms = norm(input, weight, eps)
        return y, None, inverse_rms

    @staticmethod
    def rmsnorm_bwd(
        dz: Tensor, x: Tensor, rsigma: Tensor, gamma: Tensor, sm_margin: int, zero_centered_gamma: bool
    ) -> list[Tensor]:
        assert (sm_margin, zero_centered_gamma) == (0, False)
        return [*norm_backward(dz, x, rsigma, gamma)]

    @staticmethod
    def rmsnorm_bwd_add(
        dz: Tensor,
        x: Tensor,
        add: Tensor,
        rsigma: Tensor,
        gamma: Tensor,
        sm_margin: int,
        zero_centered_gamma: bool,
    ) -> list[Tensor]:
        dx, dgamma = TransformerEngine.rmsnorm_bwd(dz, x, rsigma, gamma, sm_margin, zero_centered_gamma)
        return [dx + add, dgamma]

    @staticmethod
    def swiglu(input: Tensor, quantizer: None) -> Tensor:  # noqa: A002
        gate, up = input.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up

    @staticmethod
    def dswiglu(grad: Tensor, fwd_input: Tensor, quantizer: None) -> Tensor:
        leaf = fwd_input.detach().requires_grad_()
        return torch.autograd.grad(TransformerEngine.swiglu(leaf, None), leaf, grad)[0]


class Apex(ModuleType):
    """As in apex's layer_norm_cuda.cpp."""

    @staticmethod
    def rms_forward_affine(
        x: Tensor, normalized_shape: torch.Size, gamma: Tensor, epsilon: float
    ) -> list[Tensor]:
        assert normalized_shape == x.shape[1:] and x.is_contiguous()
        return [*norm(x, gamma, epsilon)]

    @staticmethod
    def rms_backward_affine(
        dout: Tensor,
        invvar: Tensor,
        input_or_output: Tensor,
        normalized_shape: torch.Size,
        gamma: Tensor,
        epsilon: float,
        memory_efficient: bool,
    ) -> list[Tensor]:
        assert all(t.is_contiguous() for t in (dout, invvar, input_or_output)) and not memory_efficient
        return [*norm_backward(dout, input_or_output, invvar, gamma)]


@pytest.fixture(params=PACKAGES)
def adapter(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    stand_ins = {
        name: ModuleType(name) for name in ("transformer_engine", "transformer_engine.pytorch", "apex")
    }
    stand_ins["transformer_engine.pytorch.constants"] = ModuleType("constants")
    stand_ins["transformer_engine.pytorch.constants"].TE_DType = {torch.bfloat16: "bf16"}  # type: ignore[attr-defined]
    stand_ins["transformer_engine_torch"] = TransformerEngine("transformer_engine_torch")
    stand_ins["fused_layer_norm_cuda"] = Apex("fused_layer_norm_cuda")
    for name, module in stand_ins.items():
        monkeypatch.setitem(sys.modules, name, module)
    with backend.using(request.param):
        yield importlib.import_module(f"llm3d.kernels.{request.param}")
    del sys.modules[f"llm3d.kernels.{request.param}"]


def test_norms_are_ours(adapter: ModuleType) -> None:
    x, grad, grad_sum = (randn(5, 24, seed=seed).bfloat16() for seed in range(3))
    weight = randn(24, seed=9).bfloat16()
    y, inverse_rms = adapter.rms_norm_forward(x, weight, EPS)
    expected_y, expected_rms = ours.rms_norm_forward(x, weight, EPS)
    close = {"rtol": 2**-7, "atol": 2**-7}
    torch.testing.assert_close(y, expected_y, **close)
    torch.testing.assert_close(inverse_rms, expected_rms)
    for addend in (None, grad_sum):
        actual = adapter.rms_norm_backward(grad, x, weight, inverse_rms, addend)
        expected = ours.rms_norm_backward(grad, x, weight, expected_rms, addend)
        assert actual[1].dtype == torch.float32
        torch.testing.assert_close(actual[0], expected[0], **close)
        torch.testing.assert_close(actual[1], expected[1], **close)


def test_swiglu_is_ours(adapter: ModuleType) -> None:
    if not hasattr(adapter, "swiglu_forward"):
        pytest.skip(f"{adapter.__name__} offers none")
    gate_up, grad = randn(3, 20).bfloat16(), randn(3, 10, seed=1).bfloat16()
    close = {"rtol": 2**-6, "atol": 2**-6}
    torch.testing.assert_close(adapter.swiglu_forward(gate_up), swiglu.swiglu_forward(gate_up), **close)
    actual, expected = gate_up.clone(), gate_up.clone()
    adapter.swiglu_backward_(grad, actual)
    swiglu.swiglu_backward_(grad, expected)
    torch.testing.assert_close(actual, expected, **close)


@pytest.mark.gpu
@pytest.mark.parametrize("name", PACKAGES)
def test_the_packages_themselves_are_as_exact(name: str) -> None:
    from llm3d.bench.accuracy import check_kernels

    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    pytest.importorskip(
        "transformer_engine_torch" if name == "transformer_engine" else "fused_layer_norm_cuda"
    )
    with backend.using(name):
        checked = [result for result in check_kernels(torch.bfloat16, "cuda") if result.backend == name]
    assert checked
    assert all(result.holds for result in checked), checked
