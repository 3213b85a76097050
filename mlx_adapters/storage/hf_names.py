"""How transformers, PEFT and Hugging Face's checkpoints name modules and tensors."""

import re
from collections.abc import Iterable

from mlx_adapters.storage.replacing import Output
from mlx_adapters.storage.tensor_names import ADAPTER_FILE, BIAS, CONFIG_FILE, LORA_A, LORA_B, MAGNITUDE, WEIGHT, split

# GPT-2's matrices that a Hugging Face checkpoint stores transposed, (in, out).
GPT2_TRANSPOSED = ("c_attn", "c_proj", "c_fc")

# -- The PEFT dialect ------------------------------------------------------------------------------------
# PEFT names a tensor `base_model.model.{path in transformers}.{leaf}` and stores the transposes of MLX's:
# lora_A (rank, in), lora_B (out, rank); of an embedding lora_embedding_A (rank, vocab), lora_embedding_B
# (dim, rank); of n fused experts lora_A (n · rank, in), expert by expert, lora_B (out, rank · n), rank by rank.

PEFT_WEIGHTS_FILE, PEFT_PICKLE_FILE = "adapter_model.safetensors", "adapter_model.bin"
# transformers cuts a large adapter into these, and calls their index as a model's.
PEFT_SHARDS, PEFT_PICKLE_SHARDS, INDEXES = "adapter_model-*.safetensors", "adapter_model-*.bin", "*.index.json"
PEFT_OUTPUT = Output(CONFIG_FILE, r"adapter_model\.safetensors|README\.md")
PEFT_SCALE = "mlx_scale"  # in the file's metadata: the scale to the bit, where lora_alpha / r rounds
PEFT_PREFIX = "base_model.model."
PEFT_LINEAR = {LORA_A: "lora_A.weight", LORA_B: "lora_B.weight", MAGNITUDE: "lora_magnitude_vector"}
PEFT_EMBEDDING = {LORA_A: "lora_embedding_A", LORA_B: "lora_embedding_B"}
_LEAF_OF_PEFT = {
    spelling.removesuffix(".weight"): leaf
    for table in (PEFT_LINEAR, PEFT_EMBEDDING)
    for leaf, spelling in table.items()
}
_WRAPPER = re.compile(r"(?<![^.])_[^.]*\.")
_PEFT_ADAPTER_TENSOR = re.compile(rf"(.+?)\.({'|'.join(_LEAF_OF_PEFT)})((?:\.[^.]+){{0,2}})")

# -- Other MLX programs ----------------------------------------------------------------------------------
# What mlx-vlm calls an adapter's factors (its shapes are mlx-lm's), and what files hold an adapter's weights.
FOREIGN_LEAVES = {"A": LORA_A, "B": LORA_B}
NPZ, NPZ_FILE = ".npz", "adapters.npz"
FOREIGN_WEIGHTS = (ADAPTER_FILE, NPZ_FILE, "weights.safetensors", PEFT_WEIGHTS_FILE, f"best/{ADAPTER_FILE}")

EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "tok_embeddings", "word_embeddings", "embeddings", "embedding")
HEADS = ("lm_head", "embed_out")
POSITIONS = ("wpe", "embed_positions", "position_embeddings")  # embeddings that no output layer shares
Renames = tuple[tuple[str, str], ...]
# (beginning or inner part of a module path in transformers, the same in mlx-lm); tried in this order.
PEFT_RENAMES: Renames = (
    ("model.language_model.", "language_model.model."),
    ("lm_head", "language_model.lm_head"),
    ("transformer.", "model."),
    ("gpt_neox.layers.", "model.h."),
    ("gpt_neox.", "model."),
    ("embed_out", "model.embed_out"),
    (".mlp.", ".block_sparse_moe."),
    ("model.language_model.", "model."),
    ("language_model.model.", "model."),
    ("language_model.lm_head", "lm_head"),
    ("model.", "language_model.model."),
    ("model.", "backbone."),
    (".router", ".router.layer"),
)
# How transformers names modules where its checkpoints have other names; AutoModelForCausalLM takes only the text model
# of some.
_TEXT_MODEL: Renames = (("model.", "language_model.model."), ("lm_head", "language_model.lm_head"))
OWN_NAMES = {
    "gpt2": PEFT_RENAMES[2:3],
    "gpt_bigcode": PEFT_RENAMES[2:3],
    "gpt_neox": PEFT_RENAMES[3:6],
    **dict.fromkeys(("qwen3_5", "qwen3_5_moe", "llama4"), _TEXT_MODEL),
    "nemotron_h": (("model.", "backbone."),),
    **dict.fromkeys(("granitemoe", "granitemoehybrid"), ((".router", ".router.layer"),)),
}
FAN_IN_FAN_OUT = ("gpt2",)  # transformers stores the linear weights of these as (in, out)
_EXPERTS_FROM = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
_EXPERTS_TO = {mlx: peft for peft, mlx in _EXPERTS_FROM.items()}
GATE, UP, DOWN = "gate_proj", "up_proj", "down_proj"
FUSED_GATE_UP, FUSED_DOWN = "gate_up_proj", "down_proj"
_EXPERT = re.compile(r"(.+)\.experts\.(\d{1,5})\.(w1|w2|w3|gate_proj|up_proj|down_proj)")
_SWITCH = re.compile(r"(.+)\.switch_mlp\.(gate_proj|up_proj|down_proj)")


