"""A small config for each of mlx-lm's models, guessed from the settings that its `ModelArgs` has.

Widths, heads and experts get one small value each wherever a setting of that meaning turns up; other settings keep
their default. What a model cannot be guessed from is in `tiny_overrides`. So a model that mlx-lm adds is tried as
soon as it is there.
"""

import contextlib
import dataclasses
import importlib
import io
import json
import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from helpers.tiny_models import random_weights, write_tokenizer
from helpers.tiny_overrides import OVERRIDES
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.utils import load_model, quantize_model, save_model

# (names of settings, value); the first pattern that is the whole name counts.
SIZES: list[tuple[re.Pattern, Any]] = [
    (re.compile(pattern), value)
    for pattern, value in (
        (r"moe_intermediate_size|expert_ffn_hidden_size|.*shared_expert.*size|share_expert_dim|moe_latent_size", 64),
        (r"shared_intermediate_size|hidden_size|hidden_dim|n_embd|d_model|model_dim|kv_lora_rank|[qo]_lora_rank", 64),
        (r"num_hidden_layers|n_layers?|num_layers|num_transformer_layers", 2),
        (r".*intermediate_size(_mlp)?|ffn_hidden_size|n_inner|block_ff_dim|block_dim", 128),
        (r"(swa_)?num_attention_heads|num_swa_attention_heads|n_heads?|num_heads|mamba_n(um)?_heads", 4),
        (r"(swa_)?num_key_value_heads|num_swa_key_value_heads|n_kv_heads|num_kv_heads|num_attention_groups", 2),
        (r"(swa_)?(v_)?head_dim|hidden_size_per_head|kv_channels|mamba_(d_head|head_dim)|query_pre_attn_scalar", 16),
        (r"vocab_size|num_vocab|vocab_size_per_layer_input", 512),
        (r"max_position_embeddings|n_ctx|n_positions|block_size|model_max_length|max_seq_len", 2048),
        (r".*_?eps(ilon)?", 1e-5),
        (r"((swa|compress)_)?rope_theta|rotary_emb_base|rope_local_base_freq", 10000.0),
        (r"n(um)?_(routed_)?(local_)?experts|moe_num_experts", 4),
        (r"num_experts_per_tok(en)?|moe_topk|moe_top_k|moe_k|top_k_experts", 2),
        (r"n_groups?|topk_group|num_expert_group|mamba_n_groups|group_norm_size", 1),
        (r"n(um)?_shared_experts?|moe_num_shared_experts|first_k_dense_replace|num_dense_layers", 1),
        (r"moe_layer_start_index|cla_share_factor", 1),
        (r"qk_(rope|nope)_head_dim|index_(head_dim|n_heads)|.*_low_rank_dim|linear_(key|value)_head_dim", 32),
        (r"index_topk|.*(state_size|d_state|time_step_rank)|rotary_dim", 16),
        (r".*sliding_window(_size)?|.*attention_window_size|window_size", 8),
        (r".*conv.*(kernel|width).*|mamba_d_conv", 4),
        (r"conv_L_cache|conv_window", 3),
        (r"linear_num_(key|value)_heads", 2),
        (r".*scaling_factor|.*multiplier|logits_scaling|scale_emb|scale_depth", 1.0),
    )
]
# Of a setting without a default, where the kinds are not numbers.
NEEDED: dict[str, Any] = {
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "tie_word_embeddings": True,
    "partial_rotary_factor": 0.5,
    "decoder_sparse_step": 1,
    "moe_layer_freq": 1,
    "rope_scaling": None,
    "mlp_only_layers": [],
    "sliding_window_layers": [],
    "layer_types": ["full_attention"] * 2,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "hidden_act": "silu",
}
TOWERS = (
    "vision_tower",
    "model.vision_tower",
    "vision_model",
    "model.visual",
    "visual",
)  # how models of pictures and text call the former
NO_METAL = "No Metal back-end"  # what MLX says where a model has a kernel of its own for Macs
BY_TYPE = {bool: False, int: 1, float: 1.0, str: "x"}


def model_names() -> list[str]:
    """The architectures of mlx-lm: its files that hold a `Model` and its `ModelArgs`."""
    import mlx_lm.models

    files = sorted(Path(mlx_lm.models.__path__[0]).glob("*.py"))
    texts = {file.stem: file.read_text() for file in files}
    return [name for name, text in texts.items() if re.search(r"^class Model\b", text, re.M) and "ModelArgs" in text]


def module_of(name: str) -> types.ModuleType:
    """mlx-lm's module of this architecture."""
    with contextlib.redirect_stdout(io.StringIO()):  # one says what it lacks, and exits
        return importlib.import_module(f"mlx_lm.models.{name}")


