"""Families of chat templates with small tokenizers of their own, and an independent account of what is trained.

tests/fixtures/chat_templates/ holds templates that do what those of public models do. In each, `{% generation %}`
was put by hand around what the model writes; transformers' own tracker reads these marks. The templates that the
package gets have none.
"""

import functools
import json
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from helpers.tiny_models import build_model
from mlx_lm.tokenizer_utils import TokenizerWrapper

TEMPLATES = Path(__file__).parent.parent / "fixtures" / "chat_templates"
MARKS = ("{%- generation -%}", "{%- endgeneration -%}", "{%- generation %}", "{%- endgeneration %}")
REGEX = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CORPUS = [
    "What is the weather in Paris today? It is sunny and warm in Paris, about 21 degrees.\n\n",
    "The answer is 42.\n\nThe user asks for a sum, so I add the numbers.\n",
    '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris", "unit": "celsius"}}\n</tool_call>\n',
    "system user assistant model tool\n\n\n\nYou are a helpful assistant.\n\n# Tools\n",
    "Let me check that for you. Hello there! Thank you very much. 0 1 2 3 4 5 6 7 8 9 zebra.\n\n",
]


@dataclass(frozen=True)
class Family:
    """`special` tokens and others that are `added`; `stops` end a generation, the first is EOS; `roles` says whether
    the template takes a "system" and a "tool" turn, and "any" order; `next_ends`: the next message begins with the
    token that ends a turn; `opened`: a turn's header, and what the generation prompt goes on with."""

    special: str
    stops: str
    bos: str | None = None
    added: str = ""
    roles: str = "system tool any"
    calls: int = 9
    next_ends: bool = False
    opened: tuple[str, str] | None = None

    @property
    def words(self) -> list[str]:
        return [*self.special.split(), *self.added.split()]


CHATML = "<|endoftext|> <|im_start|> <|im_end|>"
THINK = "<think> </think> <tool_call> </tool_call> <tool_response> </tool_response>"
FAMILIES = {
    "chatml": Family(CHATML, "<|im_end|>", roles="system any"),
    "qwen2": Family(CHATML, "<|im_end|> <|endoftext|>", added=THINK),
    "qwen3": Family(CHATML, "<|im_end|> <|endoftext|>", added=THINK),
    "qwen3_thinking": Family(
        CHATML, "<|im_end|> <|endoftext|>", added=THINK, opened=("<|im_start|>assistant\n", "<think>\n")
    ),
    "llama3": Family(
        "<|begin_of_text|> <|end_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|>",
        "<|eot_id|> <|end_of_text|>",
        "<|begin_of_text|>",
        calls=1,
    ),
    "gemma2": Family("<pad> <eos> <bos> <start_of_turn> <end_of_turn>", "<eos> <end_of_turn>", "<bos>", roles=""),
    "gemma3": Family("<pad> <eos> <bos> <start_of_turn> <end_of_turn>", "<eos> <end_of_turn>", "<bos>", roles="system"),
    "gemma4": Family(
        "<pad> <eos> <bos> <|turn> <turn|> <|channel> <channel|> <|tool_call> <tool_call|> <|tool_response> "
        '<tool_response|> <|"|>',
        "<eos> <turn|> <|tool_response>",
        "<bos>",
        roles="system tool",
    ),
    "mistral": Family(
        "<unk> <s> </s> [INST] [/INST] [SYSTEM_PROMPT] [/SYSTEM_PROMPT] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] "
        "[TOOL_CALLS] [TOOL_RESULTS] [/TOOL_RESULTS]",
        "</s>",
        "<s>",
    ),
    "r1": Family(
        "<|begin|> <|eos|> <|User|> <|Assistant|> <|tool_calls_begin|> <|tool_call_begin|> <|tool_sep|> "
        "<|tool_call_end|> <|tool_calls_end|> <|tool_outputs_begin|> <|tool_output_begin|> <|tool_output_end|> "
        "<|tool_outputs_end|>",
        "<|eos|>",
        "<|begin|>",
        added="<think> </think>",
        opened=("<|Assistant|>", "<think>\n"),
    ),
    "harmony": Family(
        "<|startoftext|> <|endoftext|> <|start|> <|end|> <|message|> <|channel|> <|return|> <|call|>",
        "<|return|> <|call|>",
        "<|startoftext|>",
        calls=1,
    ),
    "glm": Family(
        "<|endoftext|> [gMASK] <sop> <|user|> <|assistant|> <|system|> <|observation|>",
        "<|endoftext|> <|user|> <|observation|>",
        added=THINK,
        next_ends=True,
    ),
    "kimi": Family(
        "[EOS] <|im_end|> <|im_user|> <|im_assistant|> <|im_system|> <|im_middle|> <|tool_calls_section_begin|> "
        "<|tool_calls_section_end|> <|tool_call_begin|> <|tool_call_argument_begin|> <|tool_call_end|>",
        "<|im_end|> [EOS]",
    ),
    "apertus": Family(
        "<s> </s> <|system_start|> <|system_end|> <|user_start|> <|user_end|> <|assistant_start|> <|assistant_end|> "
        "<|tools_prefix|> <|tools_suffix|>",
        "<|assistant_end|> <|tools_suffix|>",
        "<s>",
        roles="system tool",
    ),
    "alpaca": Family("<|endoftext|>", "<|endoftext|>", roles="system any"),
}


