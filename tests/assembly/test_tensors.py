"""A fused model holds none of its base's packed tensors where it is to hold none, whatever layers they are of."""

import mlx.core as mx
import pytest
from helpers.fusing import IDS, visible_adapter
from helpers.tiny_configs import tiny_base
from mlx_lm.utils import load_model as load_as_mlx_lm_does

from mlx_adapters.config.fusing import FuseOptions
from mlx_adapters.fusion.fuse import fuse
from mlx_adapters.models.loading import load_model
from mlx_adapters.sources.bases import resolve_base
from mlx_adapters.storage import files


@pytest.mark.parametrize("form", ["mlx", "hf"])
@pytest.mark.parametrize("architecture", ["deepseek_v3", "minicpm3", "qwen3_moe"])
def test_layers_of_all_kinds_become_unquantized(architecture, form, tmp_path):
    """MLA's embed_q and unembed_out are matrices for each head (QuantizedMultiLinear), experts lie in stacks."""
    base = tiny_base(tmp_path / "base", architecture)
    adapter = visible_adapter(base)
    options = FuseOptions(method="nearest", check=False, format=form)
    fuse(base, adapter, tmp_path / "out", quantization="none", options=options)
    assert "quantization" not in files.read_json(tmp_path / "out" / "config.json")
    module, _ = load_as_mlx_lm_does(tmp_path / "out")
    module.set_dtype(mx.float32)
    expected = load_model(resolve_base(base), adapter).logits(IDS)
    assert mx.abs(module(IDS) - expected).max().item() < 1e-3 * mx.abs(expected).max().item()
