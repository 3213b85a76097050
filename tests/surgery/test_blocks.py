"""A model in blocks: what goes from one to the next, found by probing, and the same numbers as the model run whole."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from helpers.fusing import some_rows, visible_adapter
from helpers.tiny_configs import tiny_base

from mlx_adapters.assembly.weights import Updates
from mlx_adapters.calibration.blockwise import BlockwiseModel
from mlx_adapters.calibration.collecting import Collector
from mlx_adapters.calibration.fidelity import measure_fidelity
from mlx_adapters.data.batches import make_batches
from mlx_adapters.models.loading import dequantize_layers, load_module
from mlx_adapters.sources.bases import resolve_base
from mlx_adapters.surgery.blocks import Blocks
from mlx_adapters.surgery.taps import Tape, tapped, tapped_vjp

IDS = mx.array([[3, 9, 27, 81, 40, 7], [300, 12, 5, 6, 7, 8]])
SHARED = {"gemma4_text": [1, 3, 5, 3, 1], "rwkv7": [1, 2, 1], "talkie": [1, 1, 1], "gptj": [1, 1, 1]}


@pytest.mark.parametrize("name", SHARED)
def test_blocks_one_after_the_other_compute_what_the_model_does(tmp_path, name):
    """Gemma 4's last blocks take keys and values of earlier ones, RWKV 7's values of the first, talkie's embeddings."""
    module, _ = load_module(resolve_base(tiny_base(tmp_path / name, name)))
    dequantize_layers(module, mx.float32)
    blocks = Blocks(module)
    state, calls = blocks.enter(IDS)
    sizes = [len(state)]
    for index, call in enumerate(calls):
        state = blocks.step(index, state, call)
        sizes.append(len(state))
    assert sizes == SHARED[name]
    expected = module(IDS).reshape(IDS.size, -1)
    np.testing.assert_allclose(np.array(blocks.finish(state, mx.arange(IDS.size))), np.array(expected), atol=1e-5)


def collected(folder, adapter, tmp_path):
    base, updates = resolve_base(folder), Updates(((adapter, 1.0),))
    pair = BlockwiseModel(base, updates), BlockwiseModel(base, updates)
    seen = {}
    for _, block in Collector(*pair, set(pair[1].source.layers), make_batches(some_rows()), tmp_path).run():
        seen |= block
    models = BlockwiseModel(base, updates), BlockwiseModel(base), BlockwiseModel(base)
    return len(pair[1].blocks), seen, measure_fidelity(*models, make_batches(some_rows()))


@pytest.mark.parametrize("name", ["gemma4_text", "rwkv7", "talkie", "qwen3_5"])
def test_calibration_by_blocks_sees_what_it_sees_of_the_whole_model(tmp_path, monkeypatch, name):
    folder = tiny_base(tmp_path / name, name)
    adapter = visible_adapter(folder, strength=0.05)
    count, by_block, judged = collected(folder, adapter, tmp_path)
    monkeypatch.setattr(Blocks, "_learn", lambda *_, **__: False)
    none, whole, other = collected(folder, adapter, tmp_path)
    assert count > 1 and none == 0 and by_block.keys() == whole.keys()
    for path, expected in whole.items():
        for kind in ("fisher", "outputs"):  # (by blocks, the head has no inputs but those that are judged)
            one, two = getattr(by_block[path], kind), getattr(expected, kind)
            assert (one is None) == (two is None), path
            if one is not None:
                tolerance = 1e-3 * mx.abs(two).max().item()
                np.testing.assert_allclose(np.array(one), np.array(two), rtol=2e-3, atol=tolerance, err_msg=path)
    assert judged.kl_mean == pytest.approx(other.kl_mean, rel=1e-3)


class Block(nn.Module):
    def __init__(self, gives):
        super().__init__()
        self.linear, self.gives = nn.Linear(8, 8), gives

    def __call__(self, x, other=None):
        y = x + self.linear(x if other is None else x + other)
        return self.gives(y)


class Toy(nn.Module):
    """Two blocks, and what lies between them."""

    def __init__(self, between, gives=lambda y: (y, y.max(axis=-1, keepdims=True))):
        super().__init__()
        self.embed, self.layers, self.between = nn.Embedding(10, 8), [Block(gives), Block(gives)], between

    def __call__(self, tokens):
        x, other = self.layers[0](self.embed(tokens))
        x, other = self.layers[1](*self.between(x, other, self.embed(tokens)))
        return x