def marked(family: str) -> str:
    """The template with the marks."""
    return (TEMPLATES / f"{family}.jinja").read_text()


def plain(family: str) -> str:
    """The template as a model has it."""
    text = marked(family)
    for mark in MARKS:
        text = text.replace(mark, "{#- -#}" if mark.endswith("-%}") else "{#- #}")
    return text


def backend(family: str, kind: str = "bytes"):
    """A `tokenizers.Tokenizer`: byte-level BPE ("bytes"), BPE on words that begin with ▁ ("metaspace"), or pieces of
    lower-case words ("wordpiece")."""
    return _trained(kind, tuple(FAMILIES[family].special.split()), tuple(FAMILIES[family].added.split()))


@functools.cache
def _trained(kind: str, special: tuple[str, ...], added: tuple[str, ...]):
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    settings = {"vocab_size": 480, "special_tokens": list(special), "show_progress": False}
    if kind == "bytes":
        tokenizer = Tokenizer(models.BPE())
        by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(REGEX), "isolated"), by_bytes])
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **settings)
    elif kind == "metaspace":
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
        trainer = trainers.BpeTrainer(**settings | {"special_tokens": ["<unk>", *special, *bytes_], "vocab_size": 700})
    else:
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer()
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(**settings | {"special_tokens": ["[UNK]", *special]})
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in added])
    return tokenizer


def chat_tokenizer(family: str, template: str | None = None, kind: str = "bytes") -> TokenizerWrapper:
    """mlx-lm's tokenizer with the family's template, or another."""
    from transformers import PreTrainedTokenizerFast

    how, inner = FAMILIES[family], backend(family, kind)
    stops = how.stops.split()
    fast = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=stops[0], bos_token=how.bos)
    fast.chat_template = plain(family) if template is None else template
    return TokenizerWrapper(fast, eos_token_ids=[inner.token_to_id(token) for token in stops])


def write_base(folder: Path, family: str, **config: object) -> Path:
    """A tiny base model with the family's tokenizer and template."""
    how, inner = FAMILIES[family], backend(family)
    stops = [inner.token_to_id(token) for token in how.stops.split()]
    build_model(folder, "llama", **{"eos_token_id": stops, "max_position_embeddings": 4096, **config})
    inner.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": how.stops.split()[0],
        "clean_up_tokenization_spaces": False,
        "chat_template": plain(family),
        **({"bos_token": how.bos} if how.bos else {}),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def by_marks(tokenizer: TokenizerWrapper, family: str, messages, tools=None) -> tuple[list[int], np.ndarray]:
    """Tokens and trained marks of a conversation, by the marks in the family's template and transformers' tracker.

    A turn whose own words begin as the generation prompt ends is trained from there on: the model is given those.
    """
    ids, trained = _tracked(tokenizer, family, messages, tools)
    last = messages[-1]
    if FAMILIES[family].next_ends and last["role"] == "assistant":
        following = {"role": "tool" if last.get("tool_calls") else "user", "content": "x"}
        ids, trained = (part[: len(ids) + 1] for part in _tracked(tokenizer, family, [*messages, following], tools))
    if FAMILIES[family].opened:
        header, opened = FAMILIES[family].opened
        text = _rendered(tokenizer, family, messages, tools, tokenize=False)
        places = tokenizer._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        for token in np.flatnonzero(trained[1:] & ~trained[:-1]) + 1:
            start = places[token][0]
            if text.endswith(header, 0, start) and text.startswith(opened, start):
                trained[[i for i, (a, b) in enumerate(places) if start <= a and b <= start + len(opened)]] = False
    return ids, trained


