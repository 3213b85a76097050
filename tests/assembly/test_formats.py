"""Fused models for other programs: Hugging Face folders and GGUF files."""

import json
import shutil

import gguf
import mlx.core as mx
import numpy as np
import pytest
from helpers.fusing import fuse, logits, visible_adapter
from mlx.utils import tree_flatten
from mlx_lm.utils import load_config

from mlx_adapters.config.fusing import FuseOptions
from mlx_adapters.config.quantization import Quantization
from mlx_adapters.errors import ConfigError, StorageError
from mlx_adapters.fusion.fuse import fuse_again
from mlx_adapters.models.adapter import write_adapter
from mlx_adapters.models.dense import dense_weight
from mlx_adapters.models.layers import adaptable_layers
from mlx_adapters.models.loading import load_model, load_module
from mlx_adapters.sources.bases import resolve_base
from mlx_adapters.storage import tensor_files
from mlx_adapters.storage.tensor_names import from_gguf
from mlx_adapters.system.machine import on_gpu

HF = FuseOptions(method="nearest", check=False, format="hf")
GGUF = FuseOptions(method="nearest", check=False, format="gguf")
# One name of each kind that transformers gives these checkpoints where mlx-lm's differ, with shapes.
TRANSFORMERS_NAMES = {
    "mixtral": {
        "model.layers.0.block_sparse_moe.experts.0.w1.weight": (128, 64),
        "model.layers.1.block_sparse_moe.experts.3.w2.weight": (64, 128),
        "model.layers.1.block_sparse_moe.experts.3.w3.weight": (128, 64),
        "model.layers.0.block_sparse_moe.gate.weight": (4, 64),
    },
    "qwen3_moe": {
        "model.layers.0.mlp.experts.0.gate_proj.weight": (64, 64),
        "model.layers.1.mlp.experts.3.down_proj.weight": (64, 64),
        "model.layers.1.mlp.experts.2.up_proj.weight": (64, 64),
        "model.layers.0.mlp.gate.weight": (4, 64),
    },
    "gpt2": {
        "wte.weight": (512, 64),
        "wpe.weight": (512, 64),
        "ln_f.weight": (64,),
        "h.0.attn.c_attn.weight": (64, 192),
        "h.1.attn.c_proj.weight": (64, 64),
        "h.1.mlp.c_fc.weight": (64, 256),
        "h.1.mlp.c_proj.weight": (256, 64),
    },
    "phi3": {
        "model.layers.0.self_attn.qkv_proj.weight": (128, 64),
        "model.layers.0.mlp.gate_up_proj.weight": (256, 64),
    },
    "llama": {"model.layers.0.self_attn.q_proj.weight": (64, 64), "model.embed_tokens.weight": (512, 64)},
}


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize(
    "architecture", ["llama", "qwen2", "qwen3", "gemma3_text", "phi3", "mixtral", "qwen3_moe", "gpt2"]
)
def test_hf_folder_has_the_original_names_and_the_same_function(tiny_model, tmp_path, architecture, bits):
    folder = tiny_model(architecture, bits=bits)
    adapter = visible_adapter(folder)
    fuse(folder, adapter, tmp_path / "out", quantization="none", options=HF)
    header, _ = tensor_files.read_safetensors_header(tmp_path / "out/model.safetensors")
    for name, shape in TRANSFORMERS_NAMES.get(architecture, {}).items():
        assert tuple(header[name]["shape"]) == shape, name
    assert not [name for name in header if "switch_mlp" in name or name.endswith((".scales", ".biases"))]
    assert {entry["dtype"] for entry in header.values()} == {"F32"}
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert "quantization" not in config and "quantization_config" not in config
    np.testing.assert_allclose(logits(tmp_path / "out"), logits(folder, adapter), atol=2e-5)


def test_hf_folder_has_the_type_of_the_checkpoint(tiny_model, tmp_path):
    folder = tiny_model("llama", bits=4, torch_dtype="bfloat16")
    fuse(folder, visible_adapter(folder), tmp_path / "out", quantization="none", options=HF)
    header, _ = tensor_files.read_safetensors_header(tmp_path / "out/model.safetensors")
    assert {entry["dtype"] for entry in header.values()} == {"BF16"}


