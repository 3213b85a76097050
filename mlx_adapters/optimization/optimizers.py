"""Optimizers and learning-rate schedules.

The learning rate of an iteration is a pure function of the settings, so a resumed run needs no schedule
state. Weights are flat dictionaries from tensor names to arrays.
"""

import math
from collections.abc import Callable, Mapping
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


class Optimizer:
    """One of mlx's optimizers for each group of weights: LoRA+ gives lora_b a rate of its own, and Muon,
    which is for matrices, leaves vectors and stacks of experts to AdamW."""

    def __init__(self, config: TrainConfig, weights: Mapping[str, mx.array]) -> None:
        self.config = config
        groups: dict[tuple[str, float], list[str]] = {}
        for name, weight in weights.items():
            kind = "adamw" if config.optimizer == "muon" and weight.ndim != 2 else config.optimizer
            ratio = config.lora_plus_ratio if split(name)[1] == LORA_B else 1.0
            groups.setdefault((kind, ratio), []).append(name)
        self._groups = [
            (_make(kind, config.weight_decay), ratio, names) for (kind, ratio), names in sorted(groups.items())
        ]
        for optimizer, _, names in self._groups:
            optimizer.init({name: weights[name] for name in names})
        self._step = compiled(self._update, self._states)

    @property
    def _states(self) -> list[dict]:
        return [optimizer.state for optimizer, _, _ in self._groups]

    def apply(self, weights: Weights, gradients: Weights, rate: float) -> tuple[Weights, mx.array, mx.array]:
        """(new weights, norm of the gradient before clipping, norm of the new weights)."""
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
        """The whole state, flat, to be saved."""
        return dict(_flat({str(index): state for index, state in enumerate(self._states)}))

    def restore(self, arrays: Mapping[str, mx.array]) -> None:
        """Take back what `arrays` gave. Raises KeyError if a part is missing."""
        for index, state in enumerate(self._states):
            mine = {name: arrays[f"{index}/{name}"] for name, _ in _flat(state)}
            for name, value in mine.items():
                _place(state, name.split("/"), value)


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
