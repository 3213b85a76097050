"""A PEFT adapter on a vocabulary that was resized before its training: the fused model has PEFT's tokens and logits."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import pytest
from helpers.peft import FIXTURES, case

from mlx_adapters.adapters.peft_import import import_peft
from mlx_adapters.config.fusing import FuseOptions
from mlx_adapters.errors import FormatError, IncompatibleError
from mlx_adapters.events import Note
from mlx_adapters.fusion.peft import fuse_peft
from mlx_adapters.models.loading import load_model, load_tokenizer_of
from mlx_adapters.sources.bases import resolve_base
from mlx_adapters.storage import files, tensor_files

RESIZED = sorted(path.parent for path in FIXTURES.glob("*/resized/*/adapter_config.json"))
ROWS = 64
QUIET = FuseOptions(method="nearest", check=False)


def expected(folder: Path) -> tuple[mx.array, mx.array]:
    saved = mx.load(str(folder.parent / "logits.safetensors"))
    return saved[f"{folder.name}/ids"], saved[folder.name]


def base_of(folder: Path) -> Path:
    return folder.parents[1] / "base"


def fused(folder: Path, out: Path, base: Path | None = None, **options):
    fuse_peft(folder, out, base=base or base_of(folder), resize=True, options=QUIET, **options)
    return load_model(resolve_base(out))


@pytest.mark.parametrize("folder", RESIZED, ids=case)
def test_the_fused_model_has_pefts_tokens_and_logits(folder, tmp_path):
    ids, wanted = expected(folder)
    logits = fused(folder, tmp_path / "out").logits(ids)
    known = ROWS if folder.name == "input" else wanted.shape[-1]  # PEFT does not save the head there
    assert logits.shape == wanted.shape
    assert mx.abs(logits - wanted)[..., :known].max().item() < 1e-4
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == wanted.shape[-1]


@pytest.mark.parametrize("folder", RESIZED, ids=case)
def test_without_being_asked_nothing_is_resized(folder, tmp_path, home):
    base, rows = base_of(folder), expected(folder)[1].shape[-1]
    for take in (
        lambda: fuse_peft(folder, tmp_path / "out", base=base, options=QUIET),
        lambda: import_peft(folder, base=base, name="it"),
    ):
        with pytest.raises(
            Exception, match=rf"for {rows} tokens.*has {ROWS} \(a resized vocabulary\)|modules_to_save|single tokens"
        ) as caught:
            take()
        assert "--resize" in caught.value.hint or "--from-peft" in caught.value.hint
    assert not (tmp_path / "out").exists() and not (home / "adapters").exists()


def test_the_tokenizer_beside_the_adapter_comes_along(tmp_path):
    folder = FIXTURES / "llama" / "resized" / "to-save"
    events = []
    model = fused(folder, tmp_path / "out", on_event=events.append)
    tokenizer = load_tokenizer_of(model.base)
    assert tokenizer.encode("w5 <new2>", add_special_tokens=False)[-2:] == [5, ROWS + 2]
    assert [type(event).__name__ for event in events if isinstance(event, Note)] == ["Note"]
    assert "67 tokens, not 64" in events[0].text and "beside the adapter" in events[0].text


@pytest.mark.parametrize("own", [None, "settings", "file"])
@pytest.mark.parametrize("bases", ["settings", "file"])
def test_the_tokenizer_brings_its_chat_template_or_keeps_the_bases(own, bases, tmp_path):
    """transformers 4 has it among the settings, transformers 5 in a file of its own."""

    def put(folder: Path, place: str | None, text: str) -> Path:
        if place == "file":
            (folder / "chat_template.jinja").write_text(text)
        elif place == "settings":
            path = folder / "tokenizer_config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": text}))
        return folder

    case = FIXTURES / "llama" / "resized" / "to-save"
    folder = put(Path(shutil.copytree(case, tmp_path / "peft")), own, "{{ 'own' }}")
    base = put(Path(shutil.copytree(base_of(case), tmp_path / "base")), bases, "{{ 'base' }}")
    tokenizer = load_tokenizer_of(fused(folder, tmp_path / "out", base).base)
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    assert rendered == ("own" if own else "base")


@pytest.mark.parametrize("format", ["mlx", "hf"])
def test_a_format_has_the_rows_and_the_config(format, tmp_path):
    folder = FIXTURES / "qwen2" / "resized" / "embedding"
    options = FuseOptions(method="nearest", check=False, format=format)
    fuse_peft(folder, tmp_path / "out", base=base_of(folder), resize=True, quantization="none", options=options)
    weights = mx.load(str(tmp_path / "out" / "model.safetensors"))
    assert weights["model.embed_tokens.weight"].shape[0] == weights["lm_head.weight"].shape[0] == 67
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 67


def adapter_on(base: Path, folder: Path, rows: int) -> Path:
    """An adapter of q_proj on the base with an embedding of `rows` rows, as PEFT saves it, without a tokenizer."""
    weights = mx.load(str(base / "model.safetensors"))
    embedding = weights["model.embed_tokens.weight"]
    more = mx.random.normal((max(rows - embedding.shape[0], 0), embedding.shape[1]), key=mx.random.key(1))
    width = weights["model.layers.0.self_attn.q_proj.weight"].shape
    tensors = {
        "base_model.model.model.embed_tokens.weight": mx.concatenate([embedding, more])[:rows],
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": mx.ones((2, width[1])) * 0.01,
        "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight": mx.ones((width[0], 2)) * 0.01,
    }
    tensor_files.write_safetensors(folder / "adapter_model.safetensors", tensors)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"], "layers_to_transform": [0]}
    files.write_json(folder / "adapter_config.json", config)
    return folder


def test_a_quantized_base_keeps_its_codes_and_the_new_rows_are_packed_like_them(tiny_model, tmp_path):
    plain, base = tiny_model("qwen2"), tiny_model("qwen2", bits=4)
    before = mx.load(str(base / "model.safetensors"))
    rows = before["model.embed_tokens.weight"].shape[0]
    folder = adapter_on(plain, tmp_path / "peft", rows + 2)
    tensors = mx.load(str(folder / "adapter_model.safetensors"))
    whole = tensors.pop("base_model.model.model.embed_tokens.weight")
    tensors["base_model.model.model.embed_tokens.base_layer.weight"] = whole
    mx.eval(tensors)
    tensor_files.write_safetensors(folder / "adapter_model.safetensors", tensors)
    said = []
    model = fused(folder, tmp_path / "out", base, on_event=said.append)
    after = mx.load(str(tmp_path / "out" / "model.safetensors"))
    for leaf in ("weight", "scales", "biases"):
        own = after[f"model.embed_tokens.{leaf}"]
        assert own.shape[0] == rows + 2 and mx.array_equal(own[:rows], before[f"model.embed_tokens.{leaf}"])
    packed = [after[f"model.embed_tokens.{leaf}"][rows:] for leaf in ("weight", "scales", "biases")]
    near = mx.dequantize(*packed, group_size=model.base.quantization.group_size, bits=4)
    assert mx.abs(near - whole[rows:]).max().item() < 0.3
    assert any("knows nothing of the new tokens" in event.text for event in said if isinstance(event, Note))


def test_rows_that_the_adapter_does_not_hold_are_the_mean_of_the_others(tmp_path):
    folder = FIXTURES / "llama" / "resized" / "input"
    said = []
    fused(folder, tmp_path / "out", on_event=said.append)
    weights = mx.load(str(tmp_path / "out" / "model.safetensors"))
    head = weights["lm_head.weight"]
    assert mx.allclose(head[ROWS:], mx.broadcast_to(head[:ROWS].mean(axis=0), (2, 32)), atol=1e-6)
    assert any("does not hold the new tokens' rows of 'lm_head'" in event.text for event in said)


def test_an_adapter_of_fewer_tokens_is_imported_where_it_is_asked_for():
    """Resizing to the tokenizer's length cuts rows that Qwen's bases have to spare."""
    for name in ("fewer", "fewer-attention"):
        folder = FIXTURES / "llama" / "resized" / name
        ids, wanted = expected(folder)
        adapter = import_peft(folder, base=base_of(folder), name=name, resize=True)
        logits = load_model(resolve_base(base_of(folder)), adapter).logits(ids)
        assert logits.shape[-1] == ROWS and mx.abs(logits[..., :60] - wanted).max().item() < 1e-4


def test_the_base_that_was_saved_along_is_no_trouble(tiny_model, tmp_path):
    """`save_embedding_layers=True`, or a state dict of all: equal to the base, it is left out; trained, it is told."""
    base = tiny_model("qwen2")
    rows = mx.load(str(base / "model.safetensors"))["model.embed_tokens.weight"].shape[0]
    folder = adapter_on(base, tmp_path / "peft", rows)
    tensors = mx.load(str(folder / "adapter_model.safetensors"))
    whole = {f"base_model.model.{name}": array for name, array in mx.load(str(base / "model.safetensors")).items()}
    tensor_files.write_safetensors(folder / "adapter_model.safetensors", whole | tensors)
    assert import_peft(folder, base=base, name="whole").config.keys == ("model.layers.0.self_attn.q_proj",)
    trained = {"base_model.model.model.norm.weight": whole["base_model.model.model.norm.weight"] * 1.001}
    tensor_files.write_safetensors(folder / "adapter_model.safetensors", whole | tensors | trained)
    with pytest.raises(FormatError, match=r"whole modules.*model\.norm\.weight") as caught:
        import_peft(folder, base=base, name="trained")
    assert "fuse_peft" in caught.value.hint or "--from-peft" in caught.value.hint


def test_a_base_of_another_width_is_said_to_be_another(tiny_model, tmp_path):
    folder = FIXTURES / "llama" / "resized" / "to-save"
    with pytest.raises(IncompatibleError) as caught:
        fuse_peft(folder, tmp_path / "out", base=tiny_model("llama"), resize=True, options=QUIET)
    assert "trained on" in caught.value.hint and not (tmp_path / "out").exists()


def test_two_vocabularies_in_one_adapter_are_refused(tmp_path, home):
    folder = Path(shutil.copytree(FIXTURES / "llama" / "resized" / "attention", tmp_path / "adapter"))
    tensors = mx.load(str(folder / "adapter_model.safetensors"))
    tensors["base_model.model.lm_head.weight"] = tensors["base_model.model.lm_head.weight"][:66]
    mx.eval(tensors)
    tensor_files.write_safetensors(folder / "adapter_model.safetensors", tensors)
    with pytest.raises(FormatError, match="two vocabularies"):
        fuse_peft(folder, tmp_path / "out", base=FIXTURES / "llama" / "base", resize=True, options=QUIET)
