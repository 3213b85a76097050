"""Cross entropy over the trained tokens only, without ever holding all the logits.

The plain loss computes (rows, length, vocabulary) logits and throws most of them away: padding and masked
prompts count nothing. Here the hidden states of the trained positions are gathered before the output head,
and the head works on a chunk of them at a time, computing loss and gradient of the chunk in one go (the idea
of Liger Kernel, arXiv 2410.10989, and Cut Cross-Entropy, arXiv 2411.09009). Memory for logits is then
chunk * vocabulary instead of rows * length * vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mlx_adapters.models.adapter import Weights
from mlx_adapters.surgery import calls
from mlx_adapters.system.door import mx, nn

# Logits of one chunk. MLX runs about ten operations ahead, so several chunks' worth of memory is in use.
CHUNK_BYTES = 16 << 20


def cross_entropy(logits: mx.array, targets: mx.array, weights: mx.array) -> mx.array:
    """Weighted sum of the cross entropies in nats. logits (n, vocabulary), targets (n,), weights (n,)."""
    return _cross_entropy(logits, targets, weights)[0]


@mx.custom_function
def _cross_entropy(logits: mx.array, targets: mx.array, weights: mx.array) -> tuple[mx.array, mx.array]:
    """(loss, softmax). One pass of exponentials serves both loss and gradient: with p the softmax and j the
    likeliest token, log Σ exp z = z_j - log p_j, and p_j is at least 1 / vocabulary."""
    logits = logits.astype(mx.float32)
    softmax = mx.softmax(logits, axis=-1)
    total = logits.max(axis=-1) - mx.log(softmax.max(axis=-1))
    picked = mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    return ((total - picked) * weights).sum(), softmax


@_cross_entropy.vjp
def _cross_entropy_gradient(primals: tuple, cotangents: tuple, outputs: tuple) -> tuple:
    logits, targets, weights = primals
    index, softmax = targets[:, None], outputs[1]
    picked = mx.take_along_axis(softmax, index, axis=-1)
    gradient = mx.put_along_axis(softmax, index, picked - 1, axis=-1) * (cotangents[0] * weights)[:, None]
    return gradient.astype(logits.dtype), mx.zeros_like(targets), mx.zeros_like(weights)


def plain_loss(module: nn.Module, batch: "Arrays", cache: Any = None) -> mx.array:
    """The sum over the trained tokens, through all logits: what every other loss here must equal."""
    logits = module(batch.tokens[:, :-1], cache=cache)
    return cross_entropy(logits.reshape(-1, logits.shape[-1])[batch.positions], batch.targets, batch.weights)


@dataclass(frozen=True)
class Arrays:
    """A batch on the device (see `batches.Batch`)."""

    tokens: mx.array
    positions: mx.array
    targets: mx.array
    weights: mx.array
    segments: mx.array | None = None


def chunked_loss(
    module: nn.Module, body: nn.Module, batch: Arrays, head: Weights, chunk: int, cache: Any = None
) -> mx.array:
    """The same sum as `plain_loss`, `chunk` logit rows at a time.

    `head` holds the trainable weights outside the blocks (an adapted lm_head or embedding), often none.
    """
    hidden = calls.hidden_states(module, body, batch.tokens[:, :-1], cache)
    hidden = hidden.reshape(-1, hidden.shape[-1])[batch.positions]

    def piece(head: Weights, hidden: mx.array, targets: mx.array, weights: mx.array) -> mx.array:
        put(module, head)
        return cross_entropy(calls.head_logits(module, body, hidden), targets, weights)

    return _chunked(piece, chunk)(head, hidden, batch.targets, batch.weights)


def _chunked(piece: Callable[..., mx.array], chunk: int) -> Callable[..., mx.array]:
    """Sum `piece(head, hidden, targets, weights)` over chunks; its gradient is made in the forward pass."""

    def forward(head: Weights, hidden: mx.array, targets: mx.array, weights: mx.array) -> tuple:
        total, grads, head_grads = mx.array(0.0), [], None
        for start in range(0, hidden.shape[0], chunk):
            part = slice(start, start + chunk)
            states = mx.depends(hidden[part], [total])  # one chunk's logits at a time
            value, (from_head, from_hidden) = mx.value_and_grad(piece, argnums=(0, 1))(
                head, states, targets[part], weights[part]
            )
            # The gradient must be made before the next chunk starts, or its logits stay alive.
            total = mx.depends(total + value, [from_hidden, *from_head.values()])
            grads.append(from_hidden)
            head_grads = from_head if head_grads is None else {k: head_grads[k] + from_head[k] for k in from_head}
        return total, mx.concatenate(grads), head_grads or {}

    @mx.custom_function
    def summed(head: Weights, hidden: mx.array, targets: mx.array, weights: mx.array) -> tuple:
        return forward(head, hidden, targets, weights)

    @summed.vjp
    def backward(primals: tuple, cotangents: tuple, outputs: tuple) -> tuple:
        _, _, targets, weights = primals
        scale = cotangents[0]
        _, grads, head_grads = outputs
        scaled = {name: (scale * grad).astype(grad.dtype) for name, grad in head_grads.items()}
        return scaled, (scale * grads).astype(grads.dtype), mx.zeros_like(targets), mx.zeros_like(weights)

    return lambda *args: summed(*args)[0]


def put(module: nn.Module, weights: Weights) -> None:
    """Set the named parameters of the module."""
    if weights:
        module.load_weights(list(weights.items()), strict=False)
