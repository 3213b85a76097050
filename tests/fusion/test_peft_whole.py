"""Whole tensors of PEFT adapters as other programs save them: under other names, repeated, or not all of them."""

from pathlib import Path

import mlx.core as mx
import pytest
from helpers.adapters import make_adapter
from helpers.peft import FIXTURES, base_of

from mlx_adapters.adapters.peft_export import export_peft
from mlx_adapters.adapters.peft_import import import_peft
from mlx_adapters.config.fusing import FuseOptions
from mlx_adapters.errors import AdapterError, FormatError, IncompatibleError
from mlx_adapters.fusion.peft import fuse_peft
from mlx_adapters.models.dense import dense_weight
from mlx_adapters.models.loading import load_model
from mlx_adapters.sources.bases import resolve_base
from mlx_adapters.storage import files, tensor_files

QUIET = FuseOptions(method="nearest", check=False)
WEIGHTS, CONFIG, PREFIX = "adapter_model.safetensors", "adapter_config.json", "base_model.model."


def changed(case: str, tmp_path: Path, change, **settings) -> Path:
    """A copy of one of PEFT's adapters with other tensors (`change` of a dict of them) and settings."""
    folder, source = tmp_path / "peft", FIXTURES / case
    folder.mkdir()
    tensors = dict(mx.load(str(source / WEIGHTS)))
    mx.eval(tensors)
    tensor_files.write_safetensors(folder / WEIGHTS, change(tensors))
    files.write_json(folder / CONFIG, files.read_json(source / CONFIG) | settings)
    return folder


def distance(case: str, folder: Path, tmp_path: Path) -> float:
    """How far the logits of the model fused from `folder` are from PEFT's of the adapter `case`."""
    base = base_of(FIXTURES / case)
    expected = mx.load(str(base.parent / "logits.safetensors"))
    fuse_peft(folder, tmp_path / "out", base=base, options=QUIET)
    own = case.partition("/")[2]
    key = own if own in expected else f"{own}/unmerged"
    return mx.abs(load_model(resolve_base(tmp_path / "out")).logits(expected["input_ids"]) - expected[key]).max().item()


def named(name: str, own: str) -> str:
    """A tensor's name as the state of the whole model has it, with the adapter's name `own`."""
    if ".lora_" in name:
        return name.replace(".weight", f".{own}.weight")
    if name.endswith("trainable_tokens_delta"):
        return f"{name}.{own}"
    return name.replace(".weight", f".modules_to_save.{own}.weight")


@pytest.mark.parametrize("own", ["default", "sql"])
@pytest.mark.parametrize("case", ["modules-to-save", "norms-to-save", "trainable-tokens"])
def test_the_adapters_name_may_be_left_in_all_names(case, own, tmp_path):
    case = f"llama/refused/{case}"
    base = mx.load(str(base_of(FIXTURES / case) / "model.safetensors"))

    def whole_state(tensors):
        copies = {n: base[n.removeprefix(PREFIX)] for n in tensors if n.removeprefix(PREFIX) in base}
        copies = {n.replace(".weight", ".original_module.weight"): array for n, array in copies.items()}
        return copies | {named(name, own): array for name, array in tensors.items()}

    assert distance(case, changed(case, tmp_path, whole_state), tmp_path) < 1e-4


@pytest.mark.parametrize("case", ["qwen2/ensure-tying", "qwen2/refused/tied-to-save-ensured"])
def test_ends_that_peft_ties_need_be_in_the_file_once(case, tmp_path):
    """Programs that save shared memory once leave the head out; PEFT ties it again when it loads the adapter."""

    def once(tensors):
        kept = {name: array for name, array in tensors.items() if "lm_head" not in name}
        assert len(kept) < len(tensors)
        return kept

    assert distance(case, changed(case, tmp_path, once), tmp_path) < 1e-4
    assert files.read_json(tmp_path / "out" / "config.json")["tie_word_embeddings"]