def _rendered(tokenizer: TokenizerWrapper, family: str, messages, tools, **how):
    given = {"chat_template": marked(family), "enable_thinking": tokenizer.has_thinking}
    return tokenizer._tokenizer.apply_chat_template(messages, tools=tools, **given, **how)


def _tracked(tokenizer: TokenizerWrapper, family: str, messages, tools) -> tuple[list[int], np.ndarray]:
    how = {"return_dict": True, "return_assistant_tokens_mask": True}
    out = _rendered(tokenizer, family, messages, tools, **how)
    return list(out["input_ids"]), np.array(out["assistant_masks"], bool)


def drawn(tokenizer: TokenizerWrapper, tokens, trained) -> str:
    """The text with what is trained in [[ ]]."""
    text, inside = "", False
    for token, counts in zip(tokens, trained, strict=True):
        text += ("[[" if counts and not inside else "]]" if inside and not counts else "") + tokenizer.decode(
            [int(token)]
        )
        inside = bool(counts)
    return text + ("]]" if inside else "")


# Random conversations.

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Weather now",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
WORDS = [
    "sunny",
    "answer",
    "The",
    "42",
    "0",
    "0.",
    "zebra.",
    "Paris,",
    "<b>bold</b>",
    "{x}",
    "```",
    "assistant",
    "user",
    "###",
    "\n",
    "\n\n",
    "\t",
    "é",
    "日本語",
    "🎉",
    "l'été",
    "</s>",
    "<|im_end|>",
    "<think>",
    "<tool_call>",
    "<end_of_turn>",
    "[INST]",
    "<|eot_id|>",
    "<|user|>",
    'a"b',
    "'c'",
    "\\n",
    "]",
    "}",
    "{{",
    "messages",
    "}}",
]


def _words(rng: random.Random, most: int = 8) -> str:
    text = " ".join(rng.choices(WORDS, k=rng.randint(1, most)))
    return rng.choice(["", "", " ", "\n"]) + text + rng.choice(["", "", " ", "\n\n"])


def _call(rng: random.Random) -> dict:
    arguments = {
        key: rng.choice([_words(rng, 2), 7, True, ["a", "b"], {"x": "y"}]) for key in rng.sample(["city", "n", "q"], 2)
    }
    name = rng.choice(["get_weather", "search"])
    function = {"name": name, "arguments": arguments if rng.random() < 0.9 else {}}
    return {"type": "function", "id": f"functions.{name}:0", "function": function}


def _answer(rng: random.Random, how: Family) -> dict:
    kind = rng.choice(["plain"] * 4 + ["empty", "inline", "field", "thought"])
    message: dict = {"role": "assistant", "content": _words(rng)}
    if kind == "empty":
        message["content"] = ""
    elif kind == "inline":
        message["content"] = f"<think>\n{_words(rng)}\n</think>\n\n{_words(rng)}"
    elif kind == "field":
        message["reasoning_content"] = _words(rng)
    elif kind == "thought":
        message |= {"content": "", "reasoning_content": _words(rng)}
    return message


def conversation(rng: random.Random, how: Family) -> tuple[list[dict], list[dict] | None]:
    """Messages and tools of a conversation that the family's template can write."""
    messages: list[dict] = []
    if "system" in how.roles and rng.random() < 0.4:
        messages.append({"role": "system", "content": _words(rng)})
    if "any" in how.roles and messages and rng.random() < 0.1:
        messages.append(_answer(rng, how))
    for _ in range(rng.randint(1, 3)):
        messages.append({"role": "user", "content": _words(rng)})
        while "tool" in how.roles and rng.random() < 0.35:
            calls = [_call(rng) for _ in range(rng.randint(1, min(2, how.calls)))]
            called = {**_answer(rng, how), "tool_calls": calls}
            if rng.random() < 0.5:
                called["content"] = rng.choice([None, ""])
            messages.append(called)
            messages += [{"role": "tool", "content": _words(rng), "tool_call_id": "1"} for _ in calls]
        messages.append(_answer(rng, how))
        if "any" in how.roles and rng.random() < 0.1:
            messages.append(_answer(rng, how))
    if rng.random() < 0.1:
        messages.append({"role": "user", "content": _words(rng)})
    return messages, TOOLS if any("tool_calls" in message for message in messages) else None
