"""What no MLX adapter can hold goes into a fused model: its logits are PEFT's."""

import shutil
from pathlib import Path

import mlx.core as mx
import pytest
from helpers.peft import ADAPTERS, FIXTURES, base_of, case, picked_adapter
from helpers.tiny_configs import tiny_base

from mlx_adapters.config.fusing import FuseOptions
from mlx_adapters.errors import AdapterError, FormatError, IncompatibleError
from mlx_adapters.fusion.fuse import fuse
from mlx_adapters.fusion.peft import fuse_peft
from mlx_adapters.models.base import says_tied
from mlx_adapters.models.loading import load_model
from mlx_adapters.sources.bases import resolve_base
from mlx_adapters.storage import files, tensor_files

FUSIBLE = [
    "llama/refused/modules-to-save",
    "llama/refused/norms-to-save",
    "llama/refused/trainable-tokens",
    "qwen2/refused/bias-all",
    "qwen2/refused/bias-lora-only",
    "gpt2/refused/bias-all",
    "gpt2/refused/conv1d-to-save",
    "qwen2/refused/tied-tokens",
    "llama/refused/only-modules-to-save",
    "qwen2/refused/tied-lm-head",
    "qwen2/refused/tied-both-ends",
    "qwen2/refused/tied-modules-to-save",
    "qwen2/refused/tied-head-to-save",
    "qwen2/refused/tied-both-to-save",
    "qwen2/refused/tied-to-save-ensured",
    "qwen3/refused/tied-lm-head-dora",
    "gemma3_text/refused/tied-lm-head",
    "falcon_h1/refused/modules-to-save",
    "falcon_h1/refused/trainable-tokens",
    "falcon_h1-tied/refused/tied-lm-head",
    "falcon_h1-tied/refused/tied-both-ends",
    "falcon_h1-tied/refused/tied-modules-to-save",
    "qwen3_next/refused/norms-to-save",
    "qwen3_5_text/refused/norms-to-save",
    "mixtral/refused/experts-to-save",
    "qwen2/refused/tied-head-tokens",
    "qwen2/refused/tied-tokens-and-head",
    *(f"glm4_moe/refused/{name}" for name in ("tokens", "other-tokens", "router")),
    *(f"{base}/refused/{name}" for base in ("gpt_oss", "llama4_text") for name in ("experts-to-save", "head-tokens")),
]
NOT_FUSIBLE = {
    "llama/refused/lora-bias": "lora_bias",
    "llama/refused/embedding-dora": "DoRA on the embedding",
    "llama/refused/pissa": "changes the base",
    "gpt2/tied-embedding": "one matrix for input and output",
    "qwen2/refused/resized": "resized vocabulary",
}
QUIET = FuseOptions(method="nearest", check=False)


def logits_after(folder: Path, out: Path, **options) -> tuple[mx.array, mx.array]:
    """(the fused model's, PEFT's) logits."""
    base = base_of(folder)
    expected = mx.load(str(base.parent / "logits.safetensors"))
    fuse_peft(folder, out, base=base, **options)
    key = "/".join(folder.relative_to(base.parent).parts)
    key = f"{key}/unmerged" if f"{key}/unmerged" in expected else key
    return load_model(resolve_base(out)).logits(expected["input_ids"]), expected[key]


@pytest.mark.parametrize("name", FUSIBLE)
def test_the_fused_model_computes_what_peft_computes(name: str, tmp_path: Path):
    fused, expected = logits_after(FIXTURES / name, tmp_path / "out", options=QUIET)
    assert mx.abs(fused - expected).max().item() < 1e-4


def test_what_loading_adds_to_weights_of_16_bits_is_not_rounded(tmp_path: Path):
    """Qwen3-Next's norms are stored less one; the same numbers in 16 or 32 bits make the same model."""
    adapter, models = tmp_path / "peft", []
    source = FIXTURES / "qwen3_next" / "refused" / "norms-to-save"
    shutil.copytree(source, adapter)
    narrow = {n: w.astype(mx.bfloat16) for n, w in mx.load(str(source / "adapter_model.safetensors")).items()}
    for dtype in (mx.bfloat16, mx.float32):
        tensors = {n: w.astype(dtype) for n, w in narrow.items()}
        tensor_files.write_safetensors(adapter / "adapter_model.safetensors", tensors)
        fuse_peft(adapter, tmp_path / str(dtype), base=base_of(source), options=QUIET)
        models.append(mx.load(str(tmp_path / str(dtype) / "model.safetensors")))
    assert all(mx.array_equal(w, models[0][n].astype(w.dtype)) for n, w in models[1].items())


