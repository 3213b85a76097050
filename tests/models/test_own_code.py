"""Code that a model brings along runs where somebody asks for it by name, and nowhere else."""

import json
import re
from pathlib import Path

import mlx.core as mx
import mlx_lm
import mlx_lm.models.llama
import pytest
from click.testing import CliRunner
from helpers.matrix import IDS, close
from helpers.tiny_models import build_model

import mlx_adapters as ma
from mlx_adapters.cli import cli

OWN = "our_llama.py"
ROWS = '{"text": "How many students are there?"}\n' * 4


@pytest.fixture
def own(tmp_path):
    """A llama whose code lies in its own folder, and leaves a mark when it runs."""
    folder = build_model(tmp_path / "own", "llama", bits=4)
    code = Path(mlx_lm.models.llama.__file__).read_text().replace("from .", "from mlx_lm.models.")
    mark = f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\n"
    (folder / OWN).write_text(mark + code)
    config = json.loads((folder / "config.json").read_text())
    settings = {
        "model_type": "ours",
        "model_file": OWN,
        "trust_remote_code": True,
        "architectures": ["LlamaForCausalLM"],
    }
    (folder / "config.json").write_text(json.dumps(config | settings))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text(ROWS)
    return folder


def run(*arguments):
    return CliRunner().invoke(cli, [str(argument) for argument in arguments], standalone_mode=False)


def commands(own, tmp_path):
    out = tmp_path / "out"
    return {
        "train": ["train", own, "--data", tmp_path / "data", "--name", "a", "--iterations", "1", "--batch-size", "1"],
        "generate": ["generate", "hi", "--base", own, "--adapter", "a", "--max-tokens", "2"],
        "eval": ["eval", "a", "--data", tmp_path / "data", "--split", "train", "--base", own],
        "fuse": ["fuse", "a", out, "--bits", "8", "--base", own],
        "check": ["fuse", "--check-only", out, "--adapter", "a", "--base", own],
        "verify": ["verify", "a", "--base", own],
        "export-peft": ["export-peft", "a", tmp_path / "peft", "--base", own],
        "import-peft": ["import-peft", tmp_path / "peft", "--name", "b", "--base", own],
        "estimate": ["estimate", own, "--data", tmp_path / "data"],
        "benchmark": ["benchmark", "base", "--base", own, "--rounds", "1", "--trials", "1", "--decode-tokens", "2"],
        "extract": ["extract", out, own, "--name", "e"],
        "data check": ["data", "check", tmp_path / "data", "--base", own],
    }


def test_its_code_is_run_when_asked_for_and_never_else(own, tmp_path):
    for name, command in commands(own, tmp_path).items():
        if name != "data check":  # which needs the tokenizer alone
            refused = run(*command)
            assert "--trust-remote-code" in refused.output + str(getattr(refused.exception, "hint", "")), name
            assert not (tmp_path / "ran").exists(), name
        trusted = run(*command, "--trust-remote-code")
        assert trusted.exception is None and trusted.exit_code == 0, (name, trusted.output, trusted.exception)
        told = re.findall(r"mlx-adapters (?:generate|eval|train|fuse) .*", trusted.output)
        assert all("--trust-remote-code" in line for line in told), told
        assert told or name not in ("train", "fuse", "import-peft", "extract", "data check")
        (tmp_path / "ran").unlink(missing_ok=True)
    assert (tmp_path / "out" / OWN).read_text() == (own / OWN).read_text()
    with mx.stream(
        mx.cpu
    ):  # CUDA computes some of these small quantized matrices wrong, and plain mlx-lm does not look
        fused, _ = mlx_lm.load(str(tmp_path / "out"), trust_remote_code=True)
        expected = fused(IDS)
        mx.eval(expected)
    with ma.trusting_remote_code():
        close(expected, ma.load_model(tmp_path / "out").logits(IDS))


def test_what_to_do_is_said(own):
    with pytest.raises(ma.FormatError, match=f"brings code of its own, '{OWN}', which is not run unasked") as caught:
        ma.load_model(own)
    assert "--trust-remote-code" in caught.value.hint


def test_a_config_file_cannot_ask_for_it(own, tmp_path):
    (tmp_path / "run.yaml").write_text(f"base: {own}\ndata: {tmp_path / 'data'}\nname: a\ntrust_remote_code: true\n")
    assert isinstance(run("train", "--config", tmp_path / "run.yaml").exception, ma.ConfigError)
    assert not (tmp_path / "ran").exists()


def test_trust_ends_with_its_block(own):
    with ma.trusting_remote_code(), ma.trusting_remote_code(False), pytest.raises(ma.FormatError):
        ma.load_model(own)
    with pytest.raises(ma.FormatError):
        ma.load_model(own)


@pytest.mark.parametrize("file", ["../code.py", "/tmp/code.py", 3])
def test_code_outside_the_folder_is_refused(own, file):
    config = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps(config | {"model_file": file}))
    with ma.trusting_remote_code(), pytest.raises(ma.FormatError, match="'model_file' is"):
        ma.load_model(own)


def test_what_such_code_raises_is_its_own(own):
    (own / OWN).write_text("raise RuntimeError('made for another mlx-lm')")
    with ma.trusting_remote_code(), pytest.raises(ma.ModelError, match="made for another mlx-lm") as caught:
        ma.load_model(own)
    assert OWN in caught.value.hint


def test_a_tokenizers_code_is_run_when_asked_for(own, tmp_path):
    settings = json.loads((own / "tokenizer_config.json").read_text())
    (own / "tok.py").write_text(
        "from transformers import PreTrainedTokenizerFast\nclass T(PreTrainedTokenizerFast): pass\n"
    )
    auto = {"auto_map": {"AutoTokenizer": [None, "tok.T"]}, "tokenizer_class": "T"}
    (own / "tokenizer_config.json").write_text(json.dumps(settings | auto))
    command = ["data", "check", tmp_path / "data", "--base", own]
    error = run(*command).exception
    assert isinstance(error, ma.FormatError) and "code of its own" in error.message
    assert "--trust-remote-code" in error.hint
    assert run(*command, "--trust-remote-code").exception is None
