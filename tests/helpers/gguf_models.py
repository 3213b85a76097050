"""Tiny models of all that GGUF is written for, and what mlx-lm computes of them."""

import json
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from helpers.adapters import make_adapter
from helpers.gguf_tokenizers import SENTENCEPIECE, own_spelling, retokenize, sentencepiece_like
from helpers.tiny_configs import make_model, tiny_config
from helpers.tiny_models import build_model, random_weights, write_tokenizer
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.utils import quantize_model, save_model

import mlx_adapters as ma
from mlx_adapters.gguf_format.architectures import ARCHITECTURES, architecture_of
from mlx_adapters.gguf_format.hyperparameters import settings_of
from mlx_adapters.gguf_format.tensors import Layout
from mlx_adapters.gguf_format.tokenizer import PRE_TOKENIZERS, hard_strings
from mlx_adapters.models.layers import adaptable_layers
from mlx_adapters.models.loading import load_model, load_module, load_tokenizer_of
from mlx_adapters.sources.bases import resolve_base
from mlx_adapters.sources.demo_base import demo_base_folder
from mlx_adapters.storage.tensor_names import block_index

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3["original_max_position_embeddings"] = 64
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LONGROPE = {
    "type": "longrope",
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
    "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0],
    "original_max_position_embeddings": 64,
}
LLLG = ["sliding_attention"] * 3 + ["full_attention"]
GROUPS = {"linear_num_value_heads": 4, "linear_num_key_heads": 2}
UNTIED = {"tie_word_embeddings": False}
LOCAL = {"layer_types": ["sliding_attention", "full_attention"]}
MINISTRAL = {"rope_theta": 1e4, "llama_4_scaling_beta": 0.1, "mscale": 1.0, "mscale_all_dim": 1.0, **YARN}
MROPE = {"rope_parameters": {"rope_theta": 1e4, "mrope_section": [1, 1, 0], "partial_rotary_factor": 0.25}}
# What the guessed config lacks.
BESIDES: dict[str, dict[str, Any]] = {
    "olmo2": UNTIED,
    "gpt_oss": LOCAL,
    "exaone4": {"sliding_window_pattern": None},
    "olmoe": {**UNTIED, "num_key_value_heads": 4},
    "qwen3_5": MROPE,
    "qwen3_5_moe": MROPE,
    "qwen3_next": {"norm_topk_prob": True},
    "ministral3": {"rope_parameters": MINISTRAL, "layer_types": ["full_attention"] * 2},
}
# name -> model type, what its config says besides
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama linear": ("llama", {"rope_scaling": {"type": "linear", "factor": 4.0}}),
    "llama llama3": ("llama", {"rope_scaling": LLAMA3}),
    "llama yarn": ("llama", {"rope_scaling": YARN}),
    "llama biases untied": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}),
    "llama head_dim": ("llama", {"head_dim": 32}),
    "qwen2 yarn": ("qwen2", {"rope_scaling": YARN}),
    "qwen3 yarn": ("qwen3", {"rope_scaling": YARN}),
    "phi3 longrope": ("phi3", {"rope_scaling": LONGROPE, "original_max_position_embeddings": 64}),
    "phi3 partial": ("phi3", {"partial_rotary_factor": 0.5}),
    "gpt_oss yarn": ("gpt_oss", {"layer_types": ["sliding_attention", "full_attention"], "rope_scaling": YARN}),
    "exaone4 windows": (
        "exaone4",
        {"sliding_window_pattern": "LLLG", "num_hidden_layers": 64, "layer_types": LLLG * 16},
    ),
    "qwen3_5 groups": ("qwen3_5", GROUPS | MROPE),
    "qwen3_5_moe groups": ("qwen3_5_moe", GROUPS | MROPE),
    "qwen3_next groups": ("qwen3_next", GROUPS | {"norm_topk_prob": True}),
    "olmo3 yarn": ("olmo3", {"rope_scaling": YARN, "layer_types": ["sliding_attention", "full_attention"]}),
    "gemma3 scaled": ("gemma3_text", {"rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 8.0}}),
    "deepseek_v3 lite": ("deepseek_v3", {"q_lora_rank": None, "num_hidden_layers": 27}),
    **{
        name: (name, {}) for name in ("gemma3", "gemma4", "mistral3", "qwen2_vl", "qwen3_vl", "qwen3_vl_moe", "pixtral")
    },
    "granite biases": ("granite", {"attention_bias": True, "tie_word_embeddings": False}),
}
GGUF_MODELS = {**{name: (name, BESIDES.get(name, {})) for name in ARCHITECTURES}, **VARIANTS}
KINDS = {
    "f32": ("none", "float32"),
    "f16": ("none", "auto"),
    "bf16": ("none", "bfloat16"),
    "q8_0": (8, "auto"),
    "q4_1": (4, "auto"),
    "q5_1": (5, "auto"),
    "keep": ("keep", "auto"),
}


def config_of(name: str) -> dict[str, Any]:
    """The config of a tiny model of these."""
    kind, more = GGUF_MODELS[name]
    config = tiny_config(kind)
    config.get("text_config", config).update(more)
    return config


def layout_of(name: str) -> dict[str, Any]:
    """What a file of this tiny model says and holds, in a few numbers: the hyperparameters; of each tensor of the first
    blocks its shape and a sum in which each place weighs otherwise."""
    config = config_of(name)
    module = make_model(config)
    layout = Layout(architecture_of(module), module, settings_of(module, config))
    layout.check()
    held = {}
    for tensor, weight in tree_flatten(module.parameters()):
        if (block_index(tensor) or 0) < 4:
            parts = layout.parting(tensor)(_told_apart(tensor, weight.shape))
            held |= {place.name: part for place, part in zip(layout.places(tensor), parts, strict=True)}
    held |= layout.more()
    return {"architecture": layout.architecture.name, "values": dict(sorted(layout.values.items()))} | {
        "tensors": {key: [*value.shape, _weighed(value)] for key, value in sorted(held.items())}
    }


def _told_apart(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Numbers of which those near each other differ, made of whole ones: the same everywhere."""
    places = np.arange(int(np.prod(shape))) * 7919 + zlib.crc32(name.encode()) % 1009
    return (places % 1009 / 1009).astype(np.float32).reshape(shape)


def _weighed(values: np.ndarray) -> float:
    return float(f"{values.astype(np.float64).ravel() @ (np.arange(values.size) * 104729 % 997 / 997):.6g}")


def gguf_base(folder: Path, name: str, bits: int | None = None) -> Path:
    """A tiny model, in float32 or quantized as mlx-lm does it, whose norms and biases are no ones and zeros."""
    config = config_of(name)
    model = make_model(config)
    model.update(tree_unflatten(random_weights(model, 0, mx.float32)))
    if bits:
        model, config = quantize_model(model, config, 32, bits)
    mx.eval(model.parameters())
    folder.mkdir(parents=True, exist_ok=True)
    save_model(folder, model, donate_model=False)
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder)
    return folder


def logprobs_of(folder: Path, prompts: list[list[int]], adapter: ma.Adapter | None = None) -> list[list[float]]:
    """What comes after each prompt, by mlx-lm."""
    module = load_model(resolve_base(folder), adapter).module
    answers = []
    for prompt in prompts:
        logits = module(mx.array([prompt]))[0, -1].astype(mx.float32)
        answers.append((logits - mx.logsumexp(logits)).tolist())
    return answers


def tokenizer_base(folder: Path, kind: str, bos: bool) -> Path:
    """A tiny llama with the tokenizer of a family (see `gguf_tokenizers`)."""
    if kind in SENTENCEPIECE:
        return sentencepiece_like(build_model(folder, "llama", vocab_size=800), kind)
    (ignore_merges,) = (pre.ignore_merges for pre in PRE_TOKENIZERS if pre.name == kind)
    return retokenize(build_model(folder, "llama"), own_spelling(kind), ignore_merges=ignore_merges, bos=bos)


TOKENIZERS = {
    **{f"tokenizer {pre.name}{' bos' * bos}": (pre.name, bos) for pre in PRE_TOKENIZERS for bos in (False, True)},
    **{f"tokenizer sentencepiece {kind}": (kind, True) for kind in SENTENCEPIECE},
}


def write_for_llama_cpp(place: Path, name: str, lengths: tuple[int, ...]) -> Iterator[str]:
    """Files of each type in folders below `place`, each with what is expected of it; yields the types."""
    shutil.rmtree(place, ignore_errors=True)
    rng = np.random.default_rng(1)
    prompts = [rng.integers(3, 500, length).tolist() for length in lengths]
    few = name not in GGUF_MODELS
    for kind, (bits, dtype) in KINDS.items():
        if few and kind not in ("f32", "keep"):
            continue
        if name == "demo":
            base = demo_base_folder()
        elif few:
            base = tokenizer_base(place / f"base-{kind}", *TOKENIZERS[name])
        else:
            base = gguf_base(place / f"base-{kind}", name, bits=4 if kind == "keep" else None)
        adapter = make_adapter(base, list(adaptable_layers(load_module(resolve_base(base))[0]))[::2])
        out, options = place / kind, ma.FuseOptions(check=False, format="gguf", method="nearest")
        ma.fuse(base, adapter, out, quantization=bits, dtype=dtype, options=options)
        if kind in ("q4_1", "q5_1", "keep"):  # the same numbers in mlx-lm's own format
            plain = ma.FuseOptions(check=False, method="nearest")
            grid = bits if kind == "keep" else {"bits": bits, "group_size": 32}
            ma.fuse(base, adapter, place / "mlx", quantization=grid, dtype="float16", options=plain)
            expected = logprobs_of(place / "mlx", prompts)
            shutil.rmtree(place / "mlx")
        else:
            expected = logprobs_of(base, prompts, adapter)
        told = {"prompts": prompts, "logprobs": expected} | _words(base, kind == "f32")
        (out / "expected.json").write_text(json.dumps(told))
        if name != "demo":
            shutil.rmtree(base)
        yield kind


def _words(base: Path, texts: bool) -> dict[str, Any]:
    """What the tokenizer makes of texts, of a chat, and what ends an answer."""
    tokenizer = load_tokenizer_of(resolve_base(base))
    start = "<s>" if "Metaspace" in (base / "tokenizer.json").read_text() else ""
    strings = [start + text for text in hard_strings(list(tokenizer.all_special_tokens))] if texts else []
    chat = [{"role": "user", "content": "List all courses."}]
    rendered = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    return {
        "texts": strings,
        "ids": [list(tokenizer.encode(text)) for text in strings],
        "ascii": tokenizer.encode("a", add_special_tokens=False)[-1],
        "chat": chat,
        "rendered": rendered,
        "ends": sorted(tokenizer.eos_token_ids),
    }
