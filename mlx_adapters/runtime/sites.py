"""Base layers with a place for an adapter, made for inference.

A `Site` is where an update applies: a linear layer, a group of linear layers on one input, an embedding or the
experts of a mixture. With `site.update` None, its layers compute exactly what the base computes.

At decode a layer costs as much for each small operation as for its whole matrix product, so linear layers
that share an input (q, k, v; gate, up) form a group: their base matrices lie below each other in one array, of
which the layers' own weights become views, and one product, one a and one block-diagonal b serve them all.
The model still calls each layer by itself; the first call computes, the others take their part.
"""

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mlx_adapters.models.dense import dense_layer, dense_weight, weight_shape
from mlx_adapters.models.layers import EMBEDDING, SWITCH, AdapterLayer
from mlx_adapters.runtime import unpacked
from mlx_adapters.runtime.additions import MANY_TOKENS, Addition, ForAll, outputs_of
from mlx_adapters.runtime.factors import Factors, below_each_other
from mlx_adapters.storage.tensor_names import BIAS, QUANTIZED_LEAVES, WEIGHT
from mlx_adapters.surgery.calls import intercept
from mlx_adapters.surgery.groups import Arrays, lay_together
from mlx_adapters.system.door import mx, nn
from mlx_adapters.system.machine import on_cuda


class Site:
    """One layer that can take an update."""

    def __init__(self, paths: Sequence[str], layers: Sequence[nn.Module]) -> None:
        self.paths, self.layers = tuple(paths), tuple(layers)
        plain = type(layers[0]) is nn.QuantizedLinear and layers[0].mode == "affine"
        self.product = Concatenated(layers, layers[0]) if plain else layers[0]
        self.update: Addition | None = None

    def assemble(self, factors: dict[str, Factors]) -> Factors | None:
        """The adapter's factors for this site, from those of its layers; None if it touches none of them."""
        return factors.get(self.paths[0])

    def outputs(self, x: mx.array) -> list[mx.array]:
        """The output of each of its linear layers, with the update."""
        if self.update is None:
            return [self.layers[0](x)]
        if isinstance(self.update, ForAll) and isinstance(self.product, Concatenated) and self.product.unpacks_for(x):
            return self.product.with_update(x, self.update)
        return outputs_of(self.update, self.product, x, (weight_shape(self.layers[0])[0],))

    def linear(self, x: mx.array, index: int = 0) -> mx.array:
        """The output of the linear layer number `index`."""
        return self.outputs(x)[0]


class Group(Site):
    """Linear layers on one input."""

    def __init__(self, paths: Sequence[str], layers: Sequence[nn.Module], arrays: Arrays | None = None) -> None:
        super().__init__(paths, layers)
        self.widths = [layer.weight.shape[0] for layer in layers]
        self.product = Concatenated(layers, arrays)
        self._held: tuple[weakref.ref, dict[int, mx.array]] | None = None

    def assemble(self, factors: dict[str, Factors]) -> Factors | None:
        """See Site."""
        return below_each_other([factors.get(path) for path in self.paths], self.widths)

    def outputs(self, x: mx.array) -> list[mx.array]:
        """See Site."""
        if self.update is None:
            return [layer(x) for layer in self.layers]
        if isinstance(self.update, ForAll) and self.product.unpacks_for(x):
            return self.product.with_update(x, self.update)
        return outputs_of(self.update, self.product, x, self.widths)

    def linear(self, x: mx.array, index: int = 0) -> mx.array:
        """See Site. The parts live until they are taken or x dies, whichever comes first."""
        held = self._held
        if held is None or held[0]() is not x or index not in held[1]:
            held = self._held = (weakref.ref(x, self._drop), dict(enumerate(self.outputs(x))))
        part = held[1].pop(index)
        if not held[1]:
            self._held = None
        return part

    def _drop(self, reference: weakref.ref) -> None:
        held = self._held
        if held is not None and held[0] is reference:
            self._held = None


class Concatenated:
    """Linear layers of one kind as one; `arrays`: those of all, if the layers' own are views of them already.

    On CUDA a packed matrix is unpacked for the product of many tokens and forgotten again, as it is in training: MLX's
    quantized product takes two to three times as long there.
    """

    def __init__(self, layers: Sequence[nn.Module], arrays: Mapping[str, mx.array] | None = None) -> None:
        self.layers, first = tuple(layers), layers[0]
        self.options: dict[str, Any] | None = None
        if isinstance(first, nn.QuantizedLinear):
            self.options = {"group_size": first.group_size, "bits": first.bits, "mode": first.mode}
        self.arrays = arrays if arrays is not None else lay_together(layers)
        self.unpacks = self.options is not None and first.mode == "affine" and on_cuda()
        self.transposed, self.bias = self.arrays[WEIGHT].T, self.arrays.get(BIAS)
        mx.eval(self.arrays, self.transposed, [layer.parameters() for layer in layers])

    def __call__(self, x: mx.array) -> mx.array:
        if self.options is None:
            y = x @ self.transposed
        else:
            packed = (self.arrays.get(name) for name in QUANTIZED_LEAVES)
            if self.unpacks_for(x):
                y = x @ mx.dequantize(*packed, **self.options, dtype=x.dtype).T
            else:
                y = mx.quantized_matmul(x, *packed, transpose=True, **self.options)
        return y if self.bias is None else y + self.bias

    def unpacks_for(self, x: mx.array) -> bool:
        """Whether x is of so many tokens that the matrix is unpacked for it."""
        return self.unpacks and x.size > MANY_TOKENS * x.shape[-1]

    def with_update(self, x: mx.array, update: ForAll) -> list[mx.array]:
        """What each layer computes with the update, of many tokens; in arrays of their own, since parts of one would be
        copied. The update comes in where the matrix is unpacked, or else beside it."""
        comes_in = all(unpacked.serves(layer, x.dtype, update.rank) for layer in self.layers) and update.is_sum
        factors = update.of_each([weight_shape(layer)[0] for layer in self.layers]) if comes_in else ()
        outputs: list[mx.array] = []
        for index, layer in enumerate(self.layers):
            packed = (layer.get(name) for name in QUANTIZED_LEAVES)
            if factors:
                weight = unpacked.unpacked(layer, *factors[index])
            else:
                weight = mx.dequantize(*packed, **(self.options or {}), dtype=x.dtype)
            y = x @ weight.T
            outputs.append(y + layer[BIAS] if BIAS in layer else y)
        return outputs if factors else update.added(outputs, x)


