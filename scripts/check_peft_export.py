"""Hold exported adapters against the real peft: PeftModel.from_pretrained must give our logits within 1e-4.

    python scripts/check_peft_export.py write out/peft-check    (with mlx)
    python scripts/check_peft_export.py check out/peft-check    (with torch 2.13.0, transformers 5.23.0, peft 0.21.2)

For every architecture of tests/fixtures/peft: each fixture imported and exported again, and adapters made
here with random weights: all layers with experts and router, DoRA, the last block only, the embeddings, one
projection of the experts.
"""

import shutil
import sys
import warnings
from pathlib import Path

ROOT = Path("tests/fixtures/peft")
ARCHITECTURES = sorted(p.parent.name for p in ROOT.glob("*/base"))


def own_adapters(model_type, layers):
    """Name -> (type, keys) of the adapters to make for a base with these layers, less what PEFT has no module for."""
    from mlx_adapters.storage import hf_names
    from mlx_adapters.storage.hf_names import EMBEDDINGS, POSITIONS, split_switch
    from mlx_adapters.storage.tensor_names import block_index, split

    unheeded, stacked = hf_names.PEFT_UNHEEDED.get(model_type, ()), any(map(split_switch, layers))
    each = model_type in hf_names.PEFT_EXPERTS_EACH
    blocks = [key for key in layers if block_index(key) is not None and split(key)[1] not in unheeded]
    blocks = [key for key in blocks if each or not split_switch(key)]
    parts = hf_names.PEFT_AS_PARAMETERS if stacked else ()
    attention = [key for key in blocks if not split_switch(key) and split(key)[1] not in parts]
    cases = {
        "all": ("lora", blocks),
        "dora": ("dora", attention),
        "attention": ("lora", attention[:3]),
        "last-block": ("lora", [k for k in blocks if block_index(k) == 1]),
    }
    cases["embedding"] = ("lora", [k for k in layers if split(k)[1] in EMBEDDINGS] + attention[:1])
    if positions := [k for k in layers if split(k)[1] in POSITIONS]:
        cases["positions"] = ("lora", positions)
    if "lm_head" in layers:
        cases["lm-head"] = ("lora", ["lm_head"])
    for projection in ("gate_proj", "down_proj"):
        keys = [k for k in blocks if split_switch(k) and k.endswith(projection)]
        if keys:
            cases[f"experts-{projection}"] = ("lora", keys)
    return cases


def write(out):
    import mlx.core as mx

    import mlx_adapters  # noqa: F401
    from mlx_adapters.adapters.peft_export import export_peft
    from mlx_adapters.checkpoints.originals import layout_of
    from mlx_adapters.models.adapter import Adapter
    from mlx_adapters.models.layers import adaptable_layers, attach, detach, expected_shapes
    from mlx_adapters.models.loading import load_model
    from mlx_adapters.models.metadata import AdapterConfig
    from mlx_adapters.peft_format.conversion import convert, record
    from mlx_adapters.peft_format.reading import read_peft
    from mlx_adapters.sources.bases import resolve_base
    from mlx_adapters.storage import tensor_files
    from mlx_adapters.storage.tensor_names import join

    for arch in ARCHITECTURES:
        model = load_model(resolve_base(ROOT / arch / "base"))
        layers = adaptable_layers(model.module)
        ids = mx.load(str(ROOT / arch / "logits.safetensors"))["input_ids"]
        adapters = {}
        for folder in sorted(p for p in (ROOT / arch).iterdir() if p.name not in ("base", "refused") and p.is_dir()):
            peft = read_peft(folder)
            converted = convert(
                peft, model.module, layout_of(model.base, model.module), arch, tie=folder.name == "tied-embedding"
            )
            metadata = {"peft": record(peft, converted, arch), "base": model.base.record()}
            adapters[f"fixture-{folder.name}"] = Adapter(converted.adapter.config, converted.adapter.weights, metadata)
        for seed, (name, (kind, keys)) in enumerate(own_adapters(model.base.config["model_type"], layers).items()):
            mx.random.seed(seed)
            config = AdapterConfig(rank=3, scale=1.7, keys=tuple(keys), type=kind)
            weights = {}
            for key in keys:
                for leaf, shape in expected_shapes(layers[key], config).items():
                    noise = mx.random.normal(shape) * 0.3
                    weights[join(key, leaf)] = mx.abs(noise) + 1 if leaf == "m" else noise
            adapters[f"own-{name}"] = Adapter(config, weights, {"base": model.base.record()})
        logits = {}
        for name, adapter in adapters.items():
            attach(model.module, adapter)
            logits[name] = mx.contiguous(model.logits(ids))
            detach(model.module)
            export_peft(adapter, out / arch / name, base_model=str(ROOT / arch / "base"), overwrite=True)
        tensor_files.write_safetensors(out / arch / "logits.safetensors", logits)
        print(arch, len(adapters), "adapters written")


def check(out):
    import torch
    import transformers
    from make_peft_fixtures import load_base
    from peft import PeftModel
    from safetensors.torch import load_file

    warnings.filterwarnings("ignore")
    transformers.utils.logging.disable_progress_bar()
    worst, failed = 0.0, []
    for arch in ARCHITECTURES:
        expected = load_file(out / arch / "logits.safetensors")
        ids = load_file(ROOT / arch / "logits.safetensors")["input_ids"].long()
        for name, logits in expected.items():
            model = PeftModel.from_pretrained(load_base(arch), out / arch / name).eval()
            with torch.no_grad():
                computed = model(input_ids=ids, use_cache=False).logits
            difference = (computed - logits).abs().max().item()
            worst = max(worst, difference)
            if not difference < 1e-4:
                failed.append(f"{arch}/{name}: {difference:.3g}")
    print(f"worst difference of a logit: {worst:.2g}")
    if failed:
        sys.exit("PEFT computes something else:\n" + "\n".join(failed))


if __name__ == "__main__":
    step, folder = sys.argv[1], Path(sys.argv[2])
    if step == "write":
        shutil.rmtree(folder, ignore_errors=True)
        write(folder)
    else:
        check(folder)
