"""Changing how one module of a model is called, and nothing else: the one way to intercept a call.

mlx-lm's models are plain modules that call each other. To take the hidden states before the output head, to
compute them again in the backward pass, to round a weight on the way or to note what a layer is given, we
step between a single instance and its callers. Its parameters and its place in the model stay as they are, and
no class is touched, so other models in the process are unchanged.
"""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from mlx_adapters.system.door import mx, nn

METHODS = ("__call__", "as_linear")  # the ways in which models call a layer
HELD = "_intercepted"  # in the instance's __dict__, where MLX looks for neither parameters nor children


def intercept(module: nn.Module, function: Callable[..., Any], method: str = "__call__") -> Callable[[], None]:
    """From now on, `module.method(...)` runs `function(original, ...)`. Gives the function that undoes it.

    Who steps in last is called first; they may go in any order.
    """
    if HELD not in vars(module):
        kind: Any = type(module)
        module.__class__ = _open_to_others(kind)
        vars(module)[HELD] = {}
    held = vars(module)[HELD]
    functions = held.setdefault(method, [])
    functions.append(function)

    def undo() -> None:
        functions.remove(function)
        if not any(held.values()):
            del vars(module)[HELD]
            module.__class__ = type(module).__base__

    return undo


@functools.cache
def _open_to_others(kind: type[nn.Module]) -> type[nn.Module]:
    """The same class, but for instances that hold functions to be called in between."""

    def open_method(method: str) -> Callable[..., Any]:
        def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            run = partial(getattr(kind, method), self)
            for function in vars(self)[HELD].get(method, ()):
                run = partial(function, run)
            return run(*args, **kwargs)

        return call

    names = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(kind.__name__, (kind,), names | {m: open_method(m) for m in METHODS if hasattr(kind, m)})


@contextlib.contextmanager
def call_as(module: nn.Module, function: Callable[..., Any]) -> Iterator[None]:
    """Within the block, calling `module` runs `function(original_call, *args, **kwargs)`."""
    undo = intercept(module, function)
    try:
        yield
    finally:
        undo()


@contextlib.contextmanager
def function_call_as(home: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Within the block, in this thread alone, calling the function `home.name` of a module of mlx-lm's runs
    `function(original, *args, **kwargs)`. Who steps in last is called first."""
    functions = _here(home, name)
    functions.append(function)
    try:
        yield
    finally:
        functions.remove(function)


_OPENING = threading.Lock()


def _here(home: Any, name: str) -> list[Callable[..., Any]]:
    """What steps in before `home.name` in this thread; from the first time on, that function asks for it."""
    with _OPENING:
        own = getattr(getattr(home, name), HELD, None)
        if own is None:
            own, original = threading.local(), getattr(home, name)

            @functools.wraps(original)
            def call(*args: Any, **kwargs: Any) -> Any:
                run = original
                for function in getattr(own, "functions", ()):
                    run = partial(function, run)
                return run(*args, **kwargs)

            setattr(call, HELD, own)
            setattr(home, name, call)
    own.functions = getattr(own, "functions", [])
    return own.functions


def parts(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of a model and of all modules in it: its `named_modules`, in a third of the time."""
    yield "", module
    yield from _parts(module, "")


def _parts(tree: Any, path: str) -> Iterator[tuple[str, nn.Module]]:
    for name, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        if isinstance(value, dict | list):
            below = f"{path}.{name}" if path else str(name)
            if isinstance(value, nn.Module):
                yield below, value
            yield from _parts(value, below)


def random_key() -> mx.array:
    """The key that MLX draws its next random numbers from, as an array of its own."""
    return mx.random.state[0] + 0  # (mx.array would share it: a step then holds a tenth more memory)


def set_random_key(key: mx.array) -> None:
    """Let MLX draw its next random numbers from `key`."""
    mx.random.state[0][...] = key


def next_random_key() -> mx.array:
    """A key for random numbers of one's own: the next that MLX would draw from."""
    rest, key = mx.random.split(mx.random.state[0])
    set_random_key(rest)
    return key


def hidden_states(module: nn.Module, body: nn.Module, tokens: mx.array, cache: Any = None) -> mx.array:
    """(rows, length, hidden) that the body gives to the head. The head's own work is never evaluated."""
    seen: list[mx.array] = []

    def record(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        seen.append(original(*args, **kwargs))
        return seen[-1]

    with call_as(body, record):
        module(tokens, cache=cache)
    return seen[-1]


def head_logits(module: nn.Module, body: nn.Module, hidden: mx.array) -> mx.array:
    """(n, vocabulary) logits of (n, hidden) states, through whatever the model does after its body."""
    with call_as(body, lambda original, *args, **kwargs: hidden[None]):
        return module(mx.zeros((1, hidden.shape[0]), mx.int32))[0]
