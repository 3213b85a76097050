"""The way back to PEFT: bit for bit what came in, and nothing that PEFT would load as something else."""

from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest
from helpers.peft import ADAPTERS, FIXTURES, TIED, base_of, case, picked_adapter
from helpers.tiny_configs import tiny_base

from mlx_adapters.adapters.peft_export import export_peft
from mlx_adapters.adapters.peft_import import import_peft
from mlx_adapters.errors import ExistsError, FormatError
from mlx_adapters.models.loading import load_model
from mlx_adapters.sources.bases import resolve_base
from mlx_adapters.storage import files

NOT_BIT_EQUAL = ("some-experts",)  # zeros are added where the adapter left experts out
# mlx-lm multiplies weights when it loads them, so a factor is multiplied on the way in and divided on the way out.
FOLDED = ("falcon_h1", "falcon_h1-tied")
ARCHITECTURES = sorted(path.parent.name for path in FIXTURES.glob("*/base"))


@pytest.mark.parametrize("folder", [folder for folder in ADAPTERS if folder not in TIED], ids=case)
def test_peft_to_mlx_to_peft(folder: Path, tmp_path: Path):
    adapter = import_peft(folder, base=base_of(folder), name="it")
    export_peft(adapter, tmp_path / "out")
    source = next(folder.rglob("adapter_config.json")).parent
    before = {k.replace(".default", ""): v for k, v in mx.load(str(source / "adapter_model.safetensors")).items()}
    before = {
        name: array for name, array in before.items() if ".base_layer.weight" not in name and "velora" not in name
    }
    after = mx.load(str(tmp_path / "out" / "adapter_model.safetensors"))
    assert files.read_json(tmp_path / "out" / "adapter_config.json") == files.read_json(source / "adapter_config.json")
    assert set(before) <= set(after)
    for name in after:
        expected = before.get(name, mx.zeros_like(after[name]))
        if folder.name in NOT_BIT_EQUAL or case(folder).split("/")[0] in FOLDED:
            assert mx.allclose(after[name], expected, rtol=1e-6, atol=0)
        else:
            assert after[name].dtype == expected.dtype
            assert mx.array_equal(after[name], expected), name


def test_modules_go_by_the_names_that_arrive_in_transformers(tmp_path: Path):
    """transformers calls Laguna's router and shared experts, and Phi MoE's router, otherwise than their checkpoints."""
    wanted = {
        "laguna": (
            {"model.layers.1.mlp.shared_experts.up_proj"},
            {"model.layers.1.mlp.gate.weight"},
            {"model.layers.1.mlp.shared_expert.up_proj", "model.layers.1.mlp.gate"},
        ),
        "phimoe": (set(), {f"model.layers.{i}.mlp.router.weight" for i in (0, 1)}, None),
    }
    for kind, (modules, parameters, names) in wanted.items():
        base = tiny_base(tmp_path / kind, kind)
        adapter = picked_adapter(
            base, lambda key: "shared_expert.up" in key or key.endswith((".gate.proj", "moe.gate"))
        )
        export_peft(adapter, tmp_path / f"{kind}-peft", base=base, base_model="a/b")
        config = files.read_json(tmp_path / f"{kind}-peft" / "adapter_config.json")
        assert set(config["target_modules"]) == modules and set(config["target_parameters"]) == parameters
        tensors = mx.load(str(tmp_path / f"{kind}-peft" / "adapter_model.safetensors"))
        stored = {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in tensors}
        assert stored == (names or {name.removesuffix(".weight") for name in parameters})


def linear(key: str) -> bool:
    return "layers" in key or ".h." in key


@pytest.mark.parametrize(
    "architecture", ["llama", "qwen2", "qwen3", "gemma3_text", "phi3", "mixtral", "qwen3_moe", "gpt2"]
)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16], ids=str)
def test_mlx_to_peft_to_mlx(architecture: str, dtype: mx.Dtype, tmp_path: Path):
    base = FIXTURES / architecture / "base"
    adapter = picked_adapter(base, linear, dtype=dtype)
    export_peft(adapter, tmp_path / "out")
    back = import_peft(tmp_path / "out", base=base, name="back")
    assert back.config == replace(adapter.config, dropout=back.config.dropout)
    assert back.fingerprint == adapter.fingerprint


