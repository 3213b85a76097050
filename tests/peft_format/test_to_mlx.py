"""PEFT's own adapters, made by the real peft, give PEFT's own logits here, or are refused with the reason."""

import json
import math
import shutil
from pathlib import Path

import mlx.core as mx
import pytest
from helpers.peft import ADAPTERS, FIXTURES, REFUSED, TIED, base_of, case, picked_adapter

from mlx_adapters.adapters.peft_export import export_peft
from mlx_adapters.adapters.peft_import import import_peft
from mlx_adapters.errors import AdapterError, ExistsError, FormatError, IncompatibleError, NotFoundError
from mlx_adapters.events import Note
from mlx_adapters.models.loading import load_model
from mlx_adapters.sources import lookup
from mlx_adapters.sources.bases import resolve_base
from mlx_adapters.storage import files, tensor_files

REASONS = {
    "lora-bias": "lora_bias",
    "modules-to-save": "modules_to_save",
    "norms-to-save": "modules_to_save",
    "only-modules-to-save": "modules_to_save",
    "conv1d-to-save": "modules_to_save",
    "tied-tokens": "single tokens",
    "tied-modules-to-save": "modules_to_save",
    "trainable-tokens": "single tokens",
    "embedding-dora": "DoRA on the embedding",
    "pissa": "changes the base",
    "olora": "changes the base",
    "alora": "aLoRA",
    "layer-replication": "layer_replication",
    "adalora": "ADALORA",
    "ia3": "IA3",
    "loha": "LOHA",
    "lokr": "LOKR",
    "vera": "VERA",
    "prompt-tuning": "PROMPT_TUNING",
    "experts-to-save": "modules_to_save",
    "head-tokens": "single tokens",
    "tokens": "single tokens",
    "other-tokens": "single tokens",
    "tied-head-tokens": "single tokens",
    "tied-tokens-and-head": "single tokens",
    "router": "no linear layer",
    "tied-lm-head": "tied embedding",
    "tied-lm-head-dora": "tied embedding",
    "tied-both-ends": "tied embedding",
    "tied-head-to-save": "modules_to_save",
    "tied-both-to-save": "modules_to_save",
    "tied-to-save-ensured": "modules_to_save",
    "bias-all": "biases",
    "bias-lora-only": "biases",
    "resized": "resized vocabulary",
}


@pytest.mark.parametrize("folder", ADAPTERS, ids=case)
def test_logits_equal_those_of_peft(folder: Path):
    base, key = base_of(folder), "/".join(folder.relative_to(FIXTURES).parts[1:])
    expected = mx.load(str(base.parent / "logits.safetensors"))
    adapter = import_peft(folder, base=base, name="it", tie=folder in TIED)
    model = load_model(resolve_base(base), adapter)
    logits = model.logits(expected["input_ids"])
    assert mx.abs(logits - expected[key]).max().item() < 1e-4
    assert mx.abs(logits - expected["base"]).max().item() > 0.05
    plain = lookup.load_adapter("it")
    assert plain.fingerprint == adapter.fingerprint
    assert plain.metadata["peft"]["config"] == json.loads((next(folder.rglob("adapter_config.json"))).read_text())


@pytest.mark.parametrize("folder", REFUSED, ids=case)
def test_what_mlx_cannot_hold_is_refused_with_the_reason(folder: Path, home: Path):
    with pytest.raises((FormatError, IncompatibleError)) as raised:
        import_peft(folder, base=base_of(folder), name="it")
    assert REASONS[folder.name] in raised.value.message
    assert not (home / "adapters").exists()


@pytest.mark.parametrize("folder", TIED, ids=case)
def test_an_update_of_one_end_of_a_tied_embedding_is_refused(folder: Path, home: Path):
    with pytest.raises(FormatError, match="one end of the base's tied embedding") as raised:
        import_peft(folder, base=base_of(folder), name="it")
    assert "--from-peft" in raised.value.hint and "--tie" in raised.value.hint
    assert not (home / "adapters").exists()