@pytest.mark.parametrize(
    "folder", [f for f in ADAPTERS if f.name in ("dora", "fused", "tied-embedding", "linear")], ids=case
)
def test_plain_adapters_are_fused_as_well(folder: Path, tmp_path: Path):
    if case(folder) in NOT_FUSIBLE:
        return
    fused, expected = logits_after(folder, tmp_path / "out", options=QUIET)
    assert mx.abs(fused - expected).max().item() < 1e-4


def test_experts_that_transformers_turns_when_it_loads_them_are_put_in_as_they_lie(tmp_path: Path):
    folder = FIXTURES / "llama4_text" / "refused" / "experts-to-save"
    turned = shutil.copytree(folder, tmp_path / "peft")
    tensors = mx.load(str(turned / "adapter_model.safetensors"))
    tensors = {name: array.swapaxes(1, 2) if array.ndim == 3 else array for name, array in tensors.items()}
    tensor_files.write_safetensors(turned / "adapter_model.safetensors", tensors)
    _, expected = logits_after(folder, tmp_path / "plain", options=QUIET)
    fuse_peft(turned, tmp_path / "out", base=base_of(folder), options=QUIET)
    ids = mx.load(str(base_of(folder).parent / "logits.safetensors"))["input_ids"]
    assert mx.abs(load_model(resolve_base(tmp_path / "out")).logits(ids) - expected).max().item() < 1e-4


@pytest.mark.parametrize("format", ["mlx", "hf"])
def test_two_ends_of_a_tied_embedding_become_two_matrices(format: str, tmp_path: Path):
    folder = FIXTURES / "qwen2" / "refused" / "tied-both-ends"
    logits_after(folder, tmp_path / "out", options=FuseOptions(method="nearest", check=False, format=format))
    assert files.read_json(tmp_path / "out" / "config.json")["tie_word_embeddings"] is False
    weights = mx.load(str(tmp_path / "out" / "model.safetensors"))
    assert not mx.array_equal(weights["model.embed_tokens.weight"], weights["lm_head.weight"])


def test_one_matrix_stays_one_where_peft_ties_both_ends(tmp_path: Path):
    logits_after(FIXTURES / "qwen2" / "refused" / "tied-to-save-ensured", tmp_path / "out", options=QUIET)
    assert "lm_head.weight" not in mx.load(str(tmp_path / "out" / "model.safetensors"))


def test_a_quantized_embedding_is_untied_as_it_is(tiny_model, tmp_path: Path):
    """The end that the adapter does not change keeps its codes."""
    base = tiny_model("qwen2", bits=4)
    adapter = tmp_path / "peft"
    shape = mx.load(str(base / "model.safetensors"))["model.embed_tokens.scales"].shape
    factors = {"lora_A": mx.ones((2, shape[1] * 32)), "lora_B": mx.ones((shape[0], 2))}
    tensors = {f"base_model.model.lm_head.{leaf}.weight": 0.01 * array for leaf, array in factors.items()}
    tensor_files.write_safetensors(adapter / "adapter_model.safetensors", tensors)
    files.write_json(
        adapter / "adapter_config.json", {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["lm_head"]}
    )
    fuse_peft(adapter, tmp_path / "out", base=base, options=QUIET)
    before = mx.load(str(base / "model.safetensors"))
    after = mx.load(str(tmp_path / "out" / "model.safetensors"))
    assert all(mx.array_equal(before[name], after[name]) for name in before)
    assert {name for name in after if name not in before} == {f"lm_head.{x}" for x in ("weight", "scales", "biases")}
    assert load_model(resolve_base(tmp_path / "out")).logits([1, 2, 3]).shape[-1] == shape[0]


@pytest.mark.parametrize("kind, refused", [("gemma3_text", True), ("llama", False)])
def test_tokens_need_a_config_that_says_whether_both_ends_are_one(kind: str, refused: bool, tmp_path: Path):
    """Without a word in it transformers takes gemma3's ends for one, llama's for two."""
    config = files.read_json(FIXTURES / "llama" / "base" / "config.json")
    del config["tie_word_embeddings"]
    assert says_tied(config | {"model_type": kind}) is (None if refused else False)
    assert says_tied(config | {"text_config": {"tie_word_embeddings": True}}) is True