def joined(layers: Sequence[nn.Module]) -> nn.QuantizedLinear:
    """Quantized linear layers of one kind as one lazy layer, to be looked at."""
    first, whole = layers[0], nn.QuantizedLinear.__new__(nn.QuantizedLinear)
    nn.Module.__init__(whole)
    for name in ("group_size", "bits", "mode"):
        setattr(whole, name, getattr(first, name))
    for name in (name for name in (*QUANTIZED_LEAVES, BIAS) if first.get(name) is not None):
        whole[name] = mx.concatenate([layer[name] for layer in layers])
    return whole


def fused_layers(site: Site, factors: Factors, dtype: mx.Dtype) -> dict[str, nn.Module]:
    """Dense layers that compute what the site's layers and the factors do together."""
    made, start = {}, 0
    for index, (path, layer) in enumerate(zip(site.paths, site.layers, strict=True)):
        weight = dense_weight(layer, mx.float32)
        rows = slice(None) if weight.ndim == 3 else slice(start, start + weight.shape[0])
        start += weight.shape[0]
        if factors.gain is not None:
            weight = weight * factors.gain[rows].astype(mx.float32)[:, None]
        b, a = factors.b.astype(mx.float32), factors.a.astype(mx.float32)
        a = a[index] if len(site.layers) > 1 else a
        made[path] = dense_layer(layer, (weight + (b[rows] @ a)).astype(dtype))
    mx.eval([layer.parameters() for layer in made.values()])
    return made


class AdaptedLinear(AdapterLayer):
    """A linear layer whose output its site computes."""

    def __init__(self, linear: nn.Module, site: Site, index: int) -> None:
        super().__init__()
        self.linear = linear
        self._site, self._index = site, index

    def __call__(self, x: mx.array) -> mx.array:
        return self._site.linear(x, self._index)


class AdaptedEmbedding(AdapterLayer):
    """An embedding; with tied weights its update reaches the output side too, as in mlx-lm."""

    def __init__(self, embedding: nn.Module, site: Site, index: int) -> None:
        super().__init__()
        self.embedding = embedding
        self._site = site

    def __call__(self, ids: mx.array) -> mx.array:
        y, update = self.embedding(ids), self._site.update
        return y if update is None else update.lookup(y, ids)

    def as_linear(self, x: mx.array) -> mx.array:
        """The logits of x (..., dim)."""
        y, update = self.embedding.as_linear(x), self._site.update
        return y if update is None else update.linears(y, x, (y.shape[-1],))[0]


class AdaptedExperts(AdapterLayer):
    """One linear layer of all experts of a mixture."""

    def __init__(self, linear: nn.Module, site: Site, index: int) -> None:
        super().__init__()
        self.linear = linear
        self._site = site

    @property
    def input_dims(self) -> int:
        """Width of the input, as mlx-lm's layer tells it."""
        return self.linear.input_dims

    @property
    def output_dims(self) -> int:
        """Width of the output."""
        return self.linear.output_dims

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        y, update = self.linear(x, indices, sorted_indices=sorted_indices), self._site.update
        return y if update is None else update.experts(y, x, indices, sorted_indices)


def wrap(site: Site) -> dict[str, AdapterLayer]:
    """The site's layers by path, each in the place for an adapter that its kind has."""
    kind: type[AdaptedLinear | AdaptedEmbedding | AdaptedExperts] = AdaptedLinear
    if isinstance(site.layers[0], EMBEDDING):
        kind = AdaptedEmbedding
    elif isinstance(site.layers[0], SWITCH):
        kind = AdaptedExperts
    return {path: kind(layer, site, i) for i, (path, layer) in enumerate(zip(site.paths, site.layers, strict=True))}


def remember_indices(block: nn.Module, site: Site) -> Callable[[], None]:
    """Let a block of experts tell the rows of a mixed batch which experts its tokens go to.

    mlx-lm sorts (token, expert) pairs before its expert layers see them; with the indices from before, the
    layer can tell whose pair is whose. Gives the function that undoes it.
    """

    def remembering(original: Callable[..., mx.array], x: mx.array, indices: mx.array) -> mx.array:
        for part in getattr(site.update, "parts", ()):
            part.rows.indices = indices
        return original(x, indices)

    return intercept(block, remembering)


def at_path(module: nn.Module, path: str) -> nn.Module:
    """The module at a path."""
    for part in path.split(".") if path else ():
        module = module[int(part)] if isinstance(module, list) else getattr(module, part)
    return module


def replace_layers(module: nn.Module, layers: dict[str, nn.Module]) -> None:
    """Put `layers` at their paths."""
    for path, layer in layers.items():
        parent, _, name = path.rpartition(".")
        owner: Any = at_path(module, parent)
        owner[int(name) if isinstance(owner, list) else name] = layer
