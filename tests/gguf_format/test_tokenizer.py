"""What a GGUF file says of a tokenizer, held against the tokenizer itself. scripts/check_gguf.py asks llama.cpp."""

import json
import shutil

import gguf
import numpy as np
import pytest
from helpers.adapters import make_adapter
from helpers.gguf_tokenizers import SENTENCEPIECE, own_spelling, retokenize, sentencepiece_like, split_by
from tokenizers import pre_tokenizers

from mlx_adapters import FuseOptions, fuse
from mlx_adapters.errors import ConfigError, FormatError
from mlx_adapters.events import Note
from mlx_adapters.gguf_format.tokenizer import PRE_TOKENIZERS, check_strings, hard_strings, read_tokenizer
from mlx_adapters.models.loading import load_tokenizer_of
from mlx_adapters.sources.bases import resolve_base
from mlx_adapters.system.door import mx

GGUF = FuseOptions(method="nearest", check=False, format="gguf")
NAMES = [pre.name for pre in PRE_TOKENIZERS]
LLAMA = next(pre for pre in PRE_TOKENIZERS if pre.name == "llama-bpe")


@pytest.fixture
def folder(tiny_model, tmp_path):
    return shutil.copytree(tiny_model("llama"), tmp_path / "model")


def read(folder):
    tokenizer = load_tokenizer_of(resolve_base(folder))
    return read_tokenizer(folder, 512, tokenizer), tokenizer


@pytest.mark.parametrize("name", NAMES)
def test_each_way_of_cutting_up_text_gets_its_own_name(folder, name):
    ignore_merges = name in ("llama-bpe", "tekken")
    made, tokenizer = read(retokenize(folder, own_spelling(name), ignore_merges=ignore_merges, bos=True))
    assert made.pre.name == name and made.add_bos and not made.add_eos and made.special["bos"] == 0
    different = check_strings(made, tokenizer)
    assert not different or (name in ("tekken", "gpt-4o") and len(different) <= 5)


def test_bos_and_eos_are_what_the_tokenizer_does(folder):
    for bos, eos in ((False, False), (True, False), (False, True), (True, True)):
        made, tokenizer = read(retokenize(folder, own_spelling("qwen2"), bos=bos, eos=eos, add_bos_token=not bos))
        assert (made.add_bos, made.add_eos) == (bos, eos)
        assert check_strings(made, tokenizer) == []


@pytest.mark.parametrize(
    "pre",
    [
        pre_tokenizers.ByteLevel(add_prefix_space=True),
        pre_tokenizers.Digits(individual_digits=True),
        split_by(r"\p{N}{1,3}"),
        split_by(LLAMA.patterns[0].replace("{1,3}", "{1,2}")),
        split_by(*LLAMA.patterns, r"\p{N}"),
        pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]),
    ],
    ids=["prefix space", "digits alone", "lone pattern", "two digits", "two splits", "spaces"],
)
def test_what_only_looks_like_a_known_one_is_refused(folder, pre):
    with pytest.raises(ConfigError, match="no known name"):
        read(retokenize(folder, pre))


def test_normalizers(folder):
    made, tokenizer = read(retokenize(folder, own_spelling("qwen2"), nfc=True))
    assert check_strings(made, tokenizer) == ["e\u0301"]  # typed with a separate accent
    path = folder / "tokenizer.json"
    stored = json.loads(path.read_text())
    path.write_text(json.dumps(stored | {"normalizer": {"type": "Lowercase"}}))
    with pytest.raises(ConfigError, match=r"changes text before reading it \(Lowercase\)"):
        read(folder)


