"""From a reference to the folder and the adapter that it means."""

import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_adapters.config.mapping import require
from mlx_adapters.errors import HubError, NotFoundError, did_you_mean
from mlx_adapters.events import OnEvent, log_warnings
from mlx_adapters.sources.hub import NotCached
from mlx_adapters.sources.references import Reference, below, parse_reference
from mlx_adapters.sources.registry import adapter_folder, names
from mlx_adapters.storage import paths

if TYPE_CHECKING:
    from mlx_adapters.models.adapter import Adapter
    from mlx_adapters.models.base import Base


def locate(
    reference: str | Reference, base: "str | Path | Base | None" = None, on_event: OnEvent = log_warnings
) -> tuple[Path, int | None]:
    """(folder, iteration) that a reference means; a Hub reference is downloaded once, and put into our form on `base`.

    Raises NotFoundError that suggests the nearest names.
    """
    ref = parse_reference(reference) if isinstance(reference, str) else reference
    if ref.kind == "path":
        return paths.expanded(ref.target), ref.iteration
    if ref.kind == "hub":
        from mlx_adapters.sources.downloads import adapter_snapshot

        try:
            return adapter_snapshot(ref, base=base, on_event=on_event), None
        except HubError as error:
            if not Path(str(ref)).is_dir():
                if ref.subfolder and isinstance(error, NotCached):
                    raise NotCached(error.message, f"{error.hint} A folder of this machine is './{ref}'.") from None
                raise
            raise HubError(error.message, f"the folder is './{ref}'; 'user/repo' means the Hub.") from None
    folder = adapter_folder(ref.target)
    if not folder.is_dir():
        if folder.is_symlink():
            raise NotFoundError(
                f"'{ref.target}' is a link to '{os.readlink(folder)}', which is not there.",
                f"connect the disk that it is on, or remove the link: {folder}",
            )
        hint = did_you_mean(ref.target, names(), "'mlx-adapters list' shows all.")
        if Path(ref.target).is_dir():
            hint = f"the folder is './{ref.target}': a path has a slash."
        raise NotFoundError(f"No adapter named '{ref.target}'.", hint)
    return folder, ref.iteration


def load_adapter(reference: "str | Path | Adapter") -> "Adapter":
    """Read the adapter that a reference means.

    Args:
        reference: a name, name@iteration, a folder, "user/repo[@revision]"; an `Adapter` is checked and given back.

    Warns with a StrengthWarning of one that may have been trained at another strength than it is used at.
    Raises NotFoundError, FormatError or HubError.

    Example:
        >>> ma.load_adapter("sql@200").name
        'sql@200'
    """
    from mlx_adapters.models.adapter import Adapter, StrengthWarning, read_adapter

    if isinstance(reference, Adapter):
        return reference.check()
    if isinstance(reference, Path):
        adapter = read_adapter(reference)
    else:
        parsed = parse_reference(reference)
        folder, iteration = locate(parsed)
        # The registry's name is the folder's, whatever the folder was called when its record was written.
        adapter = read_adapter(folder, iteration, name=folder.name if parsed.kind == "name" else None)
    if adapter.strength_note:
        warnings.warn(adapter.strength_note, StrengthWarning, stacklevel=2)
    return adapter


def peft_folder(
    source: str | Path, subfolder: str | None = None, tokenizer: bool = False
) -> tuple[Path, dict[str, Any]]:
    """The folder of a PEFT adapter, and what to record of the Hub's repository, from which it is downloaded once.

    subfolder: where in `source` it lies. tokenizer: the one beside it, too. Raises NotFoundError, ConfigError or
    HubError.
    """
    text = str(source)
    if isinstance(source, Path) or paths.is_path(text) or Path(text).is_dir():
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
    return folder / subfolder
