"""How much memory inference will take, told without loading the weights.

Weights are counted from the shapes in the model's files. The KV cache is exact: the model is called on the whole
context without evaluating anything (MLX is lazy), and the caches that come out are asked for their size, so
sliding windows and shared layers count as they are. Activations are those of one prefill chunk, estimated.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mlx.utils import tree_flatten

from mlx_adapters.config.mapping import require
from mlx_adapters.config.quantization import Quantization
from mlx_adapters.display.tables import Rows, Table, flat
from mlx_adapters.models.adapter import AdapterLike
from mlx_adapters.models.base import Base, BaseLike
from mlx_adapters.models.dense import weight_shape
from mlx_adapters.models.layers import adaptable_layers, check_fits
from mlx_adapters.models.loading import load_module
from mlx_adapters.sources.bases import resolve_base, to_begin_with
from mlx_adapters.sources.lookup import load_adapter
from mlx_adapters.system.door import make_prompt_cache, mx, nn
from mlx_adapters.system.machine import on_gpu, usable_memory_bytes

PREFILL_CHUNK = 2048
SCALE_BYTES = 2  # of a group's scale, and of its bias
STORED = "as stored"


@dataclass(frozen=True)
class MemoryForecast:
    """Bytes in memory at one precision. `kv_cache_bytes` and `peak_bytes` by context length.

    `disk_bytes` is the size of the weights in files. On a CPU `weights_bytes` is that of the dense float32 copy.
    """

    precision: str
    disk_bytes: int
    weights_bytes: int
    adapter_bytes: int
    activation_bytes: int
    kv_cache_bytes: dict[int, int]

    @property
    def peak_bytes(self) -> dict[int, int]:
        """Weights, adapter, KV cache and activations by context length."""
        standing = self.weights_bytes + self.adapter_bytes
        return {
            n: standing + kv + min(n, PREFILL_CHUNK) * self.activation_bytes for n, kv in self.kv_cache_bytes.items()
        }

    def fits(self, memory_bytes: int) -> dict[int, bool]:
        """Whether each context length fits into so much memory."""
        return {context: peak <= memory_bytes for context, peak in self.peak_bytes.items()}


@dataclass(frozen=True, repr=False)
class InferenceEstimate(Table):
    """The forecasts of one base model, with the memory that there is."""

    base: str
    batch: int
    memory_bytes: int
    forecasts: tuple[MemoryForecast, ...]

    def records(self) -> list[dict[str, Any]]:
        """One for each precision."""
        return [flat(forecast) for forecast in self.forecasts]


@dataclass(frozen=True, repr=False)
class KnownModel(Table):
    """A base that people begin with, and what it takes.

    Args:
        id: what to type for it.
        parameters: how many numbers it has.
        license: its license's name.
        year: when it was published.
        source: the model card that says so.
        size_bytes: of its weights, which are in 4 bits: 4.5 with the groups' scales.
        running_bytes: the memory to answer with it, about: weights, 4,096 tokens of context, and half a GB.
        training_bytes: the memory to train it, about: weights, a batch of 4 x 512 tokens with blocks computed again.

    Example:
        >>> ma.known_models()[0].id
        'demo'
    """

    id: str
    parameters: int
    license: str
    year: int
    source: str
    size_bytes: int
    running_bytes: int
    training_bytes: int


def known_models() -> Rows[KnownModel]:
    """A short list of bases to begin with, the smallest first, with the memory that they take on this device, roughly.

    Nothing is loaded or fetched; `estimate` and `estimate_inference` say it of any base, more exactly.

    Example:
        >>> [model.id for model in ma.known_models() if model.parameters < 600_000_000]
        ['demo', 'mlx-community/Qwen2.5-0.5B-Instruct-4bit', 'mlx-community/Qwen3-0.6B-4bit']
    """
    return Rows(_known(**entry) for entry in to_begin_with())


def _known(
    id: str,
    parameters: int,
    license: str,
    year: int,
    layers: int,
    hidden: int,
    intermediate: int,
    kv_width: int,
    vocabulary: int,
    source: str,
    size_bytes: int | None = None,
) -> KnownModel:
    item, beside = 2 if on_gpu() else 4, 500_000_000
    stored = size_bytes or parameters * 9 // 16  # 4 bits, and 16 each for scale and bias of 64
    weights = stored if on_gpu() else 4 * parameters
    cache = 2 * layers * kv_width * 4096 * item
    each = layers * hidden + 4 * intermediate + 12 * hidden  # per token: what every block got, and one at work
    logits = 3 * 4 * 512 * vocabulary
    trained = weights + item * 4 * 512 * each + logits + beside
    return KnownModel(id, parameters, license, year, source, stored, weights + cache + beside, trained)


def estimate_inference(
    base: BaseLike,
    adapter: AdapterLike | None = None,
    *,
    contexts: Sequence[int] = (2048, 8192),
    batch: int = 1,
    bits: Sequence[int] = (4, 8, 16),
    group_size: int = 64,
    memory_bytes: int | None = None,
) -> InferenceEstimate:
    """Forecast the memory of inference: as stored, and at other precisions. `activation_bytes` is per token.

    Args:
        base: "demo", a folder or a Hub id; only its config and the names of its tensors are read.
        adapter: one that is to be attached.
        contexts: lengths in tokens to forecast.
        batch: sequences at a time.
        bits: other precisions to forecast.
        group_size: of those under 16 bits.
        memory_bytes: what there is; None: what this machine lets MLX use.

    Raises ConfigError, NotFoundError, ModelError or IncompatibleError.

    Example:
        >>> forecast = ma.estimate_inference("demo", contexts=[2048], bits=[8])
        >>> len(forecast.forecasts) >= 2
        True
    """
    require(batch >= 1 and len(contexts) > 0 and min(contexts) >= 1, "contexts and batch must be at least 1.")
    resolved = base if isinstance(base, Base) else resolve_base(base)
    module, _ = load_module(resolved)
    factors = load_adapter(adapter) if adapter is not None else None
    if factors is not None:
        check_fits(factors, module, f"'{resolved.name}'")
    item = 2 if on_gpu() else 4
    cache = {context: kv_cache_bytes(module, context, batch, item) for context in contexts}
    extra = sum(w.nbytes for w in factors.weights.values()) if factors else 0
    dense = 4 * parameter_count(module)
    sizes = {STORED: sum(path.stat().st_size for path in resolved.weight_files)}
    sizes |= {f"{b}-bit": weights_bytes(module, b, group_size) for b in bits}
    forecasts = [
        MemoryForecast(
            name, disk, _in_memory(disk, name, module, dense), extra, activations(module, batch, item), cache
        )
        for name, disk in sizes.items()
    ]
    return InferenceEstimate(resolved.name, batch, memory_bytes or usable_memory_bytes(), tuple(forecasts))


def _in_memory(disk: int, name: str, module: nn.Module, dense: int) -> int:
    if not on_gpu():
        return dense
    return bytes_of(module) if name == STORED else disk


def bytes_of(module: nn.Module) -> int:
    """Bytes of all weights."""
    return sum(array.nbytes for _, array in tree_flatten(module.parameters()))


def parameter_count(module: nn.Module) -> int:
    """Numbers in the model, packed weights counted unpacked."""
    return sum(size for size, _ in _sizes(module))


def _sizes(module: nn.Module) -> list[tuple[int, bool]]:
    """(numbers, whether it can be quantized) of each weight; scales and biases of groups are no weights."""
    layers = adaptable_layers(module)
    sizes = []
    for path, array in tree_flatten(module.parameters()):
        owner, _, leaf = path.rpartition(".")
        if owner in layers and leaf == "weight":
            shape = weight_shape(layers[owner])
            sizes.append((math.prod(shape), shape[-1] % 32 == 0))
        elif not (owner in layers and leaf in ("scales", "biases")):
            sizes.append((array.size, False))
    return sizes


def weights_bytes(module: nn.Module, bits: int, group_size: int) -> int:
    """Bytes of the weights with all linear, expert and embedding layers in `bits` bits, the rest in 16."""
    if bits == 16:
        return sum(2 * size for size, _ in _sizes(module))
    require(bits == 32 or Quantization(bits, group_size).bits == bits, f"There is no {bits}-bit format.")
    per_weight = bits / 8 + 2 * SCALE_BYTES / group_size
    return round(sum(size * (per_weight if packable else 2) for size, packable in _sizes(module)))


def kv_cache_bytes(module: nn.Module, context: int, batch: int, item_bytes: int) -> int:
    """Bytes of the cache after `context` tokens, for activations of `item_bytes`; nothing is computed."""
    cache = make_prompt_cache(module)
    for start in range(0, context - 1, PREFILL_CHUNK):
        module(mx.zeros((batch, min(PREFILL_CHUNK, context - 1 - start)), mx.int32), cache=cache)
    module(mx.zeros((batch, 1), mx.int32), cache=cache)  # one by one, a sliding window drops what it leaves behind
    total = 0
    for layer in cache:
        arrays = [a for _, a in tree_flatten(layer.state) if isinstance(a, mx.array)]
        own = sum(a.nbytes for a in arrays)
        wide = sum(a.size * item_bytes for a in arrays if mx.issubdtype(a.dtype, mx.floating))
        total += round(layer.nbytes * wide / own) if own else 0
    return total


def activations(module: nn.Module, batch: int, item_bytes: int) -> int:
    """Bytes per token of the largest block at work: its input and the two widest products in flight."""
    layers = [
        layer for path, layer in adaptable_layers(module).items() if ".layers." in f".{path}" or ".h." in f".{path}"
    ]
    widths = sorted((weight_shape(layer)[-2] for layer in layers), reverse=True)
    hidden = min((weight_shape(layer)[-1] for layer in layers), default=0)
    return batch * item_bytes * (3 * hidden + sum(widths[:2])) if widths else 0
