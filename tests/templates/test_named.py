"""Chat templates with names are one to everything here, and stay what they are on the disk."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
from helpers.adapters import make_adapter
from helpers.chat_families import TOOLS, chat_tokenizer, plain, write_base
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

import mlx_adapters as ma
from mlx_adapters.assembly.writing import copy_companions
from mlx_adapters.models.loading import load_tokenizer_of
from mlx_adapters.sources.bases import resolve_base
from mlx_adapters.system.door import tool_parser_of
from mlx_adapters.system.templates import in_one, template_in, templates_in
from mlx_adapters.templates.habits import _habits

MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
PIECES = [
    "{% for m in messages %}",
    "{% endfor %}",
    "{{- 'a' -}}",
    "{%- set x = 1 %}",
    "\n",
    "  ",
    "t",
    "{# c #}",
    "{{ x }}",
]


def base_with(folder: Path, where: str, default: str, tool_use: str | None = None) -> Path:
    """A base whose templates stand in `where`: settings, folder, or processor; made with Qwen 3's tokenizer."""
    if not folder.exists():
        write_base(folder, "qwen3")
    named = {"default": default} | ({} if tool_use is None else {"tool_use": tool_use})
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    if where == "settings":
        settings["chat_template"] = [{"name": name, "template": text} for name, text in named.items()]
    elif where == "folder":
        (folder / "chat_template.jinja").write_text(default)
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "tool_use.jinja").write_text(tool_use or "")
    else:
        (folder / "chat_template.json").write_text(json.dumps({"chat_template": default}))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("where", ["settings", "folder"])
@pytest.mark.parametrize("tools", [None, [], TOOLS], ids=["none", "empty", "tools"])
def test_they_render_as_in_transformers(tmp_path, where, tools):
    folder = base_with(tmp_path / "base", where, "\n" + plain("qwen2") + "\n", plain("qwen3") + "  \n\n")
    theirs, ours = AutoTokenizer.from_pretrained(folder), load_tokenizer_of(resolve_base(folder))
    assert isinstance(theirs.chat_template, dict) and isinstance(ours.chat_template, str)
    for last in (False, True):
        options = {"tools": tools, "tokenize": False, "add_generation_prompt": last, "enable_thinking": True}
        assert ours.apply_chat_template(MESSAGES, **options) == theirs.apply_chat_template(MESSAGES, **options)


@given(st.lists(st.sampled_from(PIECES), max_size=6), st.lists(st.sampled_from(PIECES), max_size=6))
def test_each_renders_as_it_does_alone(default, tool_use):
    named = {"default": "".join(default), "tool_use": "".join(tool_use)}
    tokenizer = chat_tokenizer("qwen2")

    def rendered(text: str, tools: list | None) -> str | None:
        try:
            return tokenizer.apply_chat_template(MESSAGES, chat_template=text, tools=tools, tokenize=False)
        except Exception:  # no template
            return None

    alone = {name: rendered(text, None if name == "default" else []) for name, text in named.items()}
    if None not in alone.values():
        assert rendered(in_one(named), None) == alone["default"]
        assert rendered(in_one(named), []) == alone["tool_use"]


@pytest.mark.parametrize("where", ["settings", "folder", "processor"])
def test_calls_and_thoughts_are_found_in_them(tmp_path, where):
    """As in the same template without a name: mlx-lm looks for calls in a text alone."""
    folder = base_with(tmp_path / "base", where, plain("qwen3"), plain("qwen3"))
    alone = load_tokenizer_of(resolve_base(write_base(tmp_path / "alone", "qwen3")))
    tokenizer = load_tokenizer_of(resolve_base(folder))
    parser = tool_parser_of(tokenizer)
    assert parser is not None and parser.start == "<tool_call>"
    assert _habits(tokenizer, None) == _habits(alone, None)


def test_one_that_is_no_template_spoils_no_other(tmp_path):
    folder = base_with(tmp_path / "base", "settings", plain("qwen3"), "{% if %}")
    tokenizer = load_tokenizer_of(resolve_base(folder))
    assert "Hello" in tokenizer.apply_chat_template(MESSAGES, tokenize=False)


def test_without_a_default_there_is_none_for_all(tmp_path):
    folder = base_with(tmp_path / "base", "settings", plain("qwen3"))
    path = folder / "tokenizer_config.json"
    path.write_text(path.read_text().replace('"default"', '"rag"'))
    assert templates_in(folder) == {"rag": plain("qwen3")} and template_in(folder) is None


@pytest.mark.parametrize("where", ["settings", "folder", "processor"])
def test_a_gguf_file_has_them_by_name(tiny_model, tmp_path, where):
    named = {"default": "{{ messages }}"} | ({} if where == "processor" else {"tool_use": "{{ tools }}"})
    folder = base_with(shutil.copytree(tiny_model("llama"), tmp_path / "base"), where, *named.values())
    adapter = make_adapter(folder, keys=("model.layers.1.self_attn.q_proj",))
    ma.fuse(folder, adapter, tmp_path / "out", options=ma.FuseOptions(method="nearest", check=False, format="gguf"))
    (path,) = tmp_path.rglob("*.gguf")
    fields = {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items() if "chat_template" in key}
    more = {} if where == "processor" else {"template.tool_use": "{{ tools }}", "templates": ["tool_use"]}
    expected = {"template": "{{ messages }}", **more}
    assert fields == {f"tokenizer.chat_{name}": value for name, value in expected.items()}


def test_they_go_along_where_the_tokenizer_of_an_adapter_has_none(tmp_path):
    base = resolve_base(base_with(tmp_path / "base", "folder", plain("qwen3"), plain("qwen2")))
    other = write_base(tmp_path / "other", "qwen3")
    settings = json.loads((other / "tokenizer_config.json").read_text())
    (other / "tokenizer_config.json").write_text(
        json.dumps({k: v for k, v in settings.items() if k != "chat_template"})
    )
    (out := tmp_path / "out").mkdir()
    copy_companions(replace(base, tokenizer=other), out)
    assert templates_in(out) == templates_in(base.folder) and len(templates_in(out)) == 2


def test_a_fused_model_has_its_processors_template_where_mlx_lm_finds_it(tiny_model, tmp_path):
    folder = base_with(shutil.copytree(tiny_model("llama"), tmp_path / "base"), "processor", "{{ messages }}")
    assert AutoTokenizer.from_pretrained(folder).chat_template is None
    adapter = make_adapter(folder, keys=("model.layers.1.self_attn.q_proj",))
    ma.fuse(folder, adapter, tmp_path / "out", options=ma.FuseOptions(method="nearest", check=False))
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == "{{ messages }}"
    assert (tmp_path / "out" / "chat_template.json").is_file()