def make_model(config: dict) -> nn.Module:
    """mlx-lm's model of this config. Some of them change the config that they are given.

    A router that begins as zeros is drawn: among experts that are all alike each device chooses others, and with
    another number of tokens others again.
    """
    module = module_of(config["model_type"])
    model = module.Model(module.ModelArgs.from_dict(json.loads(json.dumps(config))))
    zeros = [(name, w) for name, w in tree_flatten(model.parameters()) if name.endswith("gate.weight") and not w.any()]
    drawn = [(name, mx.random.normal(w.shape, w.dtype, key=mx.random.key(i)) / 8) for i, (name, w) in enumerate(zeros)]
    model.update(tree_unflatten(drawn))
    return model


def tiny_config(name: str) -> dict:
    """A config of `name` whose model runs. Raises what the last attempt raised if there is none."""
    module = module_of(name)
    failure: Exception = LookupError(f"mlx-lm's {name} has no text model")
    for config in _attempts(name, module):
        try:
            mx.eval(make_model(config)(mx.zeros((2, 5), mx.int32)))
        except Exception as error:
            failure = error
            if NO_METAL not in str(error):
                continue
        return config
    raise failure


def _attempts(name: str, module: types.ModuleType) -> Iterator[dict]:
    own = dict(OVERRIDES.get(name, {}))
    text = own.pop("text", {})
    outer = _guessed(module.ModelArgs) | {"model_type": name, "eos_token_id": 2, "bos_token_id": 0} | own
    if "text_config" not in {field.name for field in dataclasses.fields(module.ModelArgs)}:
        yield outer
        return
    for kind, arguments in _text_models(module):
        inner = _guessed(arguments) | {"model_type": kind} | OVERRIDES.get(kind, {}) | text
        yield {"vision_config": {"hidden_size": 32}} | outer | {"text_config": inner}


def _text_models(module: types.ModuleType) -> Iterator[tuple[str, type]]:
    """(model type, its arguments): what may stand in `text_config`, from the modules that the model is made of."""
    homes = [importlib.import_module(kind.__module__) for kind in module.Model.__mro__ if "mlx_lm" in kind.__module__]
    for home in dict.fromkeys(homes):
        for value in vars(home).values():
            if isinstance(value, types.ModuleType) and hasattr(value, "ModelArgs") and hasattr(value, "Model"):
                yield value.__name__.rpartition(".")[2], value.ModelArgs
        for key, value in vars(home).items():
            if (
                isinstance(value, type)
                and dataclasses.is_dataclass(value)
                and key not in ("ModelArgs", "BaseModelArgs")
            ):
                yield home.__name__.rpartition(".")[2], value


def _guessed(arguments: type) -> dict[str, Any]:
    guesses = {field.name: _guess(field) for field in dataclasses.fields(arguments) if field.init}
    return {name: value for name, value in guesses.items() if value is not dataclasses.MISSING}


def _guess(field: dataclasses.Field) -> Any:
    needed = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    optional = field.default is None
    for pattern, value in SIZES:
        if pattern.fullmatch(field.name) and not (optional and field.name == "q_lora_rank"):
            return value
    if not needed:
        return dataclasses.MISSING
    if field.name in NEEDED:
        return NEEDED[field.name]
    return BY_TYPE.get(field.type, None if "Optional" in str(field.type) else dataclasses.MISSING)  # type: ignore[call-overload]


def tiny_base(folder: Path, name: str) -> Path:
    """A tiny quantized base of this architecture; one that mlx-lm cannot even make has nothing but its name."""
    try:
        config = tiny_config(name)
        model = make_model(config)
        model.update(tree_unflatten(random_weights(model, 0, mx.float32)))
        _write(folder, model, config)
    except (Exception, SystemExit):
        config = {"model_type": name}
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config))
        write_tokenizer(folder)
        mx.save_safetensors(str(folder / "model.safetensors"), {"x": mx.zeros(1)})
        return folder
    with contextlib.suppress(Exception), contextlib.redirect_stdout(io.StringIO()):  # not all can be quantized
        model, _ = load_model(folder)  # what loading does to weights is done before they are quantized
        _write(folder, *quantize_model(model, config, 32, 4))
    for tower in TOWERS if "text_config" in config else ():
        if _add_picture(folder, f"{tower}.patches.weight"):
            break
    return folder


def pictures(folder: Path) -> set[str]:
    """The tensors of a vision tower that lie in a model's folder."""
    names = {name for file in folder.glob("*.safetensors") for name in mx.load(str(file))}
    return {name for name in names if any(tower in name for tower in TOWERS)}


def _add_picture(folder: Path, name: str) -> bool:
    """Put a tensor of a vision tower into the folder, if mlx-lm leaves one of that name out."""
    file = folder / "model.safetensors"
    plain = mx.load(str(file))
    mx.eval(plain)
    mx.save_safetensors(str(file), plain | {name: mx.ones((4, 8))}, {"format": "mlx"})
    try:
        load_model(folder, lazy=True)
    except Exception:
        mx.save_safetensors(str(file), plain, {"format": "mlx"})
        return False
    return True


def _write(folder: Path, model: Any, config: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_model(folder, model)
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder)
