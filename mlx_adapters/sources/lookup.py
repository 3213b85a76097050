"""From a reference to the folder and the adapter that it means."""

import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_adapters.config.mapping import require, shown
from mlx_adapters.errors import ConfigError, NotFoundError, did_you_mean
from mlx_adapters.events import OnEvent, log, log_warnings
from mlx_adapters.models.metadata import FULL, check_config, losses_of, read_config
from mlx_adapters.sources.demo_base import DEMO_BASE
from mlx_adapters.sources.references import CHECKPOINT, NAME, Reference, below, hub_id, parse_reference
from mlx_adapters.sources.registry import adapter_folder, adapters_folder, names, read_entry
from mlx_adapters.storage import paths
from mlx_adapters.storage.tensor_names import CONFIG_FILE

if TYPE_CHECKING:
    from mlx_adapters.models.adapter import Adapter, AdapterLike
    from mlx_adapters.models.base import Base, BaseLike, Named


def spelled(given: "str | Path | Named") -> str:
    """A reference as text: a folder as a path, a result as what it stands for.

    The one rule for adapters and models: a path that is there wins, with a note where it could be a Hub id. A bare
    name is an adapter's first: `o5` is `./o5` where none is called so. Raises ConfigError for what is no reference.
    """
    if isinstance(given, Path):
        return str(paths.expanded(given))
    text = given if isinstance(given, str) else getattr(given, "reference", None)
    if not isinstance(text, str):
        hint = "give a name, a folder, 'user/repo', or what a function of this package gave."
        raise ConfigError(f"{shown(given)} is no adapter and no model.", hint)
    place, at, iteration = text.rpartition("@") if CHECKPOINT.fullmatch(text) else (text, "", "")
    known = not text or paths.is_path(text) or (NAME.fullmatch(place) and _is_registered(place))
    if known or (kind := _kind_here(place)) is None or (kind == "file" and "/" not in place):
        return text
    _tell_folder(place, kind)
    return f"{paths.expanded(place)}{at}{iteration}"


def reference_of(given: "str | Path | Named") -> Reference:
    """What a reference means, as `spelled` has it. Raises ConfigError."""
    return parse_reference(spelled(given))


def _tell_folder(text: str, kind: str) -> None:
    """Note that a name which could be one on the Hub is taken for the folder that is here."""
    if hub_id(text):
        log.info(f"'{text}' is the {kind} ./{text} here, not a repository of the Hub.")


def _is_registered(name: str) -> bool:
    return os.path.lexists(adapter_folder(name))


def _kind_here(text: str) -> str | None:
    """Whether a "folder" or a "file" of this name is there."""
    try:
        path = Path(text)
        return "folder" if path.is_dir() else "file" if path.exists() else None
    except (OSError, ValueError):
        return None


def plain(given: "AdapterLike") -> "Adapter | str":
    """An adapter, or a reference as text."""
    from mlx_adapters.models.adapter import Adapter

    return given if isinstance(given, Adapter) else spelled(given)


def registered(given: "AdapterLike", what: str | None = None) -> Reference:
    """The name of an adapter in the registry, with the checkpoint that is meant; `what` is done to adapters only.

    Raises ConfigError for one that is not there, and for a checkpoint where `what` is given.
    """
    from mlx_adapters.models.adapter import Adapter, place_of

    if isinstance(given, Adapter) and not place_of(given):
        hint = "write_adapter writes it, and 'mlx-adapters add' takes it in under a name."
        raise ConfigError(f"Adapter '{given.name}' is in memory only.", hint)
    reference = parse_reference(place_of(given) or "") if isinstance(given, Adapter) else reference_of(given)
    folder = paths.expanded(reference.target) if reference.kind == "path" else None
    if folder is not None and paths.same_place(folder.parent, adapters_folder()):
        reference = Reference("name", folder.name, reference.iteration)
    if reference.kind != "name":
        raise ConfigError(f"'{reference}' is not in the registry.", "'mlx-adapters add' takes it in under a name.")
    if what is not None and reference.iteration is not None:
        raise ConfigError(f"'{reference}' is a checkpoint, and {what}.", f"name the adapter: {reference.target}.")
    return reference


def several(given: "AdapterLike | Iterable[AdapterLike]") -> "list[Adapter | str]":
    """`plain` of one or of each of several."""
    from mlx_adapters.models.adapter import AdapterLike

    each = [given] if isinstance(given, AdapterLike) or not isinstance(given, Iterable) else given
    return [plain(one) for one in each]  # type: ignore[arg-type]


