"""An adapter whose base differs in the beginnings of its paths alone: the error says how to go on, and that works."""

import re
import shlex

import mlx.core as mx
import pytest
from click.testing import CliRunner
from helpers.adapters import make_adapter
from helpers.peft import FIXTURES

import mlx_adapters as ma
from mlx_adapters.cli import cli as program
from mlx_adapters.errors import IncompatibleError

VISION = FIXTURES / "vision" / "gemma3" / "base"
KEYS = tuple(f"language_model.model.layers.{i}.self_attn.q_proj" for i in range(2))


def shorter(adapter):
    """The same adapter as one of a text model of the same blocks."""
    weights = {name.removeprefix("language_model."): array for name, array in adapter.weights.items()}
    keys = tuple(key.removeprefix("language_model.") for key in adapter.config.keys)
    config = ma.AdapterConfig(adapter.config.rank, adapter.config.scale, keys)
    return ma.Adapter(config, weights, {"base": {"name": "org/text"}, "name": "text"})


@pytest.fixture
def text(tmp_path):
    return ma.write_adapter(shorter(make_adapter(VISION, KEYS)), tmp_path / "text")


def test_the_hint_names_the_base_and_what_it_says_works(text):
    wanted = ma.load_model(VISION, make_adapter(VISION, KEYS)).logits([[5, 9, 27]])
    with pytest.raises(IncompatibleError, match=r"no layer 'model\.layers\.0\.self_attn\.q_proj'") as caught:
        ma.load_model(VISION, ma.load_adapter(text))
    hint = caught.value.hint
    assert "begin with nothing, there it is 'language_model.'" in hint and "--base org/text" in hint
    (command,) = re.findall(r"'mlx-adapters (add [^']+)'", hint)
    arguments = shlex.split(command.replace("NAME", "fitted"))
    assert str(VISION) in arguments and str(text) in arguments
    done = CliRunner().invoke(program, arguments)
    assert done.exit_code == 0, done.output
    assert mx.allclose(ma.load_model(VISION, ma.load_adapter("fitted")).logits([[5, 9, 27]]), wanted, atol=1e-5)


@pytest.mark.parametrize("command", ["generate", "fuse", "eval", "export-peft"])
def test_every_command_says_so(text, command, tmp_path):
    arguments = {
        "generate": ["hi", "--adapter", str(text), "--base", str(VISION)],
        "fuse": [str(text), str(tmp_path / "out"), "--base", str(VISION)],
        "eval": [str(text), "--base", str(VISION), "--data", "w5 w6"],
        "export-peft": [str(text), str(tmp_path / "out"), "--base", str(VISION)],
    }[command]
    done = CliRunner().invoke(program, [command, *arguments])
    assert isinstance(done.exception, ma.AdapterError), done.output
    if command != "eval":
        assert f"--base {VISION}" in done.exception.hint, done.exception


def test_another_base_altogether_names_the_one_it_was_made_for(text, tiny_model):
    with pytest.raises(IncompatibleError) as caught:
        ma.load_model(tiny_model("gpt2"), ma.load_adapter(text))
    assert caught.value.hint == "it was made for 'org/text'."
