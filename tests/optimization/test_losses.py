"""The chunked loss, packing, recomputation and rounding: equal to the plain way where they must be."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from helpers.tiny_models import ARCHITECTURES, VOCABULARY
from helpers.training_tools import make_updates_visible

from mlx_adapters.config.training import LoraConfig, TrainConfig
from mlx_adapters.data.batches import make_batch
from mlx_adapters.data.tokenizing import Row
from mlx_adapters.models.layers import adaptable_layers, named_layers
from mlx_adapters.models.loading import load_model
from mlx_adapters.optimization import log_probabilities
from mlx_adapters.optimization.log_probabilities import Arrays, device_batch, plan_loss
from mlx_adapters.optimization.probe import packing_is_exact
from mlx_adapters.sources.bases import resolve_base
from mlx_adapters.storage.tensor_names import block_index
from mlx_adapters.surgery import calls
from mlx_adapters.surgery.blocks import find_body
from mlx_adapters.surgery.recomputation import recompute
from mlx_adapters.surgery.segments import segmented_caches
from mlx_adapters.system.limits import as_little_memory_as_will_do
from mlx_adapters.training import setup

PACKABLE = sorted(set(ARCHITECTURES) - {"gpt2"})


def row(length: int, seed: int) -> Row:
    random = np.random.default_rng(seed)
    trained = random.random(length) < 0.6
    trained[0], trained[-1] = False, True
    return Row(random.integers(0, VOCABULARY, length).astype(np.int32), trained, "here", length)


ROWS = [row(20, 1), row(33, 2), row(70, 3)]


def adapted(folder, lora: LoraConfig):
    """A model with adapter layers whose lora_b is not zero, and its adapter weights."""
    model = load_model(resolve_base(folder))
    setup.add_layers(model, lora, 0)
    return model, make_updates_visible(model.module)


def heads(model) -> tuple[str, ...]:
    """The embedding and, if there is one, the output head: the hardest to adapt."""
    names = [name for name, _ in named_layers(model.module)]
    return tuple(n for n in names if n.endswith(("embed_tokens", "wte", "lm_head")))


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_chunked_loss_and_gradient_equal_the_plain_ones(architecture, tiny_model):
    folder = tiny_model(architecture)
    blocks = {
        path.rpartition(".")[2]
        for path in adaptable_layers(load_model(resolve_base(folder)).module)
        if block_index(path) == 1
    }
    targets = (*heads(load_model(resolve_base(folder))), *sorted(blocks))
    model, weights = adapted(folder, LoraConfig(rank=4, scale=2.0, target_modules=targets))
    batch, body = Arrays(**device_batch(make_batch([[r] for r in ROWS]))), find_body(model.module)
    head = [name for name in weights if block_index(name) is None]
    assert head

    def plain(weights):
        log_probabilities.set_weights(model.module, weights)
        return -log_probabilities.plain(model.module, batch).sum()

    def chunked(weights):
        log_probabilities.set_weights(model.module, weights)
        return -log_probabilities.chunked(model.module, body, batch, {n: weights[n] for n in head}, 16).sum()

    (a, grads_a), (b, grads_b) = mx.value_and_grad(plain)(weights), mx.value_and_grad(chunked)(weights)
    assert abs(a.item() - b.item()) <= 1e-5 * abs(a.item())
    for name in weights:
        assert mx.abs(grads_a[name] - grads_b[name]).max() <= 1e-5 * mx.abs(grads_a[name]).max() + 1e-9
        assert mx.abs(grads_a[name]).max() > 0


def test_the_log_probability_of_the_targets_and_its_gradient():
    import mlx.nn as nn

    logits = 30 * mx.random.normal((7, 50), key=mx.random.key(0))
    targets, weights = mx.array([1, 2, 3, 4, 5, 6, 49]), mx.array([1.0, 1, 0, 1, 1, 1, 0.5])
    ours = mx.value_and_grad(lambda x: -(log_probabilities.picked(x, targets) * weights).sum())(logits)
    theirs = mx.value_and_grad(lambda x: (nn.losses.cross_entropy(x, targets) * weights).sum())(logits)
    assert mx.allclose(ours[0], theirs[0], rtol=1e-6) and mx.allclose(ours[1], theirs[1], atol=1e-6)


def test_chunks_hold_less_memory(tiny_model):
    """Peak memory with 16 rows of logits at a time is far below that with all of them."""
    folder = tiny_model("qwen3", vocab_size=40_000)
    model, weights = adapted(folder, LoraConfig(rank=4, scale=2.0, target_modules=("q_proj",)))
    batch, body = Arrays(**device_batch(make_batch([[row(300, i)] for i in range(3)]))), find_body(model.module)
    peaks = {}
    for chunk in (16, 10_000):

        def loss(weights, chunk=chunk):
            log_probabilities.set_weights(model.module, weights)
            return -log_probabilities.chunked(model.module, body, batch, {}, chunk).sum()

        mx.synchronize()
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        with as_little_memory_as_will_do():  # a GPU with room works on all 33 chunks at once
            mx.eval(mx.value_and_grad(loss)(weights))
        peaks[chunk] = mx.get_peak_memory() - before
    assert peaks[16] < 0.4 * peaks[10_000]


def test_the_plain_loss_is_taken_where_the_split_is_not_exact(tiny_model, monkeypatch):
    model, _ = adapted(tiny_model(), LoraConfig(rank=4, scale=2.0))
    probe = make_batch([[r] for r in ROWS])
    assert plan_loss(model.module, TrainConfig(), VOCABULARY, probe).body is not None
    assert plan_loss(model.module, TrainConfig(chunked_loss="off"), VOCABULARY, probe).body is None
    monkeypatch.setattr(calls, "head_logits", lambda module, body, hidden: 2 * hidden @ mx.ones((64, VOCABULARY)))
    assert plan_loss(model.module, TrainConfig(), VOCABULARY, probe).body is None


@pytest.mark.parametrize(
    ("dtype", "off", "splits"), [(mx.float32, 1e-3, False), (mx.bfloat16, 3e-3, True), (mx.bfloat16, 0.05, False)]
)
def test_the_split_may_be_off_by_what_its_type_rounds(tiny_model, monkeypatch, dtype, off, splits):
    """A GPU sums few rows in another order than many: in 16 bits that is a few thousandths of a logit."""
    model, _ = adapted(tiny_model(), LoraConfig(rank=4, scale=2.0))
    model.module.set_dtype(dtype)
    own = calls.head_logits
    monkeypatch.setattr(calls, "head_logits", lambda *given: own(*given) * mx.array(1 + off, dtype))
    plan = plan_loss(model.module, TrainConfig(), VOCABULARY, make_batch([[r] for r in ROWS]))
    assert (plan.body is not None) == splits


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_packing_is_exact_or_refused(architecture, tiny_model):
    module = load_model(resolve_base(tiny_model(architecture))).module
    exact = packing_is_exact(module, make_batch([[r] for r in ROWS]), make_batch([ROWS], packed=True))
    assert exact == (architecture in PACKABLE)


def test_packed_rows_do_not_see_each_other(tiny_model):
    """Another first row leaves the losses of the second unchanged, also across a sliding window."""
    module = load_model(resolve_base(tiny_model("gemma3_text"))).module

    def second_loss(first: Row) -> float:
        quiet = replace(first, trained=np.zeros(len(first.tokens), bool))
        batch = Arrays(**device_batch(make_batch([[quiet, ROWS[2]]], packed=True)))
        cache = segmented_caches(module, batch.segments[:, :-1])
        return (log_probabilities.plain(module, batch, cache) * batch.weights).sum().item()

    assert second_loss(row(30, 7)) == pytest.approx(second_loss(row(30, 8)), rel=1e-6)


def test_patches_touch_no_class_and_are_taken_back(tiny_model):
    model, _ = adapted(tiny_model(), LoraConfig(rank=4, scale=2.0))
    layer, other = model.module.layers
    kind, call = type(layer), type(layer).__call__
    with recompute(layer):
        assert type(other) is kind and type(layer) is not kind and isinstance(layer, kind)
    assert type(layer) is kind and kind.__call__ is call
