"""The arithmetic of a training step: loss and gradient of a batch, the optimizer's update, evaluation.

The weights of the adapter are its own flat dictionary; the module only lends its structure. The two
functions (gradient, update) are compiled on a GPU, once for each shape of batch.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from mlx.utils import tree_flatten

from mlx_adapters.config.training import TrainConfig
from mlx_adapters.data.batches import Batch
from mlx_adapters.models.adapter import Weights
from mlx_adapters.optimization import losses, through_rounding
from mlx_adapters.optimization.distributed import World
from mlx_adapters.optimization.losses import Arrays
from mlx_adapters.optimization.optimizers import Optimizer, compiled
from mlx_adapters.optimization.through_rounding import Rounding
from mlx_adapters.storage.tensor_names import block_index
from mlx_adapters.surgery import calls
from mlx_adapters.surgery.blocks import find_body
from mlx_adapters.surgery.caches import same_function
from mlx_adapters.system.door import make_prompt_cache, mx, nn

PROBED_TOKENS = 16
EQUAL = 1e-4  # relative; float32 sums in another order differ by less


@dataclass(frozen=True)
class LossPlan:
    """How the loss is computed: `body` None means the plain way; `chunk` is in logit rows."""

    body: nn.Module | None
    chunk: int


def device_batch(batch: Batch) -> Arrays:
    """The batch as MLX arrays."""
    segments = None if batch.segments is None else mx.array(batch.segments)
    tokens, positions, targets, weights = map(mx.array, (batch.tokens, batch.positions, batch.targets, batch.weights))
    return Arrays(tokens, positions, targets, weights, segments)


class Segments:
    """Stands in for a layer's cache and makes its attention block-diagonal: packed rows see only themselves.

    `segments`: (rows, length) int32, the number of the packed row that a token belongs to. Nothing is cached;
    rotary positions are relative, so a row may start anywhere.
    """

    offset = 0

    def __init__(self, segments: mx.array) -> None:
        same = segments[:, :, None] == segments[:, None, :]
        places = mx.arange(segments.shape[1])
        self._distance = places[:, None] - places[None, :]
        self._mask = same & (self._distance >= 0)

    def make_mask(self, length: int, return_array: bool = False, window_size: int | None = None) -> mx.array:
        """(rows, 1, length, length) bool, True where a token may look."""
        near = self._mask if window_size is None else self._mask & (self._distance < window_size)
        return near[:, None]

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Keys and values as they are: nothing came before."""
        return keys, values


def _segments(module: nn.Module, batch: Arrays) -> list[Segments] | None:
    """What tells each layer which tokens of a line belong together; None where a line is one row."""
    if batch.segments is None:
        return None
    return [Segments(batch.segments[:, :-1]) for _ in module.layers]


