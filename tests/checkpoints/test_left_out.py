"""What mlx-lm leaves out of a model is handed on: vision towers, layers that predict further tokens."""

import json
from pathlib import Path

import mlx.core as mx
import pytest
from helpers.fusing import IDS, visible_adapter
from helpers.tiny_models import build_model
from mlx_lm.utils import load_model as load_as_mlx_lm_does

from mlx_adapters.checkpoints.left_out import left_out
from mlx_adapters.config.fusing import FuseOptions
from mlx_adapters.fusion.fuse import fuse
from mlx_adapters.fusion.recipe import read_recipe
from mlx_adapters.models.loading import load_model
from mlx_adapters.publishing import staging
from mlx_adapters.publishing.subject import read_subject
from mlx_adapters.sources.bases import resolve_base
from mlx_adapters.storage import files, tensor_files

VISION = {
    "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight": (32, 32),
    "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.bias": (32,),
    "multi_modal_projector.mm_input_projection_weight": (32, 64),
}
NEAREST = FuseOptions(method="nearest", check=False)


def with_tensors(folder: Path, shapes: dict, packed: tuple[str, ...] = ()) -> Path:
    """The model folder with more tensors in its file, those of the modules in `packed` quantized."""
    weights = mx.load(str(folder / "model.safetensors"))
    for i, (name, shape) in enumerate(shapes.items()):
        weights[name] = mx.random.normal(shape, key=mx.random.key(i)).astype(mx.bfloat16)
    for path in packed:
        parts = mx.quantize(weights[f"{path}.weight"], 32, 4)
        weights |= dict(zip((f"{path}.weight", f"{path}.scales", f"{path}.biases"), parts, strict=True))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    return folder


def all_tensors(folder: Path) -> dict[str, mx.array]:
    return {name: array for path in folder.glob("*.safetensors") for name, array in mx.load(str(path)).items()}


@pytest.mark.parametrize("architecture", ["gemma3", "kimi_vl"])
@pytest.mark.parametrize("asked", ["keep", "none", 8])
def test_a_vision_tower_is_handed_on_as_it_is(architecture, asked, tmp_path):
    base = with_tensors(build_model(tmp_path / "base", architecture, bits=4, dtype="bfloat16"), VISION)
    files.write_json(base / "preprocessor_config.json", {"size": 32})
    before, adapter = all_tensors(base), visible_adapter(base)
    plain = build_model(tmp_path / "plain", architecture, bits=4, dtype="bfloat16")
    result = fuse(base, adapter, tmp_path / "out", quantization=asked, options=NEAREST)
    alone = fuse(plain, adapter, tmp_path / "alone", quantization=asked, options=NEAREST, any_base=True)
    after = all_tensors(tmp_path / "out")
    assert all(mx.array_equal(after[name], before[name]) and after[name].dtype == mx.bfloat16 for name in VISION)
    own = {name: array for name, array in after.items() if name not in VISION}
    assert own.keys() == all_tensors(tmp_path / "alone").keys()
    assert [note for note in result.notes if note not in alone.notes] == [
        "3 tensors (multi_modal_projector, vision_tower) copied as in the base; mlx-lm does not use them"
    ]
    assert result.size_bytes == sum(array.nbytes for array in after.values())
    assert result.bits_per_weight == alone.bits_per_weight
    index = files.read_json(tmp_path / "out" / "model.safetensors.index.json")["weight_map"]
    assert index.keys() == after.keys() and {index[name] for name in VISION} == {"other.safetensors"}
    assert files.read_json(tmp_path / "out" / "preprocessor_config.json") == {"size": 32}
    assert "vision_config" in files.read_json(tmp_path / "out" / "config.json")
    load_as_mlx_lm_does(tmp_path / "out")
    assert mx.array_equal(
        load_model(resolve_base(tmp_path / "out")).logits(IDS), load_model(resolve_base(tmp_path / "alone")).logits(IDS)
    )


def test_what_was_handed_on_is_handed_on_again(tmp_path):
    base = with_tensors(build_model(tmp_path / "base", "gemma3"), VISION)
    fuse(base, visible_adapter(base), tmp_path / "once", options=NEAREST)
    fuse(tmp_path / "once", visible_adapter(tmp_path / "once"), tmp_path / "twice", options=NEAREST)
    before, after = all_tensors(base), all_tensors(tmp_path / "twice")
    assert all(mx.array_equal(after[name], before[name]) for name in VISION)


