"""The fused model computes what base and adapter compute, on every architecture, precision and layer type."""

import glob
import json
import math
import shutil
from dataclasses import astuple

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner
from helpers.fusing import IDS, fuse, logits, visible_adapter
from helpers.tiny_models import ARCHITECTURES, build_model
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model as load_as_mlx_lm_does

from mlx_adapters.assembly.survival import SurvivalSum, sample
from mlx_adapters.cli import cli
from mlx_adapters.config.fusing import FuseOptions
from mlx_adapters.config.quantization import Precision, Quantization
from mlx_adapters.errors import ConfigError, ExistsError, FormatError, IncompatibleError
from mlx_adapters.models.adapter import write_adapter
from mlx_adapters.models.dense import dense_weight, quantization_of
from mlx_adapters.models.layers import adaptable_layers, updated_weight
from mlx_adapters.models.loading import load_model, load_module
from mlx_adapters.sources import registry
from mlx_adapters.sources.bases import resolve_base
from mlx_adapters.system.machine import on_gpu


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_unquantized_fuse_is_exact(tiny_model, tmp_path, architecture, bits, kind):
    folder = tiny_model(architecture, bits=bits)
    adapter = visible_adapter(folder, kind)
    result = fuse(None, adapter, tmp_path / "out", quantization="none")
    assert result.quantization is None
    assert result.update_survival == pytest.approx(1, abs=1e-5)
    wanted = logits(folder, adapter)
    assert np.abs(wanted - logits(folder)).max() > 0.1
    np.testing.assert_allclose(logits(tmp_path / "out"), wanted, atol=2e-5)


@pytest.mark.parametrize("options", [FuseOptions(method="nearest", check=False), FuseOptions(calibration_rows=2)])
@pytest.mark.parametrize("quantization", ["none", Quantization(4, 32)])
def test_bits_per_weight_are_over_all_numbers_norms_too(tiny_model, tmp_path, quantization, options):
    folder = tiny_model("mamba")  # whose convolutions and states no bits are for
    result = fuse(folder, visible_adapter(folder), tmp_path / "out", quantization=quantization, options=options)
    numbers = sum(value.size for _, value in tree_flatten(load_as_mlx_lm_does(folder)[0].parameters()))
    assert result.bits_per_weight == 8 * result.size_bytes / numbers
    assert quantization != "none" or result.bits_per_weight == 32


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_layer_is_what_mlx_would_quantize(tiny_model, tmp_path, architecture, bits):
    folder = tiny_model(architecture)
    adapter = visible_adapter(folder, targets=None)
    result = fuse(folder, adapter, tmp_path / "out", quantization=Quantization(bits, 32))
    fused, _ = load_module(resolve_base(tmp_path / "out"))
    base, _ = load_module(resolve_base(folder))
    made = adaptable_layers(fused)
    for path, layer in adaptable_layers(base).items():
        weight = dense_weight(layer, mx.float32)
        if path in adapter.config.keys:
            weight = updated_weight(weight, *adapter.factors(path), adapter.config.scale)
        q = made[path]
        assert (q.bits, q.group_size) == ((8, 64) if path.endswith("mlp.gate") else (bits, 32))
        parts = mx.quantize(weight, group_size=q.group_size, bits=q.bits)
        for array, wanted in zip((made[path].weight, made[path].scales, made[path].biases), parts, strict=True):
            np.testing.assert_array_equal(np.array(array), np.array(wanted), err_msg=path)
    assert result.bits_per_weight < bits + 2 + 24 / 8


@pytest.mark.parametrize(
    "quantization", [Quantization(4, 32, "mxfp4"), Quantization(8, 32, "mxfp8"), Quantization(4, 16, "nvfp4")], ids=str
)
@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_float_modes_load_in_plain_mlx_lm(tiny_model, tmp_path, architecture, quantization):
    from mlx_lm.utils import load

    folder = tiny_model(architecture)
    adapter = visible_adapter(folder)
    fuse(folder, adapter, tmp_path / "out", quantization=quantization)
    module, tokenizer = load(str(tmp_path / "out"))
    plain = np.array(module(IDS).astype(mx.float32))[0]
    assert tokenizer.encode("SELECT title")
    ours = np.array(load_model(resolve_base(tmp_path / "out"), dense=False, dtype="float32").logits(IDS))[0]
    np.testing.assert_allclose(plain, ours, atol=1e-4)
    coarse = np.abs(plain - logits(folder, adapter)[0]).mean()
    assert coarse < 0.5 * np.abs(plain - logits(folder)[0]).mean() + 0.5


