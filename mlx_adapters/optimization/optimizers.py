"""Optimizers and learning-rate schedules.

The learning rate of an iteration is a pure function of the settings, so a resumed run needs no schedule
state. Weights are flat dictionaries from tensor names to arrays.

On a GPU small tensors lie side by side in one vector, for the optimizer and the sums over processes, since starting
work on each takes longer than doing it: there were 504 factors at the shape of a 4B model.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from mlx import optimizers

from mlx_adapters.config.training import TrainConfig
from mlx_adapters.models.adapter import Weights
from mlx_adapters.storage.tensor_names import LORA_B, split
from mlx_adapters.surgery.calls import set_random_key
from mlx_adapters.system import gpu_kernels
from mlx_adapters.system.door import mx
from mlx_adapters.system.machine import on_gpu


def compiles() -> bool:
    """Whether steps are compiled: on a GPU."""
    return on_gpu()


def compiled(function: Callable, state: Any = None) -> Callable:
    """`function` compiled on a GPU, as it is on a CPU: there compiling calls a C++ compiler for each fused
    kernel and was no faster (a 135M-parameter model, 2 cores). `state` is changed by the function.

    One that fails while MLX traces it leaves the state as it was: MLX leaves its tracers in it, also in its own random
    state, and nothing in the process could be computed any more.
    """
    if not compiles():
        return function
    fast = gpu_kernels.compiled(function, state, state)

    def call(*arguments: Any) -> Any:
        key = mx.array(mx.random.state[0])
        before = [(part, [(path, mx.array(array)) for path, array in _flat(part)]) for part in _dictionaries(state)]
        try:
            return fast(*arguments)
        except BaseException:
            set_random_key(key)
            for part, arrays in before:
                for path, array in arrays:
                    _place(part, path.split("/"), array)
            raise

    return call


def _dictionaries(state: Any) -> list[dict]:
    return [part for part in state or [] if isinstance(part, dict)]


def schedule_end(config: TrainConfig) -> int:
    """The last iteration of the schedule."""
    return config.course.iterations if config.schedule_iterations is None else config.schedule_iterations


def learning_rate(config: TrainConfig, iteration: int) -> float:
    """The rate of iteration 1, 2, ...: linear warm-up, then constant, or down to 0 after the schedule's last."""
    if iteration <= config.warmup:
        return config.learning_rate * iteration / (config.warmup + 1)
    done = min((iteration - 1 - config.warmup) / (schedule_end(config) - config.warmup), 1.0)
    falls = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
    return config.learning_rate * max(falls[config.schedule], 0.0)


def _make(kind: str, decay: float) -> optimizers.Optimizer:
    return {
        "adam": lambda: optimizers.Adam(1.0, bias_correction=True),
        "adamw": lambda: optimizers.AdamW(1.0, weight_decay=decay, bias_correction=True),
        "sgd": lambda: optimizers.SGD(1.0, momentum=0.9, weight_decay=decay),
        "adafactor": lambda: optimizers.Adafactor(1.0, weight_decay=decay, relative_step=False, scale_parameter=False),
        "muon": lambda: optimizers.Muon(1.0, weight_decay=decay),
    }[kind]()


ELEMENTWISE = ("adam", "adamw", "sgd")  # what they do to a number has nothing to do with its place
ALIGNED = 64  # numbers, since kernels read several at once


def small_size() -> int:
    """Tensors of fewer numbers are small: starting work on one takes a GPU longer than doing it."""
    return 1 << 20 if on_gpu() else 0


@dataclass(frozen=True)
class Packing:
    """Where tensors lie that are packed into vectors: `shapes` of all, by name; `vectors`: by its own name, the names
    of those that lie in it."""

    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    vectors: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def pack(self, tensors: Mapping[str, mx.array]) -> Weights:
        """The vectors, and what lies in none."""
        vectors = {
            vector: self.join(vector, [tensors[name] for name in names]) for vector, names in self.vectors.items()
        }
        inside = {name for names in self.vectors.values() for name in names}
        return vectors | {name: tensor for name, tensor in tensors.items() if name not in inside}

    def unpack(self, packed: Mapping[str, mx.array]) -> Weights:
        """What `pack` was given, in its order."""
        found = {name: part for vector in self.vectors for name, part in self.parts(vector, packed[vector]).items()}
        return {name: found[name] if name in found else packed[name] for name in self.shapes}

    def join(self, vector: str, tensors: Sequence[mx.array]) -> mx.array:
        """The tensors of a vector, one after the other, each from a multiple of ALIGNED on."""
        pieces: list[mx.array] = []
        for tensor in tensors:
            pieces.append(tensor.reshape(-1))
            if tensor.size % ALIGNED:
                pieces.append(mx.zeros(-tensor.size % ALIGNED, tensor.dtype))
        return mx.concatenate(pieces)

    def parts(self, vector: str, joined: mx.array) -> Weights:
        """The tensors of a vector, by name; no number is copied."""
        shapes = [self.shapes[name] for name in self.vectors[vector]]
        ends = list(accumulate(math.prod(shape) + -math.prod(shape) % ALIGNED for shape in shapes))
        pieces = zip(mx.split(joined, ends[:-1]), shapes, strict=True)
        cut = [piece[: math.prod(shape)].reshape(shape) for piece, shape in pieces]
        return dict(zip(self.vectors[vector], cut, strict=True))


