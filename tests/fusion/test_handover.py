"""What other programs are given beside the model. Nothing here runs them: scripts/check_gguf.py asks llama.cpp."""

import json
import re
import shutil
from pathlib import Path

import mlx.core as mx
import pytest
from helpers.adapters import make_adapter
from helpers.chat_families import FAMILIES, plain
from helpers.fusing import visible_adapter
from transformers.utils.chat_template_utils import render_jinja_template

from mlx_adapters.checkpoints.left_out import left_out
from mlx_adapters.cli.fuse import _show
from mlx_adapters.config.fusing import FuseOptions, opened_by
from mlx_adapters.errors import ConfigError
from mlx_adapters.fusion.fuse import fuse
from mlx_adapters.fusion.handover import chat_form
from mlx_adapters.models.loading import load_model
from mlx_adapters.sources.bases import resolve_base

CHAT = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "What is 1 + 1?"},
    {"role": "assistant", "content": 'Two, "obviously".'},
    {"role": "user", "content": "And\n  then?"},
]


UNSAID = ("gemma2",)  # which takes no system message


def as_go(template, messages):
    """What Go makes of the few things that these templates are made of."""
    body = re.fullmatch(r"\{\{- range \$i, \$_ := \.Messages \}\}(.*)\{\{- end \}\}(.*)", template, re.S)
    made = ""
    for i, message in enumerate(messages):
        follows = i == 1 and messages[0]["role"] == "system"
        tests = {
            'if eq .Role "system"': message["role"] == "system",
            'else if eq .Role "assistant"': message["role"] == "assistant",
            "else if eq $i 0": i == 0,
            'else if and (eq $i 1) (eq (index $.Messages 0).Role "system")': follows,
            "else": True,
        }
        taken, on = False, True
        for action in re.findall(r"\{\{-? (.*?) \}\}", body[1]):
            if action in tests:
                on = tests[action] and not taken
                taken = taken or on
            elif action == "end":
                on = True
            elif on:
                made += message["content"] if action == ".Content" else json.loads(action)
    return made + "".join(json.loads(action) for action in re.findall(r"\{\{ (.*?) \}\}", body[2]))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_go_template_says_what_the_jinja_template_says_or_there_is_none(name):
    family = FAMILIES[name]
    words = {"bos_token": family.bos or "", "eos_token": family.stops.split()[0]}

    def render(messages):
        options = {"chat_template": plain(name), "add_generation_prompt": True, **words}
        return render_jinja_template(conversations=[messages], **options)[0][0]

    form = chat_form(render)
    assert (form is None) == (name in UNSAID)
    if form is not None:
        for messages in (CHAT, CHAT[1:], CHAT[:2], CHAT[1:2], [*CHAT, *CHAT[2:]]):
            assert as_go(form.go(), messages) == render(messages) == form.render(messages)


def make(base, tmp_path, program, bits="keep", **more):
    options = FuseOptions(method="nearest", check=False, program=program, **more)
    return fuse(base, visible_adapter(base), tmp_path / "Out", quantization=bits, options=options)


