"""`chat`: talk to a model and switch adapters. `ab`: two adapters side by side."""

import contextlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_adapters.cli import _output
from mlx_adapters.cli._help import LongCommand
from mlx_adapters.cli._options import (
    REFERENCE,
    UserPath,
    any_base_option,
    base_option,
    complete_references,
    drafting_options,
    dtype_option,
    json_option,
    kv_options,
    prompt_cache_option,
    sampling_options,
    system_option,
    template_options,
    trust_option,
)
from mlx_adapters.cli._prompt import Prompt
from mlx_adapters.config.data import TemplateConfig
from mlx_adapters.config.mapping import require
from mlx_adapters.config.quantization import CacheQuantization
from mlx_adapters.config.sampling import Drafting
from mlx_adapters.errors import AdapterError, OutputLostError
from mlx_adapters.system.interrupt import Terminated

if TYPE_CHECKING:
    from mlx_adapters.generation.chat import Chat
    from mlx_adapters.generation.live import LiveModel

HELP = """/use NAME       answer with this adapter (attached if it is not yet)
/base           answer without an adapter
/compare A B    answer the next message with A and with B ('base' is the base)
/adapters       what is attached
/system TEXT    what the model is told beforehand; without TEXT nothing
/save FILE      add the conversation to FILE as a row to train on
/reset          forget the conversation
/quit           end (or Ctrl-D)"""


@click.command("chat", cls=LongCommand)
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    type=REFERENCE,
    metavar="REF",
    help="An adapter to attach (repeatable); the first one answers.",
)
@base_option
@any_base_option
@system_option
@sampling_options
@drafting_options
@prompt_cache_option
@kv_options
@template_options
@dtype_option
@trust_option
def chat_command(
    adapters: tuple[str, ...],
    base: str | None,
    any_base: bool,
    system: str | None,
    drafting: Drafting,
    prompt_cache: Path | None,
    kv: CacheQuantization,
    template: TemplateConfig,
    dtype: str,
    **sampling: Any,
) -> None:
    """Talk to a model. The base is loaded once; /use NAME switches the adapter, /help shows the rest.

    \b
    Example:
      mlx-adapters chat --adapter sql --adapter chat
    """
    from mlx_adapters.generation.chat import Chat
    from mlx_adapters.storage.files import require_writable

    if prompt_cache is not None:
        require_writable(prompt_cache)
    chat = Chat(_load(base, adapters, any_base, dtype, template, drafting, kv), system)
    if adapters:
        chat.model.use(chat.model.adapters[0].name)
    if prompt_cache is not None and prompt_cache.exists():
        chat.cache = chat.model.load_cache(prompt_cache)
    _output.note("Type a message, or /help.")
    _talk(chat, any_base, sampling)
    if prompt_cache is not None and chat.cache is not None and chat.cache.tokens:
        chat.model.save_cache(chat.cache, prompt_cache)


def _talk(chat: "Chat", any_base: bool, sampling: dict[str, Any]) -> None:
    prompt, compared = Prompt(), None
    while True:
        try:
            if (line := prompt.read(_who(chat))) is None:
                return
            if line.startswith("/"):
                if line.split()[0] == "/quit":
                    return
                compared = _obey(chat, line, any_base)
            elif line and compared:
                _compare(chat, line, compared, sampling)
                compared = None
            elif line:
                _answer(chat, line, sampling)
        except OutputLostError:
            raise
        except AdapterError as error:
            _output.error(error.message, error.hint)
        except KeyboardInterrupt as stop:  # lets go of the line, or of the answer
            if isinstance(stop, Terminated) or not sys.stdin.isatty():
                raise
            _output.note("Ctrl-D ends the chat.")


