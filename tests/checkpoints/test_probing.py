"""What mlx-lm does to a checkpoint's tensors when it loads them is found by trying, whatever the base's form."""

import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from helpers.peft import ADAPTERS, FIXTURES, base_of, case
from mlx.utils import tree_flatten

from mlx_adapters.adapters.peft_export import export_peft
from mlx_adapters.adapters.peft_import import import_peft
from mlx_adapters.checkpoints.originals import layout_of, original_shapes, sanitize_of
from mlx_adapters.checkpoints.places import WeightFactors, back, fold_of, through
from mlx_adapters.checkpoints.probing import Piece, trace
from mlx_adapters.config.fusing import FuseOptions
from mlx_adapters.errors import FidelityError
from mlx_adapters.fusion.peft import fuse_peft
from mlx_adapters.models.loading import load_model, load_module
from mlx_adapters.sources.bases import resolve_base
from mlx_adapters.storage import tensor_files
from mlx_adapters.storage.tensor_names import join
from mlx_adapters.system.door import make_module

QUIET = FuseOptions(method="nearest", check=False)
CHANGED = ("falcon_h1", "falcon_h1-tied", "qwen3_next", "qwen3_5_text", "lfm2_moe", "qwen2_moe", "gpt2", "mixtral")


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory):
    """The base of an architecture as mlx-lm converts it: nothing on the disk tells of the original names."""
    made: dict[str, Path] = {}

    def convert(arch: str) -> Path:
        if arch not in made:
            source = FIXTURES / arch / "base"
            out = made[arch] = tmp_path_factory.mktemp("converted") / arch
            shutil.copytree(source, out, ignore=shutil.ignore_patterns("*.safetensors*"))
            tensors = dict(tree_flatten(load_module(resolve_base(source))[0].parameters()))
            tensor_files.write_safetensors(out / "model.safetensors", tensors, {"format": "mlx"})
        return made[arch]

    return convert


@pytest.mark.parametrize("arch", CHANGED)
def test_a_converted_base_tells_what_the_checkpoint_tells(arch: str, converted):
    """Names aside that two forms of a checkpoint share, both give the same pieces."""
    bases = [resolve_base(FIXTURES / arch / "base"), resolve_base(converted(arch))]
    stored, told = (layout_of(base, load_module(base)[0]) for base in bases)
    assert set(stored.pieces) == set(told.pieces) and not stored.problems and not told.problems
    for target, pieces in stored.pieces.items():
        for one, other in zip(pieces, told.pieces[target], strict=True):
            assert np.array_equal(one.scale, other.scale) and one.offset == other.offset
            assert (one.index, one.axes, one.select) == (other.index, other.axes, other.select)
            assert one.source.split(".")[-3:] == other.source.split(".")[-3:] or "layers" not in one.source


@pytest.mark.parametrize("folder", [f for f in ADAPTERS if case(f).split("/")[0] in CHANGED[:6]], ids=case)
def test_peft_adapters_on_converted_bases_compute_what_peft_computes(folder: Path, converted, tmp_path: Path):
    base = converted(case(folder).split("/")[0])
    expected = mx.load(str(base_of(folder).parent / "logits.safetensors"))
    adapter = import_peft(folder, base=base, name="it", tie=folder.name == "tied-embedding")
    logits = load_model(resolve_base(base), adapter).logits(expected["input_ids"])
    assert mx.abs(logits - expected[folder.name]).max().item() < 1e-4


@pytest.mark.parametrize(
    "name",
    [
        "falcon_h1/refused/modules-to-save",
        "falcon_h1-tied/refused/tied-lm-head",
        "qwen3_next/refused/norms-to-save",
        "qwen3_5_text/refused/norms-to-save",
    ],
)
def test_whole_tensors_fused_into_converted_bases(name: str, converted, tmp_path: Path):
    base = converted(name.split("/")[0])
    expected = mx.load(str(base_of(FIXTURES / name).parent / "logits.safetensors"))
    fuse_peft(FIXTURES / name, tmp_path / "out", base=base, options=QUIET)
    logits = load_model(resolve_base(tmp_path / "out")).logits(expected["input_ids"])
    assert mx.abs(logits - expected["refused/" + name.split("/")[2]]).max().item() < 1e-4


def test_the_check_does_not_share_the_error_of_what_it_checks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With pieces that forget the shift of the norms, the fuse stops: the checkpoint's own loading disagrees."""
    monkeypatch.setattr(Piece, "apply", Piece.linear)
    folder = FIXTURES / "qwen3_next" / "refused" / "norms-to-save"
    with pytest.raises(FidelityError, match="mlx-lm would load other numbers"):
        fuse_peft(folder, tmp_path / "out", base=base_of(folder), options=QUIET)
    assert not (tmp_path / "out").exists()


# -- pieces -----------------------------------------------------------------------------------------------

SHAPES = {"a": (6, 40), "b": (6, 40), "n": (40,), "c": (5, 1, 4)}


def one(sanitize, target: str = "t", shapes=SHAPES) -> list[Piece] | str:
    layout = trace(
        sanitize, dict(shapes), {target: tuple(sanitize({k: mx.zeros(s) for k, s in shapes.items()})[target].shape)}
    )
    return layout.problems.get(target) or layout.pieces[target]


