"""The types of a GGUF file's tensors: codes go over, 8 bits are the file's own, what is kept is kept."""

import gguf
import mlx.core as mx
import numpy as np
import pytest
from helpers.fusing import fuse, visible_adapter
from mlx.utils import tree_flatten

from mlx_adapters.config.fusing import FuseOptions
from mlx_adapters.models.dense import dense_weight
from mlx_adapters.models.layers import weight_layers
from mlx_adapters.models.loading import load_module
from mlx_adapters.sources.bases import resolve_base
from mlx_adapters.storage.tensor_names import from_gguf

GGUF = FuseOptions(method="nearest", check=False, format="gguf")
UP = "model.layers.1.mlp.up_proj"


def read(folder):
    """MLX's name -> (type, float32 values) of a file of a model whose rows stay where they are."""
    tensors = gguf.GGUFReader(folder / "model.gguf").tensors
    values = {from_gguf(t.name): (t.tensor_type.name, gguf.quants.dequantize(t.data, t.tensor_type)) for t in tensors}
    return values


def dense(folder):
    """MLX's name -> float32 values of a model folder."""
    module = load_module(resolve_base(folder))[0]
    made = dict(tree_flatten(module.parameters()))
    made |= {f"{path}.weight": dense_weight(layer, mx.float32) for path, layer in weight_layers(module).items()}
    return {name: np.array(value.astype(mx.float32)) for name, value in made.items()}


@pytest.mark.parametrize(("bits", "form"), [(4, "Q4_1"), (5, "Q5_1")])
def test_calibrated_codes_go_over_without_a_second_rounding(tiny_model, tmp_path, bits, form):
    """The file holds the very numbers of mlx-lm's format with the same groups and scales, calibration included."""
    folder = tiny_model("qwen3")
    adapter = visible_adapter(folder)
    (tmp_path / "text.txt").write_text("\n\n".join(f"Row {i} of a text to calibrate on, {i}." for i in range(120)))
    common = {"method": "calibrated", "calibration": tmp_path / "text.txt", "calibration_rows": 8, "check": False}
    made = fuse(folder, adapter, tmp_path / "gguf", quantization=bits, options=FuseOptions(format="gguf", **common))
    grid = {"bits": bits, "group_size": 32}
    fuse(folder, adapter, tmp_path / "mlx", quantization=grid, dtype="float16", options=FuseOptions(**common))
    wanted, written = dense(tmp_path / "mlx"), read(tmp_path / "gguf")
    assert made.method == "calibrated"
    packed = [name for name, (kind, _) in written.items() if kind == form]
    assert len(packed) == 16
    for name in packed:
        np.testing.assert_array_equal(written[name][1], wanted[name], err_msg=name)


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize(("bits", "form"), [(2, "Q4_1"), (3, "Q4_1"), (4, "Q4_1"), (5, "Q5_1")])
def test_keep_hands_on_the_bases_codes(tiny_model, tmp_path, bits, form, group):
    folder = tiny_model("qwen3", bits=bits, group_size=group, dtype="bfloat16", hidden_size=128)
    fuse(folder, visible_adapter(folder, targets=["up_proj"]), tmp_path / "out", options=GGUF)
    before, written = dense(folder), read(tmp_path / "out")
    packed = {name for name, (kind, _) in written.items() if kind == form}
    assert len(packed) >= 12 and f"{UP}.weight" in packed
    for name in packed:
        if "up_proj" not in name:
            np.testing.assert_array_equal(written[name][1], before[name], err_msg=name)


def test_a_changed_layer_of_a_kept_base_uses_finer_groups_at_no_cost(tiny_model, tmp_path):
    folder = tiny_model("qwen3", bits=4, group_size=64)
    adapter = visible_adapter(folder, targets=["up_proj"])
    fuse(folder, adapter, tmp_path / "out", options=GGUF)
    fuse(folder, adapter, tmp_path / "exact", quantization="none", dtype="float32")
    fuse(folder, adapter, tmp_path / "mlx")
    exact, kept, written = dense(tmp_path / "exact"), dense(tmp_path / "mlx"), read(tmp_path / "out")
    name = f"{UP}.weight"
    assert np.square(written[name][1] - exact[name]).mean() < 0.9 * np.square(kept[name] - exact[name]).mean()


@pytest.mark.parametrize(("bits", "mode"), [(6, "affine"), (8, "affine"), (8, "mxfp8"), (4, "nvfp4")])
def test_what_gguf_has_no_grid_for_becomes_q8_0_from_unrounded_numbers(tiny_model, tmp_path, bits, mode):
    folder = tiny_model("qwen3", bits=bits, mode=mode, group_size=16 if mode == "nvfp4" else 32)
    adapter = visible_adapter(folder, targets=["up_proj"])
    made = fuse(folder, adapter, tmp_path / "out", options=GGUF)
    fuse(folder, adapter, tmp_path / "exact", quantization="none", dtype="float32")
    exact, written = dense(tmp_path / "exact"), read(tmp_path / "out")
    assert made.method == "nearest"
    for name, (kind, values) in written.items():
        if kind == "Q8_0":
            np.testing.assert_allclose(values, exact[name], atol=np.abs(exact[name]).max() / 127 * 0.52)
    assert sum(kind == "Q8_0" for kind, _ in written.values()) == 16


def test_mxfp4_stays_mxfp4(tiny_model, tmp_path):
    folder = tiny_model("qwen3", bits=4, mode="mxfp4")
    fuse(folder, visible_adapter(folder, targets=["up_proj"]), tmp_path / "out", options=GGUF)
    before, written = dense(folder), read(tmp_path / "out")
    assert sum(kind == "MXFP4" for kind, _ in written.values()) == 16
    for name, (kind, values) in written.items():
        if kind == "MXFP4" and "up_proj" not in name:
            np.testing.assert_array_equal(values, before[name], err_msg=name)
