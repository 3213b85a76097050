"""An adapter is used with the template and the arguments that it was trained with, unless others are given."""

import dataclasses
import json

import pytest
from click.testing import CliRunner
from helpers.chat_families import write_base

from mlx_adapters import (
    EvaluationConfig,
    FuseOptions,
    LoraConfig,
    TemplateConfig,
    TrainConfig,
    evaluate,
    fuse,
    load_adapter,
    load_model,
    merge,
    train,
)
from mlx_adapters.answers.constraints import Grammars
from mlx_adapters.cli import cli
from mlx_adapters.errors import ConfigError, FormatError
from mlx_adapters.generation.chat import Chat
from mlx_adapters.models.adapter import template_of
from mlx_adapters.protocols.conversation import read_conversation
from mlx_adapters.protocols.fields import Fields
from mlx_adapters.protocols.options import read_options
from mlx_adapters.protocols.prompts import prepared
from mlx_adapters.serving.settings import ServeSettings
from mlx_adapters.serving.start import make_engine

ROWS = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}] * 4
OTHER = "{%- for m in messages %}[{{ m.role }}]{{ m.content }}{%- endfor %}{%- if style %}({{ style }}){%- endif %}"
QUIET = {"enable_thinking": False}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base") / "qwen3", "qwen3")


def trained(base, name, **template):
    settings = TrainConfig(iterations=1, batch_size=1, **template)
    train(base, ROWS, name=name, lora=LoraConfig(rank=1), training=settings)


def prompt(model, **options):
    return model.tokenizer.decode(model.encode_chat([{"role": "user", "content": "a"}], **options))


def test_arguments_and_template_go_with_the_adapter(base):
    trained(base, "quiet", chat_template_args=QUIET)
    trained(base, "other", chat_template=OTHER, chat_template_args={"style": "brief"})
    model = load_model(base)
    plain = prompt(model)
    assert "</think>" not in plain
    with model.using("quiet"):
        quiet = prompt(model)
        assert quiet.endswith("<think>\n\n</think>\n\n") and quiet.startswith(plain)
        assert prompt(model, template=TemplateConfig(chat_template_args={"enable_thinking": True})) == plain
    with model.using("other"):
        assert prompt(model) == "[user]a(brief)"
    assert prompt(model) == plain
    thinking = load_model(base, "quiet", template=TemplateConfig(chat_template_args={"enable_thinking": True}))
    assert prompt(thinking) == plain


def test_in_a_batch_each_adapter_sees_its_own(base, monkeypatch):
    trained(base, "quiet", chat_template_args=QUIET)
    model = load_model(base)
    model.attach("quiet", use=False)
    seen = []
    monkeypatch.setattr(
        type(model), "checked_ids", lambda self, ids, *_: seen.append(self.tokenizer.decode(ids)) or 1 / 0
    )
    for call in (lambda: model.generate_batch([("a", "quiet")]), lambda: Chat(model).compare("a", ["quiet"])):
        with pytest.raises(ZeroDivisionError):
            call()
    with pytest.raises(ZeroDivisionError):
        model.generate_batch([("a", None)])
    assert ["</think>" in text for text in seen] == [True, True, False]


def test_a_server_renders_for_each_adapter_and_as_a_request_asks(base):
    trained(base, "quiet", chat_template_args=QUIET)
    engine = make_engine(str(base), [("quiet", "quiet")], ServeSettings(), name="base")
    decode, grammars = engine.model.tokenizer.decode, Grammars(engine.model.tokenizer, engine.model.vocabulary)

    def prompt(name, **more):
        fields = Fields({"model": name, "messages": [{"role": "user", "content": "a"}], **more})
        asked, talk = read_options(fields, True, engine.model.vocabulary), read_conversation(fields)
        return decode(prepared(engine.model, engine.catalog.template_of(name), asked, talk, grammars, "messages")[0])

    texts = [prompt("base"), prompt("quiet"), prompt("base", chat_template_kwargs=QUIET)]
    assert texts[1] == texts[2] and texts[1].startswith(texts[0]) and texts[1] != texts[0]
    assert prompt("quiet", enable_thinking=True) == texts[0]
    assert prompt("base", reasoning_effort="none") == prompt("base", enable_thinking=False) == texts[1]


