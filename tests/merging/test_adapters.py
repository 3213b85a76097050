"""Whole adapters in, one out: against full matrices and against models that compute with them."""

import dataclasses
import math
from decimal import Decimal
from fractions import Fraction
from typing import get_args

import mlx.core as mx
import numpy as np
import pytest
from helpers.adapters import LLAMA, MOE, make_adapter

from mlx_adapters.config.merging import MergeMethod
from mlx_adapters.errors import ConfigError, ExistsError, IncompatibleError
from mlx_adapters.fusion.fuse import fuse
from mlx_adapters.merging.extraction import extract
from mlx_adapters.merging.methods import METHODS
from mlx_adapters.merging.recipes import interpolate, merge, scale, subtract
from mlx_adapters.models.adapter import Adapter, read_adapter
from mlx_adapters.models.layers import adaptable_layers
from mlx_adapters.models.loading import load_model, load_module
from mlx_adapters.models.low_rank import update_of
from mlx_adapters.models.metadata import AdapterConfig
from mlx_adapters.sources.bases import resolve_base


def delta(adapter: Adapter, key: str) -> np.ndarray | float:
    return update_of(adapter, key).matrix() if key in adapter.config.keys else 0.0


def assert_sum(merged: Adapter, parts, tolerance: float = 1e-5) -> None:
    assert set(merged.config.keys) == {key for adapter, _ in parts for key in adapter.config.keys}
    for key in merged.config.keys:
        exact = sum(weight * delta(adapter, key) for adapter, weight in parts)
        np.testing.assert_allclose(delta(merged, key), exact, atol=tolerance * max(1, np.abs(exact).max()))


@pytest.fixture
def pair(tiny_model):
    base = tiny_model("llama")
    return make_adapter(base, LLAMA, rank=4, factor=2.0), make_adapter(
        base, LLAMA[1:], rank=3, factor=7.0, seed=1, name="b"
    )


@pytest.mark.parametrize("architecture, keys", [("llama", LLAMA), ("qwen3_moe", MOE)])
def test_logits_of_a_merged_adapter_are_those_of_the_weighted_sum(tiny_model, architecture, keys):
    base = tiny_model(architecture)
    parts = [(make_adapter(base, keys, rank=4), 0.7), (make_adapter(base, keys[:1], rank=2, factor=5.0, seed=3), -0.4)]
    model = load_model(resolve_base(base), merge([a for a, _ in parts], [w for _, w in parts]))
    tokens = [5, 9, 200, 31]
    logits = np.array(model.logits(tokens))
    full = {k: sum(w * delta(a, k) for a, w in parts) for k in keys}
    model.detach()
    untouched = np.array(model.logits(tokens))
    for key, layer in adaptable_layers(model.module).items():
        if key in full:
            change = full[key] if "embed" in key else np.swapaxes(full[key], -1, -2)
            layer.weight = layer.weight + mx.array(change)
    expected = np.array(model.logits(tokens))
    assert np.abs(expected - untouched).max() > 0.05
    np.testing.assert_allclose(logits, expected, atol=1e-4)


def test_cat_is_the_default_and_exact_over_ranks_layers_and_scales(pair):
    assert_sum(merge(pair), [(pair[0], 0.5), (pair[1], 0.5)])
    merged = merge(pair, [0.7, -1.3])
    assert merged.config.rank == 7 and merged.config.scale == pytest.approx(1.4)
    assert_sum(merged, [(pair[0], 0.7), (pair[1], -1.3)])
    assert merged.metadata["merge"]["method"] == "cat"
    assert [s["weight"] for s in merged.metadata["merge"]["sources"]] == [0.7, -1.3]


@pytest.mark.parametrize("weights", [(1e-45, 1.0), (1e-300, -2.0), (1.0, 1e-45)])
def test_a_share_that_is_next_to_nothing_is_added_as_such(pair, weights):
    """Whichever comes first: the others are held against it."""
    assert_sum(merge(pair, list(weights)), list(zip(pair, weights, strict=True)))


ODD = ["1", None, 1j, True, 10**400, float("nan"), [1.0]]


@pytest.mark.parametrize("odd", ODD, ids=repr)
def test_what_is_no_finite_number_is_refused(pair, odd):
    for work in (
        lambda: merge(pair, [odd, 1.0]),
        lambda: subtract(*pair, weight=odd),
        lambda: scale(pair[0], odd),
        lambda: fuse(None, [pair[0]], "out", weights=[odd]),
    ):
        with pytest.raises(ConfigError, match="must be a finite number"):
            work()


