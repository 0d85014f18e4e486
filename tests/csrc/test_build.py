"""What is built where: every machine gets an llm3d that works, and one line about what it lacks."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.csrc.emulation import ROOT, build

PYTHON = f"{sys.version_info.major}{sys.version_info.minor}"


def torch_of(root: Path, version: str = "2.11.0", cuda: str | None = "13.0") -> Any:
    """A torch as far as the build looks at one."""
    (root / "include/torch/csrc/stable").mkdir(parents=True)
    (root / "include/torch/csrc/stable/library.h").touch()
    (root / "version.py").write_text(f"__version__ = '{version}'\ncuda: Optional[str] = {cuda!r}\n")
    return build.read_torch(root)


def program_of(path: Path, script: str) -> Path:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def nvcc_of(directory: Path, release: str) -> Path:
    return program_of(directory / "nvcc", f"echo 'Cuda compilation tools, release {release}, V{release}.88'")


@pytest.fixture(autouse=True)
def nothing_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LLM3D_BUILD_CUDA", "CXX", "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)


def test_torch_is_read_without_importing_it(tmp_path: Path) -> None:
    assert torch_of(tmp_path / "a") == build.Torch(tmp_path / "a", (2, 11), "13.0")
    assert torch_of(tmp_path / "b", "2.13.0+cpu", None) == build.Torch(tmp_path / "b", (2, 13), None)
    with pytest.raises(build.CannotBuild, match=r"torch 2\.9 is too old"):
        torch_of(tmp_path / "c", "2.9.1")


def test_no_compiler_is_no_reason_to_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(build.CannotBuild, match=r"there is no C\+\+ compiler"):
        build.cpp_compiler()


def test_a_compiler_that_was_named_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    with pytest.raises(build.BuildFailed, match="CXX=no-such-compiler -O2, but there is no such program"):
        build.cpp_compiler()


def test_a_compiler_from_before_cpp17_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = program_of(tmp_path / "g++", "echo \"unrecognized option '-std=c++17'\" >&2; exit 1")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(build.CannotBuild, match=r"g\+\+ does not compile C\+\+17"):
        build.cpp_compiler()
    monkeypatch.setenv("CXX", shlex.quote(str(compiler)))
    with pytest.raises(build.BuildFailed, match=r"but it does not compile C\+\+17"):
        build.cpp_compiler()


def test_cuda_is_built_where_nvcc_and_torch_are_of_one_major(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    nvcc = nvcc_of(tmp_path, "13.1")
    monkeypatch.setattr(build, "find_nvcc", lambda: nvcc)
    fitting, other = torch_of(tmp_path / "13"), torch_of(tmp_path / "12", cuda="12.8")
    without = torch_of(tmp_path / "cpu", cuda=None)
    assert build.nvcc_to_use(fitting) == nvcc
    assert build.nvcc_to_use(without) is None
    assert build.nvcc_to_use(other) is None
    assert "nvcc is of CUDA 13.1, torch of CUDA 12.8" in capfd.readouterr().out
    monkeypatch.setenv("LLM3D_BUILD_CUDA", "0")
    assert build.nvcc_to_use(fitting) is None


def test_cuda_that_was_asked_for_is_built_or_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLM3D_BUILD_CUDA", "1")
    monkeypatch.setattr(build, "find_nvcc", lambda: None)
    with pytest.raises(build.BuildFailed, match="nvcc is neither on the path nor in CUDA_HOME"):
        build.nvcc_to_use(torch_of(tmp_path / "a"))
    monkeypatch.setattr(build, "find_nvcc", lambda: nvcc_of(tmp_path, "12.9"))
    with pytest.raises(build.BuildFailed, match="the majors must be the same"):
        build.nvcc_to_use(torch_of(tmp_path / "b"))
    assert build.nvcc_to_use(torch_of(tmp_path / "cpu", cuda=None)) == tmp_path / "nvcc"
    monkeypatch.setenv("LLM3D_BUILD_CUDA", "yes")
    with pytest.raises(build.BuildFailed, match="LLM3D_BUILD_CUDA=yes: allowed are auto, 0, 1"):
        build.nvcc_to_use(torch_of(tmp_path / "c"))


def test_setup_goes_on_without_a_compiler(tmp_path: Path) -> None:
    environment = {**os.environ, "PATH": str(tmp_path)}
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "llm3d: no native kernels: there is no C++ compiler" in done.stdout
    assert "llm3d: no native packing of samples: there is no C++ compiler" in done.stdout
    assert not list(tmp_path.rglob("*.so"))


def test_headers_are_those_of_pybind11_else_those_of_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "places_of", lambda package: [tmp_path / "nowhere", tmp_path / package])
    with pytest.raises(build.CannotBuild, match="neither pybind11 here nor torch"):
        build.pybind11_headers()
    for package in ("torch", "pybind11"):
        include = tmp_path / package / "include"
        (include / "pybind11").mkdir(parents=True)
        (include / "pybind11/numpy.h").touch()
        assert build.pybind11_headers() == include


def test_without_the_headers_of_python_no_module_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build.sysconfig, "get_path", lambda kind: str(tmp_path))
    with pytest.raises(build.CannotBuild, match=r"Python\.h; Python's headers are python3-dev"):
        build.python_modules()


@pytest.mark.parametrize(
    ("modules", "tag"),
    [("[build.Library('_packing', (), (), ())]", (f"cp{PYTHON}", f"cp{PYTHON}")), ("[]", ("cp310", "abi3"))],
    ids=["with packing", "kernels alone"],
)
def test_a_wheel_with_a_python_module_fits_one_python(modules: str, tag: tuple[str, str]) -> None:
    script = f"""