ROUTERS = ("gate", "router")
# What PEFT 0.21 takes for parts of experts wherever it stands, on a base that has experts.
PEFT_AS_PARAMETERS = (*ROUTERS, GATE, UP, DOWN, *_EXPERTS_FROM)
# Model types whose experts PEFT 0.21 takes one by one, and modules whose weights transformers reads past PEFT's layer.
PEFT_EXPERTS_EACH = (
    *("afmoe", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1", "ernie4_5_moe", "exaone_moe", "glm4_moe"),
    *("glm4_moe_lite", "glm_moe_dsa", "hunyuan_v1_moe", "longcat_flash", "mellum", "minimax", "mixtral", "olmoe"),
    *("qwen3_moe", "qwen3_next", "solar_open"),
)
PEFT_UNHEEDED = {
    **dict.fromkeys(("falcon_h1", "mamba2", "nemotron_h"), ("out_proj", "conv1d")),
    **dict.fromkeys(("mamba", "falcon_mamba"), ("out_proj", "conv1d", "dt_proj")),
}


def is_embedding(path: str) -> bool:
    """Whether a module path is that of an embedding of tokens."""
    return path.rpartition(".")[2] in EMBEDDINGS


def is_end(path: str) -> bool:
    """Whether a module path is that of an input embedding or an output layer."""
    return is_embedding(path) or is_head(path)


def is_head(path: str) -> bool:
    """Whether a module path of transformers is that of an output layer."""
    return path.rpartition(".")[2] in HEADS


def unwrapped(names: Iterable[str]) -> dict[str, str]:
    """Each name of a file of PEFT's, and the same without what was wrapped around the model or its modules.

    torch.compile, FSDP and activation checkpointing keep what they wrap under a name that begins with an underscore, as
    no module of transformers' does. What stands before PEFT's own prefix in all names alike (`module.` of DDP, `model.`
    of Lightning) is the name of a holder; where no name has that prefix, all get it.
    """
    plain = {name: _WRAPPER.sub("", name) for name in names}
    heads = {name: name.rpartition(PEFT_PREFIX)[0] for name in plain.values()}
    prefixed = {name for name in heads if PEFT_PREFIX in name}
    if not prefixed:
        return {name: PEFT_PREFIX + own for name, own in plain.items()}
    if len(set(heads.values())) > 1 or len(prefixed) < len(heads):
        return plain
    return {name: own.removeprefix(heads[own]) for name, own in plain.items()}


def parse_peft_tensor(name: str) -> tuple[str, str, bool] | None:
    """(module path in transformers, MLX leaf, of an embedding) of an adapter tensor's name, else None.

    The adapter's own name (`.lora_A.default.weight`), which old versions left in, is dropped.
    """
    match = _PEFT_ADAPTER_TENSOR.fullmatch(name.removeprefix(PEFT_PREFIX))
    if match is None or not name.startswith(PEFT_PREFIX):
        return None
    path, spelling, rest = match.groups()
    tail = [part for part in rest.split(".") if part]
    if tail and tail[-1] == WEIGHT:
        tail.pop()
    if len(tail) > 1 or tail == [BIAS]:
        return None
    return path, _LEAF_OF_PEFT[spelling], spelling.startswith("lora_embedding")


def peft_tensor(path: str, leaf: str, embedding: bool = False) -> str:
    """The name of the tensor of the module at `path` in transformers."""
    return f"{PEFT_PREFIX}{path}.{(PEFT_EMBEDDING if embedding else PEFT_LINEAR)[leaf]}"


def mlx_paths(path: str) -> list[tuple[str, Renames]]:
    """Where mlx-lm may have the module at `path` in transformers, likeliest first, and the renames used."""
    candidates: list[tuple[str, Renames]] = [(path, ())]
    for rename in PEFT_RENAMES:
        candidates += [(new, (*used, rename)) for old, used in candidates if (new := _rename(old, *rename)) != old]
    return candidates


def peft_path(path: str, model_type: str | None = None, renames: Renames | None = None) -> str:
    """The path in transformers of a module of mlx-lm; `renames` are those that its import used, if it was imported."""
    if renames is None:
        renames = OWN_NAMES.get(model_type or "", PEFT_RENAMES[:2])
    for old, new in reversed(renames):
        path = _rename(path, new, old)
    return path


def _rename(path: str, old: str, new: str) -> str:
    if old.startswith("."):
        return path.replace(old, new, 1)
    starts = path.startswith(old) if old.endswith(".") else path == old
    return new + path[len(old) :] if starts else path


def split_expert(path: str) -> tuple[str, int] | None:
    """(path of the stacked layer, expert) of one expert's module in transformers 4's layout, else None."""
    match = _EXPERT.fullmatch(path)
    return (switch_path(match[1], _EXPERTS_FROM.get(match[3], match[3])), int(match[2])) if match else None


def switch_path(block: str, projection: str) -> str:
    """The path of a block's stacked experts."""
    return f"{block}.switch_mlp.{projection}"


def split_switch(path: str) -> tuple[str, str] | None:
    """(block, projection) of a stacked layer's path, else None."""
    match = _SWITCH.fullmatch(path)
    return (match[1], match[2]) if match else None


def expert_path(block: str, projection: str, expert: int) -> str:
    """One expert's module in transformers 4's layout."""
    name = _EXPERTS_TO[projection] if block.endswith(".block_sparse_moe") else projection
    return f"{block}.experts.{expert}.{name}"


def split_fused(path: str) -> tuple[str, bool] | None:
    """(block, whether it is the inner of two wrapped parameters) of fused experts in transformers 5, else None."""
    match = re.fullmatch(r"(.+)\.experts(\.base_layer)?", path)
    return (match[1], bool(match[2])) if match else None


def is_of_experts(path: str) -> bool:
    """Whether a module path is that of one expert, or of a block's fused ones."""
    return bool(split_expert(path) or split_fused(path))


def fused_path(block: str, inner: bool) -> str:
    """The path at which PEFT stores the update of one of the two fused parameters of a block's experts."""
    return f"{block}.experts" + (".base_layer" if inner else "")


# -- Original checkpoints --------------------------------------------------------------------------------
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
    for names in (_SAME, _EXPERTS_TO, {"fc1": UP, "fc2": DOWN})
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