@pytest.mark.parametrize("architecture", ["llama", "qwen3_moe", "phi3"])
def test_keep_leaves_untouched_layers_bit_for_bit(tiny_model, tmp_path, architecture):
    folder = tiny_model(architecture, bits=4)
    module, config = load_module(resolve_base(folder))
    touched = next(path for path in adaptable_layers(module) if "o_proj" in path)
    adapter = visible_adapter(folder, targets=(touched,))
    assert len(adapter.config.keys) == 1
    result = fuse(folder, adapter, tmp_path / "out")
    fused, fused_config = load_module(resolve_base(tmp_path / "out"))
    before, after = dict(tree_flatten(module.parameters())), dict(tree_flatten(fused.parameters()))
    assert list(before) == list(after)
    changed = {n for n in before if not np.array_equal(np.array(before[n]), np.array(after[n]), equal_nan=True)}
    assert changed and all(name.startswith(touched + ".") for name in changed)
    for path, layer in adaptable_layers(fused).items():
        assert quantization_of(layer) == quantization_of(adaptable_layers(module)[path])
    default = {key: config["quantization"][key] for key in ("bits", "group_size")}
    assert default.items() <= fused_config["quantization"].items()
    assert [s.path for s in result.survival] == [touched]


def test_embeddings_tied_and_untied(tiny_model, tmp_path):
    for tied in (True, False):
        folder = tiny_model("llama", tied=tied)
        targets = ("embed_tokens",) if tied else ("embed_tokens", "lm_head")
        adapter = visible_adapter(folder, targets=targets)
        fuse(folder, adapter, tmp_path / f"out{tied}", quantization="none")
        np.testing.assert_allclose(logits(tmp_path / f"out{tied}"), logits(folder, adapter), atol=2e-5)


def test_several_adapters_are_added_exactly(tiny_model, tmp_path):
    folder = tiny_model("qwen3")
    first, second = visible_adapter(folder, seed=1), visible_adapter(folder, "dora", seed=2)
    fuse(folder, [first, second], tmp_path / "out", quantization="none", weights=[0.7, -0.3])
    base, _ = load_module(resolve_base(folder))
    fused, _ = load_module(resolve_base(tmp_path / "out"))
    made = adaptable_layers(fused)
    for path, layer in adaptable_layers(base).items():
        weight = np.array(layer.weight)
        wanted = weight.copy()
        for adapter, share in ((first, 0.7), (second, -0.3)):
            if path in adapter.config.keys:
                changed = updated_weight(layer.weight, *adapter.factors(path), adapter.config.scale)
                wanted += share * (np.array(changed) - weight)
        np.testing.assert_allclose(np.array(made[path].weight), wanted, atol=1e-6, err_msg=path)


def test_bfloat16_is_rounded_once(tiny_model, tmp_path):
    folder = tiny_model("llama", dtype="bfloat16")
    adapter = visible_adapter(folder)
    fuse(folder, adapter, tmp_path / "out", quantization="none")
    base, _ = load_module(resolve_base(folder))
    fused, _ = load_module(resolve_base(tmp_path / "out"))
    for path, layer in adaptable_layers(fused).items():
        weight = adaptable_layers(base)[path].weight
        if path in adapter.config.keys:
            weight = updated_weight(weight, *adapter.factors(path), adapter.config.scale).astype(mx.bfloat16)
        assert layer.weight.dtype == mx.bfloat16
        assert mx.array_equal(layer.weight, weight), path


