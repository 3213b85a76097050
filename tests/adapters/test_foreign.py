"""Adapters as other MLX programs write them are taken in at their strength, in the form that plain mlx-lm loads."""

import json

import mlx.core as mx
import numpy as np
import pytest
from helpers.adapters import make_adapter, make_mlx_lm_folder
from helpers.odd_values import every_change
from helpers.tiny_models import build_model

from mlx_adapters.adapters.adding import add
from mlx_adapters.errors import AdapterError, FormatError, IncompatibleError, NotFoundError
from mlx_adapters.events import Note
from mlx_adapters.models.adapter import read_adapter
from mlx_adapters.models.loading import load_model
from mlx_adapters.peft_format.foreign import read_foreign
from mlx_adapters.sources.bases import resolve_base
from mlx_adapters.sources.registry import names

KEYS = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj")
IDS = mx.array([[3, 9, 27, 81, 40, 7, 300, 12]])
OWN = {"fine_tune_type": "lora", "num_layers": -1, "lora_parameters": {"rank": 4, "scale": 2.0, "dropout": 0.0}}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return build_model(tmp_path_factory.mktemp("foreign") / "base", "llama")


@pytest.fixture(scope="module")
def whole(base):
    return make_adapter(base, KEYS, rank=4, factor=2.0)


def logits(base, adapter):
    return np.array(load_model(resolve_base(base), adapter).logits(IDS))


def by_plain_mlx_lm(base, folder):
    from mlx_lm import load

    model, _ = load(str(base), adapter_path=str(folder))
    return np.array(model(IDS))


def vlm(weights):
    return {name.replace("lora_a", "A").replace("lora_b", "B"): array for name, array in weights.items()}


def own(**changes):
    return OWN | changes


def parameters(**changes):
    return OWN | {"lora_parameters": {"rank": 4, "dropout": 0.0} | changes}


# What the folder's config says, how its tensors are called, its file, and the strength it has beyond 2.0.
FOLDERS = {
    "mlx-lm": (OWN, dict, "adapters.safetensors"),
    "mlx-lm of 2024": ({"lora_layers": 16} | {k: OWN[k] for k in ("lora_parameters",)}, dict, "adapters.safetensors"),
    "no dropout": (own(lora_parameters={"rank": 4, "scale": 2.0}), dict, "adapters.safetensors"),
    "num_layers null": (own(num_layers=None), dict, "adapters.safetensors"),
    "num_layers all": (own(num_layers="all"), dict, "adapters.safetensors"),
    "num_layers too small": (own(num_layers=1), dict, "adapters.safetensors"),
    "keys auto": (parameters(scale=2.0, keys=["auto"]), dict, "adapters.safetensors"),
    "PEFT's file name": (OWN, dict, "adapter_model.safetensors"),
    "an .npz with a config": (OWN, dict, "adapters.npz"),
    "mlx-vlm": ({"rank": 4, "alpha": 8.0, "dropout": 0.1}, vlm, "adapters.safetensors"),
    "mlx-vlm's other file": ({"rank": 4, "alpha": 8.0, "dropout": 0.1}, vlm, "weights.safetensors"),
    "mlx-tune's npz": ({"model_name": "x", "lora_config": {"r": 4, "lora_alpha": 8}}, dict, "adapters.npz"),
    "optiq": (OWN | {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "optiq": {}}, dict, "adapters.safetensors"),
    "optiq's best": (OWN | {"peft_type": "LORA", "r": 4, "lora_alpha": 8}, dict, "best/adapters.safetensors"),
    "alpha alone": (parameters(alpha=8), dict, "adapters.safetensors"),
}


def write(folder, config, weights, file="adapters.safetensors"):
    (folder / file).parent.mkdir(parents=True)
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(config))
    save = mx.savez if file.endswith(".npz") else lambda path, **arrays: mx.save_safetensors(path, arrays)
    save(str(folder / file), **weights)
    return folder


@pytest.mark.parametrize("kind", FOLDERS)
def test_what_is_taken_in_has_its_strength_and_plain_mlx_lm_loads_it(base, whole, tmp_path, kind):
    config, spelled, file = FOLDERS[kind]
    notes = []
    added = add(write(tmp_path / "it", config, spelled(whole.weights), file), base=base, on_event=notes.append)
    assert np.array_equal(logits(base, read_adapter(added.folder)), logits(base, whole))
    assert np.abs(by_plain_mlx_lm(base, added.folder) - logits(base, whole)).max() < 1e-4
    assert sorted(path.name for path in added.folder.iterdir()) == [
        "adapter_config.json",
        "adapter_metadata.json",
        "adapters.safetensors",
    ]
    doubted = any("alpha" in event.text for event in notes if isinstance(event, Note))
    assert doubted == ("scale" not in json.dumps(config))
    assert read_adapter(added.folder).strength_note is None  # it is used at the strength that it was trained at