@click.command("ab", cls=LongCommand)
@click.argument("prompts", type=UserPath(path_type=Path))
@click.argument("a", shell_complete=complete_references)
@click.argument("b", shell_complete=complete_references)
@base_option
@any_base_option
@system_option
@sampling_options
@kv_options
@drafting_options
@template_options
@dtype_option
@trust_option
@json_option
def ab_command(
    prompts: Path,
    a: str,
    b: str,
    base: str | None,
    any_base: bool,
    system: str | None,
    kv: CacheQuantization,
    drafting: Drafting,
    template: TemplateConfig,
    dtype: str,
    as_json: bool,
    **sampling: Any,
) -> None:
    """Answer a file of PROMPTS with adapters A and B ('base': none), side by side.

    PROMPTS is JSONL with `prompt` or `messages`, or plain text with one prompt a line.

    \b
    Example:
      mlx-adapters ab questions.txt sql@500 sql@600
    """
    from mlx_adapters.generation.chat import answer_pairs, read_prompts

    questions = read_prompts(prompts)
    references = [reference for reference in dict.fromkeys((a, b)) if reference != "base"]
    model = _load(base, tuple(references), any_base, dtype, template, drafting, kv)
    names = {"base": None} | dict(zip(references, (info.name for info in model.adapters), strict=True))
    pairs = answer_pairs(model, questions, names[a], names[b], system, **sampling)
    if as_json:
        _output.emit_json({"a": a, "b": b, "pairs": pairs})
        return
    for pair in pairs:
        _output.out(_output.style(f"> {pair.prompt}", bold=True))
        _output.out(f"{a}: {pair.a.strip()}")
        _output.out(f"{b}: {pair.b.strip()}\n")


def _load(
    base: str | None,
    references: tuple[str, ...],
    any_base: bool,
    dtype: str,
    template: TemplateConfig,
    drafting: Drafting | None = None,
    kv: CacheQuantization | None = None,
) -> "LiveModel":
    from mlx_adapters.generation.live import load_model
    from mlx_adapters.sources.bases import recorded_base
    from mlx_adapters.sources.lookup import load_adapter

    loaded = [load_adapter(reference) for reference in references]
    if base is None and not loaded:
        raise click.UsageError("Give --base (the embedded model is 'demo').")
    model = load_model(base or recorded_base(loaded), dtype=dtype, template=template, drafting=drafting, kv=kv)
    for reference, adapter in zip(references, loaded, strict=True):
        model.attach(adapter, any_base, name=reference, use=False)
    return model


def _who(chat: "Chat") -> str:
    """Who answers."""
    return next((info.name for info in chat.model.adapters if info.weight is not None), "base")


def _save(chat: "Chat", file: Path) -> None:
    from mlx_adapters.storage import files

    require(bool(chat.messages), "There is nothing to save yet.")
    system = [{"role": "system", "content": chat.system}] if chat.system else []
    files.append_line(file, json.dumps({"messages": [*system, *chat.messages]}, ensure_ascii=False))
    _output.note(f"Added to {file}.")


def _obey(chat: "Chat", line: str, any_base: bool) -> list[str] | None:
    command, *words = line.split()
    if line.split() in (["/base"], ["/use", "base"]):
        chat.model.use(None)
    elif command == "/use" and len(words) == 1:
        _attach(chat, words[0], any_base)
        chat.model.use(words[0])
    elif command == "/compare" and len(words) == 2:
        for word in words:
            if word != "base":
                _attach(chat, word, any_base)
        return words
    elif command == "/adapters" and not words:
        for info in chat.model.adapters:
            _output.note(f"{info.name}  {info.type} rank {info.rank}{'  (in use)' if info.weight is not None else ''}")
    elif command == "/system":
        chat.system = line.partition(" ")[2].strip() or None
        chat.reset()
        _output.note("A new conversation begins." if chat.system is None else "The model is told that from now on.")
    elif command == "/save" and len(words) == 1:
        _save(chat, Path(words[0]).expanduser())
    elif command == "/reset" and not words:
        chat.reset()
    else:
        _output.note(HELP if command == "/help" else f"'{line}' is nothing that I can do.\n{HELP}")
    return None


def _attach(chat: "Chat", name: str, any_base: bool) -> None:
    if name not in chat.model.pool.attached:
        chat.model.attach(name, any_base, name=name, use=False)


def _answer(chat: "Chat", line: str, sampling: dict[str, Any]) -> None:
    try:
        with contextlib.closing(chat.ask(line, **sampling)) as pieces:
            for piece in pieces:
                _output.out(piece, newline=False)
    finally:
        _output.out()
    if chat.full:
        _output.warn("The answer stopped where the model's context ends; /reset begins a new conversation.")


def _compare(chat: "Chat", line: str, names: list[str], sampling: dict[str, Any]) -> None:
    answers = chat.compare(line, [None if name == "base" else name for name in names], **sampling)
    for name, answer in zip(names, answers, strict=True):
        _output.out(f"{name}: {answer.strip()}")
