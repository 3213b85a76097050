"""Scales tuned by gradient after rounding: the codes stay, KL falls, on others' rows too, and nothing else changes."""

from functools import partial

import mlx.core as mx
import numpy as np
import pytest
from helpers.fusing import some_rows, visible_adapter

from mlx_adapters.assembly import spool
from mlx_adapters.assembly.weights import Updates
from mlx_adapters.calibration import polish as tuning
from mlx_adapters.calibration import strategy
from mlx_adapters.calibration.blockwise import BlockwiseModel
from mlx_adapters.calibration.fidelity import measure_fidelity
from mlx_adapters.calibration.polish import Grids, Student, codes_of, on_grid, polish, tunable
from mlx_adapters.config.fusing import FuseOptions
from mlx_adapters.config.quantization import Quantization
from mlx_adapters.data.batches import make_batches
from mlx_adapters.events import Progress
from mlx_adapters.fusion.fuse import fuse
from mlx_adapters.rounding.packed import dequantize, nearest
from mlx_adapters.sources.bases import resolve_base
from mlx_adapters.storage.tensor_files import read_safetensors

Q = Quantization(4, 32)


def parts(packed):
    return {name: np.array(part.view(mx.uint16)) for name, part in packed.tensors.items()}


def same(one, other):
    return all((a == b).all() for a, b in zip(parts(one).values(), parts(other).values(), strict=True))


@pytest.mark.parametrize("bits", [3, 4, 6, 8])
def test_codes_and_grid_make_the_weight_and_unmoved_stay_as_they_are(bits):
    packed = nearest(mx.random.normal((6, 64), key=mx.random.key(bits)), Quantization(bits, 32), mx.float32)
    grids, codes = Grids({"a": packed}), codes_of(packed)
    assert codes.shape == (6, 2, 32) and codes.max().item() == 2**bits - 1
    assert mx.allclose(on_grid(codes, *grids.moved(mx.zeros((2, 12)))["a"]), dequantize(packed), atol=1e-6)
    assert same(grids.repacked(mx.zeros((2, 12)))["a"], packed)
    moved = grids.repacked(mx.array([[1.0] * 12, [0.0] * 12]))["a"]
    expected = packed.scales[..., None] * codes / (2**bits - 1)  # the highest code's value moves by a step
    assert mx.allclose(dequantize(moved) - dequantize(packed), expected.reshape(6, 64), atol=1e-6)


def test_the_gradient_passes_what_is_stored():
    packed = nearest(mx.random.normal((4, 32), key=mx.random.key(0)), Q, mx.bfloat16)
    gradient = mx.grad(lambda moves: Grids({"a": packed}).moved(moves)["a"][1].sum())(mx.zeros((2, 4)))
    assert mx.allclose(gradient, mx.stack([mx.zeros(4), packed.scales.reshape(-1)]).astype(mx.float32))
    float8 = nearest(mx.random.normal((4, 32)), Quantization(4, 32, "mxfp4"), mx.bfloat16)
    assert tunable(packed) and not tunable(float8)


def few_words(seed, count):
    """Batches of rows of 16 different tokens, so that there is something to learn."""
    return make_batches([(tokens % 16, judged) for tokens, judged in some_rows(seed, (20, 24, 28) * count)], 160)


@pytest.fixture
def rounded(tiny_model):
    """(what makes a pupil of rows, of some layers, the rounded layers, what judges layers on other rows)."""
    base = resolve_base(tiny_model("llama", bits=4))
    updates = Updates(((visible_adapter(base.folder, strength=0.05), 1.0),))
    source = BlockwiseModel(base, updates).source
    every = {p: nearest(source.fused(p, updates), Q, mx.bfloat16) for p in source.layers}
    packed = {p: part for p, part in every.items() if "layers" in p}

    def models(layers):
        exact = BlockwiseModel(base, updates)
        return exact, BlockwiseModel(
            base, updates, source.layers.__contains__, lambda p: dequantize(layers[p]) if p in layers else None, exact
        )

    def judge(layers, seed=7, rows=4):
        return measure_fidelity(*models(layers), None, few_words(seed, rows)).kl_mean

    def pupil(among="layers"):
        layers = {p: part for p, part in every.items() if any(name in p for name in among.split())}
        return Student(*models(layers), layers, few_words(1, 10), few_words(2, 3))

    return pupil, packed, judge


