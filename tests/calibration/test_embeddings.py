"""What calibration sees of embeddings that are no head: the gradients at the rows that they give."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from helpers.fusing import some_rows, visible_adapter

from mlx_adapters.assembly.weights import Updates
from mlx_adapters.calibration.blockwise import BlockwiseModel
from mlx_adapters.calibration.collecting import Collector
from mlx_adapters.data.batches import make_batches
from mlx_adapters.models.loading import load_model
from mlx_adapters.sources.bases import resolve_base
from mlx_adapters.surgery.calls import intercept
from mlx_adapters.surgery.taps import fisher_probe


def gradients(folder, adapter, path, batch, key):
    """(tokens, dim) at what the embedding gives, by a model with the adapter's layers, run whole."""
    module = load_model(resolve_base(folder), adapter).module
    layer, shapes = dict(module.named_modules())[path], []

    def logits(*probes):
        shapes.clear()

        def add(original, ids):
            y = original(ids)
            shapes.append(y.shape)
            return y + probes[len(shapes) - 1] if probes else y

        undo = intercept(layer, add)
        out = module(batch.tokens)
        undo()
        return out.reshape(-1, out.shape[-1])[batch.judged]

    sent = fisher_probe(logits(), key)
    found = mx.vjp(logits, [mx.zeros(shape) for shape in shapes], [sent])[1]
    return [np.array(g).reshape(-1, g.shape[-1]) for g in found]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma4_text", "rwkv7"])
def test_an_embedding_is_judged_by_the_gradients_at_its_rows(tiny_model, tmp_path, architecture):
    tied = {"tie_word_embeddings": False} if architecture == "llama" else {}
    folder = tiny_model(architecture, **tied)
    adapter, batches = visible_adapter(folder), make_batches(some_rows())
    base, updates = resolve_base(folder), Updates(((adapter, 1.0),))
    pair = BlockwiseModel(base, updates), BlockwiseModel(base, updates)
    paths = {path for path, layer in pair[1].source.layers.items() if isinstance(layer, nn.Embedding)}
    seen = {}
    for _, block in Collector(*pair, paths, batches, tmp_path).run():
        seen |= block
    (batch,), keys = batches, mx.random.split(mx.random.key(0), 2)
    heads = {path for path in paths if seen[path].outputs is not None}
    assert seen.keys() == paths and heads < paths
    for path in paths - heads:
        rows = gradients(folder, adapter, path, batch, keys[0])
        expected = sum(g.T @ g for g in rows)
        np.testing.assert_allclose(np.array(seen[path].fisher), expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
        assert seen[path].tokens == sum(g.any(axis=-1).sum() for g in rows)
