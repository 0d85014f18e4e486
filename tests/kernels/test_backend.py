"""Which code computes: what is asked for is what runs, or an error says why not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from llm3d.cli import app
from llm3d.errors import InputError
from llm3d.kernels import backend as module
from llm3d.kernels.backend import describe, fused, of, use, using
from tests.kernels.backends import needs_native

X = torch.zeros(2, 4)


def test_reference_uses_no_kernel() -> None:
    with using("reference"):
        assert fused("swiglu_forward", X) is None
        assert (of("swiglu_forward", "cpu"), describe("cpu")) == ("reference", "plain PyTorch, as chosen")


@needs_native
def test_the_environment_decides_where_the_setting_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    with using("native"):
        monkeypatch.setenv("LLM3D_KERNELS", "reference")
        use("auto")
        assert fused("swiglu_forward", X) is None
        use("native")
        assert fused("swiglu_forward", X) is torch.ops.llm3d.swiglu_forward.default


@pytest.mark.parametrize("name", ["fast", ""])
def test_an_unknown_name_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM3D_KERNELS", name)
    with pytest.raises(InputError, match=f"LLM3D_KERNELS: '{name}' is not one of auto, native,"):
        use("auto")


def test_without_a_library_native_is_an_error_and_auto_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_libraries", {})
    monkeypatch.setattr(module, "_problems", {"cpu": "nothing was built"})
    with pytest.raises(InputError, match=r"kernels\.backend: native, but nothing was built"):
        use("native", "cpu")
    with using("auto"):
        assert fused("swiglu_forward", X) is None
        assert describe("cpu") == "plain PyTorch: nothing was built"


@needs_native
def test_native_never_falls_back_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    with using("native"):
        monkeypatch.setattr(module, "_libraries", {})
        monkeypatch.setattr(module, "_problems", {"cpu": "nothing was built"})
        with pytest.raises(InputError, match="nothing was built"):
            fused("swiglu_forward", X)


@needs_native
def test_a_library_of_other_sources_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ops.cpp").write_text("// what is checked out now")
    for name in ("_libraries", "_problems", "_ops"):
        monkeypatch.setattr(module, name, {})
    monkeypatch.setattr(module, "CSRC", tmp_path)
    monkeypatch.setattr(module, "_chosen", "auto")
    module._load()
    assert "was built from other sources" in describe("cpu")
    assert fused("swiglu_forward", X) is None


@needs_native
def test_a_gpu_older_than_the_kernels_is_left_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_libraries", {"cuda": Path("cuda.so")})
    monkeypatch.setattr(module, "_problems", {})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla V100")
    with using("auto"):
        use("auto", "cuda")
        assert describe("cuda") == (
            "plain PyTorch: Tesla V100 is older than an A100, which the CUDA kernels are compiled for"
        )
        with pytest.raises(InputError, match="native, but Tesla V100 is older"):
            use("native", "cuda")


@needs_native
def test_the_library_is_that_of_the_processor() -> None:
    capability = torch.backends.cpu.get_cpu_capability().lower()
    expected = capability if capability in module.INSTRUCTION_SETS else "default"
    with using("native"):
        assert describe("cpu") == f"native cpu {expected}"


def test_the_command_lists_and_checks_every_operation() -> None:
    listed = CliRunner().invoke(app, ["kernels", "--device", "cpu"])
    assert listed.exit_code == 0
    assert all(op in listed.stdout for op in ("rms_norm_forward", "adamw_", "paged_decode_attention"))
    checked = CliRunner().invoke(app, ["kernels", "--device", "cpu", "--check"])
    assert checked.exit_code == 0
    assert checked.stdout.count("bfloat16") == len(listed.stdout.splitlines()) - 1


def test_a_wrong_result_fails_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    from llm3d.bench import cases

    monkeypatch.setattr(cases, "swiglu_forward", lambda gate_up: gate_up[:, ::2])
    checked = CliRunner().invoke(app, ["kernels", "--device", "cpu", "--check"])
    assert checked.exit_code == 1
    assert "MORE THAN TWICE" in checked.stdout


def test_a_device_that_is_not_there_is_refused() -> None:
    assert CliRunner().invoke(app, ["kernels", "--device", "mps"]).exit_code == 2
    assert CliRunner().invoke(app, ["kernels", "--device", "nonsense"]).exit_code == 2