def rows_put_back(array, heads):
    """GGUF's interleaved rows as halves again."""
    return array.reshape(heads, -1, 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


@pytest.mark.parametrize(
    ("bits", "dtype", "tolerance"), [("none", "auto", 5e-4), ("none", "float32", 0), (8, "auto", 4e-3)]
)
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_gguf_reads_back(tiny_model, tmp_path, architecture, bits, dtype, tolerance):
    folder = tiny_model(architecture, bits=4)
    adapter = visible_adapter(folder)
    made = fuse(folder, adapter, tmp_path / "out", quantization=bits, dtype=dtype, options=GGUF)
    assert made.method == ("nearest" if bits == 8 else "none")
    fuse(folder, adapter, tmp_path / "plain", quantization="none", dtype="float32")
    wanted = dict(tree_flatten(load_module(resolve_base(tmp_path / "plain"))[0].parameters()))
    survived = {survival.path: survival for survival in made.survival}
    before = adaptable_layers(load_module(resolve_base(folder))[0])
    reader = gguf.GGUFReader(tmp_path / "out/model.gguf")
    assert {from_gguf(tensor.name) for tensor in reader.tensors} == set(wanted)
    for tensor in reader.tensors:
        name = from_gguf(tensor.name)
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(wanted[name].shape)
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            values = rows_put_back(values, 4 if "q_proj" in name else 2)
        reach = np.abs(np.array(wanted[name])).max()
        np.testing.assert_allclose(values, np.array(wanted[name]), atol=tolerance * 2 * reach + 1e-7, err_msg=name)
        if survival := survived.pop(name.removesuffix(".weight"), None):
            base = np.array(dense_weight(before[survival.path], mx.float32)).astype(float)
            update, there = np.array(wanted[name]) - base, values - base
            cosine = (update * there).sum() / np.sqrt((update**2).sum() * (there**2).sum())
            near = 5e-6 if on_gpu() else 1e-6  # whose sums are float32's
            assert 1 - survival.cosine == pytest.approx(1 - cosine, rel=0.2, abs=near)
    assert not survived
    fields = reader.fields
    assert fields["general.architecture"].contents() == architecture
    assert fields[f"{architecture}.attention.head_count_kv"].contents() == 2
    tokens = fields["tokenizer.ggml.tokens"].contents()
    assert len(tokens) == 512 and tokens[1] == "<|im_start|>"
    assert "<|im_start|>" in fields["tokenizer.chat_template"].contents()


def test_gguf_is_what_mlx_loads(tiny_model, tmp_path):
    folder = tiny_model("qwen2")
    adapter = visible_adapter(folder)
    fuse(folder, adapter, tmp_path / "out", quantization="none", dtype="float32", options=GGUF)
    fuse(folder, adapter, tmp_path / "plain", quantization="none")
    plain = dict(tree_flatten(load_module(resolve_base(tmp_path / "plain"))[0].parameters()))
    for name, value in mx.load(str(tmp_path / "out/model.gguf")).items():
        assert mx.array_equal(value, plain.pop(from_gguf(name))), name
    assert not plain


@pytest.mark.parametrize("architecture", ["mamba", "jamba", "rwkv7"])
def test_gguf_refuses_what_it_cannot_write(tiny_model, tmp_path, architecture):
    folder = tiny_model(architecture)
    with pytest.raises(ConfigError, match="cannot be written as GGUF"):
        fuse(folder, visible_adapter(folder), tmp_path / "out", quantization="none", options=GGUF)
    assert not list(tmp_path.glob("*out*")) and not list(tmp_path.glob(".mlx-adapters-tmp-*"))


def test_gguf_on_a_full_disk(tiny_model, tmp_path, monkeypatch):
    def write(*_):
        raise OSError("8192 requested and 2736 written")  # what NumPy's tofile says, with no number

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", write)
    folder = tiny_model("llama")
    with pytest.raises(StorageError, match="no space left"):
        fuse(folder, visible_adapter(folder), tmp_path / "out", quantization="none", options=GGUF)
    assert not (tmp_path / "out").exists()


def test_formats_refuse_other_precisions(tiny_model, tmp_path):
    folder = tiny_model("llama")
    for options, bits in ((HF, 4), (HF, 8), (GGUF, 6), (GGUF, {"bits": 4, "mode": "nvfp4"})):
        with pytest.raises(ConfigError, match=r"takes --bits|has nothing like"):
            fuse(folder, visible_adapter(folder), tmp_path / "out", quantization=bits, options=options)


@pytest.mark.parametrize("options, bits", [(HF, "none"), (GGUF, "none"), (GGUF, 8)], ids=["hf", "f16", "q8_0"])
def test_a_recipe_makes_the_same_file_again(tiny_model, tmp_path, options, bits):
    """q8_0 is the file's own rounding: the recipe says it, not what the layers were before."""
    folder = tiny_model("llama")
    write_adapter(visible_adapter(folder), tmp_path / "a")
    first = fuse(folder, str(tmp_path / "a"), tmp_path / "out", quantization=bits, options=options)
    assert first.quantization is None and first.method == ("none" if bits == "none" else "nearest")
    assert fuse_again(tmp_path / "out", tmp_path / "again").identical


def test_q8_0_is_8_bits_however_it_is_said(tiny_model, tmp_path):
    """Also on a base that has 8 bits itself, where MLX's format would keep them."""
    folder = tiny_model("llama", bits=8)
    given = [8, np.int64(8), Quantization(8), Quantization(8, 32), {"bits": 8, "mode": "affine"}]
    for number, quantization in enumerate(given):
        out = tmp_path / str(number)
        fuse(folder, visible_adapter(folder), out, quantization=quantization, options=GGUF)
        types = {t.tensor_type.name for t in gguf.GGUFReader(out / "model.gguf").tensors}
        assert "Q8_0" in types and "F16" not in types


@pytest.mark.parametrize("written", ["[0.0, Infinity]", '{"__float__": "-Infinity"}', "NaN"])
@pytest.mark.parametrize("fmt", ["mlx", "hf"])
def test_numbers_that_json_has_not_are_written_as_mlx_lm_reads_them(tiny_model, tmp_path, written, fmt):
    base = tmp_path / "base"
    shutil.copytree(tiny_model("llama"), base)
    config = (base / "config.json").read_text().rstrip().removesuffix("}")
    (base / "config.json").write_text(f'{config}, "time_step_limit": {written}}}')
    bits = "none" if fmt == "hf" else 4
    options = FuseOptions(method="nearest", check=False, format=fmt)
    fuse(base, visible_adapter(base), tmp_path / "out", quantization=bits, options=options)
    text = (tmp_path / "out" / "config.json").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    after, before = load_config(tmp_path / "out")["time_step_limit"], load_config(base)["time_step_limit"]
    assert repr(after) == repr(before)
    load_model(resolve_base(tmp_path / "out"))