def locate(
    reference: "str | Path | Named", base: "BaseLike | None" = None, on_event: OnEvent = log_warnings
) -> tuple[Path, int | None]:
    """(folder, iteration) that a reference means; a Hub reference is downloaded once, and put into our form on `base`.

    Raises NotFoundError that suggests the nearest names.
    """
    ref = reference if isinstance(reference, Reference) else reference_of(reference)
    if ref.kind == "path":
        return (folder := paths.expanded(ref.target)), iteration_of(folder, ref)
    if ref.kind == "hub":
        from mlx_adapters.sources.downloads import adapter_snapshot

        return adapter_snapshot(ref, base=base, on_event=on_event), None
    folder = adapter_folder(ref.target)
    if not folder.is_dir():
        if folder.is_symlink():
            raise NotFoundError(
                f"'{ref.target}' is a link to '{os.readlink(folder)}', which is not there.",
                f"connect the disk that it is on, or remove the link: {folder}",
            )
        if ref.target == DEMO_BASE:
            raise NotFoundError(f"'{DEMO_BASE}' is a model, not an adapter.", "name it as the base: --base.")
        raise NotFoundError(
            f"No adapter named '{ref.target}'.", did_you_mean(ref.target, names(), "'mlx-adapters list' shows all.")
        )
    return folder, iteration_of(folder, ref)


def place_of_full(text: str) -> tuple[Path, Reference] | None:
    """Where a full fine-tune lies, and how it is spelled; None for anything else."""
    try:
        reference = reference_of(text)
    except ConfigError:
        return None
    if reference.kind == "hub":
        return None
    folder = adapter_folder(reference.target) if reference.kind == "name" else paths.expanded(reference.target)
    there = (folder / CONFIG_FILE).is_file() and not (folder / "config.json").is_file()
    return (folder, reference) if there and read_config(folder).get("fine_tune_type") == FULL else None


def refuse_full(given: "str | Path | Named | Base") -> None:
    """Raise FormatError for a full fine-tune, by the name it was given by: only what fuse writes of it can go away."""
    from mlx_adapters.models.base import Base

    if isinstance(given, Base) and given.tuned is None:
        return
    text = given.name if isinstance(given, Base) else spelled(given)
    if (there := place_of_full(text)) is not None:
        check_config(read_config(there[0]), f"'{text}'")


def iteration_of(folder: Path, ref: Reference) -> int | None:
    """The iteration that a reference names, also as "best" or "last". Raises NotFoundError where there is none."""
    if not isinstance(ref.iteration, str):
        return ref.iteration
    entry = read_entry(folder)
    if ref.iteration == "last":
        if not entry.iterations:
            raise NotFoundError(f"'{ref.target}' has no checkpoints.", f"name it without '@{ref.iteration}'.")
        return max(entry.iterations)
    losses = {i: loss for i, loss in losses_of(entry.metadata)[1] if i in entry.iterations}
    if not losses:
        hint = "'@last' is the last one; '@ITERATION' one that 'mlx-adapters show' lists."
        raise NotFoundError(f"'{ref.target}' has no checkpoint with a validation loss.", hint)
    return min(losses, key=losses.__getitem__)


def load_adapter(reference: "AdapterLike") -> "Adapter":
    """Read the adapter that a reference means.

    Args:
        reference: a name, name@iteration, a folder, "user/repo[@revision]", or what stands for one (`run.best`, an
            entry of `list_adapters`, a `TrainRun`); an `Adapter` is checked and given back.

    Warns with a StrengthWarning of one that may have been trained at another strength than it is used at.
    Raises ConfigError, NotFoundError, FormatError or HubError.

    Example:
        >>> ma.load_adapter("sql@200").name
        'sql@200'
    """
    from mlx_adapters.models.adapter import Adapter, StrengthWarning, read_adapter

    if isinstance(reference, Adapter):
        return reference.check()
    parsed = reference_of(reference)
    folder, iteration = locate(parsed)
    # The registry's name is the folder's, whatever the folder was called when its record was written.
    adapter = read_adapter(folder, iteration, name=folder.name if parsed.kind == "name" else None)
    if adapter.strength_note:
        warnings.warn(adapter.strength_note, StrengthWarning, stacklevel=2)
    return adapter


def peft_folder(
    source: "str | Path | Named", subfolder: str | None = None, tokenizer: bool = False
) -> tuple[Path, dict[str, Any]]:
    """The folder of a PEFT adapter, and what to record of the Hub's repository, from which it is downloaded once.

    subfolder: where in `source` it lies. tokenizer: the one beside it, too. Raises NotFoundError, ConfigError or
    HubError.
    """
    text = spelled(source)
    if paths.is_path(text):
        return inside(paths.expanded(text), subfolder), {}
    reference = below(parse_reference(text), subfolder)
    if reference.kind != "hub":
        return inside(Path(text), subfolder), {}
    from mlx_adapters.sources.downloads import adapter_files, origin

    folder, commit = adapter_files(reference, tokenizer=tokenizer)
    return folder, {"hub": origin(reference, commit)}


def inside(folder: Path, subfolder: str | None) -> Path:
    """The subfolder of a folder on this machine. Raises ConfigError for one that is not inside it."""
    if subfolder is None:
        return folder
    require(
        not Path(subfolder).is_absolute() and ".." not in Path(subfolder).parts,
        f"'{subfolder}' is not a folder inside '{folder}'.",
        "--subfolder names one that lies in the folder or repository.",
    )
    if not (folder / subfolder).is_dir():
        there = [path.name for path in paths.visible(folder) if path.is_dir()]
        hint = did_you_mean(subfolder, there, f"there are {', '.join(there[:10])}." if there else "it has no folders.")
        raise NotFoundError(f"'{folder}' has no folder '{subfolder}'.", hint)
    return folder / subfolder
