"""Models load, adapters go on and off, references parse, files are whole or absent."""

import contextlib
import json
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from helpers.adapters import random_adapter
from hypothesis import given
from hypothesis import strategies as st

import mlx_adapters as ma
from mlx_adapters import errors
from mlx_adapters.config.mapping import from_mapping, read_yaml
from mlx_adapters.config.quantization import Quantization
from mlx_adapters.config.training import LoraConfig
from mlx_adapters.generation.live import load_model
from mlx_adapters.models import layers
from mlx_adapters.models.adapter import Adapter, read_adapter, write_adapter
from mlx_adapters.models.base import normalized_config
from mlx_adapters.models.loading import load_tokenizer_of
from mlx_adapters.sources import references, registry
from mlx_adapters.sources.bases import resolve_base
from mlx_adapters.storage import files, paths, tensor_files
from mlx_adapters.storage.replacing import Output

ARCHITECTURES = ["llama", "qwen2", "qwen3", "gemma3_text", "phi3", "mixtral", "qwen3_moe", "gpt2"]
TOKENS = [5, 9, 2, 77, 31]


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_attached_equals_updated_weights_and_detach_restores(tiny_model, tmp_path, architecture, kind):
    model = load_model(resolve_base(tiny_model(architecture)))
    before = model.logits(TOKENS)
    adapter = random_adapter(model, kind)
    model.attach(adapter)
    attached = model.logits(TOKENS)
    assert mx.abs(attached - before).max() > 1e-2
    folder = write_adapter(adapter, tmp_path / "a")
    plain, _ = mlx_lm.load(str(tiny_model(architecture)), adapter_path=str(folder), model_config=model.base.config)
    plain.set_dtype(mx.float32)
    assert mx.abs(plain(mx.array([TOKENS]))[0] - attached).max() < 1e-4
    model.detach()
    assert mx.array_equal(model.logits(TOKENS), before)
    for key, a, b, m in adapter.layers():
        layer = layers.adaptable_layers(model.module)[key]
        layer.weight = layers.updated_weight(layer.weight, a, b, m, adapter.config.scale)
    assert mx.abs(model.logits(TOKENS) - attached).max() < 1e-4


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_dense_copy_computes_the_same_function(tiny_model, bits):
    folder = tiny_model("llama", bits=bits)
    dense, stored = load_model(resolve_base(folder)), load_model(resolve_base(folder), dense=False)
    assert stored.module.model.layers[0].mlp.up_proj.bits == bits
    stored.module.set_dtype(mx.float32)
    assert mx.abs(dense.logits(TOKENS) - stored.logits(TOKENS)).max() < 1e-4


def test_embedding_and_head_adapters(tiny_model):
    model = load_model(resolve_base(tiny_model("llama")))
    adapter = random_adapter(model, targets=("embed_tokens", "q_proj"))
    assert "model.embed_tokens" in adapter.config.keys
    before = model.logits(TOKENS)
    model.attach(adapter)
    attached = model.logits(TOKENS)
    model.detach()
    for key, a, b, m in adapter.layers():
        layer = layers.adaptable_layers(model.module)[key]
        layer.weight = layers.updated_weight(layer.weight, a, b, m, 2.0, embedding=key.endswith("embed_tokens"))
    assert mx.abs(model.logits(TOKENS) - attached).max() < 1e-4
    assert mx.abs(attached - before).max() > 1e-2


def test_a_16_bit_dora_adapter_is_computed_in_float32_on_a_float32_base(tiny_model):
    """mlx-lm's DoRALinear takes the norm in the type of the factors: 0.01 off in the logits."""
    model = load_model(resolve_base(tiny_model("llama")))
    adapter = random_adapter(model, "dora")
    small = adapter.with_weights({name: array.astype(mx.bfloat16) for name, array in adapter.weights.items()})
    model.attach(small)
    logits = model.logits([5, 9, 2])
    model.attach(small.with_weights({name: array.astype(mx.float32) for name, array in small.weights.items()}))
    assert mx.array_equal(logits, model.logits([5, 9, 2]))


def test_target_modules(tiny_model):
    module = load_model(resolve_base(tiny_model("llama"))).module
    resolve = layers.resolve_target_modules
    assert resolve(module, LoraConfig(target_modules=("q_proj",))) == tuple(
        f"model.layers.{i}.self_attn.q_proj" for i in range(len(module.layers))
    )
    assert resolve(module, LoraConfig(target_modules=("mlp.up_proj",), num_layers=1)) == (
        f"model.layers.{len(module.layers) - 1}.mlp.up_proj",
    )
    assert len(resolve(module, LoraConfig())) == 7 * len(module.layers)
    with pytest.raises(errors.ConfigError, match="q_prj") as caught:
        resolve(module, LoraConfig(target_modules=("q_prj",)))
    assert "q_proj" in caught.value.hint
    with pytest.raises(errors.ConfigError, match="blocks"):
        resolve(module, LoraConfig(num_layers=99))


