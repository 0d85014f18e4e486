"""Boxes of global tensors in safetensors files: written by the ranks that hold them, read by any other layout.

Reading is one operation, whatever is read (a checkpoint's weights and moments, a Hugging Face directory): each
wanted box is intersected with the stored ones and takes its parts from them.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from llm3d.errors import InputError
from llm3d.files import sync
from llm3d.parallel.boxes import Box

FILE_BYTES = 2 * 2**30  # a file is closed before it grows beyond this; it passes through host memory whole
_OPEN_FILES = 64
_THREADS = 4  # that take checksums, a GB a second each
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class StoredBox:
    """A box that lies under `key` in `file`, a path relative to the directory of the whole.

    dtype: as torch names it.  crc32: of the values' bytes; None where nobody has written it down.
    """

    file: str
    key: str
    box: Box
    dtype: str
    crc32: int | None = None

    @classmethod
    def of(cls, fields: dict[str, Any]) -> StoredBox:
        """From what dataclasses.asdict gave, after a journey as JSON."""
        return cls(**{**fields, "box": box_of(fields["box"])})

    def named(self, name: str) -> StoredBox:
        """The same values as a box of the global tensor `name`."""
        return replace(self, box=replace(self.box, name=name))


def box_of(fields: dict[str, Any]) -> Box:
    """From what dataclasses.asdict gave, after a journey as JSON."""
    return Box(fields["name"], *(tuple(fields[key]) for key in ("shape", "offset", "size")))


# ---- writing ----


class BoxWriter:
    """Writes a rank's files of a directory, each safe on disk when its method returns, and remembers what is in them.

    The first failure is kept in `failure`, and no tensor is written after it; nothing is raised, because other
    ranks count on this one's part in their messages. All ranks compare failures at the end.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.failure: str | None = None
        self.boxes: list[StoredBox] = []
        self.files: dict[str, int] = {}  # crc32 of the files that are not tensors

    def tensors(self, file: str, values: Sequence[tuple[str, Box, Tensor]]) -> None:
        """Write (key, box, its values) into a safetensors file."""
        if self.failure is not None:
            return
        path = self.directory / file
        local = _on_host({key: value for key, _, value in values})
        with ThreadPoolExecutor(_THREADS) as threads:  # sums are taken while the file is written
            sums = {key: threads.submit(crc32, value) for key, value in local.items()}
            with self.keeping_failure(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
                # As the umask has it; the library's own files are for the owner alone.
                mode = path.stat().st_mode
                save_file(local, path, metadata={"format": "pt"})
                path.chmod(mode)
                sync(path)
        for key, box, _ in values:
            self.boxes.append(StoredBox(file, key, box, dtype_name(local[key]), sums[key].result()))

    def text(self, file: str, content: str) -> None:
        path = self.directory / file
        with self.keeping_failure(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content, encoding="utf-8")
            self.written(path)

    def written(self, path: Path) -> None:
        """Take over a file that other code has written into the directory."""
        sync(path)
        self.files[path.relative_to(self.directory).as_posix()] = zlib.crc32(path.read_bytes())

    @contextmanager
    def keeping_failure(self, path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.failure = self.failure or f"{error.filename or path}: {error.strerror or error}"
        except SafetensorError as error:
            self.failure = self.failure or f"{path}: {error}"


def _on_host(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The values in this process's memory, contiguous; from a GPU through pinned memory, and all before it returns.

    A copy that does not wait goes to pinned memory, at the speed of the bus: several times as fast as one to pages
    that the driver must copy once more.
    """
    local = {key: value.detach().contiguous().to("cpu", non_blocking=True) for key, value in values.items()}
    for device in {value.device for value in values.values() if value.is_cuda}:
        torch.cuda.synchronize(device)
    return local


def split_by_size(sizes: Sequence[int], limit: int | None = None) -> list[range]:
    """Cut a sequence of items of these sizes into runs that stay within the limit (a larger item runs alone)."""
    limit = FILE_BYTES if limit is None else limit
    runs, start, total = [], 0, 0
    for i, size in enumerate(sizes):
        if i > start and total + size > limit:
            runs.append(range(start, i))
            start, total = i, 0
        total += size
    return runs + ([range(start, len(sizes))] if start < len(sizes) else [])


def crc32(values: Tensor) -> int:
    """Of the bytes of a contiguous CPU tensor."""
    return zlib.crc32(values.reshape(-1).view(torch.uint8).numpy().data)


def dtype_name(values: Tensor) -> str:
    return str(values.dtype).removeprefix("torch.")


# ---- reading ----


class BoxReader:
    """Reads boxes out of the safetensors files of a directory; keeps a bounded number of files open.

    Raises InputError, naming the file, for one that is missing, cut short or not what it should be.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.open = functools.lru_cache(_OPEN_FILES)(self._open)

    def read(self, target: Box, stored: Iterable[StoredBox], into: Tensor) -> None:
        """Fill `into`, shaped like the target box, from the stored boxes that it meets; converts the dtype."""
        covered = 0
        for source in stored:
            part = target.intersect(source.box)
            if part is not None:
                values = self._slice(source, part.slices_within(source.box))
                into[part.slices_within(target)].copy_(values)
                covered += part.numel
        if covered != target.numel:
            raise InputError(f"{self.directory}: parts of tensor {target.name} are not stored in it")

    def whole(self, file: str, key: str) -> StoredBox | None:
        """What the header of a file says of a tensor that lies in it whole; None where it has no such tensor."""
        with self._reading(file):
            opened = self.open(file)
            if key not in opened.keys():  # noqa: SIM118, the file is no mapping
                return None
            header = opened.get_slice(key)
            shape, dtype = header.get_shape(), _DTYPES.get(header.get_dtype())
        if dtype is None:
            raise InputError(
                f"{self.directory / file}: tensor {key} is stored as {header.get_dtype()}; quantized weights "
                f"cannot be trained, convert them to BF16 first"
            )
        return StoredBox(file, key, Box.whole(key, shape), dtype)

    def tensor(self, stored: StoredBox) -> Tensor:
        """The values of a stored box."""
        with self._reading(stored.file):
            return self.open(stored.file).get_tensor(stored.key)

    def keys(self, file: str) -> list[str]:
        with self._reading(file):
            return list(self.open(file).keys())

    def check(self, stored: StoredBox) -> None:
        """Raise InputError unless the file holds exactly what was written."""
        values = self.tensor(stored)
        expected = (stored.dtype, stored.box.size, stored.crc32)
        if (dtype_name(values), tuple(values.shape), crc32(values)) != expected:
            raise InputError(
                f"{self.directory / stored.file}: damaged, tensor {stored.key} is not what was saved"
            )

    def _slice(self, stored: StoredBox, part: tuple[slice, ...]) -> Tensor:
        with self._reading(stored.file):
            return self.open(stored.file).get_slice(stored.key)[part]

    def _open(self, file: str) -> Any:
        return safe_open(self.directory / file, framework="pt")

    @contextmanager
    def _reading(self, file: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = "missing" if isinstance(error, FileNotFoundError) else error.strerror or error
            raise InputError(f"{self.directory / file}: {reason}") from None
        except SafetensorError as error:
            raise InputError(f"{self.directory / file}: damaged ({error})") from None
