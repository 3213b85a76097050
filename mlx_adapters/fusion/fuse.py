"""Fuse adapters into a base model: the update becomes part of the weights, in a folder that mlx-lm loads.

The new weight is computed from the base's exactly dequantized one in float32 and rounded once. At the base's
own precision every layer that no adapter touches keeps its bits; at any other precision each layer is
quantized from the best weights there are. Rounding is to nearest, or calibrated on text (see `rounding`);
what it cost is measured on other text (see `fidelity`).
"""

import glob
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

from mlx_adapters.assembly.formats import make_writer
from mlx_adapters.assembly.spool import Spool, key_of, spooled
from mlx_adapters.assembly.tensors import Assembly, Writer, open_assembly
from mlx_adapters.assembly.weights import Updates
from mlx_adapters.assembly.writing import SPARE_BYTES, companion_bytes
from mlx_adapters.calibration.fidelity import Fidelity
from mlx_adapters.calibration.strategy import Strategy
from mlx_adapters.calibration.texts import GENERAL, PYTHON, choose_text
from mlx_adapters.config.fusing import DEFAULTS, FuseOptions, with_calibration
from mlx_adapters.config.mapping import from_mapping, require, to_mapping, weights_of
from mlx_adapters.config.quantization import DTYPES, KEEP, QUANTIZATIONS, Precision, PrecisionLike
from mlx_adapters.data.datasets import Data
from mlx_adapters.errors import ConfigError, FidelityError, IncompatibleError
from mlx_adapters.events import Note, OnEvent, log_warnings
from mlx_adapters.fusion import recipe as recipes
from mlx_adapters.fusion.handover import check_program, hand_over
from mlx_adapters.fusion.recipe import Recipe
from mlx_adapters.fusion.result import UNQUANTIZED, FuseResult, report
from mlx_adapters.models.adapter import Adapter, AdapterLike, templates_of
from mlx_adapters.models.base import Base, BaseLike, Named
from mlx_adapters.models.loading import load_tokenizer_of
from mlx_adapters.sources.bases import NAME_IT, full_fine_tune, recorded_base, resolve_base
from mlx_adapters.sources.lookup import load_adapter, several
from mlx_adapters.storage import files, paths, replacing
from mlx_adapters.storage.hf_names import TEMPLATE_FILE
from mlx_adapters.storage.tensor_names import FUSE_RECIPE_FILE, REPORT_FILE
from mlx_adapters.system.door import mx
from mlx_adapters.system.limits import one_at_a_time
from mlx_adapters.system.machine import blas_threads, versions
from mlx_adapters.units import count

# Options that leave the rounding of layers as it is.
WITHOUT_ROUNDING = dict.fromkeys(("check", "check_rows", "max_kl", "budget_bits", "force"))
NOTABLE_KL = 0.001  # nats per token that rounding to nearest may cost without a word


