"""Take adapters and models from the Hugging Face Hub, pinned to a commit and kept for offline use."""

import hashlib
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from mlx_adapters.checkpoints.contents import MODEL_CONFIG
from mlx_adapters.config.mapping import require
from mlx_adapters.errors import AdapterError, HubError
from mlx_adapters.models.adapter import Adapter, read_adapter, write_adapter_files
from mlx_adapters.models.base import Base
from mlx_adapters.models.metadata import read_config, read_metadata
from mlx_adapters.peft_format.conversion import as_mlx
from mlx_adapters.peft_format.reading import read_peft, refuse_beyond_lora
from mlx_adapters.sources.bases import resolve_base
from mlx_adapters.sources.hub import snapshot, tree
from mlx_adapters.sources.references import Reference, below, check_name, parse_reference
from mlx_adapters.sources.registry import register
from mlx_adapters.sources.snapshots import refuse_other_forms
from mlx_adapters.storage import files, locks, paths
from mlx_adapters.storage.hf_names import PEFT_PICKLE_FILE, PEFT_WEIGHTS_FILE
from mlx_adapters.storage.tensor_names import ADAPTER_FILE, ADAPTER_OUTPUT, CONFIG_FILE, METADATA_FILE
from mlx_adapters.system.machine import made_now

# What the names of packed models end in: unsloth/…-unsloth-bnb-4bit, Qwen/…-FP8, …-FP8-dynamic, …-quantized.w4a16
PACKED_NAME = re.compile(
    r"(-unsloth)?(-(bnb|nf4|fp4|fp8|int[48]|gptq|awq|hqq|eetq|quanto|torchao|[48]-?bit|dynamic)"
    r"|-quantized\.w\d+a\d+)+$",
    re.IGNORECASE,
)
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
    subfolder: str | None = None,
    overwrite: bool = False,
    show_progress: bool = False,
) -> Download:
    """Take an adapter (mlx-lm's or PEFT's form) from the Hub into the registry, or a model into the cache.

    Args:
        repo: "user/repo[/folder][@revision]".
        name: the adapter's name here; None: the repository's.
        base: the base model a PEFT adapter is for, where its config does not tell.
        subfolder: which of a repository's adapters, as in "user/repo/folder".
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
    reference = below(reference, subfolder)
    target, show = reference.target, show_progress
    downloaded, commit = snapshot(target, reference.revision, [*ADAPTER_FILES, MODEL_CONFIG], show_progress=show)
    if not (reference.subfolder or _has_adapter(downloaded)) and (downloaded / MODEL_CONFIG).is_file():
        require(
            name is None and base is None,
            f"'{target}' is a model: it stays in the cache under its id.",
            "--name and --base are for adapters; use the model by its id, --base user/name.",
        )
        return Download(target, commit, "model", resolve_base(f"{target}@{commit}", everything=True).folder)
    folder = adapter_snapshot(replace(reference, revision=commit), base=base)
    adapter = register(read_adapter(folder), name or reference.own_name, overwrite)
    assert adapter.folder is not None
    return Download(target, commit, "adapter", adapter.folder, adapter.folder.name)


def _has_adapter(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (CONFIG_FILE, ADAPTER_FILE, PEFT_WEIGHTS_FILE))


def adapter_files(reference: Reference) -> tuple[Path, str]:
    """Download the files of a Hub adapter as they are: (their folder, commit).

    Where a repository has none at its top, it is the one in a folder of it; of several one must be named.
    Raises HubError.
    """
    repo, subfolder = reference.target, reference.subfolder
    patterns = [f"{subfolder}/{name}" for name in ADAPTER_FILES] if subfolder else ADAPTER_FILES
    downloaded, commit = snapshot(repo, reference.revision, patterns)
    if _has_adapter(downloaded / (subfolder or "")):
        return downloaded / (subfolder or ""), commit
    snapshot(repo, commit, [f"*/{CONFIG_FILE}"])  # in folders of any depth
    inner = [path.parent.relative_to(downloaded).as_posix() for path in paths.visible(downloaded, f"**/{CONFIG_FILE}")]
    if len(inner) == 1 and not subfolder:
        return adapter_files(replace(reference, revision=commit, subfolder=inner[0]))
    if not inner:
        refuse_other_forms(repo, tree(repo, commit))
        raise HubError(f"'{repo}' holds no adapter: it has no {CONFIG_FILE}.", "a model is used by its id: --base.")
    wrong = f"has no adapter in '{subfolder}', but in" if subfolder else "holds several adapters:"
    hint = f"name one: {repo}/{inner[-1]}, or {repo} with --subfolder {inner[-1]}."
    raise HubError(f"'{repo}' {wrong} {', '.join(inner[:10])}{', …' if len(inner) > 10 else ''}.", hint)


def origin(reference: Reference, commit: str) -> dict[str, str]:
    """What an adapter's metadata says of where on the Hub it comes from."""
    place = {"repo": reference.target, "revision": commit}
    return place | ({"subfolder": reference.subfolder} if reference.subfolder else {})


