"""A model called for one token after another: one compiled function, where Python would build a thousand operations.

On a GPU the host is what decoding waits for: it builds a 4B model's step of some 1,100 operations in half the time that
a token takes. A compiled step is not built again; but its arrays have fixed shapes, and a cache grows with each token.
So the newest keys and values lie beside the cache (see `attention`) and go into it some at a time.

What a model is asked for here is no more than a cache that counts its tokens in an array, as caches of batches do, and
attention by `mx.fast.scaled_dot_product_attention`. Whether that is all is seen while its step is traced, and whether
it is right by the first step, which is computed both ways.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from mlx.utils import tree_flatten

from mlx_adapters.drafting import attention
from mlx_adapters.drafting.attention import RECENT, Pair
from mlx_adapters.surgery.calls import HELD, function_call_as
from mlx_adapters.system.door import KVCache, mx, nn
from mlx_adapters.system.gpu_kernels import compiled
from mlx_adapters.system.machine import on_cuda

WORTH_TOKENS = 8  # so many are computed before a step is compiled: that takes as long as it saves in them
MOST_TOKENS = 8192  # in the cache; with more of them attention takes longer here than in MLX
MOST_STEPS = 4  # for as many adapters, who may take turns token by token
MOST_ERROR = 5e-2  # of the largest logit: sums in another order, in 16 bits through all blocks
COUNTS = 16  # of which two are read; arrays of up to 8 bytes lie where the host's are
KEPT = "_one_token"  # in the model's __dict__, where MLX looks for no parameters

Compile = Callable[[Callable[..., Any]], Callable[..., Any]]


class _Unsuited(Exception):
    """The model asks more of its cache than is here."""


class _Beside:
    """Stands in for a layer's cache while a step is traced."""

    def __init__(self, layer: int, cached: Pair, recent: Pair, counts: mx.array) -> None:
        self.layer, self.cached, self.recent, self.counts = layer, cached, recent, counts
        self.offset = counts[:1] + counts[1:2]  # as a batch of one row has it
        self.new: Pair | None = None
        self.attended = False

    def make_mask(self, length: int, return_array: bool = False, window_size: int | None = None) -> None:
        """None: the token may look at all."""
        if return_array or window_size is not None:
            raise _Unsuited
        return None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Pair:
        """The new ones, by which the attention that follows knows whose they are."""
        if self.new is not None:
            raise _Unsuited
        self.new = keys, values
        return self.new

    def attend(self, q: mx.array, scale: float) -> mx.array:
        """Attention to all that came before."""
        assert self.new is not None
        if self.attended or not attention.serves(q, *self.new):
            raise _Unsuited
        if any(
            new.shape[:2] + new.shape[3:] != old.shape[:2] + old.shape[3:]
            for new, old in zip(self.new, self.cached, strict=True)
        ):
            raise _Unsuited
        self.attended = True
        return attention.attend(q, self.cached, self.recent, self.layer, self.new, self.counts, scale)


@dataclass
class _Kept:
    """With a model: whether its steps are right (None: not tried), and the latest that were compiled, each with the
    updates that it is for; what they are made of, MLX makes constants of."""

    right: bool | None = None
    steps: list[tuple[list[Any], Callable[..., Any]]] = field(default_factory=list)
    parts: list[Any] = field(default_factory=list)


def forget(module: nn.Module) -> None:
    """Let go of the model's compiled steps, which hold arrays of adapters."""
    if KEPT in vars(module):
        vars(module)[KEPT] = _Kept(vars(module)[KEPT].right)


