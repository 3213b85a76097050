"""What calibration text does to each layer: the second moments of its inputs, weighted by what they matter.

Rounding wants H = Σ x xᵀ over the inputs x of a layer. Not every input matters alike: a token whose output
hardly moves the model's predictions may be rounded badly. How much it matters is the gradient: let u be
a random vector whose covariance is the Fisher information of the predictions, diag(p) - p pᵀ (so that KL between
the two models is half of |u · change of the logits|² in the mean), and g = Jᵀ u its gradient at the layer's
output. Then Σ |g|² x xᵀ, the Fisher-weighted H, says what an error in the layer costs in KL (as in GuidedQuant,
arXiv 2505.07004). Few tokens carry most of that weight, so it is noisy; `mix` blends it with the plain one.

One forward pass puts the hidden state before each block on the disk; then blocks are visited from the last to
the first, so that memory holds the weights and the activations of one block, however many there are.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from mlx.utils import tree_unflatten

from mlx_adapters import paths, tensor_files
from mlx_adapters.door import SwitchLinear, mx, nn
from mlx_adapters.events import OnEvent, Progress, ignore
from mlx_adapters.fusion.blocks import Blocks, Call, TokenBatch, Variant
from mlx_adapters.machine import on_gpu

FISHER_SHARE = 0.7
OUTPUT_STRIDE = 2  # every second token is enough for the moments of the outputs
MOST_OUTPUTS = 16384  # a vocabulary's would not fit


def gram(rows: mx.array) -> mx.array:
    """rowsᵀ rows. On a CPU by NumPy, which computes half of it and mirrors that."""
    if on_gpu():
        return rows.T @ rows
    array = np.array(rows, copy=False)
    return mx.array(array.T @ array)


@dataclass
class Moments:
    """Sums over calibration tokens for one layer. Shapes (in, in); experts (experts, in, in)."""

    plain: mx.array | None = None
    fisher: mx.array | None = None
    outputs: mx.array | None = None  # (out, out): second moments of the gradients at the output
    tokens: int | np.ndarray = 0  # for experts: how many each one saw
    output_tokens: int = 0

    def add(self, plain: mx.array, fisher: mx.array, tokens: int | np.ndarray) -> None:
        """Add one batch's sums."""
        self.plain = plain if self.plain is None else self.plain + plain
        self.fisher = fisher if self.fisher is None else self.fisher + fisher
        self.tokens = self.tokens + tokens
        mx.eval(self.plain, self.fisher)

    def add_outputs(self, g: mx.array) -> None:
        """Add gradients (tokens, out) at the output."""
        product = gram(g)
        self.outputs = product if self.outputs is None else self.outputs + product
        self.output_tokens += g.shape[0]
        mx.eval(self.outputs)


def mix(plain: np.ndarray, fisher: np.ndarray, share: float = FISHER_SHARE) -> np.ndarray:
    """(1 - share) · plain + share · fisher, each divided by its trace; a zero matrix leaves it to the other."""
    traces = [float(np.trace(m)) for m in (plain, fisher)]
    parts = [w * m / t for w, m, t in zip((1 - share, share), (plain, fisher), traces, strict=True) if t > 0]
    return np.asarray(sum(parts)) if parts else np.zeros_like(plain)


class _Tap(nn.Module):
    """Wraps a layer: notes its inputs, and adds a probe to its output whose gradient is the output's."""

    def __init__(self, layer: nn.Module, path: str, tape: "_Tape") -> None:
        super().__init__()
        self.__dict__.update(_layer=layer, _path=path, _tape=tape)

    def __call__(self, x: mx.array, *arguments: Any, **keywords: Any) -> mx.array:
        layer = self.__dict__["_layer"]
        y = layer(x, *arguments, **keywords)
        if isinstance(layer, nn.Embedding):
            return y
        indices = arguments[0] if isinstance(layer, SwitchLinear) else None
        return self.__dict__["_tape"].note(self.__dict__["_path"], x, indices, y)

    def as_linear(self, x: mx.array) -> mx.array:
        y = self.__dict__["_layer"].as_linear(x)
        return self.__dict__["_tape"].note(self.__dict__["_path"], x, None, y)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_layer"], name)


@dataclass
class _Tape:
    """One run's notes, in the order of the calls. Without `probes` only the outputs' shapes are wanted."""

    probes: list[mx.array] | None = None
    notes: list[tuple[str, mx.array, mx.array | None]] = field(default_factory=list)
    shapes: list[tuple[int, ...]] = field(default_factory=list)

    def note(self, path: str, x: mx.array, indices: mx.array | None, y: mx.array) -> mx.array:
        self.notes.append((path, x, indices))
        self.shapes.append(y.shape)
        return y if self.probes is None else y + self.probes[len(self.notes) - 1]