def test_updates_of_both_ends_are_added_where_the_user_ties_them():
    """PEFT's merge_and_unload adds both to the one matrix; a head's factors are an embedding's, swapped."""
    folder = FIXTURES / "qwen2" / "refused" / "tied-both-ends"
    adapter = import_peft(folder, base=base_of(folder), name="it", tie=True)
    stored = mx.load(str(folder / "adapter_model.safetensors"))
    a, b = (stored[f"base_model.model.model.embed_tokens.lora_embedding_{x}"] for x in "AB")
    head_a, head_b = (stored[f"base_model.model.lm_head.lora_{x}.weight"] for x in "AB")
    lora_a, lora_b, _ = adapter.factors("model.embed_tokens")
    expected = 8 / 4 * (b @ a).T + 3 / 4 * head_b @ head_a
    assert mx.abs(adapter.config.scale * lora_a @ lora_b - expected).max().item() < 1e-5


# -- damage and disagreement ------------------------------------------------------------------------------


@pytest.fixture
def adapter_folder(tmp_path: Path) -> Path:
    """A copy of a sound adapter (rank 4, q_proj and v_proj of llama) to damage."""
    return Path(shutil.copytree(FIXTURES / "llama" / "float-alpha", tmp_path / "adapter"))


def edit_config(folder: Path, **changes) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder: Path, change) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = mx.load(str(path))
    change(tensors)
    mx.eval(tensors)
    tensor_files.write_safetensors(path, tensors)


def refused(folder: Path, home: Path, base: Path = FIXTURES / "llama" / "base") -> AdapterError:
    with pytest.raises(AdapterError) as raised:
        import_peft(folder, base=base, name="it")
    assert not (home / "adapters").exists(), "nothing may be written"
    return raised.value


Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: t.update({f"{Q0}.lora_A.weight": t[f"{Q0}.lora_A.weight"] * mx.nan}), "NaN"),
        (lambda t: t.update({f"{Q0}.lora_B.weight": t[f"{Q0}.lora_B.weight"] + mx.inf}), "Inf"),
        (lambda t: t.pop(f"{Q0}.lora_A.weight"), "lacks one of the two factors"),
        (lambda t: [t.pop(f"{Q0}.lora_{x}.weight") for x in "AB"], "no tensors for it"),
        (lambda t: t.update({f"{Q0}.lora_E": mx.ones((4, 1))}), "no part of LoRA"),
        (lambda t: t.update({f"{Q0}.lora_A.other.weight": t[f"{Q0}.lora_A.weight"]}), "Two tensors give"),
        (lambda t: t.update({"model.layers.0.self_attn.k_proj.lora_A.weight": mx.ones((4, 32))}), "does not begin"),
        (lambda t: t.update({f"{Q0}.lora_magnitude_vector": mx.ones((32,))}), "use_dora"),
        (lambda t: t.update({f"{Q0}.lora_A.weight": mx.ones((4, 33))}), "33"),
        (lambda t: t.update({f"{Q0}.lora_A.weight": mx.ones((5, 32))}), "ranks 5 and 4"),
        (lambda t: t.update({f"{Q0}.lora_A.weight": mx.ones((4, 32, 1))}), "no LoRA layer has"),
        (lambda t: t.update({f"{Q0}.lora_A.weight": mx.ones((4, 32), mx.int32)}), "I32"),
        (lambda t: t.update({n.replace("rs.1", "rs.7"): t.pop(n) for n in list(t) if "rs.1" in n}), "layers.7"),
        (lambda t: t.update({f"{Q0}x.lora_{x}.weight": t[f"{Q0}.lora_{x}.weight"] for x in "AB"}), "q_projx"),
        (lambda t: t.clear(), "no tensors"),
    ],
)
def test_damaged_tensors_are_refused(change, reason: str, adapter_folder: Path, home: Path):
    edit_tensors(adapter_folder, change)
    assert reason in refused(adapter_folder, home).message


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"r": 8}, "rank 4, but the PEFT config says 8"),
        ({"rank_pattern": {"q_proj": 2}}, "rank 4, but the PEFT config says 2"),
        ({"r": 0}, "whole number"),
        ({"r": "four"}, "whole number"),
        ({"lora_alpha": None}, "lora_alpha"),
        ({"lora_alpha": 0}, "does nothing"),
        ({"lora_alpha": 1e400}, "lora_alpha"),
        ({"use_rslora": 1}, "use_rslora"),
        ({"corda_config": {"rate": math.nan}}, "corda_config in the PEFT config holds NaN"),
        ({"eval_loss": math.inf}, "eval_loss in the PEFT config holds NaN or Infinity"),
        ({"use_dora": True}, "magnitude"),
        ({"alpha_pattern": {"(": 3}}, "not a regular expression"),
        ({"alpha_pattern": {"(" * 3000: 3}}, "nested"),
        ({"rank_pattern": [1, 2]}, "rank_pattern"),
        ({"target_modules": "(?i).*q_proj"}, "sets flags"),
        ({"target_modules": ["q_proj", "v_proj", "up_proj"]}, "no tensors for it"),
        ({"target_modules": 7}, "target_modules"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"peft_type": None}, "not a PEFT config"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base"),
        ({"init_lora_weights": "corda"}, "changes the base"),
        ({"init_lora_weights": "lora_ga"}, "changes the base"),
        ({"init_lora_weights": "loftq"}, "changes the base"),
        ({"use_qalora": True}, "QA-LoRA"),
        ({"kasa_config": {"beta": 1.0}}, "KaSA"),
        ({"arrow_config": {"top_k": 3}}, "Arrow"),
        ({"use_bdlora": {"nblocks": 2}}, "BD-LoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"lora_bias": True}, "lora_bias"),
        ({"lora_dropout": 1.5}, "lora_dropout"),
    ],
)
def test_wrong_settings_are_refused(changes: dict, reason: str, adapter_folder: Path, home: Path):
    edit_config(adapter_folder, **changes)
    assert reason in refused(adapter_folder, home).message


