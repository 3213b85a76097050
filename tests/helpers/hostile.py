"""Hostile base folders: a tiny model whose config, tokenizer or template somebody broke, and every command on it."""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from helpers.forked import Result, wrong_end

ESC = "\x1b[2J\x1b]0;x\x07"
VALUES: list[Any] = [
    None,
    True,
    False,
    -1,
    0,
    1,
    3,
    2**31,
    2**63,
    10**400,
    0.5,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    ESC,
    "\ud800",
    "../../x",
    "1",
    [],
    [1],
    [None],
    ["x"],
    [[]],
    {},
    {"a": 1},
    {"bits": 4},
    {"": {}},
    "y" * 100_000,
    "null",
]
SETTINGS: list[tuple[str, Any]] = [
    ("quantization", {"bits": 4, "group_size": 64}),
    ("quantization", {"bits": "x", "group_size": []}),
    ("quantization", {"bits": 4}),
    ("quantization_config", {"quant_method": "awq", "bits": 4}),
    ("quantization_config", {"quant_method": "x"}),
    ("quantization_config", 1),
    ("model_file", "code.py"),
    ("auto_map", {"AutoConfig": "code.C", "AutoTokenizer": ["code.T", None], "AutoModel": "code.M"}),
    ("rope_scaling", {"type": "yarn", "factor": "x"}),
    ("rope_scaling", {"rope_type": "llama3"}),
    ("rope_scaling", 3),
    ("rope_parameters", {"rope_theta": "x"}),
    ("rope_parameters", {"full_attention": 1}),
    ("rope_parameters", [1]),
    ("text_config", {}),
    ("text_config", 1),
    ("text_config", {"model_type": ESC}),
    ("layer_types", ["x"]),
    ("chat_template_type", "deepseek_v32"),
    ("chat_template_type", "nope"),
    ("chat_template_type", "..x"),
    ("tool_parser_type", "nope"),
    ("tool_parser_type", 1),
    ("tokenizer_class", "LlamaTokenizer"),
    ("tokenizer_class", "Nope"),
    ("tokenizer_class", 3),
    ("tokenizer_class", "PreTrainedTokenizer"),
    ("added_tokens_decoder", {"0": {"content": 1}}),
    ("added_tokens_decoder", {"x": {"content": "y"}}),
    ("eos_token_id", [2, "x"]),
    ("eos_token_id", 10**9),
    ("eos_token_id", -5),
    ("eos_token", {"content": []}),
    ("vocab_size", 10**12),
    ("num_hidden_layers", 10**9),
    ("hidden_size", 10**12),
    ("model_max_length", "x"),
    ("max_position_embeddings", 1),
    ("max_position_embeddings", 10**400),
    ("sliding_window", 1),
    ("dtype", "float99"),
    ("torch_dtype", {"a": 1}),
    ("tie_word_embeddings", "x"),
    ("__float__", "Infinity"),
    ("architectures", [1]),
]
MODEL_TYPES = [
    "olmo",
    "qwen3",
    "gemma3_text",
    "gpt2",
    "mamba",
    "mixtral",
    "gemma4",
    "deepseek_v3",
    "nope",
    "..x",
    "llama.x",
    "qwen2_vl",
    "bert",
    "t5",
    "whisper",
    "falcon_h1",
    "phi3",
    "cache",
    "base",
    "",
]
LOOP = (
    "{% for i in range(99999) %}{% for j in range(99999) %}{% for k in range(9) %}{% endfor %}{% endfor %}{% endfor %}"
)
TEMPLATES = [
    LOOP,
    "{{ 9**9**9 }}",
    "{{ 'a' * 10**11 }}",
    "{{ [0] * 10**10 }}",
    "{{ 'a'.ljust(10**11) }}",
    "{% for",
    "{{ 1/0 }}",
    "{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
    "{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x }}",
    "{% set n = namespace(x=[1]) %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "{{ '%99999999999d' % 1 }}",
    "{{ '{:>99999999999}'.format(1) }}",
    "{{ 'a'|center(99999999999) }}",
    "{{ ('a' * 100000).replace('a', 'b' * 1000000) }}",
    "{{ 'b' | indent(10**11, true) }}",
    "{{ range(10**9) | list }}",
    "{{ messages.__class__.__mro__ }}",
    "{{ ''.__class__ }}",
    "{{ raise_exception('\x1b[2Jno') }}",
    "{{ undefined.x }}",
    "{{ messages[9].content }}",
    "\x1b[2J{{ messages }}",
    "",
    " ",
    "{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}",
    "{{ 9**(9**9) }}",
    "{{ '{:{}}'.format(1, 10**10) }}",
    "{{ lipsum(n=100000) }}",
    "{{ messages | tojson(indent=10**10) }}",
    "{{ 1 << 10**10 }}",
    "{{ (10**5) ** (10**7) }}",
    "{% include 'x' %}",
    "{% import 'os' as os %}",
    "{{ cycler }}{{ joiner }}{{ self }}",
    "{% generation %}{% endgeneration %}",
    "{{ strftime_now('%99999999d') }}",
    "{{ '" + "(" * 5000 + "' }}",
    "{{ " + "(" * 300 + "1" + ")" * 300 + " }}",
    "{{ '\ud800' }}",
    "{{ (10**4000) }}",
    "{{ 'x' * 50000000 }}",
    "{% call x() %}{% endcall %}",
]
FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja")
CODE = "import os\nopen(os.environ['HOSTILE_RAN'], 'w').write('ran')\nclass C: pass\nT = M = C\n"
Mutation = tuple[str, Callable[[Path], None]]


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value (of long lists and objects, the first entries)."""
    inside = [at]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in list(items)[:40]:
        inside += places(item, (*at, key))
    return inside


def put(value: Any, at: tuple[Any, ...], new: Any) -> Any:
    """`value` with `new` at a place; `...` takes the place away."""
    if not at:
        return new
    copy = value.copy()
    if new is ... and len(at) == 1:
        del copy[at[0]]
    else:
        copy[at[0]] = put(value[at[0]], at[1:], new)
    return copy


def mutation(rng: random.Random, folder: Path) -> Mutation:
    """A label and what breaks a copy of the model in `folder`."""
    kind = rng.choices(("value", "setting", "type", "template", "bytes", "entry"), (40, 20, 8, 14, 12, 6))[0]
    name = rng.choice(FILES[:4] if kind in ("value", "bytes", "entry") else FILES[:3:2])
    if kind == "value":
        value = json.loads((folder / name).read_text())
        at, new = rng.choice(places(value)), rng.choice([*VALUES, ...])
        changed = put(value, at, new) if at else {} if new is ... else new
        return f"{name} {'.'.join(map(str, at))} = {str(new)[:40]!r}", lambda to: write(to / name, json.dumps(changed))
    if kind in ("setting", "type"):
        name = name if kind == "setting" else "config.json"
        given = (
            [("model_type", rng.choice(MODEL_TYPES))] if kind == "type" else rng.sample(SETTINGS, rng.choice((1, 1, 2)))
        )
        value = json.loads((folder / name).read_text())
        return f"{name} | {dict(given)}"[:120], lambda to: write(to / name, json.dumps({**value, **dict(given)}))
    if kind == "template":
        text = rng.choice(TEMPLATES)
        return f"template {text[:60]!r}", lambda to: write(to / FILES[4], text)
    if kind == "bytes":
        data = bytearray((folder / name).read_bytes())
        how = rng.choice(("cut", "flip", "noise", "empty", "bom", "latin", "deep", "long number", "twice"))
        at = rng.randrange(len(data))
        data = {
            "cut": data[:at],
            "flip": data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :],
            "empty": b"",
            "noise": rng.randbytes(200),
            "bom": b"\xef\xbb\xbf" + data,
            "latin": data.replace(b"a", b"\xe4", 1),
            "deep": b"[" * 100_000,
            "long number": b'{"a": ' + b"9" * 5000 + b"}",
            "twice": data + data,
        }[how]
        return f"{name} {how} {at}", lambda to: write(to / name, bytes(data))
    what = rng.choice(("folder", "nothing", "dangling", "fifo"))
    return f"{name} {what}", lambda to: replace(to / name, what)


def write(path: Path, content: str | bytes) -> None:
    """Surrogates stay what they are."""
    path.write_bytes(content.encode(errors="surrogatepass") if isinstance(content, str) else content)


def replace(path: Path, what: str) -> None:
    """Put another kind of entry in a file's place."""
    path.unlink(missing_ok=True)
    if what == "folder":
        path.mkdir()
    elif what == "dangling":
        path.symlink_to("nowhere")
    elif what == "fifo":
        os.mkfifo(path)


