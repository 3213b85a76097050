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
import shutil
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
    "mamba",
)
STEPS = {"time_step_limit": [0.0, 100.0]}
WHOLE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}
SETTINGS = {  # what mlx-lm and transformers take for granted differently
    "afmoe": {"mup_enabled": True, "route_scale": 2.0, "global_attn_every_n_layers": 1},
    "falcon_h1": STEPS | {"mlp_multipliers": [0.7, 1.3], "ssm_multipliers": [0.9, 0.8, 0.7, 1.1, 1.2]},
    "granitemoehybrid": STEPS | {"position_embedding_type": "rope"},
    "longcat_flash": {
        "zero_expert_num": 0,
        "head_dim": 32,
    },  # (transformers 5.24 makes gate_up_proj for the others as well)
    "laguna": {"rope_parameters": {"full_attention": WHOLE, "sliding_attention": WHOLE}},
}
PARTS = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3", "router")
TOWER = r"vision|visual|multi_modal|audio"
APART = rf"lm_head|embed_out|{TOWER}"


SAYS_TIED = "+tied"  # a base of two ends whose config says that they are one


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
    os.environ["MLX_ADAPTERS_HOME"] = tempfile.mkdtemp()
    for name in names or NAMES:
        try:
            write_base(out / name, name)
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {str(error)[:200]}", flush=True)
            continue
        for folder in (out / name, out / f"{name}{SAYS_TIED}"):
            if folder.name == name or say_tied(out / name, folder):
                write_adapters(folder)


def write_base(folder, name):
    """The same model for transformers (`hf`) and for mlx-lm (`base`)."""
    import check_hf

    import mlx_adapters as ma
    from mlx_adapters.models.layers import adaptable_layers
    from mlx_adapters.models.loading import load_module
    from mlx_adapters.sources.bases import resolve_base

    check_hf.SETTINGS |= SETTINGS
    packed = resolve_base(check_hf.base_of(folder / "packed", name))
    first = [next(iter(adaptable_layers(load_module(packed)[0])))]
    nothing = random_adapter(load_module(packed)[0], packed, first, "lora", 0)
    nothing.weights.update({n: 0 * w for n, w in nothing.weights.items()})
    for form, options in (("hf", {"format": "hf"}), ("base", {})):
        options = ma.FuseOptions(check=False, method="nearest", **options)
        ma.fuse(packed, nothing, folder / form, options=options, quantization="none", dtype="float32", overwrite=True)


def say_tied(folder, other):
    """Make a copy whose config says that its two ends are one; False where mlx-lm's model heeds that."""
    from mlx_adapters.models.layers import adaptable_layers, tied
    from mlx_adapters.models.loading import load_module
    from mlx_adapters.sources.bases import resolve_base

    shutil.rmtree(other, ignore_errors=True)
    for form in ("hf", "base"):
        shutil.copytree(folder / form, other / form)
        config = json.loads((other / form / "config.json").read_text())
        if any(part.get("tie_word_embeddings") for part in (config, config.get("text_config") or {})):
            return False
        for part in (config, config.get("text_config")):
            if part is not None:
                part["tie_word_embeddings"] = True
        (other / form / "config.json").write_text(json.dumps(config))
    try:
        return not tied(adaptable_layers(load_module(resolve_base(other / "base"))[0]))
    except Exception:
        return False


def write_adapters(folder):
    """Export an adapter on each kind of layer, and note its logits."""
    import mlx.core as mx

    import mlx_adapters as ma
    from mlx_adapters.models.layers import adaptable_layers, attach, detach, loads_in_mlx_lm
    from mlx_adapters.models.loading import load_module
    from mlx_adapters.models.metadata import AdapterConfig
    from mlx_adapters.sources.bases import resolve_base

    ids = mx.array([[5, 300, 17, 44, 120, 9, 77]])
    base = resolve_base(folder / "base")
    module = load_module(base)[0]
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
                folder / "ours" / case,
                base_model=str(folder / "hf"),
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
    if folder.name == "llama":
        logits |= write_starts(folder, ids)
    mx.save_safetensors(str(folder / "ours.safetensors"), logits)
    (folder / "refused.json").write_text(json.dumps(refused, indent=1))
    print(folder.name, f"{len(logits) - 2} exported, {len(refused)} refused", flush=True)
    for reason in {kind_of(reason)[:160] for reason in refused.values()}:
        print("   ", reason, flush=True)


def write_starts(folder, ids):
    """Train a little from each start, export, and give our logits; LoftQ's original is the base with some noise."""
    import mlx.core as mx
    from helpers.training_tools import write_data

    import mlx_adapters as ma
    from mlx_adapters.models.loading import load_model
    from mlx_adapters.sources.bases import resolve_base

    shutil.rmtree(folder / "data", ignore_errors=True)
    data, original, logits = write_data(folder / "data"), folder / "original", {}
    shutil.copytree(folder / "base", original, dirs_exist_ok=True)
    weights = mx.load(str(original / "model.safetensors"))
    noisy = {name: w + 0.01 * mx.random.normal(w.shape) for name, w in weights.items()}
    mx.save_safetensors(str(original / "model.safetensors"), noisy, {"format": "mlx"})
    training = ma.TrainConfig(iterations=3, learning_rate=0.01, dtype="float32")
    for init, more in (("pissa", {}), ("eva", {}), ("loftq", {"original": str(original)})):
        lora = ma.LoraConfig(rank=4, scale=2.0, init=init, **more)
        base = folder / "packed"  # in 4 bits; of its own numbers `hf` is made
        name = f"start-{init}"
        ma.train(base, data, name=name, lora=lora, training=training, overwrite=True, on_event=lambda _: None)
        adapter = ma.load_adapter(name)
        ma.export_peft(adapter, folder / "ours" / name, base_model=str(folder / "hf"), base=base, overwrite=True)
        logits[name] = mx.contiguous(load_model(resolve_base(base), adapter).logits(ids))
    return logits


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