@dataclass
class TrainStep:
    """A module with adapter layers, and what trains them. `adapted` maps paths to the adapted layers; `rounding`
    is what fuse-aware training goes through."""

    module: nn.Module
    adapted: dict[str, nn.Module]
    config: TrainConfig
    plan: LossPlan
    world: World = field(default_factory=World)
    rounding: Rounding | None = None
    weights: Weights = field(init=False)
    optimizer: Optimizer = field(init=False)
    _frozen_are_rounded: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.weights = dict(tree_flatten(self.module.trainable_parameters()))
        self.optimizer = Optimizer(self.config, self.weights)
        self._gradient = {
            rounding: compiled(self._make_gradient(rounding, self.config.grad_checkpoint), [mx.random.state])
            for rounding in (False, True)
        }
        self._evaluate = {rounding: compiled(self._make_evaluate(rounding)) for rounding in (False, True)}

    def gradient(self, batch: Batch, share: float, rounding: bool = False) -> tuple[mx.array, Weights]:
        """(summed loss, gradient of share * summed loss). `share` is 1 / trained tokens of the update."""
        self._round_frozen_once(rounding)
        a = device_batch(batch)
        return self._gradient[rounding](
            self.weights, a.tokens, a.positions, a.targets, a.weights, a.segments, mx.array(share, mx.float32)
        )

    def restore(self, weights: Weights, optimizer: Weights) -> None:
        """Take back saved arrays, in its own order: norms are summed in it, and a file has another.

        Raises KeyError if one is missing.
        """
        self.weights = {name: weights[name] for name in self.weights}
        self.optimizer.restore(optimizer)

    def update(self, gradients: Weights, rate: float) -> tuple[mx.array, mx.array]:
        """Change the weights; return the norms of the gradient before clipping and of the new weights."""
        self.weights, gradient_norm, weight_norm = self.optimizer.apply(self.weights, gradients, rate)
        return gradient_norm, weight_norm

    def take(
        self, batches: Sequence[Batch], share: float, rate: float, rounding: bool = False
    ) -> tuple[mx.array, mx.array, mx.array]:
        """One update from several batches: (summed loss, gradient's norm, norm of the new weights), evaluated.

        Over all processes; a lost one raises LostPeerError before anything has changed but the random state.
        """
        loss, gradients = self.gradient(batches[0], share, rounding)
        for batch in batches[1:]:
            mx.eval(loss, gradients)
            more, others = self.gradient(batch, share, rounding)
            loss, gradients = loss + more, {name: g + others[name] for name, g in gradients.items()}
        gradients, (loss,) = self.world.sum_all(gradients, loss)
        norms = self.update(gradients, rate)
        mx.eval(loss, norms, self.weights, self.optimizer.arrays(), mx.random.state)
        return loss, *norms

    def evaluate(self, batches: Iterable[Batch], rounding: bool = False) -> float:
        """Mean loss per trained token, in nats, without dropout."""
        self._round_frozen_once(rounding)
        total, tokens = 0.0, 0
        for batch in batches:
            a = device_batch(batch)
            loss = self._evaluate[rounding](self.weights, a.tokens, a.positions, a.targets, a.weights, a.segments)
            total, tokens = total + loss.item(), tokens + batch.trained_tokens
        if self.world.size > 1:
            total, tokens = np.array(self.world.sum(mx.array([total, tokens], mx.float32))).tolist()
        return total / tokens

    def gradient_of(self, probe: Batch, recompute: bool) -> Weights:
        """The gradient of the summed loss on `probe`, not compiled. Uses up no random number."""
        a, key = device_batch(probe), calls.random_key()
        gradient = self._make_gradient(False, recompute)
        _, gradients = gradient(self.weights, a.tokens, a.positions, a.targets, a.weights, a.segments, mx.array(1.0))
        mx.eval(gradients)
        calls.set_random_key(key)
        return gradients

    def _make_gradient(self, rounding: bool, recompute: bool):
        def loss(weights: Weights, batch: Arrays, share: mx.array) -> tuple[mx.array, ...]:
            summed = self._loss(weights, batch)
            return summed * share, summed, calls.random_key()

        def gradient(
            weights: Weights,
            tokens: mx.array,
            positions: mx.array,
            targets: mx.array,
            counted: mx.array,
            segments: mx.array | None,
            share: mx.array,
        ) -> tuple:
            self.module.train()
            batch = Arrays(tokens, positions, targets, counted, segments)
            with self._at_work(rounding, recompute):  # the backward pass calls blocks again
                (_, summed, key), gradients = mx.value_and_grad(loss)(weights, batch, share)
            calls.set_random_key(key)  # as the forward pass left it
            return summed, gradients

        return gradient

    def _make_evaluate(self, rounding: bool):
        def evaluate(
            weights: Weights,
            tokens: mx.array,
            positions: mx.array,
            targets: mx.array,
            counted: mx.array,
            segments: mx.array | None,
        ) -> mx.array:
            self.module.eval()
            with self._at_work(rounding, False):
                return self._loss(weights, Arrays(tokens, positions, targets, counted, segments))

        return evaluate

    @contextlib.contextmanager
    def _at_work(self, rounding: bool, recompute: bool) -> Iterator[None]:
        """The module as the step calls it. Afterwards it has its own weights again, and no array of a trace."""
        own = dict(tree_flatten(self.module.trainable_parameters()))
        with contextlib.ExitStack() as stack:
            stack.callback(losses.put, self.module, own)
            if rounding and self.rounding is not None:
                stack.enter_context(through_rounding.rounded(self.adapted, self.rounding))
            for layer in self.module.layers if recompute else ():
                stack.enter_context(calls.recompute(layer))
            yield

    def _round_frozen_once(self, rounding: bool) -> None:
        """From the first rounded step on, the layers without an adapter are rounded for good."""
        if rounding and self.rounding is not None and not self._frozen_are_rounded:
            through_rounding.round_frozen(self.module, self.adapted, self.rounding)
            self._frozen_are_rounded = True

    def _loss(self, weights: Weights, batch: Arrays) -> mx.array:
        losses.put(self.module, weights)
        cache = _segments(self.module, batch)
        if self.plan.body is None:
            return losses.plain_loss(self.module, batch, cache)
        head = {name: w for name, w in weights.items() if block_index(name) is None}
        return losses.chunked_loss(self.module, self.plan.body, batch, head, self.plan.chunk, cache)


