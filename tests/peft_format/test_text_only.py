"""A PEFT adapter of a model of text and pictures: on request its text part is taken, and the rest is named."""

import shutil

import mlx.core as mx
import pytest
from click.testing import CliRunner
from helpers.peft import FIXTURES

from mlx_adapters.adapters.peft_import import import_peft
from mlx_adapters.cli import cli as program
from mlx_adapters.config.fusing import FuseOptions
from mlx_adapters.errors import AdapterError, FormatError
from mlx_adapters.fusion.peft import fuse_peft
from mlx_adapters.models.loading import load_model
from mlx_adapters.sources.bases import resolve_base
from mlx_adapters.storage import tensor_files

VISION = FIXTURES / "vision"
PARTS = {
    ("gemma3", "all-linear"): ["model.vision_tower"],
    ("gemma3", "merger-saved"): ["model.vision_tower", "model.multi_modal_projector"],
    ("qwen3_vl", "all-linear"): ["model.visual"],
    ("qwen3_vl", "merger-saved"): ["model.visual"],
}
FILE = "adapter_model.safetensors"


def base_of(arch: str):
    return resolve_base(VISION / arch / "base")


@pytest.mark.parametrize(("arch", "case"), PARTS)
def test_the_text_part_gives_pefts_logits_of_text(arch, case, tmp_path):
    saved = mx.load(str(VISION / arch / "logits.safetensors"))
    events = []
    adapter = import_peft(VISION / arch / case, base=base_of(arch), name="it", text_only=True, on_event=events.append)
    logits = load_model(base_of(arch), adapter).logits(saved["input_ids"])
    assert mx.abs(logits - saved[case]).max().item() < 1e-4
    assert mx.abs(saved["base"] - saved[case]).max().item() > 0.05
    (said,) = [event.text for event in events]
    assert said.startswith("Left out") and all(f"'{part}' (" in said for part in PARTS[arch, case])
    options = FuseOptions(method="nearest", check=False)
    fuse_peft(VISION / arch / case, tmp_path / "out", base=base_of(arch), text_only=True, options=options)
    assert mx.abs(load_model(resolve_base(tmp_path / "out")).logits(saved["input_ids"]) - logits).max().item() < 1e-4


@pytest.mark.parametrize(("arch", "case"), PARTS)
def test_unasked_it_is_refused_and_the_other_parts_are_named(arch, case, tmp_path, home):
    folder, base = VISION / arch / case, VISION / arch / "base"
    if case == "all-linear":
        with pytest.raises(FormatError, match=f"also changes '{PARTS[arch, case][0]}'") as caught:
            import_peft(folder, base=base, name="it")
        assert "--text-only" in caught.value.hint
    with pytest.raises(FormatError, match="also changes") as caught:
        fuse_peft(folder, tmp_path / "out", base=base)
    assert all(f"'{part}' (" in caught.value.message for part in PARTS[arch, case])
    assert not (home / "adapters").exists() and not (tmp_path / "out").exists()


def changed(tmp_path, rename):
    folder = shutil.copytree(VISION / "qwen3_vl" / "all-linear", tmp_path / "adapter")
    tensors = {name: array for old, array in mx.load(str(folder / FILE)).items() if (name := rename(old))}
    mx.eval(tensors)
    tensor_files.write_safetensors(folder / FILE, tensors)
    return folder


@pytest.mark.parametrize(
    ("rename", "words"),
    [
        (lambda name: name.replace("language_model.layers.1.", "language_model.layers.7."), r"layers\.7"),
        (lambda name: name if "visual" in name else None, r"leaves 'model\.visual.* out"),
        (lambda name: name.replace("q_proj", "q_projection"), "q_projection"),
    ],
)
def test_what_the_text_model_lacks_is_not_left_out(rename, words, tmp_path, home):
    with pytest.raises(AdapterError, match=words):
        import_peft(changed(tmp_path, rename), base=base_of("qwen3_vl"), name="it", text_only=True)
    assert not (home / "adapters").exists()


def test_the_program_takes_it():
    arguments = [str(VISION / "gemma3" / "all-linear"), "--base", str(VISION / "gemma3" / "base")]
    done = CliRunner().invoke(program, ["import-peft", *arguments, "--name", "it"])
    assert done.exit_code == 1 and "import-peft --text-only" in done.exception.hint
    done = CliRunner().invoke(program, ["import-peft", *arguments, "--name", "it", "--text-only"])
    assert done.exit_code == 0 and "Warning: Left out" in done.stderr, done.output