def commands(base: str) -> dict[str, list[str]]:
    """What a user types with a base."""
    quick = ["--method", "nearest", "--check-rows", "2", "--overwrite"]
    run = ["--iterations", "1", "--batch-size", "1", "--max-seq-length", "32", "--overwrite", "--rank", "2"]
    return {
        "generate": ["generate", "hi", "--base", base, "--max-tokens", "2"],
        "generate adapter": ["generate", "hi", "--base", base, "--adapter", "a", "--max-tokens", "2", "--json"],
        "ab": ["ab", "prompts.txt", "a", "base", "--base", base, "--max-tokens", "2"],
        "fuse": ["fuse", "a", "out", "--base", base, "--bits", "8", "--group-size", "32", *quick],
        "fuse calibrated": [
            "fuse",
            "a",
            "out",
            "--base",
            base,
            "--bits",
            "4",
            "--group-size",
            "32",
            "--overwrite",
            "--calibration",
            "data",
            "--calibration-rows",
            "2",
            "--check-rows",
            "2",
            "--quick",
        ],
        "fuse hf": ["fuse", "a", "out", "--base", base, "--format", "hf", "--no-check", "--overwrite"],
        "fuse gguf": ["fuse", "a", "out.gguf", "--base", base, "--format", "gguf", "--no-check", "--overwrite"],
        "eval": [
            "eval",
            "base",
            "a",
            "--base",
            base,
            "--data",
            "data",
            "--max-rows",
            "2",
            "--max-tokens",
            "2",
            "--score",
            "exact",
        ],
        "train": ["train", base, "--data", "data", "--name", "n", "--mask-prompt", *run],
        "verify": ["verify", "a", "--base", base],
        "estimate": ["estimate", base, "--context", "64"],
        "estimate data": ["estimate", base, "--data", "data", "--batch-size", "1", "--max-seq-length", "32"],
        "check": ["data", "check", "data", "--base", base, "--mask-prompt"],
        "compare": ["compare", "a", "a", "--base", base, "--data", "data"],
        "export": ["export-peft", "a", "peft", "--overwrite"],
        "extract": ["extract", base, base, "--name", "x", "--overwrite", "--rank", "2"],
        "pack": ["pack", base, "model.tar.gz", "--overwrite"],
        "card": ["card", base],
    }


def fault(result: Result, where: Path) -> str | None:
    """What is wrong with how a command ended."""
    if (where / "ran").exists():
        (where / "ran").unlink()
        return "ran code of the folder"
    return wrong_end(result)
