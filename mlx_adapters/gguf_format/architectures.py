"""mlx-lm's model types that llama.cpp computes alike, and what it takes for granted of each.

Names of tensors are llama.cpp's own (the tables of the `gguf` package); hyperparameters are in `hyperparameters`. A
type is in this table once real llama.cpp has computed the same as mlx-lm from a file of it (`scripts/check_gguf.py`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mlx_adapters.config.mapping import require
from mlx_adapters.errors import ConfigError
from mlx_adapters.storage import tensor_names
from mlx_adapters.system.door import nn

Config = Mapping[str, Any]  # of the text model, with mlx-lm's defaults
CONVERTER = "write --format hf and use llama.cpp's converter."
FREQUENCIES = ("rope_freqs",)


def _nothing(config: Config) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Architecture:
    """One of llama.cpp's.

    `neighbours`: it rotates numbers 2i and 2i + 1 of a head together, not i and i + half. `fixed`: settings that it
    has no key for, with the only value that it computes. `extra`: hyperparameters beyond those that all have; raises
    ConfigError for a model that llama.cpp computes otherwise. `mixed`: its blocks may hold different tensors.
    `factors`: the tensors by which it divides rotary frequencies. `places`: of a tensor of ours and its known name,
    where else it goes, as (name, rows, columns).
    """

    name: str
    neighbours: bool = False
    fixed: Mapping[str, Any] = field(default_factory=dict)
    extra: Callable[[Config], dict[str, Any]] = _nothing
    mixed: bool = False
    factors: tuple[str, ...] = ()
    places: Callable[[str, str | None, Config], list[tuple[Any, ...]] | None] | None = None


def all_but_each(period: int, layers: int) -> list[bool]:
    """For each layer, whether it is another than the `period`-th, the next of that distance, and so on."""
    return [(i + 1) % period != 0 for i in range(layers)]


def _local(config: Config) -> list[bool]:
    types, period = config.get("layer_types"), config.get("sliding_window_pattern")
    if types:
        return [kind == "sliding_attention" for kind in types]
    if isinstance(period, str):  # "LLLG"
        return [period[i % len(period)] == "L" for i in range(config["num_hidden_layers"])]
    return all_but_each(period, config["num_hidden_layers"]) if isinstance(period, int) else []


def _windows(config: Config) -> dict[str, Any]:
    """Layers that see the last tokens only, if there are any."""
    local = _local(config)
    if not any(local):
        return {}
    return {"attention.sliding_window": config["sliding_window"], "attention.sliding_window_pattern": local}


def _no_windows(config: Config) -> dict[str, Any]:
    require(not any(_local(config)), "llama.cpp lets all layers of this model see all tokens.", CONVERTER)
    return {}


def _scores(config: Config, *large: int) -> None:
    """Gemma says by the root of what scores are divided; llama.cpp takes a head's width, once hidden / heads."""
    heads = config["hidden_size"] // config["num_attention_heads"]
    wanted = heads if config["num_hidden_layers"] in large else config["head_dim"]
    scalar = config["query_pre_attn_scalar"]
    require(scalar == wanted, f"llama.cpp divides scores by the root of {wanted}, this model by {scalar}'s.", CONVERTER)


def _gemma2(config: Config) -> dict[str, Any]:
    _scores(config, 46)
    # (mlx-lm lets all layers see all tokens; further than the window they differ, and the file is the original's)
    return {"attention.sliding_window": config.get("sliding_window") or 4096}


def _gemma3(config: Config) -> dict[str, Any]:
    _scores(config, 62)
    return _windows(config) | {"rope.freq_base_swa": float(config["rope_local_base_freq"])}


