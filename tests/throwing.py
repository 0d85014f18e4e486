"""Operations that raise on a GPU under torch.use_deterministic_algorithms(True), found on a CPU or on paper."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode


class Call:
    """An operation with its arguments by name, whether they were given by place or left out."""

    def __init__(self, operation: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        schema = operation._schema
        self.name, self.overload = schema.name.removeprefix("aten::").rstrip("_"), schema.overload_name
        names = [argument.name for argument in schema.arguments]
        self.arguments = dict(zip(names, args, strict=False)) | kwargs

    def __getitem__(self, name: str) -> Any:
        return self.arguments.get(name)


def _always(call: Call) -> bool:
    return True


def _of_floats(call: Call) -> bool:
    dtype = call["dtype"] or call["self"].dtype
    return bool(dtype.is_floating_point or dtype.is_complex)


# By torch's name, as the documentation of use_deterministic_algorithms has it: what is dispatched, and when it raises.
DOCUMENTED: dict[str, tuple[tuple[str, ...], Callable[[Call], bool]]] = {
    "torch.nn.AvgPool3d": (("avg_pool3d_backward",), _always),
    "torch.nn.AdaptiveAvgPool2d": (("_adaptive_avg_pool2d_backward",), _always),
    "torch.nn.AdaptiveAvgPool3d": (("_adaptive_avg_pool3d_backward",), _always),
    "torch.nn.AdaptiveMaxPool2d": (("adaptive_max_pool2d_backward",), _always),
    "torch.nn.FractionalMaxPool2d": (("fractional_max_pool2d_backward",), _always),
    "torch.nn.FractionalMaxPool3d": (("fractional_max_pool3d_backward",), _always),
    "torch.nn.MaxUnpool1d": (("max_unpool2d",), _always),
    "torch.nn.MaxUnpool2d": (("max_unpool2d",), _always),
    "torch.nn.MaxUnpool3d": (("max_unpool3d",), _always),
    "torch.nn.functional.interpolate": (
        tuple(
            f"{kind}_backward"
            for kind in (
                "upsample_linear1d",
                "upsample_bilinear2d",
                "_upsample_bilinear2d_aa",
                "upsample_bicubic2d",
                "_upsample_bicubic2d_aa",
                "upsample_trilinear3d",
            )
        ),
        _always,
    ),
    "torch.nn.ReflectionPad1d": (("reflection_pad1d_backward",), _always),
    "torch.nn.ReflectionPad2d": (("reflection_pad2d_backward",), _always),
    "torch.nn.ReflectionPad3d": (("reflection_pad3d_backward",), _always),
    "torch.nn.NLLLoss": (("nll_loss_forward", "nll_loss2d_forward"), _always),
    "torch.nn.CTCLoss": (("_ctc_loss_backward",), _always),
    "torch.nn.EmbeddingBag": (("_embedding_bag_dense_backward",), lambda call: call["mode"] == 2),
    "torch.Tensor.put_": (("put",), _always),
    "torch.histc": (("histc",), _always),
    "torch.bincount": (("bincount",), lambda call: call["weights"] is not None),
    "torch.median": (("median", "nanmedian"), lambda call: call.overload.startswith("dim")),
    "torch.nn.functional.grid_sample": (
        ("grid_sampler_2d_backward", "grid_sampler_3d_backward"),
        _always,
    ),
    "torch.cumsum": (("cumsum",), _of_floats),
    "torch.Tensor.scatter_reduce": (("scatter_reduce",), lambda call: call["reduce"] == "prod"),
    "torch.Tensor.resize_": (("resize",), lambda call: call["self"].is_quantized),
}
_RAISES = {name: when for names, when in DOCUMENTED.values() for name in names} | {
    "kthvalue": _always  # it raises, too, and is not documented
}


def documented_by_torch() -> list[str]:
    """The names of what raises, from the documentation of the torch that is installed."""
    documentation = torch.use_deterministic_algorithms.__doc__ or ""
    _, _, raising = documentation.partition("operations will throw a")
    return re.findall(r"^ *\* :\w+:`([\w.]+)`", raising, re.MULTILINE)


class Deterministic(TorchDispatchMode):
    """Fails where an operation would raise on a GPU. It holds what is computed on a CPU anyway to the same."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        call = Call(func, args, kwargs or {})
        assert not _RAISES.get(call.name, lambda call: False)(call), f"{func} raises on a GPU"
        return func(*args, **(kwargs or {}))