@one_at_a_time
def fuse(
    base: BaseLike | None,
    adapters: AdapterLike | Iterable[AdapterLike],
    out: str | Path,
    *,
    quantization: PrecisionLike = "keep",
    dtype: str = "auto",
    weights: Sequence[float] | None = None,
    calibration: Data | None = None,
    options: FuseOptions = DEFAULTS,
    overwrite: bool = False,
    any_base: bool = False,
    replaced: dict[str, mx.array] | None = None,
    resume: bool = False,
    on_event: OnEvent = log_warnings,
) -> FuseResult:
    """Write `base` + `adapters` as a whole model folder `out`, which plain mlx-lm loads.

    Args:
        base: a name, folder or Hub id; None: the one that the adapter was made for.
        adapters: one, or several whose updates are added.
        out: the folder to make (a file, if `options.format` is "gguf").
        quantization: "keep": each layer as in the base; "none"; a number of bits (in the base's own groups if it has as
            many, else in MLX's default); a `Quantization`; or a mapping such as {"bits": 4, "group_size": 32}.
        dtype: of scales and of all that is not packed: "float32", "bfloat16", "float16"; "auto": the base's.
        weights: a factor for each adapter; 1 each if left out.
        calibration: text to calibrate and check on, instead of `options.calibration`: a folder, a file, or rows, as for
            `train`; None: what the adapter was trained on, else a general text.
        options: how to round and how to check.
        overwrite: replace an earlier fuse in `out`.
        any_base: fuse into a base that the adapter was not trained on.
        replaced: module path -> a whole new weight, in the layer's own shape, where a layer is not merely updated.
        resume: go on with the same fuse where it was stopped after more than a minute.
        on_event: called with progress and notes.

    Raises ConfigError, NotFoundError, FormatError, IncompatibleError, ExistsError, FidelityError, ModelError or
    StorageError; then `out` is as it was before.

    Example:
        >>> fused = ma.fuse("demo", "sql", "out/sql-8bit", quantization=8)
        >>> fused.folder.name, fused.bits_per_weight > 8
        ('sql-8bit', True)
        >>> fused.fidelity is not None
        True
    """
    started, options = time.perf_counter(), with_calibration(options, calibration)
    precision = Precision.of(quantization)
    require(dtype in DTYPES, f"dtype must be one of {', '.join(DTYPES)}, not '{dtype}'.")
    out = paths.expanded(out)
    ours = recipes.earlier_output(out)
    replacing.refuse_existing(out, overwrite, ours)
    given, base = with_model(several(adapters), base)
    tuned = isinstance(base, Base) and base.tuned is not None
    updates = gather_updates(given, weights, replaced if given or not tuned else {})
    resolved = choose_base(base, updates)
    file = options.calibration if isinstance(options.calibration, str | Path) else None
    replacing.refuse_reading_inside(out, [resolved, file, *(adapter for adapter, _ in updates.adapters)])
    check_program(options.program, resolved, out)
    writer = make_writer(options, precision, dtype, resolved)
    if options.format != "mlx":
        require(
            not options.mixed,
            "Mixed precision needs the MLX format.",
            "leave out --max-kl and --budget-bits, or --format.",
        )
    require(
        options.recipe is None or precision.bits == "keep", "A recipe says the bits of each layer.", "leave --bits out."
    )
    assembly = open_assembly(resolved, updates, writer, any_base, options.recipe)
    notes = _notes(assembly, precision, on_event)
    strategy = Strategy(assembly, options, on_event)
    beside = companion_bytes(resolved) + writer.beside_bytes(assembly)
    paths.require_free_space(out, strategy.disk_bytes() + beside + SPARE_BYTES)
    calibrates = strategy.method == "calibrated" and strategy.text is not None
    require(calibrates or not resume, "Only a calibrated fuse can be continued.", "leave --continue out.")
    keeping = (
        spooled(out, _key(strategy, writer, given, dtype), resume, on_event) if calibrates else nullcontext(Spool(out))
    )
    folders = files.atomic_folder(out, overwrite, ours)
    with keeping as spool, folders as folder, ThreadPoolExecutor(1) as hashing:  # locked before drafts are swept
        strategy.round(spool)
        with blas_threads(1):  # updates are products of thin matrices
            written = writer.write(assembly, folder, spool.get, on_event)
        hashes = hashing.submit(recipes.weights_sha256, folder, written.sha256)
        template_notes = _write_template(folder, resolved, [a for a, _ in updates.adapters], options.format)
        opened, unsaid = _hand_over(options, folder, out, resolved, updates)
        template_notes += unsaid
        for note in (*written.notes, *template_notes):
            on_event(Note(f"{note}.", "warning" if "left out" in note else "info"))
        if options.format == "mlx" and glob.has_magic(str(out)):
            on_event(
                Note(f"Plain mlx-lm reads '{out}' as a pattern, and finds no weights there or others'.", "warning")
            )
        if assembly.lost:
            others = f" and {count(len(assembly.lost) - 1, 'other layer')}" if len(assembly.lost) > 1 else ""
            strategy.warn(
                f"The numbers of '{assembly.lost[0]}'{others} are beyond nvfp4's scales, which end at 0.002 and 448: "
                "many of them are 0 or cut off; --mode mxfp4 holds them"
            )
        fidelity = strategy.check(folder) if writer.loadable else None
        lost = fidelity is not None and fidelity.kl_mean > NOTABLE_KL
        if strategy.method == "nearest" and lost and not (strategy.trained_through or strategy.calibrated_in_vain):
            strategy.warn("Rounding to nearest lost part of the adapter; --method calibrated keeps more")
        result = FuseResult(
            folder=out,
            method="nearest" if writer.rounds and strategy.method == "none" else strategy.method,
            quantization=assembly.quantization,
            size_bytes=written.size_bytes,
            bits_per_weight=8 * (written.size_bytes - written.beside_bytes) / assembly.parameters,
            survival=tuple(sorted(assembly.survival, key=lambda s: s.path)),
            fidelity=fidelity,
            text=strategy.text.describe() if strategy.text else None,
            notes=(*notes, *strategy.notes, *written.notes, *template_notes),
            seconds=time.perf_counter() - started,
            opened_with=tuple(opened),
        )
        if not options.force:
            require_faithful(fidelity, options.max_kl, "allow more bits, or keep the model all the same with --force.")
        made = replace(_recipe(strategy, writer, given, dtype), weights_sha256=hashes.result())
        files.write_json(folder / FUSE_RECIPE_FILE, {"format": 2} | asdict(made))
        files.write_json(folder / REPORT_FILE, report(result) | {"files": recipes.written_in(folder)})
    return result


