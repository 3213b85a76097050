"""The part of a fuse that reads text: which method and precision, calibration, and the check."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Literal

from mlx_adapters.assembly.spool import Spool
from mlx_adapters.assembly.tensors import Assembly
from mlx_adapters.assembly.weights import Updates
from mlx_adapters.assembly.writing import dtype_name
from mlx_adapters.calibration.blockwise import BlockwiseModel, with_rounded
from mlx_adapters.calibration.calibrate import round_layers
from mlx_adapters.calibration.collecting import FORWARD
from mlx_adapters.calibration.fidelity import Fidelity, Variants, measured
from mlx_adapters.calibration.mixed import (
    finer,
    layer_bytes,
    order_of_steps,
    targets_after,
    until_promise,
    within_budget,
)
from mlx_adapters.calibration.polish import TUNING_PASSES, polished
from mlx_adapters.calibration.texts import Text, as_memory_allows, choose_text, tokens_in
from mlx_adapters.config.fusing import FuseOptions
from mlx_adapters.config.mapping import to_mapping
from mlx_adapters.config.quantization import Quantization
from mlx_adapters.data.batches import TokenBatch, TokenRow
from mlx_adapters.data.datasets import spread
from mlx_adapters.errors import AdapterError, ConfigError, ModelError
from mlx_adapters.events import Event, Note, OnEvent, Progress
from mlx_adapters.models.adapter import templates_of
from mlx_adapters.models.base import Base
from mlx_adapters.models.loading import load_tokenizer_of
from mlx_adapters.rounding.packed import dequantize, to_nearest
from mlx_adapters.system.door import mx
from mlx_adapters.units import count

Method = Literal["none", "nearest", "calibrated", "auto"]
THROUGH = (
    "The adapter was trained through this rounding (--fuse-aware), so its layers are rounded to nearest, as they were "
    "then. Judge by the loss: the KL is from the adapter before rounding, which it was not trained to equal. After a "
    "short training, compare with --method calibrated."
)
JUDGING_ROWS = 8  # at least, and a tenth of the calibration rows
NEAREST = "on the calibration rows that keeps more of the adapter than calibration does; more rows may help"
UNKNOWN = "calibration does not see what it computes of which token"


class Strategy:
    """Rounding and checking of one assembly: which method, on which text, at which precision."""

    def __init__(self, assembly: Assembly, options: FuseOptions, on_event: OnEvent) -> None:
        self.assembly, self.options, self.on_event = assembly, options, on_event
        targets = {plan.rounded_to for plan in assembly.plans if plan.rounded_to is not None}
        self.trained_through = trained_through(assembly.updates, targets)
        self.method = self._choose_method(targets)
        self.targets: dict[str, Quantization | None] = {}
        self.notes: tuple[str, ...] = ()
        self.calibrated_in_vain = False
        self._refuse_small_budget()
        if options.thorough or options.method == "calibrated":
            if self.method == "none":
                self.warn(
                    "No layer is rounded, so nothing is calibrated or tuned; --bits says how many bits to round to"
                )
            elif self.method == "nearest" and not self.trained_through:
                self.warn("Layers are rounded to nearest, so no scales are tuned; --method calibrated goes with it")
        self.text: Text | None = None
        if self.method == "calibrated" or options.check:
            self.text = self._choose_text()

    def _choose_method(self, targets: set[Quantization]) -> Method:
        if not targets or self.options.method != "auto":
            return self.options.method if targets else "none"
        if self.trained_through and not self.options.mixed:
            self.on_event(Note(THROUGH))
            return "nearest"
        return "calibrated" if self.options.mixed or any(target.bits < 8 for target in targets) else "nearest"

    def warn(self, text: str) -> None:
        """Tell it now and in the result; `text` without a full stop."""
        self.notes += (text,)
        self.on_event(Note(f"{text}.", "warning"))

    def _choose_text(self) -> Text | None:
        adapters = [adapter for adapter, _ in self.assembly.updates.adapters]
        o = self.options
        try:
            tokenizer = load_tokenizer_of(self.assembly.base, templates_of(self.assembly.base, adapters)[0])
            text = choose_text(o.calibration, adapters, tokenizer, o.calibration_rows, o.check_rows, self.assembly.base)
            for tokens, _ in [*text.calibration, *text.check]:
                self.assembly.base.check_tokens(tokens, text.source)
            return text
        except AdapterError as error:
            if o.calibration is not None or o.method == "calibrated" or self.options.mixed:
                raise
            self.warn(f"No calibration and no check: {error.message.removesuffix('.')}")
            self.method = "nearest" if self.method == "calibrated" else self.method
            return None

    def _refuse_small_budget(self) -> None:
        budget = self.options.budget_bits
        if budget is None:
            return
        now = 8 * self.assembly.size_bytes() / self.assembly.parameters
        if now > budget:
            raise ConfigError(
                f"The model has {now:.2f} bits per weight already, more than the {budget} allowed.",
                "start with a smaller --bits, or allow a larger budget.",
            )

    def disk_bytes(self) -> int:
        """Bytes that the fused model takes on the disk at most, with what calibration keeps beside it until then."""
        size, assembly = self.assembly.size_bytes(), self.assembly
        if self.method != "calibrated" or self.text is None:
            return size
        kept = 0
        for plan in assembly.plans:
            if plan.rounded_to:
                every = {plan.rounded_to, *self._finer()}
                made = [layer_bytes(plan, q, dtype_name(assembly.scale_dtype)) for q in every]
                kept += sum(made) + (max(made) if self.options.thorough else 0)
                size += max(made) - min(made)  # the finest may be chosen
        return kept + size

    def _finer(self) -> set[Quantization]:
        """The precisions besides their own that layers are rounded to, to choose from."""
        return (
            {q for plan in self.assembly.plans if plan.rounded_to for q in finer(plan.rounded_to)}
            if self.options.mixed
            else set()
        )

    def round(self, spool: Spool) -> None:
        """Fill `spool` with calibrated layers and settle mixed precision."""
        if self.method != "calibrated" or self.text is None:
            return
        assembly = self.assembly
        why = f" {self.text.why}" if self.text.why else ""
        self.on_event(Note(f"Calibrating on {count(len(self.text.calibration), 'row')} of {self.text.source}.{why}"))
        unknown = self._round_layers(spool, self.text.calibration)
        if unknown is None:
            return
        self.notes += tuple(f"{path}: rounded to nearest: {UNKNOWN}" for path in unknown)
        if unknown:
            layers = count(len(unknown), "layer")
            self.on_event(Note(f"{layers} rounded to nearest; {unknown[0]}: {UNKNOWN}.", "warning"))
        if spool.nearest:
            layers = count(len(spool.nearest), "layer")
            self.notes += (f"rounding to nearest was better than calibration for {layers} of {len(spool.losses)}",)
        if self.options.mixed:
            self.targets = self._choose_targets(spool)
            assembly.retarget(self.targets)
        promised = self.options.max_kl is not None  # of what was measured, which stays
        if not promised and self._nearest_is_better(spool, self.text.calibration):
            self._round_to_nearest(spool, NEAREST)
        elif self.options.thorough:
            self._polish(spool, self.text.calibration)

    def _round_layers(self, spool: Spool, rows: list[TokenRow]) -> list[str] | None:
        """Fill `spool`: `round_layers`, or None where the model has no gradient to calibrate by."""
        assembly, options = self.assembly, self.options
        dtype = assembly.scale_dtype  # which opens the files
        assembly.close()

        def run(batches: list[TokenBatch]) -> list[str] | None:
            try:
                return round_layers(
                    assembly.base,
                    assembly.updates,
                    assembly.plans,
                    batches,
                    dtype,
                    spool,
                    self._foretelling(rows),
                    self._finer(),
                    options.seed,
                    options.thorough,
                )
            except ModelError as error:
                if self.options.mixed or options.method == "calibrated":
                    raise
                self._round_to_nearest(spool, error.message.rstrip("."))
                return None

        return as_memory_allows(run, rows, assembly.base, "; --method nearest takes the least")

    def _foretelling(self, rows: list[TokenRow]) -> OnEvent:
        """`on_event`, told with the progress of rounding what comes later, by the pace of the forward pass: judging
        takes three models through other rows, tuning a pass is three as long."""
        check = self.text.check if self.text and self.options.check else []
        share = 3 * (tokens_in(self._judging(rows)) + tokens_in(check)) / max(tokens_in(rows), 1)
        share += 3 * TUNING_PASSES if self.options.thorough else 0
        began, forward = time.monotonic(), 0.0

        def on_event(event: Event) -> None:
            nonlocal forward
            if isinstance(event, Progress) and event.stage == FORWARD:
                forward = time.monotonic() - began
            elif isinstance(event, Progress):
                event = replace(event, later=share * forward)
            self.on_event(event)

        return on_event

    def _polish(self, spool: Spool, rows: list[TokenRow]) -> None:
        """Tune the scales of what calibration rounded, and tell what that brought."""
        try:
            told = polished(self.assembly, spool, self._rounded(spool), rows, self.on_event)
        except ModelError as error:
            return self.warn(f"Scales were not tuned: {error.message.removesuffix('.')}")
        self.notes += (told,)
        self.on_event(Note(f"{told}."))

    def _round_to_nearest(self, spool: Spool, why: str) -> None:
        self.method, self.calibrated_in_vain = "nearest", True
        self.notes += (f"rounded to nearest: {why}",)
        self.on_event(Note(f"Rounded to nearest: {why}."))
        spool.remove()

    def _rounded(self, spool: Spool) -> dict[str, Quantization | None]:
        """The precision of the layers that calibration rounded."""
        return {plan.path: plan.target for plan in self.assembly.plans if (plan.path, plan.target) in spool.losses}

    def _judging(self, rows: list[TokenRow]) -> list[TokenRow]:
        return spread(rows, max(JUDGING_ROWS, len(rows) // 10))

    def _nearest_is_better(self, spool: Spool, rows: list[TokenRow]) -> bool:
        """Whether the whole model, at the chosen precisions, strays less on (some of) the calibration rows with all
        layers rounded to nearest.

        Layers are judged one by one before; few rows do not tell how their errors add up.
        """
        assembly, targets = self.assembly, self._rounded(spool)

        def variants() -> Variants:
            exact = BlockwiseModel(assembly.base, assembly.updates)

            def nearest(path: str) -> mx.array | None:
                target = targets.get(path)
                whole = plain.source.fused(path, assembly.updates)
                return target and dequantize(to_nearest(whole, target, assembly.scale_dtype))

            plain = BlockwiseModel(assembly.base, assembly.updates, touched.__contains__, nearest, exact)
            return exact, with_rounded(assembly, spool, targets, exact), plain

        touched = set(targets) | assembly.updates.paths()
        assembly.close()
        fidelity = measured(variants, self._judging(rows), assembly.base)
        return fidelity.base_kl is not None and fidelity.base_kl < fidelity.kl_mean

    def _choose_targets(self, spool: Spool) -> dict[str, Quantization | None]:
        assembly, options = self.assembly, self.options
        steps = order_of_steps(assembly.plans, spool.losses, dtype_name(assembly.scale_dtype))
        if options.budget_bits is not None:
            spare = options.budget_bits * assembly.parameters / 8 - assembly.size_bytes()
            return targets_after(within_budget(steps, int(spare)))
        start = self._rounded(spool)
        total = sum(spool.losses[path, target] for path, target in start.items() if target is not None)
        rows = self.text.check if self.text else []

        def measure(targets: dict[str, Quantization | None]) -> float:
            chosen = start | targets

            def variants() -> Variants:
                exact = BlockwiseModel(assembly.base, assembly.updates)
                return exact, with_rounded(assembly, spool, chosen, exact), None

            assembly.close()
            return measured(variants, rows, assembly.base).kl_mean

        enough = until_promise(steps, total, options.max_kl or 0.0, measure, self.on_event)
        return targets_after(steps[:enough])

    def check(self, folder: Path) -> Fidelity | None:
        """The fidelity of the model in `folder`, or None if it is not to be checked."""
        if not self.options.check or self.text is None:
            return None
        assembly = self.assembly
        changed = {plan.path for plan in assembly.plans if not plan.copied}

        def variants() -> Variants:
            whole = Base(str(folder), folder)
            fused = BlockwiseModel(whole, None, changed.__contains__ if assembly.dtype is None else lambda _: True)
            exact = BlockwiseModel(assembly.base, assembly.updates)
            base = BlockwiseModel(assembly.base, beside=exact) if assembly.updates.paths() else None  # `exact` again
            return exact, fused, base

        return measured(variants, self.text.check, assembly.base, self.on_event)


def trained_through(updates: Updates, targets: set[Quantization]) -> bool:
    """Whether this is one adapter, whole, that saw the rounding to `targets` in its training."""
    if len(updates.adapters) != 1 or updates.replaced:
        return False
    adapter, share = updates.adapters[0]
    training = adapter.metadata.get("training")
    if share != 1 or not isinstance(training, dict):
        return False
    rounded = adapter.iteration is None or adapter.iteration > training.get("fuse_aware_from", 0)
    return rounded and [to_mapping(target) for target in targets] == [training.get("fuse_aware")]
