"""An adapter made out of a fine-tune of a model that has more than linear layers."""

from helpers.fusing import visible_adapter

from mlx_adapters.config.fusing import FuseOptions
from mlx_adapters.fusion.fuse import fuse
from mlx_adapters.merging.extraction import extract


def test_matrices_that_no_adapter_takes_are_left_out_by_name(tiny_model, tmp_path):
    """MLA's are packed in the fine-tune as in the base, in other bits."""
    base = tiny_model("deepseek_v3", bits=4)
    fused = fuse(
        base,
        visible_adapter(base),
        tmp_path / "out",
        quantization=8,
        options=FuseOptions(method="nearest", check=False),
    ).folder
    left_out = extract(fused, base, rank=2).metadata["extract"]["left_out"]
    assert any("unembed_out" in name for name in left_out) and not any("_proj" in name for name in left_out)