def test_a_group_that_does_not_divide_leaves_the_layer_unquantized_and_says_so(tiny_model, tmp_path):
    folder = tiny_model("llama", intermediate_size=96)
    result = fuse(folder, visible_adapter(folder), tmp_path / "out", quantization=Quantization(4, 64))
    whole, *each = result.notes
    assert [note.split(":")[0] for note in each] == [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
    assert "96 inputs" in each[0] and "2 layers of" in whole
    assert np.isfinite(logits(tmp_path / "out")).all()


def test_shards(tiny_model, tmp_path, monkeypatch):
    from mlx_adapters.assembly import writing

    folder = tiny_model("llama")
    adapter = visible_adapter(folder)
    write = writing.write_weights
    monkeypatch.setattr("mlx_adapters.assembly.formats.write_weights", lambda f, u, e: write(f, u, e, limit=100_000))
    fuse(folder, adapter, tmp_path / "out", quantization="none")
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())["weight_map"]
    shards = sorted(path.name for path in (tmp_path / "out").glob("model-*.safetensors"))
    assert len(shards) > 2
    assert sorted(set(index.values())) == shards
    np.testing.assert_allclose(logits(tmp_path / "out"), logits(folder, adapter), atol=2e-5)


def test_overwrite_replaces_neither_the_base_nor_a_folder_of_other_things(tiny_model, tmp_path):
    folder, other = tiny_model("llama"), tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("years of work")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for out, message in ((folder, "other things"), (other, "other things")):
        with pytest.raises(ExistsError, match=message):
            fuse(folder, visible_adapter(folder), out, overwrite=True)
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert (other / "thesis.txt").exists()


def test_bad_input_leaves_nothing(tiny_model, tmp_path):
    folder, other = tiny_model("llama"), tiny_model("llama", seed=5)
    adapter = visible_adapter(folder)
    out = tmp_path / "out"
    key = adapter.config.keys[0]
    bad = adapter.weights | {f"{key}.lora_b": adapter.weights[f"{key}.lora_b"] * float("nan")}
    with pytest.raises(FormatError, match="NaN"):
        fuse(folder, adapter.with_weights(bad), out)
    with pytest.raises(IncompatibleError, match="other weights"):
        fuse(other, adapter, out)
    with pytest.raises(IncompatibleError, match="does not fit"):
        fuse(tiny_model("phi3"), adapter, out)
    with pytest.raises(ConfigError, match="weights"):
        fuse(folder, adapter, out, weights=[1, 2])
    with pytest.raises(ConfigError, match="no 7 bits"):
        Precision.of(7)
    with pytest.raises(ConfigError, match="no 6 bits"):
        Precision.spelled("6", None, "mxfp4")
    with pytest.raises(ConfigError, match="keep takes no group size") as caught:
        Precision.spelled("keep", None, "mxfp8")
    assert "--bits: 8" in caught.value.hint
    odd = tiny_model("llama", intermediate_size=160)
    with pytest.raises(ConfigError, match="No layer can be quantized") as caught:
        fuse(odd, visible_adapter(odd), out, quantization=Quantization(4, 128))
    assert caught.value.hint == "choose a smaller --group-size."
    narrow = tiny_model("llama", hidden_size=48, intermediate_size=80)  # and 32 is the smallest
    with pytest.raises(ConfigError, match="No layer can be quantized") as caught:
        fuse(narrow, visible_adapter(narrow), out, quantization=Quantization(4, 32, "mxfp4"))
    assert caught.value.hint == "leave --bits out: the layers stay as they are."
    assert list(tmp_path.glob("*out*")) == []
    fuse(folder, adapter, out, quantization="none")
    with pytest.raises(ExistsError):
        fuse(folder, adapter, out)
    assert not list(tmp_path.glob(".mlx-adapters-tmp-*"))


def test_layers_that_groups_do_not_fit_are_told_of_in_the_summary_and_the_result(tiny_model, tmp_path, home):
    folder = tiny_model("llama", num_hidden_layers=1)  # 64 wide, but for down_proj's 128 inputs
    write_adapter(visible_adapter(folder), home / "adapters" / "tiny")
    asked = ["fuse", "tiny", str(tmp_path / "out"), "--bits", "3", "--group-size", "128", "--method", "nearest"]
    run = CliRunner().invoke(cli, [*asked, "--no-check"])
    assert run.exit_code == 0, run.output
    plans = {path: layer.weight.size for path, layer in adaptable_layers(load_module(resolve_base(folder))[0]).items()}
    fits = next(size for path, size in plans.items() if path.endswith("down_proj"))
    share = (
        f"{len(plans) - 1} layers of {len(plans)} left unquantized, {1 - fits / sum(plans.values()):.0%} of the weights"
    )
    assert run.stdout.count(share) == 1 and f"Warning: {share}" in run.stderr
    notes = json.loads((tmp_path / "out" / "fuse_report.json").read_text())["notes"]
    assert notes[0].startswith(share) and len(notes) == len(plans)
    assert notes[1].endswith("its 64 inputs cannot be cut into groups of 128")


