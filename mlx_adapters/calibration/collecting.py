"""What calibration text does to each layer: the second moments of its inputs, weighted by what they matter.

Rounding wants H = Σ x xᵀ over the inputs x of a layer. Not every input matters alike: a token whose output
hardly moves the model's predictions may be rounded badly. How much it matters is the gradient: let u be
a random vector whose covariance is the Fisher information of the predictions, diag(p) - p pᵀ (so that KL between
the two models is half of |u · change of the logits|² in the mean), and g = Jᵀ u its gradient at the layer's
output. Then Σ |g|² x xᵀ, the Fisher-weighted H, says what an error in the layer costs in KL (as in GuidedQuant,
arXiv 2505.07004). Few tokens carry most of that weight, so it is noisy: of |g|² a power counts (`FISHER_POWER`), and
`mix` blends it with the plain one.

One forward pass puts the state before each block on the disk; then blocks are visited from the last to
the first, so that memory holds the weights and the activations of one block, however many there are.
"""

import itertools
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from mlx_adapters.calibration.blockwise import BlockwiseModel
from mlx_adapters.calibration.moments import ExpertMoments, Moments, Seen, add_calls, fits, moments_for
from mlx_adapters.data.batches import TokenBatch
from mlx_adapters.events import OnEvent, Progress, log_warnings
from mlx_adapters.models.dense import weight_shape
from mlx_adapters.models.layers import ADAPTABLE
from mlx_adapters.storage import paths, tensor_files
from mlx_adapters.surgery.blocks import Blocks, Call
from mlx_adapters.surgery.taps import Tape, fisher_probe, tapped, tapped_vjp
from mlx_adapters.system.door import mx

FORWARD = "calibrate: forward"