def test_a_truncated_file_is_refused(adapter_folder: Path, home: Path):
    path = adapter_folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "not a whole safetensors file" in refused(adapter_folder, home).message


def test_pickled_weights_are_refused_unread(adapter_folder: Path, home: Path):
    path = adapter_folder / "adapter_model.safetensors"
    path.rename(path.with_suffix(".bin"))
    error = refused(adapter_folder, home)
    assert "pickle" in error.message and "save it again" in error.hint


def test_a_pickle_beside_safetensors_does_not_matter(adapter_folder: Path):
    (adapter_folder / "adapter_model.bin").write_bytes(b"not even a pickle")
    assert import_peft(adapter_folder, base=FIXTURES / "llama" / "base", name="it").config.rank == 4


@pytest.mark.parametrize("architecture", ["phi3", "gpt2", "gemma3_text", "mixtral"])
def test_another_base_is_refused(architecture: str, adapter_folder: Path, home: Path):
    """Other module names, other shapes, or (mixtral, where both agree) fewer targets than the config names."""
    folder = FIXTURES / "llama" / "all-linear"
    error = refused(folder, home, FIXTURES / architecture / "base")
    assert isinstance(error, IncompatibleError | FormatError)


def test_a_base_of_another_architecture_but_the_same_shapes_is_remarked_on():
    notes = []
    import_peft(FIXTURES / "llama" / "all-linear", base=FIXTURES / "qwen2" / "base", name="it", on_event=notes.append)
    assert "LlamaForCausalLM" in notes[0].text and "Qwen2ForCausalLM" in notes[0].text


def test_another_base_of_the_same_shape_is_seen_by_its_embedding(tmp_path: Path, home: Path):
    base = Path(shutil.copytree(FIXTURES / "llama" / "base", tmp_path / "base"))
    edit = mx.load(str(base / "model.safetensors"))
    edit["model.embed_tokens.weight"] = edit["model.embed_tokens.weight"] * 1.5
    tensor_files.write_safetensors(base / "model.safetensors", edit)
    assert "differs from the copy" in refused(FIXTURES / "llama" / "embeddings", home, base).message


