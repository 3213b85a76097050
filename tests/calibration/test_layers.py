"""Layers of other kinds: what no adapter takes but mlx-lm quantizes, and what is not called once for a whole batch."""

import math
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from helpers.fusing import IDS, some_rows, visible_adapter
from helpers.tiny_configs import tiny_base
from helpers.tiny_models import build_model
from mlx_lm.utils import load_model as load_as_mlx_lm_does

from mlx_adapters.assembly.survival import require_representable
from mlx_adapters.calibration import collecting
from mlx_adapters.calibration.blockwise import BlockwiseModel
from mlx_adapters.calibration.collecting import Collector
from mlx_adapters.calibration.moments import Seen, fits
from mlx_adapters.calibration.texts import GENERAL
from mlx_adapters.config.fusing import FuseOptions
from mlx_adapters.config.quantization import Quantization
from mlx_adapters.data.batches import make_batches
from mlx_adapters.errors import FormatError
from mlx_adapters.fusion.fuse import fuse
from mlx_adapters.models import loading
from mlx_adapters.models.adapter import Adapter
from mlx_adapters.models.dense import dense_layer, dense_weight, weight_shape
from mlx_adapters.models.layers import adaptable_layers, weight_layers
from mlx_adapters.models.loading import load_model, load_module
from mlx_adapters.models.metadata import AdapterConfig
from mlx_adapters.sources.bases import resolve_base
from mlx_adapters.storage import files

MLA = ["deepseek_v3", "glm4_moe_lite", "kimi_vl"]
NEAREST = FuseOptions(method="nearest", check=False)


@pytest.mark.parametrize("architecture", MLA)
def test_an_unquantized_fuse_unpacks_every_quantized_layer(architecture, tiny_model, tmp_path):
    base = tiny_model(architecture, bits=4)
    adapter = visible_adapter(base)
    result = fuse(base, adapter, tmp_path / "out", quantization="none", options=NEAREST)
    assert result.quantization is None
    assert not [name for name in mx.load(str(tmp_path / "out" / "model.safetensors")) if name.endswith(".scales")]
    load_as_mlx_lm_does(tmp_path / "out")
    expected = load_model(resolve_base(base), adapter).logits(IDS)
    assert mx.abs(load_model(resolve_base(tmp_path / "out")).logits(IDS) - expected).max().item() < 1e-4


@pytest.mark.parametrize("architecture", ["qwen3_5_moe", "granitemoehybrid"])
def test_experts_that_share_an_array_are_laid_out_before_they_compute(architecture, tmp_path, monkeypatch):
    """CUDA's product of sorted tokens takes the experts for one beside the other."""
    base, out = tiny_base(tmp_path / "base", architecture), tmp_path / "hf"
    fuse(base, visible_adapter(base), out, quantization="none", options=replace(NEAREST, format="hf"))
    model = BlockwiseModel(resolve_base(out))
    experts = [path for path in model.layer_paths(0) if weight_shape(model.source.layers[path])[:-2]]
    in_one = [path for path in experts if not in_order(model.source.layers[path].weight)]
    assert in_one, "this checkpoint does not hold two of them in one array"
    model.prepare(0)
    assert all(in_order(model.weight(path)) for path in experts)
    monkeypatch.setattr(loading, "on_gpu", lambda: True)
    layers = adaptable_layers(load_model(resolve_base(out), dense=False).module)
    assert all(in_order(layers[path].weight) for path in experts)


def in_order(array: mx.array) -> bool:
    return np.array(array, copy=False).flags.c_contiguous


@pytest.mark.parametrize("architecture", MLA)
def test_every_layer_that_mlx_lm_quantizes_is_quantized(architecture, tiny_model, tmp_path):
    base = tiny_model(architecture)
    asked = Quantization(4, 32)
    result = fuse(base, visible_adapter(base), tmp_path / "out", quantization=asked, options=NEAREST)
    names = set(mx.load(str(tmp_path / "out" / "model.safetensors")))
    assert result.notes == ()
    assert {f"{path}.scales" for path in weight_layers(load_module(resolve_base(base))[0])} <= names
    assert any("embed_q.scales" in name for name in names)
    load_as_mlx_lm_does(tmp_path / "out")


