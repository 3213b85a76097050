"""A model's hyperparameters under llama.cpp's keys, with what mlx-lm computes by, not what the config hopes for.

Rotary embeddings are looked at, not read about: a module's own frequencies tell whether they are scaled, whatever the
scaling is called (`Rope`).
"""

import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_adapters.config.mapping import require
from mlx_adapters.errors import ConfigError
from mlx_adapters.gguf_format.architectures import CONVERTER, Architecture, Config, text_model
from mlx_adapters.gguf_format.blocks import package
from mlx_adapters.models.base import context_of
from mlx_adapters.rounding.grids import to_numpy
from mlx_adapters.system.door import mx, nn

# llama.cpp's key -> what configs call it, the first that is there.
NAMES: dict[str, tuple[str, ...]] = {
    "context_length": ("context_length",),
    "embedding_length": ("hidden_size", "n_embd", "d_model"),
    "block_count": ("num_hidden_layers", "n_layer", "num_layers"),
    "feed_forward_length": ("intermediate_size_mlp", "intermediate_size", "n_inner", "ffn_hidden_size"),
    "attention.head_count": ("num_attention_heads", "n_head"),
    "attention.head_count_kv": ("num_key_value_heads",),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", "norm_eps", "layer_norm_epsilon"),
    "attention.layer_norm_epsilon": ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps"),
    "attention.scale": ("attention_multiplier",),
    "attention.q_lora_rank": ("q_lora_rank",),
    "attention.kv_lora_rank": ("kv_lora_rank",),
    "embedding_scale": ("embedding_multiplier",),
    "residual_scale": ("residual_multiplier",),
    "logit_scale": ("logits_scaling", "logit_scale"),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "expert_count": ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"),
    "expert_used_count": ("num_experts_per_tok", "moe_k", "moe_topk"),
    "expert_feed_forward_length": ("moe_intermediate_size",),
    "expert_shared_count": ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"),
    "expert_shared_feed_forward_length": ("shared_expert_intermediate_size", "shared_intermediate_size"),
    "expert_group_count": ("n_group",),
    "expert_group_used_count": ("topk_group",),
    "expert_weights_scale": ("routed_scaling_factor",),
    "expert_weights_norm": ("norm_topk_prob",),
    "leading_dense_block_count": ("first_k_dense_replace", "moe_layer_start_index", "num_dense_layers"),
    "interleave_moe_layer_step": ("moe_layer_interval",),
    "vocab_size": ("vocab_size",),
}
GATES = {"softmax": 1, "sigmoid": 2}
KINDS = {bool: "bool", int: "uint32", float: "float32", str: "string"}


def settings_of(module: nn.Module, config: Mapping[str, Any]) -> dict[str, Any]:
    """What the text model computes by: its config, with the defaults that mlx-lm's code puts in; and for how many
    tokens it is made, "context_length", by the config or by what transformers takes for granted of such models."""
    said = config.get("text_config", config)
    own = {name: value for name, value in vars(text_model(module).args).items() if value is not None}
    return {**said, **own, "context_length": context_of(config) or _usual_context(config.get("model_type"))}


def _usual_context(model_type: str | None) -> int | None:
    from transformers import CONFIG_MAPPING  # late: it takes a second

    with contextlib.suppress(Exception):  # it has no such models, or none without more settings
        return context_of(CONFIG_MAPPING[model_type]().to_dict())
    return None


@dataclass(frozen=True, eq=False)
class Rope:
    """How a rotary embedding turns positions: `frequencies` (dims / 2,) in radians a token, what it multiplies by."""

    dims: int
    neighbours: bool
    frequencies: np.ndarray
    magnitude: float

    def like(self, other: "Rope") -> bool:
        """Whether both turn alike."""
        same = (self.dims, self.neighbours, self.magnitude) == (other.dims, other.neighbours, other.magnitude)
        return same and np.allclose(self.frequencies, other.frequencies, rtol=1e-5)

    @classmethod
    def of(cls, layer: nn.Module) -> "Rope":
        """That of a module of mlx-lm."""
        dims = getattr(layer, "dims", None) or layer.dim
        if (periods := getattr(layer, "_freqs", None)) is not None:
            frequencies = 1 / to_numpy(periods.astype(mx.float32)).astype(np.float64)
        else:
            frequencies = getattr(layer, "scale", 1.0) * plain_frequencies(layer.base, dims)
        magnitude = getattr(layer, "mscale", None) or getattr(layer, "_scale", None) or 1.0
        return cls(dims, bool(getattr(layer, "traditional", False)), frequencies, float(magnitude))

    def factors(self, base: float) -> np.ndarray:
        """(dims / 2,) by what each of the plain frequencies is divided."""
        with np.errstate(divide="ignore"):
            return plain_frequencies(base, self.dims) / self.frequencies


def plain_frequencies(base: float, dims: int) -> np.ndarray:
    """(dims / 2,) base^(-2i / dims)."""
    return float(base) ** (-np.arange(0, dims, 2) / dims)


def ropes(module: nn.Module) -> list[Rope]:
    """The different rotary embeddings of a model, those of its first block first."""
    kinds: list[Rope] = []
    for name, layer in module.named_modules():
        last = name.rpartition(".")[2]
        if (last.startswith("rope") or "rotary" in last) and (hasattr(layer, "base") or hasattr(layer, "_freqs")):
            one = Rope.of(layer)
            if not any(one.like(other) for other in kinds):
                kinds.append(one)
    return kinds[::-1]  # (named_modules begins with the last)