def test_bfloat16_of_an_npz(base, whole, tmp_path):
    weights = {name: array.astype(mx.bfloat16) for name, array in whole.weights.items()}
    added = add(write(tmp_path / "it", OWN, weights, "adapters.npz"))
    taken = read_adapter(added.folder).weights
    assert all(
        mx.array_equal(taken[name], array) and taken[name].dtype == mx.bfloat16 for name, array in weights.items()
    )


@pytest.mark.parametrize("scales", [{}, {KEYS[1]: 0.6}])
def test_layers_of_several_ranks_and_scales_become_one_rank_and_one_scale(base, whole, tmp_path, scales):
    """optiq gives layers ranks by their bits; unsloth names the rank and the scale of single modules."""
    wide = make_adapter(base, KEYS[1:], rank=6, seed=5)
    weights = {name: array for name, array in whole.weights.items() if KEYS[1] not in name} | wide.weights
    config = OWN | {"unsloth_mlx_lora_module_ranks": {KEYS[1]: 6}, "unsloth_mlx_lora_module_scales": scales}
    taken = read_adapter(add(write(tmp_path / "it", config, weights)).folder)
    assert taken.config.rank == 6
    for key in KEYS:
        a, b, _ = taken.factors(key)
        parts = [weights[f"{key}.{leaf}"] for leaf in ("lora_a", "lora_b")]
        assert mx.allclose(taken.config.scale * a @ b, scales.get(key, 2.0) * parts[0] @ parts[1], atol=1e-6)


def test_dora_of_other_programs_is_known_by_its_magnitudes(base, tmp_path):
    adapter = make_adapter(base, KEYS, type="dora")
    config = {"lora_parameters": OWN["lora_parameters"]}
    assert read_adapter(add(write(tmp_path / "it", config, adapter.weights)).folder).config.type == "dora"


@pytest.mark.parametrize("on", ["llama", "a prefix"])
def test_paths_that_differ_in_their_beginnings_are_fitted_to_the_base(base, whole, tmp_path, on):
    """Vision-language models put `language_model.` before the names of a text model's layers."""
    weights = {f"language_model.{name}": array for name, array in whole.weights.items()}
    if on == "a prefix":
        weights = {name.removeprefix("model."): array for name, array in whole.weights.items()}
    folder = write(tmp_path / "it", OWN | {"model": str(base)}, weights)
    for options in ({}, {"base": base, "overwrite": True}):
        taken = read_adapter(add(folder, **options).folder)
        assert set(taken.config.keys) == set(KEYS)
        assert np.array_equal(logits(base, taken), logits(base, whole))


def test_a_base_that_it_does_not_fit_is_said_before_anything_is_written(base, tmp_path):
    other = make_adapter(base, ("model.layers.0.self_attn.q_proj",))
    weights = {name.replace("layers.0", "layers.7"): array for name, array in other.weights.items()}
    with pytest.raises(IncompatibleError, match=r"no layer 'model\.layers\.7"):
        add(write(tmp_path / "it", OWN, weights), base=base)
    assert names() == []


def test_the_file_of_its_weights_stands_for_its_folder(base, tmp_path):
    folder = make_mlx_lm_folder(base, tmp_path / "plain")
    one = add(folder / "0000100_adapters.safetensors", name="one")
    assert one.iterations == () and one.name == "one"
    wanted = mx.load(str(folder / "0000100_adapters.safetensors"))
    assert all(mx.array_equal(array, wanted[name]) for name, array in read_adapter(one.folder).weights.items())
    assert add(folder / "adapters.safetensors").name == "plain"


@pytest.mark.parametrize(
    ("config", "file", "words", "hint"),
    [
        (None, "adapters.npz", "no adapter_config.json with a 'scale'", '"rank": 4'),
        ({"fine_tune_type": "lora"}, "adapters.safetensors", "'scale'", "SCALE"),
        (parameters(scale="strong"), "adapters.safetensors", "'scale', not 'strong'", "'scale' of its training"),
        (parameters(scale="2.0"), "adapters.safetensors", "'scale', not '2.0'", "quotes"),
        (parameters(scale=2.0, dropout=3), "adapters.safetensors", "'dropout', not '3'", "'dropout' of its training"),
        (parameters(scale=2.0, rank=9), "adapters.safetensors", "rank 9, but its tensors have rank 4", "copy"),
        (parameters(scale=2.0, rank="4"), "adapters.safetensors", "a number as 'rank', not '4'", "quotes"),
        (parameters(alpha="much"), "adapters.safetensors", "'alpha', not 'much'", "'alpha' of its training"),
        ({"lora_config": {"r": 4, "lora_alpha": "8"}}, "adapters.npz", "'alpha', not '8'", "quotes"),
        (OWN | {"lora_parameters": [4, 2.0]}, "adapters.safetensors", "no 'lora_parameters'", "looks like"),
        ([OWN], "adapters.safetensors", "must hold a JSON object", "another kind of file"),
        (OWN, "adapter.safetensors", "has no adapters.safetensors, but adapter.safetensors", "name the file itself"),
        (OWN, "0000100_adapters.safetensors", "but 0000100_adapters.safetensors", "name the file itself"),
        ({"peft_type": "LORA", "r": 4}, "adapters.safetensors", "PEFT adapter", "import-peft"),
        ({"fine_tune_type": "full"}, "adapters.safetensors", "full fine-tune", "extract"),
        (own(fine_tune_type="vera"), "adapters.safetensors", "'fine_tune_type' is 'vera'", "looks like"),
    ],
)
def test_errors_name_the_field_that_is_wrong(base, whole, tmp_path, config, file, words, hint):
    with pytest.raises((FormatError, NotFoundError)) as caught:
        add(write(tmp_path / "it", config, whole.weights, file))
    assert words in caught.value.message and hint in caught.value.hint
    assert names() == []


