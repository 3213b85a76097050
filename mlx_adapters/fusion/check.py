"""Judge a model that somebody fused: how close is it to its base with the adapter?"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_adapters.assembly.formats import MlxWriter
from mlx_adapters.assembly.survival import Survival, SurvivalSum, mean_cosine, sample
from mlx_adapters.assembly.tensors import open_assembly
from mlx_adapters.assembly.weights import BaseWeights, Updates, chunks
from mlx_adapters.calibration.blockwise import BlockwiseModel
from mlx_adapters.calibration.fidelity import Fidelity, Variants, measured
from mlx_adapters.calibration.texts import choose_text
from mlx_adapters.config.fusing import DEFAULTS, FuseOptions, with_calibration
from mlx_adapters.config.quantization import KEEP
from mlx_adapters.data.datasets import Data
from mlx_adapters.display import page
from mlx_adapters.errors import IncompatibleError
from mlx_adapters.events import OnEvent, log_warnings
from mlx_adapters.fusion.fuse import choose_base, gather_updates
from mlx_adapters.fusion.result import check_parts, distance_charts, layers
from mlx_adapters.models.adapter import AdapterLike
from mlx_adapters.models.base import BaseLike
from mlx_adapters.models.dense import weight_shape
from mlx_adapters.models.loading import load_module, load_tokenizer_of
from mlx_adapters.sources.bases import resolve_base
from mlx_adapters.sources.lookup import several
from mlx_adapters.system.limits import one_at_a_time, trim_cache


@dataclass(frozen=True)
class Checked:
    """What a check found; `survival` of the layers that the adapters change."""

    model: str
    fidelity: Fidelity
    survival: tuple[Survival, ...]
    text: dict[str, Any]

    @property
    def update_survival(self) -> float:
        """The mean cosine between the updates wanted and those found."""
        return mean_cosine(self.survival)


def html(checked: Checked) -> str:
    """What a check found as a page."""
    return page.html(
        f"Checked: {Path(checked.model).name}",
        checked.fidelity.verdict,
        page.section("", page.pictures(distance_charts(checked.fidelity), headed=False)),
        *check_parts(checked.fidelity, checked.text),
        layers(checked.survival, None),
    )


@one_at_a_time
def check_fused(
    model: BaseLike,
    adapters: AdapterLike | Iterable[AdapterLike],
    *,
    base: BaseLike | None = None,
    weights: Sequence[float] | None = None,
    calibration: Data | None = None,
    options: FuseOptions = DEFAULTS,
    any_base: bool = False,
    on_event: OnEvent = log_warnings,
) -> Checked:
    """Compare a fused model with base + adapters on text, and its weights with theirs. Writes nothing.

    Args:
        model: the fused folder.
        adapters: what was fused.
        base: what it was fused into; None: the one that the adapter was made for.
        weights: a factor for each adapter; 1 each if left out.
        calibration: text to judge on, as for `fuse`.
        options: of which `calibration`, `check_rows` and `seed` choose the text.
        any_base: take a base that the adapter was not trained on.
        on_event: called with progress and notes.

    Raises IncompatibleError if `model` is not a fused version of the base; NotFoundError, FormatError or ModelError.

    Example:
        >>> checked = ma.check_fused("out/sql-4bit", "sql")
        >>> 0 <= checked.fidelity.same_top <= 1
        True
    """
    options = with_calibration(options, calibration)
    given = several(adapters)
    updates = gather_updates(given, weights)
    unfused, fused = choose_base(base, updates), resolve_base(model)
    assembly = open_assembly(unfused, updates, MlxWriter(KEEP, None, unfused), any_base)
    survival = measure_survival(assembly.source, BaseWeights.of(load_module(fused)[0]), updates, fused.name)
    tokenizer = load_tokenizer_of(unfused)
    loaded = [adapter for adapter, _ in updates.adapters]
    text = choose_text(options.calibration, loaded, tokenizer, options.calibration_rows, options.check_rows, unfused)
    assembly.close()

    def variants() -> Variants:
        exact = BlockwiseModel(unfused, updates)
        return exact, BlockwiseModel(fused, None, lambda _: True), BlockwiseModel(unfused, beside=exact)

    return Checked(fused.name, measured(variants, text.check, unfused, on_event), survival, text.describe())


def measure_survival(base: BaseWeights, fused: BaseWeights, updates: Updates, name: str) -> tuple[Survival, ...]:
    """Survival of every changed layer. Raises IncompatibleError if the layers do not correspond."""
    results = []
    kinds = [type(weights.module) for weights in (fused, base)]
    if len({(kind.__module__, kind.__qualname__) for kind in kinds}) > 1:
        one, other = (kind.__module__.rpartition(".")[2] for kind in kinds)
        why = f"'{name}' is not a fused version of this base: it is a {one}, the base a {other}."
        raise IncompatibleError(why, "name the base that it was made from with --base.")
    for path in base.layers:
        shape = weight_shape(base.layers[path])
        if path not in fused.layers or weight_shape(fused.layers[path]) != shape:
            raise IncompatibleError(
                f"'{name}' is not a fused version of this base: '{path}' differs in shape.",
                "name the base that it was made from with --base.",
            )
        if path not in updates.paths():
            continue
        total = SurvivalSum()
        for start, stop in chunks(shape):
            plain = base.rows(path, start, stop)
            rows = plain, base.update(path, plain, updates, start, stop), fused.rows(path, start, stop)
            total.add(*(part[sample(stop - start)] for part in rows))
        results.append(total.result(path))
        trim_cache()
    return tuple(results)
