"""Hold folders that `fuse --format hf` writes against the real transformers: the same logits in float32.

    PYTHONPATH=.:tests python scripts/check_hf.py write out/hf-check [ARCHITECTURE...]    (with mlx)
    python scripts/check_hf.py check out/hf-check    (with torch 2.13.0, transformers 5.24.0)

For every architecture that transformers has too: a tiny base in 4 bits, a random adapter on all its layers, both fused
into a folder. transformers must find all tensors that it looks for, but for those of a vision tower, and no others.
"""

import json
import os
import sys
import tempfile
import warnings
from pathlib import Path

TOLERANCE = 1e-4  # of the largest logit
COARSE = {"gemma": 1e-3}  # mlx-lm computes GELU, transformers its approximation
VISION = {
    **{"hidden_size": 32, "num_hidden_layers": 1, "depth": 1, "num_attention_heads": 4, "num_heads": 4},
    **{"intermediate_size": 32, "patch_size": 4, "image_size": 16, "head_dim": 8, "embed_dim": 32},
    **{"vision_output_dim": 32, "pixel_shuffle_ratio": 0.5, "num_channels": 3, "out_hidden_size": 64},
    **{"position_embedding_size": 64, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
}
TOWERS = ("vision", "visual", "multi_modal", "audio", "connector", "patch_merge")
UNREAD = ("moe_statics",)  # what mlx-lm computes without
# What mlx-lm takes for granted where transformers has another default, or where the tiny config is no possible one.
ROPE = {"rope_theta": 10000.0, "rope_type": "default"}
FINE = {"rms_norm_eps": 1e-6}
QWENS = ("qwen3_5", "qwen3_5_moe", "qwen3_vl", "qwen3_vl_moe")
PARTIAL = {"rope_parameters": ROPE | {"type": "default", "mrope_section": [1, 1, 0], "partial_rotary_factor": 0.25}}
TEXT = {name: {"text": {"model_type": f"{name}_text"} | FINE | (PARTIAL if "5" in name else {})} for name in QWENS}
GEMMA4 = {
    "use_double_wide_mlp": True,
    "final_logit_softcapping": 30.0,
    "rope_parameters": {
        "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1000000.0},
        "sliding_attention": ROPE,
    },
}
MLA = (
    "deepseek_v2",
    "deepseek_v3",
    "deepseek_v32",
    "glm4_moe_lite",
    "glm_moe_dsa",
    "kimi_linear",
    "minicpm3",
    "mistral4",
)
SETTINGS = {
    **TEXT,
    **{name: {"num_key_value_heads": 4} for name in MLA},
    "gemma4": {"text": GEMMA4 | FINE},
    "gemma4_text": GEMMA4 | FINE,
    "olmo3": {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}},
    "qwen3_vl_moe": {"text": {"model_type": "qwen3_vl_moe_text", "moe_intermediate_size": 96} | FINE},
    "qwen3_next": {"norm_topk_prob": True} | FINE,
    "gpt_oss": {"rope_scaling": None, "rope_parameters": ROPE},
    "ministral3": {"rope_parameters": ROPE | {"llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 2048}},
    "seed_oss": {"attention_bias": False},
    "glm": {"attention_bias": False, "rope_parameters": ROPE | {"partial_rotary_factor": 1.0}},  # (mlx-lm turns all)
    "gpt_bigcode": {"activation_function": "gelu"},
    "gpt_neox": {"intermediate_size": 256, "hidden_act": "gelu_pytorch_tanh"},
    "internlm3": {"head_dim": 16},
    "jamba": {"num_experts_per_tok": 4},  # (of fewer, mlx-lm lets the weights of the chosen sum to one)
    "helium": {"tie_word_embeddings": False},
    "mistral4": {"num_key_value_heads": 4, "head_dim": 64},
    "phi": {"partial_rotary_factor": 0.5},
    "nemotron": {"hidden_act": "relu2"},
    "phimoe": {"attention_bias": True, "lm_head_bias": True},
    "starcoder2": {"hidden_act": "gelu"},
    "qwen2_vl": {"text": {"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}},
    "apertus": {"rope_parameters": ROPE},
    "afmoe": {"mup_enabled": True, "route_scale": 2.0, "global_attn_every_n_layers": 1},
    "falcon_h1": {"mlp_multipliers": [1.0, 1.0], "ssm_multipliers": [1.0] * 5, "mamba_norm_before_gate": False},
    "granitemoehybrid": {"mamba_conv_bias": True, "mamba_proj_bias": False, "position_embedding_type": "rope"},
    "laguna": {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}},
}


def base_of(folder, name):
    from helpers import tiny_configs

    make = tiny_configs.tiny_config

    def config_of(name):
        config = make(name)
        more = dict(SETTINGS.get(name, {}))
        text = more.pop("text", {})
        config |= {"pad_token_id": 0} | more
        if "text_config" in config:
            config["vision_config"] = VISION
            config["text_config"] |= {"pad_token_id": 0} | text
        return config

    tiny_configs.tiny_config = config_of
    try:
        return tiny_configs.tiny_base(folder, name)
    finally:
        tiny_configs.tiny_config = make


def write(out, names):
    import mlx.core as mx
    from helpers.tiny_configs import model_names

    import mlx_adapters as ma
    from mlx_adapters.models.adapter import Adapter
    from mlx_adapters.models.layers import adaptable_layers, attach, expected_shapes, resolve_target_modules
    from mlx_adapters.models.loading import load_module
    from mlx_adapters.models.metadata import AdapterConfig
    from mlx_adapters.sources.bases import resolve_base
    from mlx_adapters.storage.tensor_names import join

    os.environ["MLX_ADAPTERS_HOME"] = tempfile.mkdtemp()
    options = ma.FuseOptions(format="hf", check=False, method="nearest")
    for name in names or model_names():
        try:
            base = base_of(out / name / "base", name)
            module = load_module(resolve_base(base))[0]
            keys = resolve_target_modules(module, ma.LoraConfig(rank=3))
            config, weights = AdapterConfig(rank=3, scale=1.7, keys=tuple(keys), type="lora"), {}
            mx.random.seed(0)
            layers = adaptable_layers(module)
            for key in keys:
                for leaf, shape in expected_shapes(layers[key], config).items():
                    weights[join(key, leaf)] = 0.05 * mx.random.normal(shape)
            adapter = Adapter(config, weights, {"base": resolve_base(base).record()})
            ma.fuse(
                base, adapter, out / name / "hf", quantization="none", dtype="float32", options=options, overwrite=True
            )
            attach(module, adapter)
            ids = mx.array([[5, 300, 17, 44, 120, 9, 77]])
            mx.save_safetensors(
                str(out / name / "logits.safetensors"), {"ids": ids, "logits": module(ids).astype(mx.float32)}
            )
            ours, again = (
                module(ids),
                None if name == "gpt_oss" else load_module(resolve_base(out / name / "hf"))[0](ids),
            )
            off = 0 if again is None else (mx.abs(ours - again).max() / mx.abs(ours).max()).item()
            print(name, "written", f"and off by {off:.1e} when mlx-lm reads it" if off > TOLERANCE else "", flush=True)
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {str(error)[:200]}", flush=True)


def check(out, names):
    import torch
    import transformers
    from safetensors.torch import load_file
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText

    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    failed = []
    for folder in sorted(path.parent for path in out.glob("*/logits.safetensors")):
        name = folder.name
        if names and name not in names:
            continue
        if json.loads((folder / "hf" / "config.json").read_text())["model_type"] not in CONFIG_MAPPING:
            print(name, "is not in transformers")
            continue
        try:
            expected = load_file(folder / "logits.safetensors")
            options = {"dtype": torch.float32, "attn_implementation": "eager", "output_loading_info": True}
            try:
                model, info = AutoModelForCausalLM.from_pretrained(folder / "hf", **options)
            except ValueError:
                model, info = AutoModelForImageTextToText.from_pretrained(folder / "hf", **options)
            odd = [n for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for n in info[kind]]
            odd = [str(n) for n in odd if not any(part in str(n) for part in TOWERS + UNREAD)]
            with torch.no_grad():
                logits = model.eval()(input_ids=expected["ids"].long(), use_cache=False).logits
            off = ((logits - expected["logits"]).abs().max() / expected["logits"].abs().max()).item()
            print(f"{name}: {off:.1e}", *(["lacks or has more:", *odd[:3]] if odd else []), flush=True)
            if not off < COARSE.get(name, TOLERANCE) or odd:
                failed.append(name)
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {str(error)[:200]}", flush=True)
            failed.append(name)
    if failed:
        sys.exit("not as ours: " + " ".join(failed))


if __name__ == "__main__":
    {"write": write, "check": check}[sys.argv[1]](Path(sys.argv[2]), sys.argv[3:])
