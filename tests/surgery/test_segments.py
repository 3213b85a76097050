"""Rows packed into one line: each is computed, and differentiated, as if it were alone."""

import contextlib

import mlx.core as mx
import numpy as np
import pytest
from helpers.tiny_configs import make_model, tiny_config
from mlx.utils import tree_flatten

from mlx_adapters.surgery.caches import compute_as_generated
from mlx_adapters.surgery.calls import call_as
from mlx_adapters.surgery.recomputation import computed_again
from mlx_adapters.surgery.segments import States, begun_anew, segmented_caches
from mlx_adapters.system.door import SwitchLinear, gated_delta

LENGTHS = (9, 1, 14, 2, 20)
# gated delta rules (one gate for a head, one for each key), state spaces, convolutions alone, keys of an earlier layer
KINDS = ("qwen3_5", "qwen3_next", "kimi_linear", "nemotron_h", "falcon_h1", "lfm2", "gemma3n", "deepseek_v32")


@pytest.fixture(scope="module")
def model_of():
    made = {}

    def make(name: str):
        if name not in made:
            mx.random.seed(3)
            made[name] = make_model(tiny_config(name))
            compute_as_generated(made[name])
        return made[name].eval()

    return make


def rows(seed: int = 0) -> list[mx.array]:
    rng = np.random.default_rng(seed)
    return [mx.array(rng.integers(3, 500, (1, length))) for length in LENGTHS]


def packed(module, given: list[mx.array]) -> list[mx.array]:
    """The logits of each row, of one line that holds all."""
    segments = mx.concatenate([mx.full(row.shape, i) for i, row in enumerate(given, 1)], axis=1)
    logits = module(mx.concatenate(given, axis=1), cache=segmented_caches(module, segments))
    return mx.split(logits, np.cumsum([row.shape[1] for row in given])[:-1].tolist(), axis=1)


@contextlib.contextmanager
def anew(module):
    """Within the block a module's blocks begin anew with each row."""
    with contextlib.ExitStack() as stack:
        for block, call in begun_anew(module):
            stack.enter_context(call_as(block, call))
        yield


@pytest.mark.parametrize("name", KINDS)
def test_packed_rows_are_computed_as_if_they_were_alone(name, model_of):
    module = model_of(name)
    with anew(module):
        output = packed(module, rows())
    for logits, row in zip(output, rows(), strict=True):
        assert mx.abs(logits - module(row)).max() <= 2e-5 * mx.abs(logits).max()


@pytest.mark.parametrize("name", ["qwen3_5", "nemotron_h"])
def test_a_recurrence_that_does_not_begin_anew_would_show(name, model_of):
    module = model_of(name)
    last = packed(module, rows())[-1]
    assert mx.abs(last - module(rows()[-1])).max() > 1e-3 * mx.abs(last).max()


@pytest.mark.parametrize("again", ["nothing", "blocks"])
@pytest.mark.parametrize("name", ["qwen3_5", "nemotron_h"])
def test_their_gradients_are_those_of_the_rows_alone(name, again, model_of):
    module = model_of(name)
    for layer in module.modules():
        if isinstance(layer, SwitchLinear):  # trained, they are called otherwise: MLX's own gradient is wrong on CUDA
            layer.freeze()

    def loss(weights: list, together: bool) -> mx.array:
        module.update(weights)
        logits = packed(module, rows()) if together else [module(row) for row in rows()]
        return sum(mx.sin(each).sum() for each in logits)

    weights, gradients = module.trainable_parameters(), []
    for together in (False, True):
        with anew(module), computed_again(module.layers, [], again):
            gradients.append(dict(tree_flatten(mx.grad(loss)(weights, together))))
        module.update(weights)
    for key, expected in gradients[0].items():
        assert mx.isfinite(gradients[1][key]).all(), key
        assert mx.linalg.norm(gradients[1][key] - expected) <= 1e-4 * mx.linalg.norm(expected) + 1e-6, key


def test_so_does_a_kernel_of_the_gated_delta_rule(model_of, monkeypatch):
    """As on a Mac, outside training: another function is called there, with the same arguments."""
    module = model_of("qwen3_5")
    rule, used = gated_delta.gated_delta_ops, []

    def kernel(*given):
        used.append(True)
        return rule(*given)

    with anew(module):
        expected = packed(module, rows())[-1]
        monkeypatch.setattr(gated_delta, "gated_delta_kernel", kernel)
        monkeypatch.setattr(gated_delta.mx, "default_device", lambda: mx.gpu)
        monkeypatch.setattr(gated_delta.mx.metal, "is_available", lambda: True)
        output = packed(module, rows())[-1]
    assert used and mx.array_equal(output, expected)


def test_states_are_not_kept_and_end_where_a_layer_s_end():
    states = States(mx.ones((1, 4), mx.int32), 3)
    states[1] = mx.zeros(2)
    assert list(states) == [None] * 3 and states[1] is None and states