def with_model(given: Sequence[Adapter | str], base: BaseLike | None) -> tuple[list[Adapter | str], BaseLike | None]:
    """(adapters, base): where no base is named, a full fine-tune among what is given is the base, fused by itself."""
    models = {one: made for one in given if isinstance(one, str) and (made := full_fine_tune(one)) is not None}
    if base is not None or not models:
        return list(given), base
    require(len(models) == 1, f"{' and '.join(models)} are models, and only one can be fused into.", "name one.")
    return [one for one in given if one not in models], next(iter(models.values()))


def gather_updates(
    adapters: Sequence[AdapterLike], weights: Sequence[float] | None, replaced: dict[str, mx.array] | None = None
) -> Updates:
    """Read the adapters and pair them with their weights (default 1 each). Raises ConfigError."""
    loaded = [load_adapter(adapter) for adapter in adapters]
    shares = weights_of(weights, len(loaded), 1.0)
    require(bool(loaded) or replaced is not None, "Nothing to fuse: no adapter was given.")
    return Updates(tuple(zip(loaded, shares, strict=True)), replaced or {})


def choose_base(base: BaseLike | None, updates: Updates) -> Base:
    """The base that was named, else the one the adapters were made for. Raises ConfigError."""
    if base is None:
        names = dict.fromkeys(a.base_name for a, _ in updates.adapters if a.base_name)
        if len(names) > 1:
            raise ConfigError(f"Which base model? They name different ones: {', '.join(names)}.", NAME_IT)
        return recorded_base((a for a, _ in updates.adapters), everything=True)
    return resolve_base(base, everything=True)


def _notes(assembly: Assembly, precision: Precision, on_event: OnEvent) -> tuple[str, ...]:
    """What is to be told of layers that are not as asked: of all together, then of each."""
    plans, left = assembly.plans, [plan for plan in assembly.plans if plan.note]
    bits = [plan.target.bits for plan in plans if plan.target is not None]
    others = [own for own in bits if own != precision.bits]
    numbers = " and ".join(map(str, sorted(set(others))))
    if assembly.precision == KEEP != precision and others:  # the base has as many bits as are asked for
        stay = f"{count(len(others), 'layer')} of {len(bits)} stay at the base's own {numbers} bits"
        told = f"{stay}: {8 * assembly.size_bytes() / assembly.parameters:.2f} bits per weight in all"
        on_event(Note(f"{told}."))
        return (told,)
    if not left:
        return ()
    first, quantization = f"{left[0].path}: {left[0].note}", precision.quantization
    smallest = quantization and quantization.group_size == min(QUANTIZATIONS[quantization.mode][1])
    if all(plan.target is None for plan in plans):
        way = "leave --bits out: the layers stay as they are." if smallest else "choose a smaller --group-size."
        raise ConfigError(f"No layer can be quantized like that; {first}.", way)
    share = sum(plan.parameters for plan in left) / sum(plan.parameters for plan in plans)
    whole = f"{count(len(left), 'layer')} of {len(plans)} {UNQUANTIZED}, {share:.0%} of the weights; {first}"
    on_event(Note(f"{whole}.{'' if smallest else ' A smaller --group-size may fit.'}", "warning"))
    return (whole, *(f"{plan.path}: {plan.note}" for plan in left))


def _write_template(folder: Path, base: Base, adapters: Sequence[Adapter], form: str) -> list[str]:
    """Put the chat template that the adapters were trained with in place of the base's; what to tell of it."""
    texts = {one.chat_template for one in templates_of(base, adapters)}
    text = texts.pop() if len(texts) == 1 else None
    if text is None:
        return ["the adapters were trained with different chat templates: the base's own is kept"] if texts else []
    if form == "gguf":  # which holds it
        return []
    files.write_text(folder / TEMPLATE_FILE, text)
    return []


