"""The forms that Hugging Face's checkpoints may have: names and shapes of tensors, rewritten from mlx-lm's own.

Each is tried on mlx-lm's own loading (see `originals`), none is trusted.
"""

import re
from collections.abc import Iterable

from mlx_adapters.storage.hf_names import DOWN, EXPERTS_TO, FUSED_DOWN, FUSED_GATE_UP, GATE, UP, Renames
from mlx_adapters.storage.tensor_names import BIAS, WEIGHT, split

# How Hugging Face's checkpoints may spell what mlx-lm has under another name; each is tried, none is trusted.

_INNER: Renames = (("language_model.model.", "model.language_model."), ("language_model.lm_head.", "lm_head."))
# Loading takes several spellings of these; checkpoints on the Hub have this one.
SPELLINGS: dict[str, tuple[Renames, ...]] = {
    "qwen2_vl": ((("language_model.", ""),),),
    **dict.fromkeys(("mistral3", "pixtral"), ()),
}
UNLIKE = ("nanochat",)  # mlx-lm reads checkpoints of other programs only
CHECKPOINT_RENAMES: tuple[Renames, ...] = (
    _INNER,
    (("language_model.", ""),),
    (("model.h.", "gpt_neox.layers."), ("model.embed_out.", "embed_out."), ("model.", "gpt_neox.")),
    (("model.", ""),),
    ((".gate_proj.", ".w1."), (".down_proj.", ".w2."), (".up_proj.", ".w3.")),
    (
        (".mlp.shared_experts.", ".block_sparse_moe.shared_experts."),
        (".mlp.gate.", ".block_sparse_moe.gate."),
        (".mlp.e_score_correction_bias", ".block_sparse_moe.gate.e_score_correction_bias"),
    ),
)
_SAME = {name: name for name in (GATE, UP, DOWN)}
# (mlx-lm's block, the checkpoint's; layout; names of the projections)
EXPERT_FORMS: tuple[tuple[str, str, str, dict[str, str]], ...] = tuple(
    ("", "", layout, _SAME) for layout in ("fused", "fused transposed", "linear", "packed")
) + tuple(
    (own, block, "each", names)
    for own, block in (("", ""), (".mlp", ".block_sparse_moe"))
    for names in (_SAME, EXPERTS_TO, {"fc1": UP, "fc2": DOWN})
)


def checkpoint_experts(
    shapes: dict[str, tuple[int, ...]], switches: list[str], form: tuple[str, str, str, dict[str, str]]
) -> dict[str, tuple[int, ...]]:
    """`shapes` with the stacked layers at `switches` as one of EXPERT_FORMS has them."""
    own, block, layout, names = form
    originals: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        path, leaf = split(name)
        leaves = (WEIGHT, BIAS) if layout == "packed" else (WEIGHT,)
        stacked = leaf in leaves and any(path == place or path.endswith(f".{place}") for place in switches)
        inside, projection = path.rpartition(".")[0].rpartition(".")[0], path.rpartition(".")[2]
        if stacked and projection not in names:
            return shapes
        if not stacked or not inside.endswith(own):
            originals[name] = shape
            continue
        inside = inside.removesuffix(own) + block
        if layout == "each":
            places = [f"{inside}.experts.{e}.{names[projection]}.{WEIGHT}" for e in range(shape[0])]
            originals |= dict.fromkeys(places, shape[1:])
            continue
        experts, out, *inputs = shape
        whole = (experts, out if projection == DOWN else 2 * out, *inputs)
        fused = f"{inside}.experts.{FUSED_DOWN if projection == DOWN else FUSED_GATE_UP}"
        if layout == "linear":
            originals[f"{inside}.{'output' if projection == DOWN else 'input'}_linear.{WEIGHT}"] = whole
        elif layout == "packed":
            originals[f"{fused}_{BIAS}" if leaf == BIAS else f"{fused}.{WEIGHT}"] = whole
        else:
            originals[fused] = (whole[0], whole[2], whole[1]) if layout == "fused transposed" else whole
    return originals


def unpacked(names: Iterable[str]) -> dict[str, str]:
    """Names of packed experts' weights (see "packed" above) and those that they have where they are not packed."""
    names = set(names)
    ending = f".{FUSED_GATE_UP}.{WEIGHT}"
    blocks = {name.removesuffix(ending) for name in names if name.endswith(ending)}
    paths = [f"{block}.{parameter}" for block in sorted(blocks) for parameter in (FUSED_GATE_UP, FUSED_DOWN)]
    return {f"{path}.{WEIGHT}": path for path in paths if f"{path}.{WEIGHT}" in names and f"{path}_{BIAS}" in names}


def checkpoint_joined(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Gate and up of a dense block as the two halves of one matrix."""
    joined = {}
    for name, shape in shapes.items():
        path, leaf = split(name)
        if path.endswith(f".mlp.{DOWN}"):
            joined[f"{path.removesuffix(f'mlp.{DOWN}')}shared_mlp.output_linear.{leaf}"] = shape
        elif path.endswith((f".mlp.{GATE}", f".mlp.{UP}")):
            joined[f"{path.rpartition('.mlp.')[0]}.shared_mlp.input_linear.{leaf}"] = (2 * shape[0], *shape[1:])
        else:
            joined[name] = shape
    return joined


def checkpoint_convolutions(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Convolutions of queries, keys and values in torch's order of axes, without a module of their own."""
    renamed = {name: re.sub(r"\.([qkv]_conv)\.conv\.", r".\g<1>1d.", name) for name in shapes}
    return {renamed[n]: s if renamed[n] == n or len(s) < 3 else (s[0], s[2], s[1]) for n, s in shapes.items()}


def checkpoint_rows(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Experts one below the other in one matrix (DBRX), which mlx-lm has one by one."""
    joined: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        match = re.fullmatch(rf"(.+\.experts)\.\d+\.(v1|w1|w2)\.{WEIGHT}", name)
        if match is None:
            joined[name] = shape
            continue
        rows, columns = shape[::-1] if match[2] == "w2" else shape
        whole = f"{match[1]}.mlp.{match[2]}"
        joined[whole] = (joined.get(whole, (0,))[0] + rows, columns)
    return joined


def checkpoint_latent(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The two maps out of a latent vector (MLA) as one matrix of all heads' rows."""
    latent: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        path, leaf = split(name)
        other = shapes.get(f"{path.removesuffix('embed_q')}unembed_out.{leaf}")
        if path.endswith(".embed_q") and other and len(shape) == len(other) == 3:
            latent[f"{path.removesuffix('embed_q')}kv_b_proj.{leaf}"] = (shape[0] * (shape[2] + other[1]), shape[1])
        elif not path.endswith(".unembed_out"):
            latent[name] = shape
    return latent