def _gemma4(config: Config) -> dict[str, Any]:
    shared, layers, local = config["num_kv_shared_layers"], config["num_hidden_layers"], _local(config)
    full, near = config.get("global_head_dim") or config["head_dim"], config["head_dim"]
    width, rope = config["intermediate_size"], config["rope_parameters"]
    wide = [width * (2 if config["use_double_wide_mlp"] and i >= layers - shared > 0 else 1) for i in range(layers)]
    heads = config["num_key_value_heads"]
    far = config.get("num_global_key_value_heads") if config["attention_k_eq_v"] else None
    made = {
        "attention.shared_kv_layers": shared,
        "embedding_length_per_layer_input": config["hidden_size_per_layer_input"],
        "attention.key_length": full,
        "attention.value_length": full,
        "attention.key_length_swa": near,
        "attention.value_length_swa": near,
        "feed_forward_length": wide if len(set(wide)) > 1 else width,
        "rope.dimension_count": full,
        "rope.dimension_count_swa": near,
        "rope.freq_base": float(rope["full_attention"]["rope_theta"]),
        "rope.freq_base_swa": float(rope["sliding_attention"]["rope_theta"]),
    }
    if far is not None:
        made["attention.head_count_kv"] = [heads if one else far for one in local]
    if not config.get("enable_moe_block"):
        made |= dict.fromkeys(("expert_count", "expert_used_count", "expert_feed_forward_length"))
    return made | _windows(config)


def _phi3(config: Config) -> dict[str, Any]:
    return {
        "attention.sliding_window": 0,
        "rope.scaling.original_context_length": config["original_max_position_embeddings"],
    }


def _smollm3(config: Config) -> dict[str, Any]:
    rotates = [bool(x) for x in config["no_rope_layers"]]
    require(rotates == all_but_each(4, len(rotates)), "llama.cpp leaves out rotation in every fourth layer.", CONVERTER)
    return _no_windows(config)


def _gpt_oss(config: Config) -> dict[str, Any]:
    return {"attention.sliding_window": config["sliding_window"], "attention.sliding_window_pattern": _local(config)}


def _exaone4(config: Config) -> dict[str, Any]:
    made = _windows({**config, "layer_types": None})  # (mlx-lm goes by the pattern)
    require(bool(made) == (config["num_hidden_layers"] == 64), "llama.cpp has windows in 64 layers alone.", CONVERTER)
    return made


def _lfm2(config: Config) -> dict[str, Any]:
    full = config.get("full_attn_idxs") or [i for i, x in enumerate(config["layer_types"]) if x == "full_attention"]
    heads = [config["num_key_value_heads"] if i in full else 0 for i in range(config["num_hidden_layers"])]
    return {"shortconv.l_cache": config["conv_L_cache"], "attention.head_count_kv": heads}


def _lfm2_moe(config: Config) -> dict[str, Any]:
    return _lfm2(config) | {"expert_gating_func": 2}


def _olmoe(config: Config) -> dict[str, Any]:
    heads = config["num_attention_heads"]
    require(
        config["num_key_value_heads"] == heads, "llama.cpp has as many key heads in this model as others.", CONVERTER
    )
    return {}


def _minicpm(config: Config) -> dict[str, Any]:
    return {
        "embedding_scale": float(config["scale_emb"]),
        "residual_scale": config["scale_depth"] / config["num_hidden_layers"] ** 0.5,
        "logit_scale": config["hidden_size"] / config["dim_model_base"],
    }


def _ministral3(config: Config) -> dict[str, Any]:
    rope = config["rope_parameters"]
    beta, kind = rope.get("llama_4_scaling_beta"), rope.get("type") or rope.get("rope_type")
    require(not beta or kind == "yarn", "llama.cpp scales attention by position with YaRN alone.", CONVERTER)
    return _no_windows(config) | ({"attention.temperature_scale": float(beta)} if beta else {})


