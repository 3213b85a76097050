"""Make tests/fixtures/peft with the real peft and transformers: tiny bases, adapters, and PEFT's logits.

    pip install torch==2.13.0 transformers==5.23.0 peft==0.21.2
    python scripts/make_peft_fixtures.py [ARCHITECTURE ...] [resized] [vision] [eva]

One folder per architecture: `base/` (saved by transformers in float32), `logits.safetensors` (the input ids
and, per case, PEFT's logits, of a tied embedding merged and unmerged) and one adapter folder per case. `refused/`
holds adapters that cannot be expressed as an MLX adapter, `resized/` those of a base whose vocabulary was changed
first, with the logits of all its tokens. `rope/` holds bases alone, one per form of rope parameters, with their logits.
Every case is checked here to move the logits by more than 0.05, so that a test on it can fail.
"""

import copy
import json
import os
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

import peft
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedTokenizerFast

ROOT = Path("tests/fixtures/peft")
VOCAB, HIDDEN, EXPERTS, TOKENS = 64, 32, 4, 8
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
DENSE = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}
THETA = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
SPARSE = {
    "num_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 24,
}
GATED_DELTA = {
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "full_attention_interval": 2,
    "layer_types": ["linear_attention", "full_attention"],
}
# mlx-lm leaves two of Falcon-H1's multipliers out, so those are 1 here.
FALCON = {
    "mamba_d_ssm": 32,
    "mamba_n_heads": 4,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
    "mamba_d_conv": 4,
    "mamba_chunk_size": 8,
    "mamba_rms_norm": False,
    "time_step_limit": [0.0, 100.0],
    "attention_in_multiplier": 1.0,
    "key_multiplier": 1.0,
    "attention_out_multiplier": 0.9,
    "embedding_multiplier": 1.7,
    "lm_head_multiplier": 0.4,
    "mlp_multipliers": [0.7, 1.3],
    "ssm_in_multiplier": 1.25,
    "ssm_out_multiplier": 0.5,
    "ssm_multipliers": [0.9, 0.8, 0.7, 1.1, 1.2],
}
BASES = {
    "llama": {**THETA, "tie_word_embeddings": False},
    "qwen2": {**THETA, "tie_word_embeddings": True},
    "qwen3": {**THETA, "tie_word_embeddings": True},
    # mlx-lm rounds sqrt(hidden size) to bfloat16 here; of 16 it is exact.
    "gemma3_text": {
        "hidden_size": 16,
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 8,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 30.0},
            "full_attention": {"rope_type": "default", "rope_theta": 700.0},
        },
    },
    "phi3": {**THETA, "tie_word_embeddings": False},
    "mixtral": {**THETA, "tie_word_embeddings": False, "num_local_experts": EXPERTS, "num_experts_per_tok": 2},
    "qwen3_moe": {
        **THETA,
        "tie_word_embeddings": False,
        "num_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "decoder_sparse_step": 1,
        "norm_topk_prob": True,
    },
    "gpt2": {"n_embd": HIDDEN, "n_layer": 2, "n_head": 4, "n_positions": 32},
    # Those whose weights mlx-lm changes when it loads them.
    "falcon_h1": {**THETA, **FALCON, "tie_word_embeddings": False},
    "falcon_h1-tied": {**THETA, **FALCON, "tie_word_embeddings": True},
    "qwen3_next": {
        **THETA,
        **GATED_DELTA,
        **SPARSE,
        "tie_word_embeddings": False,
        "decoder_sparse_step": 1,
        "norm_topk_prob": True,
    },
    "qwen3_5_text": {**THETA, **GATED_DELTA, "tie_word_embeddings": False},
    "qwen2_moe": {**THETA, **SPARSE, "tie_word_embeddings": False, "decoder_sparse_step": 1, "norm_topk_prob": False},
    "lfm2_moe": {
        "rope_parameters": THETA["rope_parameters"],
        "rope_theta": 500.0,
        **SPARSE,
        "num_dense_layers": 1,
        "layer_types": ["conv", "full_attention"],
        "tie_word_embeddings": True,
    },
    # Those whose fused experts transformers keeps as (experts, in, out), telling PEFT so or not.
    "gpt_oss": {
        "rope_parameters": THETA["rope_parameters"],
        "tie_word_embeddings": False,
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "llama4_text": {
        **THETA,
        "tie_word_embeddings": False,
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": 1,
        "intermediate_size": 40,
        "intermediate_size_mlp": 48,
        "interleave_moe_layer_step": 2,
        "attention_chunk_size": 64,
        "num_hidden_layers": 4,
    },
    # Its checkpoint has two ends, though its config says that they are one; its router is a bare matrix in mlx-lm.
    "glm4_moe": {
        **THETA,
        **{name: size for name, size in SPARSE.items() if name.startswith(("num", "moe"))},
        "n_routed_experts": EXPERTS,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "norm_topk_prob": True,
        "use_qk_norm": False,
        "tie_word_embeddings": False,
    },
}
MLP = ["gate_proj", "up_proj", "down_proj"]
MOE_ALL = {"target_modules": ATTENTION, "target_parameters": ["gate_up_proj", "down_proj", "gate.weight"]}
PATTERNS = {
    "rank_pattern": {r"layers\.0\..*q_proj": 2, "model.layers.1.mlp.down_proj": 6, "proj": 5},
    "alpha_pattern": {"v_proj": 3.5, r".*\.1\.self_attn.*": 7, "up_proj": 9},
}
FUSED = {
    "fused": {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    "gate-up-only": {"target_modules": [], "target_parameters": ["experts.gate_up_proj"], "use_rslora": True},
    "down-only": {"target_modules": ["o_proj"], "target_parameters": ["experts.down_proj"]},
    "router": {"target_modules": [], "target_parameters": ["router.weight"]},
}
# architecture -> case -> LoraConfig arguments; "_name", "_dtype", "_merged" and "_edit" steer the script.
CONVERTED = {
    "llama": {
        "all-linear": {"target_modules": "all-linear"},
        "float-alpha": {"target_modules": ["q_proj", "v_proj"], "lora_alpha": 5.5},
        "regex": {"target_modules": r".*\.(0\.self_attn\.[qk]_proj|1\.mlp\.up_proj)"},
        "full-paths": {"target_modules": ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.gate_proj"]},
        "exclude": {"target_modules": "all-linear", "exclude_modules": ["k_proj", r"model.layers.0.mlp.up_proj"]},
        "one-layer": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": 1},
        "layers-list": {"target_modules": ["v_proj"], "layers_to_transform": [0], "layers_pattern": "layers"},
        "rslora": {"target_modules": ATTENTION, "use_rslora": True, "r": 3},
        "patterns": {"target_modules": [*ATTENTION, "up_proj", "down_proj"], **PATTERNS},
        "patterns-rslora-dora": {
            "target_modules": [*ATTENTION, "down_proj"],
            **PATTERNS,
            "use_rslora": True,
            "use_dora": True,
        },
        "dora": {"target_modules": "all-linear", "use_dora": True},
        "embeddings": {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
        "bfloat16": {"target_modules": ["q_proj", "down_proj"], "_dtype": torch.bfloat16},
        "float16": {"target_modules": ["k_proj", "up_proj"], "_dtype": torch.float16},
        "name-in-keys": {"target_modules": ["q_proj", "v_proj"], "_edit": "name-in-keys"},
        "subfolder": {"target_modules": ["o_proj"], "_name": "sql"},
        "newer-fields": {"target_modules": ["o_proj"], "_edit": "newer-fields"},
        "gaussian": {"target_modules": ["o_proj"], "init_lora_weights": "gaussian"},
        "orthogonal": {"target_modules": ["o_proj"], "init_lora_weights": "orthogonal"},
        "pissa-converted": {"target_modules": ["q_proj"], "init_lora_weights": "pissa", "_edit": "pissa"},
        "parameters-2d": {"target_modules": [], "target_parameters": ["self_attn.q_proj.weight"]},
        "bias-without-biases": {"target_modules": ["o_proj"], "bias": "all"},
        "dropout": {"target_modules": ["gate_proj"], "lora_dropout": 0.1, "task_type": "CAUSAL_LM"},
    },
    "qwen2": {
        "all-linear": {"target_modules": "all-linear"},
        "tied-embedding": {"target_modules": ["embed_tokens", "v_proj"], "_merged": True},
        "ensure-tying": {"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
        "dora": {"target_modules": ["q_proj", "down_proj"], "use_dora": True},
    },
    "qwen3": {
        "all-linear": {"target_modules": "all-linear"},
        "rslora-dora": {"target_modules": ATTENTION, "use_dora": True, "use_rslora": True},
    },
    "gemma3_text": {
        "all-linear": {"target_modules": "all-linear"},
        "tied-embedding": {"target_modules": ["embed_tokens", "q_proj"], "_merged": True},
    },
    "phi3": {
        "all-linear": {"target_modules": "all-linear"},
        "dora": {"target_modules": ["qkv_proj", "gate_up_proj"], "use_dora": True},
        "lm-head": {"target_modules": ["qkv_proj", "lm_head"]},
        "mica": {"target_modules": ["o_proj"], "init_lora_weights": "mica"},
        "velora": {"target_modules": ["o_proj", "down_proj"], "velora_config": {"num_groups": 4}},
    },
    "mixtral": {
        "fused": MOE_ALL,
        "gate-up-only": {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj"]},
        "down-only": {"target_modules": [], "target_parameters": ["experts.down_proj"]},
        "router": {"target_modules": [], "target_parameters": ["mlp.gate.weight"]},
        "per-expert": {"_edit": "per-expert"},
    },
    "qwen3_moe": {
        "fused": MOE_ALL,
        "fused-patterns": {
            **MOE_ALL,
            "rank_pattern": {r".*\.gate_up_proj": 8, "down_proj": 2},
            "alpha_pattern": {r".*\.gate_up_proj": 16},
            "use_rslora": True,
        },
        "all-linear": {"target_modules": "all-linear"},
        "attention-dora": {"target_modules": ATTENTION, "use_dora": True},
        "down-only": {"target_modules": ["k_proj"], "target_parameters": ["down_proj"]},
        "per-expert": {"_edit": "per-expert"},
        "some-experts": {"_edit": "some-experts"},
    },
    "gpt2": {
        "all-linear": {"target_modules": "all-linear", "fan_in_fan_out": True},
        "attention": {"target_modules": ["c_attn"], "fan_in_fan_out": True, "use_rslora": True},
        "dora": {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True, "use_dora": True},
        "tied-embedding": {"target_modules": ["wte", "c_attn"], "fan_in_fan_out": True, "_merged": True},
    },
    "falcon_h1": {
        "linear": {"target_modules": [*ATTENTION, "in_proj", *MLP, "lm_head", "embed_tokens"]},
        "dora": {
            "target_modules": ["q_proj", "o_proj", "in_proj", "gate_proj", "down_proj", "lm_head"],
            "use_dora": True,
        },
        "bfloat16": {"target_modules": ["in_proj", "down_proj"], "_dtype": torch.bfloat16},
    },
    "falcon_h1-tied": {"tied-embedding": {"target_modules": ["embed_tokens", "o_proj"], "_merged": True}},
    "qwen3_next": {"linear": {"target_modules": [*ATTENTION, "in_proj_qkvz", "in_proj_ba", "out_proj", *MLP]}},
    "qwen3_5_text": {
        "linear": {"target_modules": [*ATTENTION, "in_proj_qkv", "in_proj_z", "in_proj_a", "out_proj", *MLP]},
        "dora": {"target_modules": "all-linear", "use_dora": True},
    },
    "qwen2_moe": {"linear": {"target_modules": "all-linear"}},
    "glm4_moe": {},
    "lfm2_moe": {"linear": {"target_modules": "all-linear"}},
    "gpt_oss": FUSED,
    "llama4_text": FUSED,
}
SMALL = {"target_modules": ["q_proj"]}
NORMS = ["input_layernorm", "post_attention_layernorm", "norm", "q_norm", "k_norm"]
REFUSED = {
    "llama": {
        "lora-bias": (peft.LoraConfig, {**SMALL, "lora_bias": True}),
        "modules-to-save": (peft.LoraConfig, {**SMALL, "modules_to_save": ["lm_head"]}),
        "norms-to-save": (peft.LoraConfig, {**SMALL, "modules_to_save": ["input_layernorm"]}),
        "only-modules-to-save": (
            peft.LoraConfig,
            {
                "target_modules": [],
                "target_parameters": ["q_proj.weight"],
                "modules_to_save": ["embed_tokens", "lm_head", "down_proj"],
            },
        ),
        "trainable-tokens": (peft.LoraConfig, {**SMALL, "trainable_token_indices": {"embed_tokens": [3, 5]}}),
        "embedding-dora": (peft.LoraConfig, {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True}),
        "pissa": (peft.LoraConfig, {**SMALL, "init_lora_weights": "pissa"}),
        "olora": (peft.LoraConfig, {**SMALL, "init_lora_weights": "olora"}),
        "alora": (peft.LoraConfig, {**SMALL, "alora_invocation_tokens": [5, 6], "task_type": "CAUSAL_LM"}),
        "layer-replication": (peft.LoraConfig, {**SMALL, "layer_replication": [[0, 2], [1, 2]]}),
        "adalora": (peft.AdaLoraConfig, {**SMALL, "total_step": 10}),
        "ia3": (peft.IA3Config, {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
        "loha": (peft.LoHaConfig, {**SMALL, "r": 2}),
        "lokr": (peft.LoKrConfig, {**SMALL, "r": 2}),
        "vera": (peft.VeraConfig, {**SMALL, "r": 2, "save_projection": False}),
        "prompt-tuning": (peft.PromptTuningConfig, {"num_virtual_tokens": 2, "task_type": "CAUSAL_LM"}),
    },
    "qwen2": {
        "tied-lm-head": (peft.LoraConfig, {"target_modules": ["lm_head"]}),
        "bias-all": (peft.LoraConfig, {**SMALL, "bias": "all"}),
        "bias-lora-only": (peft.LoraConfig, {**SMALL, "bias": "lora_only"}),
        "tied-modules-to-save": (peft.LoraConfig, {**SMALL, "modules_to_save": ["embed_tokens"]}),
        "tied-tokens": (peft.LoraConfig, {**SMALL, "trainable_token_indices": [7, 9, 11]}),
        "resized": (peft.LoraConfig, {"target_modules": ["embed_tokens"], "_edit": "resized"}),
        "tied-both-ends": (
            peft.LoraConfig,
            {"target_modules": ["embed_tokens", "lm_head", "k_proj"], "alpha_pattern": {"lm_head": 3}},
        ),
        "tied-head-to-save": (peft.LoraConfig, {**SMALL, "modules_to_save": ["lm_head"]}),
        "tied-both-to-save": (peft.LoraConfig, {**SMALL, "modules_to_save": ["embed_tokens", "lm_head"]}),
        "tied-to-save-ensured": (
            peft.LoraConfig,
            {**SMALL, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        ),
        "tied-head-tokens": (peft.LoraConfig, {**SMALL, "trainable_token_indices": {"lm_head": [3, 5]}}),
        "tied-tokens-and-head": (
            peft.LoraConfig,
            {"target_modules": ["lm_head"], "trainable_token_indices": {"embed_tokens": [3, 5]}},
        ),
    },
    "qwen3": {
        "tied-lm-head-dora": (peft.LoraConfig, {"target_modules": ["lm_head", "v_proj"], "use_dora": True}),
    },
    "gemma3_text": {
        "tied-lm-head": (peft.LoraConfig, {"target_modules": ["lm_head", "up_proj"]}),
    },
    "gpt2": {
        "bias-all": (peft.LoraConfig, {"target_modules": ["c_attn"], "fan_in_fan_out": True, "bias": "all"}),
        "conv1d-to-save": (
            peft.LoraConfig,
            {"target_modules": ["c_attn"], "fan_in_fan_out": True, "modules_to_save": ["attn.c_proj", "ln_1"]},
        ),
    },
    "falcon_h1": {
        "modules-to-save": (
            peft.LoraConfig,
            {**SMALL, "modules_to_save": ["embed_tokens", "lm_head", "in_proj", "down_proj", "input_layernorm"]},
        ),
        "trainable-tokens": (peft.LoraConfig, {**SMALL, "trainable_token_indices": {"embed_tokens": [3, 5]}}),
    },
    "falcon_h1-tied": {
        "tied-lm-head": (peft.LoraConfig, {"target_modules": ["lm_head", "o_proj"]}),
        "tied-both-ends": (
            peft.LoraConfig,
            {"target_modules": ["embed_tokens", "lm_head", "k_proj"], "alpha_pattern": {"lm_head": 3}},
        ),
        "tied-modules-to-save": (peft.LoraConfig, {**SMALL, "modules_to_save": ["embed_tokens"]}),
    },
    **{
        arch: {
            "experts-to-save": (peft.LoraConfig, {**SMALL, "modules_to_save": ["experts"]}),
            "head-tokens": (peft.LoraConfig, {**SMALL, "trainable_token_indices": {"lm_head": [3, 5]}}),
        }
        for arch in ("gpt_oss", "llama4_text")
    },
    "glm4_moe": {
        "tokens": (peft.LoraConfig, {**SMALL, "trainable_token_indices": [3, 5, 9]}),
        "other-tokens": (
            peft.LoraConfig,
            {**SMALL, "trainable_token_indices": {"embed_tokens": [3, 5], "lm_head": [4]}},
        ),
        "router": (peft.LoraConfig, {"target_modules": [], "target_parameters": ["mlp.gate.weight"]}),
    },
    "mixtral": {"experts-to-save": (peft.LoraConfig, {**SMALL, "modules_to_save": ["experts"]})},
    "qwen3_next": {"norms-to-save": (peft.LoraConfig, {**SMALL, "modules_to_save": NORMS})},
    "qwen3_5_text": {"norms-to-save": (peft.LoraConfig, {**SMALL, "modules_to_save": NORMS})},
}
# architecture -> case -> (rows of the embedding, LoraConfig arguments): the vocabulary is resized before the training.
ENDS = ["embed_tokens", "lm_head"]
RESIZED = {
    "llama": {
        "attention": (VOCAB + 3, SMALL),
        "both-ends": (VOCAB + 3, {"target_modules": [*ENDS, "v_proj"]}),
        "input": (VOCAB + 2, {"target_modules": ["embed_tokens", "v_proj"]}),
        "to-save": (VOCAB + 3, {**SMALL, "modules_to_save": ENDS}),
        "dora-to-save": (VOCAB + 1, {**SMALL, "use_dora": True, "modules_to_save": ENDS}),
        "tokens": (VOCAB + 2, {**SMALL, "trainable_token_indices": {"embed_tokens": [5, VOCAB, VOCAB + 1]}}),
        "fewer": (VOCAB - 4, {"target_modules": [*ENDS, "q_proj"]}),
        "fewer-attention": (VOCAB - 4, SMALL),
    },
    "qwen2": {
        "attention": (VOCAB + 3, SMALL),
        "embedding": (VOCAB + 3, {"target_modules": ["embed_tokens", "q_proj"]}),
        "head": (VOCAB + 3, {"target_modules": ["lm_head", "q_proj"]}),
        "to-save": (VOCAB + 3, {**SMALL, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
        "both-to-save": (VOCAB + 2, {**SMALL, "modules_to_save": ENDS}),
        "fewer": (VOCAB - 4, {"target_modules": ["embed_tokens"]}),
    },
    "gpt2": {"attention": (VOCAB + 3, {"target_modules": ["c_attn"], "fan_in_fan_out": True})},
    "falcon_h1": {"both-ends": (VOCAB + 3, {"target_modules": [*ENDS, "q_proj"]})},
}
# Models of text and pictures, the adapter on all of it; the logits are of text.
TEXT = {k: v for k, v in DENSE.items() if k not in ("vocab_size",)} | {"vocab_size": VOCAB, "intermediate_size": 32}
TOWER = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "patch_size": 8}
VISION = {
    "gemma3": {
        "text_config": {**TEXT, **{k: v for k, v in BASES["gemma3_text"].items() if k != "tie_word_embeddings"}},
        "vision_config": {**TOWER, "num_hidden_layers": 2, "image_size": 32},
        "vocab_size": VOCAB,
        "mm_tokens_per_image": 4,
        "image_token_index": 5,
    },
    "qwen3_vl": {
        "text_config": {
            **TEXT,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "mrope_section": [2, 1, 1]},
        },
        "vision_config": {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "patch_size": 4,
            "depth": 2,
            "out_hidden_size": HIDDEN,
            "deepstack_visual_indexes": [0],
            "num_position_embeddings": 16,
        },
        "tie_word_embeddings": True,
        "image_token_id": 5,
        "video_token_id": 6,
        "vision_start_token_id": 7,
        "vision_end_token_id": 8,
    },
}
MERGERS = {"gemma3": ["multi_modal_projector"], "qwen3_vl": ["merger"]}
LONG = {"long_factor": [1.5, 2.0, 3.0, 4.0], "short_factor": [1.5, 2.0, 3.0, 4.0]}
# Forms of rope parameters that mlx-lm expresses; logits of the base alone.
ROPE = {
    "llama-linear": ("llama", {"rope_type": "linear", "factor": 4.0, "rope_theta": 300.0}),
    "llama-llama3": (
        "llama",
        {
            "rope_type": "llama3",
            "rope_theta": 300.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    ),
    "qwen2-yarn": (
        "qwen2",
        {"rope_type": "yarn", "factor": 4.0, "rope_theta": 300.0, "original_max_position_embeddings": 32},
    ),
    "qwen3-yarn": (
        "qwen3",
        {"rope_type": "yarn", "factor": 2.0, "rope_theta": 900.0, "original_max_position_embeddings": 64},
    ),
    "phi3-partial": ("phi3", {"rope_type": "default", "rope_theta": 300.0, "partial_rotary_factor": 0.5}),
    "phi3-longrope": ("phi3", {"rope_type": "longrope", "rope_theta": 300.0, **LONG}),
    "gemma3_text-linear": (
        "gemma3_text",
        {
            "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 900.0},
        },
    ),
    "qwen3_moe-default": ("qwen3_moe", {"rope_type": "default", "rope_theta": 50.0}),
}


def scramble(model, seed, only=None):
    """Fill parameters with noise whose size keeps logits of order one and float32 errors far below 1e-4."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.named_parameters():
        if only is not None and only not in name:
            continue
        noise = torch.randn(value.shape, generator=generator)
        with torch.no_grad():
            if "magnitude" in name:
                value.mul_(1 + 0.2 * noise)
            elif "norm" in name or "ln_" in name or name.endswith(".bias"):
                value.add_(0.1 * noise)
            else:
                value.copy_(noise * (0.3 if only else 1.5 / value.shape[-1] ** 0.5))


def build_base(model_type, extra, seed):
    common = DENSE if "n_embd" not in extra else {k: v for k, v in DENSE.items() if "_id" in k or k == "vocab_size"}
    config = CONFIG_MAPPING[model_type.partition("-")[0]](**copy.deepcopy({**common, **extra}))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    scramble(model, seed)
    return model


SAYS_TIED = ("glm4_moe",)


def save_base(model, folder):
    if hasattr(model, "transformer"):  # as on the Hub, gpt2's tensors carry no "transformer." in front
        model.transformer.save_pretrained(folder)
    else:
        model.save_pretrained(folder)
    if type(model).__name__ == "GptOssForCausalLM":
        as_mlx_has_it(folder / "model.safetensors")
    if type(model).__name__ == "Llama4ForCausalLM":  # as on the Hub, in the names of the model of texts and pictures
        file = folder / "model.safetensors"
        save_file({f"language_model.{k}": v for k, v in load_file(file).items()}, file, metadata={"format": "pt"})
    if model.config.model_type in SAYS_TIED:
        config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": True}
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True))
    words = {f"w{i}": i for i in range(3, VOCAB)} | {"<pad>": 0, "<s>": 1, "</s>": 2}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    named = folder / "tokenizer_config.json"  # as written, loading would take the architecture's own class
    named.write_text(named.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))
    (folder / "generation_config.json").unlink(missing_ok=True)
    config = json.loads((folder / "config.json").read_text())
    if config["model_type"].endswith("_text") and "gemma" not in config["model_type"]:  # as on the Hub
        config = {
            "model_type": config["model_type"].removesuffix("_text"),
            "text_config": config,
            "tie_word_embeddings": config["tie_word_embeddings"],
        }
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True))


def as_mlx_has_it(file):
    """mlx-lm reads gpt-oss packed in few bits only: the original beside the base, the base in mlx-lm's own form."""
    original, own = file.parent.with_name("original"), {}
    original.mkdir(exist_ok=True)
    shutil.copy(file, original / file.name)
    for name, tensor in load_file(file).items():
        path, _, leaf = name.rpartition(".experts.")
        if leaf.startswith("gate_up_proj"):
            for i, half in enumerate(("gate_proj", "up_proj")):
                part = tensor[..., i::2]
                end = "bias" if leaf.endswith("_bias") else "weight"
                own[f"{path}.experts.{half}.{end}"] = (part if end == "bias" else part.transpose(1, 2)).contiguous()
        elif leaf.startswith("down_proj"):
            end = "bias" if leaf.endswith("_bias") else "weight"
            own[f"{path}.experts.down_proj.{end}"] = (tensor if end == "bias" else tensor.transpose(1, 2)).contiguous()
        else:
            own[name] = tensor
    save_file(own, file, metadata={"format": "mlx"})


def load_base(arch):
    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    if not (ROOT / arch / "original").is_dir():
        return AutoModelForCausalLM.from_pretrained(ROOT / arch / "base", **options).eval()
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT / arch / "base", folder, dirs_exist_ok=True)
        shutil.copytree(ROOT / arch / "original", folder, dirs_exist_ok=True)
        model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    model.name_or_path = str(ROOT / arch / "base")
    return model


@torch.no_grad()
def logits_of(model, ids):
    return model(input_ids=ids, use_cache=False).logits.float().contiguous()


def make_adapter(arch, config_class, options, folder, seed):
    """Save one adapter to `folder` and return the PEFT model that holds it."""
    options = dict(options)
    name, dtype, edit = options.pop("_name", "default"), options.pop("_dtype", None), options.pop("_edit", None)
    options.pop("_merged", None)
    if edit in ("per-expert", "some-experts"):
        return per_expert_adapter(arch, folder, seed, edit)
    if config_class in (peft.LoraConfig, peft.AdaLoraConfig):
        options = {"r": 4, "lora_alpha": 8, **options}
    torch.manual_seed(seed)
    base = load_base(arch)
    if rows := options.pop("_rows", VOCAB + 2 if edit == "resized" else None):
        base.resize_token_embeddings(rows, mean_resizing=False)
    model = peft.get_peft_model(base, config_class(**options), adapter_name=name).eval()
    if edit == "pissa":
        model.save_pretrained(folder / "initial")
    trained = "modules_to_save", "trainable_tokens", "lora_", "ia3_", "hada_", "lokr_", "prompt", "vera_lambda"
    for key in trained:
        scramble(model, seed, key)
    if options.get("bias", "none") != "none":
        for key, value in model.named_parameters():
            if key.endswith(".bias") and value.requires_grad:
                torch.nn.init.normal_(value, std=0.3)
    if dtype:
        for key, value in model.named_parameters():
            if "lora_" in key:
                value.data = value.data.to(dtype)
    keep = {"path_initial_model_for_weight_conversion": folder / "initial"} if edit == "pissa" else {}
    model.save_pretrained(folder, **keep)
    shutil.rmtree(folder / "initial", ignore_errors=True)
    tidy(folder, edit)
    return model


def per_expert_adapter(arch, folder, seed, edit):
    """The transformers 4 layout: one A and B per expert and projection. PEFT fuses it when it loads it."""
    block, names = {"mixtral": ("block_sparse_moe", ("w1", "w3", "w2")), "qwen3_moe": ("mlp", MLP)}[arch]
    inner = 48 if arch == "mixtral" else 16
    generator = torch.Generator().manual_seed(seed)
    tensors, zeroed = {}, {}
    for layer in range(2):
        for expert in range(EXPERTS):
            for projection in names:
                width = (inner, HIDDEN) if projection in ("w2", "down_proj") else (HIDDEN, inner)
                path = f"base_model.model.model.layers.{layer}.{block}.experts.{expert}.{projection}"
                a = torch.randn((4, width[0]), generator=generator) * 0.3
                b = torch.randn((width[1], 4), generator=generator) * 0.3
                kept = edit == "per-expert" or expert in (0, 2)
                target = tensors if kept else zeroed
                target[f"{path}.lora_A.weight"], target[f"{path}.lora_B.weight"] = a, b if kept else b * 0
        path = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        tensors[f"{path}.lora_A.weight"] = torch.randn((4, HIDDEN), generator=generator) * 0.3
        tensors[f"{path}.lora_B.weight"] = torch.randn((32, 4), generator=generator) * 0.3
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", *names], base_model_name_or_path=str(ROOT / arch / "base")
    )
    for target, content in ((folder, tensors), (folder.with_name("whole"), tensors | zeroed)):
        target.mkdir(parents=True, exist_ok=True)
        config.save_pretrained(target)
        save_file(content, target / "adapter_model.safetensors", metadata={"format": "pt"})
    model = peft.PeftModel.from_pretrained(load_base(arch), folder.with_name("whole")).eval()
    shutil.rmtree(folder.with_name("whole"))
    tidy(folder, None)
    return model


def tidy(folder, edit):
    for file in folder.rglob("README.md"):
        file.unlink()
    for path in folder.rglob("adapter_config.json"):  # PEFT writes sets, in any order
        config = json.loads(path.read_text())
        fields = ("target_modules", "target_parameters", "exclude_modules", "modules_to_save", "feedforward_modules")
        config |= {field: sorted(config[field]) for field in fields if isinstance(config.get(field), list)}
        path.write_text(json.dumps(config, indent=2, sort_keys=True))
    path = folder / "adapter_model.safetensors"
    if edit == "name-in-keys":
        tensors = {k.replace(".weight", ".default.weight"): v for k, v in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})
    if edit == "newer-fields":
        config = json.loads((folder / "adapter_config.json").read_text())
        config |= {"peft_version": "0.99.0", "a_newer_field": None, "another": {"nested": [1, 2]}}
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True))


def make_architecture(arch, extra, seed):
    folder = ROOT / arch
    save_base(build_base(arch, extra, seed), folder / "base")
    ids = torch.randint(3, VOCAB, (1, TOKENS), generator=torch.Generator().manual_seed(seed))
    base_logits = logits_of(load_base(arch), ids)
    saved = {"input_ids": ids.to(torch.int32), "base": base_logits}
    cases = {n: (peft.LoraConfig, o, folder / n) for n, o in CONVERTED[arch].items()}
    cases |= {n: (c, o, folder / "refused" / n) for n, (c, o) in REFUSED.get(arch, {}).items()}
    for index, (name, (config_class, options, target)) in enumerate(cases.items()):
        model = make_adapter(arch, config_class, options, target, 1000 * seed + index)
        # What counts is the adapter as PEFT loads it; it cannot load one that leaves experts out.
        if target.parent == folder and name != "some-experts":
            saved_in = target / options.get("_name", "")
            model = peft.PeftModel.from_pretrained(load_base(arch), saved_in).eval()
        key = name if target.parent == folder else f"refused/{name}"
        saved[key] = logits_of(model, ids)[:, -TOKENS:, :VOCAB].contiguous()
        if options.get("_merged"):
            saved[f"{key}/unmerged"] = saved[key]
            saved[key] = logits_of(copy.deepcopy(model).merge_and_unload(), ids)
        moved = (saved[key] - base_logits).abs().max().item()
        print(f"{arch}/{key}: moves the logits by {moved:.2f} of {base_logits.abs().max():.1f}", file=sys.stderr)
        assert moved > 0.05 or name == "alora", f"{arch}/{key} does nothing"
    save_file(saved, folder / "logits.safetensors")


def make_resized():
    """Vocabularies that were resized before the training, in either direction; all tokens are in the text."""
    for seed, (arch, cases) in enumerate(RESIZED.items(), 80):
        saved = {}
        for index, (name, (rows, options)) in enumerate(cases.items()):
            folder = ROOT / arch / "resized" / name
            shutil.rmtree(folder, ignore_errors=True)
            model = make_adapter(arch, peft.LoraConfig, {**options, "_rows": rows}, folder, 1000 * seed + index)
            last = [token for token in (rows - 1, VOCAB, 5) if token < rows]
            ids = torch.randint(3, min(rows, VOCAB), (1, TOKENS), generator=torch.Generator().manual_seed(seed))
            ids[0, : len(last)] = torch.tensor(last)
            saved |= {f"{name}/ids": ids.to(torch.int32), name: logits_of(model, ids)}
            tokenizer = PreTrainedTokenizerFast.from_pretrained(ROOT / arch / "base")
            if rows > VOCAB:
                tokenizer.add_tokens([f"<new{i}>" for i in range(rows - VOCAB)], special_tokens=True)
                tokenizer.save_pretrained(folder)
                named = folder / "tokenizer_config.json"
                named.write_text(named.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))
        save_file(saved, ROOT / arch / "resized" / "logits.safetensors")


def make_vision():
    for seed, (arch, extra) in enumerate(VISION.items(), 90):
        folder = ROOT / "vision" / arch
        shutil.rmtree(folder, ignore_errors=True)
        config = CONFIG_MAPPING[arch](**copy.deepcopy(extra))
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
        scramble(model, seed)
        save_base(model, folder / "base")
        ids = torch.randint(9, VOCAB, (1, TOKENS), generator=torch.Generator().manual_seed(seed))
        saved = {"input_ids": ids.to(torch.int32), "base": logits_of(model, ids)}
        for name, options in {"all-linear": {}, "merger-saved": {"modules_to_save": MERGERS[arch]}}.items():
            torch.manual_seed(seed)
            options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **options}
            adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**options)).eval()
            scramble(adapted, seed, "lora_")
            adapted.save_pretrained(folder / name)
            tidy(folder / name, None)
            saved[name] = logits_of(adapted, ids)
        save_file(saved, folder / "logits.safetensors")