def test_two_ends_are_both_asked_for_whatever_the_config_ties(tmp_path):
    """A base with two matrices has nothing to tie."""
    case = "llama/refused/modules-to-save"
    base = FIXTURES / "llama" / "base"
    embedding = mx.load(str(base / "model.safetensors"))["model.embed_tokens.weight"]

    def other_end(tensors):
        kept = {name: array for name, array in tensors.items() if "lm_head" not in name}
        return kept | {f"{PREFIX}model.embed_tokens.weight": embedding}

    settings = {"modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True}
    with pytest.raises(FormatError, match="names 'lm_head' in modules_to_save, but the file does not hold it"):
        fuse_peft(changed(case, tmp_path, other_end, **settings), tmp_path / "out", base=base, options=QUIET)


@pytest.mark.parametrize("saved", [["input_layernorm"], ["norm"], ["model.layers.0", "model.layers.1"]], ids=str)
def test_a_part_of_the_whole_modules_is_not_all(saved, tmp_path):
    case = "llama/refused/norms-to-save"

    def less(tensors):
        return {name: array for name, array in tensors.items() if "layers.1.input_layernorm" not in name}

    folder = changed(case, tmp_path, less, modules_to_save=saved)
    with pytest.raises(FormatError, match=f"{saved[0]}' in modules_to_save, but of these the file lacks"):
        fuse_peft(folder, tmp_path / "out", base=base_of(FIXTURES / case), options=QUIET)
    assert not (tmp_path / "out").exists()


def test_one_expert_is_not_all(tmp_path):
    base = FIXTURES / "qwen3_moe" / "base"
    stack = "model.layers.{}.mlp.experts.{}.down_proj.weight"
    settings = {"modules_to_save": ["down_proj"], "target_parameters": None, "target_modules": ["q_proj"]}

    def experts(tensors, last):
        update = {f"{PREFIX}model.layers.{layer}.self_attn.q_proj.lora_A.weight": mx.ones((8, 32)) for layer in (0, 1)}
        update |= {name.replace("_A", "_B"): mx.zeros((32, 8)) for name in update}
        return update | {
            PREFIX + stack.format(layer, e): mx.ones((32, 16)) for layer in (0, 1) for e in range(4 - last)
        }

    for missing in (0, 1):
        (tmp_path / str(missing)).mkdir()
        source = changed(
            "qwen3_moe/fused", tmp_path / str(missing), lambda t, m=missing: experts(t, m), r=8, **settings
        )
        if missing:
            with pytest.raises(FormatError, match=r"of these the file lacks '.*experts\.3\.down_proj"):
                fuse_peft(source, tmp_path / "out", base=base, options=QUIET)
        else:
            fuse_peft(source, tmp_path / "whole", base=base, options=QUIET)


def test_a_whole_weight_beside_its_own_update_is_the_bases(tmp_path):
    """PEFT before 0.7 kept the base's weight under the module's own name, which a whole state has too."""
    case, base = "llama/float-alpha", FIXTURES / "llama" / "base"
    own = {PREFIX + name: array for name, array in mx.load(str(base / "model.safetensors")).items()}

    def with_copies(tensors, factor=1.0):
        modules = [name.replace(".lora_A", "") for name in tensors if ".lora_A" in name]
        return tensors | {name: own[name] * factor for name in modules}

    folder = changed(case, tmp_path, lambda tensors: with_copies(tensors, 1.001))
    assert distance(case, folder, tmp_path) < 1e-4
    wanted = import_peft(FIXTURES / case, base=base, name="wanted")
    assert import_peft(folder, base=base, name="it").fingerprint == wanted.fingerprint
    (tmp_path / "other").mkdir()
    folder = changed(case, tmp_path / "other", lambda tensors: with_copies(tensors, 1.5))
    with pytest.raises(IncompatibleError, match="differs from the copy in the PEFT adapter"):
        import_peft(folder, base=base, name="other")


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("rows", [0, 3])
def test_an_end_of_another_base_saved_along_is_told(tiny_model, rows, bits, tmp_path):
    """`save_embedding_layers` saves the base's own; one that is trained lies near it."""
    base, folder = tiny_model("llama", bits=bits), tmp_path / "peft"
    export_peft(make_adapter(base), folder, base=base)
    tensors = dict(mx.load(str(folder / WEIGHTS)))
    mx.eval(tensors)
    own = dense_weight(load_model(resolve_base(base)).module.model.embed_tokens, mx.float32)
    more, options = mx.random.normal((rows, own.shape[1])), {"base": base, "options": QUIET, "resize": rows > 0}
    for name, end in {"near": own * 1.05, "far": own[::-1]}.items():
        saved = {f"{PREFIX}model.embed_tokens.weight": mx.concatenate([end, more])}
        tensor_files.write_safetensors(folder / WEIGHTS, tensors | saved)
        if name == "near":
            fuse_peft(folder, tmp_path / name, **options)
        else:
            with pytest.raises(IncompatibleError, match=r"'model\.embed_tokens', saved with .* of another base"):
                fuse_peft(folder, tmp_path / name, **options)


def test_a_module_that_is_trained_whole_has_no_update(tmp_path):
    base = FIXTURES / "llama" / "base"
    path = "model.layers.1.self_attn.q_proj"

    def both(tensors):
        factors = [array for name, array in tensors.items() if f"{path}.lora_A" in name]
        assert factors
        return tensors | {f"{PREFIX}{path}.weight": mx.ones((64, 64))}

    folder = changed("llama/all-linear", tmp_path, both, modules_to_save=[path])
    with pytest.raises(FormatError, match=f"both an update of '{path}' and its whole weight"):
        fuse_peft(folder, tmp_path / "out", base=base, options=QUIET)


@pytest.mark.parametrize("case, kind", [("bias-all", "all"), ("bias-lora-only", "lora_only")])
def test_biases_that_were_trained_and_not_saved_are_told(case, kind, tmp_path):
    case, said = f"qwen2/refused/{case}", []

    def without(tensors):
        return {name: array for name, array in tensors.items() if not name.endswith(".bias")}

    folder, base = changed(case, tmp_path, without), base_of(FIXTURES / case)
    import_peft(folder, base=base, name="it", on_event=said.append)
    fuse_peft(folder, tmp_path / "out", base=base, options=QUIET, on_event=said.append)
    told = [str(event) for event in said if f"trains biases (bias '{kind}'), but the file lacks" in str(event)]
    assert len(told) == 2
    said.clear()
    fuse_peft(FIXTURES / case, tmp_path / "whole", base=base, options=QUIET, on_event=said.append)
    assert not any("trains biases" in str(event) for event in said)


@pytest.mark.parametrize("case, said", [("llama/all-linear", True), ("gpt2/attention", False)])
def test_how_weights_lie_is_told_by_the_layer(case, said, tmp_path):
    """PEFT puts a wrong fan_in_fan_out right when it loads an adapter."""
    assert files.read_json(FIXTURES / case / CONFIG)["fan_in_fan_out"] is not said
    assert distance(case, changed(case, tmp_path, dict, fan_in_fan_out=said), tmp_path) < 1e-4


def test_an_update_beyond_float32_is_told_as_that(tmp_path):
    folder = changed("llama/float-alpha", tmp_path, lambda t: {name: array * 1e25 for name, array in t.items()})
    with pytest.raises(FormatError, match="makes an update beyond float32"):
        fuse_peft(folder, tmp_path / "out", base=FIXTURES / "llama" / "base", options=QUIET)


LINEAR = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]