Shapes = Mapping[str, tuple[int, ...]]  # llama.cpp's names of matrices, of ours there
# The widths of feed-forward networks go by many names in configs, so they are seen: key -> whose rows they are.
WIDTHS = {
    "feed_forward_length": "ffn_gate",
    "expert_feed_forward_length": "ffn_up_exps",
    "expert_shared_feed_forward_length": "ffn_up_shexp",
}


def hyperparameters(architecture: Architecture, module: nn.Module, config: Config, shapes: Shapes) -> dict[str, Any]:
    """llama.cpp's keys, without the architecture's name before them, and their values.

    Raises ConfigError for what llama.cpp computes otherwise.
    """
    for name, value in architecture.fixed.items():
        if config.get(name) != value:
            raise ConfigError(f"llama.cpp computes this model with {name} {value}, not {config.get(name)}.", CONVERTER)
    made = {key: value for key, names in NAMES.items() if (value := _first(config, names)) is not None}
    for key, part in WIDTHS.items():
        width = next((shape[-2] for name, shape in shapes.items() if f".{part}.weight" in name), made.get(key))
        made[key] = (
            width if width is not None else 4 * made["embedding_length"] if key == "feed_forward_length" else None
        )
    require(
        "context_length" in made,
        "llama.cpp has to know how many tokens this model reads, and its config.json does not say it.",
        "put max_position_embeddings into the base's config.json.",
    )
    if "num_attention_heads" not in config:  # GPT-2 has one key head for each query head, whatever its config says
        made["attention.head_count_kv"] = made.get("attention.head_count")
    made.setdefault("attention.head_count_kv", made.get("attention.head_count"))
    if "head_dim" in config or "attention.head_count" in made:
        dim = config.get("head_dim") or made["embedding_length"] // made["attention.head_count"]
        made |= {"attention.key_length": dim, "attention.value_length": dim}
    for name in ("scoring_func", "moe_gate_act", "score_func"):
        if config.get(name) in GATES:
            made["expert_gating_func"] = GATES[config[name]]
    made |= _rotary(module, config)
    return {key: value for key, value in (made | architecture.extra(config)).items() if value is not None}


def _first(config: Config, names: tuple[str, ...]) -> Any:
    return next((config[name] for name in names if config.get(name) is not None), None)


def rope_base(config: Config) -> float:
    """The base of the plain frequencies."""
    parameters: dict[str, Any] = config.get("rope_parameters") or {}
    parameters = parameters.get("full_attention", parameters)
    return float(_first({**parameters, **config}, ("rope_theta", "rotary_emb_base", "rope_freq_base")) or 10000.0)


def _rotary(module: nn.Module, config: Config) -> dict[str, Any]:
    kinds = ropes(module)
    if not kinds:
        return {}
    base, scaling = rope_base(config), config.get("rope_scaling") or config.get("rope_parameters") or {}
    made: dict[str, Any] = {"rope.dimension_count": kinds[0].dims, "rope.freq_base": base}
    kind = scaling.get("type") or scaling.get("rope_type")
    scaled = [one for one in kinds if not np.allclose(one.factors(base), 1, rtol=1e-5)]
    if kind == "linear":
        made |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(scaling["factor"])}
    elif kind in ("yarn", "deepseek_yarn"):
        made |= {"rope.scaling.type": "yarn", "rope.scaling.factor": float(scaling["factor"])}
        made["rope.scaling.original_context_length"] = int(scaling.get("original_max_position_embeddings", 4096))
        made["rope.scaling.yarn_beta_fast"] = float(scaling.get("beta_fast", 32))
        made["rope.scaling.yarn_beta_slow"] = float(scaling.get("beta_slow", 1))
        usual = 1 + 0.1 * math.log(float(scaling["factor"]))
        if of_all := float(scaling.get("mscale_all_dim") or 0):
            made["rope.scaling.yarn_log_multiplier"] = of_all
        elif scaled:
            made["rope.scaling.attn_factor"] = scaled[0].magnitude / usual
    elif scaled and scaled[0].magnitude != 1:
        made["rope.scaling.attn_factor"] = scaled[0].magnitude
    return made


def rope_factors(module: nn.Module, values: Mapping[str, Any]) -> np.ndarray | None:
    """(dims / 2,) by what llama.cpp is to divide each frequency, where the hyperparameters do not say it."""
    if "rope.scaling.type" in values:
        return None
    bases = [values[key] for key in ("rope.freq_base", "rope.freq_base_swa") if key in values]
    for one in ropes(module):
        near = [base for base in bases if np.allclose(one.factors(base), 1, rtol=1e-5)]
        if not near and one.dims == values["rope.dimension_count"]:
            return np.minimum(one.factors(bases[0]), 1e30).astype(np.float32)  # (what does not turn at all)
    return None


def write(writer: Any, architecture: Architecture, values: Mapping[str, Any]) -> None:
    """Put hyperparameters into a `gguf.GGUFWriter`."""
    kinds = package().GGUFValueType
    for key, value in values.items():
        name = f"{architecture.name}.{key}"
        if isinstance(value, list):
            writer.add_array(name, value)
        else:
            writer.add_key_value(name, value, getattr(kinds, KINDS[type(value)].upper()))
