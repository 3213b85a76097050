"""The kernel that adds an update: its text for both kinds of GPU, and what happens where it is wrong.

What it computes is compared with products wherever it is first used (`kernel.is_right`), and by the tests of
adapters at run time on a GPU.
"""

import weakref

import mlx.core as mx
import pytest

from mlx_adapters.models import quantized_check
from mlx_adapters.runtime import additions, kernel
from mlx_adapters.runtime.factors import Factors

SCALED = ("gain", "shift")


@pytest.mark.parametrize("name", kernel.KERNELS)
def test_both_languages_share_one_text(name):
    metal, cuda = (kernel.source(own, name, SCALED) for own in ("metal", "cuda"))
    for word, own in sorted(kernel.WORDS["metal"].items(), key=lambda item: -len(item[1])):
        metal = metal.replace(own, kernel.WORDS["cuda"][word])
    assert metal == cuda
    text = kernel.source("cuda", name, [])
    assert kernel.GAIN not in text and kernel.SHIFT not in text


@pytest.fixture
def gpu(monkeypatch):
    """What is said to be a GPU, whose kernel computes what `kernel.add_update` is set to."""
    monkeypatch.setattr(kernel, "on_gpu", lambda: True)
    monkeypatch.setattr(quantized_check, "remembered", lambda kind, measure: measure())
    kernel._tried.cache_clear()
    yield monkeypatch
    kernel._tried.cache_clear()


