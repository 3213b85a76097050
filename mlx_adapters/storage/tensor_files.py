"""Safetensors files, written and read whole.

The format is eight bytes of header length, a JSON header and the raw tensors. Writing it ourselves lets a shard
stream to the disk tensor by tensor, and a full disk is noticed where it happens.
"""

import contextlib
import hashlib
import json
import math
import os
import re
import struct
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_adapters.errors import FormatError, NotFoundError
from mlx_adapters.storage.files import atomic_file
from mlx_adapters.storage.paths import refuse_pointer, require_free_space, undrafted, unreadable, why_gone
from mlx_adapters.storage.temporaries import flush

BLOCK = 16 << 20  # bytes copied at once
LARGE, WAITING = 4 << 20, 2  # bytes of a tensor that is hashed and written beside the next ones, on a GPU; so many wait
DIRTY = 64 << 20  # bytes after which a file's beginning is put on the disk beside the writing of the rest
DTYPES = {
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "int32": "I32",
    "int8": "I8",
    "int64": "I64",
    "int16": "I16",
    "bool": "BOOL",
    "uint64": "U64",
}
_OF_SIZE = {1: "U8 I8 BOOL F8_E4M3 F8_E5M2 F8_E8M0", 2: "U16 I16 F16 BF16", 4: "U32 I32 F32", 8: "U64 I64 F64 C64"}
_ITEM_SIZES = {code: size for size, codes in _OF_SIZE.items() for code in codes.split()}
_MAX_AXIS = 2**31 - 1  # MLX counts along an axis in 32 bits


def write_safetensors(
    path: Path, tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None, hashed: bool = False
) -> str:
    """Write MLX arrays to a safetensors file, whole or not at all; return its SHA-256 if `hashed`, else "".

    The names are sorted and the header is canonical, so equal tensors give equal bytes.
    """
    names = sorted(tensors)
    layout = [(name, str(tensors[name].dtype).removeprefix("mlx.core."), tensors[name].shape) for name in names]
    import mlx.core as mx

    arrays = [tensors[name] for name in names]
    mx.eval(arrays)  # all at once: each evaluation waits for another thread
    return stream_safetensors(path, layout, arrays, metadata, hashed)


def stream_safetensors(
    path: Path,
    layout: Iterable[tuple[str, str, tuple[int, ...]]],
    arrays: Iterable[Any],
    metadata: Mapping[str, str] | None = None,
    hashed: bool = False,
) -> str:
    """Write a safetensors file whose arrays are produced one by one, in the order of `layout`.

    `layout` holds (name, dtype as in "bfloat16", shape) and must be known beforehand; `arrays` may be a generator: one
    array is in memory, and the one before it on its way to the disk. Returns the file's SHA-256 if `hashed`, else "".
    """
    layout = list(layout)
    header: dict[str, Any] = {"__metadata__": dict(sorted((metadata or {"format": "mlx"}).items()))}
    offset = 0
    for name, dtype, shape in layout:
        code = DTYPES[dtype]
        size = _ITEM_SIZES[code] * math.prod(shape)
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    beginning = frame(header)
    import mlx.core as mx

    beside = mx.default_device().type == mx.DeviceType.gpu  # (a CPU is busy with what makes the next ones)
    with atomic_file(path) as stream, contextlib.ExitStack() as threads:
        hasher, writer, flusher = (threads.enter_context(ThreadPoolExecutor(1)) for _ in range(3))
        digest, hashing, writing, flushing = hashlib.sha256(), *(deque[Future[Any]]() for _ in range(3))
        dirty = 0

        def put(data: bytes | memoryview) -> None:
            nonlocal dirty
            stream.write(data)
            dirty += len(data)
            _wait(flushing, 1)
            if dirty > DIRTY and not flushing:
                flushing.append(flusher.submit(flush, stream.fileno(), False))
                dirty = 0

        ways: list[tuple[Any, ...]] = [(writing, writer, put), (hashing, hasher, digest.update)]

        def write(data: bytes | memoryview) -> None:
            for begun, worker, take in ways[: 1 + hashed]:
                _wait(begun, WAITING)
                if begun or (beside and len(data) > LARGE):
                    begun.append(worker.submit(take, data))
                else:
                    take(data)

        write(beginning)
        for (name, dtype, shape), array in zip(layout, arrays, strict=True):
            made = str(array.dtype).removeprefix("mlx.core.")
            if tuple(array.shape) != tuple(shape) or (made != dtype and (made, dtype) != ("uint16", "bfloat16")):
                raise ValueError(f"{name}: promised {dtype} {shape}, got {array.dtype} {array.shape}")
            write(raw_bytes(array))
        for begun in (hashing, writing, flushing):
            _wait(begun, 0)
    return digest.hexdigest() if hashed else ""


