"""Full fine-tuning: a model's own weights are trained, and what comes of it is a model like any other."""

import os

import mlx.core as mx
import mlx_lm
import pytest
from mlx.utils import tree_flatten

from mlx_adapters import (
    AdapterError,
    FormatError,
    LoraConfig,
    Quantization,
    TrainConfig,
    describe,
    estimate,
    extract,
    fuse,
    fuse_again,
    list_adapters,
    load_adapter,
    load_model,
    make_card,
    pack,
    train,
    verify,
)
from mlx_adapters.evaluation.variants import parse_variants
from mlx_adapters.fusion.result import html
from mlx_adapters.models.adapter import template_of
from mlx_adapters.sources.bases import resolve_base
from mlx_adapters.storage import files

FULL = LoraConfig(type="full", num_layers=1)
SHORT = TrainConfig(iterations=3, batch_size=2, learning_rate=1e-3, eval_every=1, save_every=1, report_every=1)
ROWS = {
    split: [{"prompt": f"{i} and {i}?", "completion": f"{i + i}."} for i in range(9)] for split in ("train", "valid")
}
TOKENS = mx.array([[5, 6, 7, 8]])


@pytest.fixture
def base(tiny_model):
    return tiny_model(architecture="llama")


def logits(model):
    return load_model(model).module(TOKENS)


def test_what_was_trained_is_a_model_by_its_name(base, home, tmp_path):
    """By name, by checkpoint, by folder, in plain mlx-lm, and written as a model of its own: the same function."""
    run = train(base, ROWS, name="whole", lora=FULL, training=SHORT)
    assert run.validation_losses[-1][1] < run.validation_losses[0][1]
    own = logits(run)
    assert mx.abs(own - logits(base)).max() > 1e-3
    assert mx.array_equal(logits("whole@3"), own) and not mx.array_equal(logits("whole@1"), own)
    assert mx.array_equal(logits(run.folder), own)
    module, _ = mlx_lm.load(str(base), adapter_path=str(run.folder))
    assert mx.allclose(module(TOKENS), own, atol=1e-5)
    assert mx.array_equal(logits(fuse(None, "whole", tmp_path / "out")), own)
    assert mx.allclose(logits(fuse(None, run, tmp_path / "eight", quantization=8)), own, atol=0.1)
    (entry,) = list_adapters()
    assert (entry.type, entry.rank, entry.problem) == ("full", None, None)
    with pytest.raises(AdapterError, match="full fine-tune") as error:
        load_adapter("whole")
    assert "--base" in error.value.hint


def test_what_looks_at_adapters_knows_it(base, home, tmp_path):
    train(base, ROWS, name="whole", lora=FULL, training=SHORT)
    for given in ("whole", resolve_base("whole")):
        for refused in (make_card, lambda one: pack(one, tmp_path / "whole.tar.gz")):
            with pytest.raises(AdapterError, match=r"^'whole' holds a full fine-tune"):
                refused(given)
    assert verify("whole").sound and [check.what for check in verify("whole@2").checks][-1] == "base"
    details = describe("whole")
    assert (details.type, details.layers, len(details.checkpoints)) == ("full", (), 3) and details.parameters > 1000
    (variant,) = parse_variants(["whole@2"])
    assert (variant.base, variant.adapter) == ("whole@2", None)
    weights = home / "adapters" / "whole" / "0000002_adapters.safetensors"
    mx.save_safetensors(str(weights), {name: array * mx.nan for name, array in mx.load(str(weights)).items()})
    assert {check.what for check in verify("whole").problems} >= {"tensors of @2"}
    with pytest.raises(AdapterError, match="NaN"):
        load_model("whole@2")


def test_an_adapter_is_trained_on_it_and_made_of_it(base, home, tmp_path):
    train(base, ROWS, name="whole", lora=FULL, training=SHORT)
    adapter = train("whole", ROWS, name="on-it", training=SHORT)
    own = load_model("whole", "on-it").module(TOKENS)
    assert not mx.array_equal(own, logits("whole"))
    assert mx.allclose(logits(fuse(None, adapter, tmp_path / "out")), own, atol=1e-5)
    made = extract("whole", base, rank="auto", energy=0.9999)
    assert all("layers.1." in key for key in made.config.keys)
    assert any("norm" in name for name in made.metadata["extract"]["left_out"])
    again = train("whole", ROWS, name="again", lora=FULL, training=SHORT)
    assert not mx.array_equal(logits(again), logits("whole"))
    train(base, ROWS, name="whole", lora=FULL, training=SHORT, overwrite=True, objective="sft")
    with pytest.raises(AdapterError, match="trained on other weights"):
        train(base, ROWS, name="whole", lora=FULL, training=TrainConfig(iterations=1, seed=1), overwrite=True)
        load_model("whole", "on-it")


def test_one_of_another_is_that_one_and_none_of_itself(base, home):
    train(base, ROWS, name="first", lora=FULL, training=SHORT)
    train("first", ROWS, name="second", lora=LoraConfig(type="full", target_modules=("norm",)), training=SHORT)
    assert mx.array_equal(load_model("second").module.model.layers[1].mlp.up_proj.weight, up_of("first"))
    with pytest.raises(AdapterError, match="would start from"):
        train("first", ROWS, name="first", lora=FULL, training=SHORT, overwrite=True)
    train("second", ROWS, name="first", lora=FULL, training=SHORT, overwrite=True)
    with pytest.raises(AdapterError, match="of itself"):
        load_model("first")