def test_a_fused_model_sees_what_the_adapter_saw(base, tmp_path):
    trained(base, "quiet", chat_template_args=QUIET)
    trained(base, "other", chat_template=OTHER, chat_template_args={"style": "brief"})
    texts = {}
    for name in ("quiet", "other"):
        fuse(base, name, tmp_path / name, quantization="none", options=FuseOptions(check=False))
        texts[name] = prompt(load_model(tmp_path / name))
    assert texts["quiet"].endswith("</think>\n\n") and texts["other"] == "[user]a(brief)"
    engine = make_engine(str(tmp_path / "quiet"), [], ServeSettings(), name="quiet")
    assert engine.catalog.template_of("quiet").chat_template_args == QUIET
    report = evaluate([str(tmp_path / "other")], ROWS, config=EvaluationConfig(split="train"))
    same = evaluate(["other"], ROWS, config=EvaluationConfig(split="train"))
    assert report.evaluations[0].tokens == same.evaluations[0].tokens


def test_what_is_made_of_an_adapter_sees_what_it_saw(base):
    trained(base, "quiet", chat_template_args=QUIET)
    trained(base, "plain")
    assert template_of(merge(["quiet", "quiet"], weights=[0.5, 0.5])).chat_template_args == QUIET
    assert template_of(merge(["quiet", "plain"], weights=[0.5, 0.5])) == TemplateConfig()
    settings = TrainConfig(iterations=1, batch_size=1)
    train(base, ROWS, name="on", init_from="quiet", training=settings)
    loud = dataclasses.replace(settings, chat_template_args={"enable_thinking": True})
    train(base, ROWS, name="loud", init_from="quiet", training=loud)
    assert [template_of(load_adapter(name)).chat_template_args["enable_thinking"] for name in ("on", "loud")] == [
        False,
        True,
    ]


def test_wrong_templates_and_arguments_are_refused(base, tmp_path):
    bad = tmp_path / "bad.jinja"
    bad.write_text("{% for m in messages %}")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    with pytest.raises(FormatError, match="The chat template is not valid, line 1"):
        load_model(base, template=TemplateConfig(chat_template=bad.read_text()))
    for text in ('{"chat_template": "{{ messages }}"}', "\ufeff{}"):
        with pytest.raises(ConfigError, match="chat_template is JSON"):
            TemplateConfig(chat_template=text)
    with pytest.raises(ConfigError, match="'tools' cannot be given by an argument"):
        TemplateConfig(chat_template_args={"tools": []})
    with pytest.raises(ConfigError, match=r"a template's text, not 'chat\.jinja'"):
        TemplateConfig(chat_template="chat.jinja")
    line = ["data", "check", str(rows), "--base", str(base)]
    for more, said in (
        (["--chat-template", str(bad)], "not valid, line 1"),
        (["--chat-template", str(tmp_path / "none")], "cannot be read"),
        (["--chat-template-arg", "enable_thinkin=1"], "reads no 'enable_thinkin'"),
        (["--chat-template-arg", "enable_thinking"], "is not KEY=VALUE"),
    ):
        result = CliRunner().invoke(cli, [*line, *more])
        assert result.exit_code != 0 and said in result.output + str(result.exception), more
    fine = tmp_path / "fine.jinja"
    fine.write_text(OTHER)
    shown = CliRunner().invoke(cli, [*line, "--chat-template", str(fine), "--chat-template-arg", "style=brief"])
    assert "[user]a[assistant]b(brief)" in shown.output.replace("[[", "").replace("]]", "")
