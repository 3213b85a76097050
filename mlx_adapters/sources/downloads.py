"""Take adapters and models from the Hugging Face Hub, pinned to a commit and kept for offline use."""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from mlx_adapters.config.mapping import require
from mlx_adapters.errors import HubError
from mlx_adapters.models.adapter import Adapter, read_adapter, write_adapter_files
from mlx_adapters.models.metadata import read_metadata
from mlx_adapters.peft_format.conversion import as_mlx
from mlx_adapters.peft_format.reading import read_peft, refuse_beyond_lora
from mlx_adapters.sources.bases import resolve_base
from mlx_adapters.sources.hub import snapshot
from mlx_adapters.sources.references import check_name, parse_reference
from mlx_adapters.sources.registry import register
from mlx_adapters.storage import files, locks, paths
from mlx_adapters.storage.hf_names import PEFT_PICKLE_FILE, PEFT_WEIGHTS_FILE
from mlx_adapters.storage.tensor_names import ADAPTER_FILE, ADAPTER_OUTPUT, CONFIG_FILE, METADATA_FILE
from mlx_adapters.system.machine import made_now

ADAPTER_FILES = [ADAPTER_FILE, CONFIG_FILE, METADATA_FILE, PEFT_WEIGHTS_FILE, PEFT_PICKLE_FILE]


@dataclass(frozen=True)
class Download:
    """What came from the Hub. `commit` is what the revision meant; a model stays in huggingface_hub's cache."""

    repo: str
    commit: str
    kind: Literal["adapter", "model"]
    folder: Path
    name: str | None = None


def download(
    repo: str,
    *,
    name: str | None = None,
    base: str | Path | None = None,
    overwrite: bool = False,
    show_progress: bool = False,
) -> Download:
    """Take an adapter (mlx-lm's or PEFT's form) from the Hub into the registry, or a model into the cache.

    Args:
        repo: "user/repo" or "user/repo@revision".
        name: the adapter's name here; None: the repository's.
        base: the base model a PEFT adapter is for, where its config does not tell.
        overwrite: replace an adapter of this name.
        show_progress: the bars of huggingface_hub.

    Raises ConfigError, HubError, FormatError, IncompatibleError or ExistsError.

    Example:
        >>> publication = ma.publish("sql", "user/sql-lora")
        >>> ma.download("user/sql-lora", name="sql-again").name
        'sql-again'
    """
    reference = parse_reference(repo)
    if name is not None:
        check_name(name)
    require(reference.kind == "hub", f"'{repo}' is no repository: it is 'user/name' or 'user/name@revision'.")
    downloaded, commit = snapshot(
        reference.target, reference.revision, [*ADAPTER_FILES, "config.json"], show_progress=show_progress
    )
    if not (downloaded / CONFIG_FILE).is_file() and (downloaded / "config.json").is_file():
        require(
            name is None and base is None,
            f"'{reference.target}' is a model: it stays in the cache under its id.",
            "--name and --base are for adapters; use the model by its id, --base user/name.",
        )
        return Download(reference.target, commit, "model", resolve_base(f"{reference.target}@{commit}").folder)
    folder = adapter_snapshot(reference.target, commit, base=base)
    adapter = register(read_adapter(folder), name or reference.target.partition("/")[2], overwrite)
    assert adapter.folder is not None
    return Download(reference.target, commit, "adapter", adapter.folder, adapter.folder.name)


def adapter_files(repo: str, revision: str | None = None) -> tuple[Path, str]:
    """Download the files of a Hub adapter as they are: (folder, commit). PEFT's may lie in a subfolder.

    Raises HubError.
    """
    downloaded, commit = snapshot(repo, revision, ADAPTER_FILES)
    if not (downloaded / CONFIG_FILE).is_file():
        snapshot(repo, commit, [f"*/{name}" for name in ADAPTER_FILES])
        if not paths.visible(downloaded, f"*/{CONFIG_FILE}"):
            raise HubError(f"'{repo}' holds no adapter: it has no {CONFIG_FILE}.", "a model is used by its id: --base.")
    return downloaded, commit


def adapter_snapshot(repo: str, revision: str | None = None, *, base: str | Path | None = None) -> Path:
    """The folder of a Hub adapter, downloaded (and, in PEFT's form, converted) once per commit.

    Its metadata names repository and commit. `base` is what a PEFT adapter is converted for (default: what its
    config names). Works offline from the cache. Raises HubError, FormatError or IncompatibleError.
    """
    downloaded, commit = adapter_files(repo, revision)
    key = commit if base is None else f"{commit}-{hashlib.sha256(str(base).encode()).hexdigest()[:8]}"
    folder = paths.home() / "hub" / repo.replace("/", "--") / key
    if folder.is_dir():
        return folder
    pinned = {"hub": {"repo": repo, "revision": commit}}
    with locks.lock(f"hub-{repo.replace('/', '--')}"), files.atomic_folder(folder, True, ADAPTER_OUTPUT) as temporary:
        raw = files.read_json(downloaded / CONFIG_FILE) if (downloaded / CONFIG_FILE).is_file() else {"peft_type": None}
        if "peft_type" in raw:
            write_adapter_files(_read_peft(repo, downloaded, raw, base, pinned), temporary)
        else:
            for name in (ADAPTER_FILE, CONFIG_FILE):
                files.link_or_copy(_there(downloaded / name), temporary / name)
            named = {} if (downloaded / METADATA_FILE).is_file() else {"name": repo.partition("/")[2]}
            files.write_json(temporary / METADATA_FILE, read_metadata(downloaded) | named | pinned)
            read_adapter(temporary)
    return folder


def _there(path: Path) -> Path:
    """The file itself, behind the links of the cache. Raises HubError if the repository has no such file."""
    if not path.is_file():
        raise HubError(f"The repository has no {path.name}, so it is no whole adapter.")
    return path.resolve()


def _read_peft(
    repo: str, folder: Path, raw: dict[str, Any], base: str | Path | None, pinned: dict[str, Any]
) -> Adapter:
    base = base or raw.get("base_model_name_or_path")
    if not base or (isinstance(base, str) and paths.is_path(base) and not Path(base).exists()):
        raise HubError(
            f"'{repo}' is a PEFT adapter that does not name its base model on the Hub.",
            f"say which one: mlx-adapters download {repo} --base BASE --name NAME",
        )
    peft = read_peft(folder)
    refuse_beyond_lora(peft)
    adapter = as_mlx(peft, resolve_base(base), repo)
    # Converted once for whatever command came first, which says nothing of how it was made.
    made = {key: value for key, value in made_now().items() if key != "command"}
    return replace(adapter, metadata=adapter.metadata | made | {"name": repo.partition("/")[2]} | pinned)