def test_dora_to_peft_and_back(tmp_path: Path):
    base = FIXTURES / "qwen3" / "base"
    adapter = picked_adapter(base, linear, "dora")
    export_peft(adapter, tmp_path / "out")
    back = import_peft(tmp_path / "out", base=base, name="back")
    assert back.fingerprint == adapter.fingerprint and back.config.dropout == 0.05


@pytest.mark.parametrize("architecture", ["qwen2", "gpt2", "llama"])
def test_embeddings_to_peft_and_back(architecture: str, tmp_path: Path):
    """Of a tied base PEFT must get both ends; of an untied one only the input."""
    base = FIXTURES / architecture / "base"
    adapter = picked_adapter(base, lambda key: key.endswith(("embed_tokens", "wte")))
    export_peft(adapter, tmp_path / "out")
    names = set(mx.load(str(tmp_path / "out" / "adapter_model.safetensors")))
    assert any("lm_head" in name for name in names) == (architecture != "llama")
    assert import_peft(tmp_path / "out", base=base, name="back").fingerprint == adapter.fingerprint


def test_position_embeddings_are_embeddings_that_nothing_is_tied_to(tmp_path: Path):
    base = FIXTURES / "gpt2" / "base"
    adapter = picked_adapter(base, lambda key: key.endswith(("wpe", "c_attn")))
    export_peft(adapter, tmp_path / "out")
    names = set(mx.load(str(tmp_path / "out" / "adapter_model.safetensors")))
    assert "base_model.model.transformer.wpe.lora_embedding_A" in names
    assert not any("lm_head" in name for name in names)
    assert import_peft(tmp_path / "out", base=base, name="back").fingerprint == adapter.fingerprint
    export_peft("back", tmp_path / "again")
    assert set(mx.load(str(tmp_path / "again" / "adapter_model.safetensors"))) == names


def test_the_folder_names_its_base_and_how_to_load_it(tmp_path: Path):
    adapter = picked_adapter(FIXTURES / "llama" / "base", lambda key: key.endswith("q_proj"))
    result = export_peft(adapter, tmp_path / "out", base_model="meta-llama/Llama-3.2-1B")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    config = files.read_json(tmp_path / "out" / "adapter_config.json")
    assert config["base_model_name_or_path"] == result.base_model == "meta-llama/Llama-3.2-1B"
    assert config["target_modules"] == ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]
    assert 'from_pretrained("meta-llama/Llama-3.2-1B")' in (tmp_path / "out" / "README.md").read_text()


def test_a_base_that_transformers_does_not_load_is_remarked_on(tmp_path: Path):
    made = picked_adapter(FIXTURES / "llama" / "base", lambda key: key.endswith("q_proj"))
    record, notes = made.metadata["base"], []
    for i, (base, options) in enumerate(
        [
            ({"name": "demo"}, {}),
            ({"name": "mlx-community/a-4bit", "quantization": {"bits": 4}}, {}),
            ({"name": "org/model"}, {}),
            ({"name": "demo"}, {"base_model": "org/model"}),
        ]
    ):
        adapter = replace(made, metadata={"base": record | base})
        options["base"] = FIXTURES / "llama" / "base"
        export_peft(adapter, tmp_path / str(i), on_event=lambda note, i=i: notes.append((i, note.text)), **options)
    assert [i for i, _ in notes] == [0, 1] and all("--base-model" in text for _, text in notes)


def test_an_existing_folder_is_kept(tmp_path: Path):
    adapter = picked_adapter(FIXTURES / "llama" / "base", lambda key: key.endswith("q_proj"))
    export_peft(adapter, tmp_path / "out")
    before = files.sha256(tmp_path / "out" / "adapter_model.safetensors")
    with pytest.raises(ExistsError):
        export_peft(replace(adapter, config=replace(adapter.config, scale=9.0)), tmp_path / "out")
    assert files.sha256(tmp_path / "out" / "adapter_model.safetensors") == before
    export_peft(replace(adapter, config=replace(adapter.config, scale=9.0)), tmp_path / "out", overwrite=True)
    assert files.read_json(tmp_path / "out" / "adapter_config.json")["lora_alpha"] == 27


