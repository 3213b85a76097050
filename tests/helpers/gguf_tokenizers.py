"""Tiny models whose tokenizers cut up text in the ways of the big families."""

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from mlx_adapters.gguf_format.tokenizer import PRE_TOKENIZERS, hard_strings

BOS, EOS = "<|endoftext|>", "<|im_end|>"


def own_spelling(name: str) -> pre_tokenizers.PreTokenizer:
    """How tokenizer.json of that family spells it."""
    if name == "gpt-2":
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if name == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    (patterns,) = (pre.patterns for pre in PRE_TOKENIZERS if pre.name == name)
    return split_by(*patterns)


def split_by(*patterns: str) -> pre_tokenizers.PreTokenizer:
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def retokenize(
    folder: Path, pre: pre_tokenizers.PreTokenizer, *, bos=False, eos=False, ignore_merges=False, nfc=False, **settings
) -> Path:
    """Give a tiny model another tokenizer of as many tokens, which adds BOS and EOS in its post-processor."""
    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    made = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    made.pre_tokenizer, made.decoder = pre, decoders.ByteLevel()
    if nfc:
        made.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(
        vocab_size=size - 1,
        special_tokens=[BOS, "<|im_start|>", EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(hard_strings([]), trainer)
    made.add_tokens([AddedToken("<think>", normalized=False)])
    if bos or eos:
        template = f"{f'{BOS} ' if bos else ''}$A{f' {EOS}' if eos else ''}"
        special = [(token, made.token_to_id(token)) for token in (BOS, EOS)]
        made.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    made.save(str(folder / "tokenizer.json"))
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return folder


SENTENCEPIECE = ("llama", "mistral", "gemma")


def sentencepiece_like(folder: Path, kind: str, size: int = 800) -> Path:
    """Give a model folder a tokenizer as those are written whose origin is SentencePiece: bytes for unknown characters,
    merges of all pairs that give a token, in the order of the tokens' scores."""
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    space = normalizers.Replace(" ", "▁")
    made.normalizer = {
        "llama": normalizers.Sequence([normalizers.Prepend("▁"), space]),
        "mistral": None,
        "gemma": space,
    }[kind]
    if kind != "llama":
        made.pre_tokenizer = {
            "mistral": pre_tokenizers.Metaspace(prepend_scheme="first", split=False),
            "gemma": pre_tokenizers.Split(" ", "merged_with_previous"),
        }[kind]
    special = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=size - 1, special_tokens=special, show_progress=False)
    made.train_from_iterator([text for text in hard_strings([]) if "<" not in text], trainer)
    stored = json.loads(made.to_str())
    ids = stored["model"]["vocab"]
    merges = stored["model"]["merges"]
    order = {left + right: rank for rank, (left, right) in reversed(list(enumerate(merges)))}
    pairs = [(token[:i], token[i:]) for token in sorted(order, key=order.__getitem__) for i in range(1, len(token))]
    stored["model"]["merges"] = [pair for pair in pairs if pair[0] in ids and pair[1] in ids]
    stored["added_tokens"] = [token for token in stored["added_tokens"] if not token["content"].startswith("<0x")]
    stored["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [ids["<s>"]], "tokens": ["<s>"]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(stored, ensure_ascii=False))
    path = folder / "tokenizer_config.json"
    settings = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return folder