def _wait(begun: deque[Future[Any]], most: int) -> None:
    """Until at most so many are left; what is done is heard and forgotten."""
    while begun and (len(begun) > most or begun[0].done()):
        begun.popleft().result()


def frame(header: Mapping[str, Any]) -> bytes:
    """A safetensors file's beginning: the header behind its length."""
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    return struct.pack("<Q", len(encoded)) + encoded


def as_numpy(array: Any) -> Any:
    """An MLX array as a NumPy view of the same memory, bfloat16 as its bits in uint16.

    It is evaluated first: where that fails (a file that is shorter than it was, no memory), NumPy's own way to it
    ends the process instead of raising. Of what is evaluated already MLX is asked nothing more: it would first do all
    that was begun since.
    """
    import mlx.core as mx
    import numpy as np

    mx.eval(array)
    if array.dtype != mx.bfloat16:
        return np.array(array, copy=False)
    memory = memoryview(array)
    if memory.c_contiguous and array.size:
        return np.frombuffer(memory, np.uint16).reshape(array.shape)
    return np.array(mx.view(mx.contiguous(array.reshape(-1)), mx.uint16)).reshape(array.shape)


def raw_bytes(array: Any) -> memoryview | bytes:
    """The bytes of an MLX array, as safetensors stores them (row-major, little-endian)."""
    import numpy as np

    if array.size == 0:
        return b""
    return np.ascontiguousarray(as_numpy(array)).reshape(-1).data.cast("B")


def _refuse_pipe(path: str | Path) -> None:
    """Raise FormatError for what opening would wait for."""
    if Path(path).is_fifo():
        raise FormatError(f"'{path}' is a pipe, not a file.", "take it away, or put the file in its place.")


def _not_whole(path: str | Path) -> FormatError:
    message = f"'{undrafted(Path(path))}' is not a whole safetensors file."
    return FormatError(message, "it may be truncated; copy or download it again.")


