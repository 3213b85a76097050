"""Keys and values of a batch's rows, held against mlx-lm's own: the same whatever comes, goes and is forgotten."""

import random

import mlx.core as mx
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models.cache import BatchKVCache, KVCache

from mlx_adapters.surgery.padded import STEP, PaddedCache

HEADS, WIDTHS = 2, (3, 5)
FRESH = st.lists(st.sampled_from([0, 1, 2, 7, STEP - 1, STEP, STEP + 3]), min_size=1, max_size=3)
MOVES = st.lists(st.tuples(st.sampled_from(["read", "join", "keep", "trim", "pad"]), FRESH, st.randoms()), max_size=6)


def texts(lengths, chance):
    """A cache of each length."""
    caches = [KVCache() for _ in lengths]
    for cache, length in zip(caches, lengths, strict=True):
        if length:
            cache.update_and_fetch(*tokens(1, length, chance))
    return caches


def tokens(rows, count, chance):
    numbers = np.random.default_rng(chance.randrange(1 << 30))
    return [mx.array(numbers.normal(size=(rows, HEADS, count, width)).astype(np.float32)) for width in WIDTHS]


def moved(caches, kind, lengths, chance):
    """Do one thing with both caches."""
    rows = len(caches[0].offset)
    held = min(caches[1].offset.tolist())
    if kind == "join":
        fresh = texts(lengths, chance)
        for cache, made in zip(caches, (PaddedCache, BatchKVCache), strict=True):
            cache.extend(made.merge(fresh))
    elif kind == "keep":
        kept = mx.array(sorted(chance.sample(range(rows), chance.randint(1, rows))))
        for cache in caches:
            cache.filter(kept)
    elif kind == "trim":
        count = min(lengths[0], held)
        assert [cache.trim(count) for cache in caches] == [count] * 2
    else:
        count, behind = lengths[0] or 1, [0] * rows
        new = tokens(rows, count, chance)
        if kind == "pad":
            behind = [chance.randint(0, count) for _ in range(rows)]
        for cache in caches:
            cache.prepare(right_padding=behind)
            cache.update_and_fetch(*new)
            cache.finalize()


@settings(max_examples=60, deadline=None)
@given(FRESH, MOVES, st.randoms())
def test_it_holds_what_mlx_lms_does(lengths, moves, chance):
    fresh = texts(lengths, chance)
    ours, theirs = caches = PaddedCache.merge(fresh), BatchKVCache.merge(fresh)
    for move in moves:
        moved(caches, *move)
        assert ours.offset.tolist() == theirs.offset.tolist()
        assert ours.size() == theirs.size() and ours.left_padding.tolist() == theirs.left_padding.tolist()
        if ours.keys is None:
            continue
        for row in range(len(ours.offset)):
            one, other = ours.extract(row), theirs.extract(row)
            assert one.offset == other.offset
            assert all(map(mx.array_equal, one.keys_and_values(), other.keys_and_values()))
        masks = [
            np.broadcast_to(cache.make_mask(3, return_array=True), (len(ours.offset), 1, 3, ours.size() + 3))
            for cache in caches
        ]
        assert np.array_equal(*masks)


def test_where_no_row_is_padded_there_is_no_mask():
    chance = random.Random(0)
    even, uneven = (PaddedCache.merge(texts(lengths, chance)) for lengths in ([4, 4], [4, 6]))
    assert even.make_mask(1) is None and even.make_mask(2) == "causal"
    assert uneven.make_mask(1).shape == (2, 1, 1, 7)
    assert even.make_mask(1, window_size=2).tolist() == [[[[False, False, False, True, True]]]] * 2
