"""The arithmetic of a training step: loss and gradient of a batch, the optimizer's update, evaluation.

The weights of the adapter are its own flat dictionary; the module only lends its structure. The two
functions (gradient, update) are compiled on a GPU, once for each shape of batch.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from mlx.utils import tree_flatten

from mlx_adapters.config.training import TrainConfig
from mlx_adapters.data.batches import Batch
from mlx_adapters.models.adapter import Weights
from mlx_adapters.models.layers import base_layer, named_layers
from mlx_adapters.optimization import log_probabilities, through_rounding
from mlx_adapters.optimization.adapted import apart_calls, kept_parts, saving_calls, unpacking_calls
from mlx_adapters.optimization.distributed import World
from mlx_adapters.optimization.feed import Draw, draw_of
from mlx_adapters.optimization.log_probabilities import Arrays, LossPlan, device_batch, token_log_probabilities
from mlx_adapters.optimization.objectives import Figures, Shares, loss_of, sums_of_lines
from mlx_adapters.optimization.optimizers import Optimizer, compiled, compiles
from mlx_adapters.optimization.through_rounding import Rounding
from mlx_adapters.storage.tensor_names import block_index
from mlx_adapters.surgery import calls
from mlx_adapters.surgery.blocks import evaluate_in_order, noting_outputs
from mlx_adapters.surgery.recomputation import Again, Part, computed_again, find_parts
from mlx_adapters.surgery.segments import begun_anew
from mlx_adapters.system.door import mx, nn
from mlx_adapters.system.limits import memory_near, out_of_memory


@dataclass(frozen=True)
class MemoryPlan:
    """How a step keeps to the memory there is; the update is the same, but for sums in another order.

    `again`: what the backward pass computes again, the feed-forward parts or whole blocks. `positions`: of a batch so
    many predictions are made at a time, but a row's at least. `near`: the bytes from which on a GPU is not ahead.
    """

    again: Again = "nothing"
    positions: int | None = None
    near: int | None = None


class OutOfMemoryError(Exception):
    """MLX found no room for an update. Nothing has changed by it."""


@dataclass(frozen=True)
class Taken:
    """What one update was like: its loss, the norms of the gradient before clipping and of the new weights (scalars),
    and the figures as (sum, number of values)."""

    loss: mx.array
    gradient_norm: mx.array
    weight_norm: mx.array
    figures: dict[str, list[float]]


@dataclass
class TrainStep:
    """A module with adapter layers, and what trains them.

    `weights` are float32, whatever type the module computes in; the step has them packed, as its optimizer says, and
    the module has none of its own any more (zeros that take no memory).
    `adapted` maps paths to the adapted layers; `rounding` is what fuse-aware training goes through. `heed`: called
    while a step is computed; it may raise to end it.
    """

    module: nn.Module
    adapted: dict[str, nn.Module]
    config: TrainConfig
    plan: LossPlan
    world: World = field(default_factory=World)
    rounding: Rounding | None = None
    memory: MemoryPlan = field(default_factory=MemoryPlan)
    parts: list[Part] = field(init=False)
    optimizer: Optimizer = field(init=False)
    heed: Callable[[], None] = field(default_factory=lambda: lambda: None, init=False)
    _outputs: list[Any] = field(default_factory=list, init=False)
    _frozen_are_rounded: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        own = dict(tree_flatten(self.module.trainable_parameters()))
        self._types = {name: weight.dtype for name, weight in own.items()}
        weights = {name: weight.astype(mx.float32) for name, weight in own.items()}
        self.optimizer = Optimizer(self.config, weights)
        self.weights = weights
        self._kept = self._packed_masks()
        layers = [layer for _, layer in named_layers(self.module)]
        self._calls = unpacking_calls(map(base_layer, layers)) + saving_calls(self.adapted.values())
        self._calls += apart_calls(self.module)
        if self.config.packing:
            self._calls += begun_anew(self.module)
        self.parts = find_parts(self.module, layers)
        self._gradient = {
            rounding: compiled(self._make_gradient(rounding, self.memory.again), [mx.random.state])
            for rounding in (False, True)
        }
        self._evaluate = {rounding: compiled(self._make_evaluate(rounding)) for rounding in (False, True)}
        self._gain = {rounding: compiled(self._make_gain(rounding)) for rounding in (False, True)}
        empty = {name: mx.broadcast_to(mx.zeros((), weight.dtype), weight.shape) for name, weight in own.items()}
        log_probabilities.set_weights(self.module, empty)  # it would hold what it began with beside what is trained

    @property
    def weights(self) -> Weights:
        """By name."""
        return self.optimizer.packing.unpack(self._packed)

    @weights.setter
    def weights(self, weights: Weights) -> None:
        self._packed = self.optimizer.packing.pack(weights)

    def _packed_masks(self) -> Weights:
        """Where weights are not trained, packed, of what holds any such."""
        packing = self.optimizer.packing
        kept = dict(pair for path, layer in self.adapted.items() for pair in kept_parts(path, layer))
        if not kept:
            return {}
        masks = {n: mx.broadcast_to(kept.get(n, mx.array(False)), shape) for n, shape in packing.shapes.items()}
        return {n: mask for n, mask in packing.pack(masks).items() if kept.keys() & {n, *packing.vectors.get(n, ())}}

    def gradient(self, batch: Batch, shares: Shares, rounding: bool = False) -> tuple[mx.array, Figures, Weights]:
        """(the batch's part of the update's loss, its figures, the loss's gradient by name)."""
        loss, figures, gradients = self._part(batch, shares, rounding)
        return loss, figures, self.optimizer.packing.unpack(gradients)

    def _part(self, batch: Batch, shares: Shares, rounding: bool) -> tuple[mx.array, Figures, Weights]:
        self._round_frozen_once(rounding)
        return self._gradient[rounding](self._packed, device_batch(batch), *vars(shares).values())

    def restore(self, weights: Weights, optimizer: Weights) -> None:
        """Take back saved arrays, in its own order: norms are summed in it, and a file has another.

        Raises KeyError if one is missing.
        """
        self.weights = {name: weights[name] for name in self.optimizer.packing.shapes}
        self.optimizer.restore(optimizer)

    def _update(self, gradients: Weights, rate: float) -> tuple[mx.array, mx.array]:
        """Change the weights; return the norms of the gradient before clipping and of the new weights."""
        before = self._packed
        gradients = gradients | {n: mx.where(kept, 0, gradients[n]) for n, kept in self._kept.items()}
        self._packed, gradient_norm, weight_norm = self.optimizer.apply(before, gradients, rate)
        self._packed |= {n: mx.where(kept, before[n], self._packed[n]) for n, kept in self._kept.items()}
        return gradient_norm, weight_norm

    def take(self, draw: Draw, rate: float, rounding: bool = False) -> Taken:
        """One update, evaluated.

        Over all processes; a lost one raises LostPeerError before anything has changed but the random state, and so
        does what `heed` raises, which on a CPU is called between the blocks' parts. Raises OutOfMemoryError.
        """
        key = calls.random_key()
        try:
            with memory_near(self.memory.near):
                return self._take(draw, rate, rounding)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            calls.set_random_key(key)
            mx.clear_cache()
            raise OutOfMemoryError(str(error)) from error

    def _take(self, draw: Draw, rate: float, rounding: bool) -> Taken:
        shares = self._shares(draw, rounding)
        loss, figures, gradients = self._part(draw.batches[0], shares, rounding)
        self._evaluate_in_order(gradients)
        for batch in draw.batches[1:]:
            mx.eval(loss, figures, gradients)
            more, others, from_batch = self._part(batch, shares, rounding)
            loss, figures, gradients = loss + more, _added(figures, others), _added(gradients, from_batch)
            self._evaluate_in_order(from_batch)
        summed = self.world.sum_all({"loss": loss} | {f"figure {n}": f for n, f in figures.items()} | gradients)
        norms = self._update({name: summed[name] for name in gradients}, rate)
        mx.eval(summed, norms, self._packed, self.optimizer.states, mx.random.state)
        return Taken(summed["loss"], *norms, self._figures(summed, figures, shares))

    def evaluate(self, draw: Draw, rounding: bool = False) -> tuple[float, dict[str, list[float]]]:
        """The loss without dropout, and the figures as (sum, number of values)."""
        self._round_frozen_once(rounding)
        shares = self._shares(draw, rounding)
        loss, figures = mx.array(0.0), Figures()
        for batch in draw.batches:
            with memory_near(self.memory.near):
                more, others = self._evaluate[rounding](self._packed, device_batch(batch), *vars(shares).values())
                self._evaluate_in_order({})
                loss, figures = loss + more, _added(figures, others)
                mx.eval(loss, figures)
        summed = self.world.sum_all({"loss": loss} | {f"figure {n}": f for n, f in figures.items()})
        return summed["loss"].item(), self._figures(summed, figures, shares)

    def gradient_of(self, probe: Batch, again: Again | None, in_float32: bool = True) -> Weights:
        """The gradient of the loss on `probe` alone, not compiled. Uses up no random number. `again` None: with all
        kept that mlx-lm's code makes; `in_float32`: see `recompute_between`."""
        key, shares = calls.random_key(), shares_of(draw_of(probe))
        gradient = self._make_gradient(False, again, in_float32)
        _, _, gradients = gradient(self._packed, device_batch(probe), *vars(shares).values())
        self._evaluate_in_order(gradients)
        mx.eval(gradients)
        calls.set_random_key(key)
        return self.optimizer.packing.unpack(gradients)

    def _make_gradient(self, rounding: bool, again: Again | None, in_float32: bool = True):
        def loss(weights: Weights, batch: Arrays, shares: Shares) -> tuple:
            return *self._loss(weights, batch, shares), calls.random_key()

        def gradient(packed: Weights, arrays: dict[str, mx.array], *shares: mx.array) -> tuple:
            self.module.train()
            weights = self.optimizer.packing.unpack(packed)
            with self._at_work(rounding, again, in_float32):  # the backward pass calls blocks again
                (value, figures, key), gradients = mx.value_and_grad(loss)(weights, Arrays(**arrays), Shares(*shares))
            calls.set_random_key(key)  # as the forward pass left it
            return value, figures, self.optimizer.packing.pack(gradients)

        return gradient

    def _make_evaluate(self, rounding: bool):
        def evaluate(packed: Weights, arrays: dict[str, mx.array], *shares: mx.array) -> tuple[mx.array, Figures]:
            self.module.eval()
            weights = self.optimizer.packing.unpack(packed)
            with self._at_work(rounding, None):
                return self._loss(weights, Arrays(**arrays), Shares(*shares))

        return evaluate

    def _make_gain(self, rounding: bool):
        def gain(packed: Weights, arrays: dict[str, mx.array]) -> mx.array:
            self.module.eval()
            weights = self.optimizer.packing.unpack(packed)
            with self._at_work(rounding, None):
                batch = Arrays(**arrays)
                with self._noting():
                    sums = answer_log_probabilities(self.module, self.plan, batch, self._typed(weights))
                before = mx.zeros_like(sums) if batch.reference is None else batch.reference
            return ((sums - before) * mx.abs(batch.labels)).sum()

        return gain

    def _shares(self, draw: Draw, rounding: bool) -> Shares:
        """What the update is divided by, and the mean gain of the answers aside on the reference."""
        shares = shares_of(draw)
        if not draw.aside:
            return shares
        gain = mx.array(0.0)
        for batch in draw.aside:
            gain = gain + self._gain[rounding](self._packed, device_batch(batch))
            self._evaluate_in_order({})
            mx.eval(gain)
        return replace(shares, kl=mx.maximum(self.world.sum(gain) * shares.examples, 0))

    def _figures(self, summed: Weights, names: Figures, shares: Shares) -> dict[str, list[float]]:
        figures = {name: np.array(summed[f"figure {name}"]).tolist() for name in names}
        return figures | ({"kl": [shares.kl.item(), 1.0]} if self.config.objective.rows == "labeled" else {})

    def _evaluate_in_order(self, gradients: Weights) -> None:
        """What the blocks gave, forwards, and their gradients, backwards; nothing where the step is compiled."""
        if compiles():
            return
        by_block: dict[int, list[mx.array]] = {}
        for name, gradient in gradients.items():
            number = block_index(name)
            by_block.setdefault(-1 if number is None else number, []).append(gradient)
        outputs, self._outputs = self._outputs, []
        evaluate_in_order(outputs + [by_block[number] for number in sorted(by_block, reverse=True)], self.heed)

    @contextlib.contextmanager
    def _noting(self) -> Iterator[None]:
        """Within the block what the blocks give is noted for `_evaluate_in_order`, but where the step is compiled."""
        if compiles():
            yield
            return
        with noting_outputs(self.module) as self._outputs:
            yield

    @contextlib.contextmanager
    def _at_work(self, rounding: bool, again: Again | None, in_float32: bool = True) -> Iterator[None]:
        """The module as the step calls it. Afterwards it has its own weights again, and no array of a trace."""
        own = dict(tree_flatten(self.module.trainable_parameters()))
        with contextlib.ExitStack() as stack:
            stack.callback(log_probabilities.set_weights, self.module, own)
            for layer, call in self._calls:
                stack.callback(calls.intercept(layer, call))
            if rounding and self.rounding is not None:
                stack.enter_context(through_rounding.rounded(self.adapted, self.rounding))
            if again is not None:
                stack.enter_context(computed_again(self.module.layers, self.parts, again, in_float32))
            yield

    def _round_frozen_once(self, rounding: bool) -> None:
        """From the first rounded step on, the layers without an adapter are rounded for good."""
        if rounding and self.rounding is not None and not self._frozen_are_rounded:
            through_rounding.round_frozen(self.module, self.adapted, self.rounding)
            self._frozen_are_rounded = True

    def _typed(self, weights: Weights) -> Weights:
        return {name: weight.astype(self._types[name]) for name, weight in weights.items()}

    def _loss(self, weights: Weights, batch: Arrays, shares: Shares) -> tuple[mx.array, Figures]:
        with self._noting():
            by_token = token_log_probabilities(self.module, self.plan, batch, self._typed(weights))
        return loss_of(self.config.objective, by_token, batch, shares)


def _added(one: Weights, other: Weights) -> Weights:
    return {name: one[name] + value if name in one else value for name, value in other.items()}


def shares_of(draw: Draw) -> Shares:
    """What the update's mean is made with; no KL."""
    numbers = (1 / draw.tokens, 1 / max(draw.examples, 1), 0.0)
    return Shares(*(mx.array(number, mx.float32) for number in numbers))


def answer_log_probabilities(module: nn.Module, plan: LossPlan, batch: Arrays, weights: Weights) -> mx.array:
    """(lines,) log p of each line's answer."""
    line = batch.positions // (batch.tokens.shape[1] - 1)
    return sums_of_lines(token_log_probabilities(module, plan, batch, weights), line, batch)[0]