@pytest.mark.parametrize(
    "between, splits",
    [
        (lambda x, other, _: (x, other), True),
        (lambda x, other, embedded: (x, embedded), True),
        (lambda x, other, _: (x, 2 * other), False),  # it would be taken for a constant
        (lambda x, other, _: (2 * x, other), False),
        (lambda x, other, embedded: (embedded, other), False),
    ],
)
def test_what_hangs_on_a_block_in_another_way_is_seen(between, splits):
    module = Toy(between)
    blocks = Blocks(module)
    assert bool(blocks) == splits
    tokens = mx.array([[1, 2, 3, 4]])
    state, calls = blocks.enter(tokens)
    for index, call in enumerate(calls):
        state = blocks.step(index, state, call)
    np.testing.assert_allclose(np.array(blocks.finish(state, mx.arange(4))), np.array(module(tokens))[0], atol=1e-6)


def test_what_blocks_may_keep_things_in_is_not_handed_to_them_twice():
    class Keeping(Toy):
        def __call__(self, tokens):
            x, _ = self.layers[0](self.embed(tokens))
            return self.layers[1](x, set())[0]

    assert not Blocks(Keeping(None))


class Row(nn.Module):
    """Three blocks in a row; the second and third are given what the one before gave. `read`: what the head reads."""

    def __init__(self, blocks, read=lambda x, *_: x):
        super().__init__()
        self.embed, self.layers, self.read = nn.Embedding(10, 8), list(blocks), read

    def __call__(self, tokens):
        embedded = self.embed(tokens)
        first, other = self.layers[0](embedded)
        x, other = self.layers[1](first, other)
        x, other = self.layers[2](x, other)
        return self.read(x, first, embedded, other)


class Plain(Row):
    """The same, of blocks that give nothing but a hidden state."""

    def __call__(self, tokens):
        embedded = self.embed(tokens)
        first = self.layers[0](embedded)
        return self.read(self.layers[2](self.layers[1](first)), first, embedded)


class Choosing(Block):
    """Gives whole numbers, by which the next one chooses among its inputs."""

    def __call__(self, x, chosen=None):
        y = super().__call__(x if chosen is None else mx.take_along_axis(x, chosen, axis=-1))
        return y, mx.stop_gradient(mx.argsort(y, axis=-1))


class PassingOn(Block):
    """Hands on what it was given, as it is."""

    def __call__(self, x, other=None):
        y = super().__call__(x, other)
        return y, y * y if other is None else other


ROWS = {
    "an array twice": lambda: Block(lambda y: (y, y)),
    "whole numbers": lambda: Choosing(lambda y: y),
    "what it was given": lambda: PassingOn(lambda y: y),
}


@pytest.mark.parametrize("kind", ROWS)
def test_gradients_go_back_through_all_that_a_block_gives(kind):
    module, tokens = Row(ROWS[kind]() for _ in range(3)), mx.array([[1, 2, 3, 4]])
    layers = {f"layers.{i}.linear": block.linear for i, block in enumerate(module.layers)}
    blocks, found, tape = Blocks(module), {}, Tape()
    state, calls = blocks.enter(tokens)
    states = [state]
    for index, call in enumerate(calls):
        states.append(blocks.step(index, states[-1], call))
    assert [len(state) for state in states] == [1, 2, 2, 1]
    sent = [mx.ones((1, 4, 8))]
    with tapped(layers, tape):
        for index in (2, 1, 0):

            def step(*state, index=index):
                return blocks.step(index, state, calls[index])

            sent, ((path, _, _, g),) = tapped_vjp(step, tape, states[index], lambda _, sent=sent: sent)
            found[path] = g
        _, whole = tapped_vjp(lambda ids: [module(ids)], tape, [tokens], lambda _: [mx.ones((1, 4, 8))])
    for path, _, _, g in whole:
        np.testing.assert_allclose(np.array(found[path]), np.array(g), atol=1e-5, err_msg=path)


@pytest.mark.parametrize(
    "kind, reads, splits",
    [
        (Plain, "x", True),
        (Plain, "first", False),
        (Plain, "embedded", False),
        (Row, "x", True),
        (Row, "first", False),
        (Row, "embedded", False),
        (Row, "other", False),
    ],
)
def test_a_head_that_reads_more_than_the_last_hidden_state_is_not_cut_off(kind, reads, splits):
    def head(x, first, embedded, other=None):
        return x + {"x": 0, "first": first, "embedded": embedded, "other": other}[reads]

    gives = (lambda y: y) if kind is Plain else (lambda y: (y, 2 * y))
    assert bool(Blocks(kind((Block(gives) for _ in range(3)), head))) == splits


def test_the_head_is_not_read_to_learn_what_hangs_on_what():
    head = nn.Linear(8, 1 << 23)  # 268 MB, not drawn yet
    module = Row((Block(lambda y: (y, 2 * y)) for _ in range(3)), lambda x, *_: head(x))
    module.head = head
    mx.synchronize()
    before = mx.get_active_memory()
    assert Blocks(module)
    mx.synchronize()
    assert mx.get_active_memory() - before < 1 << 26
