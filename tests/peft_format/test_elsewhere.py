"""PEFT adapters as other trainers save them: wrapped, in shards, under other beginnings, or not whole."""

import json
import re
import shutil
from pathlib import Path

import mlx.core as mx
import pytest
from helpers.peft import FIXTURES, picked_adapter
from helpers.tiny_configs import tiny_base
from safetensors.numpy import load_file, save_file

from mlx_adapters.adapters.peft_export import export_peft
from mlx_adapters.adapters.peft_import import import_peft
from mlx_adapters.config.fusing import FuseOptions
from mlx_adapters.errors import AdapterError, FormatError
from mlx_adapters.fusion.peft import fuse_peft
from mlx_adapters.models.adapter import template_of
from mlx_adapters.storage import files, tensor_files
from mlx_adapters.system.templates import template_in

LLAMA = FIXTURES / "llama"
WEIGHTS = "adapter_model.safetensors"


def copied(case: str, tmp_path: Path, rename=lambda name: name) -> Path:
    """A copy of one of PEFT's adapters whose tensors are called otherwise."""
    folder = Path(shutil.copytree(FIXTURES / case, tmp_path / "adapter"))
    tensors = {rename(name): array for name, array in mx.load(str(folder / WEIGHTS)).items()}
    mx.eval(tensors)
    tensor_files.write_safetensors(folder / WEIGHTS, tensors)
    return folder


def taken(folder: Path, architecture: str = "llama", name: str = "it"):
    return import_peft(folder, base=FIXTURES / architecture / "base", name=name)


def inside(pattern: str, put: str):
    return lambda name: re.sub(pattern, put, name)


# What torch and its friends make of PEFT's names.
WRAPPED = {
    "torch.compile": lambda name: f"_orig_mod.{name}",
    "a base that was compiled first": inside(r"^base_model\.model\.", "base_model.model._orig_mod."),
    "compiled blocks": inside(r"(layers\.\d+)\.", r"\1._orig_mod."),
    "FSDP": lambda name: "_fsdp_wrapped_module." + inside(r"(layers\.\d+)\.", r"\1._fsdp_wrapped_module.")(name),
    "FSDP of blocks and factors": lambda name: inside(r"(layers\.\d+)\.", r"\1._fsdp_wrapped_module.")(
        name.replace(".weight", ".default._fsdp_wrapped_module.weight")
    ),
    "checkpointed FSDP": inside(r"(layers\.\d+)\.", r"\1._fsdp_wrapped_module._checkpoint_wrapped_module."),
    "DDP": lambda name: f"module.{name}",
    "DDP of a compiled model": lambda name: f"module._orig_mod.{name}",
    "a base inside DDP": inside(r"^base_model\.model\.", "base_model.model.module."),
    "Lightning": lambda name: f"model.{name}",
    "Lightning, with another name": lambda name: f"net.policy.{name}",
    "PEFT in PEFT": lambda name: f"base_model.model.{name}",
    "no prefix": lambda name: name.removeprefix("base_model.model."),
    "state of a module in a list": lambda name: f"0.{name}",
    "a body without its head": inside(r"^base_model\.model\.(model|transformer)\.", "base_model.model."),
}


@pytest.mark.parametrize(
    "case", ["llama/patterns", "llama/dora", "qwen3_moe/some-experts", "mixtral/fused", "gpt2/attention"]
)
@pytest.mark.parametrize("how", WRAPPED)
def test_what_is_wrapped_around_a_model_is_no_part_of_its_names(how, case, tmp_path):
    architecture = case.partition("/")[0]
    wanted = taken(FIXTURES / case, architecture, "whole")
    unwrapped = taken(copied(case, tmp_path, WRAPPED[how]), architecture)
    assert unwrapped.fingerprint == wanted.fingerprint and unwrapped.config == wanted.config


def test_names_that_do_not_begin_alike_are_refused(tmp_path):
    """PEFT would load some of them only; nothing says which are meant."""
    folder = copied("llama/float-alpha", tmp_path, lambda n: f"module.{n}" if "layers.1" in n else n)
    with pytest.raises(FormatError, match="does not begin with 'base_model"):
        taken(folder)


def test_a_tower_with_the_same_blocks_is_not_taken_for_the_text_model(tmp_path):
    folder = copied("llama/float-alpha", tmp_path, inside(r"model\.layers", "model.visual.layers"))
    with pytest.raises(AdapterError, match=r"no layer for 'model\.visual\.layers"):
        taken(folder)


@pytest.mark.parametrize("architecture", ["gemma3", "qwen3_5"])
def test_a_body_of_text_and_pictures_without_its_head(tiny_model, tmp_path, architecture):
    base, folder = tiny_model(architecture), tmp_path / "peft"
    adapter = picked_adapter(base, lambda key: key.endswith("q_proj"))
    export_peft(adapter, folder, base=base)
    tensors = {
        re.sub(r"^base_model\..*?layers\.", "base_model.model.language_model.layers.", name): array
        for name, array in mx.load(str(folder / WEIGHTS)).items()
    }
    mx.eval(tensors)
    assert all(name.startswith("base_model.model.language_model.layers.") for name in tensors)
    tensor_files.write_safetensors(folder / WEIGHTS, tensors)
    assert import_peft(folder, base=base, name="it").config.keys == adapter.config.keys


