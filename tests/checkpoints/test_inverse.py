"""A checkpoint's tensors come back from those of the model that mlx-lm makes of it."""

import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from helpers.fusing import fuse, visible_adapter
from helpers.peft import FIXTURES
from helpers.tiny_configs import make_model, tiny_base, tiny_config
from mlx.utils import tree_flatten

from mlx_adapters.checkpoints.inverse import groups_of
from mlx_adapters.checkpoints.originals import layout_of
from mlx_adapters.checkpoints.probing import trace
from mlx_adapters.config.fusing import FuseOptions
from mlx_adapters.errors import ConfigError, FormatError
from mlx_adapters.models.adapter import Adapter
from mlx_adapters.models.loading import load_module
from mlx_adapters.sources.bases import resolve_base
from mlx_adapters.storage import tensor_files
from mlx_adapters.system.door import sanitize_of

WEIGHTS = "model.safetensors"
HF = FuseOptions(method="nearest", check=False, format="hf")
BASES = sorted(folder.parent.name for folder in FIXTURES.glob("*/base"))
# Experts one by one, fused, and as rows of one matrix; heads' matrices; scaled, shifted, moved and renamed tensors.
KINDS = ("deepseek_v3", "dbrx", "qwen3_5_moe", "llama4", "falcon_h1", "qwen3_next", "gemma4", "kimi_linear", "apertus")
KINDS += (
    "granitemoehybrid",
    "phixtral",
    "laguna",
    "exaone_moe",
    "gptj",
    "recurrent_gemma",
    "mistral4",
    "longcat_flash",
)


def as_mlx_has_it(arch: str, out: Path) -> Path:
    """The base of an architecture in mlx-lm's own form, as it converts it."""
    source = FIXTURES / arch / "base"
    shutil.copytree(source, out, ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors = dict(tree_flatten(load_module(resolve_base(source))[0].parameters()))
    tensor_files.write_safetensors(out / "model.safetensors", tensors, {"format": "mlx"})
    return out


def without_effect(base: Path) -> Adapter:
    adapter = visible_adapter(base)
    return Adapter(adapter.config, {name: 0 * w for name, w in adapter.weights.items()}, adapter.metadata)


@pytest.mark.parametrize("arch", BASES)
def test_what_transformers_saved_is_written_again(arch: str, tmp_path: Path):
    base = as_mlx_has_it(arch, tmp_path / "base")
    fuse(base, without_effect(base), tmp_path / "out", quantization="none", options=HF)
    original = FIXTURES / arch / "original"  # beside a base in mlx-lm's form
    saved = tensor_files.read_safetensors((original if original.is_dir() else original.with_name("base")) / WEIGHTS)
    written = tensor_files.read_safetensors(tmp_path / "out" / "model.safetensors")
    prefix = "model." if arch == "qwen3_5_text" else ""  # the fixture is of the text model alone
    written = {name.replace("model.language_model.", prefix): array for name, array in written.items()}
    assert {n: a.shape for n, a in written.items()} == {n: a.shape for n, a in saved.items()}
    for name, array in saved.items():
        np.testing.assert_allclose(np.array(written[name]), np.array(array), rtol=2e-6, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("arch", KINDS)
def test_loading_makes_the_model_of_what_comes_back(arch: str, tmp_path: Path, on_cpu: None):
    base = resolve_base(tiny_base(tmp_path, arch))
    module = load_module(base)[0]
    blank = make_model(tiny_config(arch))
    own = {n: mx.random.uniform(0.5, 1.5, v.shape) for n, v in tree_flatten(blank.parameters())}
    layout = layout_of(base, module)
    groups = groups_of(layout, [name for name in own if name in layout.pieces])
    assert sorted(name for group in groups for name in group.targets) == sorted(layout.pieces)
    checkpoint = {n: a for group in groups for n, a in zip(group.sources, group.sources_of(own), strict=True)}
    assert set(checkpoint) == set(layout.shapes)
    for name, array in sanitize_of(blank)(dict(checkpoint)).items():
        assert mx.allclose(array, own[name], rtol=1e-5, atol=1e-5), name


def test_experts_that_mlx_lm_reads_packed_are_written_unpacked(tmp_path: Path):
    """gpt-oss: (experts, in, out), gate and up in turns; mlx-lm could not read it, and it is not asked to."""
    base = tiny_base(tmp_path / "base", "gpt_oss")
    made = fuse(base, visible_adapter(base), tmp_path / "out", quantization="none", options=FuseOptions(format="hf"))
    assert made.fidelity is None
    fuse(base, visible_adapter(base), tmp_path / "plain", quantization="none")
    written, plain = (tensor_files.read_safetensors(tmp_path / f / "model.safetensors") for f in ("out", "plain"))
    block = "model.layers.1.mlp.experts"
    for row, projection in enumerate(("gate_proj", "up_proj")):
        assert mx.array_equal(
            written[f"{block}.gate_up_proj"][:, :, row::2].swapaxes(1, 2), plain[f"{block}.{projection}.weight"]
        )
        assert mx.array_equal(written[f"{block}.gate_up_proj_bias"][:, row::2], plain[f"{block}.{projection}.bias"])
    assert mx.array_equal(written[f"{block}.down_proj"].swapaxes(1, 2), plain[f"{block}.down_proj.weight"])


def test_what_loading_throws_away_cannot_come_back():
    shapes = {"a": (6, 4)}
    for make, reason in ((lambda w: w["a"][:4], "only a part"), (lambda w: mx.exp(w["a"]), "not known")):
        layout = trace(lambda w, make=make: {"t": make(w)}, dict(shapes), {"t": (4, 4)})
        with pytest.raises(FormatError, match=reason):
            groups_of(layout, ["t"])


def test_a_model_without_a_way_back_is_refused_before_anything_is_written(tmp_path: Path):
    for arch, reason in (
        ("baichuan_m1", "original form of 'lm_head.weight' is not known"),
        ("nanochat", "other names"),
    ):
        base = tiny_base(tmp_path / arch, arch)
        with pytest.raises(ConfigError, match=reason):
            fuse(base, visible_adapter(base), tmp_path / "out", quantization="none", options=HF)
        assert not (tmp_path / "out").exists()


def test_a_vision_tower_under_its_own_names_goes_along(tmp_path: Path):
    """A folder of transformers: what mlx-lm drops is in a shard of its own, which the index names."""
    base = tiny_base(tmp_path / "base", "gemma3")
    fuse(base, visible_adapter(base), tmp_path / "hf", quantization="none", options=HF)
    tower = {"vision_tower.patches.weight": mx.random.normal((4, 8))}
    tensors = tensor_files.read_safetensors(tmp_path / "hf" / "model.safetensors") | tower
    tensor_files.write_safetensors(tmp_path / "hf" / "model.safetensors", tensors, {"format": "pt"})
    (tmp_path / "hf" / "model.safetensors.index.json").unlink()
    made = fuse(tmp_path / "hf", visible_adapter(tmp_path / "hf"), tmp_path / "out", quantization="none", options=HF)
    assert made.notes == ("1 tensor (vision_tower) copied as in the base",)
    assert made.bits_per_weight == 32
    names = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert names == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    last = tensor_files.read_safetensors(tmp_path / "out" / names[1])
    assert list(last) == list(tower) and mx.array_equal(last[next(iter(last))], next(iter(tower.values())))
    assert tensor_files.read_safetensors_header(tmp_path / "out" / names[1])[1] == {"format": "pt"}