def _tapped_vjp(
    run: Callable[[mx.array], mx.array], tape: _Tape, hidden: mx.array, cotangent: Callable[[mx.array], mx.array]
) -> tuple[mx.array, list[tuple[str, mx.array, mx.array | None, mx.array]]]:
    """(gradient at `hidden`, [(path, input, expert indices, gradient at the output)]) of `run`."""
    tape.probes, tape.notes, tape.shapes = None, [], []
    out = run(hidden)  # lazy: only for the shapes, and for what the cotangent needs of it
    sent = cotangent(out)
    probes = [mx.zeros(shape) for shape in tape.shapes]

    def probed(hidden: mx.array, *probes: mx.array) -> mx.array:
        tape.probes, tape.notes, tape.shapes = list(probes), [], []
        return run(hidden)

    if mx.issubdtype(hidden.dtype, mx.floating):
        _, gradients = mx.vjp(probed, [hidden, *probes], [sent])
    else:  # the whole model at once: its input is token ids
        _, gradients = mx.vjp(lambda *probes: probed(hidden, *probes), probes, [sent])
        gradients = [mx.zeros(1), *gradients]
    noted = [(*note, g) for note, g in zip(tape.notes, gradients[1:], strict=True)]
    return gradients[0], noted


def fisher_probe(logits: mx.array, key: mx.array) -> mx.array:
    """u (n, vocabulary) with zero mean and covariance diag(p) - p pᵀ for each row's p = softmax(logits)."""
    p = mx.softmax(logits, axis=-1)
    root = mx.sqrt(p) * (2 * mx.random.bernoulli(0.5, logits.shape, key=key).astype(mx.float32) - 1)
    return root - p * root.sum(axis=-1, keepdims=True)


def _add_linear(
    moments: Moments, x: mx.array, g: mx.array, real: mx.array | None, products: dict[int, mx.array]
) -> None:
    """`products` keeps x xᵀ sums by input, which q, k and v (or gate and up) share."""
    shared = id(x)
    x, g = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
    if real is not None:
        x, g = x[real], g[real]
    weighted = x * mx.sqrt(g.square().mean(axis=-1, keepdims=True))
    if shared not in products:
        products[shared] = gram(x)
    moments.add(products[shared], gram(weighted), x.shape[0])
    if g.shape[-1] <= MOST_OUTPUTS:
        moments.add_outputs(g[::OUTPUT_STRIDE])


def _add_experts(moments: Moments, x: mx.array, indices: mx.array, g: mx.array, experts: int) -> None:
    """Each expert's own moments. `x` (..., 1, in) broadcasts to `indices` (...), `g` is (..., 1, out)."""
    x = mx.broadcast_to(x, (*indices.shape, 1, x.shape[-1])).reshape(-1, x.shape[-1])
    weights = g.reshape(-1, g.shape[-1]).square().mean(axis=-1, keepdims=True)
    weighted = x * mx.sqrt(weights)
    # Padding reaches experts too; nothing depends on it, so its gradient is exactly zero.
    chosen = np.where(np.array(weights)[:, 0] > 0, np.array(indices).reshape(-1), experts)
    plain, fisher = [], []
    for expert in range(experts):
        rows = mx.array(np.flatnonzero(chosen == expert).astype(np.int32))
        a, b = x[rows], weighted[rows]
        plain.append(gram(a))
        fisher.append(gram(b))
    moments.add(mx.stack(plain), mx.stack(fisher), np.bincount(chosen, minlength=experts)[:experts])


class HiddenStates:
    """Lists of arrays on the disk, put in one after the other and taken out from the last to the first."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: list[Path] = []

    def put(self, arrays: list[mx.array]) -> None:
        """Write one list. Raises StorageError when the disk refuses."""
        self._files.append(self.folder / f"hidden-{len(self._files):04d}.safetensors")
        tensor_files.write_safetensors(self._files[-1], {f"{i:06d}": array for i, array in enumerate(arrays)})

    def take(self) -> list[mx.array]:
        """The list put in last, read into memory; its file is deleted."""
        path = self._files.pop()
        found = tensor_files.read_safetensors(path)
        arrays = [found[name] for name in sorted(found)]
        mx.eval(arrays)
        path.unlink()
        return arrays


class Collector:
    """Collects the moments of the layers at `paths`, block by block from the last to the first.

    `forward` and `backward` are two variants of the same model (each goes through its blocks once). `folder` holds
    the hidden states before every block meanwhile: 4 bytes x tokens x width for each.
    """

    def __init__(
        self, forward: Variant, backward: Variant, paths: set[str], batches: Sequence[TokenBatch], folder: Path
    ) -> None:
        self.forward, self.backward, self.paths, self.batches = forward, backward, paths, list(batches)
        blocks = len(forward.blocks)
        wanted = [i for i in range(blocks + 1) if paths & set(forward.layer_paths(i))]
        outside = paths & set(forward.layer_paths(blocks))
        self.first = 0 if outside else min(wanted, default=blocks)
        self._entries = HiddenStates(folder)
        self._calls: list[list[Call]] = []

    def run(self, on_event: OnEvent = ignore, seed: int = 0) -> "Stages":
        """Yield (paths, moments) of the head, then of each block from the last to the first."""
        return Stages(self, on_event, seed)

    def run_forward(self, on_event: OnEvent) -> list[mx.array]:
        """Put the hidden state before every wanted block on the disk; return those after the last one."""
        count, variant = len(self.forward.blocks), self.forward
        variant.prepare(count)
        entered = [variant.blocks.enter(batch.tokens) for batch in self.batches]
        hidden, self._calls = [h for h, _ in entered], [c for _, c in entered]
        paths.require_free_space(self._entries.folder, (count - self.first) * sum(h.nbytes for h in hidden))
        for index in range(count):
            if index >= self.first:
                self._entries.put(hidden)
            variant.prepare(index)
            after = []
            for h, calls in zip(hidden, self._calls, strict=True):
                out = variant.blocks.step(index, h, calls[index])
                mx.eval(out)
                after.append(out)
            hidden = after
            variant.release(index)
            on_event(Progress("calibrate: forward", index + 1, count, "block"))
        return hidden

    def tapped(self, index: int, tape: _Tape) -> list[tuple[str, nn.Module]]:
        """Put taps on the wanted layers of block `index`; returns what `update_modules` needs to undo it."""
        module = self.backward.source.module
        here = self.paths & set(self.backward.layer_paths(index))
        originals = {path: layer for path, layer in module.named_modules() if path in here}
        taps = [(path, _Tap(layer, path, tape)) for path, layer in originals.items()]
        module.update_modules(tree_unflatten(taps))
        return list(originals.items())

    def add(self, moments: dict[str, Moments], noted: list, real: mx.array | None) -> None:
        """Add one batch's notes."""
        products: dict[int, mx.array] = {}
        for path, x, indices, g in noted:
            found = moments.setdefault(path, Moments())
            if indices is not None:
                experts = self.backward.source.layers[path].weight.shape[0]
                _add_experts(found, x, indices, g, experts)
            else:
                _add_linear(found, x, g, real, products)