def test_a_failed_attach_changes_nothing(tiny_model):
    model = load_model(resolve_base(tiny_model("llama")))
    good = random_adapter(model)
    model.attach(good)
    before = model.logits(TOKENS)
    wrong_shape = dict(good.weights)
    first = good.config.keys[0]
    wrong_shape[f"{first}.lora_a"] = mx.zeros((3, 4))
    with pytest.raises(errors.IncompatibleError, match="needs"):
        model.attach(good.with_weights(wrong_shape))
    other = Adapter(good.config, good.weights, {"base": {"name": "x", "fingerprint": "0"}})
    with pytest.raises(errors.IncompatibleError, match="other weights"):
        model.attach(other)
    assert mx.array_equal(model.logits(TOKENS), before)
    model.attach(other, any_base=True)


def broken(adapter, how):
    weights, key = dict(adapter.weights), adapter.config.keys[0]
    if how == "nan":
        weights[f"{key}.lora_b"] = weights[f"{key}.lora_b"] * mx.array(float("nan"))
    elif how == "huge":  # each number is one, and their products are none
        weights = {name: mx.full(weight.shape, 1e20) for name, weight in weights.items()}
    elif how == "missing":
        del weights[f"{key}.lora_b"]
    elif how == "extra":
        weights[f"{key}.lora_c"] = mx.zeros((2,))
    elif how == "rank":
        weights[f"{key}.lora_a"] = weights[f"{key}.lora_a"][:, :2]
    return weights


@pytest.mark.parametrize("how", ["nan", "huge", "missing", "extra", "rank", "truncated", "random", "empty", "config"])
def test_damaged_adapters_are_refused(tiny_model, tmp_path, how):
    adapter = random_adapter(load_model(resolve_base(tiny_model("llama"))))
    folder = write_adapter(adapter, tmp_path / "a")
    file = folder / "adapters.safetensors"
    if how == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif how == "random":
        file.write_bytes(np.random.default_rng(0).bytes(5000))
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "config":
        (folder / "adapter_config.json").write_text('{"fine_tune_type": "lora", "lora_parameters": {"rank": "8"}}')
    else:
        mx.save_safetensors(str(file), broken(adapter, how))
    with pytest.raises(errors.FormatError):
        read_adapter(folder)
    if how in ("nan", "huge", "missing", "extra", "rank"):
        with pytest.raises(errors.FormatError):
            write_adapter(adapter.with_weights(broken(adapter, how)), tmp_path / "b")
        assert not (tmp_path / "b").exists()


def test_adapter_round_trip(tiny_model, tmp_path):
    adapter = random_adapter(load_model(resolve_base(tiny_model("qwen2"))), "dora")
    again = read_adapter(write_adapter(adapter, tmp_path / "a"))
    assert again.config == adapter.config and again.fingerprint == adapter.fingerprint
    assert again.metadata["base"] == adapter.metadata["base"]
    with pytest.raises(errors.ExistsError):
        write_adapter(adapter, tmp_path / "a")
    write_adapter(adapter, tmp_path / "a", overwrite=True)


def test_registry(tiny_model, home):
    adapter = random_adapter(load_model(resolve_base(tiny_model("llama"))))
    registry.register(adapter, "sql")
    (home / "adapters" / "bad").mkdir()
    assert [(e.name, bool(e.problem)) for e in ma.list_adapters()] == [("bad", True), ("sql", False)]
    assert ma.load_adapter("sql").fingerprint == adapter.fingerprint
    with pytest.raises(errors.NotFoundError) as caught:
        ma.load_adapter("sq")
    assert "sql" in caught.value.hint
    with pytest.raises(errors.NotFoundError, match="no checkpoint 7"):
        ma.load_adapter("sql@7")


