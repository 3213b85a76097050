"""Take a PEFT adapter into the registry as an MLX adapter."""

from dataclasses import replace
from pathlib import Path

from mlx_adapters.events import OnEvent, log_warnings
from mlx_adapters.models.adapter import Adapter
from mlx_adapters.models.base import BaseLike, Named
from mlx_adapters.peft_format.conversion import as_mlx
from mlx_adapters.peft_format.reading import read_peft, refuse_beyond_lora, refuse_unsaved
from mlx_adapters.sources import registry
from mlx_adapters.sources.bases import resolve_base
from mlx_adapters.sources.lookup import peft_folder, spelled
from mlx_adapters.storage import paths, replacing
from mlx_adapters.storage.tensor_names import ADAPTER_OUTPUT
from mlx_adapters.system import machine


def import_peft(
    source: str | Path | Named,
    *,
    base: BaseLike,
    name: str,
    tie: bool = False,
    resize: bool = False,
    text_only: bool = False,
    subfolder: str | None = None,
    overwrite: bool = False,
    on_event: OnEvent = log_warnings,
) -> Adapter:
    """Convert a PEFT LoRA or DoRA adapter and register it; it gives PEFT's own logits on the same base weights.

    Args:
        source: a folder (or the folder above one named adapter), or a Hub repository "user/repo[@revision]".
        base: the MLX model that it is for.
        name: its name in the registry.
        tie: if it adapts one end of a tied embedding, which MLX cannot, adapt both, as PEFT does after
            merge_and_unload.
        resize: take one that was trained with fewer tokens than the base has; the others stay as they are.
        text_only: leave out what it adapts besides the text model, such as a vision tower; a warning names it.
        subfolder: where in SRC it lies; on the Hub also as in "user/repo/folder".
        overwrite: replace an adapter of this name.
        on_event: called with progress and notes.

    Raises FormatError if the adapter is damaged or MLX cannot express it, IncompatibleError if it is for another base,
    ExistsError, HubError; then nothing is written.

    Example:
        >>> folder = ma.export_peft("sql", "out/sql-peft").folder
        >>> ma.import_peft(folder, base="demo", name="sql-back").config.rank
        4
    """
    replacing.refuse_existing(registry.adapter_folder(name), overwrite, ADAPTER_OUTPUT)
    source, resolved = spelled(source), resolve_base(base)
    folder, hub = peft_folder(source, subfolder)
    replacing.refuse_reading_inside(registry.adapter_folder(name), [folder, resolved])
    with paths.named(folder, source):
        peft = read_peft(folder)
    refuse = refuse_unsaved if text_only else refuse_beyond_lora  # of a tower, much is whole
    refuse(peft)
    adapter = as_mlx(peft, resolved, source, tie, resize, text_only, on_event)
    metadata = adapter.metadata | machine.made_now() | hub
    return registry.register(replace(adapter, metadata=metadata), name, overwrite)