def _latent(config: Config) -> dict[str, Any]:
    """Keys and values as one latent vector (MLA), with the maps out of it on the queries' side."""
    rope = config.get("rope_scaling") or {}
    kind = rope.get("type") or rope.get("rope_type") or "default"
    require(kind == "default", f"Rotary scaling '{kind}' was not tried on this model in llama.cpp.", CONVERTER)
    lite = config["num_hidden_layers"] in (26, 27)
    require(
        bool(config.get("q_lora_rank")) != lite,
        "llama.cpp knows latent queries by the number of layers, which this model has not.",
        CONVERTER,
    )
    rank, rotated = config["kv_lora_rank"], config["qk_rope_head_dim"]
    return {
        "expert_gating_func": 2,  # sigmoid, the only one that mlx-lm has there
        "attention.head_count_kv": 1,
        "attention.key_length": rank + rotated,
        "attention.value_length": rank,
        "attention.key_length_mla": config["qk_nope_head_dim"] + rotated,
        "attention.value_length_mla": config["v_head_dim"],
        "rope.dimension_count": rotated,
    }


def _recurrent(config: Config) -> dict[str, Any]:
    """Gated delta networks with full attention in between."""
    dim = int(config["head_dim"] * config["partial_rotary_factor"])
    sections = list((config.get("rope_parameters") or {}).get("mrope_section") or [11, 11, 10])
    return {
        "ssm.conv_kernel": config["linear_conv_kernel_dim"],
        "ssm.state_size": config["linear_key_head_dim"],
        "ssm.group_count": config["linear_num_key_heads"],
        "ssm.time_step_rank": config["linear_num_value_heads"],
        "ssm.inner_size": config["linear_value_head_dim"] * config["linear_num_value_heads"],
        "full_attention_interval": config["full_attention_interval"],
        "rope.dimension_count": dim,
        "rope.dimension_sections": [*sections, 0],
        **({} if config.get("num_experts") else dict.fromkeys(("expert_count", "expert_used_count"))),
    }


def _next_places(name: str, known: str | None, config: Config) -> list[tuple[Any, ...]] | None:
    """qwen3_next has q, k, v, z of each key head side by side in one matrix; llama.cpp has q, k, v in one, z apart."""
    if not name.endswith("in_proj_qkvz.weight"):
        return None
    keys, values = config["linear_num_key_heads"], config["linear_num_value_heads"]
    wide, tall = config["linear_key_head_dim"], values // keys * config["linear_value_head_dim"]
    rows = np.arange(keys * 2 * (wide + tall)).reshape(keys, -1)
    q, k, v, z = (part.ravel() for part in np.split(rows, np.cumsum([wide, wide, tall]), axis=1))
    block = f"blk.{tensor_names.block_index(name)}"
    return [(f"{block}.attn_qkv.weight", np.concatenate([q, k, v])), (f"{block}.attn_gate.weight", z)]


def _tiled_places(name: str, known: str | None, config: Config) -> list[tuple[Any, ...]] | None:
    """qwen3_5's value heads stand grouped by key head; llama.cpp wants the first of each group, then the second."""
    keys, values, dim = (config[f"linear_{x}"] for x in ("num_key_heads", "num_value_heads", "value_head_dim"))
    part = name.partition(".linear_attn.")[2]
    if not part or keys == values or part.startswith("norm"):
        return None
    heads = np.arange(values).reshape(keys, -1).T.ravel()
    numbers = (heads[:, None] * dim + np.arange(dim)).ravel()
    if part.startswith("out_proj"):
        return [(known, None, numbers)]
    if part.startswith("in_proj_z"):
        return [(known, numbers)]
    if part.startswith(("in_proj_qkv", "conv1d")):
        before = 2 * keys * config["linear_key_head_dim"]
        return [(known, np.concatenate([np.arange(before), before + numbers]))]
    return [(known, heads)]