@pytest.mark.parametrize("form", ["lora", "dora", "body", "saved"])
def test_a_weight_that_mlx_lm_cuts_into_matrices_of_each_head_is_updated_as_a_whole(form: str, tmp_path: Path):
    """body: trained without the model around it, so that names lack its beginning. saved: by modules_to_save."""
    dora, saved = form == "dora", form == "saved"
    base, adapter, name = tiny_base(tmp_path / "base", "deepseek_v3"), tmp_path / "peft", "layers.1.self_attn.kv_b_proj"
    shape = (4 * 48, 64)  # of each head 32 rows of keys and 16 of values
    a, b, m = mx.random.normal((2, shape[1])), mx.random.normal((shape[0], 2)), 1 + mx.random.uniform(shape=shape[:1])
    leaves = {"lora_A.weight": a, "lora_B.weight": b} | ({"lora_magnitude_vector": m} if dora else {})
    leaves = {"weight": m[:, None] * b @ a} if saved else leaves
    prefix = "base_model.model." if form == "body" else "base_model.model.model."
    tensors = {f"{prefix}{name}.{leaf}": array for leaf, array in leaves.items()}
    tensor_files.write_safetensors(adapter / "adapter_model.safetensors", tensors)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": [name], "use_dora": dora}
    config |= {"target_modules": ["o_proj"], "modules_to_save": [name]} if saved else {}
    files.write_json(adapter / "adapter_config.json", config)
    options = FuseOptions(method="nearest", check=False, format="hf")
    nothing = picked_adapter(base, lambda key: key == "lm_head", scale=1e-30)
    fuse(base, nothing, tmp_path / "before", quantization="none", dtype="float32", options=options)
    fuse_peft(adapter, tmp_path / "after", base=base, quantization="none", dtype="float32", options=options)
    before, after = (
        mx.load(str(tmp_path / n / "model.safetensors"))[f"model.{name}.weight"] for n in ("before", "after")
    )
    wanted = leaves["weight"] if saved else before + 3 * b @ a
    wanted = m[:, None] * wanted / mx.linalg.norm(wanted, axis=1, keepdims=True) if dora else wanted
    assert mx.allclose(after, wanted, atol=1e-4) and not mx.allclose(after, before, atol=0.1)


def test_the_check_after_fusing_knows_the_whole_adapter(tmp_path: Path):
    text = "\n\n".join(" ".join(f"w{3 + (7 * i + i * j) % 60}" for i in range(30)) for j in range(60))
    (tmp_path / "text.txt").write_text(text)
    options = FuseOptions(calibration=str(tmp_path / "text.txt"), check_rows=12, calibration_rows=12)
    folder = FIXTURES / "gpt2" / "refused" / "bias-all"
    result = fuse_peft(folder, tmp_path / "out", base=base_of(folder), options=options)
    assert result.fidelity.kl_mean < 1e-6 < result.fidelity.base_kl


@pytest.mark.parametrize("name", NOT_FUSIBLE)
def test_what_no_model_of_mlx_lm_can_hold_is_refused(name: str, tmp_path: Path):
    with pytest.raises((FormatError, IncompatibleError), match=NOT_FUSIBLE[name]):
        fuse_peft(FIXTURES / name, tmp_path / "out", base=base_of(FIXTURES / name))
    assert not (tmp_path / "out").exists()


def test_another_base_is_refused(tmp_path: Path):
    folder = FIXTURES / "llama" / "refused" / "modules-to-save"
    with pytest.raises(AdapterError):
        fuse_peft(folder, tmp_path / "out", base=FIXTURES / "gpt2" / "base")
    assert not (tmp_path / "out").exists()


def test_untying_reaches_the_config_of_the_text_model():
    from mlx_adapters.models.base import untied_config

    config = {
        "model_type": "mistral3",
        "tie_word_embeddings": True,
        "text_config": {"tie_word_embeddings": True, "a": 1},
    }
    changed = untied_config(config)
    assert changed["tie_word_embeddings"] is False and changed["text_config"] == {"tie_word_embeddings": False, "a": 1}
    assert config["text_config"]["tie_word_embeddings"] and "text_config" not in untied_config({"model_type": "llama"})
