"""Settings are in pyproject.toml; this builds what is C++ and CUDA (csrc/build.py) when llm3d is installed.

Without a compiler, or without torch, llm3d is installed all the same: it computes with plain PyTorch, and packs samples
in Python. LLM3D_BUILD_CUDA=auto|0|1 decides about the CUDA kernels.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc"))
import build  # noqa: E402


def planned(what: str, plan: Callable[[], list[build.Library]]) -> list[build.Library]:
    try:
        return plan()
    except build.CannotBuild as reason:
        print(f"llm3d: no {what}: {reason}", flush=True)
        return []
    except build.BuildFailed as error:
        raise SystemExit(f"llm3d: {error}") from None


class BuildLibraries(build_ext):
    def get_ext_filename(self, name: str) -> str:
        """Kernels are for torch.ops.load_library, no Python modules: their names say nothing of a Python."""
        is_kernels = name.rpartition(".")[2] in {library.name for library in KERNELS}
        return f"{name.replace('.', '/')}.so" if is_kernels else super().get_ext_filename(name)

    def build_extensions(self) -> None:
        for extension, library in zip(self.extensions, (*KERNELS, *MODULES), strict=True):
            target = Path(self.get_ext_fullpath(extension.name))
            print(f"llm3d: {target.name}", flush=True)
            try:
                build.build(library, target, ROOT / "build" / "kernels", jobs=os.cpu_count() or 1)
            except build.BuildFailed as error:
                way_out = (
                    "\nLLM3D_BUILD_CUDA=0 installs without the CUDA kernels" if library.name == "cuda" else ""
                )
                raise SystemExit(f"llm3d: {error}{way_out}") from None


def extensions(package: str, libraries: list[build.Library]) -> list[Extension]:
    return [
        Extension(f"{package}.{library.name}", [str(source.relative_to(ROOT)) for source in library.sources])
        for library in libraries
    ]


KERNELS = planned("native kernels", lambda: build.libraries(build.find_torch()))
MODULES = planned("native packing of samples", build.python_modules)
setup(
    ext_modules=extensions("llm3d.kernels", KERNELS) + extensions("llm3d.data", MODULES),
    cmdclass={"build_ext": BuildLibraries},
    # Kernels alone know nothing of Python: such a wheel fits every version. One with a Python module fits one.
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if KERNELS and not MODULES else {},
)
