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
