"""What came of a fuse."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlx_adapters.assembly.survival import Survival, mean_cosine
from mlx_adapters.calibration.fidelity import Fidelity
from mlx_adapters.display.notebook import html_block, html_facts, html_table
from mlx_adapters.display.tables import Table, flat
from mlx_adapters.units import size


@dataclass(frozen=True)
class FuseResult(Table):
    """A fused model.

    Args:
        folder: where it lies.
        method: how it was rounded: "nearest", "calibrated" or "none".
        quantization: bits, group size and mode as in the model's config; None if it is not quantized.
        size_bytes: of the weight files.
        bits_per_weight: over all tensors.
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
    """What fuse_report.json says."""
    plain = asdict(result) | {"folder": str(result.folder), "update_survival": result.update_survival}
    if result.fidelity:
        plain["fidelity"] |= {
            "perplexity_adapter": result.fidelity.perplexity_adapter,
            "perplexity_fused": result.fidelity.perplexity_fused,
        }
    return plain
