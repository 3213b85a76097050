"""A tiny Llama with random weights and a tokenizer of single bytes, made here: the self-tests need no network."""

import math
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from mlx_adapters.storage import files, tensor_files
from mlx_adapters.storage.hf_names import TOKENIZER_CONFIG
from mlx_adapters.system.door import mx

WIDTH, BLOCKS, HEADS, KV_HEADS, MIDDLE = 128, 2, 4, 2, 256
SPECIAL = ("<s>", "</s>")
ROW = {"prompt": "List all students.", "completion": "SELECT name FROM students;"}


def make_base(folder: Path) -> Path:
    """Write the model into a new `folder`: float32, two blocks of width 128, every matrix fit for groups of 64."""
    vocabulary = byte_vocabulary()
    rng = np.random.default_rng(0)
    tensors = {}
    for name, shape in shapes(len(vocabulary)).items():
        noise = rng.standard_normal(shape).astype(np.float32)
        tensors[name] = mx.array(noise / math.sqrt(shape[-1]) if len(shape) > 1 else 1 + 0.1 * noise)
    config = {
        "model_type": "llama",
        "hidden_size": WIDTH,
        "num_hidden_layers": BLOCKS,
        "intermediate_size": MIDDLE,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "vocab_size": len(vocabulary),
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    tensor_files.write_safetensors(folder / "model.safetensors", tensors)
    files.write_json(folder / "config.json", config)
    write_tokenizer(folder, vocabulary)
    return folder


def shapes(vocabulary: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Llama's tensors, as mlx-lm reads them."""
    narrow = WIDTH * KV_HEADS // HEADS
    sizes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocabulary, WIDTH),
        "model.norm.weight": (WIDTH,),
    }
    for block in (f"model.layers.{i}" for i in range(BLOCKS)):
        sizes |= {f"{block}.self_attn.{name}_proj.weight": (WIDTH, WIDTH) for name in "qo"}
        sizes |= {f"{block}.self_attn.{name}_proj.weight": (narrow, WIDTH) for name in "kv"}
        sizes |= {f"{block}.mlp.{name}_proj.weight": (MIDDLE, WIDTH) for name in ("gate", "up")}
        sizes |= {f"{block}.mlp.down_proj.weight": (WIDTH, MIDDLE)}
        sizes |= {f"{block}.{name}_layernorm.weight": (WIDTH,) for name in ("input", "post_attention")}
    return sizes


def byte_vocabulary() -> dict[str, int]:
    """Two special tokens and one token for each byte, padded to a multiple of 64."""
    names = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    names += [f"<unused{i}>" for i in range(-len(names) % 64)]
    return {name: i for i, name in enumerate(names)}


def write_tokenizer(folder: Path, vocabulary: dict[str, int]) -> None:
    """Write tokenizer.json and tokenizer_config.json."""
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    files.write_text(folder / "tokenizer.json", tokenizer.to_str())
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL[0],
        "eos_token": SPECIAL[1],
        "pad_token": SPECIAL[1],
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
        "chat_template": "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}",
    }
    files.write_json(folder / TOKENIZER_CONFIG, settings)


def write_data(folder: Path, rows: int = 8) -> Path:
    """Write train.jsonl and valid.jsonl."""
    lines = [files.json_text({**ROW, "prompt": f"{ROW['prompt']} {i}"}, "row").replace("\n", "") for i in range(rows)]
    for name in ("train", "valid"):
        files.write_text(folder / f"{name}.jsonl", "\n".join(lines) + "\n")
    return folder
