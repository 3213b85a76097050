"""Take adapters and models from the Hugging Face Hub, pinned to a commit and kept for offline use."""

import contextlib
import glob
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from mlx_adapters.checkpoints.contents import MODEL_CONFIG
from mlx_adapters.checkpoints.shards import BEST, is_adapter_file, is_peft, weight_names
from mlx_adapters.config.mapping import require
from mlx_adapters.errors import FormatError, HubError, ModelError, NotFoundError
from mlx_adapters.events import OnEvent, log_warnings
from mlx_adapters.models.adapter import Adapter, read_adapter, write_adapter_files
from mlx_adapters.models.base import Base, BaseLike
from mlx_adapters.models.loading import load_module
from mlx_adapters.models.metadata import read_metadata
from mlx_adapters.peft_format.conversion import as_mlx
from mlx_adapters.peft_format.reading import read_peft, refuse_beyond_lora
from mlx_adapters.sources import hub
from mlx_adapters.sources.bases import resolve_base
from mlx_adapters.sources.intake import write_own_form
from mlx_adapters.sources.references import Reference, below, check_name, parse_reference
from mlx_adapters.sources.registry import base_name, register
from mlx_adapters.sources.snapshots import refuse_other_forms
from mlx_adapters.storage import files, locks, paths
from mlx_adapters.storage.tensor_names import ADAPTER_OUTPUT, CONFIG_FILE, METADATA_FILE
from mlx_adapters.system.machine import made_now