def test_two_updates_of_experts_need_both_names(tmp_path):
    folder = copied("qwen3_moe/fused", tmp_path)
    config = files.read_json(folder / "adapter_config.json")
    assert {"gate_up_proj", "down_proj"} <= set(config["target_parameters"])
    files.write_json(folder / "adapter_config.json", config | {"target_parameters": ["gate_up_proj", "gate.weight"]})
    with pytest.raises(FormatError, match="does not say which parameter of the experts"):
        taken(folder, "qwen3_moe")


def in_shards(folder: Path, index: str | None = "model.safetensors.index.json", count: int = 3) -> Path:
    """What transformers' save_pretrained makes of an adapter that is larger than a shard may be."""
    tensors = mx.load(str(folder / WEIGHTS))
    names = sorted(tensors)
    places = {name: f"adapter_model-{i % count + 1:05d}-of-{count:05d}.safetensors" for i, name in enumerate(names)}
    for file in set(places.values()):
        tensor_files.write_safetensors(folder / file, {name: tensors[name] for name in names if places[name] == file})
    (folder / WEIGHTS).unlink()
    if index:
        (folder / index).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return folder


INDEXES = ["model.safetensors.index.json", "adapter_model.safetensors.index.json", None]


@pytest.mark.parametrize("index", INDEXES)
def test_shards_are_one_adapter(tmp_path, index):
    folder = in_shards(copied("llama/all-linear", tmp_path), index)
    assert taken(folder).fingerprint == taken(LLAMA / "all-linear", name="whole").fingerprint