def test_numbers_and_their_lists_may_be_of_any_kind(pair):
    wanted = merge(pair, [0.5, 2.0])
    for weights in (np.array([0.5, 2.0]), iter([0.5, 2]), (Fraction(1, 2), Decimal(2)), [np.float32(0.5), np.int64(2)]):
        assert merge(pair, weights).fingerprint == wanted.fingerprint
    assert scale(pair[0], Decimal("0.5")).fingerprint == scale(pair[0], 0.5).fingerprint
    with pytest.raises(ConfigError, match="There are 2 adapters, but 1 weight"):
        merge(pair, 0.5)
    for none in (None, 5):
        with pytest.raises(ConfigError, match="is no adapter and no model"):
            merge(none)


def test_adapters_of_strength_0_add_nothing(pair):
    nothing = dataclasses.replace(pair[0], config=dataclasses.replace(pair[0].config, scale=0.0))
    assert_sum(merge([nothing, pair[1]], [1.0, 1.0]), [(nothing, 1.0), (pair[1], 1.0)])
    assert_sum(merge([nothing, nothing], [1.0, 1.0]), [(nothing, 2.0)])


def test_subtract_scale_and_interpolate_are_exact(pair):
    assert_sum(subtract(*pair, weight=0.25), [(pair[0], 1.0), (pair[1], -0.25)])
    half = scale(pair[0], 0.5)
    assert half.config.scale == 1.0 and half.weights is pair[0].weights
    assert_sum(half, [(pair[0], 0.5)])
    points = interpolate(*pair, steps=3)
    assert [t for t, _ in points] == [0.0, 0.5, 1.0]
    assert points[0][1].config.rank == 4 and points[2][1].config.rank == 3
    assert_sum(points[1][1], [(pair[0], 0.5), (pair[1], 0.5)])


def test_an_adapter_minus_itself_is_nothing(pair):
    gone = merge([pair[0], pair[0]], [1, -1], method="svd", rank="auto")
    assert gone.config.rank == 1
    assert max(np.abs(delta(gone, key)).max() for key in gone.config.keys) < 1e-5


def test_svd_reports_the_energy_and_auto_finds_the_rank(pair):
    exact = merge(pair, [1, 1])
    small = merge(pair, [1, 1], method="svd", rank=2)
    lost = sum(np.sum((delta(exact, k) - delta(small, k)) ** 2) for k in exact.config.keys)
    total = sum(np.sum(delta(exact, k) ** 2) for k in exact.config.keys)
    assert small.config.rank == 2
    assert small.metadata["merge"]["energy_kept"] == pytest.approx(1 - lost / total, rel=1e-4)
    auto = merge(pair, [1, 1], method="svd", rank="auto", energy=0.8)
    by_layer = auto.metadata["merge"]["energy_by_layer"]
    assert min(by_layer.values()) >= 0.8 and set(by_layer) == set(exact.config.keys)
    below = merge(pair, [1, 1], method="svd", rank=auto.config.rank - 1).metadata["merge"]["energy_by_layer"]
    assert min(below.values()) < 0.8
    whole = merge(pair, [1, 1], method="svd", rank="auto", energy=1.0)
    assert_sum(whole, [(pair[0], 1), (pair[1], 1)], tolerance=1e-4)


def test_the_methods_that_can_be_asked_for_are_those_of_the_table():
    assert list(get_args(MergeMethod)) == list(METHODS)


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("architecture, keys", [("llama", LLAMA), ("qwen3_moe", MOE)])
def test_every_method_gives_a_whole_adapter_that_the_base_takes(tiny_model, method, architecture, keys):
    base = tiny_model(architecture)
    pair = [make_adapter(base, keys, seed=s, factor=1 + s) for s in (0, 1)]
    needs = {"density": 0.5} if METHODS[method].prune else {}
    merged = merge(pair, [0.6, 0.4], method=method, name="m", **needs)
    assert merged.folder.name == "m" and merged.metadata["merge"]["method"] == method
    assert np.isfinite(np.array(load_model(resolve_base(base), read_adapter(merged.folder)).logits([1, 2, 3]))).all()
    again = merge(pair, [0.6, 0.4], method=method, **needs)
    for name, tensor in merged.weights.items():
        np.testing.assert_array_equal(np.array(tensor), np.array(again.weights[name]))


