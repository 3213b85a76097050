"""An adapter of any MLX program becomes one of ours, from a folder of this machine or of the Hub's cache."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_adapters.config.mapping import require
from mlx_adapters.errors import AdapterError, FormatError, IncompatibleError
from mlx_adapters.events import Note, OnEvent, Progress
from mlx_adapters.models.adapter import Adapter
from mlx_adapters.models.base import BaseLike
from mlx_adapters.models.layers import adaptable_layers, check_fits, nn
from mlx_adapters.models.loading import load_module
from mlx_adapters.peft_format.foreign import fit_paths, read_foreign, text_part, weights_in
from mlx_adapters.sources.bases import resolve_base
from mlx_adapters.sources.registry import checksums_of
from mlx_adapters.storage import files, paths, tensor_files
from mlx_adapters.storage.tensor_names import ADAPTER_FILE, CHECKPOINT_FILE, CONFIG_FILE, EXTRAS, METADATA_FILE

NOT_HELD = "Taken in as it is, without a look at whether it fits:"


def write_own_form(
    source: Path,
    target: Path,
    named: str,
    base: BaseLike | None,
    on_event: OnEvent,
    weights: Path | None = None,
    origin: Mapping[str, Any] | None = None,
    text_only: bool = False,
) -> None:
    """Write the adapter in `source`, and nothing else of it, into `target`: mlx-lm's form, whoever made it.

    weights: the one file to take; None: the adapter's and its checkpoints'. base: what it is held against; None: its
    own, if that is on this machine. origin: what its record is to say of where it comes from. text_only: layers of
    other parts than the text model stay behind. Raises FormatError, NotFoundError, IncompatibleError or StorageError.
    """
    chosen = weights or weights_in(source)
    taken = {ADAPTER_FILE: chosen}
    if weights is None:
        taken |= {path.name: path for path in paths.visible(source) if CHECKPOINT_FILE.fullmatch(path.name)}
    extras = [source / name for name in EXTRAS if (source / name).is_file()]
    for path in (*taken.values(), *extras, source / CONFIG_FILE):
        if path.is_symlink() and not is_cached(path):
            raise FormatError(f"'{path}' is a link.", "put the file itself there.")
    needed = sum(path.stat().st_size for path in (*taken.values(), *extras))
    paths.require_free_space(
        target, needed, f"write the adapter '{named}'", "free some space, or write it elsewhere: --out, --home."
    )
    rewritten = set[str]()
    for done, (name, path) in enumerate(taken.items(), start=1):
        foreign = read_foreign(source, path, named)
        if name == ADAPTER_FILE:  # the first; the checkpoints are of the same base
            layers = _layers_of_base(foreign.adapter, base, on_event)
        adapter, others = _on_its_base(foreign.adapter, layers, base, text_only)
        if name == ADAPTER_FILE:
            first, config = adapter, adapter.spelled(foreign.beside)
            for note in (*foreign.notes, *others):
                on_event(Note(note, "warning"))
        if not foreign.as_is or adapter is not foreign.adapter:
            recorded = checksums_of(adapter.metadata).pop(name, None)
            if recorded and files.sha256(path) != recorded:
                raise FormatError(f"'{path}' is not the file that its record names.", "it may be damaged.")
            rewritten.add(name)
            tensor_files.write_safetensors(target / name, adapter.weights)
        elif path != target / name:
            files.copy_file(path, target / name)
        on_event(Progress("add", done, len(taken), "file"))
    record = first.metadata | dict(origin or {})
    if rewritten and "sha256" in record:
        record["sha256"] = {file: own for file, own in checksums_of(record).items() if file not in rewritten}
    files.write_json(target / METADATA_FILE, record)
    files.write_json(target / CONFIG_FILE, config)
    if source != target:
        for path in extras:
            files.copy_file(path, target / path.name)
        return
    for path in paths.visible(target):
        if path.name not in (*taken, METADATA_FILE, CONFIG_FILE, *EXTRAS):
            files.remove(path)


def is_cached(path: Path) -> bool:
    """Whether a link is one of huggingface_hub's cache: from a snapshot to a file of the same repository."""
    blob = path.resolve()
    return (
        blob.is_file()
        and blob.parent.name == "blobs"
        and path.absolute().is_relative_to(blob.parent.parent / "snapshots")
    )


def _layers_of_base(adapter: Adapter, name: BaseLike | None, on_event: OnEvent) -> Mapping[str, nn.Module]:
    """The layers of the base that is named, or of the adapter's own, where that is on this machine; {} for none, and
    for one that is there and cannot be loaded, which is told."""
    own = name or adapter.base_name
    if own is None:
        return {}
    try:
        base = resolve_base(own, download=name is not None)
    except AdapterError:
        if name is not None:
            raise
        return {}
    try:
        return adaptable_layers(load_module(base)[0])
    except AdapterError as error:
        if name is not None:
            raise
        on_event(Note(f"{NOT_HELD} its base cannot be used: {error.message}", "warning"))
        return {}


def _on_its_base(
    adapter: Adapter, layers: Mapping[str, nn.Module], name: BaseLike | None, text_only: bool
) -> tuple[Adapter, list[str]]:
    """The adapter under the paths of the base's layers, if they are known and it fits; what to tell of what it lost.

    Raises IncompatibleError for one that does not fit the base that is named.
    """
    if not layers:
        require(not text_only, "What is of the text model, only its base tells.", "name it with --base.")
        return adapter, []
    fitting, others = fit_paths(adapter, layers), ""
    if fitting is adapter and (split := text_part(adapter, layers)):
        fitting, others = split
        if not text_only and name is not None:
            raise IncompatibleError(
                f"Adapter '{adapter.name}' also changes {others}, which '{name}' does not have in mlx-lm.",
                "--text-only takes the text part alone.",
            )
        if not text_only:
            return adapter, []
    try:
        check_fits(fitting, layers, f"'{name or adapter.base_name}'")
    except IncompatibleError as error:
        if name is not None:
            raise
        return adapter, [f"It does not fit the base that it names. {error.message} Give it the right one with --base."]
    return fitting, [f"Left out, as no part of the text model: {others}."] if others else []