def test_ollama_gets_a_modelfile(tiny_model, tmp_path):
    made = make(tiny_model("llama"), tmp_path, "ollama", 4)
    text = (tmp_path / "Out/Modelfile").read_text()
    assert text.startswith("FROM ./model.gguf\n") and (tmp_path / "Out/model.gguf").is_file()
    template = re.search(r'TEMPLATE """(.*?)"""\n', text, re.S)[1]
    assert as_go(template, CHAT[:2]) == (
        "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nWhat is 1 + 1?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert 'PARAMETER stop "<|im_end|>"\n' in text
    assert made.opened_with == (f"ollama create out -f {tmp_path}/Out/Modelfile", "ollama run out")
    report = json.loads((tmp_path / "Out/fuse_report.json").read_text())
    assert "Modelfile" in report["files"]


@pytest.mark.parametrize(
    ("program", "bits", "file", "command"),
    [
        ("llama.cpp", 8, "model.gguf", "llama-cli -m {out}/model.gguf --jinja"),
        ("transformers", "none", "model.safetensors", "transformers chat {out}"),
        ("vllm", "none", "model.safetensors", "vllm serve {out}"),
    ],
)
def test_programs_get_their_format(tiny_model, tmp_path, program, bits, file, command):
    made = make(tiny_model("llama"), tmp_path, program, bits)
    assert (tmp_path / "Out" / file).is_file()
    assert made.opened_with[0] == command.format(out=tmp_path / "Out")


def test_what_ollamas_language_cannot_say_is_told(tiny_model, tmp_path):
    base = shutil.copytree(tiny_model("llama"), tmp_path / "base")
    for name, text in (("reversed", "{{ messages | length }}"), ("dated", "{{ strftime_now('%d') }}")):
        tail = "{% for m in messages %}{{ m['content'] }}{% endfor %}" if name == "dated" else ""
        (base / "chat_template.jinja").write_text(text + tail)
        made = make(base, tmp_path / name, "ollama")
        assert ("TEMPLATE" in (tmp_path / name / "Out/Modelfile").read_text()) == (name == "dated")
        assert any("left out of the Modelfile" in note or "today's date" in note for note in made.notes)


def test_lm_studio_looks_two_folders_down(tiny_model, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    base = tiny_model("llama")
    made = make(base, Path(), "lmstudio", format="gguf")
    assert f"ln -s {tmp_path}/Out ~" in made.opened_with[0] and made.opened_with[1] == "lms load local/Out"
    _show(made)
    assert "\n".join(made.opened_with) in capsys.readouterr().out  # as it is: of a shorter path it links to itself
    models = tmp_path / ".lmstudio/models"
    options = FuseOptions(method="nearest", check=False, program="lmstudio")
    made = fuse(base, visible_adapter(base), models / "me/sql", options=options)
    assert made.opened_with == ("lms load me/sql",)
    with pytest.raises(ConfigError, match="PUBLISHER/NAME"):
        fuse(base, visible_adapter(base), models / "sql", options=options)
    shutil.rmtree(models)


def test_mlx_vlm_is_for_models_of_pictures(tiny_model, tmp_path):
    with pytest.raises(ConfigError, match="is for models of pictures or sound"):
        make(tiny_model("llama"), tmp_path / "x", "mlx-vlm", 4)


def ends(folder):
    """The tensors of the embedding and of the output layer, as the index names them: mlx-vlm reads by it."""
    places = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    paths = "language_model.model.embed_tokens.", "language_model.lm_head."
    return [
        {n.removeprefix(path): mx.load(str(folder / file))[n] for n, file in places.items() if n.startswith(path)}
        for path in paths
    ]


def same(one, other):
    return one.keys() == other.keys() and all(mx.array_equal(one[name], other[name]).item() for name in one)


@pytest.mark.parametrize("bits", [4, "none"])
def test_mlx_vlm_gets_the_packed_output_layer_that_it_makes_of_the_embedding(bits, tiny_model, tmp_path):
    base = tiny_model("gemma3")
    made = make(base, tmp_path, "mlx-vlm", bits)
    assert made.opened_with[0].startswith("mlx_vlm.generate --model")
    embedding, head = ends(made.folder)
    assert same(embedding, head) if bits == 4 else not head
    plain = make(base, tmp_path / "plain", None, bits)
    logits = [load_model(resolve_base(fused.folder)).logits([1, 2, 3]) for fused in (made, plain)]
    assert mx.array_equal(*logits).item()
    assert left_out(resolve_base(made.folder)) == ({}, [])  # fused once more, it is made of the new embedding


@pytest.fixture
def with_a_head(tiny_model, tmp_path):
    """A copy of a base with an output layer of its own, `factor` times the embedding: as mlx-vlm converts it for 1."""

    def made(factor):
        folder = tmp_path / f"base{factor}"
        shutil.copytree(tiny_model("gemma3"), folder)
        weights = mx.load(str(folder / "model.safetensors"))
        head = factor * weights["language_model.model.embed_tokens.weight"]
        mx.save_safetensors(str(folder / "model.safetensors"), weights | {"language_model.lm_head.weight": head})
        return folder

    return made


def test_an_output_layer_that_is_the_embedding_is_rounded_as_it_is(with_a_head, tmp_path):
    base = with_a_head(1.0)
    options = FuseOptions(method="nearest", check=False, program="mlx-vlm", recipe="mixed_4_6")  # of the layer 6 bits
    embedding, head = ends(fuse(base, visible_adapter(base), tmp_path / "out", options=options).folder)
    assert same(embedding, head) and "scales" in head


def test_mlx_vlm_would_not_see_an_output_layer_of_its_own(with_a_head, tmp_path):
    base = with_a_head(0.5)
    with pytest.raises(ConfigError, match="the two differ"):
        make(base, tmp_path / "x", "mlx-vlm", 4)
    with pytest.raises(ConfigError, match="the adapter changes one of them"):
        options = FuseOptions(method="nearest", check=False, program="mlx-vlm")
        fuse(base, make_adapter(base, keys=("language_model.lm_head",)), tmp_path / "x", options=options)


def test_a_format_that_the_program_does_not_open_is_refused():
    assert FuseOptions().format == "mlx" and FuseOptions(program="ollama").format == "gguf"
    with pytest.raises(ConfigError, match="ollama does not open the format 'mlx'"):
        FuseOptions(program="ollama", format="mlx")
    assert set(opened_by("lmstudio")) == {"mlx", "gguf"}