class Stages:
    """The iteration behind `Collector.run`: (layer paths, moments by path), the head first."""

    def __init__(self, collector: Collector, on_event: OnEvent, seed: int) -> None:
        self.collector, self.on_event, self.seed = collector, on_event, seed

    def __iter__(self) -> Any:
        c = self.collector
        hidden = c.run_forward(self.on_event)
        count = len(c.backward.blocks)
        c.backward.prepare(count)
        moments, cotangents = self._head(c.backward.blocks, hidden)
        del hidden
        held_back = moments  # a tied embedding also gets what reaches it from below
        for index in range(count - 1, c.first - 1, -1):
            c.backward.prepare(index)
            moments, cotangents = self._block(index, cotangents)
            yield index, moments
            c.backward.release(index)
        if c.paths & set(c.backward.layer_paths(count)):
            self._input_embedding(held_back, cotangents)
            yield count, held_back

    def _head(self, blocks: Blocks, hidden: list[mx.array]) -> tuple[dict[str, Moments], list[mx.array]]:
        c, cotangents = self.collector, []
        moments: dict[str, Moments] = {}
        tape = _Tape()
        originals = c.tapped(len(blocks), tape)
        keys = mx.random.split(mx.random.key(self.seed), max(len(hidden), 2))
        for batch, h, key in zip(c.batches, hidden, keys, strict=False):

            def run(h: mx.array, batch: TokenBatch = batch) -> mx.array:
                return blocks.finish(h, batch.judged)

            def probe(out: mx.array, key: mx.array = key) -> mx.array:
                return fisher_probe(out, key)

            gradient, noted = _tapped_vjp(run, tape, h, probe)
            c.add(moments, noted, None if len(blocks) else batch.real)
            mx.eval(gradient)
            cotangents.append(gradient)
        c.backward.source.module.update_modules(tree_unflatten(originals))
        return moments, cotangents

    def _block(self, index: int, cotangents: list[mx.array]) -> tuple[dict[str, Moments], list[mx.array]]:
        c, below = self.collector, []
        moments: dict[str, Moments] = {}
        tape = _Tape()
        originals = c.tapped(index, tape)
        entries = c._entries.take()
        for batch, h, calls, sent in zip(c.batches, entries, c._calls, cotangents, strict=True):

            def run(h: mx.array, call: Call = calls[index]) -> mx.array:
                return c.backward.blocks.step(index, h, call)

            def probe(_: mx.array, sent: mx.array = sent) -> mx.array:
                return sent

            gradient, noted = _tapped_vjp(run, tape, h, probe)
            if index > c.first or c.first == 0:
                mx.eval(gradient)
            c.add(moments, noted, batch.real)
            below.append(gradient)
        c.backward.source.module.update_modules(tree_unflatten(originals))
        return moments, below

    def _input_embedding(self, moments: dict[str, Moments], cotangents: list[mx.array]) -> None:
        """An embedding that is no output layer is judged by the gradients that reach the first block."""
        c = self.collector
        for path in c.paths & set(c.backward.layer_paths(len(c.backward.blocks))):
            if path not in moments and isinstance(c.backward.source.layers[path], nn.Embedding | nn.QuantizedEmbedding):
                moments[path] = Moments()
                for batch, g in zip(c.batches, cotangents, strict=True):
                    rows = g.reshape(-1, g.shape[-1])[batch.real]
                    product = gram(rows)
                    moments[path].add(product, product, rows.shape[0])