@pytest.mark.parametrize(
    ("change", "words", "hint"),
    [
        (lambda name, array: array if name.endswith("a") else None, "does not hold both factors of", "whole"),
        (lambda name, array: array.T, "of no one rank", "import-peft"),
        (lambda name, array: array.reshape(-1), "does not hold both factors of", "whole"),
    ],
)
def test_factors_that_are_none_are_told_by_their_layer(whole, tmp_path, change, words, hint):
    weights = {n: made for n, array in whole.weights.items() if (made := change(n, array)) is not None}
    with pytest.raises(FormatError, match=words) as caught:
        add(write(tmp_path / "it", OWN, weights))
    assert hint in caught.value.hint and any(key in caught.value.message for key in KEYS)


def test_a_tensor_that_no_adapter_has_is_named(whole, tmp_path):
    weights = whole.weights | {"optimizer.step": mx.array([1.0])}
    with pytest.raises(FormatError, match=r"a tensor 'optimizer\.step' that no adapter has") as caught:
        add(write(tmp_path / "it", OWN, weights))
    assert "save the adapter alone" in caught.value.hint
    with pytest.raises(FormatError, match="holds no layer"):
        add(write(tmp_path / "empty", OWN, {}))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (parameters(scale=0.0), "the strength 0: it changes nothing"),
        ({"rank": 4, "alpha": 0}, "the strength 0: it changes nothing"),
        (parameters(scale=2.0, alpha="16"), "alpha '16' beside scale 2"),
        (parameters(scale=2.0) | {"alpha": 16}, "alpha '16' beside scale 2"),
        (parameters(scale=2.0) | {"r": 4, "lora_alpha": 16}, "alpha '16' beside scale 2"),
    ],
)
def test_a_strength_that_is_odd_is_told(whole, tmp_path, config, words):
    notes = []
    add(write(tmp_path / "it", config, whole.weights), on_event=notes.append)
    assert any(words in event.text for event in notes if isinstance(event, Note))


@pytest.mark.parametrize("kind", sorted({name: FOLDERS[name] for name in FOLDERS if "/" not in FOLDERS[name][2]}))
def test_whatever_a_config_holds_an_error_says_what_to_do(whole, tmp_path, kind):
    config, spelled, file = FOLDERS[kind]
    folder = write(tmp_path / "it", config, spelled(whole.weights), file)
    for odd in every_change(config):
        (folder / "adapter_config.json").write_text(json.dumps(odd))
        try:
            read_foreign(folder, folder / file, "it")
        except AdapterError as error:
            assert error.hint, error


def test_an_npz_that_unfolds_to_more_than_it_holds_is_refused(tmp_path):
    np.savez_compressed(tmp_path / "adapters.npz", **{f"{KEYS[0]}.lora_a": np.zeros((1 << 15, 1 << 10), np.float32)})
    (tmp_path / "adapter_config.json").write_text(json.dumps(OWN))
    with pytest.raises(FormatError, match=r"not a whole \.npz"):
        add(tmp_path, name="it")
    (tmp_path / "adapters.npz").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(FormatError, match=r"not a whole \.npz"):
        add(tmp_path, name="it")
    np.savez(tmp_path / "adapters.npz", **{f"{KEYS[0]}.lora_a": np.array([{"a": 1}], object)})
    with pytest.raises(FormatError, match=r"not a whole \.npz"):
        add(tmp_path, name="it")


def test_a_model_is_told_as_one(tiny_model):
    """Its file of weights is none of an adapter's, whatever is offered otherwise."""
    with pytest.raises(NotFoundError, match="is a model, not an adapter") as caught:
        add(tiny_model("llama"), name="it")
    assert "--base" in caught.value.hint