def test_tensors_of_a_layer_that_the_settings_do_not_name_are_not_written(tiny_model, tmp_path):
    """The config is made of the settings, and the keys are read off the tensors: it could not be read again."""
    adapter = random_adapter(load_model(resolve_base(tiny_model("llama"))))
    stray = adapter.with_weights(adapter.weights | {"model.other.lora_a": mx.zeros((4, 4))})
    with pytest.raises(errors.FormatError, match=r"'model\.other\.lora_a', which is of none of its layers"):
        ma.write_adapter(stray, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_references():
    parse = references.parse_reference
    assert parse("sql") == references.Reference("name", "sql")
    assert parse("sql@600") == references.Reference("name", "sql", 600)
    assert parse("./a@5") == references.Reference("path", "./a", 5)
    assert parse("user/repo@v1") == references.Reference("hub", "user/repo", revision="v1")
    assert parse("a/b/c") == references.Reference("hub", "a/b", subfolder="c")
    for bad in ("", "a b", "sql@", "sql@x", "sql@1@2", "sql@" + "9" * 5000, "a//c", "-x"):
        with pytest.raises(errors.ConfigError):
            parse(bad)


@given(st.text(max_size=40))
def test_any_text_parses_or_is_refused(text):
    with contextlib.suppress(errors.ConfigError):
        assert references.parse_reference(text).kind in ("name", "path", "hub")


def test_base_errors(tmp_path, tiny_model):
    for name in ("nowhere", str(tmp_path / "no"), str(tmp_path)):
        with pytest.raises(errors.NotFoundError):
            resolve_base(name)
    with pytest.raises(errors.HubError):
        resolve_base("user/does-not-exist")
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "config.json").write_text((tiny_model("llama") / "config.json").read_text())
    with pytest.raises(errors.NotFoundError, match="safetensors"):
        load_model(resolve_base(folder))
    (folder / "model.safetensors").write_bytes(b"x" * 500)
    with pytest.raises(errors.FormatError):
        load_model(resolve_base(folder))


def test_transformers_5_configs_keep_their_rope():
    new = {"model_type": "llama", "rope_parameters": {"rope_theta": 500000.0, "rope_type": "llama3", "factor": 8.0}}
    config = normalized_config(new)
    assert config["rope_theta"] == 500000.0 and config["rope_scaling"]["factor"] == 8.0
    gemma = {"rope_parameters": {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}}
    config = normalized_config(gemma)
    assert config["rope_theta"] == 1e6 and config["rope_local_base_freq"] == 1e4
    assert "rope_parameters" in new and "rope_theta" not in new


def test_settings_are_strict(tmp_path):
    assert from_mapping(LoraConfig, {"rank": 4, "scale": 2, "target_modules": ["q_proj"]}).target_modules == ("q_proj",)
    with pytest.raises(errors.ConfigError) as caught:
        from_mapping(LoraConfig, {"rnk": 4})
    assert "rank" in caught.value.hint
    for wrong in ({"rank": 0}, {"rank": True}, {"rank": "8"}, {"scale": float("nan")}, {"dropout": 1.0}, {"type": "x"}):
        with pytest.raises(errors.ConfigError):
            from_mapping(LoraConfig, wrong)
    for bits, group, mode in ((7, 64, "affine"), (4, 16, "affine"), (8, 32, "mxfp4"), (4, 64, "afine")):
        with pytest.raises(errors.ConfigError):
            Quantization(bits, group, mode)
    (tmp_path / "c.yaml").write_text("learning_rate: 1e-5\nrank: 8\n")
    assert read_yaml(tmp_path / "c.yaml") == {"learning_rate": 1e-5, "rank": 8}
    (tmp_path / "c.yaml").write_text("a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}\nc: [{x: 1}, {x: 2}]\n")
    assert read_yaml(tmp_path / "c.yaml")["b"] == {"x": 3, "y": 2}
    for twice in ("x: 1\ny: 2\nx: 3\n", "a: {x: 1, x: 1}\n", "a: [{x: 1, x: 2}]\n", '{"x": 1, "x": 2}'):
        (tmp_path / "c.yaml").write_text(twice)
        with pytest.raises(errors.ConfigError, match="cannot be read: 'x' stands in it twice"):
            read_yaml(tmp_path / "c.yaml")


def test_files_are_whole_or_absent(tmp_path):
    with pytest.raises(KeyError), files.atomic_file(tmp_path / "a") as stream:
        stream.write(b"half")
        raise KeyError
    with pytest.raises(KeyError), files.atomic_folder(tmp_path / "f") as folder:
        (folder / "x").write_text("half")
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_overwriting_replaces_a_folder_of_its_kind_only(tmp_path):
    for name, kept in (("model", False), ("photos", True), ("empty", False)):
        (tmp_path / name).mkdir()
        if name != "empty":
            (tmp_path / name / ("config.json" if name == "model" else "holiday.jpg")).write_text("old")
        refused = pytest.raises(errors.ExistsError, match="other things") if kept else contextlib.nullcontext()
        with refused, files.atomic_folder(tmp_path / name, True, Output("config.json")) as folder:
            (folder / "config.json").write_text("new")
    assert (tmp_path / "photos" / "holiday.jpg").read_text() == "old"
    assert {p.read_text() for p in tmp_path.glob("*/config.json")} == {"new"}
    assert len(list(tmp_path.iterdir())) == 3