@pytest.mark.parametrize(
    "make",
    [
        lambda w: w["a"],
        lambda w: w["a"].T,
        lambda w: w["a"][2:5],
        lambda w: w["a"][:, 20:],
        lambda w: w["a"][::2],
        lambda w: w["c"].moveaxis(2, 1),
        lambda w: w["n"] + 1.0,
        lambda w: 3 * w["n"] - 2,
        lambda w: w["a"] * mx.arange(1.0, 7.0)[:, None],
        lambda w: (w["a"][1:4] * 0.5).T,
        lambda w: w["a"].reshape(2, 3, 40),
        lambda w: w["a"].reshape(2, 3, 40)[:, 1:].swapaxes(1, 2),
        lambda w: w["c"].squeeze(1),
    ],
)
def test_a_piece_does_what_loading_does_and_undoes_it(make):
    pieces = one(lambda w: {"t": make(w)})
    weights = {name: mx.random.normal(shape) for name, shape in SHAPES.items()}
    source = weights[pieces[0].source]
    assert len(pieces) == 1 and mx.allclose(pieces[0].apply(source), make(weights), rtol=1e-6)
    back = pieces[0].back(make(weights), mx.zeros(source.shape))
    assert mx.allclose(mx.where(back == 0, source, back), source, atol=1e-5)
    assert (back != 0).sum().item() == make(weights).size


def test_stacks_are_pieces_by_expert():
    pieces = one(lambda w: {"t": mx.stack([w["b"] * 2, w["a"]])})
    assert [(piece.source, piece.index, piece.scale) for piece in pieces] == [("b", 0, 2.0), ("a", 1, 1.0)]


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda w: w["a"] / mx.linalg.norm(w["a"]), "not finite"),
        (lambda w: mx.exp(w["a"]), "multiplied or shifted"),
        (lambda w: w["a"] + w["b"], "multiplied or shifted|mixes"),
        (lambda w: w["a"].reshape(12, 20), "other axes|again"),
        (lambda w: mx.concatenate([w["a"], w["b"]]), "joins|other"),
        (lambda w: mx.ones((2, 2)), "does not depend"),
    ],
)
def test_what_is_no_piece_is_named(make, reason: str):
    import re

    pieces = one(lambda w: {"t": make(w)})
    assert isinstance(pieces, str) and re.search(reason, pieces)


@pytest.mark.parametrize("scale", [1.0, -0.5, np.arange(1, 7, dtype=np.float32)[:, None]])
def test_updates_and_magnitudes_go_through_a_scaled_weight_and_back(scale):
    """DoRA's rows are normed: loading them times s is the same direction times |s|."""
    piece = Piece("s", "t", None, (slice(None), slice(None)), (0, 1), scale, 0.0)
    weight, left, right = mx.random.normal((6, 8)), mx.random.normal((6, 2)), mx.random.normal((2, 8))
    m = mx.random.uniform(0.5, 2, (6,))
    factors, factor = through(piece, WeightFactors(left, right, m))
    vector = mx.array(scale)

    def dora(weight, change, m):
        changed = weight + change
        return changed * (m / mx.linalg.norm(changed, axis=1))[:, None]

    expected = vector * dora(weight, left @ right, m)
    made = dora(vector * weight, factor * factors.left @ factors.right, factors.m)
    assert mx.allclose(made, expected, rtol=1e-4, atol=1e-5)
    again, divisor = back(factors, fold_of(piece))
    assert mx.allclose(again.left, left, rtol=1e-6) and mx.allclose(again.m, m, rtol=1e-6) and divisor == factor


def test_an_own_adapter_of_a_folded_base_is_exported_unfolded(tmp_path: Path):
    """PEFT multiplies after the adapter, mlx-lm before: the same update has another B there."""
    base = FIXTURES / "falcon_h1" / "base"
    adapter = import_peft(FIXTURES / "falcon_h1" / "linear", base=base, name="it")
    own = adapter.__class__(adapter.config, adapter.weights, {"base": resolve_base(base).record()})
    export_peft(own, tmp_path / "out")
    back_again = import_peft(tmp_path / "out", base=base, name="back")
    for key in own.config.keys:
        a, b, _ = own.factors(key)
        c, d, _ = back_again.factors(key)
        assert mx.allclose(own.config.scale * a @ b, back_again.config.scale * c @ d, rtol=1e-4, atol=1e-5), key
    stored = mx.load(str(tmp_path / "out" / "adapter_model.safetensors"))
    source = mx.load(str(FIXTURES / "falcon_h1" / "linear" / "adapter_model.safetensors"))
    name = join("base_model.model.model.layers.0.mamba.in_proj", "lora_B.weight")
    ratio = stored[name] / source[name]
    assert mx.allclose(ratio, ratio[0, 0], rtol=1e-4)


def test_a_name_that_the_code_only_looks_for_is_found():
    """Step 3.5's norms are shifted if some names are the original's; no rule here knows those names."""
    config = {
        "model_type": "step3p5",
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "vocab_size": 64,
        "num_attention_heads": 4,
        "num_attention_groups": 2,
        "head_dim": 8,
        "intermediate_size": 48,
        "rope_theta": [1e4, 1e4],
        "moe_num_experts": 4,
        "moe_top_k": 2,
        "moe_intermediate_size": 16,
        "share_expert_dim": 16,
        "moe_layers_enum": "1",
        "layer_types": ["full_attention", "sliding_attention"],
        "sliding_window": 4,
    }
    blank = make_module(config)
    wanted = {name: tuple(value.shape) for name, value in tree_flatten(blank.parameters())}
    layout = trace(sanitize_of(blank), original_shapes(blank, wanted), wanted)
    assert {target for target, pieces in layout.pieces.items() if pieces[0].offset == 1} == {
        target for target in wanted if "norm" in target
    }