@pytest.mark.parametrize(
    ("bits", "options", "said"),
    [
        (None, FuseOptions(thorough=True, check=False), "No layer is rounded"),
        (None, FuseOptions(method="calibrated", check=False), "No layer is rounded"),
        (8, FuseOptions(thorough=True, check=False), "Layers are rounded to nearest"),
        (8, FuseOptions(thorough=False, check=False), None),
        (8, FuseOptions(check=False), None),
        (None, FuseOptions(check=False), None),
    ],
)
def test_calibration_that_is_asked_for_in_vain_is_told(tiny_model, tmp_path, bits, options, said):
    folder, events = tiny_model("llama", bits=bits), []
    made = fuse(folder, visible_adapter(folder), tmp_path / "out", options=options, on_event=events.append)
    warned = [event.text for event in events if getattr(event, "level", None) == "warning"]
    assert list(made.notes) == [text.removesuffix(".") for text in warned]
    assert len(warned) == (said is not None) and (said is None or warned[0].startswith(said))


def test_nan_and_inf_are_refused(tiny_model, tmp_path):
    folder, broken = tiny_model("llama"), tmp_path / "broken"
    shutil.copytree(folder, broken)
    weights = mx.load(str(folder / "model.safetensors"))
    adapter = visible_adapter(folder, targets=("model.layers.0.mlp.down_proj",))
    calibrated = FuseOptions(method="calibrated", calibration_rows=4, check_rows=4)
    for name, factor in (("0.mlp.down_proj", float("nan")), ("1.mlp.up_proj", float("nan")), ("0.mlp.up_proj", 1e38)):
        bad = {**weights, f"model.layers.{name}.weight": weights[f"model.layers.{name}.weight"] * factor}
        mx.save_safetensors(str(broken / "model.safetensors"), bad, metadata={"format": "mlx"})
        if factor != 1e38:
            with pytest.raises(FormatError, match=f"weight of 'model.layers.{name}' holds NaN"):
                fuse(broken, adapter, tmp_path / "out", quantization=4, any_base=True)
        with pytest.raises(FormatError, match="computes NaN or Inf"):
            fuse(broken, adapter, tmp_path / "out", quantization=4, any_base=True, options=calibrated)
    assert not list(tmp_path.glob("*out*")) and not list(tmp_path.glob(".mlx-adapters-tmp-*"))


@pytest.mark.parametrize(
    "name, factor",
    [("model.norm.weight", math.nan), ("model.layers.1.mlp.up_proj.scales", math.nan), ("model.norm.weight", 1e6)],
)
def test_nan_in_what_is_copied_is_refused_also_unchecked(name, factor, tiny_model, tmp_path):
    folder, broken = tiny_model("llama", bits=4), tmp_path / "broken"
    shutil.copytree(folder, broken)
    weights = mx.load(str(folder / "model.safetensors"))
    bad = weights | {name: weights[name] * mx.array(factor)}
    mx.save_safetensors(str(broken / "model.safetensors"), bad, metadata={"format": "mlx"})
    adapter = visible_adapter(folder, targets=("model.layers.0.mlp.down_proj",))
    unchecked = FuseOptions(method="nearest", check=False)
    with pytest.raises(FormatError, match=f"'{name}' holds NaN"):  # or what float16 has no number for
        fuse(broken, adapter, tmp_path / "out", any_base=True, dtype="float16", options=unchecked)
    assert not list(tmp_path.glob("*out*"))


