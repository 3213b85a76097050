"""What a program opens beside the model, and the line that opens it there: `fuse --for ollama` and its kin.

Ollama reads no Jinja: it looks whether it knows the template, and if not, gives the model chats without any form. So
its Modelfile holds the template in Go's language, made from what the tokenizer's own does to a conversation and held
against it on others; where what stands before, between and behind messages does not say all, it is left out.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

from jinja2 import TemplateError

from mlx_adapters.assembly.gguf import FILE_NAME
from mlx_adapters.config.mapping import require
from mlx_adapters.models.base import Base
from mlx_adapters.storage import files, paths

MODELFILE = "Modelfile"
LM_STUDIO = ("~/.lmstudio/models", "~/.cache/lm-studio/models")
Message = dict[str, str]


@dataclass(frozen=True)
class ChatForm:
    """A chat template by what stands around messages; `alone` before a first question without a system message."""

    system: str
    after_system: str
    alone: str
    answer: str
    question: str
    behind: str

    def render(self, messages: Sequence[Message]) -> str:
        """The text of a conversation that ends in a question."""
        made = ""
        for number, message in enumerate(messages):
            before = self.answer if message["role"] == "assistant" else self.question
            if number == 0:
                before = self.system if message["role"] == "system" else self.alone
            elif number == 1 and messages[0]["role"] == "system":
                before = self.after_system
            made += before + message["content"]
        return made + self.behind

    def go(self) -> str:
        """The same in the language of Go's templates."""
        follows = 'and (eq $i 1) (eq (index $.Messages 0).Role "system")'
        return (
            "{{- range $i, $_ := .Messages }}"
            f'{{{{- if eq .Role "system" }}}}{_literal(self.system)}'
            f'{{{{- else if eq .Role "assistant" }}}}{_literal(self.answer)}'
            f"{{{{- else if eq $i 0 }}}}{_literal(self.alone)}"
            f"{{{{- else if {follows} }}}}{_literal(self.after_system)}"
            f"{{{{- else }}}}{_literal(self.question)}"
            f"{{{{- end }}}}{{{{ .Content }}}}{{{{- end }}}}{_literal(self.behind)}"
        )


def _literal(text: str) -> str:
    """Text as a Go template says it, whatever is in it, spaces at its ends too."""
    return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" if text else ""


def chat_form(render: Callable[[list[Message]], str]) -> ChatForm | None:
    """What `render` puts around messages; None if it does more. It may raise what Jinja does."""
    words = ["Qmark0", "Qmark1", "Qmark2", "Qmark3"]
    roles = ["system", "user", "assistant", "user"]
    chat = [{"role": role, "content": word} for role, word in zip(roles, words, strict=True)]
    try:
        whole, bare = _around(render(chat), words), _around(render(chat[1:]), words[1:])
        if whole is None or bare is None:
            return None
        form = ChatForm(whole[0], whole[1], bare[0], whole[2], whole[3], whole[4])
        longer = [*chat, {"role": "assistant", "content": "a"}, {"role": "user", "content": "b\n c"}]
        tries = [chat, chat[1:], chat[:2], chat[1:2], longer, longer[1:]]
        return form if all(form.render(messages) == render(messages) for messages in tries) else None
    except (TemplateError, TypeError, ValueError):
        return None


def _around(text: str, words: list[str]) -> list[str] | None:
    """What stands before, between and behind `words` in a text that has each of them once, in this order."""
    parts = []
    for word in words:
        before, middle, text = text.partition(word)
        if not middle or word in text:
            return None
        parts.append(before)
    return [*parts, text]


def modelfile(tokenizer: Any) -> tuple[str, bool]:
    """(Ollama's Modelfile for model.gguf, whether it says the chat template)."""
    first = list(tokenizer.encode("x"))[:1]
    bos = tokenizer.bos_token if first == [tokenizer.bos_token_id] else None  # which Ollama puts before the text itself

    def render(messages: list[Message]) -> str:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        return text.removeprefix(bos) if bos else text

    form = chat_form(render) if getattr(tokenizer, "chat_template", None) else None
    lines = [f"FROM ./{FILE_NAME}"]
    said = form is not None and '"""' not in form.go()
    if form is not None and said:
        lines.append(f'TEMPLATE """{form.go()}"""')
    ends = [tokenizer.convert_ids_to_tokens(index) for index in sorted(tokenizer.eos_token_ids)]
    lines += [f"PARAMETER stop {json.dumps(end, ensure_ascii=False)}" for end in ends if isinstance(end, str)]
    return "\n".join(lines) + "\n", said


def check_program(program: str | None, base: Base, out: Path) -> None:
    """Raise ConfigError for a model that the program does not open, or a place where it does not look."""
    if program == "mlx-vlm":
        pictures = any(key in base.config for key in ("vision_config", "audio_config"))
        require(
            pictures,
            f"mlx-vlm is for models of pictures or sound, and '{base.name}' is of text alone.",
            "leave --for out: mlx-lm opens the folder.",
        )
    if program == "lmstudio":
        inside = [root for place in LM_STUDIO if out.is_relative_to(root := paths.expanded(place))]
        for root in inside:
            depth = len(out.relative_to(root).parts)
            require(depth == 2, "LM Studio looks for models in PUBLISHER/NAME.", f"write {root}/local/{out.name}")


def hand_over(program: str, folder: Path, out: Path, tokenizer: Any) -> tuple[list[str], list[str]]:
    """Write what `program` wants beside the model into `folder`: (what to type when it lies in `out`, warnings)."""
    where, name = quote(str(out)), quote(out.name.lower())
    if program == "ollama":
        text, said = modelfile(tokenizer)
        files.write_text(folder / MODELFILE, text)
        unsaid = [] if said else ["the chat template is left out of the Modelfile: Ollama's language cannot say it"]
        if said and "strftime_now" in str(tokenizer.chat_template):
            unsaid.append("the Modelfile's chat template says today's date on other days too")
        return [f"ollama create {name} -f {where}/{MODELFILE}", f"ollama run {name}"], unsaid
    if program == "lmstudio":
        here = any(out.is_relative_to(paths.expanded(place)) for place in LM_STUDIO)
        to, last = f"{LM_STUDIO[0]}/local", quote(out.name)
        target = quote(str(out.absolute()))  # a link's own folder is where a relative one would begin
        there = [] if here else [f"mkdir -p {to} && ln -s {target} {to}/{last}"]
        return [*there, f"lms load {quote(out.parent.name) if here else 'local'}/{last}"], []
    lines = {
        "llama.cpp": [f"llama-cli -m {where}/{FILE_NAME} --jinja", f"llama-server -m {where}/{FILE_NAME} --jinja"],
        "transformers": [f"transformers chat {where}"],
        "vllm": [f"vllm serve {where}"],
        "mlx-vlm": [f"mlx_vlm.generate --model {where} --image PICTURE --prompt 'What is this?'"],
    }
    return lines[program], []
