"""Bases that somebody broke: whatever the libraries raise is one of our errors, and nobody's code runs."""

import contextlib
import io
import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import pytest

from mlx_adapters.errors import AdapterError, FormatError, ModelError, refusals
from mlx_adapters.generation.live import load_model
from mlx_adapters.models.loading import load_module, load_tokenizer_of, require_numbers
from mlx_adapters.sources.bases import resolve_base


class Panic(BaseException):
    """As pyo3 raises where Rust gives up."""


@pytest.fixture
def broken(tiny_model, tmp_path):
    """broken("config.json", quantization=1): a copy of the tiny model with changed settings in a file."""

    def broken(file: str, architecture: str = "llama", **settings) -> Path:
        folder = tmp_path / f"broken-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(tiny_model(architecture), folder)
        path = folder / file
        config = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(config | settings))
        return folder

    return broken


def test_whatever_is_raised_becomes_the_given_error(capsys):
    def leave() -> None:
        print("pip install it:\nnow")
        sys.exit(1)

    for error, why in [
        (Panic("no\nway."), "no way"),
        (ValueError(), "ValueError"),
        (KeyError("x"), "it has no 'x'"),
        (TypeError("A.__init__() missing 2 required positional arguments: 'x' and 'y'"), "it has no 'x' and 'y'"),
        (ValueError("Validation error for field 'x':\n  TypeError: Field 'x' is odd"), "Field 'x' is odd"),
        (leave, "pip install it: now"),
    ]:
        with pytest.raises(ModelError) as refused, refusals(lambda why: ModelError(f"Cannot: {why}.")):
            if callable(error):
                error()
            raise error
        assert refused.value.message == f"Cannot: {why}." and capsys.readouterr().out == ""
    for error in (KeyboardInterrupt(), FormatError("ours")):
        with pytest.raises(type(error)), refusals(ModelError):
            raise error


@pytest.mark.parametrize(
    "settings",
    [
        {"quantization": {"bits": 4}},
        {"quantization": {"bits": [], "group_size": 64}},
        {"rope_parameters": {"rope_theta": "x"}},
        {"rope_parameters": {"full_attention": 1}},
        {"text_config": 1},
        {"vocab_size": "x"},
        {"vocab_size": 10**12},
        {"model_type": "olmo"},
        {"model_type": "..x"},
        {"model_type": None},
        {"model_type": ["llama"]},
        {"num_hidden_layers": 10**9},
        {"hidden_size": 10**12},
        {"num_attention_heads": 0},
        {"num_attention_heads": "4"},
        {"rope_theta": "", "x": 1},
        {"rope_scaling": {"rope_type": "llama3"}},
        {"rms_norm_eps": []},
        {"layer_types": ["x"]},
        {"bos_token_id": "x"},
        {"eos_token_id": [2, "x"]},
        {"eos_token_id": [None]},
        {"quantization_config": 1},
        {"max_position_embeddings": "many"},
        {"model_file": "code.py"},
    ],
    ids=str,
)
def test_a_broken_config_is_refused_or_read(broken, settings):
    folder = broken("config.json", **settings)
    try:
        load_model(resolve_base(folder)).generate("hi", max_tokens=1)
    except AdapterError as error:
        assert "\n" not in error.message and error.message.endswith(".") and "Error(" not in error.message


def test_a_config_that_transformers_refuses_is_not_the_tokenizers_fault(broken):
    folder = broken("config.json", rms_norm_eps="1e-5")
    with pytest.raises(FormatError, match=r"transformers cannot read the config\.json of .*'rms_norm_eps'"):
        load_tokenizer_of(resolve_base(folder))


def test_a_model_that_reads_one_token_and_no_text_is_refused(broken):
    with pytest.raises(ModelError, match="cannot load"):
        load_module(resolve_base(broken("config.json", "gemma3_text", sliding_window=0)))


@pytest.mark.parametrize(
    "settings", [{"rope_theta": 0.0}, {"rope_theta": -1.0}, {"rms_norm_eps": float("nan")}], ids=str
)
def test_a_model_that_computes_no_numbers_is_refused_when_it_is_loaded(broken, settings):
    base = resolve_base(broken("config.json", **settings))
    for dtype in ("float32", "float16"):
        with pytest.raises(ModelError, match="computes NaN or Inf: its weights are numbers") as refused:
            load_model(base, dtype=dtype)
        assert "rope_theta" in refused.value.hint and ("float32" in refused.value.hint) == (dtype == "float16")


@pytest.mark.parametrize("architecture", ["qwen3_moe", "mixtral"])
def test_experts_that_no_token_goes_to_are_refused(architecture, broken):
    with pytest.raises(ModelError, match="sends a token to 0 experts: 'num_experts_per_tok'"):
        load_model(resolve_base(broken("config.json", architecture, num_experts_per_tok=0)))
    load_model(resolve_base(broken("config.json", num_experts_per_tok=0)))  # of no experts


def test_a_weight_that_is_no_number_is_named(broken):
    folder = broken("config.json")
    weights = mx.load(str(folder / "model.safetensors"))
    weights["model.norm.weight"][3] = float("nan")
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    with pytest.raises(ModelError, match=r"computes NaN or Inf: its 'model\.norm\.weight' holds it"):
        load_model(resolve_base(folder))


@pytest.mark.parametrize(("rows", "asked"), [(1, [0]), (2, [0, 1]), (3, [1, 2]), (9, [3, 4, 5])])
def test_a_model_is_tried_with_tokens_that_it_has(rows, asked):
    """The row after the last would be foreign memory."""
    seen = []

    def module(tokens):
        seen.extend(tokens.flatten().tolist())
        return mx.zeros((*tokens.shape, rows))

    require_numbers(module, SimpleNamespace(vocabulary=rows))
    assert seen == asked