def test_a_layer_that_cannot_be_cut_into_groups_is_named(tiny_model, tmp_path):
    base = tiny_model("deepseek_v3")
    result = fuse(base, visible_adapter(base), tmp_path / "out", quantization=4, options=NEAREST)
    whole, *each = result.notes
    assert whole.startswith("2 layers of ")
    assert [note.split(":")[0] for note in each] == [f"model.layers.{i}.self_attn.embed_q" for i in (0, 1)]


def test_a_layer_of_any_class_has_a_dense_copy(tiny_model):
    module, _ = load_module(resolve_base(tiny_model("deepseek_v3", bits=4)))
    layers = weight_layers(module)
    others = {path: layer for path, layer in layers.items() if path not in adaptable_layers(module)}
    assert {type(layer).__name__ for layer in others.values()} == {"QuantizedMultiLinear"}
    for layer in others.values():
        weight = dense_weight(layer)
        dense = dense_layer(layer, weight)
        with mx.stream(mx.cpu):  # CUDA has no kernel for such small ones
            x = mx.random.normal((1, 2, 3, weight.shape[-1]))
            assert mx.abs(dense(x) - layer(x)).max().item() < 1e-5


def test_calibration_names_what_it_cannot_see(tiny_model, tmp_path):
    base = tiny_model("deepseek_v3")
    few = FuseOptions(calibration_rows=2, check_rows=2, check=False)
    result = fuse(base, visible_adapter(base), tmp_path / "out", quantization=Quantization(4, 32), options=few)
    named = [note for note in result.notes if "rounded to nearest" in note]
    assert len(named) == 4 and all("embed_q" in note or "unembed_out" in note for note in named)
    assert files.read_json(tmp_path / "out" / "fuse_report.json")["notes"] == list(result.notes)


def test_a_layer_that_is_called_for_each_token_has_the_moments_of_all(tiny_model, tmp_path):
    base = resolve_base(tiny_model("mamba"))
    path = "backbone.layers.1.mixer.x_proj"
    batches = make_batches(some_rows(lengths=(9, 12, 12)))
    collector = Collector(BlockwiseModel(base), BlockwiseModel(base), {path}, batches, tmp_path)
    (moments,) = [collected[path] for _, collected in collector.run()]
    model, inputs = load_model(resolve_base(base)), []
    layer = model.module.backbone.layers[1].mixer

    class Recorder(type(layer.x_proj)):
        def __call__(self, x):
            inputs.append(np.array(x))
            return super().__call__(x)

    layer.x_proj.__class__ = Recorder
    expected = np.zeros((128, 128))
    for tokens, _ in some_rows(lengths=(9, 12, 12)):
        inputs.clear()
        mx.eval(model.module(mx.array(tokens)[None]))
        rows = np.concatenate(inputs)[:-1]  # nothing is predicted from the last token
        expected += rows.T @ rows
    assert np.abs(np.array(moments.plain) - expected).max() < 1e-3 * np.abs(expected).max()
    assert moments.tokens == 8 + 11 + 11 and not collector.unknown


@pytest.mark.parametrize("architecture", ["mamba", "jamba"])
def test_recurrent_models_are_calibrated(architecture, tiny_model, tmp_path):
    base = tiny_model(architecture)
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"List the titles of all {i} courses and students." * 2 for i in range(120)))
    few = FuseOptions(calibration=str(text), calibration_rows=4, check_rows=4, thorough=False)
    results = [
        fuse(
            base,
            visible_adapter(base),
            tmp_path / method,
            quantization=Quantization(4, 32),
            options=FuseOptions(**{**vars(few), "method": method}),
        )
        for method in ("calibrated", "nearest")
    ]
    assert results[0].fidelity.kl_mean < results[1].fidelity.kl_mean
    assert not [note for note in results[0].notes if "does not see" in note]


