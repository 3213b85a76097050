"""What lies between a model's attentions, compiled for few tokens.

At decode a GPU works faster than Python builds its operations anew for every token. A compiled function of hidden
states hands them over in one call. The weights and the factors of the adapters at work are its inputs, so that other
adapters, or weights put in place of others, cost no new compilation, and are never missed.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from mlx_adapters.runtime.sites import Site, at_path
from mlx_adapters.surgery.calls import intercept
from mlx_adapters.surgery.parts import find_parts
from mlx_adapters.system.door import mx, nn

MOST_TOKENS = 16  # with more, the products take longer than Python

HELD = "_compiled_parts"  # in the model's __dict__, where MLX looks for neither parameters nor children

Function = Callable[[mx.array], Any]


class Compiled:
    """Calls a function of hidden states (..., width) in which these layers and sites are at work."""

    def __init__(self, layers: nn.Module | list[nn.Module], sites: Iterable[Site] = ()) -> None:
        self.layers, self.sites = layers, list(sites)
        self._of: dict[tuple, Callable[..., Any]] = {}

    def __call__(self, function: Function, x: mx.array) -> Any:
        if x.size > MOST_TOKENS * x.shape[-1]:
            return function(x)
        updates = [site.update for site in self.sites]
        make = tuple(None if update is None else update.make for update in updates)
        if make not in self._of:
            self._of[make] = self._compile(function, x)
        return self._of[make](x, [update.inputs for update in updates if update is not None])

    def change(self, sites: Iterable[Site]) -> None:
        """From now on other sites, or other layers, are at work in it."""
        self.sites, self._of = list(sites), {}

    def _compile(self, function: Function, x: mx.array) -> Callable[..., Any]:
        try:
            mx.compile(function)(x)
        except (ValueError, RuntimeError):  # it looks at values
            return lambda x, inputs: function(x)
        return mx.compile(partial(self._traced, function), inputs=self.layers)

    def _traced(self, function: Function, x: mx.array, given: Sequence[Sequence[mx.array]]) -> Any:
        before = [site.update for site in self.sites]
        inputs = iter(given)
        try:
            for site, update in zip(self.sites, before, strict=True):
                site.update = None if update is None else update.of(next(inputs))
            return function(x)
        finally:
            for site, update in zip(self.sites, before, strict=True):
                site.update = update


def compile_parts(module: nn.Module, layers: Iterable[str]) -> dict[str, Compiled]:
    """The parts of a model that are functions of hidden states, by path, compiled from now on; once for each model."""
    if HELD not in vars(module):
        parts = {path: Compiled(at_path(module, path)) for path in find_parts(module, layers)}
        for path, part in parts.items():
            intercept(at_path(module, path), part)
        vars(module)[HELD] = parts
    return vars(module)[HELD]
