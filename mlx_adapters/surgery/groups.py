"""Linear layers that are given the same input: found by watching one forward pass, laid together in memory, where
they are read from the files at once.
"""

import io
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from mlx.utils import tree_flatten

from mlx_adapters.errors import AdapterError
from mlx_adapters.storage.replacing import file_version
from mlx_adapters.storage.tensor_files import StoredTensor, frame, stored_tensors
from mlx_adapters.storage.tensor_names import BIAS, QUANTIZED_LEAVES, join
from mlx_adapters.surgery.calls import intercept
from mlx_adapters.system.door import loads_noted_by, mx, nn
from mlx_adapters.system.machine import on_cuda

Arrays = dict[str, mx.array]  # of layers, by their names in a layer
READERS, BATCH = 8, 16 << 20  # threads that read, and bytes that one of them reads before it takes what comes next
_here = threading.local()  # `.stream`: a reading thread's own


def find_groups(module: nn.Module, layers: dict[str, nn.Module]) -> list[tuple[str, ...]]:
    """Paths of the linear layers that get the same input object.

    The pass is only traced, not computed, and no architecture is known by name. A group's layers lie in one
    block, are called once each and are of one kind (type, quantization, bias, dtype).
    """
    linear = {path: layer for path, layer in layers.items() if type(layer) in (nn.Linear, nn.QuantizedLinear)}
    calls: list[tuple[str, mx.array]] = []

    def noting(path: str) -> Callable[..., mx.array]:
        def note(original: Callable[..., mx.array], x: mx.array) -> mx.array:
            calls.append((path, x))
            return original(x)

        return note

    with ExitStack() as stack:
        for path, layer in linear.items():
            stack.callback(intercept(layer, noting(path)))
        try:
            module(mx.zeros((1, 1), dtype=mx.uint32))
        except (TypeError, ValueError, AttributeError):
            calls = []
    count: dict[str, int] = {}
    for path, _ in calls:
        count[path] = count.get(path, 0) + 1
    groups: dict[tuple, list[str]] = {}
    for path, x in calls:
        if count[path] == 1 and linear[path].weight.shape[0] % 8 == 0:
            groups.setdefault((path.rpartition(".")[0], id(x), _kind(linear[path])), []).append(path)
    return [tuple(paths) for paths in groups.values() if len(paths) > 1]


def _kind(layer: nn.Module) -> tuple:
    dtypes = tuple(layer[name].dtype if layer.get(name) is not None else None for name in (*QUANTIZED_LEAVES, BIAS))
    return (type(layer), *(getattr(layer, n, None) for n in ("bits", "group_size", "mode")), dtypes)


def lay_together(layers: Sequence[nn.Module], read: Arrays | None = None) -> Arrays:
    """The arrays of linear layers of one kind, one below the other, (Σ out, ...) each; the layers' own become views of
    them, equal to the bit. `read`: those that are there already. Of layers that were not evaluated before, no second
    copy is left in memory once they are."""
    wholes: Arrays = dict(read or {})
    for name in leaves_of(layers[0]):
        if name not in wholes:
            wholes[name] = mx.concatenate([layer[name] for layer in layers])
        start = 0
        for layer in layers:
            extent = layer[name].shape[0]
            layer[name] = wholes[name][start : start + extent]
            start += extent
    return wholes


def leaves_of(layer: nn.Module) -> list[str]:
    """The names of a linear layer's arrays."""
    return [name for name in (*QUANTIZED_LEAVES, BIAS) if layer.get(name) is not None]


@contextmanager
def reading_into_place(
    module: nn.Module, layers: Mapping[str, nn.Module], origins: "Origins"
) -> Iterator[Callable[[], dict[tuple[str, ...], Arrays]]]:
    """Within the block threads read a model's weights; gives what waits for them, and evaluates what is no tensor of a
    file: it gives `lay_together`, by their paths, for all groups of `layers`.

    What is a tensor of a file is read to where it stays: nothing is copied, or in memory twice.
    """
    groups = {
        paths: [layers[path] for path in paths] for paths in (find_groups(module, dict(layers)) if layers else ())
    }
    wanted, places = _wanted(module, groups, origins)
    with begin_reading(wanted) as reading:
        yield lambda: _in_place(module, groups, origins, places, reading())