_LLAMA = Architecture("llama", neighbours=True, extra=_no_windows, factors=FREQUENCIES)
_UNTIED = {"tie_word_embeddings": False}
_NORMED = {"norm_topk_prob": True}
_BIASED = {"use_expert_bias": True, "routed_scaling_factor": 1.0}
_LATENT = Architecture("deepseek2", neighbours=True, mixed=True, extra=_latent)
ARCHITECTURES: dict[str, Architecture] = {
    **dict.fromkeys(("llama", "mixtral", "internlm3", "telechat3"), _LLAMA),
    **dict.fromkeys(("deepseek_v3", "glm4_moe_lite"), _LATENT),
    "cohere": Architecture("command-r", neighbours=True),
    "cohere2": Architecture("cohere2", neighbours=True, extra=_windows),
    "deepseek": Architecture("deepseek", neighbours=True, mixed=True),
    "ernie4_5": Architecture("ernie4_5", neighbours=True),
    "ernie4_5_moe": Architecture("ernie4_5-moe", neighbours=True, mixed=True),
    "exaone": Architecture("exaone", factors=FREQUENCIES),
    "exaone4": Architecture("exaone4", extra=_exaone4, factors=FREQUENCIES),
    "gemma": Architecture("gemma"),
    "gemma2": Architecture("gemma2", extra=_gemma2),
    "gemma3_text": Architecture("gemma3", extra=_gemma3),
    "gemma4_text": Architecture("gemma4", extra=_gemma4, mixed=True, factors=FREQUENCIES),
    "glm4": Architecture("glm4", neighbours=True),
    "glm4_moe": Architecture("glm4moe", mixed=True),
    "gpt2": Architecture("gpt2"),
    "gpt_oss": Architecture("gpt-oss", extra=_gpt_oss),
    "granite": Architecture("granite", neighbours=True, factors=FREQUENCIES),
    "granitemoe": Architecture("granitemoe", neighbours=True, factors=FREQUENCIES),
    "hunyuan_v1_dense": Architecture("hunyuan-dense"),
    "lfm2": Architecture("lfm2", extra=_lfm2, mixed=True),
    "lfm2_moe": Architecture("lfm2moe", fixed=_NORMED | _BIASED, extra=_lfm2_moe, mixed=True),
    "mimo": Architecture("qwen2"),
    "minicpm": Architecture("minicpm", neighbours=True, extra=_minicpm, factors=FREQUENCIES),
    "ministral3": Architecture("mistral3", neighbours=True, extra=_ministral3, factors=FREQUENCIES),
    "nemotron": Architecture("nemotron"),
    "olmo2": Architecture("olmo2", fixed=_UNTIED),
    "olmo3": Architecture("olmo2", fixed=_UNTIED, extra=_windows),
    "olmoe": Architecture("olmoe", fixed=_UNTIED, extra=_olmoe),
    "phi": Architecture("phi2"),
    "phi3": Architecture("phi3", extra=_phi3, factors=("rope_factors_long", "rope_factors_short")),
    "qwen2": Architecture("qwen2"),
    "qwen2_moe": Architecture("qwen2moe"),
    "qwen3": Architecture("qwen3"),
    "qwen3_5": Architecture("qwen35", extra=_recurrent, mixed=True, places=_tiled_places),
    "qwen3_5_moe": Architecture("qwen35moe", fixed=_NORMED, extra=_recurrent, mixed=True, places=_tiled_places),
    "qwen3_moe": Architecture("qwen3moe", fixed=_NORMED),
    "qwen3_next": Architecture("qwen3next", fixed=_NORMED, extra=_recurrent, mixed=True, places=_next_places),
    "seed_oss": Architecture("seed_oss"),
    "smollm3": Architecture("smollm3", neighbours=True, extra=_smollm3),
    "stablelm": Architecture("stablelm"),
    "starcoder2": Architecture("starcoder2"),
}


def architecture_of(module: nn.Module) -> Architecture:
    """llama.cpp's architecture of a model of mlx-lm's, by the file that its code is in.

    Raises ConfigError if none is known to compute the same.
    """
    names = [type(part).__module__.rpartition(".")[2] for part in (module, text_model(module))]
    known = [ARCHITECTURES[name] for name in names if name in ARCHITECTURES]
    if not known:
        raise ConfigError(f"'{names[0]}' models cannot be written as GGUF here.", CONVERTER)
    return known[0]


def text_model(module: nn.Module) -> nn.Module:
    """The model of text in one of pictures and text, or the model itself."""
    inner = getattr(module, "language_model", module)
    return inner if hasattr(inner, "args") else module
