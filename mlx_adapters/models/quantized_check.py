"""Quantized layers that this machine's MLX computes wrong are noticed at load, and computed another way.

MLX chooses among many kernels by shape, number of tokens, bits and type, and a wrong one says nothing: the CUDA
build of MLX 0.32.4 is off by the size of the result for matrices of one group per row in float32 and float16.
So the first layer of each kind (class, shape, bits, group size, mode, types) reads some
random tokens, in counts that reach all kernels, and is compared with its own dequantized weight on the CPU; one with a
matrix for each head (`MultiLinear`, of latent attention) those of two texts as well: CUDA's kernels take a weight that
is repeated over texts for one matrix that all share, and give every head the first head's. What is
found is remembered for this version of MLX and this device; a layer of a wrong kind becomes a dense one, and a
warning names it. What MLX has no kernel for, or one that does not compile, is wrong, too: on an H100 or H200 those for
one group per row need a header of the package nvidia-cuda-crt, which MLX's does not require.
"""

import contextlib
import hashlib
import inspect
import itertools
import logging
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mlx.utils import tree_unflatten

from mlx_adapters.errors import AdapterError, ModelError
from mlx_adapters.models.dense import dense_layer, dense_weight, is_quantized, weight_shape
from mlx_adapters.models.layers import weight_layers
from mlx_adapters.storage import files, paths, temporaries
from mlx_adapters.storage.replacing import file_version
from mlx_adapters.storage.tensor_names import BIAS, SCALES
from mlx_adapters.system.door import mx, nn
from mlx_adapters.system.gpu_kernels import ways
from mlx_adapters.system.machine import usable_memory_bytes
from mlx_adapters.units import count, size

log = logging.getLogger("mlx_adapters.models.quantized_check")

TOKENS = (1, 2, 5, 9, 20, 40, 130)  # CUDA has kernels for one, for up to 16, for up to 32, and for more
TEXTS = (1, 2)  # at once, of a layer with a matrix for each head: only from two on its weight is broadcast
ROWS, EXPERTS = 256, 4  # of a large weight, so many output rows and experts are compared, from both ends
# Of a token's or a row's result, by norm; what is wrong is off by all of it. float32 products may be TF32's, and a
# CPU adds up in bfloat16.
TOLERANCE = {mx.float32: 0.01, mx.float16: 0.02, mx.bfloat16: 0.15}
NOTHING = 1e-3  # of the largest: an embedding has rows of zeros for tokens that are not there
HEADERS = "nvidia-cuda-crt"  # the package with crt/mma.h
LASTING = ("No implementation", "Failed to compile")  # other refusals, for lack of memory say, are not remembered


Function = Callable[..., mx.array]


class MiscomputedWarning(UserWarning):
    """MLX computes a quantized layer wrong on this machine; it was replaced by a dense one."""


@dataclass(frozen=True)
class LayerCheck:
    """What the check of one kind of layer gave: the largest error of a token's or a row's result, relative to it.
    `refusal`: why MLX does not compute it at all."""

    kind: str
    error: float
    right: bool
    refusal: str = ""

    @property
    def found(self) -> float | str:
        """What is remembered of it."""
        return self.refusal or min(self.error, 1e9)

    @property
    def lasts(self) -> bool:
        """Whether another time would give the same."""
        return not self.refusal or any(words in self.refusal for words in LASTING)


def replace_miscomputed(module: nn.Module, dtype: mx.Dtype, gradients: bool = False, say: bool = True) -> list[str]:
    """Make dense what this device computes wrong in activations of `dtype`, in place; the paths. `say`: warn once for
    all.

    gradients: what goes back through a layer counts as well, which other kernels compute. Raises ModelError if the
    dense layers would not fit the memory.
    """
    wrong = _wrong(module, dtype, gradients)
    if wrong:
        refusals = (found for _, found in wrong.values() if isinstance(found, str))
        _make_dense(module, {path: layer for path, (layer, _) in wrong.items()}, dtype, say, next(refusals, ""))
    return list(wrong)