def honest(y, x, a, b, widths, slots, gain=None, shift=None, apart=None):
    """Of products, for two layers or one."""
    slots = slots[: x.size // x.shape[-1]]
    z = mx.einsum("...i,slri->s...lr", x, a)[slots[0].item()]
    if slots.size > 1:
        z = mx.stack([mx.einsum("i,lri->lr", x[i], a[slots[i].item()]) for i in range(slots.size)])
        b = mx.stack([b[slot.item()] for slot in slots])
    else:
        b = b[slots[0].item()]
    low = mx.concatenate([mx.repeat(z[..., i : i + 1, :], width, axis=-2) for i, width in enumerate(widths)], axis=-2)
    scaled = y if gain is None else y * gain[slots] + (0 if shift is None else shift[slots])
    return scaled + (b * low).sum(axis=-1)


def added(tokens=1):
    keys = mx.random.split(mx.random.key(1), 4)
    x, y = mx.random.normal((1, tokens, 32), key=keys[0]), mx.random.normal((1, tokens, 24), key=keys[1])
    update = additions.ForAll(
        Factors(mx.random.normal((2, 4, 32), key=keys[2]), mx.random.normal((24, 4), key=keys[3]))
    )
    return mx.concatenate(update.linears(y, x, [16, 8]), axis=-1)


def test_few_tokens_are_computed_by_a_compiled_function_that_goes_with_the_update(gpu):
    """A site's product and factors are its constants: another adapter has another function, and nothing is left."""
    made = []

    def compiling(function):
        made.append(weakref.ref(function))
        return function

    gpu.setattr(kernel, "add_update", honest)
    gpu.setattr(additions, "compiled", compiling)
    keys = mx.random.split(mx.random.key(2), 3)
    weight = mx.random.normal((24, 32), key=keys[2])

    def outputs(update, tokens):
        x = mx.random.normal((tokens, 32), key=keys[0])
        got = additions.outputs_of(update, lambda x: x @ weight.T, x, [16, 8])
        expected = update.linears(x @ weight.T, x, [16, 8])
        assert all(mx.allclose(a, b, atol=1e-5) for a, b in zip(got, expected, strict=True))

    updates = [
        additions.ForAll(Factors(mx.random.normal((2, 4, 32), key=key), mx.random.normal((24, 4), key=key)))
        for key in keys[:2]
    ]
    for update in updates:
        for tokens in (1, 1, 2):
            outputs(update, tokens)
    assert len(made) == 2 and all(function() is not None for function in made)
    updates.clear()
    del update
    assert all(function() is None for function in made)


def test_rows_of_other_batches_go_through_one_compiled_function(gpu):
    made = []
    gpu.setattr(kernel, "add_update", honest)
    gpu.setattr(additions, "compiled", lambda function: made.append(function) or function)
    normal = [mx.random.normal(shape, key=mx.random.key(1)) for shape in ((3, 2, 4, 32), (3, 24, 4), (24, 32))]
    update = additions.PerRow(Factors(*normal[:2]), additions.Rows([]))
    for slots in ([2, 1], [1, 2], [0, 1, 2]):
        update.rows = additions.Rows(slots)
        x = mx.random.normal((len(slots), 32), key=mx.random.key(2))
        got = additions.outputs_of(update, lambda x: x @ normal[2].T, x, [16, 8])
        expected = [
            additions.ForAll(Factors(normal[0][slot], normal[1][slot])).added(
                mx.split(row @ normal[2].T, [16], -1), row
            )
            for slot, row in zip(slots, x, strict=True)
        ]
        for layer, parts in zip(got, zip(*expected, strict=True), strict=True):
            assert mx.allclose(layer, mx.stack(parts), atol=1e-4)
    assert len(made) == 1


def test_a_kernel_that_is_right_is_used_for_few_tokens(gpu):
    calls = []

    def counting(*arguments, **keywords):
        calls.append(1)
        return honest(*arguments, **keywords)

    expected = added()
    gpu.setattr(kernel, "add_update", counting)
    kernel._tried.cache_clear()
    assert mx.allclose(added(), expected, atol=1e-4) and len(calls) == 3  # it is tried both ways
    added(tokens=kernel.MOST_TOKENS + 1)
    assert len(calls) == 3


@pytest.mark.parametrize("wrong", ["lies", "raises"])
def test_a_kernel_that_is_wrong_is_not_used(gpu, wrong):
    expected = added()

    def lying(y, *arguments, **keywords):
        if wrong == "raises":
            raise RuntimeError("does not compile")
        return y

    gpu.setattr(kernel, "add_update", lying)
    kernel._tried.cache_clear()
    assert not kernel.is_right(mx.float32)
    assert mx.allclose(added(), expected, atol=1e-4)


@pytest.fixture
def seen(monkeypatch):
    """Kernels that are called: name, inputs by name, and all that was given."""
    calls = []

    def way(name, inputs, outputs, source, header):
        def call(**given):
            calls.append((name, dict(zip(inputs, given["inputs"], strict=True)), given))
            return [mx.zeros(given["output_shapes"][0], given["output_dtypes"][0])]

        return call

    monkeypatch.setitem(kernel._built, mx.float32, way)
    kernel._kernel.cache_clear()
    return calls


def test_of_several_tokens_the_first_kernel_waits_for_nothing_of_the_product(seen):
    """Its blocks are a row of a each, the second's some columns; no input of either is so small that it lies in a page
    which moves when the host writes."""
    a, b, x = mx.zeros((1, 2, 8, 32)), mx.zeros((1, 600, 8)), mx.zeros((2, 32))
    kernel.add_update(mx.zeros((2, 600)), x, a, b, (500, 100), kernel.first(x))
    (low, of_low, first), (high, of_high, second) = seen
    assert low == "low" and "y" not in of_low and high == "high" and of_high["z"].shape == (2, 2, 8)
    assert first["grid"] == (2 * 8 * kernel.LOW_THREADS, 2, 1)
    assert second["grid"] == (3 * kernel.HIGH_THREADS, 2, 1) and of_high["bounds"].tolist()[:3] == [0, 500, 600]
    assert all(array.nbytes > 8 for _, arrays, _ in seen for array in arrays.values())


@pytest.mark.parametrize(("rank", "threads"), [(8, 512), (48, 512), (64, 256)])
def test_of_one_token_one_kernel_whose_blocks_are_smaller_for_ranks_that_take_many_registers(seen, rank, threads):
    a, b, x = mx.zeros((1, 2, rank, 32)), mx.zeros((1, 608, rank)), mx.zeros((1, 1, 32))
    kernel.add_update(mx.zeros((1, 1, 608)), x, a, b, (600, 8), kernel.first(x))
    ((name, arrays, given),) = seen
    assert name == "one" and given["threadgroup"] == (threads, 1, 1) and ("THREADS", threads) in given["template"]
    assert given["grid"] == ((-(-600 // threads) + 1) * threads, 1, 1)
    assert all(array.nbytes > 8 for array in arrays.values())
