"""Calls inside a model are changed for as long as asked, and nothing is left behind, whatever fails."""

import gc
import types
import weakref
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from helpers.fusing import visible_adapter
from helpers.tiny_models import ARCHITECTURES
from hypothesis import given
from hypothesis import strategies as st

from mlx_adapters.models.layers import adaptable_layers
from mlx_adapters.models.loading import load_model, load_module
from mlx_adapters.runtime.pool import AdapterPool
from mlx_adapters.runtime.sites import Site
from mlx_adapters.sources.bases import resolve_base
from mlx_adapters.surgery import calls
from mlx_adapters.surgery.blocks import Blocks, find_blocks, find_body, keep_blocks
from mlx_adapters.surgery.calls import call_as, function_call_as, hidden_states, intercept
from mlx_adapters.surgery.groups import find_groups
from mlx_adapters.surgery.taps import Tape, tapped, tapped_vjp

TOKENS = mx.array([[5, 9, 2, 7]], dtype=mx.int32)


def traces(module: nn.Module) -> list:
    """What a change of calls could leave behind: other objects, classes, attributes."""
    return [(path, id(m), type(m), sorted(vars(m)), sorted(m)) for path, m in sorted(module.named_modules())]


class Broken(Exception):
    """No error that a trace expects."""


@given(st.permutations(range(4)))
def test_functions_in_between_go_in_any_order(order):
    layer, other, log = nn.Linear(2, 2), nn.Linear(2, 2), []

    def noting(number):
        def note(original, x):
            log.append(number)
            return original(x) + 1

        return note

    x, before = mx.ones((1, 2)), traces(layer)
    plain = layer(x)
    undo = [intercept(layer, noting(number)) for number in range(4)]
    assert isinstance(layer, nn.Linear) and type(layer).__name__ == "Linear" and type(other) is nn.Linear
    left = list(range(4))
    for number in order:
        log.clear()
        np.testing.assert_allclose(layer(x), plain + len(left), atol=1e-6)
        assert log == left[::-1]
        undo[number]()
        left.remove(number)
    assert traces(layer) == before and mx.array_equal(layer(x), plain)


def test_a_function_is_changed_for_one_thread_alone():
    home = types.SimpleNamespace(double=lambda x: 2 * x)
    with (
        function_call_as(home, "double", lambda original, x: original(x) + 1),
        function_call_as(home, "double", lambda original, x: 10 * original(x)),
    ):
        with ThreadPoolExecutor(1) as other:
            assert other.submit(home.double, 3).result() == 6
        assert home.double(3) == 70
    assert home.double(3) == 6


def test_an_output_layer_is_intercepted_by_its_own_method():
    layer, x = nn.Embedding(8, 4), mx.ones((1, 4))
    plain, before = layer.as_linear(x), traces(layer)
    undo = intercept(layer, lambda original, x: 2 * original(x), "as_linear")
    assert mx.array_equal(layer.as_linear(x), 2 * plain)
    assert layer(mx.array([1])).shape == (1, 4)
    undo()
    assert traces(layer) == before


def test_what_was_stepped_in_with_is_let_go_at_once():
    class Held:
        def __call__(self, original, x):
            return original(x)

    layer, held = nn.Linear(2, 2), Held()
    gone = weakref.ref(held)
    gc.disable()
    try:
        with call_as(layer, held):
            layer(mx.ones((1, 2)))
        del held
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_one_list_of_blocks_is_found_and_cut(tiny_model, architecture):
    module, _ = load_module(resolve_base(tiny_model(architecture)))
    place, blocks = find_blocks(module), list(module.layers)
    assert all(a is b for a, b in zip(place.owner[place.key], blocks, strict=True))
    assert find_body(module) is place.owner
    keep_blocks(module, 1, 1)
    assert list(map(id, module.layers)) == [id(blocks[1])]


def test_a_longer_list_that_holds_no_block_is_none_of_blocks():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = [nn.Linear(2, 2) for _ in range(5)]

    class Body(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = [Experts(), Experts()]

    module = Body()
    assert find_blocks(module) == ("", module, "layers") and find_body(module) is None
    del module.layers[0].experts, module.layers[1].experts
    assert find_blocks(nn.Linear(2, 2)) is None


@pytest.mark.parametrize("architecture", ["llama", "qwen3_moe", "gemma3_text", "gpt2"])
def test_a_failed_trace_leaves_nothing_behind(tiny_model, monkeypatch, architecture):
    module, _ = load_module(resolve_base(tiny_model(architecture)))
    mx.eval(module.parameters())
    layers, body = adaptable_layers(module), find_body(module)
    blocks = Blocks(module)
    hidden, given = blocks.enter(TOKENS)
    before, logits, tape = traces(module), module(TOKENS), Tape()
    norm = next(m for path, m in body.named_modules() if "norm" in path or path == "ln_f")
    kind = type(norm)

    def broken(self, *args):
        raise Broken

    with monkeypatch.context() as patch:
        patch.setattr(kind, "__call__", broken)
        for attempt in (
            lambda: blocks.finish(hidden, mx.array([0])),
            lambda: find_groups(module, layers),
            lambda: hidden_states(module, body, TOKENS),
            lambda: tapped_vjp(lambda h: blocks.step(0, h, given[0]), tape, hidden, lambda out: out),
        ):
            with tapped(layers, tape), pytest.raises(Broken):
                attempt()
            assert traces(module) == before
        assert len(Blocks(module)) in (0, len(blocks)) and traces(module) == before
    assert mx.array_equal(module(TOKENS), logits)


@pytest.mark.parametrize("architecture", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("group", [False, True])
def test_a_failed_attach_leaves_nothing_behind(tiny_model, monkeypatch, architecture, group):
    folder = tiny_model(architecture)
    model, few, all_layers = (
        load_model(resolve_base(folder)),
        visible_adapter(folder, targets=("q_proj",)),
        visible_adapter(folder),
    )
    pool = AdapterPool(model.module, group=group)
    before, assemble, calls_left = traces(model.module), Site.assemble, [3]

    def failing(self, factors):
        calls_left[0] -= 1
        if calls_left[0] < 0:
            raise Broken
        return assemble(self, factors)

    with monkeypatch.context() as patch:
        patch.setattr(Site, "assemble", failing)
        with pytest.raises(Broken):
            pool.add("all", all_layers)
    assert traces(model.module) == before and not pool.attached
    pool.add("few", few)
    pool.select(pool.choose("few"))
    attached, logits = traces(model.module), model.module(TOKENS)
    calls_left[0] = 3
    with monkeypatch.context() as patch:
        patch.setattr(Site, "assemble", failing)
        with pytest.raises(Broken):
            pool.add("all", all_layers)
    assert traces(model.module) == attached and list(pool.attached) == ["few"]
    assert mx.array_equal(model.module(TOKENS), logits)
    pool.add("all", all_layers)
    pool.remove("few")
    pool.remove("all")
    assert traces(model.module) == before


def test_one_way_to_intercept():
    """No other code swaps the class of a module."""
    import ast
    from pathlib import Path

    package = Path(calls.__file__).parents[1]
    swapping = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr == "__class__" and isinstance(node.ctx, ast.Store)
    }
    assert swapping == {"surgery/calls.py"}
