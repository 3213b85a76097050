"""The start of a project of adapters: a folder to keep under version control."""

import textwrap
from collections.abc import Mapping
from pathlib import Path

from mlx_adapters.config.settings import commented
from mlx_adapters.config.training import LoraConfig, TrainConfig
from mlx_adapters.storage import files, paths, replacing, temporaries

TRAIN_YAML = """\
# mlx-adapters train --config train.yaml        (flags win over this file)
# 'mlx-adapters train --print-config' shows every setting with its default.
base: demo            # demo, a folder, or a Hub id such as mlx-community/Qwen3-0.6B-4bit
data: data            # a folder with train.jsonl and, to know the best checkpoint, valid.jsonl
name: first

lora:
{lora}
training:
{training}"""
LORA = ("rank", "scale", "target_modules", "num_layers")
TRAINING = ("iterations", "batch_size", "learning_rate", "mask_prompt")

FILES: Mapping[str, str] = {
    ".gitattributes": "".join(f"*.{end} filter=lfs diff=lfs merge=lfs -text\n" for end in ("safetensors", "tar.gz")),
    ".gitignore": "# states for resuming a run; the adapters lie beside them\ncheckpoints/\n.mlx-adapters-tmp-*\n",
    "train.yaml": TRAIN_YAML.format(
        lora=textwrap.indent(commented(LoraConfig(), LORA), "  "),
        training=textwrap.indent(commented(TrainConfig(mask_prompt=True), TRAINING), "  "),
    ),
}


def start_project(folder: str | Path, *, overwrite: bool = False) -> tuple[str, ...]:
    """Write a .gitattributes that keeps weights in Git LFS, a .gitignore and a sample config; their names.

    What holds the same text already, as a killed start leaves it, is left alone. Raises ExistsError, before anything
    is written, if one of them is there with another.
    """
    place = paths.expanded(folder)
    lacking = {name: text for name, text in FILES.items() if not _holds(place / name, text)}
    for name in lacking:
        replacing.refuse_existing(place / name, overwrite)
    temporaries.sweep(place)  # also where a kill came after all was written
    for name, text in lacking.items():
        files.write_text(place / name, text)
    return tuple(FILES)


def _holds(path: Path, text: str) -> bool:
    try:
        return path.read_bytes() == text.encode()
    except OSError:
        return False