def test_a_changed_import_is_not_described_by_its_old_config(tmp_path: Path):
    """Trained on after the import, the padded ranks are in use: the old rank_pattern no longer holds."""
    folder = FIXTURES / "llama" / "patterns"
    adapter = import_peft(folder, base=base_of(folder), name="it")
    changed = adapter.with_weights({name: array + 0.01 for name, array in adapter.weights.items()})
    export_peft(changed, tmp_path / "out")
    back = import_peft(tmp_path / "out", base=base_of(folder), name="back")
    assert back.config.rank == adapter.config.rank and back.config.scale == adapter.config.scale
    assert all(mx.array_equal(back.weights[name], array) for name, array in changed.weights.items())


@pytest.mark.parametrize(
    ("architecture", "keys", "kind", "reason"),
    [
        ("mixtral", lambda key: key.endswith(".gate"), "dora", "router"),
        ("llama", lambda key: key.endswith("embed_tokens"), "dora", "DoRA of an embedding"),
    ],
)
def test_what_peft_cannot_express_is_refused(architecture: str, keys, kind: str, reason: str, tmp_path: Path):
    adapter = picked_adapter(FIXTURES / architecture / "base", keys, kind)
    with pytest.raises(FormatError, match=reason):
        export_peft(adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_without_a_record_takes_its_names_from_the_base(tmp_path: Path):
    """As plain mlx-lm leaves it: gpt2's modules are called otherwise in transformers."""
    base = FIXTURES / "gpt2" / "base"
    adapter = replace(picked_adapter(base, linear), metadata={"base": {"name": str(base)}})
    export_peft(adapter, tmp_path / "out")
    assert files.read_json(tmp_path / "out" / "adapter_config.json")["fan_in_fan_out"] is True
    assert import_peft(tmp_path / "out", base=base, name="back").fingerprint == adapter.fingerprint
    assert all("model.transformer.h" in name for name in mx.load(str(tmp_path / "out" / "adapter_model.safetensors")))


@pytest.mark.parametrize("folder", TIED, ids=case)
def test_an_update_that_was_tied_goes_back_tied(folder: Path, tmp_path: Path):
    """Under its old config PEFT would adapt one end again."""
    adapter = import_peft(folder, base=base_of(folder), name="it", tie=True)
    export_peft(adapter, tmp_path / "out")
    assert any("lm_head" in name for name in mx.load(str(tmp_path / "out" / "adapter_model.safetensors")))
    assert files.read_json(tmp_path / "out" / "adapter_config.json")["ensure_weight_tying"] is True
    back = import_peft(tmp_path / "out", base=base_of(folder), name="back")
    if case(folder).split("/")[0] not in FOLDED:
        assert back.fingerprint == adapter.fingerprint
    for key, a, b, _ in adapter.layers():
        c, d, _ = back.factors(key)
        assert mx.allclose(back.config.scale * c @ d, adapter.config.scale * a @ b, rtol=1e-5, atol=1e-6)


def test_what_is_called_like_a_part_of_an_expert_is_named_as_a_parameter(tmp_path: Path):
    """PEFT 0.21 takes a target `...shared_expert.down_proj` for the experts' down_proj, and drops its update."""
    base = FIXTURES / "qwen3_next" / "base"
    adapter = picked_adapter(base, lambda key: "shared_expert" in key or key.endswith((".gate", "q_proj")))
    export_peft(adapter, tmp_path / "out", base=base)
    config = files.read_json(tmp_path / "out" / "adapter_config.json")
    parts = [f"shared_expert.{part}_proj.weight" for part in ("down", "gate", "up")]
    named = [f"model.layers.{i}.mlp.{part}" for i in range(2) for part in parts]
    assert sorted(config["target_parameters"]) == sorted(named) and config["lora_dropout"] == 0
    assert {name.rpartition(".")[2] for name in config["target_modules"]} == {"gate", "q_proj", "shared_expert_gate"}
    back = import_peft(tmp_path / "out", base=base, name="back")
    assert back.fingerprint == adapter.fingerprint


def test_names_are_those_of_the_class_that_peft_users_load(tmp_path: Path):
    """AutoModelForCausalLM gives the text model of some bases; LFM2 has w1, w2 and w3 there."""
    for architecture, kind, expected in [
        ("qwen3_5_text", "q_proj", "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"),
        ("lfm2_moe", "feed_forward.gate_proj", "base_model.model.model.layers.0.feed_forward.w1.lora_A.weight"),
        ("gpt_neox", "dense", "base_model.model.gpt_neox.layers.0.attention.dense.lora_A.weight"),
        ("gpt_neox", "embed_out", "base_model.model.lm_head.lora_A.weight"),
    ]:
        base = FIXTURES / architecture / "base"
        base = base if base.is_dir() else tiny_base(tmp_path / "base" / kind, architecture)
        adapter = picked_adapter(base, lambda key, kind=kind: key.endswith(kind))
        export_peft(adapter, tmp_path / kind, base=base)
        assert expected in mx.load(str(tmp_path / kind / "adapter_model.safetensors"))
        assert import_peft(tmp_path / kind, base=base, name=kind).fingerprint == adapter.fingerprint


@pytest.mark.parametrize(
    ("architecture", "keys", "reason"),
    [
        ("falcon_h1", "mamba.out_proj", "reads the weight of 'model.layers.0.mamba.out_proj' itself"),
        ("longcat_flash", "classifier", "reads the weight of 'model.layers.0.mlp.router.classifier' itself"),
    ],
)
def test_what_peft_would_take_and_not_heed_is_refused(architecture: str, keys: str, reason: str, tmp_path: Path):
    base = FIXTURES / architecture / "base"
    base = base if base.is_dir() else tiny_base(tmp_path / "base", architecture)
    adapter = picked_adapter(base, lambda key: key.endswith(keys))
    with pytest.raises(FormatError, match=reason):
        export_peft(adapter, tmp_path / "out", base=base)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("architecture", ["qwen2_moe", "lfm2_moe", "gpt_oss", "llama4_text", "qwen3_5_moe"])
@pytest.mark.parametrize("parts", [("gate_proj", "up_proj", "down_proj"), ("up_proj",), ("down_proj",)], ids=len)
def test_experts_go_out_as_parameters_and_come_back(architecture: str, parts: tuple[str, ...], tmp_path: Path):
    """Gate and up, which have an A of each, are one parameter of twice the rank; what is not adapted is nothing."""
    base = FIXTURES / architecture / "base"
    base = base if base.is_dir() else tiny_base(tmp_path / "base", architecture)
    adapter = picked_adapter(base, lambda key: ".experts." in key or ".switch_mlp." in key)
    keys = tuple(key for key in adapter.config.keys if key.endswith(parts))
    weights = {name: w for name, w in adapter.weights.items() if name.rpartition(".")[0] in keys}
    adapter = replace(adapter, config=replace(adapter.config, keys=keys), weights=weights)
    export_peft(adapter, tmp_path / "out", base=base)
    config = files.read_json(tmp_path / "out" / "adapter_config.json")
    assert {name.rpartition(".")[2] for name in config["target_parameters"]} <= {"gate_up_proj", "down_proj"}
    back = import_peft(tmp_path / "out", base=base, name="back")
    ids = mx.array([[5, 9, 33, 21]])
    logits = [load_model(resolve_base(base), one).logits(ids) for one in (adapter, back)]
    assert mx.abs(logits[0] - logits[1]).max().item() < 1e-4


def test_experts_of_code_that_a_model_brings_go_out_as_its_modules(tmp_path: Path):
    base = tiny_base(tmp_path / "base", "Klear")
    adapter = picked_adapter(base, lambda key: key.endswith("experts.up_proj"))
    export_peft(adapter, tmp_path / "out", base=base)
    config = files.read_json(tmp_path / "out" / "adapter_config.json")
    assert "target_parameters" not in config
    assert {name.rpartition(".")[2] for name in config["target_modules"]} == {"up_proj"}
    assert "model.layers.1.mlp.experts.3.up_proj" in config["target_modules"]
    assert import_peft(tmp_path / "out", base=base, name="back").fingerprint == adapter.fingerprint


@pytest.mark.parametrize(
    "extra", [{"paths": 5}, {"folds": "x"}, {"folds": {"model.layers.0.self_attn.o_proj": [["a"]]}}]
)
def test_a_record_that_is_nonsense_is_no_record(extra: dict, tmp_path: Path):
    folder = FIXTURES / "llama" / "dropout"
    adapter = import_peft(folder, base=base_of(folder), name="it")
    told = {"peft": adapter.metadata["peft"] | extra} | {"base": adapter.metadata["base"]}
    export_peft(replace(adapter, metadata=told), tmp_path / "out", base=base_of(folder))
    assert import_peft(tmp_path / "out", base=base_of(folder), name="back").fingerprint == adapter.fingerprint
