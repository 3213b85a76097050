"""How transformers, PEFT and Hugging Face's checkpoints name modules and tensors."""

import re
from collections.abc import Iterable, Mapping

from mlx_adapters.storage.replacing import Output
from mlx_adapters.storage.tensor_names import ADAPTER_FILE, BIAS, CONFIG_FILE, LORA_A, LORA_B, MAGNITUDE, WEIGHT

# -- The PEFT dialect ------------------------------------------------------------------------------------
# PEFT names a tensor `base_model.model.{path in transformers}.{leaf}` and stores the transposes of MLX's:
# lora_A (rank, in), lora_B (out, rank); of an embedding lora_embedding_A (rank, vocab), lora_embedding_B
# (dim, rank); of n fused experts lora_A (n · rank, in), expert by expert, lora_B (out, rank · n), rank by rank.

PEFT_WEIGHTS_FILE, PEFT_PICKLE_FILE = "adapter_model.safetensors", "adapter_model.bin"
# transformers cuts a large adapter into these, and calls their index as a model's.
PEFT_SHARDS, PEFT_PICKLE_SHARDS, INDEXES = "adapter_model-*.safetensors", "adapter_model-*.bin", "*.index.json"
# Where chat templates stand: the only or default one, the named ones; before, in settings of a tokenizer or processor.
TEMPLATE_FILE, TEMPLATE_FOLDER = "chat_template.jinja", "additional_chat_templates"
TOKENIZER_CONFIG = "tokenizer_config.json"
TEMPLATE_SETTINGS = (TOKENIZER_CONFIG, "chat_template.json")
TEMPLATE_FILES = (TEMPLATE_FILE, *TEMPLATE_SETTINGS)
PEFT_OUTPUT = Output(CONFIG_FILE, r"adapter_model\.safetensors|README\.md|chat_template\.jinja")
TOKEN_ROWS = "trainable_tokens_delta"
ORIGINAL, TRAINED = "original_module", "modules_to_save"  # where a state keeps both weights of a module trained whole
VELORA = ".lora_velora_"  # what changes VeLoRA's backward pass alone
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
# Embeddings that no output layer shares.
POSITIONS = ("wpe", "embed_positions", "position_embeddings", "embed_tokens_per_layer")
Renames = tuple[tuple[str, str], ...]
# (beginning or inner part of a module path in transformers, the same in mlx-lm); tried in this order.
PEFT_RENAMES: Renames = (
    ("model.language_model.", "language_model.model."),
    ("lm_head", "language_model.lm_head"),
    ("transformer.", "model."),
    ("gpt_neox.layers.", "model.h."),
    ("gpt_neox.", "model."),
    ("embed_out", "model.embed_out"),
    ("lm_head", "model.embed_out"),
    (".mlp.", ".block_sparse_moe."),
    ("model.language_model.", "model."),
    ("language_model.model.", "model."),
    ("language_model.lm_head", "lm_head"),
    ("model.", "language_model.model."),
    ("model.", "backbone."),
    (".router", ".router.layer"),
    (".forget_gate.f_", ".f_"),
    (".shared_experts.", ".shared_expert."),
    (".block_sparse_moe.router", ".block_sparse_moe.gate"),
)
# How transformers names modules where its checkpoints have other names; AutoModelForCausalLM takes only the text model
# of some.
_TEXT_MODEL: Renames = (("model.", "language_model.model."), ("lm_head", "language_model.lm_head"))
OWN_NAMES = {
    "gpt2": PEFT_RENAMES[2:3],
    "gpt_bigcode": PEFT_RENAMES[2:3],
    "gpt_neox": (("gpt_neox.", "model."), ("lm_head", "model.embed_out"), ("gpt_neox.layers.", "model.h.")),
    **dict.fromkeys(("qwen3_5", "qwen3_5_moe", "llama4"), _TEXT_MODEL),
    "nemotron_h": (("model.", "backbone."),),
    **dict.fromkeys(("granitemoe", "granitemoehybrid"), ((".router", ".router.layer"),)),
    "kimi_linear": ((".forget_gate.f_", ".f_"),),
    "laguna": ((".shared_experts.", ".shared_expert."), (".mlp.gate", ".mlp.gate.proj")),
    "phimoe": ((".mlp.router", ".mlp.gate"), (".mlp.", ".block_sparse_moe.")),
}
# What models have in place of an output layer that sort texts, or tokens; PEFT puts all into such a config.
PEFT_CLASSIFIERS = ("score", "classifier", "qa_outputs")
FAN_IN_FAN_OUT = ("gpt2",)  # transformers stores the linear weights of these as (in, out)
_EXPERTS_FROM = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
EXPERTS_TO = {mlx: peft for peft, mlx in _EXPERTS_FROM.items()}
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
# Modules whose names transformers spoils when PEFT loads them, taking them for a checkpoint's: the file has those.
PEFT_SPOILED = {"laguna": (".shared_experts.", ".shared_expert.")}
# Model types whose fused experts transformers keeps as (experts, in, out) without telling PEFT.
PEFT_TURNED = ("llama4", "llama4_text")
PEFT_UNHEEDED = {
    **dict.fromkeys(("falcon_h1", "mamba2", "nemotron_h"), ("out_proj", "conv1d")),
    **dict.fromkeys(("mamba", "falcon_mamba"), ("out_proj", "conv1d", "dt_proj")),
    "jamba": ("dt_proj",),
    "longcat_flash": ("classifier",),
}
PEFT_UNCALLED = (
    "dt_proj",
    "classifier",
)  # of these, what is read so on every device; the others by a GPU's kernels alone


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


