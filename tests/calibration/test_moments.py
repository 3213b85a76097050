"""Moments of experts: their own tokens, shrunk towards what all saw, a few experts at a time."""

import gc
import weakref
from dataclasses import asdict, replace

import mlx.core as mx
import numpy as np
import pytest
from helpers.fusing import some_rows, visible_adapter

from mlx_adapters.assembly import spool
from mlx_adapters.assembly.spool import Spool
from mlx_adapters.assembly.weights import Updates
from mlx_adapters.calibration import calibrate, fidelity, moments, texts
from mlx_adapters.calibration.blockwise import BlockwiseModel
from mlx_adapters.calibration.collecting import Collector
from mlx_adapters.calibration.fidelity import measure_fidelity
from mlx_adapters.calibration.moments import CHANCE, ExpertMoments, Seen, doubted, gram, mix
from mlx_adapters.config.fusing import FuseOptions
from mlx_adapters.config.quantization import Quantization
from mlx_adapters.data.batches import make_batches
from mlx_adapters.errors import FormatError, ModelError
from mlx_adapters.fusion.fuse import fuse
from mlx_adapters.rounding.feedback import calibrated
from mlx_adapters.rounding.packed import dequantize
from mlx_adapters.rounding.workers import Task
from mlx_adapters.sources.bases import resolve_base
from mlx_adapters.surgery import blocks
from mlx_adapters.surgery.blocks import Blocks
from mlx_adapters.system.machine import on_gpu

EXPERTS, WIDTH, OUT, TOKENS, CHOSEN = 4, 6, 5, 30, 2


def calls():
    """Two calls as SwitchGLU makes them: each token once for its experts, and (many tokens) sorted by expert.

    Returns them with what they mean: (expert, x, mean square of g) of each pair. Expert 3 is never chosen.
    """
    random = np.random.default_rng(0)
    pairs, seen = [], []
    for is_sorted in (False, True):
        x = random.standard_normal((TOKENS, WIDTH)).astype(np.float32)
        chosen = np.stack([random.choice(3, CHOSEN, replace=False) for _ in range(TOKENS)])
        g = random.standard_normal((TOKENS, CHOSEN, OUT)).astype(np.float32)
        g[:4] = 0  # padding
        flat, rows = chosen.reshape(-1), np.repeat(x, CHOSEN, axis=0)
        pairs += [(e, row, np.square(w).mean()) for e, row, w in zip(flat, rows, g.reshape(-1, OUT), strict=True)]
        if is_sorted:
            order = np.argsort(flat)
            arrays = rows[order][:, None], flat[order], g.reshape(-1, OUT)[order][:, None]
        else:
            arrays = x[None, :, None, None], chosen[None], g[None, :, :, None]
        seen.append(Seen(*map(mx.array, arrays)))
    return seen, [pair for pair in pairs if pair[2] > 0]


@pytest.fixture
def layer_and_pairs():
    seen, pairs = calls()
    layer = ExpertMoments(EXPERTS)
    for call in seen:
        layer.add(call)
    return layer, pairs


def sums(pairs):
    zero = np.zeros((WIDTH, WIDTH))
    plain = sum((np.outer(x, x) for _, x, _ in pairs), zero)
    return plain, sum((w * np.outer(x, x) for _, x, w in pairs), zero)