def test_tuning_lowers_kl_on_rows_it_did_not_see_and_keeps_the_codes(rounded):
    student, packed, judge = rounded
    seen, pupil = [], student()
    tuned, before, after = polish(pupil, passes=4, rate=0.02, on_event=seen.append)
    assert after < 0.9 * before and judge(tuned) < 0.9 * judge(packed)
    assert set(tuned) == set(packed) and not all(same(tuned[p], packed[p]) for p in packed)
    for path, part in tuned.items():
        assert mx.array_equal(part.weight, packed[path].weight) and part.scales.dtype == mx.bfloat16
    steps = [event.done for event in seen if isinstance(event, Progress)]
    assert steps == list(range(1, 4 * len(pupil.lessons) + 1)) and seen[-1].total == len(steps)
    again, *kl = polish(student(), passes=4, rate=0.02)
    assert kl == [before, after] and all(same(again[p], tuned[p]) for p in packed), "the same bits each time"


@pytest.mark.parametrize(("among", "first"), [("layers", 0), ("layers.1", 1), ("layers.1 embed_tokens", 0)])
def test_blocks_before_the_first_with_a_grid_to_move_are_computed_once(rounded, monkeypatch, among, first):
    pupil, _, judge = rounded
    student, steps = pupil(among), []
    blocks = student.model.blocks
    step = blocks.step
    monkeypatch.setattr(blocks, "step", lambda index, *rest: steps.append(index) or step(index, *rest))
    moves = 0.1 * mx.random.normal((2, student.grids.steps.size), key=mx.random.key(0))
    seen = student.judged(moves)
    assert set(steps) == set(range(first, len(blocks)))
    assert seen == pytest.approx(judge(student.grids.repacked(moves), 2, 3), rel=1e-3)


def test_what_does_not_help_is_not_taken(rounded):
    student, packed, _ = rounded
    tuned, before, after = polish(student(), passes=1, rate=50.0)
    assert before == after and all(same(tuned[p], packed[p]) for p in packed)


@pytest.fixture
def job(tiny_model, tmp_path, monkeypatch):
    """A fuse to be called with options; two passes are enough here."""
    monkeypatch.setattr(spool, "WORTH_KEEPING", 0.0)
    monkeypatch.setattr(strategy, "polished", partial(tuning.polished, passes=2, rate=0.02))
    folder = tiny_model("llama", bits=4)
    words = np.random.default_rng(0).choice(["alpha", "beta", "gamma", "delta"], (24, 16))
    rows = [{"text": " ".join(row)} for row in words]

    def run(out="out", listen=lambda _: None, resume=False, quantization="keep", **options):
        asked = {"calibration": rows, "calibration_rows": 16, "check": False, "thorough": True} | options
        adapter = visible_adapter(folder, targets=("q_proj", "up_proj", "down_proj"))
        return fuse(
            folder,
            adapter,
            tmp_path / out,
            quantization=quantization,
            options=FuseOptions(**asked),
            resume=resume,
            on_event=listen,
        )

    return run


def test_a_thorough_fuse_changes_only_scales_and_biases_and_goes_on_to_the_same_bytes(job):
    def stop(event):
        if isinstance(event, Progress) and event.stage == "write":
            raise KeyboardInterrupt

    plain, whole = job("plain", thorough=None), job("whole")
    assert any("Scales tuned" in note for note in whole.notes) and not any("tuned" in note for note in plain.notes)
    files = [result.folder / "model.safetensors" for result in (plain, whole)]
    one, other = map(read_safetensors, files)
    changed = {name for name in one if not mx.array_equal(one[name], other[name]).item()}
    assert changed and all(name.endswith(("scales", "biases")) and "layers" in name for name in changed)
    with pytest.raises(KeyboardInterrupt):
        job(listen=stop)
    assert (job(resume=True).folder / "model.safetensors").read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("mode", ["mxfp4", "nvfp4"])
def test_float_modes_say_that_their_scales_stay(job, mode):
    asked = Quantization(4, 32 if mode == "mxfp4" else 16, mode)
    assert any("No scales to tune" in note for note in job(quantization=asked).notes)


@pytest.mark.parametrize("known", [True, False])
def test_too_little_memory_leaves_the_scales(job, monkeypatch, known):
    def full(*_, **__):
        raise RuntimeError("[malloc] Unable to allocate 1 bytes.")

    if known:
        monkeypatch.setattr(tuning, "usable_memory_bytes", lambda: 1000)
    else:
        monkeypatch.setattr(tuning, "polish", full)
    result = job()
    assert any("Scales were not tuned" in note for note in result.notes)