@pytest.mark.parametrize("settings", [{"rope_theta": 0.5}, {"rms_norm_eps": 1e30}], ids=str)
def test_odd_numbers_that_a_model_can_compute_with_are_taken(broken, settings):
    assert load_model(resolve_base(broken("config.json", **settings)))


NO_TOKENS = [b'{"eos_token_id": %b}' % one for one in (b"[[]]", b'["null"]', b"[null]", b'{"": {}}', b"true", b"[1.5]")]


@pytest.mark.parametrize("content", [b"1", b"[]", b'"x"', b"{", b"\xff", b"[" * 100_000, *NO_TOKENS])
def test_a_broken_generation_config_is_no_traceback(broken, content):
    folder = broken("config.json")
    (folder / "generation_config.json").write_bytes(content)
    try:
        load_model(resolve_base(folder))
        assert content not in NO_TOKENS
    except FormatError as error:
        named = "is no token id" if content in NO_TOKENS else "The generation_config.json of"
        assert named in error.message and "config.json" in error.hint


def test_settings_of_mlx_lms_under_the_other_name_are_told_so(broken):
    packed = broken("config.json", quantization_config={"group_size": 64, "bits": 4})
    with pytest.raises(FormatError, match="packed by what its config does not name"):
        load_model(resolve_base(packed))


@pytest.mark.parametrize(
    "file, content",
    [
        ("tokenizer.json", b"[" * 100_000),
        ("tokenizer.json", b"1"),
        ("tokenizer.json", b'{"model": {"type": "BPE"}}'),
        ("tokenizer.json", b""),
        ("tokenizer_config.json", b"[" * 100_000),
        ("tokenizer_config.json", b"[]"),
        ("tokenizer_config.json", b'{"tool_parser_type": 1}'),
        ("tokenizer_config.json", b'{"chat_template_type": "..x"}'),
        ("tokenizer_config.json", b'{"tokenizer_class": 3}'),
        ("tokenizer_config.json", b'{"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": "x"}'),
        ("tokenizer_config.json", b'{"chat_template": "{% for"}'),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_broken_tokenizer_is_refused_or_read(broken, file, content):
    folder = broken("config.json")
    (folder / file).write_bytes(content)
    try:
        load_model(resolve_base(folder)).encode("hi")
    except AdapterError as error:
        assert str(folder) in error.message or "chat template" in error.message


def test_a_model_that_asks_for_its_own_code_is_told_so(broken):
    with pytest.raises(FormatError, match=r"brings code of its own, 'mdl.py', which is not run unasked\."):
        load_model(resolve_base(broken("config.json", model_file="mdl.py")))


def test_what_is_no_file_is_refused_before_it_is_read(broken):
    folder = broken("config.json")
    os.mkfifo(folder / "special_tokens_map.json")
    with pytest.raises(FormatError, match="neither a file nor a folder"):
        load_model(resolve_base(folder))


@pytest.mark.parametrize(
    "settings",
    [
        {"auto_map": {"AutoTokenizer": ["code.T", None]}, "tokenizer_class": "T"},
        {"auto_map": {"AutoTokenizer": ["code.T", "code.T"]}},
    ],
)
def test_code_of_the_folder_never_runs_even_after_a_yes(broken, monkeypatch, tmp_path, settings):
    """transformers would ask, on standard input."""
    folder = broken("tokenizer_config.json", **settings)
    ran, auto = tmp_path / "ran", {"AutoConfig": "code.T"}
    (folder / "code.py").write_text(f"open({str(ran)!r}, 'w')\nclass T: pass\n")
    config = json.loads((folder / "config.json").read_text()) | {"auto_map": auto}
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    for load, more in ((load_tokenizer_of, {}), (load_module, {"model_file": "code.py"})):
        (folder / "config.json").write_text(json.dumps(config | more))
        with contextlib.suppress(AdapterError):  # or a class that transformers has
            load(resolve_base(folder))
    assert not ran.exists() and sys.stdin.read() == "y\n" * 9


def test_a_shard_that_is_missing_is_named(tiny_model, tmp_path):
    """The index names it; mlx-lm would name some tensor."""
    folder, weights = tmp_path / "base", {}
    shutil.copytree(tiny_model("llama", bits=4), folder)
    weights = dict(mx.load(str(folder / "model.safetensors")))
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    files = {name: f"model-{1 + i % 2:05d}-of-00002.safetensors" for i, name in enumerate(names)}
    kept = {name: weights[name] for name in names if "00001" in files[name]}
    mx.save_safetensors(str(folder / "model-00001-of-00002.safetensors"), kept, {"format": "mlx"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    with pytest.raises(ModelError, match="it lacks model-00002-of-00002"):
        load_model(resolve_base(folder))


@pytest.mark.parametrize("second", ["model.safetensors", "model.fp16.safetensors", "model-00001-of-00003.safetensors"])
def test_weights_of_two_models_in_one_folder_are_refused(tiny_model, tmp_path, second):
    """Which file counts would be left to the order in which the disk lists them."""
    folder, first = tmp_path / "base", "model-00001-of-00001.safetensors"
    shutil.copytree(tiny_model("llama", bits=4), folder)
    (folder / "model.safetensors").rename(folder / first)
    shutil.copy(folder / first, folder / second)
    load_model(resolve_base(folder))  # twice the same is one model
    shutil.copy(tiny_model("llama", bits=4, seed=1) / "model.safetensors", folder / second)
    with pytest.raises(AdapterError, match=r"holds weights of two models: '.*' is another") as error:
        load_model(resolve_base(folder))
    assert first in str(error.value) and second in str(error.value) and error.value.hint