def test_fuses_from_the_command_line(tiny_model, tmp_path, home):
    folder = tiny_model("llama", bits=4)
    write_adapter(visible_adapter(folder), home / "adapters" / "tiny")
    run = CliRunner().invoke(cli, ["fuse", "tiny", str(tmp_path / "out"), "--bits", "8", "--json"])
    assert run.exit_code == 0, run.output
    report = json.loads(run.stdout)
    assert report["quantization"] == {"bits": 8, "group_size": 64, "mode": "affine"}
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_survival_looks_at_some_rows_of_a_tall_layer_and_tells_the_same_on_a_gpu_too(monkeypatch):
    rng = np.random.default_rng(0)
    base, update, noise = (mx.array(rng.standard_normal((1024, 64)).astype(np.float32)) for _ in range(3))
    rows = base, base + 0.1 * update, base + 0.1 * update + 0.05 * noise
    whole, some = SurvivalSum(), SurvivalSum()
    whole.add(*rows)
    some.add(*(part[sample(1024)] for part in rows))
    assert rows[0][sample(1024)].shape[0] == 256 and sample(100) == slice(None, None, 1)
    assert some.result("x").cosine == pytest.approx(whole.result("x").cosine, rel=0.02)
    monkeypatch.setattr("mlx_adapters.assembly.survival.on_gpu", lambda: not on_gpu())
    other = SurvivalSum()
    other.add(*rows)
    assert astuple(other.result("x"))[1:] == pytest.approx(astuple(whole.result("x"))[1:], rel=1e-4)


@pytest.mark.parametrize("name", ["plain", "my [4bit] model", "what?"])
def test_a_folder_that_mlx_lm_reads_as_a_pattern_is_told(tiny_model, tmp_path, name):
    folder, told = tiny_model("llama"), []
    fuse(folder, visible_adapter(folder), tmp_path / name, on_event=lambda event: told.append(str(event)))
    assert any("as a pattern" in text for text in told) == (name != "plain")
    assert load_module(resolve_base(tmp_path / name))
    found = glob.glob(str(tmp_path / name / "model*.safetensors"))  # as mlx-lm looks for them
    assert bool(found) == ("[" not in name)


def test_a_mistyped_model_folder_is_named_with_the_one_that_was_meant(tiny_model, home, tmp_path, monkeypatch):
    """As a path, as a folder that could be a Hub id, and as a bare name."""
    folder = tiny_model("llama")
    registry.register(visible_adapter(folder), "sql")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "sql-8bit").symlink_to(folder)
    (tmp_path / "sql-8bit").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    for wrong in ("./out/sql-8bti", f"{tmp_path}/out/sql-8bti", "out/sql-8bti", "sql-8bti"):
        error = CliRunner().invoke(cli, ["fuse", "--check-only", wrong, "--adapter", "sql"]).exception
        assert f"'{wrong}'" in error.message
        assert error.hint.startswith(f"did you mean '{wrong.replace('bti', 'bit')}'?")
    (tmp_path / "empty").mkdir()
    error = CliRunner().invoke(cli, ["fuse", "--check-only", "./empty", "--adapter", "sql"]).exception
    assert "no config.json in it" in error.message and "a model is 'demo'" in error.hint


def test_refused_settings_say_what_to_do(tiny_model, tmp_path):
    folder = tiny_model("llama")
    adapter = visible_adapter(folder)
    for options in (
        {"weights": [1, 2]},
        {"quantization": 4, "options": FuseOptions(format="hf")},
        {"options": FuseOptions(format="gguf", max_kl=0.1)},
    ):
        with pytest.raises(ConfigError) as caught:
            fuse(folder, adapter, tmp_path / "out", **options)
        assert "--" in caught.value.hint


def test_a_model_that_asks_for_bits_alone_gets_mlx_groups(tiny_model, tmp_path):
    """rwkv7's own rule for what lies in lists: 8 bits, without a group size."""
    base = build_model(tmp_path / "base", "rwkv7", a_low_rank_dim=64)
    fuse(
        base,
        visible_adapter(base),
        tmp_path / "out",
        quantization=4,
        options=FuseOptions(method="nearest", check=False),
    )
    module, config = load_as_mlx_lm_does(tmp_path / "out")
    path = "model.layers.0.attn.a_lora.lora.2"
    assert config["quantization"][path] == {"bits": 8, "group_size": 64, "mode": "affine"}
    layer = module.layers[0].attn.a_lora.lora[2]
    assert (layer.bits, layer.group_size) == (8, 64)
