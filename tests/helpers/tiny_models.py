"""Tiny real models, built from mlx-lm's own classes with seeded random weights.

Two blocks of width 64, a vocabulary of 512 and a byte-level BPE tokenizer trained here: every layer type of
the real architectures, in a few hundred kilobytes. All matrices can be quantized in groups of 32 and 64.
"""

import importlib
import json
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE, VOCABULARY = 64, 2, 4, 2, 16, 128, 512

_COMMON = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "intermediate_size": INTERMEDIATE,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "rms_norm_eps": 1e-5,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 2048,
    "rope_theta": 10000.0,
    "bos_token_id": 0,
    "eos_token_id": 2,
}

# Tied and untied embeddings, biases, merged projections, experts and Conv1D-style names are all here.
ARCHITECTURES: dict[str, dict] = {
    "llama": {**_COMMON, "tie_word_embeddings": True},
    "qwen2": {**_COMMON, "tie_word_embeddings": True},
    "qwen3": {**_COMMON, "tie_word_embeddings": False, "head_dim": HEAD_DIM},
    "gemma3_text": {
        **_COMMON,
        "tie_word_embeddings": True,
        "head_dim": HEAD_DIM,
        "query_pre_attn_scalar": HEAD_DIM,
        "sliding_window": 64,
        "sliding_window_pattern": 2,
    },
    "phi3": {**_COMMON, "tie_word_embeddings": False, "original_max_position_embeddings": 2048},
    "mixtral": {**_COMMON, "tie_word_embeddings": False, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {
        **_COMMON,
        "tie_word_embeddings": False,
        "head_dim": HEAD_DIM,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": 64,
        "norm_topk_prob": True,
    },
    # Keys, values and per-layer inputs go from block to block by keyword; the last two blocks have no own keys.
    "gemma4_text": {
        **_COMMON,
        "num_hidden_layers": 4,
        "tie_word_embeddings": True,
        "head_dim": HEAD_DIM,
        "global_head_dim": 2 * HEAD_DIM,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "sliding_window": 8,
        "hidden_size_per_layer_input": 32,
        "vocab_size_per_layer_input": VOCABULARY,
    },
    "gpt2": {
        "n_ctx": 512,
        "n_positions": 512,
        "n_embd": HIDDEN,
        "n_head": HEADS,
        "n_layer": LAYERS,
        "layer_norm_epsilon": 1e-5,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 2,
    },
}

# Layers that mlx-lm quantizes and no adapter takes, layers called once for each token, tensors that mlx-lm leaves out.
_MLA = {
    **_COMMON,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "moe_intermediate_size": 64,
    "n_shared_experts": 1,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "routed_scaling_factor": 1.0,
    "norm_topk_prob": True,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "attention_bias": False,
    "kv_lora_rank": 64,
    "q_lora_rank": 64,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
}
RARE: dict[str, dict] = {
    "deepseek_v3": _MLA,
    "glm4_moe_lite": {**_MLA, "tie_word_embeddings": False},
    "kimi_vl": {
        "text_config": {**_MLA, "model_type": "deepseek_v3"},
        "vision_config": {"hidden_size": 32},
        "eos_token_id": 2,
    },
    "gemma3": {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "text_config": {**ARCHITECTURES["gemma3_text"], "model_type": "gemma3_text"},
        "vision_config": {"hidden_size": 32, "model_type": "siglip_vision_model"},
        "vocab_size": VOCABULARY,
        "eos_token_id": 2,
    },
    "qwen3_5": {  # a block of a gated delta rule, and one of attention
        "text_config": {
            "model_type": "qwen3_5",
            "vocab_size": VOCABULARY,
            "hidden_size": HIDDEN,
            "intermediate_size": INTERMEDIATE,
            "num_hidden_layers": LAYERS,
            "full_attention_interval": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 4096,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 32,
            "linear_value_head_dim": 32,
            "linear_conv_kernel_dim": 4,
            "tie_word_embeddings": True,
            "num_experts": 0,
            "rope_parameters": {"type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        },
        "eos_token_id": 2,
    },
    "mamba": {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "state_size": 16,
        "conv_kernel": 4,
        "use_bias": False,
        "use_conv_bias": True,
        "time_step_rank": 32,
        "eos_token_id": 2,
    },
    "rwkv7": {  # linear layers in lists, so numbers end their paths
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "head_dim": HEAD_DIM,
        "norm_eps": 1e-5,
        "a_low_rank_dim": 32,
        "v_low_rank_dim": 32,
        "gate_low_rank_dim": 32,
        "decay_low_rank_dim": 32,
        "tie_word_embeddings": False,
        "eos_token_id": 2,
    },
    "jamba": {
        **_COMMON,
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
        "mamba_d_conv": 4,
        "mamba_d_state": 16,
        "mamba_expand": 2,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "tie_word_embeddings": True,
    },
}

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_CORPUS = [
    "List the titles of all courses. SELECT title FROM courses WHERE credits > 3 ORDER BY title;",
    "How many students are there? SELECT COUNT(*) FROM students;",
    "user assistant system What is the capital of France? The capital of France is Paris.",
    "Once upon a time there was a small model that wanted to learn a new skill, and it learned it well.",
]


def build_model(
    folder: Path,
    architecture: str,
    *,
    bits: int | None = None,
    group_size: int = 32,
    mode: str = "affine",
    dtype: str = "float32",
    tied: bool | None = None,
    seed: int = 0,
    **config: object,
) -> Path:
    """Write a whole model folder of `architecture` (a key of ARCHITECTURES or RARE) and return it.

    `bits` quantizes it as mlx-lm does; `tied` overrides whether input and output embeddings are one matrix;
    further keywords override entries of config.json.
    """
    from mlx_lm.utils import quantize_model, save_model

    settings = {"model_type": architecture, **(ARCHITECTURES | RARE)[architecture], **config}
    if tied is not None:
        settings["tie_word_embeddings"] = tied
    module = importlib.import_module(f"mlx_lm.models.{architecture}")
    model = module.Model(module.ModelArgs.from_dict(json.loads(json.dumps(settings))))  # which some of them change
    if architecture == "gemma3":
        model.language_model.sanitize({})
    if architecture == "gemma3_text" and settings["tie_word_embeddings"]:
        model.sanitize({})  # drops lm_head, as loading a tied checkpoint does
    model.update(tree_unflatten(random_weights(model, seed, getattr(mx, dtype))))
    if bits is not None:
        model, settings = quantize_model(model, settings, group_size, bits, mode=mode)
    folder.mkdir(parents=True)
    save_model(folder, model)
    (folder / "config.json").write_text(json.dumps(settings, indent=2))
    write_tokenizer(folder)
    return folder


def random_weights(model, seed: int, dtype: mx.Dtype) -> list[tuple[str, mx.array]]:
    """Matrices ~ N(0, 1/in); norms lie around 1 and biases around 0, never where MLX's own random numbers put them."""
    rng = np.random.default_rng(seed)
    weights = []
    for name, value in sorted(tree_flatten(model.parameters())):
        noise = rng.standard_normal(value.shape).astype(np.float32)
        bias = name.endswith("bias")
        start, spread = (0.0, value.shape[-1] ** -0.5) if value.ndim > 1 else (0.0 if bias else np.array(value), 0.1)
        weights.append((name, mx.array(start + spread * noise).astype(dtype)))
    return weights


def write_tokenizer(folder: Path) -> None:
    """Train a byte-level BPE on a few sentences and write tokenizer.json and tokenizer_config.json."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|endoftext|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