def miscomputed(module: nn.Module, dtype: mx.Dtype, gradients: bool = False) -> dict[str, nn.Module]:
    """The quantized layers, by path, that this device computes wrong in activations of `dtype`."""
    return {path: layer for path, (layer, _) in _wrong(module, dtype, gradients).items()}


def are_right(layers: Sequence[nn.Module], dtype: mx.Dtype, gradients: bool = False) -> list[bool]:
    """Whether this device computes each of these quantized layers right; one of each kind is checked, once."""
    return [_is_right(found, dtype) for found in _found(layers, dtype, gradients)]


def _wrong(module: nn.Module, dtype: mx.Dtype, gradients: bool) -> dict[str, tuple[nn.Module, float | str]]:
    layers = {path: layer for path, layer in weight_layers(module).items() if is_quantized(layer)}
    both = zip(layers.values(), _found(list(layers.values()), dtype, gradients), strict=True)
    return {path: each for path, each in zip(layers, both, strict=True) if not _is_right(each[1], dtype)}


def _found(layers: Sequence[nn.Module], dtype: mx.Dtype, gradients: bool) -> list[float | str]:
    """Of each layer its kind's error, or why MLX does not compute it."""
    kinds = [kind_of(layer, dtype) + (", gradients" if gradients else "") for layer in layers]
    known = _read()
    fresh = {kind: layer for kind, layer in zip(kinds, layers, strict=True) if kind not in known}
    if fresh:
        log.info("%s of quantized layers are tried on this device, once.", count(len(fresh), "kind"))
        checks = {kind: check_layer(layer, dtype, gradients) for kind, layer in fresh.items()}
        _write(known | {kind: check.found for kind, check in checks.items() if check.lasts})
        known |= {kind: check.found for kind, check in checks.items()}
    return [known[kind] for kind in kinds]


def remembered(kind: str, measure: Callable[[], float]) -> float:
    """The error of something else that hangs on this version of MLX and this device; measured once, if it can be."""
    known = _read()
    if isinstance(error := known.get(kind), float):
        return error
    error = measure()
    if math.isfinite(error):
        _write(known | {kind: error})
    return error


def tried(kind: str, built: dict[Any, Callable[..., Any]], case: Any, error: Callable[[], float], most: float) -> bool:
    """Whether a kernel of our own is no more than `most` off, in one of the ways to build it, which `built` has then
    for this case; nothing if none is."""
    for way in ways():
        built[case] = way
        if remembered(f"{kind}, {way.__name__}", error) <= most:
            return True
    built.pop(case, None)
    return False


def largest_error(made: mx.array, expected: mx.array) -> float:
    """How far a kernel's numbers are off, relative to the largest one expected (float32); infinite for NaN."""
    error = (mx.abs(made.astype(mx.float32) - expected).max() / mx.abs(expected).max()).item()
    return error if math.isfinite(error) else math.inf


def _make_dense(module: nn.Module, wrong: dict[str, nn.Module], dtype: mx.Dtype, say: bool, refusal: str) -> None:
    needed = sum(dtype.size * math.prod(weight_shape(layer)) for layer in wrong.values())
    first = next(iter(wrong))
    what = f"MLX {version('mlx')} computes {count(len(wrong), 'quantized layer')} wrong on this device ('{first}'"
    what += f": {kind_of(wrong[first], dtype)})"
    if needed > 0.8 * usable_memory_bytes():
        raise ModelError(f"{what}, and there is no room for unquantized ones ({size(needed)}).", "use another --bits.")
    for path, layer in wrong.items():
        dense = dense_layer(layer, dense_weight(layer, dtype))
        mx.eval(dense.parameters())
        module.update_modules(tree_unflatten([(path, dense)]))
    if say:
        text = f"{what}. They are computed unquantized here ({size(needed)}); plain mlx-lm would answer wrong"
        text += f" or end: {refusal.rstrip('.')}." if refusal else "."
        warnings.warn(text, MiscomputedWarning, stacklevel=4)