@pytest.mark.parametrize(
    "settings", [{"target_modules": LINEAR[:1]}, {"target_modules": LINEAR, "layers_to_transform": [0]}], ids=str
)
def test_updates_that_the_config_does_not_name_are_told(settings, tmp_path):
    """PEFT makes layers by the config alone, and passes over what the file holds for others."""
    case, said = "llama/all-linear", []
    folder, base = changed(case, tmp_path, dict, **settings), FIXTURES / "llama" / "base"
    import_peft(folder, base=base, name="it", on_event=said.append)
    fuse_peft(folder, tmp_path / "out", base=base, options=QUIET, on_event=said.append)
    assert sum("PEFT leaves that out, here it is taken" in str(event) for event in said) == 2
    said.clear()
    import_peft(FIXTURES / case, base=base, name="whole", on_event=said.append)
    assert not any("does not target" in str(event) for event in said)


def test_a_token_is_trained_once(tmp_path):
    case = "llama/refused/trainable-tokens"
    indices = files.read_json(FIXTURES / case / CONFIG)["trainable_token_indices"]["embed_tokens"]
    assert len(indices) > 1
    folder = changed(case, tmp_path, dict, trainable_token_indices={"embed_tokens": [indices[0]] * len(indices)})
    with pytest.raises(FormatError, match="do not fit trainable_token_indices"):
        fuse_peft(folder, tmp_path / "out", base=FIXTURES / "llama" / "base", options=QUIET)


@pytest.mark.parametrize("settings", [{"peft_type": "LOHA"}, {"init_lora_weights": "loftq"}], ids=str)
def test_what_peft_alone_can_merge_says_so(settings, tmp_path):
    folder = changed("llama/float-alpha", tmp_path, dict, **settings)
    with pytest.raises(AdapterError) as caught:
        import_peft(folder, base=FIXTURES / "llama" / "base", name="it")
    assert "merge_and_unload" in caught.value.hint
