"""Fuse a PEFT adapter with all that MLX's adapter layers cannot hold.

Whole modules (modules_to_save), biases and rows of single tokens are not low-rank updates, so they have no
place in an MLX adapter; in a fused model they are simply the model's weights.
"""

from dataclasses import replace
from pathlib import Path

from mlx_adapters.checkpoints.originals import layout_of
from mlx_adapters.config.fusing import DEFAULTS, FuseOptions
from mlx_adapters.config.quantization import PrecisionLike
from mlx_adapters.config.settings import of_kind
from mlx_adapters.data.datasets import Data
from mlx_adapters.errors import FormatError
from mlx_adapters.events import Note, OnEvent, log_warnings
from mlx_adapters.fusion.fuse import fuse
from mlx_adapters.fusion.peft_check import check_as_loaded
from mlx_adapters.fusion.peft_resize import resized
from mlx_adapters.fusion.peft_whole import whole_tensors
from mlx_adapters.fusion.result import FuseResult
from mlx_adapters.models.adapter import Adapter
from mlx_adapters.models.base import Base, BaseLike, Named, Trained, says_tied
from mlx_adapters.models.layers import adaptable_layers, tied
from mlx_adapters.models.loading import load_module
from mlx_adapters.peft_format.conversion import convert, own_template, prepared
from mlx_adapters.peft_format.reading import PeftAdapter, read_peft, refuse_unsaved
from mlx_adapters.peft_format.to_mlx import needs_untying, without_copies
from mlx_adapters.sources.bases import resolve_base
from mlx_adapters.sources.lookup import peft_folder, spelled
from mlx_adapters.storage import paths, replacing
from mlx_adapters.storage.hf_names import is_embedding, is_head
from mlx_adapters.system.limits import one_at_a_time


@one_at_a_time
def fuse_peft(
    source: str | Path | Named,
    out: str | Path,
    *,
    base: BaseLike,
    quantization: PrecisionLike = "keep",
    dtype: str = "auto",
    resize: bool = False,
    text_only: bool = False,
    subfolder: str | None = None,
    calibration: Data | None = None,
    options: FuseOptions = DEFAULTS,
    overwrite: bool = False,
    on_event: OnEvent = log_warnings,
) -> FuseResult:
    """Write `base` with a whole PEFT adapter in it: LoRA or DoRA, biases, modules_to_save, tokens.

    Args:
        source: a PEFT folder or Hub repository.
        out: the folder to make.
        base: the MLX model that the adapter is for.
        quantization: as for `fuse`.
        dtype: as for `fuse`.
        resize: give the model the vocabulary that the adapter was trained with, and the tokenizer that lies beside it:
            rows are appended, or cut, at both ends.
        text_only: leave out what the adapter changes besides the text model; a warning names it.
        subfolder: where in `source` the adapter lies.
        calibration: as for `fuse`.
        options: as for `fuse`.
        overwrite: replace an earlier fuse in `out`.
        on_event: called with progress and notes.

    Raises what `fuse` raises; FormatError or IncompatibleError with the reason if PEFT's model cannot be written as one
    for mlx-lm.

    Example:
        >>> folder = ma.export_peft("sql", "out/sql-peft").folder
        >>> ma.fuse_peft(folder, "out/whole", base="demo", quantization="none").quantization is None
        True
    """
    of_kind(FuseOptions, options)
    folder, _ = peft_folder(source, subfolder, tokenizer=resize)
    with paths.named(folder, spelled(source)):
        peft = read_peft(folder)
    replacing.refuse_reading_inside(paths.expanded(out), [peft])
    refuse_unsaved(peft)
    resolved = resolve_base(base)
    module, _ = load_module(resolved)
    layout = layout_of(resolved, module)
    peft, notes = prepared(peft, module, layout, text_only)
    for note in notes:
        on_event(Note(note, "warning"))
    if (larger := resized(peft, resolved, module, layout, resize, on_event)) is not resolved:
        resolved = larger
        module, _ = load_module(resolved)
        layout = layout_of(resolved, module)
    peft = without_copies(peft, module, layout)
    one_for_both = tied(adaptable_layers(module)) or _tokens_of_both(peft, resolved)
    if needs_untying(peft, adaptable_layers(module)):
        resolved = replace(resolved, untied=True)
        module, _ = load_module(resolved)
        layout = layout_of(resolved, module)
        on_event(Note("The fused model has an output layer of its own: the adapter changes one end of the embedding."))
    whole = whole_tensors(peft, module, layout, resolved.untied, one_for_both)
    rest, adapters = peft.without(lambda path: path in whole.updated), list[Adapter]()
    own = own_template(peft, resolved, on_event)
    if rest.modules:
        name = {"name": peft.folder.name, "base": resolved.record(), **own}
        converted = convert(rest, module, layout, resolved.name, replaced=whole.replaced)
        adapters.append(replace(converted.adapter, metadata=name).check())
    elif own:  # there is no adapter to go with
        resolved = replace(resolved, trained=Trained(own, None))
    check_as_loaded(peft, resolved, layout, whole, adapters)
    return fuse(
        replace(resolved, parameters=whole.parameters),
        adapters,
        out,
        quantization=quantization,
        dtype=dtype,
        calibration=calibration,
        options=options,
        overwrite=overwrite,
        replaced=whole.replaced,
        on_event=on_event,
    )


def _tokens_of_both(peft: PeftAdapter, base: Base) -> bool:
    """Whether to PEFT tokens of the embedding are the output layer's, too, in a base that has both. Raises FormatError
    where the base's config leaves it open."""
    if not any(is_embedding(path) for path in peft.token_rows) or any(is_head(path) for path in peft.token_rows):
        return False
    told = says_tied(base.config)
    if told is None:
        raise FormatError(
            "The base's config leaves open whether its output layer is its embedding, and so what tokens change.",
            "put tie_word_embeddings into its config.json, as the model has it that the adapter was trained on.",
        )
    return told