def up_of(model):
    return load_model(model).module.model.layers[1].mlp.up_proj.weight


def test_it_is_asked_in_the_template_that_it_was_trained_with(base, home, tmp_path):
    template = "{% for m in messages %}<{{ m.content }}{{ mark }}>{% endfor %}"
    once = {"iterations": 1, "batch_size": 2}
    seen = {"chat_template": template, "chat_template_args": {"mark": "!"}}
    train(base, ROWS, name="whole", lora=FULL, training=TrainConfig(**once, **seen))
    out = fuse(None, "whole", tmp_path / "out").folder
    assert (out / "chat_template.jinja").read_text() == template
    for model in map(load_model, ("whole", out)):
        assert model.tokenizer.decode(model.encode("hi")) == "<hi!>"
    run = train("whole", ROWS, name="on-it", training=TrainConfig(**once))
    assert template_of(load_adapter(run)).chat_template == template


def test_its_weights_are_looked_at_once_until_they_change(base, home, monkeypatch):
    run = train(base, ROWS, name="whole", lora=FULL, training=TrainConfig(iterations=1, batch_size=2))
    read, real = [], files.sha256
    monkeypatch.setattr(files, "sha256", lambda path: read.append(path) or real(path))
    first, again = resolve_base("whole"), resolve_base("whole")
    assert first.fingerprint == again.fingerprint and len(read) == 1
    path = run.folder / "adapters.safetensors"
    weights = mx.load(str(path))
    name = next(iter(weights))
    for other in (weights[name] + 1, weights[name] + mx.nan):
        stat = path.stat()
        mx.save_safetensors(str(path.with_name("new.safetensors")), weights | {name: other})
        path.with_name("new.safetensors").replace(path)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        if mx.isnan(other).any():
            for _ in range(2):
                with pytest.raises(FormatError, match="NaN or Inf"):
                    resolve_base("whole")
        else:
            assert resolve_base("whole").fingerprint != first.fingerprint and len(read) == 2


def test_its_own_rows_calibrate_and_judge_it_and_it_is_called_a_model(base, home, tmp_path):
    line = "the cat sat on the mat and looked at the rain {} times, "
    data = {split: [{"text": line.format(f"{split} {i}") * 6} for i in range(12)] for split in ("train", "valid")}
    train(base, data, name="whole", lora=FULL, training=TrainConfig(iterations=1, batch_size=2))
    fused = fuse(None, "whole", tmp_path / "out", quantization=4)
    assert (fused.text["source"], fused.text["why"], fused.method) == ("Python", None, "calibrated")
    assert fused.fidelity.base_kl is None and "the model: same token" in fused.fidelity.verdict
    page = html(fused)
    assert "KL(model before rounding ‖ model)" in str(make_card(fused.folder))
    assert "from the model before rounding" in page and "adapter model" not in page and "0 layers" not in page
    again = fuse_again(tmp_path / "out", tmp_path / "again")
    assert again.identical and again.text["source"] == fused.text["source"]


def test_the_last_blocks_alone_are_trained_packed_ones_as_dense_ones(tiny_model, home):
    base = tiny_model(architecture="llama", bits=4, group_size=32)
    train(base, ROWS, name="whole", lora=FULL, training=SHORT)
    before, after = (dict(tree_flatten(load_model(m, dense=False).module.parameters())) for m in (base, "whole"))
    changed = {name for name, array in after.items() if name not in before or not mx.array_equal(array, before[name])}
    assert changed and all(".layers.1." in name for name in changed)
    assert {name.rpartition(".")[2] for name in changed} == {"weight"}
    assert "model.layers.1.mlp.up_proj.scales" in before and "model.layers.1.mlp.up_proj.scales" not in after


def test_weights_are_float32_whatever_the_model_computes_in(base, home):
    """Steps of 1e-6 are less than bfloat16 can tell from none."""
    training = TrainConfig(iterations=2, batch_size=2, learning_rate=1e-6, dtype="bfloat16")
    run = train(base, ROWS, name="whole", lora=FULL, training=training)
    weights = mx.load(str(run.folder / "adapters.safetensors"))
    own = dict(tree_flatten(load_model(base, dtype="bfloat16").module.parameters()))
    assert all(array.dtype == mx.float32 for array in weights.values())
    moved = mx.concatenate([mx.abs(weights[name] - own[name]).flatten() for name in weights])
    assert 0 < moved.max() < 1e-5


def test_a_forecast_counts_the_weights_their_gradients_and_the_optimizer(base):
    parts = estimate(base, ROWS, lora=FULL, training=SHORT, timed=False).parts
    trained = sum(a.size for n, a in tree_flatten(load_model(base).module.parameters()) if ".layers.1." in n)
    assert parts.adapter_bytes == parts.gradients_bytes == 4 * trained
    assert 8 * trained <= parts.optimizer_bytes < 8.1 * trained


@pytest.mark.parametrize(
    "lora, training, why",
    [
        ({"rank": 4}, {}, "no rank"),
        ({"dropout": 0.1}, {}, "no rank, scale, dropout"),
        ({}, {"fuse_aware": Quantization(4, 32)}, "through a rounding"),
        ({}, {"lora_plus_ratio": 2.0}, "no lora_b"),
    ],
)
def test_what_belongs_to_adapters_is_refused(base, home, lora, training, why):
    with pytest.raises(AdapterError, match=why):
        train(base, ROWS, name="whole", lora=LoraConfig(type="full", **lora), training=TrainConfig(**training))
    assert not (home / "adapters" / "whole").exists()
