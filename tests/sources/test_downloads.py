"""What a repository on the Hub holds is judged before anything large is fetched, and said in its own words."""

import json

import mlx.core as mx
import pytest
from helpers.hub_server import WRITE_TOKEN

import mlx_adapters as ma
from mlx_adapters.errors import AdapterError, ConfigError, FormatError, HubError

pytest_plugins = ["helpers.hub_fixtures"]
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 134515000\n"
CONFIG = b'{"model_type": "llama"}'


def weights_fetched(hub) -> list[str]:
    return [path for _, path in hub.requests if "/resolve/" in path and not path.endswith(".json")]


@pytest.mark.parametrize("config", [{}, {"config.json": CONFIG}], ids=["no config", "config"])
@pytest.mark.parametrize("file", ["m-Q4_K_M.gguf", "pytorch_model.bin", "weights.npz", "consolidated.safetensors"])
def test_weights_that_mlx_lm_does_not_open_are_refused_at_once(hub, file, config):
    hub.add("org/g", {file: b"GGUF", "README.md": b"R"} | config)
    for take in (lambda: ma.download("org/g"), lambda: ma.load_model("org/g"), lambda: ma.download("org/g@main")):
        with pytest.raises(HubError, match=f"no weights that mlx-lm loads.*{file}") as caught:
            take()
        assert "name " in caught.value.hint
    assert not weights_fetched(hub)


def files_of(adapter) -> dict[str, bytes]:
    names = ("adapter_config.json", "adapters.safetensors")
    return {name: (adapter.folder / name).read_bytes() for name in names}


def test_of_several_adapters_one_is_named(hub, sql, cli):
    twice = sql.with_weights({name: weight * 2 for name, weight in sql.weights.items()})
    folder = ma.write_adapter(twice, sql.folder.parent.parent / "twice")
    there = {f"checkpoint-100/{name}": content for name, content in files_of(sql).items()}
    there |= {f"out/checkpoint-200/{name}": (folder / name).read_bytes() for name in files_of(sql)}
    commit = hub.add("org/c", there)
    for take in (lambda: ma.download("org/c"), lambda: ma.load_adapter("org/c")):
        with pytest.raises(HubError, match="several adapters: checkpoint-100, out/checkpoint-200") as caught:
            take()
        assert "org/c/out/checkpoint-200" in caught.value.hint and "--subfolder" in caught.value.hint
    assert ma.load_adapter("org/c/checkpoint-100").fingerprint == sql.fingerprint
    assert ma.load_adapter(f"org/c/out/checkpoint-200@{commit}").fingerprint == twice.fingerprint
    result = ma.download("org/c", subfolder="out/checkpoint-200")
    assert result.name == "c-out-checkpoint-200"
    hub_record = ma.load_adapter(result.name).metadata["hub"]
    assert hub_record == {"repo": "org/c", "revision": commit, "subfolder": "out/checkpoint-200"}
    assert ma.add("org/c/checkpoint-100", name="added").name == "added"
    with pytest.raises(HubError, match="no adapter in 'checkpoint-300', but in checkpoint-100"):
        ma.download("org/c/checkpoint-300")
    with pytest.raises(ConfigError, match="once"):
        ma.download("org/c/checkpoint-100", subfolder="checkpoint-100")
    done = cli("download", "org/c", "--subfolder", "checkpoint-100", "--name", "one", token=WRITE_TOKEN)
    assert done.returncode == 0 and done.stdout.startswith("one: org/c"), done.stderr


def test_the_one_adapter_in_a_folder_is_it(hub, sql):
    hub.add("org/one", {f"final/{name}": content for name, content in files_of(sql).items()})
    assert ma.load_adapter("org/one").fingerprint == sql.fingerprint


PEFT_CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
QUANTIZED = {
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "fp8": {"quant_method": "fp8"},
    "compressed-tensors": {"quant_method": "compressed-tensors", "format": "float-quantized"},
    "hqq": {"quant_method": "hqq"},
    "gptq": {"quant_method": "gptq", "bits": 4},
    "awq": {"quant_method": "awq", "bits": 8},
}