def move(key, value):
    """What a training would do to a trained parameter."""
    import torch

    noise = 0.2 * torch.randn(value.shape)
    with torch.no_grad():
        if "magnitude" in key:
            value.mul_(1 + noise)
        elif "lora_" in key or "trainable_tokens" in key:
            value.copy_(noise)
        else:
            value.add_(noise)


def own_cases(model):
    """Name -> LoraConfig arguments, of what people do to a model of this kind."""
    import torch

    modules = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and not re.search(APART, n)]
    linear = sorted({n.rpartition(".")[2] for n in modules if not n[-1].isdigit()})
    calm = [name for name in linear if name not in PARTS] or linear  # PEFT takes the others for parts of experts
    cases = {f"linear-{name}": {"target_modules": [name]} for name in linear}
    cases["experts"] = {"target_modules": [name for name in linear if name in PARTS] or linear}
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
    cases["patterns"] = {
        "target_modules": calm[:4],
        "rank_pattern": {calm[0]: 2},
        "alpha_pattern": {calm[-1]: 3.5},
        "use_rslora": True,
    }
    first = {"target_modules": calm[:1]}
    cases |= {f"{name}-to-save": first | {"modules_to_save": [name]} for name in routers}
    cases["norms-to-save"] = first | {"modules_to_save": ["norm", "input_layernorm"]}
    cases["experts-to-save"] = first | {"modules_to_save": ["experts"]}
    cases["velora"] = first | {"velora_config": {"num_groups": 4}}
    cases["mica"] = first | {"init_lora_weights": "mica"}
    cases["orthogonal"] = first | {"init_lora_weights": "orthogonal"}
    cases["feature-extraction"] = first | {"task_type": "FEATURE_EXTRACTION"}
    cases["biases"] = first | {"bias": "all"}
    cases["lora-biases"] = first | {"bias": "lora_only"}
    cases["lora-bias"] = first | {"lora_bias": True}
    cases["one-layer"] = {"target_modules": calm, "layers_to_transform": [1]}
    blocks = next((n for n, m in model.named_modules() if isinstance(m, torch.nn.ModuleList)), "model.layers")
    cases["layers-pattern"] = cases["one-layer"] | {"layers_pattern": blocks.rpartition(".")[2]}
    cases["expression"] = {"target_modules": rf".*\.1\..*({'|'.join(calm)})", "exclude_modules": calm[:1]}
    cases["rslora-dora"] = first | {"use_rslora": True, "use_dora": True, "alpha_pattern": {"0": 3, calm[0]: 5.5}}
    cases |= end_cases(model, first)
    if any(re.search(TOWER, name) for name, _ in model.named_modules()):
        of_text = {"exclude_modules": rf".*({TOWER}).*"}
        cases = {
            case: options if "exclude_modules" in options else options | of_text for case, options in cases.items()
        }
        cases["tower"] = {"target_modules": "all-linear"}
    return cases


def end_cases(model, first):
    """What people do to the embedding of tokens and the output layer."""
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    embedding, head = (next(n for n, m in model.named_modules() if m is end).rpartition(".")[2] for end in ends)
    tying, rows = {"ensure_weight_tying": True}, "trainable_token_indices"
    return {
        "embedding": {"target_modules": [embedding]},
        "head": {"target_modules": [head]},
        "both-ends": {"target_modules": [embedding, head]},
        "embedding-tying": {"target_modules": [*first["target_modules"], embedding]} | tying,
        "embedding-to-save": first | {"modules_to_save": [embedding]},
        "head-to-save": first | {"modules_to_save": [head]},
        "ends-to-save": first | {"modules_to_save": [embedding, head]},
        "to-save-tying": first | {"modules_to_save": [embedding]} | tying,
        "tokens": first | {rows: {embedding: [3, 5]}},
        "tokens-tying": first | {rows: [3, 5]} | tying,
        "head-tokens": first | {rows: {head: [3, 5]}},
        "both-tokens": first | {rows: {embedding: [3, 5], head: [3, 5]}},
        "other-tokens": first | {rows: {embedding: [3, 5], head: [4]}},
        "tokens-and-head": {"target_modules": [head], rows: {embedding: [3, 5]}},
        "tokens-and-embedding": {"target_modules": [embedding], rows: {embedding: [3, 5]}},
        "tokens-and-head-to-save": first | {rows: {embedding: [3, 5]}, "modules_to_save": [head]},
    }


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
        run = partial(logits_of, ids=ids)
        try:
            model = load_model(folder / "hf")
            there = off(run(model), ours["base"])
        except Exception as error:
            print(folder.name, "does not run:", type(error).__name__, str(error)[:100], flush=True)
            continue
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
                wrong = bool(told) or (there < TOLERANCE and not off(computed, expected) < TOLERANCE)
                counts["wrong" if wrong else "right" if there < TOLERANCE else "loaded, the bases differ"] += 1
                if wrong:
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
                    if value.requires_grad:
                        move(key, value)
                made.save_pretrained(folder / "theirs" / case)
                again = peft.PeftModel.from_pretrained(load_model(folder / "hf"), folder / "theirs" / case).eval()
                saved[case] = run(made)
                if off(run(again), saved[case]) > TOLERANCE:
                    print(f"   {folder.name}/{case}: PEFT does not load what it saved", flush=True)
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
