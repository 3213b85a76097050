"""Hold PEFT adapters of tiny models of many architectures against the real peft, both ways.

    PYTHONPATH=.:tests:scripts python scripts/check_peft.py write out/peft [ARCHITECTURE...]    (with mlx)
    python scripts/check_peft.py make out/peft    (with torch 2.13.0, transformers 5.24.0, peft 0.21.2)
    PYTHONPATH=.:tests:scripts python scripts/check_peft.py read out/peft    (with mlx)

`write` makes a base of each architecture, in float32 and in transformers' form, and exports an adapter on each kind of
its layers. `make` loads them in PEFT, which must give our logits, and saves adapters of PEFT's own. `read` takes those
in, and fuses them with --from-peft: the same logits, or a refusal.
"""

import json
import os
import re
import sys
import tempfile
import warnings
from collections import Counter
from functools import partial
from pathlib import Path

TOLERANCE = 2e-4  # of the largest logit
NAMES = (
    *("qwen3_5", "qwen3_5_moe", "qwen3_next", "gemma4", "gemma4_text", "gpt_oss", "mistral3", "ministral3", "phi3"),
    *("glm4", "glm4_moe", "granite", "smollm3", "olmo3", "deepseek_v3", "llama4", "glm4_moe_lite", "qwen3"),
    *("qwen3_moe", "llama", "gemma3", "gemma3_text", "qwen2_moe", "granitemoe", "granitemoehybrid", "lfm2_moe"),
    *("nemotron_h", "mixtral", "deepseek_v2", "dots1", "jamba", "olmoe", "phimoe", "ernie4_5_moe", "mistral4"),
    *("hunyuan_v1_dense", "exaone_moe", "afmoe", "mellum", "longcat_flash", "dbrx", "falcon_h1", "qwen3_vl"),
    *("qwen3_vl_moe", "gpt_neox", "minicpm3", "kimi_linear", "laguna", "olmo_hybrid", "gptj", "cohere2", "glm_moe_dsa"),
)
EXPERTS = r".*\.experts(\.\w+)?|.*\.switch_(mlp|glu)\.\w+"


def kind_of(path):
    return re.sub(r"\.\d+", ".N", path)


def random_adapter(module, base, keys, kind, seed):
    import mlx.core as mx

    from mlx_adapters.models.adapter import Adapter
    from mlx_adapters.models.dense import dense_weight
    from mlx_adapters.models.layers import adaptable_layers, expected_shapes
    from mlx_adapters.models.metadata import AdapterConfig
    from mlx_adapters.storage.tensor_names import join

    layers, weights = adaptable_layers(module), {}
    config = AdapterConfig(rank=3, scale=1.7, keys=tuple(keys), type=kind)
    mx.random.seed(seed)
    for key in keys:
        for leaf, shape in expected_shapes(layers[key], config).items():
            noise = mx.random.normal(shape)
            if leaf == "m":
                noise = mx.linalg.norm(dense_weight(layers[key], mx.float32), axis=-1) * (1 + 0.2 * noise)
            weights[join(key, leaf)] = noise if leaf == "m" else 0.3 * noise
    return Adapter(config, weights, {"base": base.record()})


def write(out, names):
    import mlx.core as mx
    from check_hf import base_of

    import mlx_adapters as ma
    from mlx_adapters.models.layers import adaptable_layers, attach, detach, loads_in_mlx_lm
    from mlx_adapters.models.loading import load_module
    from mlx_adapters.models.metadata import AdapterConfig
    from mlx_adapters.sources.bases import resolve_base

    os.environ["MLX_ADAPTERS_HOME"] = tempfile.mkdtemp()
    hf = ma.FuseOptions(format="hf", check=False, method="nearest")
    ids = mx.array([[5, 300, 17, 44, 120, 9, 77]])
    for name in names or NAMES:
        try:
            packed = resolve_base(base_of(out / name / "packed", name))
            module = load_module(packed)[0]
            first = [next(iter(adaptable_layers(module)))]
            nothing = random_adapter(module, packed, first, "lora", 0)
            nothing.weights.update({n: 0 * w for n, w in nothing.weights.items()})
            common = {"quantization": "none", "dtype": "float32", "overwrite": True}
            ma.fuse(packed, nothing, out / name / "hf", options=hf, **common)
            plain = ma.FuseOptions(check=False, method="nearest")
            ma.fuse(packed, nothing, out / name / "base", options=plain, **common)
            base = resolve_base(out / name / "base")
            module = load_module(base)[0]
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {str(error)[:200]}", flush=True)
            continue
        kinds = {}
        for key in adaptable_layers(module):
            kinds.setdefault(kind_of(key), []).append(key)
        blocks = [key for keys in kinds.values() for key in keys if ".N" in kind_of(key)]
        cases = {f"{kind}:{form}": (form, keys) for kind, keys in kinds.items() for form in ("lora", "dora")}
        cases["blocks:lora"] = ("lora", blocks)
        logits, refused = {"ids": ids, "base": module(ids).astype(mx.float32)}, {}
        for seed, (case, (form, keys)) in enumerate(cases.items()):
            config = AdapterConfig(3, 1.7, tuple(keys), form)
            layers = adaptable_layers(module)
            if not all(loads_in_mlx_lm(layers[key], config) for key in keys):
                continue
            try:
                adapter = random_adapter(module, base, keys, form, seed)
                attach(module, adapter)
                computed = module(ids).astype(mx.float32)
                mx.eval(computed)
                detach(module)
                ma.export_peft(
                    adapter,
                    out / name / "ours" / case,
                    base_model=str(out / name / "hf"),
                    base=base,
                    overwrite=True,
                    on_event=lambda _: None,
                )
                logits[case] = mx.contiguous(computed)
            except ma.AdapterError as error:
                refused[case] = str(error)
            except Exception as error:
                refused[case] = f"FAULT {type(error).__name__}: {error}"
            finally:
                detach(module)
        mx.save_safetensors(str(out / name / "ours.safetensors"), logits)
        (out / name / "refused.json").write_text(json.dumps(refused, indent=1))
        print(
            name,
            len(logits) - 2,
            "exported,",
            len(refused),
            "refused",
            *{kind_of(r)[:160] for r in refused.values()},
            sep="\n    ",
            flush=True,
        )