class States:
    """Lists of states on the disk, put in one after the other and taken out from the last to the first; the next one to
    be taken is read beside other work."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: list[Path] = []
        self._reader, self._ahead = ThreadPoolExecutor(1), deque[Future[list[list[mx.array]]]]()

    def put(self, states: list[list[mx.array]]) -> None:
        """Write one list. Raises StorageError when the disk refuses."""
        self._files.append(self.folder / f"hidden-{len(self._files):04d}.safetensors")
        arrays = {f"{i:06d}.{n:03d}": array for i, state in enumerate(states) for n, array in enumerate(state)}
        tensor_files.write_safetensors(self._files[-1], arrays)

    def take(self) -> list[list[mx.array]]:
        """The list put in last, read into memory; its file is deleted."""
        while self._files and len(self._ahead) < 2:
            self._ahead.append(self._reader.submit(self._read, self._files.pop()))
        return self._ahead.popleft().result()

    @staticmethod
    def _read(path: Path) -> list[list[mx.array]]:
        arrays = tensor_files.read_safetensors(path)
        batches = itertools.groupby(sorted(arrays), key=lambda name: name.split(".")[0])
        states = [[arrays[name] for name in names] for _, names in batches]
        mx.eval(states)
        path.unlink()
        return states


class Collector:
    """Collects the moments of the layers at `paths`, block by block from the last to the first.

    `forward` and `backward` are the same model twice (each goes through its blocks once). `folder` holds
    the states before every block meanwhile: 4 bytes x tokens x width for each, and what blocks share.
    """

    def __init__(
        self,
        forward: BlockwiseModel,
        backward: BlockwiseModel,
        paths: set[str],
        batches: Sequence[TokenBatch],
        folder: Path,
    ) -> None:
        self.forward, self.backward, self.batches = forward, backward, list(batches)
        backward.source.module.train()  # some of mlx-lm's kernels for Metal have no gradient, and are left out so
        layers, blocks = backward.source.layers, len(forward.blocks)
        self.paths = paths = {path for path in paths if isinstance(layers[path], ADAPTABLE)}
        wanted = [i for i in range(blocks + 1) if paths & set(forward.layer_paths(i))]
        self.outside = paths & set(forward.layer_paths(blocks))
        self.first = 0 if self.outside else min(wanted, default=blocks)
        self.unknown: set[str] = set()
        self._entries = States(folder)
        self._calls: list[list[Call]] = []  # of each batch
        self._sent: list[list[mx.array]] = []  # gradients at what the blocks were given beside the state

    def run(self, on_event: OnEvent = log_warnings, seed: int = 0) -> "Stages":
        """Yield (paths, moments) of the head, then of each block from the last to the first."""
        return Stages(self, on_event, seed)

    def run_forward(self, on_event: OnEvent) -> list[list[mx.array]]:
        """Put the states before every wanted block on the disk; return those after the last one."""
        count, model = len(self.forward.blocks), self.forward
        model.prepare(count)
        entered = [model.blocks.enter(batch.tokens) for batch in self.batches]
        states, self._calls = [state for state, _ in entered], [calls for _, calls in entered]
        self._sent = [[] for _ in entered]
        mx.eval([call.given for calls in self._calls for call in calls])
        paths.require_free_space(self._entries.folder, self._states_bytes(states[0]))
        with ThreadPoolExecutor(1) as writer:  # the disk works beside the device
            written: Future[None] | None = None
            for index in range(count):
                if index >= self.first:
                    mx.eval(states)  # (the other thread cannot)
                    if written is not None:
                        written.result()
                    written = writer.submit(self._entries.put, states)
                model.prepare(index)
                after = []
                for state, calls in zip(states, self._calls, strict=True):
                    out = model.blocks.step(index, state, calls[index])
                    mx.eval(out)
                    after.append(out)
                states = after
                model.release(index)
                on_event(Progress(FORWARD, index + 1, count, "block"))
            if written is not None:
                written.result()
        model.release(count)
        return states

    def _states_bytes(self, state: list[mx.array]) -> int:
        """What the states before the wanted blocks take, of all batches as of the first: the shapes of what its blocks
        give to `state` tell, and nothing is computed."""
        numbers, tokens = 0, [batch.tokens.size for batch in self.batches]
        for index, call in enumerate(self._calls[0]):
            numbers += sum(array.size for array in state) if index >= self.first else 0
            state = self.forward.blocks.step(index, state, call)
        return 4 * numbers * sum(tokens) // tokens[0]

    def tapped(self, index: int, tape: Tape) -> AbstractContextManager[None]:
        """Within the block, `tape` notes the calls of the wanted layers of block `index`."""
        here = self.paths & set(self.backward.layer_paths(index))
        module = self.backward.source.module
        layers = {path: layer for path, layer in module.named_modules() if path in here}
        return tapped(layers, tape, lookups=not self.backward.blocks)  # (by blocks `_entrance` sees them)

    def add(
        self, moments: dict[str, Moments | ExpertMoments], noted: list, batch: TokenBatch, real: mx.array | None
    ) -> None:
        """Add one batch's notes; `real`: see `add_calls`. Layers whose calls tell nothing become `unknown`."""
        calls: dict[str, list[Seen]] = {}
        for path, x, indices, g in noted:
            calls.setdefault(path, []).append(Seen(x, indices, g))
        products: dict[int, mx.array] = {}
        for path, seen in calls.items():
            shape = weight_shape(self.backward.source.layers[path])
            if not all(fits(one, shape) for one in seen):
                self.unknown.add(path)
            if path not in self.unknown:
                add_calls(moments.setdefault(path, moments_for(shape)), seen, shape, batch.tokens.shape, real, products)