def test_a_seed_decides_the_random_methods(pair):
    a, b = pair[0], scale(pair[0], 0.5)
    one, same, other = (merge([a, b], method="dare-linear", density=0.5, seed=s) for s in (1, 1, 2))
    key = LLAMA[0]
    np.testing.assert_array_equal(delta(one, key), delta(same, key))
    assert np.abs(delta(one, key) - delta(other, key)).max() > 0


def test_half_precision_survives_when_the_sum_only_puts_numbers_side_by_side(tiny_model):
    base = tiny_model("llama")
    pair = [make_adapter(base, LLAMA, seed=s, dtype=mx.bfloat16) for s in (0, 1)]
    kept = merge(pair, [1, -0.5])
    assert {w.dtype for w in kept.weights.values()} == {mx.bfloat16}
    assert_sum(kept, [(pair[0], 1), (pair[1], -0.5)], tolerance=1e-6)
    assert {w.dtype for w in merge(pair, [0.7, 0.3]).weights.values()} == {mx.float32}
    assert {w.dtype for w in merge(pair, [0.7, 0.3], dtype="bfloat16").weights.values()} == {mx.bfloat16}


@pytest.mark.parametrize("architecture, keys", [("llama", LLAMA), ("qwen3_moe", MOE)])
def test_padding_of_a_source_costs_no_rank(tiny_model, architecture, keys):
    narrow = make_adapter(tiny_model(architecture), keys, rank=2)
    padded = {}
    for name, tensor in narrow.weights.items():
        axis = 1 if name.endswith("lora_a") else 2 if tensor.ndim == 3 else 0
        padded[name] = mx.pad(tensor, [(0, 3 if i == axis else 0) for i in range(tensor.ndim)])
    wide = Adapter(AdapterConfig(5, 2.0, keys), padded, narrow.metadata)
    merged = merge([wide, narrow], [1, 1])
    assert merged.config.rank == 4
    assert_sum(merged, [(narrow, 2.0)])
    assert merge([wide, narrow], [1, 1], method="linear").config.rank == 2


def test_an_untrained_factor_is_no_padding_and_nothing_at_all_has_rank_1(tiny_model):
    fresh = make_adapter(tiny_model("llama"))
    half = {n: w if n.endswith("lora_a") else mx.zeros_like(w) for n, w in fresh.weights.items()}
    nothing = {n: mx.zeros_like(w) for n, w in fresh.weights.items()}
    assert merge([fresh.with_weights(half), fresh], [1, 1]).config.rank == 8
    assert merge([fresh.with_weights(nothing), fresh], [1, 1]).config.rank == 5


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"method": "tie"}, "method cannot be 'tie'"),
        ({"weights": [1]}, "There are 2 adapters, but 1 weight."),
        ({"weights": [1, math.nan]}, "finite"),
        ({"weights": [0, 0]}, "nothing would be left"),
        ({"rank": 4}, "no rank to choose"),
        ({"energy": 0.9}, "no rank to choose"),
        ({"method": "svd", "rank": 0}, "rank must be at least 1, not 0"),
        ({"method": "svd", "rank": 2, "energy": 0.9}, "rank 'auto' only"),
        ({"method": "svd", "rank": "auto", "energy": 1.5}, "energy must be"),
        ({"method": "ties"}, "needs a density"),
        ({"density": 0.5}, "takes no density"),
        ({"method": "ties", "density": 0}, "density must be above 0"),
        ({"method": "ties", "density": 0.5, "seed": 1}, "takes no seed"),
        ({"method": "dare-linear", "density": 0.5, "seed": -1}, "seed must be at least 0"),
        ({"sign_method": "total"}, "elects no signs"),
        ({"method": "ties", "density": 0.5, "sign_method": "loud"}, "sign_method cannot be 'loud'"),
        ({"dtype": "int8"}, "dtype cannot be"),
    ],
)
def test_settings_that_a_method_lacks_or_would_ignore_are_refused(pair, settings, message):
    with pytest.raises(ConfigError, match=message):
        merge(pair, settings.pop("weights", None), **settings)


