"""A traced rendering has the text of the plain one, and says of each character where it came from."""

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2.ext import loopcontrols

from mlx_adapters.system.templates import Bounded
from mlx_adapters.templates import tracing
from mlx_adapters.templates.traced import Leaf, Traced, joined
from mlx_adapters.templates.tracing import account, regions, wrapped

ENVIRONMENT = Bounded(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
ENVIRONMENT.filters["tojson"] = json.dumps
TEXTS = st.text("ab \n<>/x", max_size=12)
MESSAGES = [
    {"role": "user", "content": " Hello  there \n"},
    {"role": "assistant", "content": "<think>\nI add.\n</think>\n\nIt is 4.", "tool_calls": [{"name": "f", "n": 1}]},
    {"role": "tool", "content": "sunny, rain"},
]


def render(source: str, messages=MESSAGES, **variables):
    template = ENVIRONMENT.from_string(source)
    plain = template.render(messages=messages, **variables)
    traced = tracing.render(template, wrapped(messages), variables)
    assert traced.text == plain
    return traced


def owners(rendering) -> str:
    """For each character the number of the message it came from, or a dot."""
    marks = ["."] * len(rendering.text)
    for run in rendering.runs:
        marks[run.start : run.stop] = str(run.leaf.message) * (run.stop - run.start)
        if run.offset is not None:
            assert rendering.text[run.start : run.stop] == run.leaf.text[run.offset :][: run.stop - run.start]
    return "".join(marks)


@pytest.mark.parametrize(
    ("source", "traced"),
    [
        ("<{{ messages[0].content }}>", ".000000000000000."),
        ("{{ '[' + messages[0]['content'] | trim + ']' }}", ".000000000000."),
        ("{{ '[' ~ messages[0].content.strip() ~ messages[2].content ~ 3 }}", ".00000000000022222222222."),
        ("{{ messages[1].content.split('</think>')[-1].lstrip('\n') }}", "11111111"),
        ("{{ messages[1].content.split('</think>')[0].split('<think>')[1].strip('\n') + '.' }}", "111111."),
        ("{{ messages[2].content[:5] }}{{ messages[2].content[-4:] }}", "222222222"),
        ("{{ messages[2].content[0] }}{{ messages[2].content[-1] }}", "22"),
        ("{{ messages[2].content | replace(', ', ' and ') }}", "22222.....2222"),
        ("{{ messages[2].content.split(', ') | join(' + ') }}", "22222...2222"),
        ("{{ ' + '.join(messages[2].content.split(', ')) }}", "22222...2222"),
        ("{{ messages[2].content.partition(', ')[2] }}{{ messages[2].content.rpartition(', ')[0] }}", "222222222"),
        ("{{ messages[2].content.removeprefix('sunny').removesuffix('rain') }}", "22"),
        ("{% for m in messages[2:] %}{% set t = m.content %}{{ '[' ~ '/' }}{{ '-'.center(3) }}{% endfor %}", "....."),
        ("{% macro head(m) %}<{{ m.role }}>{% endmacro %}{{ head(messages[2]) }}{{ head(m=messages[1]) }}", "." * 17),
        ("{{ ('<' | safe) + messages[2].content[:2] + ('>' | safe) + messages[0].content | e }}", "." * 19),
        ("{{ messages[2].content | upper }}", "2" * 11),
        ("{{ '%s!' % messages[2].content }}", "2" * 12),
        ("{{ '{}!'.format(messages[2].content) }}", "2" * 12),
        ("{{ messages[2].content | tojson }}", "2" * 13),
        ("{{ messages[1].tool_calls | tojson }}", "1" * 23),
        ("{{ [messages[0].content, messages[2].content] | tojson | length }}", ".."),
        ("{% set x %}a{{ messages[2].content }}{% endset %}{{ x | trim }}", "." + "2" * 11),
        ("{% macro m(t) %}({{ t }}){% endmacro %}{{ m(messages[2].content) + '!' }}", "." + "2" * 11 + ".."),
        ("{% for m in messages if m.role == 'tool' %}{{ m.content | default('x', true) }}{% endfor %}", "2" * 11),
        (
            "{% set ns = namespace(t='') %}{% for m in messages[1:] %}{% set ns.t = ns.t + m.content[:3] %}{% endfor %}"
            "{{ ns.t }}",
            "111222",
        ),
        ("{{ messages[2].content[99] }}{{ messages[0].content[-99] | default('none') }}", "...."),
        ("{% for m in messages %}{{ m.role }}{% endfor %}", "." * 17),
        (
            "{{ messages[2].content if 'rain' in messages[2].content and messages[2].content is string else '' }}",
            "2" * 11,
        ),
        ("{% for c in messages[2].content %}{{ c }}{% endfor %}", "2" * 11),
        ("{{ messages[2].content.splitlines()[0] }}{{ messages[0].content.rsplit(None, 1)[1] }}", "2" * 11 + "0" * 5),
    ],
)
def test_characters_know_their_message(source, traced):
    assert owners(render(source)) == traced


def test_a_leaf_tells_the_path_and_the_offset():
    traced = render("{{ messages[1].tool_calls[0].name }}{{ messages[2].content[7:] }}")
    assert [(run.leaf, run.offset) for run in traced.runs] == [
        (Leaf(1, ("tool_calls", 0, "name"), "f"), 0),
        (Leaf(2, ("content",), "sunny, rain"), 7),
    ]


def test_loops_show_where_messages_were_written():
    traced = render("<s>{% for m in messages %}[{{ m.role }}]{% endfor %}.")
    assert {k: traced.text[a:b] for k, (a, b) in regions(traced).items()} == {
        0: "[user]",
        1: "[assistant]",
        2: "[tool]",
    }
    ahead = (
        "{% for m in messages %}{% if m.role == 'user' %}{% continue %}{% endif %}"
        "({% for x in messages[loop.index:] %}+{% endfor %}){% endfor %}"
    )
    traced = render(ahead)
    assert {k: traced.text[a:b] for k, (a, b) in regions(traced).items()} == {1: "(+)", 2: "()"}
    twice = (
        "{% for m in messages[::-1] %}{% endfor %}"
        "{% for m in messages %}{% if loop.last %}{{ m.content }}{% break %}{% endif %}{% endfor %}!"
    )
    traced = render(twice)
    assert {k: traced.text[a:b] for k, (a, b) in regions(traced).items()} == {2: "sunny, rain"}
    assert regions(render("{% for i in range(3) %}{{ messages[i].content }}{% endfor %}")) == {}


METHODS = {
    "strip": [(), ("\n",), ("ab",)],
    "lstrip": [(), (" <",)],
    "rstrip": [(), ("x",)],
    "split": [(), ("a",), ("<x",), (None, 1), ("\n", 2)],
    "rsplit": [(), ("a",), (None, 1), ("\n", 1)],
    "splitlines": [(), (True,)],
    "partition": [("a",), ("<",)],
    "rpartition": [("a",), ("<",)],
    "replace": [("a", "yy"), ("a", ""), ("", "-"), ("<", "a", 1)],
    "removeprefix": [("a",), ("",)],
    "removesuffix": [("x",), ("",)],
    "upper": [()],
    "join": [(["a", "b"],)],
}


@given(TEXTS, TEXTS, st.integers(-13, 13), st.integers(-13, 13))
def test_a_traced_text_is_the_same_str(one, other, start, stop):
    """Every operation gives what str gives, and keeps as many characters' accounts as it has characters."""
    leaf = Leaf(0, ("content",), one)
    traced = Traced(one, ((len(one), leaf, 0),) if one else ())
    both = other + traced + other
    assert both == other + one + other and type(both) is Traced
    whole = other + one + other
    results = [(traced[start:stop], one[start:stop]), (both[start:stop], whole[start:stop]), (both[::-1], whole[::-1])]
    results += [(joined(both), whole), (str(both), whole), (both * 1, whole)]
    for name, calls in METHODS.items():
        for arguments in calls:
            results.append((getattr(both, name)(*arguments), getattr(whole, name)(*arguments)))
    for got, wanted in results:
        assert got == wanted
        for part in itertools.chain([got] if isinstance(got, str) else got):
            if type(part) is Traced:
                assert sum(length for length, _, _ in part._pieces) == len(part)
                for run in account(part).runs:
                    if run.offset is not None:
                        assert part[run.start : run.stop] == one[run.offset :][: run.stop - run.start]
    assert hash(both) == hash(whole) and (one in both) and both.startswith(other) and len(both) == len(whole)


def test_an_empty_template_writes_nothing_of_anybody():
    from mlx_adapters.templates.tracing import Rendering, regions

    assert regions(Rendering("", (), ())) == {}
