"""Hostile chat templates end in one sentence, soon and in little memory; the others are as in transformers."""

import faulthandler
import gc
import resource
import signal
import sys
import threading
from pathlib import Path

import pytest
from helpers.hostile import TEMPLATES
from helpers.tiny_models import CHAT_TEMPLATE

from mlx_adapters.errors import AdapterError, ModelError
from mlx_adapters.models.loading import load_model, load_tokenizer_of
from mlx_adapters.sources.bases import resolve_base
from mlx_adapters.system import templates
from mlx_adapters.system.machine import on_gpu

ENDLESS = [text for text in TEMPLATES if "range(99" in text]


@pytest.fixture(scope="module")
def model(tiny_model):
    return load_model(resolve_base(tiny_model("llama")))


@pytest.fixture(autouse=True)
def fails_soon():
    """Where a limit does not hold its test fails: it neither goes on for ever nor fills the memory."""
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("the template goes on"))
    room = resource.getrlimit(resource.RLIMIT_AS)
    if sys.platform == "linux" and not on_gpu():  # whose driver takes addresses as it likes
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + 4_000_000_000, room[1]))
    signal.setitimer(signal.ITIMER_REAL, 10)
    faulthandler.dump_traceback_later(40, exit=True)  # an operation may hear of no signal
    yield
    faulthandler.cancel_dump_traceback_later()
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)
    resource.setrlimit(resource.RLIMIT_AS, room)


@pytest.fixture
def quick(monkeypatch):
    """Limits that a test can wait for."""
    monkeypatch.setattr(templates, "SECONDS", 0.5)
    monkeypatch.setattr(templates, "MEMORY_BYTES", 200_000_000)


@pytest.mark.parametrize("template", TEMPLATES, ids=range(len(TEMPLATES)))
def test_every_hostile_template_ends(model, quick, monkeypatch, template):
    monkeypatch.setattr(model.tokenizer._tokenizer, "chat_template", template)
    before = templates._peak_bytes()
    try:
        assert len(model.encode("hi")) < 100_000
    except ModelError as error:
        assert error.message.startswith(("The chat template refuses this conversation: ", "The prompt is"))
    # Seen once: 1.07 GB. Memory is looked at now and then, and a busy machine looks later; a GPU's driver has its own.
    assert templates._peak_bytes() - before < 1_500_000_000 + (500_000_000 if on_gpu() else 0)
    gc.collect()


@pytest.mark.parametrize(
    "template, why",
    [
        (ENDLESS[0], "it takes more than 0.5 seconds"),
        ("{{ 9**(9**9) }}", "huge number"),
        ("{{ 2 * 'a' * 10**8 }}", "huge text"),
        ("{{ 'a'|center(10**9) }}", "'center' with a huge number"),
        ("{{ 'a'.ljust(10**9) }}", "'ljust' with a huge number"),
        ("{{ messages | tojson(indent=10**9) }}", "'tojson' with a huge number"),
        ("{{ ('a' * 10**6).replace('a', 'b' * 10**6) }}", "'replace' with huge texts"),
        ("{{ '%999999999d' % 1 }}{{ 'x' }}", "huge width"),
        ("{{ '%*d' | format(10**9, 1) }}", "huge"),
        ("{{ '{:>999999999}'.format(1) }}", "huge width"),
        ("{{ '{:{}}'.format(1, 10**9) }}", "huge number"),
        ("{{ 'x' * 5000000 }}", "characters of a short conversation"),
    ],
)
def test_the_reason_is_said(model, quick, monkeypatch, template, why):
    monkeypatch.setattr(model.tokenizer._tokenizer, "chat_template", template)
    with pytest.raises(ModelError) as refused:
        model.encode("hi")
    assert why in refused.value.message and "\n" not in refused.value.message


def test_memory_ends_a_rendering_long_before_its_time_is_over(monkeypatch):
    """It would end by itself, in a second."""
    peaks = iter(range(0, 10**15, 2 * templates.MEMORY_BYTES))  # at each look it has grown
    monkeypatch.setattr(templates, "_peak_bytes", lambda: next(peaks))
    monkeypatch.setattr(templates, "SECONDS", 600.0)
    slow = "{% for i in range(20000) %}{% for j in range(1000) %}{% endfor %}{% endfor %}"
    with pytest.raises(templates.LimitError, match="or 1 GB"):
        templates.Bounded().from_string(slow).render()


def test_an_ended_rendering_leaves_nothing_behind(model, quick, monkeypatch):
    """The exception goes to the rendering and to its thread, and to nobody afterwards."""
    good, same = model.encode("hi"), []

    def others() -> None:
        while not done.is_set():
            same.append(model.encode_chat([{"role": "user", "content": "hi"}]) == good)

    done, tokenizer = threading.Event(), load_tokenizer_of(model.base)
    tokenizer.chat_template = ENDLESS[0]
    worker = threading.Thread(target=others)
    worker.start()
    try:
        for _ in range(2):
            with pytest.raises(templates.LimitError):
                tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])
            sum(range(10_000))
    finally:
        done.set()
        worker.join()
    assert same and all(same)
    assert model.encode("hi") == good and not templates._watch._at_work and not templates._watch._ended


def test_a_template_renders_as_it_does_without_limits(model):
    """Formats, filters and arithmetic of ordinary templates; a long conversation stays as long as it is."""
    text = (
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 2 ** 3 * 2 %}"
        "{{ '%s|%5.2f' % (m.role, 1.5) }}{{ '{:>6}'.format(m.role) }}{{ m.content|trim|indent(2) }}"
        "{{ '-' * 20 }}{{ m|tojson(indent=2) }}{{ m.content.replace('i', 'o') }}{{ [1, 2]|join(', ') }}{% endfor %}"
        "{{ ns.n }}{{ messages|map(attribute='role')|list }}{{ 'x'|center(9) }}"
    )
    messages = [{"role": "user", "content": "hi there"}, {"role": "assistant", "content": "hello"}]
    bounded, plain = templates.Bounded(), templates.ImmutableSandboxedEnvironment()
    assert bounded.from_string(text).render(messages=messages) == plain.from_string(text).render(messages=messages)
    long = [{"role": "user", "content": "word " * 1_000_000}]
    assert len(bounded.from_string(CHAT_TEMPLATE).render(messages=long)) > 5_000_000


def test_training_names_the_row(model, quick):
    from mlx_adapters.data.datasets import RawRow
    from mlx_adapters.data.tokenizing import tokenize_row

    tokenizer = load_tokenizer_of(resolve_base(str(model.base.folder)))
    tokenizer.chat_template = ENDLESS[0]
    with pytest.raises(AdapterError, match="line 7: the chat template refuses the row: it takes more than"):
        tokenize_row(RawRow({"prompt": "a", "completion": "b"}, "line 7"), tokenizer, mask_prompt=True)