def adapter_snapshot(reference: Reference, *, base: str | Path | None = None) -> Path:
    """The folder of a Hub adapter, downloaded (and, in PEFT's form, converted) once per commit.

    Its metadata names repository and commit. `base` is what a PEFT adapter is converted for (default: what its
    config names). Works offline from the cache. Raises HubError, FormatError or IncompatibleError.
    """
    repo, asked = reference.target, replace(reference, revision=None)
    downloaded, commit = adapter_files(reference)
    special = [str(part) for part in (base, reference.subfolder) if part is not None]
    key = f"{commit}-{hashlib.sha256(chr(0).join(special).encode()).hexdigest()[:8]}" if special else commit
    folder = paths.home() / "hub" / repo.replace("/", "--") / key
    if folder.is_dir():
        return folder
    pinned = {"hub": origin(reference, commit)}
    with locks.lock(f"hub-{repo.replace('/', '--')}"), files.atomic_folder(folder, True, ADAPTER_OUTPUT) as temporary:
        raw = files.read_json(_there(downloaded / CONFIG_FILE))
        if "peft_type" in raw:
            write_adapter_files(_read_peft(asked, downloaded, raw, base, pinned), temporary)
        else:
            for name in (ADAPTER_FILE, CONFIG_FILE):
                files.link_or_copy(_there(downloaded / name), temporary / name)
            named = {} if (downloaded / METADATA_FILE).is_file() else {"name": reference.own_name}
            files.write_json(temporary / METADATA_FILE, read_metadata(downloaded) | named | pinned)
            with paths.named(temporary, str(asked)):
                config = read_adapter(temporary).config
            files.write_json(temporary / CONFIG_FILE, config.to_mlx_lm(read_config(temporary)))
    return folder


def _there(path: Path) -> Path:
    """The file itself, behind the links of the cache. Raises HubError if the repository has no such file."""
    if not path.is_file():
        raise HubError(f"The repository has no {path.name}, so it is no whole adapter.")
    return path.resolve()


def _read_peft(
    reference: Reference, folder: Path, raw: dict[str, Any], base: str | Path | None, pinned: dict[str, Any]
) -> Adapter:
    model = _base_of_peft(reference, raw) if base is None else resolve_base(base)
    peft = read_peft(folder)
    refuse_beyond_lora(peft)
    adapter = as_mlx(peft, model, str(reference))
    # Converted once for whatever command came first, which says nothing of how it was made.
    made = {key: value for key, value in made_now().items() if key != "command"}
    return replace(adapter, metadata=adapter.metadata | made | {"name": reference.own_name} | pinned)


def _base_of_peft(reference: Reference, raw: dict[str, Any]) -> Base:
    """The base that a PEFT adapter names. Raises HubError that asks for one where it is none for MLX."""
    named = raw.get("base_model_name_or_path")
    ask = f"mlx-adapters download {reference} --base BASE --name NAME"
    if named in (None, "", "None") or (paths.is_path(str(named)) and not Path(named).exists()):
        message = f"'{reference}' is a PEFT adapter that does not name its base model on the Hub."
        raise HubError(message, f"say which one: {ask}")
    try:
        return resolve_base(named)
    except AdapterError as error:
        plain = PACKED_NAME.sub("", named)
        proposed = f" Unquantized it may be '{plain}'." if plain != named else ""
        message = f"'{reference}' was trained on '{named}', which cannot be used here. {error.message}"
        raise HubError(message, f"say which base to take: {ask}.{proposed}") from error