class Optimizer:
    """One of mlx's optimizers for each group of weights: LoRA+ gives lora_b a rate of its own, and Muon,
    which is for matrices, leaves vectors and stacks of experts to AdamW. `packing`: how weights and gradients are given
    to it."""

    def __init__(self, config: TrainConfig, weights: Mapping[str, mx.array]) -> None:
        self.config = config
        groups: dict[tuple[Any, float], list[str]] = {}
        for name, weight in weights.items():
            kind = "adamw" if config.optimizer == "muon" and weight.ndim != 2 else config.optimizer
            ratio = config.lora_plus_ratio if split(name)[1] == LORA_B else 1.0
            groups.setdefault((kind, ratio), []).append(name)
        shapes, vectors = {name: tuple(weight.shape) for name, weight in weights.items()}, {}
        ordered = sorted(groups.items())
        for number, ((kind, _), names) in enumerate(ordered):
            small = [name for name in names if math.prod(shapes[name]) < small_size()]
            if kind in ELEMENTWISE and len(small) > 1:
                vectors[f"small {number}"] = tuple(small)
        self.packing = Packing(shapes, vectors)
        packed = self.packing.pack(weights)
        self._groups: list[tuple[optimizers.Optimizer, float, list[str]]] = []
        for number, ((kind, ratio), names) in enumerate(ordered):
            given = [name for name in packed if name == f"small {number}" or name in names]
            made = _make(kind, config.weight_decay)
            made.init({name: packed[name] for name in given})
            self._groups.append((made, ratio, given))
        self._step = compiled(self._update, self.states)

    @property
    def states(self) -> list[dict]:
        """What is to be evaluated, as it lies in memory."""
        return [optimizer.state for optimizer, _, _ in self._groups]

    def apply(self, weights: Weights, gradients: Weights, rate: float) -> tuple[Weights, mx.array, mx.array]:
        """(new weights, norm of the gradient before clipping, norm of the new weights); both packed."""
        return self._step(weights, gradients, mx.array(rate, mx.float32))

    def _update(self, weights: Weights, gradients: Weights, rate: mx.array) -> tuple[Weights, mx.array, mx.array]:
        norm = _norm(gradients)
        if self.config.max_grad_norm is not None:
            shrink = mx.minimum(self.config.max_grad_norm / (norm + 1e-6), 1.0)
            gradients = {name: (g * shrink).astype(g.dtype) for name, g in gradients.items()}
        new: Weights = {}
        for optimizer, ratio, names in self._groups:
            optimizer.learning_rate = rate * ratio
            new |= optimizer.apply_gradients({n: gradients[n] for n in names}, {n: weights[n] for n in names})
        new = {name: new[name] for name in weights}  # one order for ever: the norms are summed in it
        return new, norm, _norm(new)

    def arrays(self) -> Weights:
        """The whole state, flat and by the tensors' own names, to be saved."""
        arrays: Weights = {}
        for index, state in enumerate(self.states):
            for name, value in state.items():
                if name in self.packing.vectors:
                    for leaf, joined in value.items():
                        parts = self.packing.parts(name, joined)
                        arrays |= {f"{index}/{tensor}/{leaf}": part for tensor, part in parts.items()}
                else:
                    arrays |= _flat({name: value}, f"{index}/")
        return arrays

    def restore(self, arrays: Mapping[str, mx.array]) -> None:
        """Take back what `arrays` gave. Raises KeyError if a part is missing."""
        for index, state in enumerate(self.states):
            found: dict[str, mx.array] = {}
            for path, _ in _flat(state):
                name, _, leaf = path.rpartition("/")
                if name in self.packing.vectors:
                    tensors = [arrays[f"{index}/{tensor}/{leaf}"] for tensor in self.packing.vectors[name]]
                    found[path] = self.packing.join(name, tensors)
                else:
                    found[path] = arrays[f"{index}/{path}"]
            for path, value in found.items():
                _place(state, path.split("/"), value)


def _norm(arrays: Weights) -> mx.array:
    return mx.sqrt(sum(mx.square(array.astype(mx.float32)).sum() for array in arrays.values()))


def _flat(state: dict, prefix: str = "") -> list[tuple[str, mx.array]]:
    """Leaves of nested dictionaries as ("outer/inner", array); tensor names themselves hold dots."""
    leaves = []
    for key, value in state.items():
        path = f"{prefix}{key}"
        leaves += _flat(value, path + "/") if isinstance(value, dict) else [(path, value)]
    return leaves


def _place(state: dict, path: list[str], value: mx.array) -> None:
    for key in path[:-1]:
        state = state[key]
    state[path[-1]] = value