import sys
sys.path.insert(0, "csrc")
import build
build.find_torch = lambda: None
build.libraries = lambda torch: [build.Library("cpu_x", (), (), ())]
build.python_modules = lambda: {modules}
import setuptools
from distutils.core import run_setup  # setuptools brings its own
wheel = run_setup("setup.py", stop_after="init").get_command_obj("bdist_wheel")
wheel.ensure_finalized()
print(*wheel.get_tag()[:2])
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert tuple(done.stdout.split()[-2:]) == tag


def test_a_compiler_that_fails_is_an_error_with_its_words(tmp_path: Path) -> None:
    compiler = program_of(tmp_path / "broken", "echo 'out of luck' >&2; exit 1")
    library = build.Library("cpu_x", (ROOT / "csrc/ops.cpp",), (str(compiler),), ())
    with pytest.raises(build.BuildFailed, match="out of luck"):
        build.build(library, tmp_path / "x.so", tmp_path / "scratch", jobs=1)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize("compiler", ["g++", "nvcc"])
def test_what_is_built_without_a_library_finds_it_where_it_is(compiler: str, tmp_path: Path) -> None:
    """As CUDA kernels that are built beside a torch for CPUs and loaded beside one for GPUs: the loader looks for names
    in what a library says that it needs, not in all that a process has loaded.
    """
    if shutil.which(compiler) is None:
        pytest.skip(f"there is no {compiler}")
    theirs, there = tmp_path / "theirs.cpp", tmp_path / "libtorch_cuda.so"
    theirs.write_text('extern "C" int theirs() { return 42; }\n')
    build.run(["g++", "-shared", "-fPIC", f"-Wl,-soname,{there.name}", str(theirs), "-o", str(there)])
    source = tmp_path / "ours.cpp"
    source.write_text('extern "C" int theirs();\nextern "C" int ours() { return theirs(); }\n')
    position_independent = ("-Xcompiler", "-fPIC") if compiler == "nvcc" else ("-fPIC",)
    now = ("-shared", "-Xlinker", "-z", "-Xlinker", "now")
    said = []
    for absent in ((), ("torch_cuda",)):
        library = build.Library("cuda", (source,), (compiler, *position_independent), now, absent=absent)
        ours = tmp_path / f"ours-{len(absent)}.so"
        build.build(library, ours, tmp_path / "scratch", jobs=1)
        code = f"from ctypes import CDLL; CDLL('{there}'); print(CDLL('{ours}').ours())"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        said.append(done.stdout.strip() or done.stderr)
    assert "undefined symbol: theirs" in said[0]
    assert said[1] == "42"