@pytest.mark.parametrize(("asked", "bits"), [("keep", 4), (8, 8), ("none", 4)])
def test_how_the_tower_is_packed_stays_known(asked, bits, tmp_path):
    path = "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj"
    base = with_tensors(build_model(tmp_path / "base", "gemma3", bits=4), VISION, packed=(path,))
    fuse(base, visible_adapter(base), tmp_path / "out", quantization=asked, options=NEAREST)
    settings = files.read_json(tmp_path / "out" / "config.json")["quantization"]
    assert settings["bits"] == bits
    packing = settings.get(path, settings)
    assert (packing["bits"], packing["group_size"], packing["mode"]) == (4, 32, "affine")
    load_as_mlx_lm_does(tmp_path / "out")
    assert {f"{path}.scales", f"{path}.biases"} <= all_tensors(tmp_path / "out").keys()


def test_layers_for_further_tokens_are_handed_on(tmp_path):
    """From files that only the index names; what is not there is named."""
    mtp = {"mtp.fc.weight": (64, 128), "mtp.layers.0.mlp.up_proj.weight": (64, 64)}
    base = build_model(tmp_path / "base", "llama", tied=False)
    names = tensor_files.stored_tensors(base / "model.safetensors")
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, "model.safetensors")}
    mx.save_safetensors(str(base / "mtp.safetensors"), {name: mx.random.normal(shape) for name, shape in mtp.items()})
    index["weight_map"] |= dict.fromkeys(mtp, "mtp.safetensors") | {"mtp.norm.weight": "elsewhere.safetensors"}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    result = fuse(base, visible_adapter(base), tmp_path / "out", options=NEAREST)
    assert set(mtp) == set(mx.load(str(tmp_path / "out" / "other.safetensors")))
    assert any("1 tensor (mtp) left out" in note for note in result.notes)


def test_tensors_that_are_stacked_split_or_renamed_are_not_left_out(tmp_path):
    """Experts one by one, as Hugging Face has them, and a tied head that is there all the same."""
    base = resolve_base(build_model(tmp_path / "base", "qwen3_moe", tied=True))
    weights = mx.load(str(base.folder / "model.safetensors"))
    for name in [name for name in weights if "switch_mlp" in name]:
        stacked = weights.pop(name)
        for e in range(len(stacked)):
            weights[name.replace("switch_mlp", f"experts.{e}")] = stacked[e]
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    mx.save_safetensors(str(base.folder / "model.safetensors"), weights)
    assert left_out(resolve_base(base.folder)) == ({}, [])
    weights["lm_head.weight"] = weights["lm_head.weight"] + 1
    mx.save_safetensors(str(base.folder / "model.safetensors"), weights)
    assert set(left_out(resolve_base(base.folder))[0]) == {"lm_head.weight"}


def test_another_format_says_what_it_cannot_hold(tmp_path):
    base = with_tensors(build_model(tmp_path / "base", "llama", tied=True), {"lm_head.weight": (512, 64)})
    options = FuseOptions(method="nearest", check=False, format="hf")
    result = fuse(base, visible_adapter(base), tmp_path / "out", quantization="none", options=options)
    assert result.notes == ("1 tensor (lm_head) left out: the format 'hf' has no place for them",)


@pytest.mark.parametrize("architecture", ["llama", "qwen3_moe", "gpt2", "mamba", "deepseek_v3"])
def test_an_ordinary_model_has_nothing_left_out(architecture, tiny_model, tmp_path):
    base = tiny_model(architecture)
    fuse(base, visible_adapter(base), tmp_path / "out", options=NEAREST)
    assert [path.name for path in (tmp_path / "out").glob("*.safetensors")] == ["model.safetensors"]


def test_the_file_is_published_hashed_and_replaced_with_the_model(tmp_path):
    base = with_tensors(build_model(tmp_path / "base", "gemma3"), VISION)
    files.write_json(base / "video_preprocessor_config.json", {"size": 32})
    for overwrite in (False, True):
        fuse(base, visible_adapter(base), tmp_path / "out", options=NEAREST, overwrite=overwrite)
    assert {"other.safetensors", "model.safetensors"} == set(read_recipe(tmp_path / "out").weights_sha256)
    subject = read_subject(tmp_path / "out")
    staging.check(subject)
    assert {"other.safetensors", "video_preprocessor_config.json"} <= set(subject.sources) and not subject.left_out


def test_an_index_of_files_that_were_before_lacks_nothing(tmp_path):
    base = build_model(tmp_path / "base", "llama")
    names = mx.load(str(base / "model.safetensors"))
    index = {"weight_map": dict.fromkeys(names, "model-00001-of-00002.safetensors") | {"mtp.weight": "mtp.safetensors"}}
    files.write_json(base / "model.safetensors.index.json", index)
    assert left_out(resolve_base(base)) == ({}, ["mtp.weight"])
