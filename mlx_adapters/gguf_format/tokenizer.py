"""A BPE tokenizer as llama.cpp takes it: bare lists, and a name for the way that text is cut up before BPE.

llama.cpp (src/llama-vocab.cpp) knows that way by its name alone, so the whole pattern must be one that it has a name
for. What it will do is then tried here, with the same lists and its own expressions, on a hundred hard strings.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers

from mlx_adapters.errors import ConfigError, FormatError
from mlx_adapters.gguf_format.architectures import CONVERTER
from mlx_adapters.gguf_format.pieces import BYTE as BYTE_TEXT
from mlx_adapters.gguf_format.pieces import LEAST, Pieces, read_pieces, steps_of
from mlx_adapters.storage import files
from mlx_adapters.storage.hf_names import TOKENIZER_CONFIG
from mlx_adapters.system.templates import templates_in

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # llama.cpp's kinds of tokens
MAX_DIFFERENT = 5  # of the hard strings; above, the tokenizers are not the same

_CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_SPACES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_MARKS = rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n]*{_SPACES}"
_WORDS = rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_NO_UPPER, _NO_LOWER = r"((?=[\p{L}])([^A-Z]))", r"((?=[\p{L}])([^a-z]))"  # llama.cpp's stand-ins for the two


def _cased(upper: str, lower: str, tail: str, digits: str) -> str:
    first = r"[^\r\n\p{L}\p{N}]?"
    words = f"{first}{upper}*{lower}+{tail}|{first}{upper}+{lower}*{tail}"
    return rf"{words}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*{_SPACES}"


@dataclass(frozen=True)
class PreTokenizer:
    """One of llama.cpp's: its name, the patterns that a tokenizer.json spells it with, and its own if they differ."""

    name: str
    patterns: tuple[str, ...]
    ignore_merges: bool = False
    as_llama_cpp: tuple[str, ...] = ()


PRE_TOKENIZERS = (
    PreTokenizer("gpt-2", (_GPT2,)),
    PreTokenizer("smollm", (r"\p{N}", _GPT2)),
    PreTokenizer("llama-bpe", (rf"{_WORDS}|\p{{N}}{{1,3}}|{_MARKS}",), ignore_merges=True),
    PreTokenizer("smaug-bpe", (rf"{_WORDS}|\p{{N}}{{1,3}}|{_MARKS}",)),
    PreTokenizer("qwen2", (rf"{_WORDS}|\p{{N}}|{_MARKS}",)),
    PreTokenizer(
        "qwen35",
        (
            rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
            rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*{_SPACES}",
        ),
    ),
    PreTokenizer(
        "deepseek-v3",
        (
            r"\p{N}{1,3}",
            "[一-龥\u3040-ゟ゠-ヿ]+",
            r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
            rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*{_SPACES}",
        ),
    ),
    PreTokenizer(
        "tekken",
        (_cased(_UPPER, _LOWER, "", r"\p{N}"),),
        ignore_merges=True,
        as_llama_cpp=(_cased(_NO_LOWER, _NO_UPPER, "", r"\p{N}"),),
    ),
    PreTokenizer(
        "gpt-4o",
        (_cased(_UPPER, _LOWER, f"{_CONTRACTION}?", r"\p{N}{1,3}"),),
        as_llama_cpp=(_cased(_NO_LOWER, _NO_UPPER, f"{_CONTRACTION}?", r"\p{N}{1,3}"),),
    ),
)