# What the names of packed models end in: unsloth/…-unsloth-bnb-4bit, Qwen/…-FP8, …-FP8-dynamic, …-quantized.w4a16
PACKED_NAME = re.compile(
    r"(-unsloth)?(-(bnb|nf4|fp4|fp8|int[48]|gptq|awq|hqq|eetq|quanto|torchao|[48]-?bit|dynamic)"
    r"|-quantized\.w\d+a\d+)+$",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Download:
    """What came from the Hub. `commit` is what the revision meant; a model stays in huggingface_hub's cache."""

    repo: str
    commit: str
    kind: Literal["adapter", "model"]
    folder: Path
    name: str | None = None

    @property
    def reference(self) -> str:
        """How it is spelled where an adapter or a model is asked for."""
        return self.name or str(self.folder)


def download(
    repo: str,
    *,
    name: str | None = None,
    base: BaseLike | None = None,
    subfolder: str | None = None,
    overwrite: bool = False,
    show_progress: bool = False,
    on_event: OnEvent = log_warnings,
) -> Download:
    """Take an adapter (of any MLX program, or PEFT's) from the Hub into the registry, or a model into the cache.

    Args:
        repo: "user/repo[/folder][@revision]".
        name: the adapter's name here; None: the repository's.
        base: the base model that it is for, where its config does not tell, or tells one that cannot be used.
        subfolder: which of a repository's adapters, as in "user/repo/folder".
        overwrite: replace an adapter of this name.
        show_progress: the bars of huggingface_hub.
        on_event: called with notes.

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
    target = reference.target
    try:
        there = find_adapter(below(reference, subfolder), also=MODEL_CONFIG)
    except hub.NotCached as error:
        here = (
            f"the folder ./{target} here is taken in by 'mlx-adapters add {target}'." if Path(target).is_dir() else ""
        )
        raise hub.NotCached(error.message, here or error.hint) from None
    if not there.files:
        require(
            name is None and base is None,
            f"'{target}' is a model: it stays in the cache under its id.",
            "--name and --base are for adapters; use the model by its id, --base user/name.",
        )
        return Download(target, there.commit, "model", resolve_base(f"{target}@{there.commit}", everything=True).folder)
    folder = _converted(there, base, show_progress, on_event)
    adapter = register(read_adapter(folder), name or there.reference.own_name, overwrite)
    assert adapter.folder is not None
    return Download(target, there.commit, "adapter", adapter.folder, adapter.folder.name)


@dataclass(frozen=True)
class FoundAdapter:
    """An adapter in a repository, of which so far only the configs are here.

    `reference` is the one that was asked for, pinned to the commit; `top` is where that lies in the cache, `place` the
    adapter's folder in it ("" for the top), `files` what that holds, with bytes: nothing in a repository without one.
    """

    reference: Reference
    top: Path
    place: str
    files: dict[str, int]

    @property
    def commit(self) -> str:
        """Of the repository."""
        return str(self.reference.revision)

    @property
    def folder(self) -> Path:
        """Where the adapter lies in the cache."""
        return self.top / self.place

    def fetch(self, names: list[str], show_progress: bool = False) -> Path:
        """Download files of the folder, by their names there; return the folder."""
        there = [name for name in names if name in self.files]
        hub.require_room(self.reference.target, sum(self.files[n] for n in there if not (self.folder / n).exists()))
        patterns = [glob.escape((self.folder / name).relative_to(self.top).as_posix()) for name in there]
        hub.snapshot(self.reference.target, self.commit, patterns, show_progress=show_progress)
        return self.folder


def find_adapter(reference: Reference, also: str | None = None) -> FoundAdapter:
    """Look for an adapter in a repository by what it lists; its configs alone are downloaded.

    Where a repository has none at its top, it is the one in a folder of it; of several one must be named. A
    repository without any is refused, unless it holds the file `also`. Raises HubError.
    """
    repo, subfolder = reference.target, reference.subfolder
    at = f"{subfolder}/" if subfolder else ""
    configs = [at + CONFIG_FILE, at + METADATA_FILE, *([also] if also and not subfolder else [])]
    top, commit = hub.snapshot(repo, reference.revision, [glob.escape(name) for name in configs])
    listed = _listed(repo, commit, top)
    places = sorted({name.rpartition("/")[0] for name in listed if is_adapter_file(name.rpartition("/")[2])})
    places = [place for place in places if place.rpartition("/")[2] != BEST or place.rpartition("/")[0] not in places]
    pinned = replace(reference, revision=commit)
    if also in listed and not subfolder and "" not in places:
        return FoundAdapter(pinned, top, "", {})
    if (subfolder or "") in places or (len(places) == 1 and not subfolder):
        place = subfolder or places[0]
        at = f"{place}/" if place else ""
        if not subfolder and place:
            hub.snapshot(repo, commit, [glob.escape(at + name) for name in (CONFIG_FILE, METADATA_FILE)])
        inside = {name.removeprefix(at): size for name, size in listed.items() if name.startswith(at)}
        return FoundAdapter(pinned, top, place, inside)
    if not places:
        refuse_other_forms(repo, listed)
        raise HubError(f"'{repo}' holds no adapter: it has no {CONFIG_FILE}.", "a model is used by its id: --base.")
    wrong = f"has no adapter in '{subfolder}', but in" if subfolder else "holds several adapters:"
    named = [place or "its top" for place in places]
    hint = f"name one: {repo}/{places[-1]}, or {repo} with --subfolder {places[-1]}."
    raise HubError(f"'{repo}' {wrong} {', '.join(named[:10])}{', …' if len(places) > 10 else ''}.", hint)


def _listed(repo: str, commit: str, top: Path) -> dict[str, int]:
    """The files of a commit and their bytes; where nobody tells, those in the cache."""
    try:
        return hub.tree(repo, commit)
    except HubError:
        there = [path for path in paths.visible(top, "**/*") if path.is_file()]
        return {path.relative_to(top).as_posix(): path.stat().st_size for path in there}


def adapter_files(reference: Reference, *, tokenizer: bool = False) -> tuple[Path, str]:
    """Download the files of a Hub adapter as they are, its tokenizer too if asked: (their folder, commit).

    Raises HubError, or FormatError for weights in a form that is not opened.
    """
    there = find_adapter(reference)
    return there.fetch(weight_names(there.files, str(there.reference), tokenizer)), there.commit


def origin(reference: Reference, commit: str) -> dict[str, str]:
    """What an adapter's metadata says of where on the Hub it comes from."""
    place = {"repo": reference.target, "revision": commit}
    return place | ({"subfolder": reference.subfolder} if reference.subfolder else {})


def adapter_snapshot(reference: Reference, *, base: BaseLike | None = None, on_event: OnEvent = log_warnings) -> Path:
    """The folder of a Hub adapter, downloaded and in our form, once per commit.

    Its metadata names repository and commit. `base` is what it is held against or, in PEFT's form, converted for
    (default: what its config names). Works offline from the cache. Raises HubError, FormatError or IncompatibleError.
    """
    return _converted(find_adapter(reference), base, False, on_event)


def _converted(there: FoundAdapter, base: BaseLike | None, show_progress: bool, on_event: OnEvent) -> Path:
    reference, repo = there.reference, there.reference.target
    asked = replace(reference, revision=None)
    special = [str(part) for part in (base and base_name(base), reference.subfolder) if part]
    key = f"{there.commit}-{hashlib.sha256(chr(0).join(special).encode()).hexdigest()[:8]}" if special else there.commit
    folder = paths.home() / "hub" / repo.replace("/", "--") / key
    if folder.is_dir():
        return folder
    with paths.named(there.folder, str(asked)):
        names = weight_names(there.files, str(asked))
        raw = files.read_json(there.folder / CONFIG_FILE) if CONFIG_FILE in there.files else {}
        peft = is_peft(raw)
        model = None if not peft else _base_of_peft(asked, raw) if base is None else resolve_base(base)
        downloaded = there.fetch(names, show_progress)
        pinned = {"hub": origin(reference, there.commit)}
        with (
            locks.lock(f"hub-{repo.replace('/', '--')}"),
            files.atomic_folder(folder, True, ADAPTER_OUTPUT) as temporary,
        ):
            if model is not None:
                write_adapter_files(_read_peft(asked, downloaded, model, pinned, on_event), temporary)
            else:
                with paths.named(temporary, str(asked)):
                    recorded = read_metadata(downloaded) if METADATA_FILE in there.files else {}
                    named = recorded.get("name") or reference.own_name
                    write_own_form(downloaded, temporary, named, base, on_event, origin=pinned)
    return folder


def _read_peft(reference: Reference, folder: Path, model: Base, pinned: dict[str, Any], on_event: OnEvent) -> Adapter:
    peft = read_peft(folder)
    refuse_beyond_lora(peft)
    adapter = as_mlx(peft, model, str(reference), on_event=on_event)
    # Converted once for whatever command came first, which says nothing of how it was made.
    made = {key: value for key, value in made_now().items() if key != "command"}
    return replace(adapter, metadata=adapter.metadata | made | {"name": reference.own_name} | pinned)


def _base_of_peft(reference: Reference, raw: dict[str, Any]) -> Base:
    """The base that a PEFT adapter names. Raises HubError that asks for one where it is none for MLX."""
    named = raw.get("base_model_name_or_path")
    if not isinstance(named, str) or named in ("", "None") or (paths.is_path(named) and not Path(named).exists()):
        message = f"'{reference}' is a PEFT adapter that does not name its base model on the Hub."
        raise HubError(message, f"say which one: {_with_base(reference)}")
    with _asking_for_another(reference, named):
        base = resolve_base(named)
        load_module(base)
        return base


def _with_base(reference: Reference) -> str:
    return f"mlx-adapters download {reference} --base BASE --name NAME"


@contextlib.contextmanager
def _asking_for_another(reference: Reference, named: str) -> Iterator[None]:
    """Turn what keeps the base that a PEFT adapter names from being used into a HubError that asks for one."""
    try:
        yield
    except (FormatError, HubError, ModelError, NotFoundError) as error:
        plain = PACKED_NAME.sub("", named)
        proposed = f" Unquantized it may be '{plain}'." if plain != named else ""
        message = f"'{reference}' was trained on '{named}', which cannot be used here. {error.message}"
        raise HubError(message, f"say which base to take: {_with_base(reference)}.{proposed}") from error
