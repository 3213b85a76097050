"""Fuse adapters into a base model: the update becomes part of the weights, in a folder that mlx-lm loads.

The new weight is computed from the base's exactly dequantized one in float32 and rounded once. At the base's
own precision every layer that no adapter touches keeps its bits; at any other precision each layer is
quantized from the best weights there are. Rounding is to nearest, or calibrated on text (see `rounding`);
what it cost is measured on other text (see `fidelity`).
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from mlx_adapters import files
from mlx_adapters.adapter import Adapter
from mlx_adapters.config import DTYPES, QUANTIZATIONS, Quantization, require
from mlx_adapters.door import mx
from mlx_adapters.errors import AdapterError, ConfigError, FidelityError, IncompatibleError, did_you_mean
from mlx_adapters.events import Note, OnEvent, ignore
from mlx_adapters.fusion import recipe as recipes
from mlx_adapters.fusion.blocks import TokenBatch, Variant, make_batches
from mlx_adapters.fusion.calibrate import Spool, round_layers
from mlx_adapters.fusion.fidelity import Fidelity, compare
from mlx_adapters.fusion.job import Job, open_job
from mlx_adapters.fusion.mixed import finer, order_of_steps, targets_after, until_promise, within_budget
from mlx_adapters.fusion.plan import Precision, Updates
from mlx_adapters.fusion.recipe import RECIPE_FILE, Given, Recipe
from mlx_adapters.fusion.rounding import dequantize
from mlx_adapters.fusion.stream import dtype_name
from mlx_adapters.fusion.survival import Survival
from mlx_adapters.fusion.text import GENERAL, Text, choose_text
from mlx_adapters.machine import on_gpu
from mlx_adapters.model import Base, load_tokenizer_of, resolve_base
from mlx_adapters.registry import load_adapter
from mlx_adapters.units import count, size

REPORT_FILE = "fuse_report.json"
NOTABLE_KL = 0.001  # nats per token that rounding to nearest may cost without a word
METHODS = ("auto", "nearest", "calibrated")
FORMATS = ("mlx", "hf", "gguf")


@dataclass(frozen=True)
class FuseOptions:
    """How to round and how to check.

    `method`: "nearest", "calibrated", or "auto": calibrated under 8 bits, if there is text. `calibration`:
    a data folder, a .jsonl, .parquet or .txt file; None: the adapter's training data, else a general text.
    `max_kl` (nats per token) or `budget_bits` (bits per weight of the whole model) ask for mixed precision.
    `thorough`: let the rows of a layer cancel each other's errors too; about half the KL for three times the
    rounding time. Experts (each sees too few tokens to know how its outputs are felt together) and layers of over
    16,384 outputs (whose moments would not fit) are rounded row by row all the same. `force`: keep the output even if
    KL is above `max_kl`. `format`: "mlx"; "hf": unquantized, with the names, types and config of the original
    checkpoint; "gguf": one file, f16 (or q8_0 at 8 bits), not checked.
    """

    method: Literal["auto", "nearest", "calibrated"] = "auto"
    calibration: str | None = None
    calibration_rows: int = 128
    check: bool = True
    check_rows: int = 64
    max_kl: float | None = None
    budget_bits: float | None = None
    force: bool = False
    seed: int = 0
    thorough: bool = True
    format: Literal["mlx", "hf", "gguf"] = "mlx"

    def __post_init__(self) -> None:
        require(self.method in METHODS, f"There is no method '{self.method}'.", did_you_mean(self.method, METHODS))
        require(self.calibration_rows >= 1 and self.check_rows >= 1, "calibration and check need at least 1 row.")
        require(self.max_kl is None or self.max_kl > 0, f"max_kl must be above 0, not {self.max_kl}.")
        require(self.max_kl is None or self.budget_bits is None, "Give max_kl or budget_bits, not both.")
        require(self.max_kl is None or self.check, "max_kl is a promise that has to be checked.")
        require(self.format in FORMATS, f"There is no format '{self.format}'.", did_you_mean(self.format, FORMATS))
        if self.budget_bits is not None or self.max_kl is not None:
            require(self.method != "nearest", "Mixed precision needs the method 'calibrated'.")


DEFAULTS = FuseOptions()


@dataclass(frozen=True)
class FuseResult:
    """A fused model. `bits_per_weight` counts all tensors; `notes` say where a layer is not as asked.

    `identical`, after `fuse_again`: whether the weight files have the bytes that the recipe records.
    """

    folder: Path
    method: str
    quantization: dict[str, Any] | None
    size_bytes: int
    bits_per_weight: float
    survival: tuple[Survival, ...]
    fidelity: Fidelity | None
    text: dict[str, Any] | None
    notes: tuple[str, ...]
    seconds: float
    identical: bool | None = None

    @property
    def update_survival(self) -> float:
        """The mean over the changed layers of the cosine between the update wanted and the one stored."""
        return sum(s.cosine for s in self.survival) / max(len(self.survival), 1)

    def _repr_html_(self) -> str:
        from mlx_adapters.display import html_block, html_facts, html_table

        facts = {
            "rounding": self.method, "bits per weight": f"{self.bits_per_weight:.2f}",
            "size": size(self.size_bytes), "update survival (cosine)": f"{self.update_survival:.4f}",
        }  # fmt: skip
        checked = html_table(*self.fidelity.table()) if self.fidelity else ""
        return html_block(self.folder.name, html_facts(facts), checked)

    def __repr__(self) -> str:
        kl = f", KL {self.fidelity.kl_mean:.2g}" if self.fidelity else ""
        return (
            f"FuseResult('{self.folder.name}', {self.method}, {self.bits_per_weight:.2f} bits per weight, "
            f"{size(self.size_bytes)}, update survival {self.update_survival:.4f}{kl})"
        )


def fuse(
    base: str | Path | Base | None,
    adapters: Given | Sequence[Given],
    out: str | Path,
    *,
    quantization: Quantization | int | str = "keep",
    dtype: str = "auto",
    weights: Sequence[float] | None = None,
    options: FuseOptions = DEFAULTS,
    overwrite: bool = False,
    any_base: bool = False,
    replaced: dict[str, mx.array] | None = None,
    on_event: OnEvent = ignore,
) -> FuseResult:
    """Write base + adapters as a whole model folder `out` and return what was made.

    base: a name, folder or Hub id; None takes the one the adapter was made for. adapters: one, or several
    whose updates are added with `weights`. quantization: "keep" the base's precision, "none", a number of bits,
    or a `Quantization`. dtype: of everything that is not packed ("auto": the base's). replaced: module path ->
    a whole new weight for layers that are not merely updated.

    Raises ConfigError, NotFoundError, FormatError, IncompatibleError, ExistsError, FidelityError, ModelError or
    StorageError; then `out` is as it was before.
    """
    started = time.perf_counter()
    require(dtype in DTYPES, f"dtype must be one of {', '.join(DTYPES)}, not '{dtype}'.")
    out = files.expanded(out)
    files.refuse_existing(out, overwrite)
    given = [adapters] if isinstance(adapters, Adapter | str | Path) else list(adapters)
    updates = gather_updates(given, weights, replaced)
    found = choose_base(base, updates)
    asked = _plain_format(settle_precision(quantization, found), quantization, options)
    job = open_job(found, updates, asked, dtype, any_base)
    notes = _notes(job, on_event)
    work = _Work(job, asked, options, on_event)
    with files.atomic_folder(out, overwrite) as folder:
        spool = Spool(folder / "parts")
        work.round(spool)
        size = _write(job, folder, asked, quantization, options.format, spool, on_event)
        spool.remove()
        fidelity = work.check(folder)
        if work.method == "nearest" and fidelity is not None and fidelity.kl_mean > NOTABLE_KL:
            on_event(Note("Rounding to nearest lost part of the adapter; --method calibrated keeps more.", "warning"))
        result = FuseResult(
            folder=out, method=work.method, quantization=job.quantization(asked), size_bytes=size,
            bits_per_weight=8 * size / job.parameters, survival=tuple(sorted(job.survival, key=lambda s: s.path)),
            fidelity=fidelity, text=work.text.describe() if work.text else None, notes=notes,
            seconds=time.perf_counter() - started,
        )  # fmt: skip
        _refuse_unfaithful(result, options)
        files.write_json(folder / REPORT_FILE, report(result))
        files.write_json(folder / RECIPE_FILE, {"format": 1} | _recipe(work, given, dtype, folder))
    return result


def _plain_format(
    asked: Quantization | str, given: Quantization | int | str, options: FuseOptions
) -> Quantization | str:
    """Other programs' formats hold unquantized layers (GGUF also q8_0), whatever the base is. Raises ConfigError."""
    if options.format == "mlx":
        return asked
    eight = options.format == "gguf" and (given == 8 or given == Quantization(8))
    require(
        given in ("keep", "none") or eight,
        f"The format '{options.format}' takes {'--bits none or 8' if options.format == 'gguf' else '--bits none'}.",
    )
    require(options.max_kl is None and options.budget_bits is None, "Mixed precision needs the MLX format.")
    return "none"


def _write(
    job: Job, folder: Path, asked: Quantization | str, given: Quantization | int | str, format: str, spool: Spool,
    on_event: OnEvent,
) -> int:  # fmt: skip
    if format == "hf":
        from mlx_adapters.fusion.hf_export import write_hf

        return write_hf(job, folder, on_event)
    if format == "gguf":
        from mlx_adapters.fusion.gguf_export import write_gguf

        named = {mx.float32: "f32", mx.bfloat16: "bf16"}
        kind = "q8_0" if given not in ("keep", "none") else named.get(job.dtype, "f16")
        return write_gguf(job, folder, kind, on_event)
    return job.write(folder, asked, spool.get, on_event)


class _Work:
    """Rounding and checking of one job: which method, on which text, at which precision."""

    def __init__(self, job: Job, asked: Quantization | str, options: FuseOptions, on_event: OnEvent) -> None:
        self.job, self.asked, self.options, self.on_event = job, asked, options, on_event
        rounded = [plan.rounded_to for plan in job.plans if plan.rounded_to is not None]
        wanted = options.method == "calibrated" or (
            options.method == "auto" and any(target.bits < 8 for target in rounded)
        )
        self.method = "calibrated" if rounded and wanted else "nearest" if rounded else "none"
        self.targets: dict[str, Precision] = {}
        self._refuse_small_budget()
        self.text: Text | None = None
        if self.method == "calibrated" or options.check:
            self.text = self._choose_text()

    def _choose_text(self) -> Text | None:
        adapters = [adapter for adapter, _ in self.job.updates.adapters]
        o = self.options
        try:
            tokenizer = load_tokenizer_of(self.job.base)
            return choose_text(o.calibration, adapters, tokenizer, o.calibration_rows, o.check_rows)
        except AdapterError as error:
            if o.calibration is not None or o.method == "calibrated" or o.max_kl is not None:
                raise
            self.on_event(Note(f"No calibration and no check: {error.message}", "warning"))
            self.method = "nearest" if self.method == "calibrated" else self.method
            return None

    def _refuse_small_budget(self) -> None:
        budget = self.options.budget_bits
        if budget is None:
            return
        now = 8 * self.job.size_bytes() / self.job.parameters
        if now > budget:
            raise ConfigError(
                f"The model has {now:.2f} bits per weight already, more than the {budget} allowed.",
                "ask for fewer --bits as the start, or a larger budget.",
            )

    @property
    def mixed(self) -> bool:
        return self.options.max_kl is not None or self.options.budget_bits is not None

    def round(self, spool: Spool) -> None:
        """Fill `spool` with calibrated layers and settle mixed precision."""
        if self.method != "calibrated" or self.text is None:
            return
        job = self.job
        why = f" {self.text.why}" if self.text.why else ""
        self.on_event(Note(f"Calibrating on {count(len(self.text.calibration), 'row')} of {self.text.source}.{why}"))
        also = {q for plan in job.plans if plan.rounded_to for q in finer(plan.rounded_to)} if self.mixed else ()
        round_layers(
            job.base, job.updates, job.plans, batches_of(self.text.calibration), job.scale_dtype, spool, self.on_event,
            also, self.options.seed, self.options.thorough,
        )  # fmt: skip
        if self.mixed:
            self.targets = self._choose_targets(spool)
            job.retarget(self.targets)

    def _choose_targets(self, spool: Spool) -> dict[str, Precision]:
        job, options = self.job, self.options
        steps = order_of_steps(job.plans, spool.losses, dtype_name(job.scale_dtype))
        if options.budget_bits is not None:
            spare = options.budget_bits * job.parameters / 8 - job.size_bytes()
            return targets_after(within_budget(steps, int(spare)))
        start = {plan.path: plan.target for plan in job.plans if (plan.path, plan.target) in spool.losses}
        total = sum(spool.losses[path, target] for path, target in start.items() if target is not None)
        batches = batches_of(self.text.check) if self.text else []

        def measure(targets: dict[str, Precision]) -> float:
            chosen = start | targets

            def stored(path: str) -> mx.array | None:
                packed = spool.get(path, chosen.get(path))
                return None if packed is None else dequantize(packed)

            updates = job.updates
            touched = set(chosen) | updates.paths()
            fused = Variant(job.base, updates, lambda path: path in touched, stored)
            return compare(Variant(job.base, updates), fused, None, batches).kl_mean

        count = until_promise(steps, total, options.max_kl or 0.0, measure, self.on_event)
        return targets_after(steps[:count])

    def check(self, folder: Path) -> Fidelity | None:
        """The fidelity of the model in `folder`, or None if it is not to be checked."""
        if not self.options.check or self.text is None or self.options.format == "gguf":
            return None
        job = self.job
        changed = {plan.path for plan in job.plans if not plan.copied}
        fused = Variant(Base(str(folder), folder), None, changed.__contains__ if job.dtype is None else lambda _: True)
        batches = batches_of(self.text.check)
        return compare(Variant(job.base, job.updates), fused, Variant(job.base), batches, self.on_event)


def batches_of(rows: list) -> list[TokenBatch]:
    """Batches of rows; on a GPU padded to few shapes, because each new one is compiled for seconds."""
    return make_batches(rows, 8192, 64) if on_gpu() else make_batches(rows)


def gather_updates(
    adapters: Sequence[Given], weights: Sequence[float] | None, replaced: dict[str, mx.array] | None = None
) -> Updates:
    """Read the adapters and pair them with their weights (default 1 each). Raises ConfigError."""
    loaded = [a.check() if isinstance(a, Adapter) else load_adapter(a) for a in adapters]
    shares = [1.0] * len(loaded) if weights is None else [float(w) for w in weights]
    require(len(shares) == len(loaded), f"{count(len(loaded), 'adapter')}, but {count(len(shares), 'weight')}.")
    require(all(abs(share) < float("inf") for share in shares), "weights must be finite numbers.")
    require(bool(loaded) or bool(replaced), "Nothing to fuse: no adapter was given.")
    return Updates(tuple(zip(loaded, shares, strict=True)), replaced or {})


def choose_base(base: str | Path | Base | None, updates: Updates) -> Base:
    """The base that was named, else the one the adapters were made for. Raises ConfigError."""
    if base is None:
        names = dict.fromkeys(a.base_name for a, _ in updates.adapters if a.base_name)
        if len(names) != 1:
            why = "they name different ones: " + ", ".join(names) if names else "the adapter does not name it"
            raise ConfigError(f"Which base model? {why[0].upper()}{why[1:]}.", "give it with --base.")
        base = next(iter(names))
    return resolve_base(base)


def parse_precision(bits: str, group_size: int | None, mode: str | None) -> Quantization | int | str:
    """What --bits, --group-size and --mode ask for. Raises ConfigError."""
    if bits in ("keep", "none"):
        require(group_size is None and mode is None, f"--bits {bits} takes no group size and no mode.")
        return bits
    require(bits.isdecimal(), f"bits must be keep, none or a number, not '{bits}'.")
    if group_size is None and mode in (None, "affine"):
        return int(bits)
    mode = mode or "affine"
    sizes = QUANTIZATIONS[mode][1] if mode in QUANTIZATIONS and mode != "affine" else (64,)
    return Quantization(int(bits), group_size or sizes[0], mode)


def settle_precision(asked: Quantization | int | str, base: Base) -> Quantization | str:
    """A number of bits means the base's own grouping if it has as many bits, else groups of 64.

    A precision that is the base's own means "keep". Raises ConfigError.
    """
    own = base.config.get("quantization") or {}
    if isinstance(asked, int):
        same = own.get("bits") == asked
        asked = Quantization(asked, own["group_size"], own.get("mode", "affine")) if same else Quantization(asked)
    if isinstance(asked, str):
        require(asked in ("keep", "none"), f"quantization must be keep, none or a Quantization, not '{asked}'.")
        return asked
    mine = (own.get("bits"), own.get("group_size"), own.get("mode", "affine"))
    return "keep" if mine == (asked.bits, asked.group_size, asked.mode) else asked


def _notes(job: Job, on_event: OnEvent) -> tuple[str, ...]:
    notes = tuple(f"{plan.path}: {plan.note}" for plan in job.plans if plan.note)
    if notes:
        on_event(Note(f"{count(len(notes), 'layer')} not quantized; {notes[0]}.", "warning"))
    return notes


def _refuse_unfaithful(result: FuseResult, options: FuseOptions) -> None:
    limit, fidelity = options.max_kl, result.fidelity
    if limit is not None and fidelity is not None and fidelity.kl_mean > limit and not options.force:
        raise FidelityError(
            f"KL from the adapter model is {fidelity.kl_mean:.4g} nats per token, above the {limit:g} allowed.",
            "allow more bits, or keep the model all the same with --force.",
        )


def report(result: FuseResult) -> dict[str, Any]:
    """What fuse_report.json says."""
    plain = asdict(result) | {"folder": str(result.folder), "update_survival": result.update_survival}
    if result.fidelity:
        plain["fidelity"] |= {
            "perplexity_adapter": result.fidelity.perplexity_adapter,
            "perplexity_fused": result.fidelity.perplexity_fused,
        }
    return plain


def _recipe(work: _Work, given: Sequence[Given], dtype: str, folder: Path) -> dict[str, Any]:
    updates, text = work.job.updates, work.text
    general = text is not None and text.source == GENERAL  # even if the adapter's own data turns up again
    options = replace(work.options, calibration=GENERAL) if general else work.options
    described = [recipes.describe_adapter(g, a, w) for g, (a, w) in zip(given, updates.adapters, strict=True)]
    made = Recipe(
        base=work.job.base.record(),
        adapters=described,
        quantization=recipes.precision_to_json(work.asked),
        dtype=dtype,
        method=work.method,
        targets={path: recipes.precision_to_json(target) for path, target in work.targets.items()},
        text=text.describe() | {"why": None} if text else None,
        options=asdict(options),
        versions=recipes.recipe_versions(),
        weights_sha256=recipes.weights_sha256(folder),
    )
    return asdict(made)


def fuse_again(path: str | Path, out: str | Path, *, overwrite: bool = False, on_event: OnEvent = ignore) -> FuseResult:
    """Fuse once more by a recipe (or the folder that holds one).

    Raises IncompatibleError if base, adapter or text are not what they were; then nothing is written. If the bytes
    come out differently all the same (another version or processor), `on_event` gets a warning.
    """
    recipe = recipes.read_recipe(path)
    base, adapters = recipes.ingredients(recipe)
    options = FuseOptions(**recipe.options)
    if recipe.text is not None:
        tokenizer = load_tokenizer_of(base)
        text = choose_text(options.calibration, adapters, tokenizer, options.calibration_rows, options.check_rows)
        if text.sha256 != recipe.text["sha256"]:
            raise IncompatibleError(f"The text '{text.source}' is not the one of the recipe any more.")
    weights = [entry["weight"] for entry in recipe.adapters]
    given = [entry["reference"] for entry in recipe.adapters]
    result = fuse(
        base, given, out, quantization=recipes.precision_from_json(recipe.quantization) or "none",
        dtype=recipe.dtype, weights=weights, options=options, overwrite=overwrite, any_base=True, on_event=on_event,
    )  # fmt: skip
    unlike = recipes.differences(recipe, recipes.read_recipe(out))
    on_event(Note(unlike, "warning") if unlike else Note("The weights are the recipe's, byte for byte."))
    return replace(result, identical=unlike is None)