def test_a_quantized_base_takes_the_adapter(tiny_model, tmp_path: Path):
    """The embedding's copy in the adapter is then only near the base's own."""
    plain, quantized = tiny_model("qwen3"), tiny_model("qwen3", bits=4)
    adapter = picked_adapter(plain, lambda key: key.endswith(("embed_tokens", "q_proj")))
    export_peft(adapter, tmp_path / "out", base=plain)
    copy = mx.load(str(plain / "model.safetensors"))["model.embed_tokens.weight"]
    name = "base_model.model.model.embed_tokens.base_layer.weight"
    path = tmp_path / "out" / "adapter_model.safetensors"
    tensor_files.write_safetensors(path, mx.load(str(path)) | {name: copy})
    assert import_peft(tmp_path / "out", base=quantized, name="it").fingerprint == adapter.fingerprint
    tensor_files.write_safetensors(path, mx.load(str(path)) | {name: copy[::-1]})
    with pytest.raises(IncompatibleError, match="differs from the copy"):
        import_peft(tmp_path / "out", base=quantized, name="other")


def test_an_existing_name_is_kept(adapter_folder: Path):
    base = FIXTURES / "llama" / "base"
    before = import_peft(adapter_folder, base=base, name="it").fingerprint
    with pytest.raises(ExistsError):
        import_peft(FIXTURES / "llama" / "dora", base=base, name="it")
    assert lookup.load_adapter("it").fingerprint == before
    import_peft(FIXTURES / "llama" / "dora", base=base, name="it", overwrite=True)
    assert lookup.load_adapter("it").config.type == "dora"


def test_two_named_adapters_must_be_told_apart(tmp_path: Path, home: Path):
    for name in ("sql", "chat"):
        shutil.copytree(FIXTURES / "llama" / "float-alpha", tmp_path / "run" / name)
    error = refused(tmp_path / "run", home)
    assert isinstance(error, NotFoundError) and "chat, sql" in error.hint
    assert import_peft(tmp_path / "run" / "sql", base=FIXTURES / "llama" / "base", name="it").config.rank == 4


def test_an_mlx_adapter_is_pointed_to_add(tmp_path: Path, home: Path):
    (tmp_path / "adapter_config.json").write_text('{"fine_tune_type": "lora"}')
    assert "add" in refused(tmp_path, home).hint


def test_the_user_hears_of_unknown_settings():
    notes = []
    base = FIXTURES / "llama" / "base"
    import_peft(FIXTURES / "llama" / "newer-fields", base=base, name="a", on_event=notes.append)
    import_peft(FIXTURES / "qwen2" / "ensure-tying", base=FIXTURES / "qwen2" / "base", name="c", on_event=notes.append)
    assert [type(note) for note in notes] == [Note]
    assert "another" in notes[0].text and "a_newer_field" not in notes[0].text


def test_target_modules_name_no_experts_that_are_parameters(tmp_path: Path):
    """llama4's experts have a down_proj, too, but for PEFT it is a parameter."""
    folder = tmp_path / "adapter"
    shutil.copytree(FIXTURES / "llama4_text" / "down-only", folder)
    config = files.read_json(folder / "adapter_config.json")
    files.write_json(
        folder / "adapter_config.json", config | {"target_parameters": None, "target_modules": ["o_proj", "down_proj"]}
    )
    stored = mx.load(str(folder / "adapter_model.safetensors"))
    a, b = mx.ones((4, 48)), mx.ones((32, 4))
    down = {
        f"base_model.model.model.layers.{i}.feed_forward.{part}down_proj.lora_{x}.weight": a if x == "A" else b
        for i, part in ((0, ""), (2, ""), (1, "shared_expert."), (3, "shared_expert."))
        for x in "AB"
    }
    down = {n: (w if "shared" not in n else (mx.ones((4, 40)) if "_A" in n else b)) for n, w in down.items()}
    mx.save_safetensors(
        str(folder / "adapter_model.safetensors"), {n: w for n, w in stored.items() if "experts" not in n} | down
    )
    assert len(import_peft(folder, base=FIXTURES / "llama4_text" / "base", name="it").config.keys) == 8