def read_safetensors_header(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Read names, dtypes, shapes and metadata without the tensors, checking every offset.

    Tensors lie one after the other and fill the file, as the format demands: none shares its bytes with another,
    so what is read is never more than the file holds. Returns ({name: {"dtype", "shape", "data_offsets"}}, metadata).
    Raises NotFoundError, or FormatError for what is no whole safetensors file.
    """
    path = Path(path)
    bad = _not_whole(path)
    _refuse_pipe(path)
    refuse_pointer(path)
    try:
        size = path.stat().st_size
        with open(path, "rb") as stream:
            start = stream.read(8)
            if len(start) < 8:
                raise bad
            length = struct.unpack("<Q", start)[0]
            if length > min(size - 8, 100_000_000):
                raise bad
            header = json.loads(stream.read(length))
        if not isinstance(header, dict):
            raise bad
        metadata = header.pop("__metadata__", {}) or {}
        spans = sorted(_span(entry) for entry in header.values())
        starts, ends = [first for first, _ in spans], [last for _, last in spans]
        if [*starts, size - 8 - length] != [0, *ends] or not isinstance(metadata, dict):
            raise bad
    except FileNotFoundError:
        raise NotFoundError(f"There is no file '{path}'.", why_gone(path)) from None
    except OSError as error:
        raise unreadable(path, error) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, struct.error):
        raise bad from None
    return header, metadata


def _span(entry: Mapping[str, Any]) -> tuple[int, int]:
    """Where one tensor lies in the file's data. Raises ValueError, TypeError or KeyError for what cannot be."""
    (first, last), shape = entry["data_offsets"], entry["shape"]
    if (
        any(type(number) is not int or number < 0 for number in (first, last, *shape))
        or max(shape, default=0) > _MAX_AXIS
    ):
        raise ValueError("sizes are whole numbers from 0")
    known = _ITEM_SIZES.get(entry["dtype"])
    if first > last or (known is not None and known * math.prod(shape) != last - first):
        raise ValueError("a tensor's bytes are those of its shape")
    return first, last


def glance_at_safetensors(path: str | Path) -> int:
    """The size of a safetensors file that looks whole; some microseconds, whatever its header holds.

    Looks at the header's frame and at where its last tensor ends, which finds truncated and random files; the
    full check is `read_safetensors_header`. Raises NotFoundError or FormatError.
    """
    _refuse_pipe(path)
    refuse_pointer(path)
    try:
        with open(path, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            length = int.from_bytes(stream.read(8), "little")
            if 2 <= length <= size - 8:
                tail = min(length, 4096)
                first = stream.read(1)
                stream.seek(8 + length - tail)
                ends = re.findall(rb"\[\s*\d+\s*,\s*(\d+)\s*\]", stream.read(tail))
                if first == b"{" and (not ends or int(ends[-1]) <= size - 8 - length):
                    return size
    except FileNotFoundError:
        raise NotFoundError(f"There is no file '{path}'.", why_gone(path)) from None
    raise _not_whole(path)


def read_safetensors(path: Path) -> dict[str, Any]:
    """Read a safetensors file as MLX arrays. Raises NotFoundError or FormatError."""
    import mlx.core as mx

    read_safetensors_header(path)
    try:
        return dict(mx.load(str(path), format="safetensors"))
    except (RuntimeError, ValueError) as error:
        raise FormatError(
            f"'{path}' cannot be read: {error}.", "it may be damaged; copy or download it again."
        ) from None


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor's bytes lie; `dtype` in the file's own spelling."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int

    def read(self, first: int, length: int) -> bytes:
        """At most `length` of its bytes, from number `first` on."""
        with open(self.path, "rb") as stream:
            stream.seek(self.start + first)
            return stream.read(min(length, self.nbytes - first))

    def read_into(self, memory: memoryview) -> None:
        """All of its bytes into as much memory. Raises OSError."""
        with open(self.path, "rb", buffering=0) as stream:
            stream.seek(self.start)
            while len(memory):
                count = stream.readinto(memory)
                if not count:
                    raise OSError(f"'{self.path}' is shorter than it was")
                memory = memory[count:]

    def blocks(self) -> Iterator[bytes]:
        """Its bytes, some megabytes at a time."""
        return (self.read(first, BLOCK) for first in range(0, self.nbytes, BLOCK))

    def equals(self, other: "StoredTensor") -> bool:
        """Whether the other is the same, byte for byte."""
        alike = (self.dtype, self.shape) == (other.dtype, other.shape)
        return alike and all(a == b for a, b in zip(self.blocks(), other.blocks(), strict=True))


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """Where the tensors of a safetensors file lie, by name. Raises NotFoundError or FormatError."""
    header, _ = read_safetensors_header(path)
    with open(path, "rb") as stream:
        begin = 8 + struct.unpack("<Q", stream.read(8))[0]
    return {
        name: StoredTensor(path, entry["dtype"], tuple(entry["shape"]), begin + first, last - first)
        for name, entry in header.items()
        for first, last in [entry["data_offsets"]]
    }


def refuse_two_values(paths: Iterable[Path]) -> None:
    """Raise FormatError where files hold a tensor of one name with different numbers, or one of them is broken.

    Which of them mlx-lm takes is left to the order in which the disk lists files.
    """
    seen: dict[str, StoredTensor] = {}
    for path in paths:
        for name, tensor in stored_tensors(path).items():
            other = seen.setdefault(name, tensor)
            if other is not tensor and not tensor.equals(other):
                how = f"'{name}' is another in {other.path.name} than in {path.name}"
                raise FormatError(
                    f"'{path.parent}' holds weights of two models: {how}.", "keep the files of one in the folder."
                )


def copy_tensors(path: Path, tensors: Mapping[str, StoredTensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors of other files to a new one as they are, in the order of their names, some megabytes at a time.

    Raises StorageError when the disk refuses.
    """
    require_free_space(path.parent, sum(tensor.nbytes for tensor in tensors.values()))
    names, offset = sorted(tensors), 0
    header: dict[str, Any] = {"__metadata__": dict(metadata or {"format": "mlx"})}
    for name in names:
        tensor = tensors[name]
        span = [offset, offset + tensor.nbytes]
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": span}
        offset = span[1]
    with atomic_file(path) as stream:
        stream.write(frame(header))
        for name in names:
            for block in tensors[name].blocks():
                stream.write(block)