def test_what_cannot_be_merged_is_refused_with_the_reason(tiny_model, pair):
    base = tiny_model("llama")
    dora = make_adapter(base, LLAMA[:2], type="dora")
    with pytest.raises(IncompatibleError, match="DoRA") as caught:
        merge([pair[0], dora])
    assert "fuse" in caught.value.hint
    with pytest.raises(IncompatibleError, match="DoRA"):
        scale(dora, 0.5)
    with pytest.raises(IncompatibleError, match=r"ranks differ \(4, 3\)"):
        merge(pair, method="linear")
    wide = tiny_model("llama", hidden_size=96)
    other = make_adapter(wide, LLAMA, name="wide")
    with pytest.raises(IncompatibleError, match="was made for"):
        merge([pair[0], other])
    with pytest.raises(IncompatibleError, match=r"\(64, 64\) in 'a' but \(96, 96\) in 'wide'"):
        merge([pair[0], other], any_base=True)
    merge(pair, name="taken")
    with pytest.raises(ExistsError):
        merge(pair, name="taken")
    with pytest.raises(ConfigError, match="nothing to merge"):
        merge([])


# -- extract ------------------------------------------------------------------------------------------


def full_finetune(tiny_model, tmp_path, keys, rank=3, architecture="llama", **options):
    """(base folder, folder of a full fine-tune whose change is an adapter, that adapter)."""
    from mlx_lm.utils import save_model

    base = tiny_model(architecture, **options)
    adapter = make_adapter(base, keys, rank=rank)
    module, _ = load_module(resolve_base(base))
    for key, layer in adaptable_layers(module).items():
        if key in keys:
            change = delta(adapter, key)
            layer.weight = layer.weight + mx.array(change if "embed" in key else np.swapaxes(change, -1, -2))
    folder = tmp_path / "tuned"
    folder.mkdir()
    save_model(folder, module)
    (folder / "config.json").write_bytes((base / "config.json").read_bytes())
    return base, folder, adapter


@pytest.mark.parametrize("architecture, keys", [("llama", LLAMA[:2]), ("qwen3_moe", MOE)])
def test_extract_finds_the_adapter_in_a_full_fine_tune(tiny_model, tmp_path, architecture, keys):
    base, tuned, adapter = full_finetune(tiny_model, tmp_path, keys, architecture=architecture)
    extracted = extract(tuned, base, rank="auto", energy=0.9999, name="out")
    assert extracted.config.rank == 3 and set(extracted.config.keys) == set(keys)
    assert_sum(extracted, [(adapter, 1.0)], tolerance=1e-4)
    assert extracted.metadata["extract"]["energy_kept"] > 0.9999 and extracted.metadata["extract"]["left_out"] == {}
    assert extracted.metadata["base"]["fingerprint"] == resolve_base(base).fingerprint
    smaller = extract(tuned, base, rank=2)
    assert 0.3 < smaller.metadata["extract"]["energy_kept"] < 1


def test_extract_says_what_it_leaves_out_and_takes_embeddings_when_named(tiny_model, tmp_path):
    base, tuned, adapter = full_finetune(tiny_model, tmp_path, LLAMA)
    events = []
    extracted = extract(tuned, base, rank=3, on_event=events.append)
    assert "model.embed_tokens" in extracted.metadata["extract"]["left_out"]
    assert any("model.embed_tokens" in getattr(event, "text", "") for event in events)
    named = extract(tuned, base, rank=3, target_modules=("embed_tokens", "q_proj", "down_proj"))
    assert_sum(named, [(adapter, 1.0)], tolerance=1e-4)


def test_extract_takes_the_folder_of_an_mlx_lm_full_fine_tune(tiny_model, tmp_path):
    import json

    base, tuned, adapter = full_finetune(tiny_model, tmp_path, LLAMA[:2])
    layers = adaptable_layers(load_module(resolve_base(tuned))[0])
    folder = tmp_path / "full"
    folder.mkdir()
    mx.save_safetensors(str(folder / "adapters.safetensors"), {f"{k}.weight": layers[k].weight for k in LLAMA[:2]})
    (folder / "adapter_config.json").write_text(json.dumps({"fine_tune_type": "full", "num_layers": 2}))
    assert_sum(extract(folder, base, rank=3), [(adapter, 1.0)], tolerance=1e-4)


def test_extract_refuses_what_is_no_fine_tune_of_the_base(tiny_model):
    base = tiny_model("llama")
    with pytest.raises(IncompatibleError, match="same weights"):
        extract(base, base)
    with pytest.raises(IncompatibleError, match="differs in shape"):
        extract(tiny_model("llama", hidden_size=96), base)
    with pytest.raises(IncompatibleError, match="only one has"):
        extract(tiny_model("qwen3_moe"), base)
    with pytest.raises(ConfigError, match="rank 'auto' only"):
        extract(base, base, rank=4, energy=0.5)
