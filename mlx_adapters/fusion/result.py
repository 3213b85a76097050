"""What came of a fuse: as data, and as a page for people."""

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlx_adapters.assembly.survival import Survival, mean_cosine
from mlx_adapters.calibration.fidelity import Fidelity
from mlx_adapters.config.quantization import QUANTIZATIONS
from mlx_adapters.display import charts, page
from mlx_adapters.display.layout import COLORS, Chart
from mlx_adapters.display.notebook import html_block, html_facts, html_table
from mlx_adapters.display.tables import Table, flat
from mlx_adapters.errors import AdapterError
from mlx_adapters.models.metadata import is_number
from mlx_adapters.storage.tensor_files import stored_tensors
from mlx_adapters.storage.tensor_names import BIASES, SCALES, split
from mlx_adapters.units import count, duration, number, size

UNQUANTIZED = "left unquantized"


@dataclass(frozen=True)
class FuseResult(Table):
    """A fused model.

    Args:
        folder: where it lies.
        method: how it was rounded: "nearest", "calibrated" or "none".
        quantization: bits, group size and mode as in the model's config; None if it is not quantized.
        size_bytes: of the weight files.
        bits_per_weight: over all tensors that mlx-lm uses.
        survival: for each changed layer, how much of the update the stored weights hold.
        fidelity: the distance to the adapter model on text kept aside; None if it was not checked.
        text: which text that was.
        notes: where a layer is not as asked.
        seconds: of the whole fuse.
        opened_with: what to type to open it in the program that it was made for.
        identical: after `fuse_again`: whether the weight files have the bytes that the recipe records.

    Example:
        >>> options = ma.FuseOptions(method="nearest", check=False)
        >>> fused = ma.fuse("demo", "sql", "out/nearest", quantization=4, options=options)
        >>> fused.method, fused.fidelity
        ('nearest', None)
        >>> fused.size_bytes > 0 and fused.bits_per_weight > 4
        True
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
    opened_with: tuple[str, ...] = ()
    identical: bool | None = None

    def records(self) -> list[dict[str, Any]]:
        """One for each changed layer: how much of its update was kept."""
        return [flat(layer) for layer in self.survival]

    @property
    def reference(self) -> str:
        """How it is spelled where a model is asked for."""
        return str(self.folder)

    @property
    def update_survival(self) -> float:
        """The mean over the changed layers of the cosine between the update wanted and the one stored."""
        return mean_cosine(self.survival)

    def _repr_html_(self) -> str:
        facts = {
            "rounding": self.method,
            "bits per weight": f"{self.bits_per_weight:.2f}",
            "size": size(self.size_bytes),
            "update survival (cosine)": f"{self.update_survival:.4f}",
        }
        checked = html_table(*self.fidelity.table()) if self.fidelity else ""
        return html_block(self.folder.name, html_facts(facts), checked)

    def __repr__(self) -> str:
        kl = f", KL {self.fidelity.kl_mean:.2g}" if self.fidelity else ""
        return (
            f"FuseResult('{self.folder.name}', {self.method}, {self.bits_per_weight:.2f} bits per weight, "
            f"{size(self.size_bytes)}, update survival {self.update_survival:.4f}{kl})"
        )


def report(result: FuseResult) -> dict[str, Any]:
    """What fuse_report.json says; JSON has no number for what is infinite."""
    plain = asdict(result) | {"folder": str(result.folder), "update_survival": result.update_survival}
    if result.fidelity:
        plain["fidelity"] |= {
            "perplexity_adapter": result.fidelity.perplexity_adapter,
            "perplexity_fused": result.fidelity.perplexity_fused,
        }
        plain["fidelity"] = {key: value if is_number(value) else None for key, value in plain["fidelity"].items()}
    return plain


def bits_by_part(result: FuseResult) -> dict[str, float]:
    """Where the bits per weight go, by what the files hold: "weights", the "scales" of groups, and what is
    "not quantized". Empty for a model without quantization, and for a format that is not MLX's."""
    if not result.quantization:
        return {}
    parts = {"weights": 0, "scales": 0, "not quantized": 0}
    try:
        tensors = [
            one for file in sorted(result.folder.glob("model*.safetensors")) for one in stored_tensors(file).items()
        ]
    except AdapterError:
        return {}
    scaled = {name.removesuffix(f".{SCALES}") for name, _ in tensors if name.endswith(f".{SCALES}")}
    for name, tensor in tensors:
        layer, _, leaf = name.rpartition(".")
        kind = "not quantized" if layer not in scaled else "scales" if leaf in (SCALES, BIASES) else "weights"
        parts[kind] += tensor.nbytes
    total = sum(parts.values())
    return {kind: result.bits_per_weight * nbytes / total for kind, nbytes in parts.items()} if total else {}


def html(result: FuseResult) -> str:
    """The report of a fuse as a page: the verdict, how far from the adapter and where the bits are, then each layer."""
    verdict = result.fidelity.verdict if result.fidelity else "What fusing lost was not measured."
    what = f"{result.bits_per_weight:.2f} bits per weight, {size(result.size_bytes)}"
    bits = bits_by_part(result)
    drawn = distance_charts(result.fidelity)
    if bits:
        drawn["Bits"] = charts.stacked({"bits per weight": bits}, "Bits per weight by part", "bits per weight", number)
    how = f"{result.method} rounding, {changed(result)}in {duration(result.seconds)}."
    text = result.text if result.method == "calibrated" else None
    on_text = [f"Calibrated on {text['calibration_rows']} rows of {text['source']}."] if text else []
    return page.html(
        f"Fused: {result.folder.name}, {what}",
        verdict,
        page.section("", page.pictures(drawn, headed=False)),
        page.warning(result.notes),
        page.section("The bits", page.bullets(_of_bits(result, bits))),
        *check_parts(result.fidelity, result.text),
        layers(result.survival, result.quantization),
        page.section("How it was made", page.paragraphs([how, *on_text, *result.opened_with])),
    )