@dataclass(frozen=True)
class GgufTokenizer:
    """What a GGUF file says of a tokenizer. `tokens` are (text, llama.cpp's kind) by id, `special` ids by role.

    One of `pre`, for byte-level BPE, and `pieces`, for SentencePiece's.
    """

    pre: PreTokenizer | None
    pieces: Pieces | None
    tokens: list[tuple[str, int]]
    merges: list[str]
    special: dict[str, int]
    add_bos: bool
    add_eos: bool
    templates: Mapping[str, str]

    @property
    def start(self) -> str:
        """A special token to stand before texts, as in a chat, where only a prompt's first text gets a space."""
        chat = self.pieces is not None and self.pieces.prefix == "first"
        return next((token for token, kind in self.tokens if kind == CONTROL), "") if chat else ""

    def write(self, writer: Any) -> None:
        """Put it into a `gguf.GGUFWriter`."""
        writer.add_tokenizer_model("llama" if self.pieces else "gpt2")
        writer.add_tokenizer_pre(self.pre.name if self.pre else "default")
        writer.add_token_list([token for token, _ in self.tokens])
        writer.add_token_types([kind for _, kind in self.tokens])
        if self.pieces:
            writer.add_token_scores([self.pieces.scores.get(token, LEAST) for token, _ in self.tokens])
            writer.add_add_space_prefix(self.pieces.space_before)
        else:
            writer.add_token_merges(self.merges)
        for role, index in self.special.items():
            getattr(writer, f"add_{role}_token_id")(index)
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_eos_token(self.add_eos)
        if self.templates:
            writer.add_chat_template([{"name": name, "template": text} for name, text in self.templates.items()])

    def encoder(self) -> Callable[[str], list[int]]:
        """What llama.cpp makes of a text with these lists; it adds no BOS and no EOS."""
        ids = {token: index for index, (token, _) in enumerate(self.tokens)}
        added = [(token, kind) for token, kind in self.tokens if kind in (CONTROL, USER_DEFINED)]
        pieces = self.pieces
        if pieces is not None:
            return lambda text: pieces.encode(text, ids, [token for token, _ in added])
        made = self._byte_level(ids)
        made.add_tokens([AddedToken(token, normalized=False, special=kind == CONTROL) for token, kind in added])
        return lambda text: list(made.encode(text, add_special_tokens=False).ids)

    def _byte_level(self, ids: dict[str, int]) -> Any:
        assert self.pre is not None
        pairs = (merge.partition(" ") for merge in self.merges)
        merges = [(left, right) for left, _, right in pairs]
        made = Tokenizer(models.BPE(ids, merges, ignore_merges=self.pre.ignore_merges))
        splits = [
            pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in self.pre.as_llama_cpp or self.pre.patterns
        ]
        made.pre_tokenizer = pre_tokenizers.Sequence(
            [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
        return made


def _stored(folder: Path, tokenizer: Any) -> dict[str, Any]:
    """The tokenizer.json of a model's folder; where it has other files (`tokenizer.model`, `vocab.json`), what
    transformers made of them. Raises ConfigError for a tokenizer that has none."""
    if (folder / "tokenizer.json").is_file():
        return files.read_json(folder / "tokenizer.json")
    made = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(made, Tokenizer):
        raise ConfigError(f"'{folder}' has no tokenizer.json, and transformers makes none of what it has.", CONVERTER)
    return json.loads(made.to_str())


def read_tokenizer(folder: Path, vocabulary: int, tokenizer: Any) -> GgufTokenizer:
    """The tokenizer of a model folder for GGUF, with a token for each of the model's `vocabulary` rows.

    `tokenizer` is the loaded one: what it adds before and after a text is asked of it. Raises ConfigError for what
    llama.cpp would do otherwise, FormatError for tokens that the model has no row for.
    """
    stored = _stored(folder, tokenizer)
    bpe = stored.get("model", {})
    if bpe.get("type") != "BPE":
        raise ConfigError("Only BPE tokenizers are written to GGUF here.", CONVERTER)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in bpe["merges"]]
    pieces = read_pieces(stored, merges) if bpe.get("byte_fallback") else None
    if pieces is None:
        _refuse_normalizer(stored.get("normalizer"))
    bytes_apart = BYTE if pieces else NORMAL
    tokens = {index: (t, bytes_apart if BYTE_TEXT.fullmatch(t) else NORMAL) for t, index in bpe["vocab"].items()}
    for added in stored.get("added_tokens", []):
        if added["id"] < vocabulary or not added.get("special"):  # Gemma's has one for pictures more than its rows
            tokens[added["id"]] = (added["content"], CONTROL if added.get("special") else USER_DEFINED)
    if pieces and bpe.get("unk_token") in bpe["vocab"]:
        tokens[bpe["vocab"][bpe["unk_token"]]] = (bpe["unk_token"], UNKNOWN)
    if tokens and max(tokens) >= vocabulary:
        raise FormatError(f"The tokenizer has token {max(tokens)}, but the model's vocabulary is {vocabulary}.")
    settings = folder / TOKENIZER_CONFIG
    extra = files.read_json(settings) if settings.is_file() else {}
    special = _special_ids(extra, {token: index for index, (token, _) in tokens.items()})
    if (unknown := next((index for index, (_, kind) in tokens.items() if kind == UNKNOWN), None)) is not None:
        special["unk"] = unknown
    known = {end for end in getattr(tokenizer, "eos_token_ids", ()) if 0 <= end < vocabulary}  # others never come
    ends = sorted(known - {special.get("eos")})
    special |= dict(zip(("eot", "eom"), ends, strict=False))  # what else ends an answer
    add_bos, add_eos = _added_around(tokenizer, special)
    return GgufTokenizer(
        None if pieces else pre_tokenizer(stored.get("pre_tokenizer"), bool(bpe.get("ignore_merges"))),
        pieces,
        [tokens.get(i, (f"[PAD{i}]", UNUSED)) for i in range(vocabulary)],
        merges,
        special,
        add_bos,
        add_eos,
        templates_in(folder),
    )


def _refuse_normalizer(normalizer: Mapping[str, Any] | None) -> None:
    """llama.cpp changes no text before BPE; NFC changes only what is typed with separate accents, and is let pass."""
    other = [step.get("type") for step in steps_of(normalizer, "normalizers") if step.get("type") != "NFC"]
    if other:
        raise ConfigError(f"This tokenizer changes text before reading it ({', '.join(map(str, other))}).", CONVERTER)


def _special_ids(settings: Mapping[str, Any], ids: Mapping[str, int]) -> dict[str, int]:
    special = {}
    for role in ("bos", "eos", "pad"):
        token = settings.get(f"{role}_token")
        token = token.get("content") if isinstance(token, Mapping) else token
        if isinstance(token, str) and token in ids:
            special[role] = ids[token]
    return special


def _added_around(tokenizer: Any, special: dict[str, int]) -> tuple[bool, bool]:
    """Whether the tokenizer puts BOS before and EOS behind a text, wherever that is written down."""
    bare, full = (list(tokenizer.encode("x", add_special_tokens=added)) for added in (False, True))
    start = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), None)
    before, behind = (full[:start], full[start + len(bare) :]) if start is not None else (full, [])
    if len(before) == 1:
        special.setdefault("bos", before[0])
    if before not in ([], [special.get("bos")]) or behind not in ([], [special.get("eos")]):
        raise ConfigError(
            f"This tokenizer puts tokens around a text that llama.cpp cannot ({before}, {behind}).", CONVERTER
        )
    return bool(before), bool(behind)