@pytest.mark.parametrize("method", QUANTIZED)
@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("org/Tiny-bnb-4bit", "org/Tiny"),
        ("org/Tiny-unsloth-bnb-4bit", "org/Tiny"),
        ("org/Tiny-FP8-dynamic", "org/Tiny"),
        ("org/Tiny", None),
    ],
)
def test_a_peft_adapter_on_a_packed_base_asks_for_another(hub, tiny_model, method, name, plain):
    folder = tiny_model("llama")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    config = json.loads(files["config.json"]) | {"quantization_config": QUANTIZED[method]}
    hub.add(name, files | {"config.json": json.dumps(config).encode()})
    peft = {"adapter_config.json": json.dumps(PEFT_CONFIG | {"base_model_name_or_path": name}).encode()}
    hub.add("org/p", peft | {"adapter_model.safetensors": b"x"})
    with pytest.raises(AdapterError, match=f"trained on '{name}', which cannot be used.*{method}") as caught:
        ma.download("org/p")
    assert "--base BASE" in caught.value.hint and (plain is None or f"'{plain}'" in caught.value.hint)
    assert not [path for _, path in hub.requests if f"/{name}/resolve" in path and "safetensors" in path]
    with pytest.raises(FormatError, match=rf"'{name}' are packed by {method}") as caught:
        ma.load_model(name)
    assert "unpacked" in caught.value.hint


def test_a_base_whose_tensors_are_none_of_its_config_asks_for_another(hub, tiny_model):
    """Found before the adapter's own weights are fetched, with the way on."""
    files = {path.name: path.read_bytes() for path in tiny_model("llama").iterdir()}
    config = json.loads(files["config.json"]) | {"quantization_config": {"quant_method": "mxfp4"}}
    hub.add("org/Tiny-mxfp4", files | {"config.json": json.dumps(config).encode(), "model.safetensors": POINTER})
    peft = PEFT_CONFIG | {"base_model_name_or_path": "org/Tiny-mxfp4"}
    hub.add("org/p", {"adapter_config.json": json.dumps(peft).encode(), "adapter_model.safetensors": b"x"})
    with pytest.raises(HubError, match=r"trained on 'org/Tiny-mxfp4', which cannot be used") as caught:
        ma.download("org/p")
    assert "--base BASE" in caught.value.hint and not [p for _, p in hub.requests if "adapter_model" in p]


@pytest.mark.parametrize("named", [None, "", "None", "/home/joe/base", 5, ["org/base"]])
def test_a_peft_adapter_without_a_base_asks_for_one(hub, named):
    config = json.dumps(PEFT_CONFIG | {"base_model_name_or_path": named}).encode()
    hub.add("org/p", {"adapter_config.json": config, "adapter_model.safetensors": b"x"})
    with pytest.raises(HubError, match="does not name its base model") as caught:
        ma.download("org/p")
    assert "--base BASE" in caught.value.hint


def test_an_lfs_pointer_is_called_one(hub, sql, tiny_model, tmp_path):
    hub.add("org/p", files_of(sql) | {"adapters.safetensors": POINTER})
    with pytest.raises(FormatError, match=r"'org/p/adapters\.safetensors' is a Git LFS pointer"):
        ma.download("org/p")
    clone = tmp_path / "clone"
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        clone.mkdir()
        for path in tiny_model("llama").iterdir():
            (clone / path.name).write_bytes(POINTER if path.name == name else path.read_bytes())
        with pytest.raises(FormatError, match=f"{name}' is a Git LFS pointer") as caught:
            ma.load_model(clone)
        assert "git lfs pull" in caught.value.hint
        for path in clone.iterdir():
            path.unlink()
        clone.rmdir()


def test_a_gated_repository_says_where_to_ask(hub, tiny_model):
    hub.add("org/gated", {path.name: path.read_bytes() for path in tiny_model("llama").iterdir()})
    for method in ("GET", "HEAD"):
        hub.fail(method, "/resolve/", 403, times=100, X_Error_Code="GatedRepo")
    with pytest.raises(HubError, match="access must be asked for"):
        ma.load_model("org/gated")


def test_a_download_of_an_adapter_takes_one_request_more_than_it_needs(hub, sql):
    hub.add("org/a", files_of(sql))
    ma.download("org/a", name="it")
    about = [path for _, path in hub.requests if "/resolve/" not in path and "agent-harnesses" not in path]
    assert len(about) <= 3, about
    assert mx.array_equal(*(ma.load_adapter(n).weights[next(iter(sql.weights))] for n in ("it", "sql")))
