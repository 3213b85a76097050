"""Taps in a model: what each layer is given, and the gradient at what it gives; and how far predictions are apart."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from mlx_adapters.errors import ModelError
from mlx_adapters.surgery.calls import intercept
from mlx_adapters.system.door import SwitchLinear, mx, nn
from mlx_adapters.system.limits import out_of_memory


@dataclass
class Tape:
    """One run's notes, in the order of the calls. Without `probes` only the outputs' shapes are wanted."""

    probes: list[mx.array] | None = None
    notes: list[tuple[str, mx.array, mx.array | None]] = field(default_factory=list)
    shapes: list[tuple[int, ...]] = field(default_factory=list)

    def note(self, path: str, x: mx.array, indices: mx.array | None, y: mx.array) -> mx.array:
        self.notes.append((path, x, indices))
        self.shapes.append(y.shape)
        return y if self.probes is None else y + self.probes[len(self.notes) - 1]


@contextmanager
def tapped(layers: Mapping[str, nn.Module], tape: Tape, lookups: bool = False) -> Iterator[None]:
    """Within the block, each layer's inputs are noted, and a probe is added to its output whose gradient is the
    output's. Of an embedding only its use as an output layer is noted; with `lookups` which rows it gave, too."""
    with ExitStack() as stack:
        for path, layer in layers.items():
            if lookups or not isinstance(layer, nn.Embedding):
                stack.callback(intercept(layer, _noting(path, layer, tape)))
            if hasattr(layer, "as_linear"):
                stack.callback(intercept(layer, _noting(path, layer, tape), "as_linear"))
        yield


def _noting(path: str, layer: nn.Module, tape: Tape) -> Callable[..., mx.array]:
    def call(original: Callable[..., mx.array], x: mx.array, *arguments: Any, **keywords: Any) -> mx.array:
        y = original(x, *arguments, **keywords)
        indices = None
        if isinstance(layer, SwitchLinear):
            indices = arguments[0] if arguments else keywords["indices"]
        return tape.note(path, x, indices, y)

    return call


def tapped_vjp(
    run: Callable[..., Sequence[mx.array]],
    tape: Tape,
    inputs: Sequence[mx.array],
    cotangents: Callable[[Sequence[mx.array]], Sequence[mx.array]],
) -> tuple[list[mx.array], list[tuple[str, mx.array, mx.array | None, mx.array]]]:
    """(gradients at `inputs`, [(path, input, expert indices, gradient at the output)]) of `run(*inputs)`, whose outputs
    get `cotangents` of them. Token ids as the only input have no gradient. Raises ModelError."""
    tape.probes, tape.notes, tape.shapes = None, [], []
    sent = list(cotangents(run(*inputs)))  # lazy: only for the shapes, and for what the cotangents need
    probes = [mx.broadcast_to(mx.zeros(()), shape) for shape in tape.shapes]  # (no memory)
    if not probes and not _floating(inputs[0]):
        return [], []

    def probed(*arrays: mx.array) -> Sequence[mx.array]:
        tape.probes, tape.notes, tape.shapes = list(arrays[len(inputs) :]), [], []
        given = run(*(each if _floating(each) else mx.stop_gradient(each) for each in arrays[: len(inputs)]))
        # (Of an array given twice MLX takes one cotangent.)
        return [each + 0 if _floating(each) else mx.stop_gradient(each) for each in given]

    try:
        _, gradients = mx.vjp(probed, [*inputs, *probes], sent)
    except (ValueError, RuntimeError) as error:  # such as a kernel for Metal that has no vjp
        if isinstance(error, RuntimeError) and out_of_memory(error):
            raise
        raise ModelError(f"mlx-lm's code for this model has no gradient on this device: {error}") from error
    noted = [(*note, g) for note, g in zip(tape.notes, gradients[len(inputs) :], strict=True)]
    return gradients[: len(inputs)], noted


def _floating(array: mx.array) -> bool:
    return mx.issubdtype(array.dtype, mx.floating)


def log_probabilities(logits: mx.array) -> mx.array:
    """float32 (…, vocabulary) of logits. -Inf is a token that is never said; NaN is somewhere in each row whose logits
    are NaN, Inf or nothing but -Inf."""
    logits = logits.astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def divergence(p: mx.array, q: mx.array) -> mx.array:
    """KL(p ‖ q) in nats (…) of log-probabilities (…, vocabulary). What p never says costs nothing; what q never says
    and p does, infinitely much."""
    share = mx.exp(p)
    return mx.where(share == 0, 0.0, share * (p - q)).sum(axis=-1)


def perplexity(loss: float) -> float:
    """e to a mean loss in nats; infinite where no float holds it."""
    return math.exp(loss) if loss < 709 else math.inf


def fisher_probe(logits: mx.array, key: mx.array) -> mx.array:
    """u (n, vocabulary) with zero mean and covariance diag(p) - p pᵀ for each row's p = softmax(logits)."""
    p = mx.softmax(logits, axis=-1)
    root = mx.sqrt(p) * (2 * mx.random.bernoulli(0.5, logits.shape, key=key).astype(mx.float32) - 1)
    return root - p * root.sum(axis=-1, keepdims=True)
