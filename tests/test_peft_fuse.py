"""What no MLX adapter can hold goes into a fused model: its logits are PEFT's."""

from pathlib import Path

import mlx.core as mx
import pytest
from test_peft_import import ADAPTERS, FIXTURES, base_of, case

from mlx_adapters.errors import AdapterError, FormatError, IncompatibleError
from mlx_adapters.fusion.fuse import FuseOptions
from mlx_adapters.model import load_model
from mlx_adapters.peft_format.fusing import fuse_peft

FUSIBLE = [
    "llama/refused/modules-to-save",
    "llama/refused/norms-to-save",
    "llama/refused/trainable-tokens",
    "qwen2/refused/bias-all",
    "qwen2/refused/bias-lora-only",
    "gpt2/refused/bias-all",
    "gpt2/refused/conv1d-to-save",
    "qwen2/refused/tied-tokens",
    "llama/refused/only-modules-to-save",
]
NOT_FUSIBLE = {
    "llama/refused/lora-bias": "lora_bias",
    "llama/refused/embedding-dora": "DoRA on the embedding",
    "llama/refused/pissa": "changes the base",
    "qwen2/refused/tied-modules-to-save": "only at the input",
    "qwen2/refused/resized": "resized vocabulary",
}
QUIET = FuseOptions(method="nearest", check=False)


def logits_after(folder: Path, out: Path, **options) -> tuple[mx.array, mx.array]:
    """(the fused model's, PEFT's) logits."""
    base = base_of(folder)
    expected = mx.load(str(base.parent / "logits.safetensors"))
    fuse_peft(folder, out, base=base, **options)
    key = "/".join(folder.relative_to(base.parent).parts)
    return load_model(out).logits(expected["input_ids"]), expected[key]


@pytest.mark.parametrize("name", FUSIBLE)
def test_the_fused_model_computes_what_peft_computes(name: str, tmp_path: Path):
    fused, expected = logits_after(FIXTURES / name, tmp_path / "out", options=QUIET)
    assert mx.abs(fused - expected).max().item() < 1e-4


@pytest.mark.parametrize("folder", [f for f in ADAPTERS if f.name in ("dora", "fused", "tied-embedding")], ids=case)
def test_plain_adapters_are_fused_as_well(folder: Path, tmp_path: Path):
    fused, expected = logits_after(folder, tmp_path / "out", options=QUIET)
    assert mx.abs(fused - expected).max().item() < 1e-4


def test_the_check_after_fusing_knows_the_whole_adapter(tmp_path: Path):
    text = "\n\n".join(" ".join(f"w{3 + (7 * i + i * j) % 60}" for i in range(30)) for j in range(60))
    (tmp_path / "text.txt").write_text(text)
    options = FuseOptions(calibration=str(tmp_path / "text.txt"), check_rows=12, calibration_rows=12)
    folder = FIXTURES / "gpt2" / "refused" / "bias-all"
    result = fuse_peft(folder, tmp_path / "out", base=base_of(folder), options=options)
    assert result.fidelity.kl_mean < 1e-6 < result.fidelity.base_kl


@pytest.mark.parametrize("name", NOT_FUSIBLE)
def test_what_no_model_of_mlx_lm_can_hold_is_refused(name: str, tmp_path: Path):
    with pytest.raises((FormatError, IncompatibleError), match=NOT_FUSIBLE[name]):
        fuse_peft(FIXTURES / name, tmp_path / "out", base=base_of(FIXTURES / name))
    assert not (tmp_path / "out").exists()


def test_another_base_is_refused(tmp_path: Path):
    folder = FIXTURES / "llama" / "refused" / "modules-to-save"
    with pytest.raises(AdapterError):
        fuse_peft(folder, tmp_path / "out", base=FIXTURES / "gpt2" / "base")
    assert not (tmp_path / "out").exists()
