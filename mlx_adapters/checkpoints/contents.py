"""Which files of a model's folder belong to the model, and why the others do not.

The rule goes by exclusion: what is not named here comes along, so that what nobody has thought of does too (chat
templates in a folder of their own, a licence without an ending, a tokenizer in a new format, code). Files are named by
their paths in the folder, with slashes.
"""

import os
import re
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

from mlx_adapters.models.base import INDEX_FILE, OTHER_FILE, WEIGHT_FILES
from mlx_adapters.storage.hf_names import TEMPLATE_FOLDER
from mlx_adapters.storage.paths import is_litter
from mlx_adapters.storage.tensor_names import CONFIG_FILE, FUSE_RECIPE_FILE, METADATA_FILE, REPORT_FILE

MODEL_CONFIG = "config.json"
WEIGHTS = re.compile(
    r".*\.(safetensors|bin|pt|pth|pkl|pickle|joblib|ckpt|h5|msgpack|onnx(_data)?|npz|npy|gguf|ggml|tflite|mlmodel|ot"
    r"|pdparams|nemo|llamafile|engine)",
    re.IGNORECASE,
)
STATES = re.compile(r"(optimizer|scheduler|rng_state|trainer_state|training_args)\b.*|.*\.log|events\.out\.tfevents.*")
DATA = re.compile(r".*\.(jsonl|ndjson|parquet|csv|tsv|arrow|sqlite\d?|db)", re.IGNORECASE)
ARCHIVES = re.compile(r".*\.(zip|tar|gz|tgz|bz2|xz|7z|zst)", re.IGNORECASE)
VOCABULARIES = ("tokenizer.json*", "*.model", "*.model.v*", "*vocab*", "*.tiktoken", "tekken*.json")
TOKENIZER = (
    "tokenizer*",
    "chat_template*",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    *VOCABULARIES,
)
# What is made anew for each model, or says how other weights are packed.
MADE_ANEW = ("README.md", "loss.svg", FUSE_RECIPE_FILE, REPORT_FILE, CONFIG_FILE, METADATA_FILE, "*quant*_config.json")


def why_not(name: str) -> str | None:
    """Why a file is no companion of a model's weights; None if it is one."""
    file = name.rpartition("/")[2]
    if any(part.startswith((".", "__pycache__")) or is_litter(part) for part in name.split("/")):
        return "hidden"
    if STATES.fullmatch(file):
        return "the log or state of a training"
    if WEIGHTS.fullmatch(file) or file.endswith(".index.json"):
        return "weights that mlx-lm does not load"
    if DATA.fullmatch(file) and not file.startswith("tokenizer"):  # PLaMo's is tokenizer.jsonl
        return "data"
    if ARCHIVES.fullmatch(file):
        return "an archive"
    if any(fnmatch(name, pattern) for pattern in MADE_ANEW):
        return "made anew for each model"
    return None


def sorted_out(names: Iterable[str]) -> dict[str, str | None]:
    """Each file of a folder and why it is no companion of the model there (see `why_not`).

    A folder in it that holds weights is another model, or another form of this one, with all that is in it.
    """
    names = sorted(names)
    others = {name.partition("/")[0] for name in names if "/" in name and WEIGHTS.fullmatch(name)}
    return {n: "of another model" if n.partition("/")[0] in others and "/" in n else why_not(n) for n in names}


def files_below(folder: Path) -> list[str]:
    """The regular files below a folder, links followed, without what is hidden."""
    files, seen = list[str](), set[str]()
    for place, folders, names in os.walk(folder, followlinks=True):
        seen.add(os.path.realpath(place))
        folders[:] = [
            name
            for name in folders
            if not name.startswith(".") and os.path.realpath(os.path.join(place, name)) not in seen
        ]
        inner = Path(place).relative_to(folder)
        files += [(inner / name).as_posix() for name in names if Path(place, name).is_file()]
    return sorted(name for name in files if why_not(name) != "hidden")


def companions(folder: Path) -> list[str]:
    """What goes along with the weights of the model in `folder`, but for its config."""
    return [name for name, why in sorted_out(files_below(folder)).items() if why is None and name != MODEL_CONFIG]


def belongs(names: Iterable[str]) -> list[str]:
    """All files of a model: its weights for mlx-lm with their index, its config and their companions."""
    chosen = sorted_out(names)
    return [name for name, why in chosen.items() if why is None or is_loaded(name) or name in (OTHER_FILE, INDEX_FILE)]


def is_loaded(name: str) -> bool:
    """Whether mlx-lm opens the file as weights."""
    return "/" not in name and fnmatch(name, WEIGHT_FILES)


def is_tokenizer(name: str) -> bool:
    """Whether the file holds the vocabulary of a tokenizer, in one of the forms that there are."""
    return "/" not in name and any(fnmatch(name, pattern) for pattern in VOCABULARIES)


def is_of_tokenizer(name: str) -> bool:
    """Whether the file says how text becomes tokens: a vocabulary, or what goes with one."""
    folder, _, file = name.rpartition("/")
    return folder == TEMPLATE_FOLDER or (not folder and any(fnmatch(file, pattern) for pattern in TOKENIZER))


def tokenizer_files(folder: Path) -> list[str]:
    """The files of the tokenizer in a folder, such as a trainer saves beside an adapter; none without a vocabulary."""
    own = [name for name in companions(folder) if is_of_tokenizer(name)]
    return own if any(map(is_tokenizer, own)) else []
