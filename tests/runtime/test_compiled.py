"""Compiled for few tokens, a model computes what it computed, whatever is put to work in it afterwards."""

import mlx.core as mx
import mlx.nn as nn
import pytest
from helpers.adapters import distance, random_adapter

from mlx_adapters.generation.live import load_model
from mlx_adapters.runtime.compiled import MOST_TOKENS
from mlx_adapters.runtime.pool import AdapterPool
from mlx_adapters.surgery.parts import find_parts

TOKENS = [5, 9, 2, 77, 31]


def selections(model):
    """Logits under one selection after the other, and a batch whose rows differ."""
    model.detach()
    for i in range(3):
        model.attach(random_adapter(model, "dora" if i == 1 else "lora", rank=2 + i, seed=i), name=str(i), use=False)
    found = []
    for selection in (None, "0", "1", {"0": 0.5, "2": 2.0}, "0"):
        model.use(selection)
        found.append(model.logits(TOKENS))
    texts = model.generate_batch([(TOKENS, "0"), (TOKENS, None), (TOKENS, "2"), (TOKENS, "1")], max_tokens=6)
    return found, texts


@pytest.mark.parametrize("group", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "phi3", "gemma3_text", "qwen3_moe", "gpt2"])
def test_it_computes_what_it_did(tiny_model, architecture, group):
    model = load_model(tiny_model(architecture))
    model.pool = AdapterPool(model.module, group=group)
    plain, texts = selections(model)
    model.detach()
    model.pool = AdapterPool(model.module, group=group, compiled=True)
    compiled, said = selections(model)
    assert len(model.pool._parts) == 2 and all(part._of for part in model.pool._parts.values())
    assert all(distance(one, other) < 1e-5 for one, other in zip(compiled, plain, strict=True))
    assert said == texts


def test_other_weights_and_other_layers_are_seen(tiny_model):
    model = load_model(tiny_model("llama"))
    model.pool = AdapterPool(model.module, group=True, compiled=True)
    model.attach(random_adapter(model), name="a")
    adapted = model.logits(TOKENS)
    model.pool.fuse(model.pool.selection)
    assert distance(model.logits(TOKENS), adapted) < 1e-4
    model.pool.unfuse()
    assert distance(model.logits(TOKENS), adapted) < 1e-6
    model.detach()
    base = model.logits(TOKENS)
    mlp = model.module.model.layers[0].mlp
    mlp.down_proj.weight = mlp.down_proj.weight * 2
    other = model.logits(TOKENS)
    assert distance(other, base) > 1e-3
    model.pool = AdapterPool(model.module, compiled=False)
    many = TOKENS * (1 + MOST_TOKENS // len(TOKENS))  # which are not computed by what was compiled
    assert distance(model.logits(many)[: len(TOKENS)], other) < 1e-5


class Peeking(nn.Module):
    """A part that looks at its values, which nothing compiled can."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def __call__(self, x: mx.array) -> mx.array:
        return self.mlp(x) * (1 if x.max().item() > -1e9 else 0)


def test_a_part_that_looks_at_values_is_left_as_it_is(tiny_model):
    model = load_model(tiny_model("llama"))
    expected = model.logits(TOKENS)
    layer = model.module.model.layers[1]
    layer.mlp = Peeking(layer.mlp)
    model.pool = AdapterPool(model.module, group=True, compiled=True)
    assert list(model.pool._parts) == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert distance(model.logits(TOKENS), expected) < 1e-6
    model.attach(random_adapter(model), name="a")
    assert distance(model.logits(TOKENS), expected) > 1e-2


BLOCKS = {"llama": "model.layers.{}.mlp", "mixtral": "model.layers.{}.block_sparse_moe", "gpt2": "model.h.{}.mlp"}


@pytest.mark.parametrize("architecture", [*BLOCKS, "rwkv7"])
def test_parts_take_nothing_but_hidden_states(tiny_model, architecture):
    """The channel mix of RWKV 7 keeps the token before, so it is none."""
    model = load_model(tiny_model(architecture))
    parts = find_parts(model.module, model.pool.layers)
    wanted = [BLOCKS[architecture].format(i) for i in range(2)] if architecture in BLOCKS else []
    assert [path for path in parts if "attn" not in path] == wanted
