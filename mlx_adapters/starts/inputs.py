"""EVA (arXiv 2410.07170): A starts as the directions in which a layer's inputs vary most, B as zero.

The rows of training are read until the directions stand still. Ranks go where they explain most: all layers together
keep what they had, and one layer gets up to `SPREAD` times its own.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_adapters.models.layers import nn
from mlx_adapters.starts.directions import Array, Directions, shared_out
from mlx_adapters.storage.tensor_names import LORA_A, LORA_B
from mlx_adapters.surgery.calls import intercept
from mlx_adapters.system.door import DoRALinear, LoRALinear

SPREAD = 2  # ρ of the paper
STILL = 0.99  # cosine of a direction before and after a batch, from which on it stands still
TOKENS, SPARE = 512, 16  # of a batch that are looked at; directions that are kept beside those that may be used


@dataclass
class _Watch:
    """What each layer's inputs vary in. Layers with one input in common (q, k and v) have one entry: `owners`."""

    most: Mapping[str, int]
    seen: dict[str, Directions] = field(default_factory=dict)
    owners: dict[str, str] = field(default_factory=dict)
    unknown: set[str] = field(default_factory=set)
    chosen: mx.array | None = None  # of the batch's positions
    positions: int = 0
    _last: tuple[Any, str] | None = None

    def note(self, path: str) -> Callable[..., mx.array]:
        def call(original: Callable[..., mx.array], x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
            self._take(path, x)
            return original(x, *args, **kwargs)

        return call

    def _take(self, path: str, x: mx.array) -> None:
        if x.size != self.positions * x.shape[-1]:
            self.unknown.add(path)
        elif self._last is not None and self._last[0] is x:
            self.owners[path] = self._last[1]
        else:
            self._last = x, path
            self.owners[path] = path
            room = SPARE + max(self.most.values())
            rows = x.reshape(-1, x.shape[-1])[self.chosen].astype(mx.float32)
            self.seen.setdefault(path, Directions(room)).add(np.array(rows, np.float64))

    def explained(self) -> dict[str, Array]:
        return {path: self.seen[owner].explained for path, owner in self.owners.items() if path not in self.unknown}


def start_from_inputs(
    adapted: Mapping[str, nn.Module],
    run: Callable[[mx.array], mx.array],
    batches: Iterable[tuple[np.ndarray, np.ndarray]],
    ranks: Mapping[str, int],
    seed: int,
) -> dict[str, int]:
    """Let the linear layers among `adapted` start so, and give the ranks that they get.

    run: the model, from tokens (rows, width) on. batches: (tokens (rows, width), the positions in the flat grid of them
    at which a trained token is foretold). Layers that are no linear ones, or that the model does not call once for all
    tokens, start as they were, with their own ranks.
    """
    linear = {path: layer for path, layer in adapted.items() if isinstance(layer, LoRALinear | DoRALinear)}
    watch, random = _Watch({path: SPREAD * ranks[path] for path in linear}), np.random.default_rng(seed)
    shares: dict[str, int] = {}
    with ExitStack() as stack:
        for path, layer in linear.items():
            stack.callback(intercept(layer, watch.note(path)))
        for tokens, positions in batches:
            before = {path: directions.vectors for path, directions in watch.seen.items()}
            some = np.sort(random.permutation(positions)[:TOKENS])
            watch.chosen, watch.positions, watch._last = mx.array(some), tokens.size, None
            mx.eval(run(mx.array(tokens)))
            explained = watch.explained()
            budget = sum(ranks[path] for path in explained)
            shares = shared_out(explained, budget, dict(watch.most))
            if all(_still(before.get(watch.owners[p]), watch.seen[watch.owners[p]], n) for p, n in shares.items()):
                break
    for path, rank in shares.items():
        _put(linear[path], watch.seen[watch.owners[path]].vectors[:rank])
    return {**ranks, **shares}


def _still(before: Array | None, now: Directions, rank: int) -> bool:
    if before is None or len(before) < rank or len(now.scaled) < rank:
        return False
    return bool((np.abs((before[:rank] * now.vectors[:rank]).sum(axis=1)) >= STILL).all())


def _put(layer: nn.Module, directions: Array) -> None:
    room = layer[LORA_A].shape[1]
    a = np.pad(directions.T, [(0, 0), (0, room - len(directions))])  # (in, rank)
    layer[LORA_A] = mx.array(a.astype(np.float32)).astype(layer[LORA_A].dtype)
    layer[LORA_B] = mx.zeros_like(layer[LORA_B])