def test_a_layer_whose_calls_do_not_fit_is_rounded_to_nearest_and_named(tiny_model, tmp_path, monkeypatch):
    base, few = tiny_model("llama"), {"calibration_rows": 4, "check": False, "thorough": False}
    monkeypatch.setattr(collecting, "fits", lambda seen, shape: shape[0] != 32)  # k_proj and v_proj
    fused = {}
    for method in ("calibrated", "nearest"):
        options = FuseOptions(method=method, calibration=GENERAL, **few)
        result = fuse(base, visible_adapter(base), tmp_path / method, quantization=Quantization(4, 32), options=options)
        named = {note.split(":")[0].rpartition(".")[2] for note in result.notes if "does not see" in note}
        assert named == ({"k_proj", "v_proj"} if method == "calibrated" else set())
        fused[method] = mx.load(str(tmp_path / method / "model.safetensors"))
    for name, weight in fused["nearest"].items():
        if "k_proj" in name or "v_proj" in name:
            assert mx.array_equal(weight, fused["calibrated"][name]).item(), name


def test_calls_that_do_not_fit_the_weight_tell_nothing():
    def seen(x, g, indices=None):
        return Seen(mx.zeros(x), None if indices is None else mx.zeros(indices, mx.int32), mx.zeros(g))

    assert fits(seen((2, 5, 8), (2, 5, 16)), (16, 8))
    assert not fits(seen((2, 5, 16), (2, 5, 8)), (16, 8))  # the transposed matrix
    assert not fits(seen((2, 4, 5, 8), (2, 5, 16)), (16, 8))
    assert fits(seen((2, 5, 1, 1, 8), (2, 5, 3, 1, 16), (2, 5, 3)), (4, 16, 8))
    assert fits(seen((30, 1, 8), (30, 1, 16), (30,)), (4, 16, 8))
    assert not fits(seen((2, 5, 8), (2, 5, 16)), (4, 16, 8))
    assert not fits(seen((7, 1, 8), (30, 1, 16), (30,)), (4, 16, 8))


def overflowing(base, row):
    """An adapter that lifts one row of a layer above what float16 holds."""
    key, up = "model.layers.0.mlp.up_proj", mx.zeros((1, 256))
    up[0, row] = 1000.0
    weights = {f"{key}.lora_a": mx.ones((64, 1)), f"{key}.lora_b": up}
    return Adapter(AdapterConfig(1, 100.0, (key,)), weights, {"base": resolve_base(base).record()})


@pytest.mark.parametrize("row", [0, 1, 2, 3])
@pytest.mark.parametrize("asked", ["none", 8, Quantization(4, 32), Quantization(4, 32, "mxfp4")])
def test_a_number_too_large_for_the_file_is_refused_in_every_row(row, asked, tiny_model, tmp_path):
    base = tiny_model("llama", dtype="float16", intermediate_size=256)
    with pytest.raises(FormatError, match=r"up_proj' holds NaN, Inf or numbers that are too large") as caught:
        fuse(base, overflowing(base, row), tmp_path / "out", quantization=asked, options=NEAREST)
    assert "--dtype bfloat16" in caught.value.hint
    assert not (tmp_path / "out").exists()


def test_a_type_that_holds_more_is_offered_where_there_is_one():
    with pytest.raises(FormatError, match=r"'x' holds NaN, Inf or") as caught:
        require_representable("x", 0.0, math.inf, mx.bfloat16)
    assert caught.value.hint == "is the base whole, and the adapter's update not far too large?"


def test_what_a_cast_makes_infinite_is_refused(tmp_path):
    base = build_model(tmp_path / "base", "llama", dtype="bfloat16")
    weights = mx.load(str(base / "model.safetensors"))
    weights["model.norm.weight"][3] = 1e5
    weights["model.layers.1.input_layernorm.weight"][3] = float("inf")
    mx.save_safetensors(str(base / "model.safetensors"), weights, {"format": "mlx"})
    adapter = visible_adapter(base)
    with pytest.raises(FormatError, match="norm"):
        fuse(base, adapter, tmp_path / "out", dtype="float16", options=NEAREST)
    fuse(base, adapter, tmp_path / "out", dtype="float32", options=NEAREST)  # what the base had, it keeps
