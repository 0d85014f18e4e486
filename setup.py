"""Settings are in pyproject.toml; this builds the kernels (csrc/build.py) when llm3d is installed.

Without a compiler, or without torch, llm3d is installed all the same and computes with plain PyTorch.
LLM3D_BUILD_CUDA=auto|0|1 decides about the CUDA kernels.
"""

import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc"))
import build  # noqa: E402


def planned() -> list[build.Library]:
    try:
        return build.libraries(build.find_torch())
    except build.CannotBuild as reason:
        print(f"llm3d: no native kernels: {reason}", flush=True)
        return []
    except build.BuildFailed as error:
        raise SystemExit(f"llm3d: {error}") from None


class BuildKernels(build_ext):
    """Shared libraries for torch.ops.load_library, not Python modules."""

    def get_ext_filename(self, name: str) -> str:
        return f"{name.replace('.', '/')}.so"

    def build_extensions(self) -> None:
        for extension, library in zip(self.extensions, LIBRARIES, strict=True):
            target = Path(self.get_ext_fullpath(extension.name))
            print(f"llm3d: {target.name}", flush=True)
            try:
                build.build(library, target, ROOT / "build" / "kernels", jobs=os.cpu_count() or 1)
            except build.BuildFailed as error:
                way_out = (
                    "\nLLM3D_BUILD_CUDA=0 installs without the CUDA kernels" if library.name == "cuda" else ""
                )
                raise SystemExit(f"llm3d: {error}{way_out}") from None


LIBRARIES = planned()
setup(
    ext_modules=[
        Extension(f"llm3d.kernels.{library.name}", [str(s.relative_to(ROOT)) for s in library.sources])
        for library in LIBRARIES
    ],
    cmdclass={"build_ext": BuildKernels},
    # The libraries know nothing of Python, so that one wheel fits every version.
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if LIBRARIES else {},
)