def _hand_over(
    options: FuseOptions, folder: Path, out: Path, base: Base, updates: Updates
) -> tuple[list[str], list[str]]:
    if options.program is None:
        return [], []
    templates = templates_of(base, [adapter for adapter, _ in updates.adapters])
    same = templates[0] if all(one == templates[0] for one in templates) else None
    return hand_over(options.program, folder, out, load_tokenizer_of(base, same))


def require_faithful(fidelity: Fidelity | None, max_kl: float | None, way: str) -> None:
    """Raise FidelityError where a fused model was measured further from the adapter model than is allowed."""
    if max_kl is not None and fidelity is not None and fidelity.kl_mean > max_kl:
        told = f"KL from the adapter model is {fidelity.kl_mean:.4g} nats per token, above the {max_kl:g} allowed."
        raise FidelityError(told, way)


def _key(strategy: Strategy, writer: Writer, given: Sequence[AdapterLike], dtype: str) -> str:
    """What tells this rounding of layers from others."""
    made_of = asdict(_recipe(strategy, writer, given, dtype))
    return key_of(made_of | {"options": made_of["options"] | WITHOUT_ROUNDING})


def _recipe(strategy: Strategy, writer: Writer, given: Sequence[AdapterLike], dtype: str) -> Recipe:
    updates, text = strategy.assembly.updates, strategy.text
    options = strategy.options
    if text is not None and text.source == GENERAL:  # even if the adapter's own data turns up again
        options = replace(options, calibration=GENERAL)
    elif not isinstance(options.calibration, str | None):
        path = options.calibration if isinstance(options.calibration, Path) else PYTHON
        options = replace(options, calibration=str(path))
    described = [recipes.describe_adapter(g, a, w) for g, (a, w) in zip(given, updates.adapters, strict=True)]
    return Recipe(
        base=recipes.describe_base(strategy.assembly.base),
        adapters=described,
        quantization=writer.precision.to_json(),
        dtype=dtype,
        method=strategy.method,
        targets={path: to_mapping(target) if target else None for path, target in strategy.targets.items()},
        text=text.describe() | {"why": None} if text else None,
        options=asdict(options),
        versions=versions(),
        weights_sha256={},
    )


def fuse_again(
    path: str | Path | Named, out: str | Path, *, overwrite: bool = False, on_event: OnEvent = log_warnings
) -> FuseResult:
    """Fuse once more by the recipe that every fused folder holds: the same bytes on the same versions and processor.

    Args:
        path: a recipe, or the folder that holds one.
        out: the folder to make.
        overwrite: replace an earlier fuse in `out`.
        on_event: called with progress and notes; a warning, if the bytes come out differently.

    Raises IncompatibleError if base, adapter or text are not what they were; NotFoundError, FormatError, ExistsError or
    StorageError. Then nothing is written.

    Example:
        >>> ma.fuse_again("out/sql-4bit", "out/sql-again").identical
        True
    """
    recipe = recipes.read_recipe(path)
    replacing.refuse_reading_inside(paths.expanded(out), [path])
    base, adapters = recipes.ingredients(recipe)
    options = from_mapping(FuseOptions, recipe.options, "the fuse recipe")
    if recipe.text is not None:
        tokenizer = load_tokenizer_of(base, templates_of(base, adapters)[0])
        text = choose_text(options.calibration, adapters, tokenizer, options.calibration_rows, options.check_rows, base)
        if text.sha256 != recipe.text.get("sha256"):
            raise IncompatibleError(f"The text '{text.source}' is not the one of the recipe any more.", recipes.ANEW)
    weights = [entry["weight"] for entry in recipe.adapters]
    given = [entry["reference"] for entry in recipe.adapters]
    result = fuse(
        base,
        given,
        out,
        quantization=recipe.quantization,
        dtype=recipe.dtype,
        weights=weights,
        options=options,
        overwrite=overwrite,
        any_base=True,
        on_event=on_event,
    )
    unlike = recipes.differences(recipe, recipes.read_recipe(out))
    on_event(Note(unlike, "warning") if unlike else Note("The weights are the recipe's, byte for byte."))
    return replace(result, identical=unlike is None)
