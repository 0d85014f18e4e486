"""Builds the kernels: which libraries, from which sources, with which flags. Imports no torch.

`cpu_<instruction set>`  csrc/ops.cpp and csrc/*/cpu.cpp, once for each instruction set; the machine that runs picks.
`cuda`                   csrc/*/cuda.cu, where nvcc is there.

The sources use PyTorch's stable ABI only, so a library works with every torch from 2.10 on, and compiling needs
torch's headers, not a torch that can be imported.

`_packing`               csrc/packing, a Python module by pybind11; it knows nothing of torch, and is for one Python.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

CSRC = Path(__file__).resolve().parent
sys.path.insert(0, str(CSRC.parent))
from llm3d.kernels.sources import stamp  # noqa: E402

INSTRUCTION_SETS = {  # the names are those of torch.backends.cpu.get_cpu_capability(), in lower case
    "avx512": "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx2 -mfma -mf16c -mprefer-vector-width=512",
    "avx2": "-mavx2 -mfma -mf16c",
    "default": "",
}
ARCHITECTURES = (
    "80",
    "90",
)  # A100, H100 and H200; later ones compile the PTX of the last when they first load it
TORCH_TARGET_VERSION = "0x020a000000000000"  # 2.10
CPP_MODULE = ("-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall")


STAMP = 'extern const char llm3d_sources[];\n__attribute__((used)) const char llm3d_sources[] = "%s";\n'


class CannotBuild(Exception):
    """Why something will not be built, in one line. llm3d works without."""


class BuildFailed(Exception):
    """What was asked for and cannot be had, or the words of a compiler."""


@dataclass(frozen=True)
class Torch:
    """An installed torch, seen from outside."""

    root: Path
    version: tuple[int, int]
    cuda: str | None  # the CUDA version that it was built for


@dataclass(frozen=True)
class Library:
    name: str
    sources: tuple[Path, ...]
    compiler: tuple[str, ...]  # up to, not including, the source
    linker: tuple[str, ...]  # what follows the object files
    language: tuple[str, ...] = ()  # said of each source, where its name does not say it
    absent: tuple[str, ...] = ()  # libraries that it needs where it is loaded, and that are not here


def libraries(torch: Torch) -> list[Library]:
    """What is to be built here. LLM3D_BUILD_CUDA: auto (with nvcc and a torch for its CUDA), 0 or 1."""
    sources = (CSRC / "ops.cpp", *sorted(CSRC.glob("*/cpu.cpp")))
    compiler = cpp_compiler()
    wanted = INSTRUCTION_SETS if platform.machine() in ("x86_64", "AMD64") else {"default": ""}
    built = [
        Library(f"cpu_{name}", sources, (*compiler, *cpp_flags(torch), *flags.split()), links(torch))
        for name, flags in wanted.items()
    ]
    if (nvcc := nvcc_to_use(torch)) is not None:
        sources = tuple(sorted(CSRC.glob("*/cuda.cu")))
        compile_cuda = (str(nvcc), *cuda_flags(torch))
        absent = () if torch.cuda else ("torch_cuda",)
        built.append(Library("cuda", sources, compile_cuda, links(torch, cuda=True), absent=absent))
    return built


def python_modules() -> list[Library]:
    """What is to be built for this Python."""
    includes = [f"-I{python_headers()}", "-isystem", str(pybind11_headers())]
    compiler = (*cpp_compiler(), *CPP_MODULE, *includes)
    undefined = ("-undefined", "dynamic_lookup") if sys.platform == "darwin" else ()
    return [Library("_packing", (CSRC / "packing/first_fit.cpp",), compiler, ("-shared", *undefined))]


# ---- what is there ----


def places_of(package: str) -> list[Path]:
    """Where a package of this environment may be; also where pip hides it from the build (build isolation)."""
    spec = importlib.util.find_spec(package)
    imported = [Path(spec.origin).parent] if spec is not None and spec.origin else []
    return imported + [Path(sysconfig.get_path(kind)) / package for kind in ("platlib", "purelib")]


def find_torch() -> Torch:
    """The torch of this environment."""
    for root in places_of("torch"):
        if (root / "include/torch/csrc/stable/library.h").exists():
            return read_torch(root)
    raise CannotBuild("there is no torch here; install it first, then llm3d with --no-build-isolation")


def read_torch(root: Path) -> Torch:
    """What an installed torch says of itself."""
    text = (root / "version.py").read_text()
    version = re.search(r"__version__ = '(\d+)\.(\d+)", text)
    cuda = re.search(r"^cuda\b.* = '([\d.]+)'", text, re.MULTILINE)
    assert version is not None, f"{root}/version.py names no version"
    found = Torch(root, (int(version[1]), int(version[2])), cuda[1] if cuda else None)
    if found.version < (2, 10):
        raise CannotBuild(f"torch {version[1]}.{version[2]} is too old, 2.10 is needed")
    return found


def python_headers() -> Path:
    include = Path(sysconfig.get_path("include"))
    if not (include / "Python.h").exists():
        raise CannotBuild(
            f"there is no {include}/Python.h; Python's headers are python3-dev or python3-devel"
        )
    return include


def pybind11_headers() -> Path:
    """Those of pybind11, else the ones that come with torch."""
    for root in (*places_of("pybind11"), *places_of("torch")):
        if (root / "include/pybind11/numpy.h").exists():
            return root / "include"
    raise CannotBuild("there is neither pybind11 here nor torch, which brings its headers")


def cpp_compiler() -> tuple[str, ...]:
    """$CXX, or the first of g++, clang++ and c++ that is there and knows C++17."""
    if given := os.environ.get("CXX"):
        command = tuple(shlex.split(given))
        if shutil.which(command[0]) is None:
            raise BuildFailed(f"CXX={given}, but there is no such program")
        if not knows_cpp17(command):
            raise BuildFailed(f"CXX={given}, but it does not compile C++17")
        return command
    there = [name for name in ("g++", "clang++", "c++") if shutil.which(name)]
    for name in there:
        if knows_cpp17((name,)):
            return (name,)
    if there:
        raise CannotBuild(f"{there[0]} does not compile C++17")
    raise CannotBuild("there is no C++ compiler (g++ or clang++)")


def knows_cpp17(compiler: Sequence[str]) -> bool:
    program = "#include <optional>\nstd::optional<int> one{1};\nstatic_assert(__cplusplus >= 201703L);\n"
    command = [*compiler, "-std=c++17", "-fsyntax-only", "-x", "c++", "-"]
    return subprocess.run(command, input=program, text=True, capture_output=True).returncode == 0


def find_nvcc() -> Path | None:
    """nvcc in $CUDA_HOME, on the path, or where CUDA installs it."""
    home = os.environ.get("CUDA_HOME")
    places = [home and f"{home}/bin/nvcc", shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    return next((Path(place) for place in places if place and Path(place).is_file()), None)


def cuda_version(nvcc: Path) -> str:
    done = subprocess.run([nvcc, "--version"], capture_output=True, text=True)
    release = re.search(r"release ([\d.]+)", done.stdout)
    if release is None:
        raise BuildFailed(f"{nvcc} --version names no release: {done.stdout}{done.stderr}".rstrip())
    return release[1]


def nvcc_to_use(torch: Torch) -> Path | None:
    """nvcc, where the CUDA library is wanted; None where it is not."""
    wanted = os.environ.get("LLM3D_BUILD_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        raise BuildFailed(f"LLM3D_BUILD_CUDA={wanted}: allowed are auto, 0, 1")
    nvcc = find_nvcc()
    if wanted == "0" or (wanted == "auto" and (nvcc is None or torch.cuda is None)):
        return None
    if nvcc is None:
        raise BuildFailed("LLM3D_BUILD_CUDA=1, but nvcc is neither on the path nor in CUDA_HOME")
    if torch.cuda is not None and cuda_version(nvcc).split(".")[0] != torch.cuda.split(".")[0]:
        problem = (
            f"nvcc is of CUDA {cuda_version(nvcc)}, torch of CUDA {torch.cuda}: the majors must be the same"
        )
        if wanted == "1":
            raise BuildFailed(problem)
        print(f"llm3d: no CUDA kernels: {problem}", flush=True)
        return None
    return nvcc


# ---- flags ----


def includes(torch: Torch) -> list[str]:
    return [
        f"-I{CSRC}",
        "-isystem",  # nvcc wants the folder apart
        str(torch.root / "include"),
        f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}",
    ]


def cpp_flags(torch: Torch) -> list[str]:
    # openmp-simd: only its vectorisation pragmas. Threads are torch's own, through its parallel_for.
    # Not fast-math: NaN and infinity mean something here. No jump threading: a choice stays a choice, not a branch.
    arithmetic = ["-O3", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
    arithmetic.append("-fno-thread-jumps")
    return [*arithmetic, "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", *includes(torch)]


def cuda_flags(torch: Torch) -> list[str]:
    code = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    code.append(f"-gencode=arch=compute_{ARCHITECTURES[-1]},code=compute_{ARCHITECTURES[-1]}")
    host = "-Xcompiler=-fPIC,-fvisibility=hidden"
    return ["-O3", "-std=c++17", host, "-DUSE_CUDA", "--threads=2", *code, *includes(torch)]


def links(torch: Torch, cuda: bool = False) -> tuple[str, ...]:
    names = ["torch_cpu", *(["torch_cuda"] if cuda and torch.cuda else [])]
    return ("-shared", f"-L{torch.root / 'lib'}", *(f"-l{name}" for name in names))


# ---- compiling ----


def build(library: Library, output: Path, scratch: Path, jobs: int) -> None:
    """Compile what is older than a file that it includes, and link. Raises BuildFailed with the compiler's words.

    Files appear whole, under their names, so that a library which a process has loaded stays as it was.
    """
    digest = hashlib.sha256(repr((library.compiler, library.language)).encode()).hexdigest()[:12]
    directory = scratch / f"{library.name}-{digest}"
    directory.mkdir(parents=True, exist_ok=True)

    def compiled(source: Path) -> Path:
        target = directory / f"{source.parent.name}-{source.stem}.o"
        includes = target.with_suffix(".d")
        if not is_newer(target, included(includes)):
            command = [*library.compiler, "-MMD", "-MF", str(includes), *library.language, "-c", str(source)]
            run_for(target, command)
        return target

    stamp_source = directory / "stamp.cpp"
    write_if_changed(stamp_source, STAMP % stamp(CSRC))
    with ThreadPoolExecutor(jobs) as pool:
        objects = list(pool.map(compiled, (*library.sources, stamp_source)))
    output.parent.mkdir(parents=True, exist_ok=True)
    stand_ins = [option for name in library.absent for option in stand_in(name, library, directory)]
    run_for(output, [*library.compiler, *map(str, objects), *library.linker, *stand_ins])


def stand_in(name: str, library: Library, directory: Path) -> list[str]:
    """What links to a library that is not here, so that the loader looks for it: an empty one of its name."""
    source, target = directory / "empty.cpp", directory / f"lib{name}.so"
    write_if_changed(source, "")
    soname = ["-Xlinker", f"-soname=lib{name}.so"]
    run_for(target, [*library.compiler, "-shared", *soname, str(source)])
    # As an option: nvcc puts files before all options, and so before this one.
    return ["-Xlinker", "--no-as-needed", f"-L{directory}", f"-l{name}"]


def write_if_changed(path: Path, text: str) -> None:
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def included(rule: Path) -> list[Path] | None:
    """The files in the rule for make that the compiler wrote; None where there is none yet."""
    if not rule.exists():
        return None
    _, _, files = rule.read_text().replace("\\\n", " ").partition(": ")
    return [Path(file) for file in shlex.split(files)]


def is_newer(target: Path, files: list[Path] | None) -> bool:
    if files is None or not target.exists() or not all(file.exists() for file in files):
        return False
    return target.stat().st_mtime > max(file.stat().st_mtime for file in files)


def run_for(target: Path, command: Sequence[str]) -> None:
    partial = target.with_name(f"{target.name}.partial")
    run([*command, "-o", str(partial)])
    partial.replace(target)


def run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise BuildFailed(f"this failed:\n{shlex.join(command)}\n{done.stdout}{done.stderr}")