def chunk_rows(vocabulary: int) -> int:
    """How many logit rows a chunk holds: a multiple of 64, as the trained positions are on a GPU."""
    return max(64, losses.CHUNK_BYTES // (4 * vocabulary) // 64 * 64)


def plan_loss(module: nn.Module, config: TrainConfig, vocabulary: int, probe: Batch) -> LossPlan:
    """The chunked loss where it gives the plain one's value on `probe`, else the plain one."""
    chunk = chunk_rows(vocabulary)
    body = find_body(module) if config.chunked_loss != "off" else None
    if body is not None and _agrees(module, body, probe, chunk):
        return LossPlan(body, chunk)
    return LossPlan(None, chunk)


def _agrees(module: nn.Module, body: nn.Module, probe: Batch, chunk: int) -> bool:
    module.eval()
    batch = device_batch(probe)
    plain = losses.plain_loss(module, batch).item()
    try:
        chunked = losses.chunked_loss(module, body, batch, {}, chunk).item()
    except (ValueError, TypeError, IndexError, AttributeError):
        return False
    return abs(plain - chunked) <= EQUAL * max(abs(plain), 1.0)


def computes_as_generated(module: nn.Module, probe: Batch) -> bool:
    """Whether the logits of whole texts are those that come one after another, from a cache."""
    module.eval()
    tokens, cache = mx.array(probe.tokens[:1, :PROBED_TOKENS]), make_prompt_cache(module)
    try:
        parts = [module(tokens[:, :-1], cache=cache), module(tokens[:, -1:], cache=cache)]
    except Exception:  # whoever generates with it will be told
        return True
    return same_function(module(tokens), mx.concatenate(parts, axis=1))


def packing_is_exact(module: nn.Module, separate: Batch, packed: Batch) -> bool:
    """Whether rows that share a sequence get the losses that they get alone."""
    module.eval()
    alone = losses.plain_loss(module, device_batch(separate)).item()
    batch = device_batch(packed)
    try:
        cache = _segments(module, batch)
        together = losses.plain_loss(module, batch, cache).item()
    except (ValueError, TypeError, IndexError, AttributeError):
        return False
    return abs(alone - together) <= EQUAL * abs(alone)


def checkpointing_is_exact(train_step: TrainStep, probe: Batch) -> bool:
    """Whether blocks that are computed again give the gradient that kept ones give."""
    kept, again = (train_step.gradient_of(probe, recompute) for recompute in (False, True))
    return all(_near(again[name], gradient) for name, gradient in kept.items())


def _near(value: mx.array, expected: mx.array) -> bool:
    """Equal but for sums in another order, as a GPU makes some."""
    return bool((mx.linalg.norm(value - expected) <= 100 * EQUAL * mx.linalg.norm(expected)).item())
