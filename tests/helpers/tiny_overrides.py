"""What `tiny_configs` cannot guess: settings that hang together, layers of several kinds in one small stack.

A model's own entries replace what was guessed. "text" holds those of its `text_config`.
"""

FULL, SLIDING = "full_attention", "sliding_attention"
BOTH = [SLIDING, FULL]
ROPE = {"rope_theta": 10000.0, "rope_type": "default"}
YARN = {
    "rope_theta": 10000.0,
    "rope_type": "yarn",
    "type": "yarn",
    "factor": 2.0,
    "original_max_position_embeddings": 1024,
    "llama_4_scaling_beta": 0.1,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
LINEAR = {
    "kda_layers": [1, 3],
    "full_attn_layers": [2, 4],
    "num_heads": 2,
    "head_dim": 32,
    "short_conv_kernel_size": 4,
}
UNTIED = {"tie_word_embeddings": False}

OVERRIDES: dict[str, dict] = {
    "apertus": UNTIED,
    "baichuan_m1": {"conv_window": 2, "sliding_window_layers": [1]},
    "bailing_hybrid": {"layer_group_size": 2},
    "bailing_moe_linear": {"layer_group_size": 2},
    "bailing_moe_v3": {"layer_group_size": 2},
    "cohere2": {"sliding_window_pattern": 2},
    "dbrx": {
        "ffn_config": {"ffn_hidden_size": 128, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
    },
    "deepseek_v2": {"rope_scaling": YARN},
    "deepseek_v41": {"head_dim": 64, "compress_ratios": [1, 1], "kv_source_layer_ids": [0, 1]},
    "exaone4": {"sliding_window_pattern": "LG", "layer_types": BOTH, "rope_scaling": {"rope_type": "default"}},
    "exaone_moe": {"layer_types": BOTH, "is_moe_layer": [False, True]},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "head_dim": 16},
    "gemma3": {"text": {"sliding_window_pattern": 2}},
    "gemma3_text": {"sliding_window_pattern": 2},
    "gemma3n": {
        "text": {
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 2,
            "layer_types": BOTH * 2,
            "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
            "hidden_size_per_layer_input": 32,
            "altup_num_inputs": 2,
            "altup_coef_clip": 120.0,
            "altup_correct_scale": True,
            "altup_active_idx": 0,
            "laurel_rank": 32,
            "final_logit_softcapping": 30.0,
        }
    },
    # Keys, values and per-layer inputs go from block to block by keyword; the last two blocks have no own keys.
    "gemma4_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": BOTH * 2,
        "hidden_size_per_layer_input": 32,
        "global_head_dim": 32,
        "rope_parameters": {
            FULL: {"rope_theta": 1000000.0, "rope_type": "proportional", "partial_rotary_factor": 0.25},
            SLIDING: ROPE,
        },
    },
    "glm_moe_dsa": {"topk_method": "noaux_tc"},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "mamba_expand": 1, "mamba_d_head": 16},
    "hunyuan": {"rope_scaling": {"type": "dynamic", "factor": 1.0, "alpha": 1.0}, "use_qk_norm": True},
    "jamba": {
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
        "mamba_expand": 2,
    },
    "kimi_k3": {"text": {"num_hidden_layers": 4, "linear_attn_config": LINEAR}},
    "kimi_linear": {
        "num_hidden_layers": 4,
        "linear_attn_config": LINEAR,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 32,
        "v_head_dim": 32,
    },
    "lfm2": {"block_dim": 64, "layer_types": ["conv", FULL]},
    "lfm2_moe": {"layer_types": ["conv", FULL], "use_expert_bias": True, "norm_topk_prob": True},
    "llama4": {
        "text": {
            "num_hidden_layers": 4,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": 16,
        }
    },
    "llama4_text": {"no_rope_layers": [1, 0], **UNTIED},
    "longcat_flash": {
        "attention_method": "MLA",
        "zero_expert_type": "identity",
        "mla_scale_q_lora": True,
        "mla_scale_kv_lora": True,
    },
    "longcat_flash_ngram": {"mla_scale_q_lora": True, "mla_scale_kv_lora": True},
    "mamba2": {"intermediate_size": 128, "num_heads": 8, "head_dim": 16, "time_step_limit": [0.0, 100.0]},
    "mellum": {"layer_types": BOTH, "rope_parameters": {FULL: ROPE, SLIDING: ROPE}},
    "mimo_v2_flash": {"hybrid_layer_pattern": [0, 1], "moe_layer_freq": [0, 1], "topk_method": "noaux_tc"},
    "minicpm3": {
        "rope_scaling": {
            "original_max_position_embeddings": 2048,
            "short_factor": [1.0] * 16,
            "long_factor": [1.0] * 16,
        }
    },
    "ministral3": {"rope_parameters": YARN, "layer_types": [FULL] * 2},
    "mistral4": {"rope_parameters": YARN},
    "muse_spark": {
        "audio_config": {"out_hidden_size": 64},
        "vision_config": None,
        "text": {
            "num_shared_experts": 0,
            "moe_hidden_size": 64,
            "layer_types": BOTH,
            "layer_rope_theta": [10000.0, 0],
            "rope_parameters": ROPE,
        },
    },
    "nemotron-nas": {
        "block_configs": [
            {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 1.5}},
            {"attention": {"replace_with_linear": True}, "ffn": {"ffn_mult": 1.5}},
        ]
    },
    "nemotron_h": {
        "hybrid_override_pattern": list("M*E-"),
        "moe_intermediate_size": 64,
        "moe_shared_expert_intermediate_size": 64,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 1.0,
        "norm_topk_prob": True,
    },
    "olmo2": UNTIED,
    "olmo3": {"layer_types": BOTH, **UNTIED},
    "olmoe": {"num_key_value_heads": 4, **UNTIED},
    "olmo_hybrid": {"layer_types": ["linear_attention", FULL]},
    "openelm": {
        "num_query_heads": [4, 4],
        "num_kv_heads": [2, 2],
        "ffn_multipliers": [2.0, 2.0],
        "ffn_dim_divisor": 32,
    },
    "phi3small": {"vocab_size": 100352},  # the ids that it never says lie at the end of its own vocabulary
    "plamo": {"n_shared_head": 2},
    "qwen3": {"rope_theta": 10000.0},
    "qwen3_5": {"text": {"full_attention_interval": 2, "num_experts": 0}},
    "qwen3_5_moe": {"text": {"full_attention_interval": 2}},
    "qwen3_next": {"full_attention_interval": 2, "norm_topk_prob": True},
    "qwen3_vl_moe": {"text": UNTIED},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "rwkv7": {"a_low_rank_dim": 64, "v_low_rank_dim": 64, "gate_low_rank_dim": 64, "decay_low_rank_dim": 64},
    "seed_oss": UNTIED,
    "spark2_5": {"layer_types": BOTH, "rope_parameters": {FULL: ROPE, SLIDING: ROPE}},
}
