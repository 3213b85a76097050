"""When a batch's new tokens attend by the kernel, and to what. The kernel is tried on the device, by `is_right`."""

import mlx.core as mx
import pytest
from mlx_lm.models.cache import KVCache

from mlx_adapters.models import quantized_check
from mlx_adapters.runtime import row_attention
from mlx_adapters.surgery.padded import PaddedCache, fetched

HEADS, GROUPS, WIDTH = 4, 2, 32


def normal(*shape, seed=0):
    return mx.random.normal(shape, key=mx.random.key(seed))


def rows(*lengths):
    """A batch's layer with rows of these lengths."""
    caches = [KVCache() for _ in lengths]
    for i, (cache, length) in enumerate(zip(caches, lengths, strict=True)):
        cache.update_and_fetch(*(normal(1, GROUPS, length, WIDTH, seed=10 * i + j) for j in (0, 1)))
    return PaddedCache.merge(caches)


def by_products(q, keys, values, left, held, scale):
    """What the kernel computes."""
    places = mx.arange(keys.shape[2])
    seen = (places >= left[:, None]) & (places <= (left + held)[:, None])  # (rows, places)
    keys, values = (mx.repeat(array, HEADS // GROUPS, axis=1) for array in (keys, values))
    scores = mx.where(seen[:, None, None], scale * q @ keys.swapaxes(-1, -2), -mx.inf)
    return mx.softmax(scores, axis=-1) @ values


@pytest.fixture
def taken(monkeypatch):
    """What the kernel was asked for, which is there and right."""
    asked = []
    monkeypatch.setattr(row_attention, "is_right", lambda *_: True)
    monkeypatch.setattr(row_attention, "attend", lambda *given: asked.append(given) or by_products(*given))
    return asked


@pytest.mark.parametrize("lengths", [(3, 7, 5), (4, 4)])
def test_rows_attend_to_what_they_hold(lengths, taken):
    layer = rows(*lengths)
    for step in range(2):
        q, new = (
            normal(len(lengths), HEADS, 1, WIDTH, seed=step),
            normal(len(lengths), GROUPS, 1, WIDTH, seed=90 + step),
        )
        mask = layer.make_mask(1)
        k, v = layer.update_and_fetch(new, new + 1)
        expected = mx.fast.scaled_dot_product_attention(q, k, v, scale=0.3, mask=mask)
        made = row_attention.by_rows(mx.fast.scaled_dot_product_attention, q, k, v, scale=0.3, mask=mask)
        assert mx.allclose(made, expected, atol=1e-5) and len(taken) == step + 1


@pytest.mark.parametrize("why", ["another mask", "another layer", "several tokens", "sinks", "width"])
def test_other_attention_is_mlxs(why, taken, monkeypatch):
    layer, tokens = rows(3, 7), 2 if why == "several tokens" else 1
    if why == "width":
        monkeypatch.setattr(row_attention, "WIDTHS", (64,))
    mask = layer.make_mask(tokens, window_size=4 if why == "another mask" else None)
    new = normal(2, GROUPS, tokens, WIDTH)
    k, v = layer.update_and_fetch(new, new)
    if why == "another layer":
        rows(3, 7).update_and_fetch(new, new)
    options = {"sinks": mx.zeros(HEADS)} if why == "sinks" else {}
    q = normal(2, HEADS, tokens, WIDTH)
    assert row_attention.by_rows(lambda *_, **__: "MLX's", q, k, v, scale=1.0, mask=mask, **options) == "MLX's"
    assert not taken


def test_nothing_is_kept_alive_by_what_was_given_out():
    layer = rows(2, 3)
    k, _ = layer.update_and_fetch(normal(2, GROUPS, 1, WIDTH), normal(2, GROUPS, 1, WIDTH))
    assert fetched(k, None) is layer
    del layer
    assert fetched(k, None) is None


def test_it_is_built_in_the_first_way_that_computes_right(monkeypatch):
    def refused(*_):
        raise OSError("no compiler")

    def wrong(*_):
        return lambda inputs, **_: [mx.zeros_like(inputs[0])]

    def right(*_):
        return lambda inputs, **_: [by_products(*inputs)]

    layer, q = rows(3, 7), normal(2, HEADS, 1, WIDTH)
    monkeypatch.setattr(row_attention, "_built", {})
    for ways, built in (([refused, wrong], None), ([refused, wrong, right, wrong], right)):
        monkeypatch.setattr(quantized_check, "ways", lambda ways=ways: ways)
        row_attention.is_right.cache_clear()
        assert row_attention.is_right(mx.float32, WIDTH, WIDTH) == (built is not None)
    row_attention.is_right.cache_clear()
    given = layer.keys, layer.values, mx.array([4, 0]), mx.array([2, 6]), 0.3
    assert mx.allclose(row_attention.attend(q, *given), by_products(q, *given), atol=1e-5)