class Stages:
    """The iteration behind `Collector.run`: (layer paths, moments by path), the head first."""

    def __init__(self, collector: Collector, on_event: OnEvent, seed: int) -> None:
        self.collector, self.on_event, self.seed = collector, on_event, seed

    def __iter__(self) -> Any:
        c = self.collector
        states = c.run_forward(self.on_event)
        count = len(c.backward.blocks)
        c.backward.prepare(count)
        moments, cotangents = self._head(c.backward.blocks, states)
        del states
        c.backward.prepare(count)  # (embedding and head are large, and done)
        held_back = moments  # until what lies before the blocks is known, too
        for index in range(count - 1, c.first - 1, -1):
            c.backward.prepare(index)
            moments, cotangents = self._block(index, cotangents)
            moments = self._known(moments)  # (whoever takes them is the last to hold them)
            yield index, moments
            c.backward.release(index)
        if c.outside:
            self._entrance(held_back, cotangents)
            yield count, self._known(_felt(held_back))

    def _known(self, moments: dict[str, Moments | ExpertMoments]) -> dict[str, Moments | ExpertMoments]:
        return {path: layer_moments for path, layer_moments in moments.items() if path not in self.collector.unknown}

    def _head(
        self, blocks: Blocks, states: list[list[mx.array]]
    ) -> tuple[dict[str, Moments | ExpertMoments], list[list[mx.array]]]:
        c, cotangents = self.collector, list[list[mx.array]]()
        moments: dict[str, Moments | ExpertMoments] = {}
        tape = Tape()
        keys = mx.random.split(mx.random.key(self.seed), max(len(states), 2))
        cut = [blocks.pieces(state, batch.judged) for batch, state in zip(c.batches, states, strict=True)]  # (untapped)
        with c.tapped(len(blocks), tape):
            for batch, state, key, pieces in zip(c.batches, states, keys, cut, strict=False):
                gradients = list[mx.array]()
                for number, positions in enumerate(pieces):
                    own = key if len(pieces) == 1 else mx.random.split(key, len(pieces))[number]

                    def run(*state: mx.array, positions: mx.array = positions) -> list[mx.array]:
                        return [blocks.finish(state, positions)]

                    def probe(out: Sequence[mx.array], key: mx.array = own) -> list[mx.array]:
                        return [fisher_probe(out[0], key)]

                    found, noted = tapped_vjp(run, tape, state, probe)
                    c.add(moments, noted, batch, None if len(blocks) else batch.real)
                    gradients = [a + b for a, b in zip(gradients, found, strict=True)] if gradients else found
                    mx.eval(gradients)
                cotangents.append(gradients)
        return _felt(moments), cotangents

    def _block(
        self, index: int, cotangents: list[list[mx.array]]
    ) -> tuple[dict[str, Moments | ExpertMoments], list[list[mx.array]]]:
        c, below = self.collector, list[list[mx.array]]()
        moments: dict[str, Moments | ExpertMoments] = {}
        tape = Tape()
        entries = c._entries.take()
        with c.tapped(index, tape):
            for number, (batch, state, sent) in enumerate(zip(c.batches, entries, cotangents, strict=True)):
                call, size = c._calls[number].pop(), len(state)  # (the last: each is asked for once)

                def run(*arrays: mx.array, call: Call = call, size: int = size) -> list[mx.array]:
                    given = arrays[size:] or call.given
                    return c.backward.blocks.step(index, arrays[:size], replace(call, given=given))

                inputs = [*state, *call.given] if c.outside else state
                gradients, noted = tapped_vjp(run, tape, inputs, partial(_sent, sent))
                if index > c.first or c.outside:  # (to keep others would hold all that leads to them)
                    mx.eval(gradients)
                    below.append(gradients[:size])
                    c._sent[number] = [*gradients[size:], *c._sent[number]]
                c.add(moments, noted, batch, batch.real)
        return moments, below

    def _entrance(self, moments: dict[str, Moments | ExpertMoments], cotangents: list[list[mx.array]]) -> None:
        """What lies before the blocks: embeddings that are no output layer, and what is made of them for each block."""
        c, tape = self.collector, Tape()
        blocks, layers = c.backward.blocks, dict(c.backward.source.module.named_modules())
        wanted = {path: layers[path] for path in c.outside - set(moments)}
        if not blocks or not wanted:
            return

        def run(tokens: mx.array) -> list[mx.array]:
            state, calls = blocks.enter(tokens)
            return [*state, *(array for call in calls for array in call.given)]

        with tapped(wanted, tape, lookups=True):
            for batch, sent, given in zip(c.batches, cotangents, c._sent, strict=True):
                noted = tapped_vjp(run, tape, [batch.tokens], partial(_sent, [*sent, *given]))[1]
                c.add(moments, noted, batch, batch.real)


def _felt(moments: dict[str, Moments | ExpertMoments]) -> dict[str, Moments | ExpertMoments]:
    """Those of layers that anything depends on: where the head is run by itself, what lies before the blocks is called
    with a token that stands for none. (What is NaN stays, and is refused.)"""
    felt = {p for p, m in moments.items() if isinstance(m, ExpertMoments) or m.fisher is None or m.fisher.any().item()}
    return {path: layer_moments for path, layer_moments in moments.items() if path in felt}


def _sent(sent: Sequence[mx.array], _: Sequence[mx.array]) -> Sequence[mx.array]:
    return sent