@pytest.mark.parametrize("index", INDEXES)
def test_a_missing_shard_is_named(tmp_path, index):
    folder = in_shards(copied("llama/all-linear", tmp_path), index)
    (folder / "adapter_model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FormatError, match=r"lacks adapter_model-00002-of-00003\.safetensors") as caught:
        taken(folder)
    assert "again" in caught.value.hint
    for path in folder.glob("adapter_model-*"):
        path.unlink()
    with pytest.raises(AdapterError, match="lacks adapter_model-00001-of" if index else "has no adapter_model"):
        taken(folder)


def emptied(tensors: dict) -> dict:
    return {name: mx.zeros((0,)) if "lora_B" in name else array for name, array in tensors.items()}


def flattened(tensors: dict) -> dict:
    return {name: array.reshape(-1)[: array.size // 2] for name, array in tensors.items()}


def flat_parameters(tensors: dict) -> dict:
    blocks = {re.search(r"^(.*layers\.\d+)\.", name)[1] for name in tensors}
    return {f"{block}._fsdp_wrapped_module._flat_param": mx.ones((64,)) for block in blocks}


@pytest.mark.parametrize(
    ("change", "words", "cure"),
    [
        (emptied, "empty in places", "zero_to_fp32"),
        (flattened, "laid out flat", "FULL_STATE_DICT"),
        (flat_parameters, "laid out flat", "FULL_STATE_DICT"),
    ],
)
def test_what_a_sharded_training_left_in_place_of_tensors_is_told_with_its_cure(tmp_path, change, words, cure):
    folder = copied("llama/float-alpha", tmp_path)
    tensors = change(mx.load(str(folder / WEIGHTS)))
    mx.eval(tensors)
    mx.save_safetensors(str(folder / WEIGHTS), tensors)
    with pytest.raises(FormatError, match=words) as caught:
        taken(folder)
    assert cure in caught.value.hint


@pytest.mark.parametrize(
    ("file", "words", "cure"),
    [
        ("pytorch_model_fsdp_0/__0_0.distcp", "FSDP cut its weights", "accelerate merge-weights"),
        ("global_step20/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", "DeepSpeed cut", "zero_to_fp32"),
        ("adapter_model.bin", "pickle, adapter_model.bin", "save it again"),
        ("adapter_model-00001-of-00002.bin", "pickle, adapter_model-00001", "save it again"),
        ("README.md", "has no adapter_model.safetensors", "copy both"),
        ("model.safetensors", "has no adapter_model.safetensors, but model.safetensors", "rename it so"),
    ],
)
def test_a_folder_without_whole_weights_says_what_it_has(tmp_path, file, words, cure):
    folder = copied("llama/float-alpha", tmp_path)
    (folder / WEIGHTS).unlink()
    (folder / file).parent.mkdir(exist_ok=True)
    (folder / file).write_bytes(b"x")
    with pytest.raises(AdapterError, match=words) as caught:
        taken(folder)
    assert cure in caught.value.hint


def test_an_update_that_transformers_never_computes_is_taken_as_long_as_it_is_nothing(tmp_path: Path):
    """jamba's dt_proj is read past PEFT's layer: what was trained there is still zero."""
    base, out = tiny_base(tmp_path / "base", "jamba"), tmp_path / "out"
    export_peft(picked_adapter(base, lambda key: key.endswith("x_proj")), out, base=base)
    config, weights = files.read_json(out / "adapter_config.json"), mx.load(str(out / "adapter_model.safetensors"))
    more = {f"base_model.model.model.layers.0.mamba.dt_proj.lora_{leaf}.weight" for leaf in "AB"}
    config["target_modules"].append("model.layers.0.mamba.dt_proj")
    files.write_json(out / "adapter_config.json", config)
    for trained in (False, True):
        shapes = {name: (3, 4) if "lora_A" in name else (128, 3) for name in more}
        update = {name: mx.ones(s) * (trained or "lora_A" in name) for name, s in shapes.items()}
        tensor_files.write_safetensors(out / "adapter_model.safetensors", weights | update)
        if trained:
            with pytest.raises(FormatError, match=r"reads the weight of 'model\.layers\.0\.mamba\.dt_proj' itself"):
                import_peft(out, base=base, name="it", overwrite=True)
        else:
            assert len(import_peft(out, base=base, name="it").config.keys) == 2


def test_a_classifiers_head_is_told_by_its_name(tmp_path: Path):
    folder, task = (
        copied("llama/one-layer", tmp_path),
        {"task_type": "SEQ_CLS", "modules_to_save": ["classifier", "score"]},
    )
    config = json.loads((folder / "adapter_config.json").read_text()) | task
    (folder / "adapter_config.json").write_text(json.dumps(config))
    assert taken(folder).config.rank  # on a model without a classifier PEFT saves none
    tensors = dict(mx.load(str(folder / WEIGHTS))) | {"base_model.model.score.weight": mx.ones((2, 64))}
    tensor_files.write_safetensors(folder / WEIGHTS, tensors)
    with pytest.raises(FormatError, match="answers with 'score', a classifier's head \\(task_type SEQ_CLS\\)"):
        taken(folder, name="other")


@pytest.mark.parametrize(
    "names, refused", [(["q_norm"], None), (["layernorm"], "'layernorm' in modules_to_save")], ids=str
)
def test_modules_that_the_base_lacks_are_not_missed(names, refused, tmp_path: Path):
    """PEFT goes by how names end, and saves nothing where none does."""
    folder = copied("llama/one-layer", tmp_path)
    config = json.loads((folder / "adapter_config.json").read_text()) | {"modules_to_save": names}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    if refused:
        with pytest.raises(FormatError, match=refused):
            taken(folder)
    else:
        assert taken(folder).config.rank


CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
SAVED = {
    "chat_template.jinja": CHATML,
    "tokenizer_config.json": json.dumps({"chat_template": CHATML}),
    "chat_template.json": json.dumps({"chat_template": [{"name": "default", "template": CHATML}]}),
}


@pytest.mark.parametrize("file", SAVED)
def test_the_chat_template_beside_an_adapter_goes_with_it(tmp_path, file):
    """Trainers give a base without one theirs (LLaMA-Factory, axolotl, Unsloth) and save it with the adapter alone."""
    folder = copied("llama/float-alpha", tmp_path)
    assert template_of(taken(folder, name="none")).chat_template is None
    (folder / file).write_text(SAVED[file])
    assert template_of(taken(folder)).chat_template == CHATML
    fused = fuse_peft(folder, tmp_path / "fused", base=LLAMA / "base", options=FuseOptions(check=False))
    assert template_in(fused.folder) == CHATML
    for _ in range(2):
        exported = export_peft("it", tmp_path / "exported", overwrite=True).folder
    assert (exported / "chat_template.jinja").read_text() == CHATML
    assert template_of(taken(exported, name="again")).chat_template == CHATML
    assert not (export_peft("none", tmp_path / "without").folder / "chat_template.jinja").exists()
    same = tmp_path / "same"
    shutil.copytree(LLAMA / "base", same)
    (same / "chat_template.jinja").write_text(f"{CHATML}\n")
    assert template_of(import_peft(folder, base=same, name="same")).chat_template is None
    (folder / file).write_bytes(b"\xff{")  # none that can be read
    assert template_of(taken(folder, name="broken")).chat_template is None


def test_a_chat_template_goes_with_whole_modules_alone(tmp_path):
    """No LoRA matrix: there is no adapter to go with."""
    folder = copied("llama/refused/norms-to-save", tmp_path)
    config = json.loads((folder / "adapter_config.json").read_text()) | {"target_modules": []}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    path = folder / "adapter_model.safetensors"
    tensors = {name: array for name, array in load_file(path).items() if "lora" not in name}
    save_file(tensors, path)
    (folder / "chat_template.jinja").write_text(CHATML)
    fused = fuse_peft(folder, tmp_path / "fused", base=LLAMA / "base", options=FuseOptions(check=False))
    assert template_in(fused.folder) == CHATML