def _in_place(
    module: nn.Module,
    groups: Mapping[tuple[str, ...], Sequence[nn.Module]],
    origins: "Origins",
    places: Mapping[str, str],
    read: Mapping[str, mx.array],
) -> dict[tuple[str, ...], Arrays]:
    origins.require_unchanged()
    module.load_weights([(name, read[first]) for name, first in places.items()], strict=False)
    laid: dict[tuple[str, ...], Arrays] = {}
    for paths, group in groups.items():
        there = {leaf: join(paths[0], leaf) for leaf in leaves_of(group[0])}
        laid[paths] = lay_together(group, {leaf: read[name] for leaf, name in there.items() if name in read})
        mx.eval(laid[paths], [layer.parameters() for layer in group])  # what was not read is there twice for a moment
    mx.eval(module.parameters())
    return laid


def _wanted(
    module: nn.Module, groups: Mapping[tuple[str, ...], Sequence[nn.Module]], origins: "Origins"
) -> tuple[dict[str, list[StoredTensor]], dict[str, str]]:
    """What to read: tensors that belong together under the name of the first, others under their own; and, of the
    others, under which name the array of each parameter is read: some are in two places."""
    wanted: dict[str, list[StoredTensor]] = {}
    grouped: set[int] = set()
    for paths, group in groups.items():
        for leaf in leaves_of(group[0]):
            arrays = [layer[leaf] for layer in group]
            wanted[join(paths[0], leaf)] = origins.of(arrays)
            grouped.update(map(id, arrays))
    first: dict[int, str] = {}
    alone: dict[str, mx.array] = {}
    places: dict[str, str] = {}
    for name, array in tree_flatten(module.parameters()):
        if id(array) not in grouped:
            places[name] = first.setdefault(id(array), name)
            alone[places[name]] = array
    if all_read := origins.of(list(alone.values())):
        wanted |= {name: [tensor] for name, tensor in zip(alone, all_read, strict=True)}
    else:
        wanted |= {name: origins.of([array]) for name, array in alone.items()}
    wanted = {name: tensors for name, tensors in wanted.items() if tensors}
    return wanted, {name: one for name, one in places.items() if one in wanted}


class Origins:
    """Where arrays lie that MLX has not read yet, of those that `mx.load` gave within the block."""

    def __init__(self) -> None:
        self._places: dict[int, tuple[weakref.ref, Path, str]] = {}
        self._files: dict[Path, dict[str, StoredTensor]] = {}
        self._versions: dict[Path, Any] = {}

    def __enter__(self) -> "Origins":
        self._before = loads_noted_by.set(self.note)
        return self

    def __exit__(self, *raised: object) -> None:
        loads_noted_by.reset(self._before)

    def note(self, file: Any, arrays: Any) -> None:
        """`arrays`, by their names, are those of a file."""
        if isinstance(file, str) and isinstance(arrays, dict):
            path = Path(file)
            self._versions[path] = file_version(path)
            self._places.update({id(array): (weakref.ref(array), path, name) for name, array in arrays.items()})

    def of(self, arrays: Sequence[mx.array]) -> list[StoredTensor]:
        """The tensors of files that these arrays are; none if one of them is anything else, or is changed."""
        found = [self._of(array) for array in arrays]
        tensors = [tensor for tensor in found if tensor is not None]
        return tensors if len(tensors) == len(arrays) and _are_as_read(arrays) else []

    def require_unchanged(self) -> None:
        """Raise OSError if a file was replaced since: MLX would have gone on with the old one."""
        for path in self._files:
            if file_version(path) != self._versions[path]:
                raise OSError(f"'{path}' was changed while it was read")

    def _of(self, array: mx.array) -> StoredTensor | None:
        held, path, name = self._places.get(id(array), (None, Path(), ""))
        if held is None or array.size == 0 or held() is not array:
            return None
        if path not in self._files:
            self._files[path] = {}
            with suppress(AdapterError):
                self._files[path] = stored_tensors(path)
        return self._files[path].get(name)