def kind_of(layer: nn.Module, dtype: mx.Dtype) -> str:
    """What decides which kernel runs: class, shape, precision and types."""
    shape = "x".join(map(str, weight_shape(layer)))
    types = " on ".join(dict.fromkeys(str(t).rpartition(".")[2] for t in (layer[SCALES].dtype, dtype)))
    mode = getattr(layer, "mode", "affine")
    return f"{type(layer).__name__} {shape}, {layer.bits} bits, groups of {layer.group_size}, {mode}, {types}"


def check_layer(layer: nn.Module, dtype: mx.Dtype, gradients: bool = False) -> LayerCheck:
    """Compare a quantized layer with its dequantized weight on random tokens of `dtype`, the weight's first and last
    rows; with `gradients` what comes back to its input as well."""
    error = 0.0
    try:
        for call, reference, x in _products(layer, dtype):
            error = max(error, _distance(call(x), _on_cpu(reference, x)))
            if gradients:
                back = _tokens(call(x).shape, dtype)
                theirs = _on_cpu(lambda x, y, f=reference: mx.vjp(f, [x], [y])[1][0], x, back)
                error = max(error, _distance(mx.vjp(call, [x], [back])[1][0], theirs))
    except RuntimeError as refused:  # "No implementation for problem shape": it would end the answer, too
        return LayerCheck(f"{kind_of(layer, dtype)}: {_why(refused)}", math.inf, False, _why(refused))
    return LayerCheck(kind_of(layer, dtype), error, _is_right(error, dtype))


def _why(refused: RuntimeError) -> str:
    """In a line why MLX does not compute something; of a kernel that lacks a header, which, and who has it."""
    header = re.search(r'cannot open source file "([^"]+)"', str(refused))
    if header is None:
        return str(refused).partition("\n")[0]
    package = f", which the package {HEADERS} has" if header[1].startswith("crt/") else ""
    return f"Failed to compile a kernel without {header[1]}{package}"


def _on_cpu(function: Function, *arrays: mx.array) -> mx.array:
    with mx.stream(mx.cpu):
        return function(*(array.astype(mx.float32) for array in arrays))


def _products(layer: nn.Module, dtype: mx.Dtype) -> Iterator[tuple[Function, Function, mx.array]]:
    """(the layer, the same of its dense weight in float32, an input) in all ways mlx-lm calls it, of some rows."""
    parameters = inspect.signature(type(layer).__call__).parameters
    rows = _ends(weight_shape(layer)[-2], ROWS)
    if "indices" in parameters:
        yield from _experts(layer, rows, dtype)
        return
    dense = _dense_part(layer, rows)  # (rows, inputs), or (heads, rows, inputs)
    bias = layer[BIAS][rows].astype(mx.float32) if BIAS in layer else mx.zeros(())
    forward = layer.as_linear if hasattr(layer, "as_linear") else layer
    for texts, tokens in itertools.product(TEXTS if dense.ndim > 2 else TEXTS[:1], TOKENS):
        x = _tokens((texts, *dense.shape[:-2], tokens, dense.shape[-1]), dtype)
        yield lambda x: forward(x)[..., rows], lambda x: x @ dense.swapaxes(-1, -2) + bias, x
        if "transpose" in parameters and len(rows) == weight_shape(layer)[-2]:
            x = _tokens((texts, *dense.shape[:-2], tokens, dense.shape[-2]), dtype)
            yield lambda x: layer(x, transpose=False), lambda x: x @ dense, x


