"""The only speller of MLX's tensor names, and of the files of an adapter (`hf_names` spells the names of others).

MLX dialect (mlx-lm 0.32): an adapter's tensors are `{module path}.{leaf}`.

| layer     | lora_a          | lora_b            | m (DoRA)      |
| --------- | --------------- | ----------------- | ------------- |
| linear    | (in, rank)      | (rank, out)       | (out,)        |
| switch    | (experts, rank, in) | (experts, out, rank) | none     |
| embedding | (vocab, rank)   | (rank, dim)       | (vocab,)      |

A quantized layer's weight is three tensors: packed codes, scales and, for the mode `affine`, biases.
"""

import re
from collections.abc import Callable, Iterable, Sequence

from mlx_adapters.errors import FormatError
from mlx_adapters.storage.replacing import Output

LORA_A, LORA_B, MAGNITUDE = "lora_a", "lora_b", "m"
ADAPTER_LEAVES = (LORA_A, LORA_B, MAGNITUDE)
WEIGHT, SCALES, BIASES, BIAS = "weight", "scales", "biases", "bias"
QUANTIZED_LEAVES = (WEIGHT, SCALES, BIASES)

ADAPTER_FILE = "adapters.safetensors"
CONFIG_FILE = "adapter_config.json"
METADATA_FILE = "adapter_metadata.json"
EXTRAS = ("README.md", "LICENSE", "NOTICE")  # what goes along with an adapter
REFERENCE_FILE = "reference.safetensors"  # of a run: what its reference model says of the answers
FUSE_RECIPE_FILE, REPORT_FILE = "fuse_recipe.json", "fuse_report.json"
CHECKPOINTS_FOLDER = "checkpoints"
ROWS_FOLDER = "rows"  # of a run on rows from Python, which no other file holds
CHECKPOINT_FILE = re.compile(r"([0-9]{7,})_adapters\.safetensors")
# All that is ever written into an adapter's folder, by training, by choosing, by `card` and by `add`.
CHECKPOINT_OUTPUT = Output("state.json", r"(adapters|optimizer)\.safetensors")
ADAPTER_OUTPUT = Output(
    CONFIG_FILE,
    r"(adapters|reference)\.safetensors|adapter_metadata\.json|recipe\.json|[0-9]{7,}_adapters\.safetensors|README\.md|loss\.svg"
    r"|LICENSE|NOTICE|checkpoints/[0-9]+/(adapters\.safetensors|optimizer\.safetensors|state\.json)"
    r"|rows/(train|valid|test)\.jsonl",
    record=METADATA_FILE,
)


def join(path: str, leaf: str) -> str:
    """The name of the tensor `leaf` of the module at `path`."""
    return f"{path}.{leaf}" if path else leaf


def split(name: str) -> tuple[str, str]:
    """(module path, leaf) of a tensor name."""
    path, _, leaf = name.rpartition(".")
    return path, leaf


def other_beginning(paths: Sequence[str], known: Callable[[str], bool], names: Iterable[str]) -> tuple[str, str] | None:
    """(old, new): what all `paths` begin with, and what they have to begin with to be `known`; None if nothing does.

    A beginning may be too much (a wrapper's name), too little (a body without its model) or in another order
    (`model.language_model.`). Any other exchange could make a part of the model of another one, as of a tower with
    equal blocks. `names`: what there is, of which new beginnings are made.
    """
    if not paths or all(map(known, paths)):
        return ("", "") if paths else None
    parts, names = paths[0].split("."), list(names)
    for cut in range(len(parts)):
        old, tail = "".join(f"{part}." for part in parts[:cut]), ".".join(parts[cut:])
        if not all(path.startswith(old) for path in paths):
            break
        ends = (
            {name.removesuffix(tail) for name in names if name.endswith(f".{tail}")} if cut < len(parts) - 1 else set()
        )
        ends = {new for new in ends if not old or sorted(new.split(".")) == sorted(old.split("."))}
        fitting = [new for new in ({""} if cut else set()) | ends if all(known(new + p[len(old) :]) for p in paths)]
        if len(fitting) == 1:
            return old, fitting[0]
    return None


def checkpoint_file(iteration: int) -> str:
    """mlx-lm's file name for the adapter as it stood at `iteration`."""
    return f"{iteration:07d}_adapters.safetensors"


def block_index(path: str) -> int | None:
    """The number of the transformer block that a module path lies in, or None for embeddings and heads."""
    match = re.search(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)(?:\.|$)", path)
    return int(match.group(1)) if match else None


def before_number(path: str) -> str:
    """The part of a path before its first number (`vision_tower.blocks` of blocks in a row); "" without one."""
    before = re.match(r"(.*?)\.\d+\.", path)
    return before[1] if before else ""


def natural_order(path: str) -> list[tuple[bool, int, str]]:
    """A sort key by which block 2 comes before block 10."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in path.split(".")]


# -- GGUF ------------------------------------------------------------------------------------------
# GGUF's names for the modules of a llama-like model; leaves keep their names.

GGUF_MODULES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
GGUF_BLOCK_MODULES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def from_gguf(name: str) -> str:
    """The MLX name of a GGUF tensor: `blk.3.attn_q.weight` is `model.layers.3.self_attn.q_proj.weight`.

    Raises FormatError for a tensor that no llama-like model has.
    """
    path, leaf = split(name)
    block = re.fullmatch(r"blk\.(\d+)\.(\w+)", path)
    if block and block[2] in GGUF_BLOCK_MODULES:
        return join(f"model.layers.{block[1]}.{GGUF_BLOCK_MODULES[block[2]]}", leaf)
    if path in GGUF_MODULES:
        return join(GGUF_MODULES[path], leaf)
    raise FormatError(f"The GGUF file holds a tensor '{name}' that a llama model does not have.", "give a llama's.")


# The tables of the `gguf` package know tensors by the checkpoints' names; where mlx-lm's differ, these are tried.

GGUF_RENAMES = (
    (".switch_mlp.", ".experts."),
    (".block_sparse_moe.experts.", ".mlp.experts."),
    ("correction_bias", "correction.bias"),
    ("dt_bias", "dt_proj.bias"),
    (".embed_q.", ".k_b_proj."),
    (".unembed_out.", ".v_b_proj."),
)


def gguf_spellings(name: str) -> list[str]:
    """How a tensor of mlx-lm's may be spelled in llama.cpp's tables."""
    name = name.removeprefix("language_model.")
    for old, new in GGUF_RENAMES:
        name = name.replace(old, new)
    bare = name.removeprefix("model.")
    return [name, bare, f"transformer.{bare}", f"gpt_neox.{bare}", f"gpt_neox.{bare.replace('h.', 'layers.', 1)}"]