def make_rope():
    for seed, (name, (arch, rope)) in enumerate(ROPE.items(), 50):
        sizes = {
            "hidden_size": 16,
            "head_dim": 8,
            "intermediate_size": 16,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 128,
            "num_hidden_layers": 2,
        }
        if name == "phi3-longrope":
            sizes["original_max_position_embeddings"] = 64
        model = build_base(arch, {**BASES[arch], **sizes, "rope_parameters": rope}, seed)
        save_base(model, ROOT / "rope" / name / "base")
        ids = torch.randint(3, VOCAB, (1, 24), generator=torch.Generator().manual_seed(seed))
        saved = {"input_ids": ids.to(torch.int32), "base": logits_of(model, ids)}
        save_file(saved, ROOT / "rope" / name / "logits.safetensors")


def make_eva():
    """Where the inputs of llama's layers vary most, and how PEFT shares out the ranks, of one batch."""
    from peft.tuners.lora.eva import get_eva_state_dict

    ids = torch.randint(3, VOCAB, (8, 24), generator=torch.Generator().manual_seed(0))
    mask = torch.rand(ids.shape, generator=torch.Generator().manual_seed(1)) < 0.6
    batch = {"input_ids": ids, "labels": torch.where(mask, ids, -100)}
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights="eva", eva_config=peft.EvaConfig())
    config.target_modules = {*ATTENTION, *MLP}
    state = get_eva_state_dict(load_base("llama"), [batch], config, show_progress_bar=False)
    directions = {name: vectors.float().contiguous() for name, vectors in state.items()}
    save_file({"ids": ids.to(torch.int32), "mask": mask, **directions}, ROOT / "eva.safetensors")
    print({name: len(vectors) for name, vectors in directions.items()}, file=sys.stderr)


def main():
    warnings.filterwarnings("ignore")
    transformers.utils.logging.disable_progress_bar()
    only = sys.argv[1:]
    for seed, (arch, extra) in enumerate(BASES.items(), 1):
        if not only or arch in only:
            shutil.rmtree(ROOT / arch, ignore_errors=True)
            make_architecture(arch, extra, seed)
    if not only or "resized" in only:
        make_resized()
    if not only or "vision" in only:
        make_vision()
    if not only or "eva" in only:
        make_eva()
    if not only:
        shutil.rmtree(ROOT / "rope", ignore_errors=True)
        make_rope()
    leaked = [p for p in ROOT.rglob("*.json") if os.getcwd() in p.read_text() or tempfile.gettempdir() in p.read_text()]
    assert not leaked, leaked
    print(sum(p.stat().st_size for p in ROOT.rglob("*") if p.is_file()) / 1e6, "MB", file=sys.stderr)


if __name__ == "__main__":
    main()
