"""Log-probabilities of the trained tokens, without ever holding all the logits: what every loss is made of.

The plain way computes (lines, length, vocabulary) logits and throws most of them away: padding and masked
prompts count nothing. Here the hidden states of the trained positions are gathered before the output head,
and the head works on a chunk of them at a time, computing values and gradients of the chunk in one go (the idea
of Liger Kernel, arXiv 2410.10989, and Cut Cross-Entropy, arXiv 2411.09009). Memory for logits is then
chunk * vocabulary instead of lines * length * vocabulary. A token's log-probability depends on its own hidden state
alone, so whatever a loss makes of it later, its gradient is the one made here times a factor.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mlx_adapters.config.training import TrainConfig
from mlx_adapters.data.batches import Batch
from mlx_adapters.models.adapter import Weights
from mlx_adapters.storage.tensor_names import block_index
from mlx_adapters.surgery import calls
from mlx_adapters.surgery.blocks import find_body
from mlx_adapters.surgery.segments import segmented_caches
from mlx_adapters.system.door import mx, nn

# Logits of one chunk. MLX runs about ten operations ahead, so several chunks' worth of memory is in use.
CHUNK_BYTES = 16 << 20
EQUAL = 1e-4  # relative; float32 sums in another order differ by less


@dataclass(frozen=True)
class Arrays:
    """A batch on the device (see `batches.Batch`)."""

    tokens: mx.array
    positions: mx.array
    targets: mx.array
    weights: mx.array
    segments: mx.array | None = None
    answers: mx.array | None = None
    labels: mx.array | None = None
    reference: mx.array | None = None


@dataclass(frozen=True)
class LossPlan:
    """How the loss is computed: `body` None means the plain way; `chunk` is in logit rows."""

    body: nn.Module | None
    chunk: int


def device_batch(batch: Batch) -> dict[str, mx.array]:
    """The batch as MLX arrays, by the names in `Arrays`; what it has not is left out."""
    given = {name: getattr(batch, name) for name in Arrays.__dataclass_fields__}
    return {name: mx.array(array) for name, array in given.items() if array is not None}


def picked(logits: mx.array, targets: mx.array) -> mx.array:
    """log p of each target, in nats. logits (n, vocabulary), targets (n,); the result is float32 (n,)."""
    return _picked(logits, targets)[0]


@mx.custom_function
def _picked(logits: mx.array, targets: mx.array) -> tuple[mx.array, mx.array]:
    """(log p, softmax). One pass of exponentials serves both value and gradient: with p the softmax and j the
    likeliest token, log Σ exp z = z_j - log p_j, and p_j is at least 1 / vocabulary."""
    logits = logits.astype(mx.float32)
    softmax = mx.softmax(logits, axis=-1)
    total = logits.max(axis=-1) - mx.log(softmax.max(axis=-1))
    return mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0] - total, softmax


@_picked.vjp
def _picked_gradient(primals: tuple, cotangents: tuple, outputs: tuple) -> tuple:
    logits, targets = primals
    index, softmax = targets[:, None], outputs[1]
    own = mx.take_along_axis(softmax, index, axis=-1)
    gradient = mx.put_along_axis(softmax, index, own - 1, axis=-1) * -cotangents[0][:, None]
    return gradient.astype(logits.dtype), mx.zeros_like(targets)


def plain(module: nn.Module, batch: Arrays, cache: Any = None) -> mx.array:
    """(n,) log p of the trained tokens, through all logits: what every other way here must equal."""
    logits = module(batch.tokens[:, :-1], cache=cache)
    return picked(logits.reshape(-1, logits.shape[-1])[batch.positions], batch.targets)


def chunked(
    module: nn.Module, body: nn.Module, batch: Arrays, head: Weights, chunk: int, cache: Any = None
) -> mx.array:
    """The same as `plain`, `chunk` logit rows at a time.

    `head` holds the trainable weights outside the blocks (an adapted lm_head or embedding), often none.
    """
    hidden = trained_states(module, body, batch, cache)

    def piece(head: Weights, hidden: mx.array, targets: mx.array) -> mx.array:
        set_weights(module, head)
        return picked(calls.head_logits(module, body, hidden), targets)

    return _chunked(piece, chunk)(head, hidden, batch.targets)


def trained_states(module: nn.Module, body: nn.Module, batch: Arrays, cache: Any = None) -> mx.array:
    """(n, hidden) states of the trained positions, as the head gets them."""
    hidden = calls.hidden_states(module, body, batch.tokens[:, :-1], cache)
    return hidden.reshape(-1, hidden.shape[-1])[batch.positions]


def _chunked(piece: Callable[..., mx.array], chunk: int) -> Callable[..., mx.array]:
    """`piece(head, hidden, targets)` by chunks; the gradient for `hidden` is made in the forward pass.

    That for `head` sums over tokens, each times its factor, so it takes the chunks' logits once more.
    """

    def parts(count: int) -> list[slice]:
        return [slice(start, start + chunk) for start in range(0, count, chunk)]

    @mx.custom_function
    def whole(head: Weights, hidden: mx.array, targets: mx.array) -> tuple[mx.array, mx.array]:
        values: list[mx.array] = []
        gradients: list[mx.array] = []
        for part in parts(hidden.shape[0]):
            states = mx.depends(hidden[part], gradients[-1:])  # one chunk's logits at a time

            def value(states: mx.array, part: slice = part) -> mx.array:
                return piece(head, states, targets[part])

            (of_part,), (gradient,) = mx.vjp(value, [states], [mx.ones(states.shape[0])])
            values.append(of_part)
            gradients.append(gradient)
        return mx.concatenate(values), mx.concatenate(gradients)

    @whole.vjp
    def backward(primals: tuple, cotangents: tuple, outputs: tuple) -> tuple:
        head, hidden, targets = primals
        factors, gradients = cotangents[0], outputs[1]
        from_head = {name: mx.zeros_like(weight) for name, weight in head.items()}
        for part in parts(hidden.shape[0]) if head else ():
            states = mx.depends(hidden[part], list(from_head.values()))

            def value(head: Weights, states: mx.array = states, part: slice = part) -> mx.array:
                return (piece(head, states, targets[part]) * factors[part]).sum()

            more = mx.grad(value)(head)
            from_head = {name: total + more[name] for name, total in from_head.items()}
        return from_head, (factors[:, None] * gradients).astype(gradients.dtype), mx.zeros_like(targets)

    return lambda *args: whole(*args)[0]


def set_weights(module: nn.Module, weights: Weights) -> None:
    """Set the named parameters of the module."""
    if weights:
        module.load_weights(list(weights.items()), strict=False)


def token_log_probabilities(module: nn.Module, plan: LossPlan, batch: Arrays, weights: Weights) -> mx.array:
    """(n,) log p of the batch's trained tokens, with these trainable weights, as `plan` says."""
    set_weights(module, weights)
    cache = None if batch.segments is None else segmented_caches(module, batch.segments[:, :-1])
    if plan.body is None:
        return plain(module, batch, cache)
    head = {name: w for name, w in weights.items() if block_index(name) is None}
    return chunked(module, plan.body, batch, head, plan.chunk, cache)