def unquantized(result: FuseResult) -> str:
    """A sentence on layers that the groups asked for do not fit; empty where there are none."""
    return next((f"{note}." for note in result.notes if UNQUANTIZED in note), "")


def changed(result: FuseResult) -> str:
    """How many layers the adapters changed, for a list of facts; empty where there was no adapter."""
    return f"{count(len(result.survival), 'layer')} changed, " if result.survival else ""


def _of_bits(result: FuseResult, parts: dict[str, float]) -> list[str]:
    """Why a weight takes more bits than were asked for."""
    asked = result.quantization
    if not asked:
        return []
    said = [
        f"Asked for: {asked['bits']} bits in groups of {asked['group_size']}. On the disk it is "
        f"{result.bits_per_weight:.2f} bits per weight, everything counted."
    ]
    if parts:
        rest = number(parts["not quantized"], 2)
        said.append(
            f"{parts['scales']:.2f} of them are {_of_scales(asked)}; {rest} are tensors that stay as they are, "
            "such as norms."
        )
    others: dict[str, list[str]] = {}
    for path, own in asked.items():
        if isinstance(own, dict) or own is False:
            name = f"at {own['bits']} bits in groups of {own['group_size']}" if own else "not quantized"
            others.setdefault(name, []).append(path)
    for name, paths in others.items():
        named = f": {', '.join(paths)}" if len(paths) <= 3 else ""
        said.append(f"{count(len(paths), 'layer')} {name}{named}.")
    return said


def _of_scales(asked: dict[str, Any]) -> str:
    """What each group of weights brings along: only affine ones have an offset and come in several sizes."""
    every = [one for one in (asked, *asked.values()) if isinstance(one, dict)]
    affine = [one.get("mode", "affine") == "affine" for one in every]
    if all(affine):
        larger = any(one["group_size"] < max(QUANTIZATIONS["affine"][1]) for one in every)
        fewer = ". Larger groups (--group-size) take fewer" if larger else ""
        return f"scales and offsets: a pair for each group of weights{fewer}"
    return "scales: a scale for each group of weights" + (", with an offset in affine layers" if any(affine) else "")


def distance_charts(fidelity: Fidelity | None) -> dict[str, Chart]:
    """How far the fused model and the base are from the adapter model, against their losses; none without a check."""
    if fidelity is None:
        return {}
    models = {
        fidelity.judged_by: (fidelity.loss_adapter, 0.0),
        "fused": (fidelity.loss_fused, fidelity.kl_mean),
        "base": (fidelity.loss_base, fidelity.base_kl),
    }
    chart = charts.distances(models)
    return {chart.title: chart} if chart else {}


def check_parts(fidelity: Fidelity | None, text: dict[str, Any] | None) -> list[str]:
    """What the check found, with what its figures mean."""
    if fidelity is None:
        return []
    where = f" of {text['source']}" if text else ""
    said = (
        f"On {fidelity.tokens:,} tokens of {count(fidelity.rows, 'row')} kept aside{where}. KL is the mean distance "
        f"from {fidelity.reference} in nats per token, 0 where nothing was lost; SAME TOP the share of tokens where "
        "both put the same one first."
    )
    why = [f"That is the general text, because: {text['why']}"] if text and text.get("why") else []
    return [page.section("The check", page.table(*fidelity.table()), page.paragraphs([said, *why]))]


def layers(survival: tuple[Survival, ...], quantization: dict[str, Any] | None) -> str:
    """Every changed layer, with its bits and what the stored weights hold of the update; empty where none is."""
    if not survival:
        return ""

    def bits(path: str) -> str:
        own = (quantization or {}).get(path, quantization)
        return str(own.get("bits", "-")) if isinstance(own, dict) else "-"

    said = (
        "UPDATE is how strong the adapter is there, beside the weights. COSINE and STRENGTH compare the update in the "
        "file with the one wanted. Rounding adds an error that has nothing to do with it, so a light update has a low "
        "cosine and still does its work: what counts is the check."
    )
    lines = [
        (s.path, bits(s.path), f"{s.update_ratio:.2%}", f"{s.cosine:.4f}", f"{s.norm_ratio:.2f}") for s in survival
    ]
    curves: dict[str, list[tuple[float, float]]] = {}
    for s in survival:
        if block := re.search(r"\.(\d+)\.", s.path):
            curves.setdefault(split(s.path)[1], []).append((float(block[1]), s.cosine))
    curves = {kind: sorted(points) for kind, points in list(curves.items())[: len(COLORS)] if len(points) > 1}
    title = "Update kept (cosine) by block"
    drawn = {title: charts.lines(curves, title, "block", "cosine")} if curves else {}
    return page.folded(
        f"{count(len(survival), 'changed layer')}",
        page.paragraphs([said]),
        page.pictures(drawn, headed=False),
        page.table(("LAYER", "BITS", "UPDATE", "COSINE", "STRENGTH"), lines),
    )
