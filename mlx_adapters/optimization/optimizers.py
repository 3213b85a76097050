"""Optimizers and learning-rate schedules.

The learning rate of an iteration is a pure function of the settings, so a resumed run needs no schedule
state. Weights are flat dictionaries from tensor names to arrays.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx import optimizers

from mlx_adapters.config.training import TrainConfig
from mlx_adapters.models.adapter import Weights
from mlx_adapters.storage.tensor_names import LORA_B, split
from mlx_adapters.surgery.calls import set_random_key
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
    fast = mx.compile(function, inputs=state, outputs=state)

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


BY_NUMBER = ("adam", "adamw", "sgd")  # kinds that treat each number by itself
SMALL, ALIGNED = 1 << 20, 64  # numbers: larger weights fill a GPU alone; kernels read whole vectors
LINE = "line"


@dataclass(frozen=True)
class Group:
    """Weights that one of mlx's optimizers is for. `line`: (name, shape) of those laid one after the other."""

    optimizer: optimizers.Optimizer
    ratio: float
    names: list[str]
    line: list[tuple[str, tuple[int, ...]]]

    def laid(self, arrays: Mapping[str, mx.array]) -> Weights:
        """The group's of `arrays`, those of the line as one array, (numbers,)."""
        together = {name for name, _ in self.line}
        made = {name: arrays[name] for name in self.names if name not in together}
        return made | {LINE: self.in_line(arrays)} if together else made

    def in_line(self, arrays: Mapping[str, mx.array]) -> mx.array:
        """Those of the line, one after the other."""
        return mx.concatenate([arrays[name].reshape(-1) for name, _ in self.line])

    def parted(self, laid: Mapping[str, mx.array]) -> Weights:
        """What was laid together, by its names: views of it."""
        made = {name: array for name, array in laid.items() if name != LINE}
        start = 0
        for name, shape in self.line:
            stop = start + math.prod(shape)
            made[name], start = laid[LINE][start:stop].reshape(shape), stop
        return made


class Optimizer:
    """One of mlx's optimizers for each group of weights: LoRA+ gives lora_b a rate of its own, and Muon,
    which is for matrices, leaves vectors and stacks of experts to AdamW.

    `together`: small weights are laid in a line, where the rule allows it, since a GPU takes as long for one of them as
    for all; by default on a GPU. The numbers are the same but for the last bits of the norms.
    """

    def __init__(self, config: TrainConfig, weights: Mapping[str, mx.array], together: bool | None = None) -> None:
        self.config = config
        together = compiles() if together is None else together
        groups: dict[tuple[str, float], list[str]] = {}
        for name, weight in weights.items():
            kind = "adamw" if config.optimizer == "muon" and weight.ndim != 2 else config.optimizer
            ratio = config.lora_plus_ratio if split(name)[1] == LORA_B else 1.0
            groups.setdefault((kind, ratio), []).append(name)
        self._groups: list[Group] = []
        for (rule, ratio), names in sorted(groups.items()):
            small = [name for name in names if weights[name].size <= SMALL and weights[name].size % ALIGNED == 0]
            line = small if together and rule in BY_NUMBER and len(small) > 1 else []
            shaped = [(name, weights[name].shape) for name in line]
            self._groups.append(Group(_make(rule, config.weight_decay), ratio, names, shaped))
        for group in self._groups:
            group.optimizer.init(group.laid(weights))
        self._given: tuple[Weights, list[Weights]] = ({}, [])  # the newest weights, by name and laid
        self._step = compiled(self._update, self.states)

    @property
    def states(self) -> list[dict]:
        """What must be evaluated, as it lies in memory."""
        return [group.optimizer.state for group in self._groups]

    def apply(self, weights: Weights, gradients: Weights, rate: float) -> tuple[Weights, mx.array, mx.array]:
        """(new weights, norm of the gradient before clipping, norm of the new weights)."""
        given, laid = self._given
        if not laid or any(weights[name] is not array for name, array in given.items()):
            laid = [group.laid(weights) for group in self._groups]
        new, laid, *norms = self._step(laid, gradients, mx.array(rate, mx.float32))
        new = {name: new[name] for name in weights}
        self._given = dict(new), laid  # whoever has `new` may put other arrays there
        return new, *norms

    def _update(self, weights: list[Weights], gradients: Weights, rate: mx.array) -> tuple:
        laid = [group.laid(gradients) for group in self._groups]
        norm = _norm(laid)
        if self.config.max_grad_norm is not None:
            shrink = mx.minimum(self.config.max_grad_norm / (norm + 1e-6), 1.0)
            laid = [{name: (g * shrink).astype(g.dtype) for name, g in each.items()} for each in laid]
        new: list[Weights] = []
        for group, own, gradient in zip(self._groups, weights, laid, strict=True):
            group.optimizer.learning_rate = rate * group.ratio
            new.append(group.optimizer.apply_gradients(gradient, own))
        named = {n: w for group, own in zip(self._groups, new, strict=True) for n, w in group.parted(own).items()}
        return named, new, norm, _norm(new)

    def arrays(self) -> Weights:
        """The whole state, flat, to be saved."""
        states = zip(self._groups, self.states, strict=True)
        named = {str(index): self._named(group, state) for index, (group, state) in enumerate(states)}
        return dict(_flat(named))

    def restore(self, arrays: Mapping[str, mx.array]) -> None:
        """Take back what `arrays` gave. Raises KeyError if a part is missing."""
        for index, (group, state) in enumerate(zip(self._groups, self.states, strict=True)):
            for leaf in state.get(LINE, {}):
                state[LINE][leaf] = group.in_line({name: arrays[f"{index}/{name}/{leaf}"] for name, _ in group.line})
            for name, _ in _flat({name: part for name, part in state.items() if name != LINE}):
                _place(state, name.split("/"), arrays[f"{index}/{name}"])

    @staticmethod
    def _named(group: Group, state: dict) -> dict:
        """The state of one of mlx's optimizers with that of each weight by its name."""
        line = {leaf: group.parted({LINE: array}) for leaf, array in state.get(LINE, {}).items()}
        own = {name: {leaf: parts[name] for leaf, parts in line.items()} for name, _ in group.line}
        return {name: part for name, part in state.items() if name != LINE} | own


def _norm(laid: Sequence[Weights]) -> mx.array:
    return mx.sqrt(sum(mx.square(array.astype(mx.float32)).sum() for each in laid for array in each.values()))


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