def load_model(folder):
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    try:
        return AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    except ValueError:
        return AutoModelForImageTextToText.from_pretrained(folder, **options).eval()


def off(computed, expected):
    return ((computed - expected).abs().max() / expected.abs().max()).item()


def logits_of(model, ids):
    return model(input_ids=ids, use_cache=False).logits.detach().float().contiguous()


def own_cases(model):
    """Name -> LoraConfig arguments, of what people do to a model of this kind."""
    import torch

    linear = {
        n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in n
    }
    linear = sorted(n for n in linear if not n.isdigit())
    cases = {f"linear-{name}": {"target_modules": [name]} for name in linear}
    cases |= {f"dora-{name}": {"target_modules": [name], "use_dora": True} for name in linear}
    parameters = sorted({n.rpartition(".")[2] for n, p in model.named_parameters() if p.ndim == 3 and ".experts." in n})
    cases |= {
        f"parameter-{name}": {"target_modules": [], "target_parameters": [f"experts.{name}"]} for name in parameters
    }
    if len(parameters) > 1:
        cases["parameters"] = {"target_modules": [], "target_parameters": [f"experts.{name}" for name in parameters]}
    routers = {
        n.rpartition(".")[0]
        for n, p in model.named_parameters()
        if p.ndim == 2 and re.search(r"\.(gate|router)(\.\w+)?\.weight$", n)
    }
    routers = sorted({n.rpartition(".")[2] for n in routers})
    cases |= {f"router-{name}": {"target_modules": [], "target_parameters": [f"{name}.weight"]} for name in routers}
    cases["all-linear"] = {"target_modules": "all-linear"}
    cases["embedding"] = {"target_modules": ["embed_tokens"]}
    cases["head"] = {"target_modules": ["lm_head"]}
    cases["patterns"] = {
        "target_modules": linear[:4],
        "rank_pattern": {linear[0]: 2},
        "alpha_pattern": {linear[-1]: 3.5},
        "use_rslora": True,
    }
    cases["norms-to-save"] = {"target_modules": linear[:1], "modules_to_save": ["norm", "input_layernorm"]}
    cases["tokens"] = {"target_modules": linear[:1], "trainable_token_indices": {"embed_tokens": [3, 5]}}
    cases["head-tokens"] = {"target_modules": linear[:1], "trainable_token_indices": {"lm_head": [3, 5]}}
    cases["head-to-save"] = {"target_modules": linear[:1], "modules_to_save": ["lm_head"]}
    cases["experts-to-save"] = {"target_modules": linear[:1], "modules_to_save": ["experts"]}
    cases |= {f"{name}-to-save": {"target_modules": linear[:1], "modules_to_save": [name]} for name in routers}
    cases["velora"] = {"target_modules": linear[:1], "velora_config": {"num_groups": 4}}
    cases["mica"] = {"target_modules": linear[:1], "init_lora_weights": "mica"}
    return cases


