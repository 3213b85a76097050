"""Make tests/fixtures/merges.safetensors: what PEFT's add_weighted_adapter computes, for tests without torch.

    pip install torch==2.13.0 peft==0.21.2 && python scripts/make_merge_fixtures.py

Tensors, in PEFT's own orientation (A is (r, in), B is (out, r)):

- `source/ADAPTER/MODULE/A|B`: the adapters that are merged;
- `merged/CASE/MODULE/A|B`, or `merged/CASE/MODULE/product` (B·A) where an SVD leaves the signs free;
- `mask/CASE/NUMBER`: what torch.bernoulli drew, in the order of its calls.

The file's metadata holds, as JSON, the scaling of each source and the settings of each case.
"""

import itertools
import json
from pathlib import Path

import peft
import torch
from safetensors.torch import save_file

TARGET = Path(__file__).parents[1] / "tests" / "fixtures" / "merges.safetensors"
SOURCES = {
    "x": {"r": 4, "lora_alpha": 8, "target_modules": ["q", "v", "embed"]},
    "y": {"r": 4, "lora_alpha": 3.5, "target_modules": ["q", "v", "embed", "up"]},
    "wide": {"r": 6, "lora_alpha": 6, "target_modules": ["q", "up"]},
    "pattern": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q", "v"],
        "rank_pattern": {"v": 2},
        "alpha_pattern": {"q": 5},
    },
}
EQUAL = [("x", "y")]
MIXED = [("x", "wide"), ("y", "pattern"), ("x", "y", "wide")]
WEIGHTS = {2: [(0.7, 0.3), (1.0, -0.5)], 3: [(0.5, 1.25, -0.25)]}
FACTOR_METHODS = ["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"]


class Toy(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(20, 16)
        self.q = torch.nn.Linear(16, 24, bias=False)
        self.v = torch.nn.Linear(16, 8, bias=False)
        self.up = torch.nn.Linear(12, 16, bias=False)


def new_model():
    """The toy with all source adapters, every tensor of them random."""
    torch.manual_seed(0)
    model = None
    for name, settings in SOURCES.items():
        config = peft.LoraConfig(**settings)
        if model is None:
            model = peft.get_peft_model(Toy(), config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    for key, value in model.named_parameters():
        if "lora_" in key:
            value.data = torch.randn_like(value) * 0.3
    return model


def lora_layers(model):
    for name, module in model.base_model.model.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            yield name, module


def factors(module, adapter):
    """(A, B) of one adapter in one module, or None."""
    if adapter in module.lora_A:
        return module.lora_A[adapter].weight.data, module.lora_B[adapter].weight.data
    if adapter in module.lora_embedding_A:
        return module.lora_embedding_A[adapter].data, module.lora_embedding_B[adapter].data
    return None


def cases():
    for pair, (number, method) in itertools.product(EQUAL, enumerate(FACTOR_METHODS)):
        for suffix in ("", "_svd"):
            if method + suffix == "linear_svd":
                continue
            for weights in WEIGHTS[2]:
                settings = {} if method == "linear" else {"density": 0.6}
                if "ties" in method:
                    settings["majority_sign_method"] = ["total", "frequency"][number % 2]
                yield pair, weights, method + suffix, settings
    for names in EQUAL + MIXED:
        for weights in WEIGHTS[len(names)]:
            yield names, weights, "cat", {}
            yield names, weights, "svd", {}
            yield names, weights, "svd", {"svd_rank": 3}
    yield ("x", "wide"), (0.7, 0.3), "ties_svd", {"density": 0.5, "majority_sign_method": "frequency"}


def record(model, case, names, weights, method, settings, tensors):
    masks = []
    draw = torch.bernoulli

    def recorded(*args, **kwargs):
        masks.append(draw(*args, **kwargs))
        return masks[-1]

    torch.bernoulli = recorded
    torch.manual_seed(7)
    try:
        model.add_weighted_adapter(list(names), list(weights), case, combination_type=method, **settings)
    finally:
        torch.bernoulli = draw
    for number, mask in enumerate(masks):
        tensors[f"mask/{case}/{number:03d}"] = mask.to(torch.uint8)
    for name, module in lora_layers(model):
        pair = factors(module, case)
        if pair is None or not any(factors(module, source) for source in names):
            continue
        a, b = pair
        if method.endswith("svd"):
            tensors[f"merged/{case}/{name}/product"] = b @ a
        else:
            tensors[f"merged/{case}/{name}/A"], tensors[f"merged/{case}/{name}/B"] = a, b
    return {"sources": names, "weights": weights, "method": method, **settings}


def main():
    model = new_model()
    tensors, scalings, described = {}, {}, {}
    for name, module in lora_layers(model):
        for adapter in SOURCES:
            if (pair := factors(module, adapter)) is not None:
                tensors[f"source/{adapter}/{name}/A"], tensors[f"source/{adapter}/{name}/B"] = pair
                scalings[f"{adapter}/{name}"] = module.scaling[adapter]
    for number, (names, weights, method, settings) in enumerate(cases()):
        case = f"{number:02d}"
        described[case] = record(model, case, names, weights, method, settings, tensors)
    metadata = {"scalings": json.dumps(scalings), "cases": json.dumps(described), "peft": peft.__version__}
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, TARGET, metadata)
    print(f"{TARGET}: {len(described)} merges, {TARGET.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