def chunk_rows(vocabulary: int) -> int:
    """How many logit rows a chunk holds: a multiple of 64, as the trained positions are on a GPU."""
    return max(64, CHUNK_BYTES // (4 * vocabulary) // 64 * 64)


def plan_loss(module: nn.Module, config: TrainConfig, vocabulary: int, probe: Batch) -> LossPlan:
    """The chunked loss where the model's logits are what its head gives for the hidden states, else the plain one."""
    body = find_body(module) if config.chunked_loss != "off" else None
    if body is not None and not _is_split_by(module, body, probe):
        body = None
    return LossPlan(body, chunk_rows(vocabulary))


def _is_split_by(module: nn.Module, body: nn.Module, probe: Batch) -> bool:
    """Asked of logits: in 16 bits a likely token's log p of nearly 0 is off by more than itself."""
    module.eval()
    batch = Arrays(**device_batch(probe))
    logits = module(batch.tokens[:, :-1])
    logits = logits.reshape(-1, logits.shape[-1])[batch.positions]
    try:
        split = calls.head_logits(module, body, trained_states(module, body, batch))
    except (ValueError, TypeError, IndexError, AttributeError):
        return False
    if split.shape != logits.shape:
        return False
    rounding = EQUAL if logits.dtype == mx.float32 else 100 * EQUAL
    said = mx.isfinite(logits)  # there are tokens that a model never says
    split, logits = (mx.where(said, x, 0).astype(mx.float32) for x in (split, logits))
    return bool((mx.linalg.norm(split - logits) <= rounding * mx.linalg.norm(logits)).item())


def logits_bytes(batch: Batch, vocabulary: int, config: TrainConfig) -> int:
    """Logits, softmax and gradient, float32, of a chunk or (plain) of every position."""
    every = batch.tokens.shape[0] * (batch.tokens.shape[1] - 1)
    chunk = min(len(batch.positions), chunk_rows(vocabulary))
    return 3 * 4 * vocabulary * (every if config.chunked_loss == "off" else chunk)