def make(out, names):
    import peft
    import torch
    import transformers
    from safetensors.torch import load_file, save_file

    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    counts = Counter()
    for folder in sorted(path.parent for path in out.glob("*/ours.safetensors")):
        if names and folder.name not in names:
            continue
        ours = load_file(folder / "ours.safetensors")
        ids = ours.pop("ids").long()
        try:
            model = load_model(folder / "hf")
        except Exception as error:
            print(folder.name, "is not loaded:", type(error).__name__, str(error)[:100], flush=True)
            continue
        run = partial(logits_of, ids=ids)
        there = off(run(model), ours["base"])
        if there > TOLERANCE:
            print(folder.name, f"base is off by {there:.1e}", flush=True)
        for case, expected in ours.items():
            if case == "base":
                continue
            try:
                with warnings.catch_warnings(record=True) as told:
                    warnings.simplefilter("always")
                    computed = run(
                        peft.PeftModel.from_pretrained(load_model(folder / "hf"), folder / "ours" / case).eval()
                    )
                told = [str(w.message)[:100] for w in told if "missing" in str(w.message)]
                wrong = off(computed, expected) > max(TOLERANCE, 2 * there)
                counts["wrong" if wrong else "right"] += 1
                if wrong or told:
                    print(f"WRONG {folder.name}/{case}: off by {off(computed, expected):.1e}", *told[:1], flush=True)
            except Exception as error:
                counts["failed"] += 1
                print(f"FAILED {folder.name}/{case}: {type(error).__name__}: {str(error)[:200]}", flush=True)
        if there > TOLERANCE:
            continue
        saved = {"ids": ids.int(), "base": run(model)}
        for seed, (case, options) in enumerate(own_cases(model).items()):
            try:
                torch.manual_seed(seed)
                made = peft.get_peft_model(
                    load_model(folder / "hf"), peft.LoraConfig(**{"r": 4, "lora_alpha": 8} | options)
                ).eval()
                for key, value in made.named_parameters():
                    if "lora_" in key or "trainable_tokens" in key or "modules_to_save" in key:
                        with torch.no_grad():
                            noise = torch.randn(value.shape)
                            value.add_(0.2 * noise) if "modules" in key else value.mul_(
                                1 + 0.2 * noise
                            ) if "magnitude" in key else value.copy_(0.2 * noise)
                made.save_pretrained(folder / "theirs" / case)
                again = peft.PeftModel.from_pretrained(load_model(folder / "hf"), folder / "theirs" / case).eval()
                saved[case] = run(again)
                if off(saved[case], saved["base"]) < 1e-3:
                    print(f"   {folder.name}/{case} does nothing", flush=True)
            except Exception as error:
                saved.pop(case, None)
                counts["not made"] += 1
                print(f"   {folder.name}/{case} is not made: {type(error).__name__}: {str(error)[:120]}", flush=True)
        save_file(saved, folder / "theirs.safetensors")
        print(folder.name, "done", flush=True)
    print(dict(counts))


def read(out, names):
    import mlx.core as mx

    import mlx_adapters as ma
    from mlx_adapters.models.layers import attach
    from mlx_adapters.models.loading import load_module
    from mlx_adapters.sources.bases import resolve_base

    os.environ["MLX_ADAPTERS_HOME"] = tempfile.mkdtemp()
    counts, reasons = Counter(), {}
    plain = ma.FuseOptions(check=False, method="nearest")
    for folder in sorted(path.parent for path in out.glob("*/theirs.safetensors")):
        if names and folder.name not in names:
            continue
        theirs = mx.load(str(folder / "theirs.safetensors"))
        ids = theirs.pop("ids")
        for case in sorted(set(theirs) - {"base"}):
            for way in ("import", "fuse"):
                where = f"{folder.name}/{case}/{way}"
                try:
                    if way == "import":
                        adapter = ma.import_peft(
                            folder / "theirs" / case,
                            base=folder / "base",
                            name="it",
                            overwrite=True,
                            on_event=lambda _: None,
                        )
                        module = load_module(resolve_base(folder / "base"))[0]
                        attach(module, adapter)
                    else:
                        ma.fuse_peft(
                            folder / "theirs" / case,
                            folder / "fused",
                            base=folder / "base",
                            quantization="none",
                            options=plain,
                            overwrite=True,
                            on_event=lambda _: None,
                        )
                        module = load_module(resolve_base(folder / "fused"))[0]
                    wrong = (mx.abs(module(ids) - theirs[case]).max() / mx.abs(theirs[case]).max()).item()
                    counts[f"{way} right" if wrong < TOLERANCE else f"{way} WRONG"] += 1
                    if not wrong < TOLERANCE:
                        print(f"WRONG {where}: off by {wrong:.1e}", flush=True)
                except ma.AdapterError as error:
                    counts[f"{way} refused"] += 1
                    reasons.setdefault(kind_of(str(error))[:170], []).append(where)
                except Exception as error:
                    counts["FAULT"] += 1
                    print(f"FAULT {where}: {type(error).__name__}: {error}", flush=True)
    for reason, places in sorted(reasons.items(), key=lambda pair: -len(pair[1])):
        print(len(places), reason, places[:3])
    print(dict(counts))


if __name__ == "__main__":
    {"write": write, "make": make, "read": read}[sys.argv[1]](Path(sys.argv[2]), sys.argv[3:])
