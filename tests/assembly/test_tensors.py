"""A fused model holds none of its base's packed tensors where it is to hold none, whatever layers they are of."""

import shutil
from dataclasses import astuple
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from helpers.fusing import IDS, visible_adapter
from helpers.tiny_configs import tiny_base
from mlx_lm.utils import load_model as load_as_mlx_lm_does

from mlx_adapters.assembly import survival, tensors
from mlx_adapters.assembly.tensors import Assembly
from mlx_adapters.config.fusing import FuseOptions
from mlx_adapters.config.quantization import Quantization
from mlx_adapters.fusion.fuse import fuse
from mlx_adapters.models.loading import load_model
from mlx_adapters.rounding.packed import Packed, dequantize
from mlx_adapters.sources.bases import resolve_base
from mlx_adapters.storage import files
from mlx_adapters.storage.tensor_names import FUSE_RECIPE_FILE, QUANTIZED_LEAVES, SCALES
from mlx_adapters.system.machine import on_gpu

FILE = "model.safetensors"


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


def require_same(whole: Path, parted: Path) -> None:
    """The same tensors; to the byte on a CPU. A GPU rounds a product of half the rows otherwise than one of all, by
    some last bits, which moves a code here and there to the next one."""
    assert on_gpu() or (whole / FILE).read_bytes() == (parted / FILE).read_bytes()
    one, other = (dict(mx.load(str(folder / FILE))) for folder in (whole, parted))
    written = files.read_json(whole / "config.json")["quantization"]
    rounded = [name.removesuffix(".scales") for name in one if name.endswith(".scales")]
    assert len(rounded) > 8 and one.keys() == other.keys()
    for path in rounded:
        q = written.get(path, written)  # a router has more bits
        own = Quantization(q["bits"], q["group_size"])
        leaves = [{leaf: given.pop(f"{path}.{leaf}") for leaf in QUANTIZED_LEAVES} for given in (one, other)]
        first, second = (dequantize(Packed.of(parts, own)) for parts in leaves)
        apart, steps = mx.abs(first - second), mx.repeat(mx.abs(leaves[0][SCALES]), own.group_size, axis=-1)
        assert (apart <= 1.01 * steps).all().item(), path  # codes by one at most
        assert (apart > 1e-3 * steps).sum().item() <= 2 + apart.size / 1000, path  # and few of them
    assert all(mx.array_equal(one[name], other[name]).item() for name in one)


@pytest.mark.parametrize("architecture", ["llama", "qwen3_moe"])
def test_the_next_layer_is_begun_before_this_one_is_written_and_in_pieces_as_on_a_gpu_it_is_the_same(
    architecture, tmp_path, monkeypatch
):
    base = tiny_base(tmp_path / "base", architecture)
    ingredients, options = (base, visible_adapter(base)), FuseOptions(method="nearest", check=False)
    monkeypatch.setattr(tensors, "sample", lambda rows: slice(None))
    whole = fuse(*ingredients, tmp_path / "alone", quantization=4, options=options)
    began, rows, make = [], Assembly._rows, Assembly._make_layer
    monkeypatch.setattr(survival, "on_gpu", lambda: True)
    monkeypatch.setattr(tensors, "chunks", lambda shape: [(0, shape[0] // 2), (shape[0] // 2, shape[0])])
    monkeypatch.setattr(Assembly, "_rows", lambda own, plan, packed: began.append(plan.path) or rows(own, plan, packed))
    monkeypatch.setattr(Assembly, "_make_layer", lambda own, plan, some: began.append("") or make(own, plan, some))
    made = fuse(*ingredients, tmp_path / "ahead", quantization=4, options=options)
    require_same(tmp_path / "alone", tmp_path / "ahead")
    assert len([path for path in began if path]) == len(set(began)) - 1 >= len(made.survival) > 8
    for one, other in zip(made.survival, whole.survival, strict=True):
        assert astuple(one)[1:] == pytest.approx(astuple(other)[1:], rel=1e-4)
    order = "".join("b" if path else "m" for path in began)
    assert "bbm" in order and "bbb" not in order
    recorded = files.read_json(tmp_path / "ahead" / FUSE_RECIPE_FILE)["weights_sha256"]
    assert recorded == {FILE: files.sha256(tmp_path / "ahead" / FILE)}


@pytest.mark.parametrize("deviation, lost", [(1e-3, True), (0.02, False), (1e5, True)])
def test_a_layer_that_nvfp4_cannot_hold_is_told(tiny_model, tmp_path, deviation, lost):
    """Its scales are floats of 8 bits: what is small becomes 0, what is large is cut off; also without a check, and in
    layers that no adapter touches. mxfp4's are powers of two, which hold it."""
    base = shutil.copytree(tiny_model("llama"), tmp_path / "base")
    weights, path = dict(mx.load(str(base / "model.safetensors"))), "model.layers.1.mlp.up_proj"
    noise = np.random.default_rng(0).standard_normal(weights[f"{path}.weight"].shape) * deviation
    mx.eval(weights)
    mx.save_safetensors(str(base / "model.safetensors"), weights | {f"{path}.weight": mx.array(noise, mx.float32)})
    adapter = visible_adapter(base, targets=("q_proj",))
    for mode, told in (("nvfp4", lost), ("mxfp4", False)):
        quantization = Quantization(4, 16 if mode == "nvfp4" else 32, mode)
        options = FuseOptions(method="nearest", check=False)
        result = fuse(base, adapter, tmp_path / mode, quantization=quantization, options=options)
        words = [note for note in result.notes if "nvfp4" in note]
        assert len(words) == told and all(f"'{path}'" in note for note in words), words