def test_moments_of_experts_are_theirs_shrunk_towards_what_all_saw(layer_and_pairs, monkeypatch):
    monkeypatch.setattr(moments, "MOST_ROWS", 7)
    layer, pairs = layer_and_pairs
    np.testing.assert_array_equal(layer.tokens, [sum(e == i for e, _, _ in pairs) for i in range(EXPERTS)])
    assert layer.tokens[3] == 0 and layer.tokens.sum() == len(pairs) == 2 * (TOKENS - 4) * CHOSEN
    parts = [layer.of(0, 2), layer.of(2, 4)]
    pooled = [part / len(pairs) for part in sums(pairs)]
    for name, place in (("plain", 0), ("fisher", 1)):
        whole = np.concatenate([np.array(getattr(part, name)) for part in parts])
        for i in range(EXPERTS):
            own = sums([pair for pair in pairs if pair[0] == i])[place]
            expected = own + moments.SHRINKAGE * WIDTH * pooled[place]
            np.testing.assert_allclose(whole[i], expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(parts[1].tokens, layer.tokens[2:])


def test_gate_and_up_keep_one_copy_of_what_they_see():
    tokens, width, out = 512, 256, 8
    gate, up = ExpertMoments(EXPERTS), ExpertMoments(EXPERTS)
    given = [mx.full((tokens, 1, width), float(i)) for i in range(2)]
    indices, g = mx.zeros((tokens,), mx.uint32), mx.ones((tokens, 1, out))
    mx.eval(given, indices, g)
    mx.synchronize()
    before, copy = mx.get_active_memory(), 4 * tokens * width
    for x in given:
        for one in (gate, up):
            one.add(Seen(x, indices, g))
    mx.synchronize()
    assert mx.get_active_memory() - before < copy / 8  # a weight for each token, and what an allocator rounds up
    for one in (gate, up):
        mx.eval(one.of(0, EXPERTS).plain)
    mx.synchronize()
    pooled = 2 * 2 * 4 * width * width  # is kept
    assert mx.get_active_memory() - before < pooled + copy / 8


@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_what_a_block_has_told_is_gone_when_the_next_is_asked(tiny_model, tmp_path, architecture):
    folder = tiny_model(architecture, bits=4)
    base, updates = resolve_base(folder), Updates(((visible_adapter(folder), 1.0),))
    pair, seen, held = (BlockwiseModel(base, updates), BlockwiseModel(base, updates)), [], []
    add = Collector.add

    def counted(collector, *arguments):
        gc.collect()
        held.append(sum(one() is not None for one in seen))
        return add(collector, *arguments)

    collector = Collector(*pair, updates.paths(), make_batches(some_rows()), tmp_path)
    collector.add = counted.__get__(collector)
    for _, block in collector.run():
        while block:
            _, moments_of_one = block.popitem()
            seen.append(weakref.ref(moments_of_one))
            del moments_of_one
    assert len(seen) > 8 and not any(held)


def test_a_mixture_of_moments_is_one_of_traces():
    a, b = mx.array([[[2.0, 1.0], [1.0, 2.0]], [[0.0, 0.0], [0.0, 0.0]]]), mx.array([[[1.0, 0.0], [0.0, 7.0]]] * 2)
    mixed = mix(a, b, 0.7)
    np.testing.assert_allclose(np.array(mixed[0]), 0.3 * np.array(a[0]) / 4 + 0.7 * np.array(b[0]) / 8, rtol=1e-6)
    np.testing.assert_allclose(np.array(mixed[1]), 0.7 * np.array(b[1]) / 8, rtol=1e-6)
    assert not mix(a[1], a[1]).any()


@pytest.mark.parametrize("tied", [True, False])
def test_an_adapted_head_is_calibrated_in_every_batch(tiny_model, tmp_path, tied, monkeypatch):
    monkeypatch.setattr(texts, "batches_of", lambda rows, *_: make_batches(rows, 48))
    folder = tiny_model("llama", bits=4, tie_word_embeddings=tied)
    options = FuseOptions(calibration_rows=8, check=False)
    fused = fuse(folder, visible_adapter(folder), tmp_path / "out", quantization=3, options=options)
    assert fused.method == "calibrated" and fused.quantization["bits"] == 3


def test_logits_are_held_for_few_tokens_at_a_time(tiny_model, tmp_path, monkeypatch):
    folder = tiny_model("llama", bits=4)
    base, updates = resolve_base(folder), Updates(((visible_adapter(folder), 1.0),))
    batches, judged, widths = make_batches(some_rows(), 48), [], []
    finish = Blocks.finish

    def watched(self, hidden, positions):
        widths[-1].append(positions.shape[0])
        return finish(self, hidden, positions)

    monkeypatch.setattr(Blocks, "finish", watched)
    for most in (blocks.MOST_LOGITS, 5 * 128):  # the vocabulary is larger: a token or a few at a time
        monkeypatch.setattr(blocks, "MOST_LOGITS", most)
        widths.append([])
        pair = BlockwiseModel(base, updates), BlockwiseModel(base, updates)
        layers = {}
        for _, block in Collector(*pair, updates.paths(), batches, tmp_path).run():
            layers |= block
        models = BlockwiseModel(base, updates), BlockwiseModel(base), BlockwiseModel(base)
        judged.append((layers, measure_fidelity(*models, batches)))
    (layers, fidelity), (others, other) = judged
    for path, layer in layers.items():
        np.testing.assert_allclose(np.array(others[path].plain), np.array(layer.plain), rtol=1e-4, atol=1e-4)
        traces = [np.trace(np.array(m[path].fisher)) for m in (layers, others)]
        assert 0.2 < traces[0] / traces[1] < 5  # other random directions
    assert asdict(other) == pytest.approx(asdict(fidelity), rel=1e-4)
    assert max(widths[1]) <= 5 < max(widths[0])


@pytest.mark.parametrize(("where", "told"), [("x", "computes NaN or Inf"), ("g", "gradient is NaN or Inf")])
def test_nan_at_one_expert_is_refused(where, told):
    seen, _ = calls()
    part = getattr(seen[0], where)
    at = mx.arange(part.size).reshape(part.shape) == part.size - 1  # one number of one token
    broken = replace(seen[0], **{where: mx.where(at, mx.array(float("nan")), part)})
    moments = ExpertMoments(EXPERTS)
    for call in (broken, seen[1]):
        moments.add(call)
    with pytest.raises(FormatError, match=told):
        calibrate._refuse_not_finite(moments.of(0, EXPERTS))


class Full:
    """A rounder with memory for `most` experts, and a collector with memory for so many tokens at a time."""

    def __init__(self, monkeypatch, most, tokens):
        self.sizes, self.batches = [], []
        run, collect = Task.run, Collector.run

        def full_run(task, engine):
            self.sizes.append(len(task.weight) if task.weight.ndim == 3 else 0)
            if self.sizes[-1] > most:
                raise RuntimeError("[malloc] Unable to allocate 1 bytes.")
            return run(task, engine)

        def full_collect(collector, *arguments):
            largest = max(batch.tokens.size for batch in collector.batches)
            self.batches.append(largest)
            if largest > tokens:
                raise RuntimeError("cudaMallocAsync failed: out of memory")
            return collect(collector, *arguments)

        monkeypatch.setattr(Task, "run", full_run)
        monkeypatch.setattr(Collector, "run", full_collect)
        monkeypatch.setattr(texts, "batches_of", lambda rows, base, most=0: make_batches(rows, most or 48))
        monkeypatch.setattr(calibrate, "on_gpu", lambda: True)


def test_fewer_experts_and_fewer_rows_where_memory_is_short(tiny_model, tmp_path, monkeypatch):
    folder = tiny_model("mixtral", bits=4)
    adapter, options = visible_adapter(folder), FuseOptions(calibration_rows=8, check=False)
    whole = Full(monkeypatch, most=99, tokens=10**6)
    fused = fuse(folder, adapter, tmp_path / "whole", quantization=4, options=options)
    monkeypatch.undo()
    short = Full(monkeypatch, most=1, tokens=whole.batches[0] - 1)
    again = fuse(folder, adapter, tmp_path / "short", quantization=4, options=options)
    experts = max(whole.sizes)
    assert experts > 1 and set(short.sizes) >= {experts, 1} and fused.method == again.method == "calibrated"
    assert short.batches[0] == whole.batches[0] > short.batches[-1]
    monkeypatch.undo()
    Full(monkeypatch, most=99, tokens=0)
    with pytest.raises(ModelError, match="too little memory") as caught:
        fuse(folder, adapter, tmp_path / "none", quantization=4, options=options)
    assert "--method nearest" in caught.value.hint


def test_judging_and_check_take_fewer_rows_where_memory_is_short_and_a_fuse_that_fails_there_goes_on(
    tiny_model, tmp_path, monkeypatch
):
    folder = tiny_model("llama", bits=4)
    ingredients = folder, visible_adapter(folder)
    options = FuseOptions(calibration_rows=8, check_rows=4)
    measure, put, largest, rounded = fidelity.measure_fidelity, Spool.put, [], []
    refused = [3]  # of three calls, so many

    def full(exact, fused, base, batches, on_event):
        largest.append(max(batch.tokens.size for batch in batches))
        if (len(largest) - 1) % 3 < refused[0]:
            raise RuntimeError("[METAL] Command buffer execution failed: Insufficient Memory")
        return measure(exact, fused, base, batches, on_event)

    monkeypatch.setattr(Spool, "put", lambda kept, path, done: rounded.append(path) or put(kept, path, done))
    monkeypatch.setattr(fidelity, "measure_fidelity", full)
    monkeypatch.setattr(spool, "WORTH_KEEPING", 0.0)
    with pytest.raises(ModelError, match="too little memory") as caught:
        fuse(*ingredients, tmp_path / "out", quantization=4, options=options)
    assert caught.value.hint == "close what else uses it and try again."  # (rounding is done)
    assert largest == sorted(largest, reverse=True) and largest[0] > largest[2] and rounded
    refused[0], _, _ = 2, largest.clear(), rounded.clear()
    fused = fuse(*ingredients, tmp_path / "out", quantization=4, options=options, resume=True)
    assert fused.fidelity and len(largest) == 6 and not rounded  # twice judged, at the third try


def test_layers_that_are_alike_are_rounded_in_one_batch_and_one_by_one_where_memory_is_short(
    tiny_model, tmp_path, monkeypatch
):
    folder = tiny_model("llama", bits=4)
    adapter, options = visible_adapter(folder), FuseOptions(calibration_rows=8, check_rows=4, check=False)
    run_each, batches, spools = Task.run_each, [], []
    monkeypatch.setattr(calibrate, "on_gpu", lambda: True)
    monkeypatch.setattr(texts, "batches_of", lambda rows, base, most=0: make_batches(rows))

    def full(task, engine):
        batches.append(len(task.weight))
        raise RuntimeError("out of memory")

    def counted(task, engine):
        batches.append(len(task.weight))
        return run_each(task, engine)

    put = Spool.put

    def kept(spool, path, done):
        spools[-1][path] = done
        put(spool, path, done)

    monkeypatch.setattr(Spool, "put", kept)
    for way, run in (("together", counted), ("alone", full)):
        monkeypatch.setattr(Task, "run_each", run)
        spools.append({})
        fuse(folder, adapter, tmp_path / way, quantization=4, options=options)
    assert batches[: len(batches) // 2] == batches[len(batches) // 2 :] and max(batches) > 1
    together, alone = spools
    assert set(together) == set(alone)
    for path, done in together.items():
        assert done.loss == pytest.approx(alone[path].loss, rel=0.05)
        assert done.packed.weight.shape == alone[path].packed.weight.shape
        alike = (dequantize(done.packed) == dequantize(alone[path].packed)).mean().item()
        # A GPU adds a stack's products in another order, and each code that differs moves all that follow in its row:
        # from 0.45 to 0.59 of them were alike there; by chance it is an eighth.
        assert alike > (0.3 if on_gpu() else 0.7)


@pytest.mark.parametrize(("thorough", "together"), [(None, {4}), (False, set()), (True, {4, 5, 6, 8})])
def test_rows_cancel_each_others_errors_at_the_base_s_bits_and_with_thorough_at_all(
    tiny_model, tmp_path, monkeypatch, thorough, together
):
    folder, seen, run = tiny_model("llama", bits=4), [], Task.run
    monkeypatch.setattr(Task, "run", lambda task, *rest: seen.extend(task.ways) or run(task, *rest))
    monkeypatch.setattr("mlx_adapters.calibration.strategy.polished", lambda *_: "")
    options = FuseOptions(budget_bits=7, calibration_rows=4, check=False, thorough=thorough)
    fuse(folder, visible_adapter(folder), tmp_path / "out", options=options)
    assert {way.quantization.bits for way in seen} == {4, 5, 6, 8}
    assert {way.quantization.bits for way in seen if way.together} == together


def test_outputs_count_as_much_as_their_inputs_are_large():
    x, g = (mx.random.normal((30, n), key=mx.random.key(n)) for n in (6, 5))
    seen = moments.Moments()
    for some in (slice(0, 10), slice(10, None)):
        seen.add_outputs(x[some], g[some])
    wanted = sum(np.square(a).mean() * np.outer(b, b) for a, b in zip(np.array(x), np.array(g), strict=True))
    np.testing.assert_allclose(np.array(seen.outputs), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("width", [3, 8, 9, 23])
def test_half_of_a_wide_product_is_computed_and_mirrored(monkeypatch, width):
    monkeypatch.setattr(moments, "on_gpu", lambda: True)
    monkeypatch.setattr(moments, "WIDE", 8)
    rows = mx.random.normal((5, width), key=mx.random.key(width))
    found = np.array(moments.gram(rows))
    np.testing.assert_allclose(found, np.array(rows).T @ np.array(rows), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found, found.T)


def test_what_few_inputs_have_to_do_with_each_other_is_doubted():
    width, few = 128, 96
    random = np.random.default_rng(3)
    mixing = np.exp(random.standard_normal((width, 1))) * (np.eye(width) + 0.1 * random.standard_normal((width, width)))
    told, kept = (mx.array((random.standard_normal((n, width)) @ mixing).astype(np.float32)) for n in (few, 4096))
    plain, true = gram(told) / few, np.array(gram(kept) / 4096)
    raised = doubted(plain, few)
    own = np.eye(width) > 0
    np.testing.assert_allclose(np.array(raised)[~own], np.array(plain)[~own], rtol=1e-6)
    np.testing.assert_allclose(np.array(raised)[own], (1 + CHANCE * width / few) * np.array(plain)[own], rtol=1e-5)
    assert mx.allclose(doubted(plain, 1 << 24), plain, rtol=1e-4)
    weight = mx.array(random.standard_normal((64, width)).astype(np.float32))

    def error(hessian):
        packed, _ = calibrated(weight, np.array(hessian), Quantization(4, 64), mx.float32)
        missing = np.array(weight - dequantize(packed))
        return np.vdot(missing @ true, missing)

    assert error(raised) < 0.95 * error(plain)