def pre_tokenizer(settings: Mapping[str, Any] | None, ignore_merges: bool) -> PreTokenizer:
    """llama.cpp's way of cutting up text that equals this one of a tokenizer.json. Raises ConfigError for any other."""
    patterns = _patterns(settings)
    same = [pre for pre in PRE_TOKENIZERS if pre.patterns == patterns]
    if not same:
        raise ConfigError("This tokenizer's way of cutting up text has no known name in llama.cpp.", CONVERTER)
    return next((pre for pre in same if pre.ignore_merges == ignore_merges), same[0])


def _patterns(settings: Mapping[str, Any] | None) -> tuple[str, ...]:
    """The patterns by which text is cut into pieces, one after the other; () for what is not byte-level."""
    steps = steps_of(settings, "pretokenizers")
    patterns: list[str] = []
    for step in steps[:-1]:
        if step.get("type") == "Digits":
            patterns.append(r"\p{N}" if step.get("individual_digits") else r"\p{N}+")
        elif step.get("type") == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
            patterns.append(str(step.get("pattern", {}).get("Regex")))
        else:
            return ()
    last = steps[-1] if steps else {}
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return ()
    return (*patterns, *([_GPT2] if last.get("use_regex", True) else []))


def hard_strings(special: Sequence[str]) -> list[str]:
    """A hundred strings on which tokenizers differ: spaces, digits, contractions, scripts, marks, code, `special`."""
    stored = (package_files("mlx_adapters.gguf_format") / "hard_strings.json").read_text(encoding="utf-8")
    marked = [form for token in special[:4] for form in (token, f"x{token}y", f"{token}\n{token}", f" {token} ")]
    return [*json.loads(stored), *marked]


def check_strings(made: GgufTokenizer, tokenizer: Any) -> list[str]:
    """The hard strings that llama.cpp will cut up otherwise than the tokenizer does.

    Raises ConfigError if there are more than a few: then it is another tokenizer.
    """
    theirs = made.encoder()
    strings = hard_strings([token for token, kind in made.tokens if kind == CONTROL])
    around = [[made.special["bos"]] if made.add_bos else [], [made.special["eos"]] if made.add_eos else []]
    start = made.start
    different = [
        text
        for text in strings
        if [*around[0], *theirs(start + text), *around[1]] != list(tokenizer.encode(start + text))
    ]
    if len(different) > MAX_DIFFERENT:
        raise ConfigError(
            f"llama.cpp would read {len(different)} of {len(strings)} strings otherwise than this tokenizer, "
            f"such as {json.dumps(different[0], ensure_ascii=False)}.",
            CONVERTER,
        )
    return different