def test_a_place_that_is_no_folder_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "x", tmp_path / "file" / "y" / "x", Path("/dev/null/x")):
        for writer in (files.atomic_file, files.atomic_folder):
            with pytest.raises(errors.StorageError, match="no folder to write in"), writer(path):
                pass


def test_a_lack_of_space_is_told_in_figures_that_say_something(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=2000))
    with pytest.raises(errors.StorageError, match="needs 70 kB, but the disk has 2 kB free"):
        paths.require_free_space(tmp_path / "x", 70_000)


def test_json_never_holds_nan(tmp_path):
    with pytest.raises(errors.FormatError, match=r"loss\.json"):
        files.write_json(tmp_path / "loss.json", {"loss": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing(tmp_path):
    code = (
        "import resource, sys, mlx_adapters, mlx.core as mx\n"
        "from mlx_adapters.storage.tensor_files import write_safetensors\n"
        "from pathlib import Path\n"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
        "try:\n"
        f"    write_safetensors(Path({str(tmp_path)!r}) / 'big.safetensors', {{'x': mx.zeros((100, 100))}})\n"
        "except mlx_adapters.StorageError as error:\n"
        "    sys.exit(7)\n"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 7
    assert list(tmp_path.iterdir()) == []


def test_safetensors_written_here_are_read_everywhere(tmp_path):
    from safetensors import safe_open

    tensors = {
        "f": mx.random.normal((3, 5)),
        "h": mx.random.normal((2, 4)).astype(mx.bfloat16),
        "t": mx.random.normal((4, 3)).T,
        "u": mx.array([[1, 2], [3, 4]], dtype=mx.uint32),
        "e": mx.zeros((0, 3)),
        "s": mx.array(2.5),
    }
    tensor_files.write_safetensors(tmp_path / "x.safetensors", tensors, {"format": "mlx"})
    back = mx.load(str(tmp_path / "x.safetensors"))
    assert all(mx.array_equal(back[name], tensors[name]) for name in tensors if tensors[name].size)
    with safe_open(tmp_path / "x.safetensors", framework="np") as file:
        assert np.array_equal(file.get_tensor("t"), np.array(tensors["t"]))


def test_importing_mlx_lm_keeps_the_limit_of_open_files():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    code = "import mlx_adapters, resource as r; import mlx_adapters.system.door; print(r.getrlimit(r.RLIMIT_NOFILE))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == str(before)


def run(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "mlx_adapters", *map(str, arguments)], capture_output=True, text=True, **options
    )


def test_command_line_errors_are_two_lines():
    for arguments, status in ((["show", "nobody"], 1), (["generate", "x", "--base", "./none"], 1), (["nosuch"], 2)):
        done = run(*arguments)
        assert done.returncode == status and "Traceback" not in done.stderr and "Error" in done.stderr, done.stderr
    assert json.loads(run("list", "--json").stdout) == {"schema": "mlx_adapters/1", "adapters": []}


def test_generate_streams_text(tiny_model, home):
    folder = tiny_model("llama")
    adapter = random_adapter(load_model(resolve_base(folder)))
    registry.register(adapter, "a")
    answer = json.loads(run("generate", "hello", "--adapter", "a", "--max-tokens", "4", "--json").stdout)
    expected = load_model(resolve_base(folder), adapter).generate("hello", max_tokens=4)
    assert answer["token_ids"] == expected.token_ids and answer["text"] == expected.text


def test_what_is_saved_of_the_machine_names_no_folder_of_its_user(home):
    from mlx_adapters.system.machine import environment

    machine = environment()
    assert machine.home == str(home) and "home" not in machine.to_json() and str(home) not in str(machine.to_json())


def test_a_tokenizer_that_does_not_load_is_told_in_one_line(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(errors.FormatError) as caught:
        load_tokenizer_of(resolve_base(tmp_path))
    assert "\n" not in caught.value.message and not caught.value.message.endswith("..")


@pytest.mark.parametrize("function", ["as_numpy", "raw_bytes"])
def test_an_array_that_cannot_be_evaluated_raises_and_ends_no_process(tmp_path, function):
    path = tmp_path / "a.safetensors"
    code = (
        "import os, sys, mlx_adapters, mlx.core as mx; from mlx_adapters.storage import tensor_files\n"
        "mx.save_safetensors(sys.argv[1], {'a': mx.zeros((300, 300))}); late = mx.load(sys.argv[1])['a'] + 1\n"
        "os.truncate(sys.argv[1], 5000)\n"
        "try: getattr(tensor_files, sys.argv[2])(late)\n"
        "except RuntimeError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path), function], capture_output=True, text=True)
    assert done.returncode == 0 and "Unable to read" in done.stdout, done.stderr