def test_a_tokenizer_that_the_lists_do_not_describe_is_refused(folder):
    path = retokenize(folder, own_spelling("qwen2")) / "tokenizer.json"
    stored = json.loads(path.read_text())
    stored["model"]["merges"] = stored["model"]["merges"][: len(stored["model"]["merges"]) // 2]
    made, tokenizer = read(folder)
    made.merges[:] = made.merges[: len(made.merges) // 2]
    with pytest.raises(ConfigError, match=r"llama.cpp would read \d+ of \d+ strings otherwise"):
        check_strings(made, tokenizer)


@pytest.mark.parametrize("kind", SENTENCEPIECE)
def test_sentencepieces_bpe_is_read_alike(tiny_model, tmp_path, kind):
    folder = sentencepiece_like(shutil.copytree(tiny_model("llama", vocab_size=800), tmp_path / "model"), kind)
    tokenizer = load_tokenizer_of(resolve_base(folder))
    made = read_tokenizer(folder, 800, tokenizer)
    assert made.pre is None and made.pieces.space_before == (kind == "llama")
    assert check_strings(made, tokenizer) == []
    assert made.tokens[0] == ("<unk>", 2) and made.tokens[1] == ("<s>", 3) and made.tokens[15] == ("<0x0A>", 6)
    fuse(folder, make_adapter(folder), tmp_path / "out", quantization="none", options=GGUF)
    fields = gguf.GGUFReader(tmp_path / "out/model.gguf").fields
    assert fields["tokenizer.ggml.model"].contents() == "llama"
    assert fields["tokenizer.ggml.add_space_prefix"].contents() == (kind == "llama")
    scores = fields["tokenizer.ggml.scores"].contents()
    assert len(scores) == 800 and max(scores[261:]) == 0.0


def test_sentencepieces_bpe_with_other_scores_is_refused(tiny_model, tmp_path):
    """Merges that no scores could give: the pair that comes second makes the token that comes first."""
    folder = sentencepiece_like(shutil.copytree(tiny_model("llama", vocab_size=800), tmp_path / "model"), "gemma")
    tokenizer = load_tokenizer_of(resolve_base(folder))
    path = folder / "tokenizer.json"
    stored = json.loads(path.read_text())
    stored["model"]["merges"].reverse()
    path.write_text(json.dumps(stored))
    with pytest.raises(ConfigError, match=r"llama\.cpp would read"):
        check_strings(read_tokenizer(folder, 800, tokenizer), tokenizer)
    path.write_text(json.dumps(stored | {"pre_tokenizer": {"type": "Whitespace"}}))
    with pytest.raises(ConfigError, match="does not know this tokenizer's Whitespace"):
        read_tokenizer(folder, 800, tokenizer)


def test_what_else_ends_an_answer_is_told(folder):
    made, tokenizer = read(retokenize(folder, own_spelling("qwen2")))
    tokenizer.add_eos_token("<|im_start|>")
    made = read_tokenizer(folder, 512, tokenizer)
    assert made.special["eos"] == 2 and made.special["eot"] == 1
    tokenizer._eos_token_ids |= {-5, 512, 1 << 63}  # a config's, which no token has
    assert read_tokenizer(folder, 512, tokenizer).special == made.special


def test_a_tokenizer_of_other_files_is_the_one_that_is_loaded(folder):
    retokenize(folder, own_spelling("gpt-2"))
    whole, _ = read(folder)
    stored = json.loads((folder / "tokenizer.json").read_text())["model"]
    merges = [" ".join(merge) for merge in stored["merges"]]
    (folder / "vocab.json").write_text(json.dumps(stored["vocab"]))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    (folder / "tokenizer.json").unlink()
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"tokenizer_class": "GPT2Tokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    made, tokenizer = read(folder)
    assert (made.merges, made.pre) == (whole.merges, whole.pre)
    assert [made.tokens[index][0] for index in stored["vocab"].values()] == list(stored["vocab"])
    assert check_strings(made, tokenizer) == []
    with pytest.raises(ConfigError, match=r"has no tokenizer\.json"):
        read_tokenizer(folder, 512, object())


def test_there_are_a_hundred_hard_strings():
    strings = hard_strings(["<|im_start|>"])
    assert len(set(strings)) == len(strings) >= 100


def test_the_file_says_what_was_found(folder, tmp_path):
    retokenize(folder, own_spelling("tekken"), ignore_merges=True, bos=True)
    notes = []
    fuse(folder, make_adapter(folder), tmp_path / "out", quantization="none", options=GGUF, on_event=notes.append)
    fields = gguf.GGUFReader(tmp_path / "out/model.gguf").fields
    assert fields["tokenizer.ggml.pre"].contents() == "tekken"
    assert fields["tokenizer.ggml.add_bos_token"].contents() is True
    assert fields["tokenizer.ggml.add_eos_token"].contents() is False
    warned = [note.text for note in notes if isinstance(note, Note) and note.level == "warning"]
    assert all("llama.cpp cuts up" in text for text in warned)


@pytest.mark.parametrize(
    ("dtype", "value", "fits"), [("bfloat16", 1e5, True), ("float16", 1e5, False), ("auto", 1e5, False)]
)
def test_what_the_files_type_cannot_hold_is_refused(tiny_model, tmp_path, dtype, value, fits):
    folder = shutil.copytree(tiny_model("llama", dtype="bfloat16"), tmp_path / "model")
    weights = dict(mx.load(str(folder / "model.safetensors")))
    weights["model.layers.1.mlp.up_proj.weight"][1, 1] = value
    mx.eval(weights)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    adapter = make_adapter(folder, ["model.layers.0.mlp.up_proj"])
    if fits:
        fuse(folder, adapter, tmp_path / "out", quantization="none", dtype=dtype, options=GGUF)
        for tensor in gguf.GGUFReader(tmp_path / "out/model.gguf").tensors:
            assert np.isfinite(gguf.quants.dequantize(tensor.data, tensor.tensor_type)).all()
        return
    with pytest.raises(FormatError, match=r"up_proj"):
        fuse(folder, adapter, tmp_path / "out", quantization="none", dtype=dtype, options=GGUF)
    assert not (tmp_path / "out").exists()
