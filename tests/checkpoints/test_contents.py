"""Which files of a model's folder belong to it: all but those that there is a reason against."""

import json
import os

import mlx_lm
import pytest
from helpers.adapters import make_adapter

import mlx_adapters as ma
from mlx_adapters.checkpoints import contents
from mlx_adapters.models.adapter import write_adapter
from mlx_adapters.rows import files

BELONGING = [
    "LICENSE",
    "LICENSE-APACHE",
    "NOTICE",
    "Notice",
    "USE_POLICY",
    "USE_POLICY.md",
    "COPYING",
    "additional_chat_templates/tool_use.jinja",
    "chat_template.json",
    "chat_template.jinja",
    "tokenizer.model.v3",
    "tokenizer.model",
    "tokenizer.jsonl",
    "tekken.json",
    "vocab.bpe",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "generation_config.json",
    "modeling_own.py",
    "code/layers/attention.py",
    "1_Pooling/config.json",
    "params.json",
    "something nobody thought of",
]
STAYING = {
    "README.md": "made anew for each model",
    "fuse_recipe.json": "made anew for each model",
    "adapter_config.json": "made anew for each model",
    "hf_quant_config.json": "made anew for each model",
    "quantize_config.json": "made anew for each model",
    "model.safetensors": "weights that mlx-lm does not load",
    "pytorch_model.bin": "weights that mlx-lm does not load",
    "model-Q4_K_M.gguf": "weights that mlx-lm does not load",
    "consolidated.00.pth": "weights that mlx-lm does not load",
    "weights.npz": "weights that mlx-lm does not load",
    "model.safetensors.index.json": "weights that mlx-lm does not load",
    "pytorch_model.bin.index.json": "weights that mlx-lm does not load",
    "original/params.json": "of another model",
    "original/consolidated.00.pth": "of another model",
    "onnx/config.json": "of another model",
    "onnx/model.onnx_data": "of another model",
    "train.jsonl": "data",
    "rows.parquet": "data",
    "optimizer.pt": "the log or state of a training",
    "trainer_state.json": "the log or state of a training",
    "runs/events.out.tfevents.17": "the log or state of a training",
    "run.log": "the log or state of a training",
    "model.tar.gz": "an archive",
    ".gitattributes": "hidden",
    ".cache/huggingface/x": "hidden",
    "Thumbs.db": "hidden",
    "__pycache__/modeling_own.pyc": "hidden",
}


def test_each_file_belongs_or_has_a_reason():
    assert contents.sorted_out([*BELONGING, *STAYING]) == dict.fromkeys(BELONGING) | STAYING
    repository = [*BELONGING, *STAYING, "config.json", "model-00001-of-00002.safetensors", "other.safetensors"]
    weights = {"config.json", "model-00001-of-00002.safetensors", "other.safetensors", "model.safetensors"}
    assert set(contents.belongs(repository)) == {*BELONGING, *weights, "model.safetensors.index.json"}


def test_rows_in_any_form_that_is_read_stay_behind():
    for ending in files.READERS.keys() - {".json"}:  # which configs are, too
        assert contents.why_not(f"train{ending}") == "data"


def test_links_are_followed_and_never_in_circles(tmp_path):
    folder, elsewhere = tmp_path / "model", tmp_path / "elsewhere"
    for place in (folder, elsewhere):
        place.mkdir()
    (elsewhere / "tool_use.jinja").write_text("T")
    (folder / "additional_chat_templates").symlink_to(elsewhere)
    (folder / "LICENSE").symlink_to(elsewhere / "tool_use.jinja")
    (folder / "again").symlink_to(folder)
    (folder / "gone").symlink_to(tmp_path / "nothing")
    os.mkfifo(folder / "pipe")
    assert contents.companions(folder) == ["LICENSE", "additional_chat_templates/tool_use.jinja"]


@pytest.fixture
def furnished(tiny_model, tmp_path):
    """A base with all that may lie beside the weights, of which the tokenizer reads its two templates."""
    folder = tmp_path / "base"
    folder.mkdir()
    for path in tiny_model("llama", bits=4).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    for name in {*BELONGING, *STAYING} - {path.name for path in folder.iterdir()}:
        if name not in ("adapter_config.json", "model.safetensors.index.json", "tokenizer.model", "tekken.json"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text("{}" if name.endswith(".json") else f"of {name}")
    return folder


@pytest.mark.parametrize("form", ["mlx", "hf"])
def test_a_fused_model_has_all_that_belonged_to_its_base(furnished, tmp_path, form):
    out = tmp_path / "out"
    adapter = make_adapter(furnished, keys=("model.layers.1.self_attn.q_proj",))
    options = ma.FuseOptions(method="nearest", check=False, format=form)
    ma.fuse(furnished, adapter, out, options=options, quantization="none" if form == "hf" else "keep")
    there = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    ours = {
        "config.json",
        "model.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert there == ({*BELONGING} - {"tokenizer.model", "tekken.json"}) | ours | {
        "fuse_recipe.json",
        "fuse_report.json",
    }
    assert (out / "NOTICE").read_text() == "of NOTICE"
    templates = mlx_lm.load(str(furnished))[1].chat_template
    assert set(templates) == {"default", "tool_use"} and mlx_lm.load(str(out))[1].chat_template == templates
    write_adapter(adapter, tmp_path / "adapter")
    ma.fuse(out, tmp_path / "adapter", tmp_path / "twice", options=options, any_base=True)  # and once more
    assert (tmp_path / "twice" / "additional_chat_templates" / "tool_use.jinja").is_file()


def test_a_packed_model_keeps_its_licence_and_its_templates(furnished, tmp_path):
    events = []
    packed = ma.pack(str(furnished), tmp_path / "base.tar.gz", on_event=events.append)
    assert ma.pack(str(furnished), tmp_path / "base.tar.gz", overwrite=True).sha256 == packed.sha256
    for overwrite in (False, True):
        out = ma.add(packed.path, out=tmp_path / "out", overwrite=overwrite).folder
    for name in ("LICENSE", "USE_POLICY", "tokenizer.model.v3", "additional_chat_templates/tool_use.jinja"):
        assert (out / name).read_bytes() == (furnished / name).read_bytes()
    (told,) = [event.text for event in events if "left out" in getattr(event, "text", "")]
    assert "code/layers/attention.py" in told and "modeling_own.py" in told