def _experts(layer: nn.Module, rows: mx.array, dtype: mx.Dtype) -> Iterator[tuple[Function, Function, mx.array]]:
    """One input for all chosen experts, one for each, and tokens sorted by expert, as in a long text."""
    some = _ends(weight_shape(layer)[0], EXPERTS)
    dense = _dense_part(layer, rows, some)  # (experts, rows, inputs)
    bias = layer[BIAS][some][:, rows].astype(mx.float32) if BIAS in layer else mx.zeros((len(some), 1))
    inputs = dense.shape[-1]
    for tokens in TOKENS:
        chosen = mx.random.randint(0, len(some), (tokens, 2), key=mx.random.key(tokens))
        shared = _tokens((tokens, 1, 1, inputs), dtype)
        order = mx.argsort(chosen.flatten())
        for x, which, is_sorted in (
            (shared, chosen, False),
            (_tokens((tokens, 2, 1, inputs), dtype), chosen, False),
            (shared.reshape(tokens, 1, inputs)[order // 2], chosen.flatten()[order], True),
        ):
            yield (
                lambda x, i=some[which], s=is_sorted: layer(x, i, sorted_indices=s)[..., rows],
                lambda x, i=which: x @ dense[i].swapaxes(-1, -2) + bias[i][..., None, :],
                x,
            )


def _ends(count: int, most: int) -> mx.array:
    """Indices of the first and the last of `count`, `most` in all: at its end a kernel's last tile may stand over."""
    return mx.array([i for i in range(count) if i < most // 2 or i >= count - most // 2 or count <= most])


def _tokens(shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(shape[-2])).astype(dtype)


def _dense_part(layer: nn.Module, rows: mx.array, experts: mx.array | None = None) -> mx.array:
    """These rows (of these experts) of a layer's weight in float32, dequantized on the CPU."""
    kind: Any = type(layer)
    part = kind.__new__(kind)
    nn.Module.__init__(part)
    for name in ("bits", "group_size", "mode"):
        setattr(part, name, getattr(layer, name))
    with mx.stream(mx.cpu):
        for name, array in layer.parameters().items():
            cut = array[experts] if experts is not None and array.ndim else array
            part[name] = cut[..., rows, :] if name != BIAS and array.ndim >= 2 else cut
        dense = dense_weight(part, mx.float32)
        mx.eval(dense)
    return dense


def _distance(y: mx.array, reference: mx.array) -> float:
    y = y.astype(mx.float32)
    mx.eval(y, reference)
    with mx.stream(mx.cpu):
        wrong, right = (a.reshape(-1, a.shape[-1]) for a in (y - reference, reference))  # (tokens, rows)
        axes = (1, 0) if wrong.shape[0] > 5 else (1,)  # of each token; of each row, too, where there are some tokens
        errors = [(mx.linalg.norm(wrong, axis=a), mx.linalg.norm(right, axis=a)) for a in axes]
        each = [mx.max(error / mx.maximum(mx.maximum(norm, NOTHING * mx.max(norm)), 1e-30)) for error, norm in errors]
        error = float(mx.max(mx.stack(each)).item())
    return error if math.isfinite(error) else math.inf


def _is_right(found: float | str, dtype: mx.Dtype) -> bool:
    return not isinstance(found, str) and found <= TOLERANCE.get(dtype, 0.01)


def _where() -> Path:
    return paths.home() / "checks" / f"quantized-{_this_device()}.json"


@cache
def _this_device() -> str:
    device = str(mx.device_info().get("device_name", mx.default_device()))
    headers = ""
    with contextlib.suppress(PackageNotFoundError):  # when it is installed, what did not compile is tried again
        headers = version(HEADERS)
    return hashlib.sha256(f"{version('mlx')} {device} {headers} {TOKENS} {TEXTS}".encode()).hexdigest()[:16]


def _read() -> dict[str, float | str]:
    where = _where()
    return _read_of(where, file_version(where)).copy()


@lru_cache(maxsize=1)
def _read_of(where: Path, version: Any) -> dict[str, float | str]:
    """What is remembered there; for each version of the file it is read once."""
    temporaries.sweep(where.parent)  # also where a kill came after all was written
    try:
        known = files.read_json(where)
    except AdapterError:
        return {}
    return {kind: found for kind, found in known.items() if isinstance(found, float | str)}


def _write(known: dict[str, float | str]) -> None:
    with contextlib.suppress(AdapterError):  # a full disk: it is looked at again next time
        files.write_json(_where(), known)