def _are_as_read(arrays: Sequence[mx.array]) -> bool:
    """Whether nothing was computed with these arrays, in place, and they are still to be read."""
    graph = io.StringIO()
    mx.export_to_dot(graph, *arrays)
    return graph.getvalue().count("[label =") == graph.getvalue().count('[label ="Load"') == len(arrays)


@contextmanager
def begin_reading(wanted: Mapping[str, Sequence[StoredTensor]]) -> Iterator[Callable[[], dict[str, mx.array]]]:
    """Gives what waits for tensors of files as arrays, evaluated, those of one name one below the other: (Σ n, ...).

    Each is read to where it stays, and several are at a time, from now on to the end of the block. What waits raises
    OSError.
    """
    batches: list[dict[str, Sequence[StoredTensor]]] = [{}]
    size = 0
    for name, parts in wanted.items():
        batches[-1][name] = parts
        size += sum(part.nbytes for part in parts)
        if size >= BATCH:
            batches.append({})
            size = 0
    reads = [_readers().submit(_read, batch) for batch in batches if batch]
    try:
        yield lambda: {name: array for read in reads for name, array in read.result().items()}
    finally:
        for read in reads:
            read.cancel()


@cache
def _readers() -> ThreadPoolExecutor:
    """Threads, each with a stream of its own: what one alone gives a GPU's driver is copied at half the speed."""
    return ThreadPoolExecutor(READERS, initializer=_begin_reading)


def in_advance(work: Callable[[], mx.array]) -> None:
    """Evaluate it in one of these threads, on CUDA, which takes a tenth of a second to bring in some of MLX's code when
    a process first uses it."""

    def use() -> None:
        with mx.stream(_here.stream):
            mx.eval(work())

    if on_cuda():
        _readers().submit(use)


def _begin_reading() -> None:
    _here.stream = mx.new_stream(mx.gpu if on_cuda() else mx.cpu)


def _read(wanted: Mapping[str, Sequence[StoredTensor]]) -> dict[str, mx.array]:
    file = _Joined(wanted)
    arrays = mx.load(file, format="safetensors", stream=_here.stream)
    if file.failure is not None:
        raise file.failure
    return arrays


class _Joined(io.RawIOBase):
    """Tensors of files as one safetensors file, of which MLX reads one whole tensor after the other."""

    def __init__(self, wanted: Mapping[str, Sequence[StoredTensor]]) -> None:
        header, self.parts, offset = {}, {}, 0
        for name, parts in wanted.items():
            shape = [sum(part.shape[0] for part in parts), *parts[0].shape[1:]] if len(parts) > 1 else parts[0].shape
            span = [offset, offset + sum(part.nbytes for part in parts)]
            header[name] = {"dtype": parts[0].dtype, "shape": list(shape), "data_offsets": span}
            self.parts[offset], offset = parts, span[1]
        self.frame, self.position = frame(header), 0
        self.size = len(self.frame) + offset
        self.failure: OSError | None = None  # not raised where MLX reads: in a thread that would lose it

    def seek(self, offset: int, whence: int = 0) -> int:
        self.position = offset + (0, self.position, self.size)[whence]
        return self.position

    def tell(self) -> int:
        return self.position

    def readinto(self, memory: Any) -> int:
        first, count = self.position - len(self.frame), len(memory)
        self.position += count
        if first < 0:
            memory[:] = self.frame[first : first + count or None]
            return count
        rest = memoryview(memory).cast("B")
        try:
            for part in self.parts[first]:
                part.read_into(rest[: part.nbytes])
                rest = rest[part.nbytes :]
        except OSError as error:
            self.failure = error
        return count