def without_adapter_name(names: Mapping[str, str]) -> dict[str, str]:
    """The same without the adapter's own name, `default` or that in its factors' names, where a state that is saved
    whole has it: `lm_head.modules_to_save.default.weight`, `token_adapter.trainable_tokens_delta.default`."""
    matches = (_PEFT_ADAPTER_TENSOR.fullmatch(name.removeprefix(PEFT_PREFIX)) for name in names.values())
    tails = {match[3].removesuffix(f".{WEIGHT}").removeprefix(".") for match in matches if match}
    own = "|".join(map(re.escape, sorted({"default", *tails} - {""})))
    held = re.compile(rf"\.(?:{TRAINED}\.(?:{own})(?=\.)|({TOKEN_ROWS})\.(?:{own})$)")
    return {name: held.sub(lambda m: f".{m[1]}" if m[1] else "", plain) for name, plain in names.items()}


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


def stored_path(path: str, model_type: str | None) -> str:
    """The path in transformers as PEFT's file must have it."""
    return _rename(path, *PEFT_SPOILED.get(model_type or "", ("", "")))


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
    name = EXPERTS_TO[projection] if block.endswith(".block_sparse_moe") else projection
    return f"{block}.experts.{expert}.{name}"


def split_fused(path: str) -> tuple[str, bool] | None:
    """(block, whether it is the inner of two wrapped parameters) of fused experts in transformers 5, else None."""
    match = re.fullmatch(r"(.+)\.experts(\.base_layer)?", path)
    return (match[1], bool(match[2])) if match else None


def is_of_experts(path: str) -> bool:
    """Whether a module path is that of one expert, or of a block's fused ones."""
    return bool(split_expert(path) or split_fused(path))


def fused_names(block: str, parameter: str) -> tuple[str, ...]:
    """How a checkpoint may call a parameter of a block's fused experts."""
    linear = f"{'output' if parameter == FUSED_DOWN else 'input'}_linear.{WEIGHT}"
    return f"{block}.experts.{parameter}", f"{block}.{linear}"


def first_experts(block: str, parameter: str, names: Iterable[str]) -> list[str]:
    """The matrices of the first expert that make up the parameter, gate before up, as far as the `names` have them."""
    wanted = (DOWN,) if parameter == FUSED_DOWN else (GATE, UP)
    spelled = [(f"{block}.experts.0.{n}.{WEIGHT}", f"{block}.experts.0.{EXPERTS_TO[n]}.{WEIGHT}") for n in wanted]
    return [name for pair in spelled for name in pair if name in names]


def block_of_experts(name: str) -> str | None:
    """The block of a checkpoint's tensor of experts, in any of their forms, else None."""
    match = re.fullmatch(r"(.+?)\.(experts\.\d+\..+|experts\.\w+|(?:input|output)_linear\.weight)", name)
    return match[1] if match else None


def fused_path(block: str, inner: bool) -> str:
    """The path at which PEFT stores the update of one of the two fused parameters of a block's experts."""
    return f"{block}.experts" + (".base_layer" if inner else "")
