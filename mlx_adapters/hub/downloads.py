"""Take adapters and models from the Hugging Face Hub, pinned to a commit and kept for offline use."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mlx_adapters import files
from mlx_adapters.adapter import read_adapter, read_metadata
from mlx_adapters.config import require
from mlx_adapters.errors import HubError
from mlx_adapters.hub.client import snapshot
from mlx_adapters.model import resolve_base
from mlx_adapters.registry import parse_reference, register
from mlx_adapters.tensor_names import ADAPTER_FILE, CONFIG_FILE, METADATA_FILE

ADAPTER_FILES = [ADAPTER_FILE, CONFIG_FILE, METADATA_FILE, "adapter_model.safetensors", "adapter_model.bin"]


@dataclass(frozen=True)
class Download:
    """What came from the Hub. `commit` is what the revision meant; a model stays in huggingface_hub's cache."""

    repo: str
    commit: str
    kind: Literal["adapter", "model"]
    folder: Path
    name: str | None = None


def download(
    repo: str, *, name: str | None = None, base: str | Path | None = None, overwrite: bool = False,
    show_progress: bool = False,
) -> Download:  # fmt: skip
    """Take "user/repo" or "user/repo@revision" from the Hub: an adapter (mlx-lm's or PEFT's form) into the
    registry as `name` (default: the repository's), a model into the cache.

    base: the base model a PEFT adapter is for, where its config does not tell. Raises ConfigError, HubError,
    FormatError, IncompatibleError or ExistsError.
    """
    reference = parse_reference(repo)
    require(reference.kind == "hub", f"'{repo}' is no repository: it is 'user/name' or 'user/name@revision'.")
    found, commit = snapshot(
        reference.target, reference.revision, [*ADAPTER_FILES, "config.json"], show_progress=show_progress
    )
    if not (found / CONFIG_FILE).is_file() and (found / "config.json").is_file():
        return Download(reference.target, commit, "model", resolve_base(f"{reference.target}@{commit}").folder)
    folder = adapter_snapshot(reference.target, commit, base=base)
    adapter = register(read_adapter(folder), name or reference.target.partition("/")[2], overwrite)
    assert adapter.folder is not None
    return Download(reference.target, commit, "adapter", adapter.folder, adapter.folder.name)


def adapter_snapshot(repo: str, revision: str | None = None, *, base: str | Path | None = None) -> Path:
    """The folder of a Hub adapter, downloaded (and, in PEFT's form, converted) once per commit.

    Its metadata names repository and commit. Works offline from the cache. Raises HubError or FormatError.
    """
    found, commit = snapshot(repo, revision, ADAPTER_FILES)
    folder = files.home() / "hub" / repo.replace("/", "--") / commit
    if folder.is_dir():
        return folder
    if not (found / CONFIG_FILE).is_file():
        raise HubError(f"'{repo}' holds no adapter: it has no {CONFIG_FILE}.", "a model is used by its id, as --base.")
    pinned = {"hub": {"repo": repo, "revision": commit}}
    with files.lock(f"hub-{repo.replace('/', '--')}"), files.atomic_folder(folder, overwrite=True) as temporary:
        if "peft_type" in files.read_json(found / CONFIG_FILE):
            _convert_peft(found, temporary, base, pinned)
        else:
            for name in (ADAPTER_FILE, CONFIG_FILE):
                files.link_or_copy((found / name).resolve(), temporary / name)
            named = {} if (found / METADATA_FILE).is_file() else {"name": repo.partition("/")[2]}
            files.write_json(temporary / METADATA_FILE, read_metadata(found) | named | pinned)
            read_adapter(temporary)
    return folder


def _convert_peft(found: Path, folder: Path, base: str | Path | None, pinned: dict[str, Any]) -> None:
    raise HubError("PEFT adapters cannot be taken from the Hub yet.")