class OneToken:
    """`module`, to be called as it is with tokens and a cache; single tokens of an answer are computed compiled.

    It is for one answer: it sees the weights that the module has when it is made, and those updates of adapters that
    are at work with each token. At the end of its block the cache has all tokens.

    compile: what makes a function a compiled one. after: how many single tokens come first, if there is no step yet.
    """

    def __init__(self, module: nn.Module, compile: Compile = compiled, after: int = WORTH_TOKENS) -> None:
        self.module, self._compile = module, compile
        self._kept: _Kept = vars(module).setdefault(KEPT, _Kept())
        modules = module.modules()
        self._sites = list({id(m._site): m._site for m in modules if hasattr(m, "_site")}.values())
        steps_in = [function for m in modules for each in vars(m).get(HELD, {}).values() for function in each]
        parts = [*(array for _, array in tree_flatten(module.parameters())), *steps_in]
        if not _same(self._kept.parts, parts):
            self._kept.steps, self._kept.parts = [], parts
        self._before = 0 if self._kept.steps else after
        self._cache: Sequence[Any] = ()
        self._recent: list[mx.array] = []
        self._beside = 0

    def __call__(self, tokens: mx.array, cache: Sequence[Any]) -> mx.array:
        """(1, tokens, vocabulary) logits."""
        if tokens.shape == (1, 1) and self._before > 0:
            self._before -= 1
        elif tokens.shape == (1, 1) and self._suits(cache):
            with contextlib.suppress(_Unsuited):
                return self._one(tokens, cache)
            self._kept.right = False
            forget(self.module)
            self.finish()
            self._cache = ()
        self.finish()
        return self.module(tokens, cache=cache)

    def __enter__(self) -> "OneToken":
        return self

    def __exit__(self, *error: object) -> None:
        self.finish()

    @property
    def is_compiled(self) -> bool:
        """Whether there is a step with the updates that are at work now."""
        return self._compiled() is not None

    def finish(self) -> None:
        """Let the cache have what lies beside it."""
        count, self._beside = self._beside, 0
        for number, layer in enumerate(self._cache if count else ()):
            layer.update_and_fetch(*(beside[number : number + 1, :, :count] for beside in self._recent))

    def _suits(self, cache: Sequence[Any]) -> bool:
        if self._cache is cache:  # looked at before
            return cache[0].offset < MOST_TOKENS
        if self._kept.right is False or not all(type(each) is KVCache and each.keys is not None for each in cache):
            return False
        shapes = {(*layer.keys.shape[:2], layer.keys.shape[-1], layer.values.shape[-1]) for layer in cache}
        alike = len(shapes) == len({layer.keys.dtype for layer in cache}) == len({layer.offset for layer in cache}) == 1
        widths = cache[0].keys.shape[-1], cache[0].values.shape[-1]
        return alike and cache[0].offset < MOST_TOKENS and attention.is_right(cache[0].keys.dtype, widths)

    def _one(self, tokens: mx.array, cache: Sequence[Any]) -> mx.array:
        if self._cache is not cache or self._beside == RECENT:
            self.finish()
        if self._cache is not cache:
            first = cache[0].keys, cache[0].values
            shapes = [(len(cache), a.shape[1], RECENT, a.shape[3]) for a in first]
            self._recent, self._cache = [mx.zeros(shape, first[0].dtype) for shape in shapes], cache
        expected = None
        if self._kept.right is None:
            expected = self.module(tokens, cache=[copy.copy(layer) for layer in cache])
        arrays = [array for layer in cache for array in (layer.keys, layer.values)]
        logits, *following = self._step()(tokens, self._counts(cache[0].offset), *self._recent, *arrays)
        if expected is not None:
            self._kept.right = _near(logits, expected)
            if not self._kept.right:
                raise _Unsuited
        self._recent, self._beside = following, self._beside + 1
        return logits

    def _counts(self, cached: int) -> mx.array:
        """(COUNTS,): `cached`, how many lie beside, and more, by which the GPU makes it of numbers that come with the
        call: where the host writes an array of up to 8 bytes, MLX's CUDA build moves the page that it lies in."""
        step = self._beside - cached
        if step == 0:
            return mx.full((COUNTS,), cached, mx.int32)
        return mx.arange(cached, cached + COUNTS * step, step, mx.int32)

    def _step(self) -> Callable[..., Any]:
        step = self._compiled()
        if step is None:
            step = self._compile(partial(_traced, self.module))
            self._kept.steps.append(([site.update for site in self._sites], step))
            del self._kept.steps[:-MOST_STEPS]
        return step

    def _compiled(self) -> Callable[..., Any] | None:
        updates = [site.update for site in self._sites]
        return next((step for others, step in self._kept.steps if _same(others, updates)), None)


def _same(some: Sequence[Any], others: Sequence[Any]) -> bool:
    return len(some) == len(others) and all(one is other for one, other in zip(some, others, strict=True))


def serves() -> bool:
    """Whether compiling a step is worth its while on this device: with CUDA."""
    return on_cuda()


def _traced(
    module: nn.Module, tokens: mx.array, counts: mx.array, keys: mx.array, values: mx.array, *cached: mx.array
) -> list[mx.array]:
    """Logits, and what lies beside the cache after it: `keys` and `values` are what did before it."""
    pairs = zip(cached[::2], cached[1::2], strict=True)
    layers = [_Beside(number, pair, (keys, values), counts) for number, pair in enumerate(pairs)]
    with _attention_of(layers):
        try:
            logits = module(tokens, cache=layers)
        except (TypeError, ValueError, AttributeError, RuntimeError, IndexError) as error:
            raise _Unsuited from error
    new = [layer.new for layer in layers if layer.new is not None and layer.attended]
    if len(new) < len(layers):
        raise _Unsuited
    return [logits, *attention.following((keys, values), new, counts)]


@contextlib.contextmanager
def _attention_of(layers: Sequence[_Beside]) -> Iterator[None]:
    """Within the block, in this thread, MLX's attention to a layer's new keys and values is to all of them."""

    def to_all(original: Callable[..., mx.array], q: mx.array, k: mx.array, v: mx.array, **options: Any) -> mx.array:
        for layer in layers:
            if layer.new is not None and k is layer.new[0] and v is layer.new[1]:
                scale = options.pop("scale")
                if any(option is not None for option in options.values()):
                    raise _Unsuited  # a mask, sinks
                return layer.attend(q, scale)
        raise _Unsuited

    with function_call_as(mx.fast, "scaled_dot_product_attention", to_all):
        yield


def _near(logits: mx.array, expected: mx.array) -> bool:
    error = mx.abs(logits - expected).max() / mx.abs(expected).max()
    return bool((error <= MOST_ERROR).item())
