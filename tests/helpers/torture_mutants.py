"""Mutants: one file of any form with one thing in it that should not be there."""

import gzip
import io
import json
import random
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from helpers import hostile

YAML = [
    "\na: &a [x]\nb: *a\n",
    "&a [*a]\n",
    "!!python/object/apply:os.system ['touch ran']\n",
    "[1, 2]\n",
    "lora: {rank: 0x10}\ntraining: [1]\n",
    "lora: {rank: 1e400}\n",
    "base: {a: 1}\n",
    "\ttab: 1\n",
    "? [1]\n: 2\n",
    "training: {iterations: .inf}\n",
    "name: ../../x\n",
    "data: [1, 2]\n",
    "base: 2026-11-28\n",
    "---\n---\n",
    "lora: {target_modules: [1]}\n",
    "<<: 1\n",
    "<<: {base: x}\n",
    "true: no\nnull: ~\n",
    "lora:\n  ranks: {q_proj: -1}\n",
    "x\n",
]
YAML += ["", "\0: 1", "a: " + "[" * 3000]
ROWS = r"""
{"messages": []}
{"messages": "x"}
{"messages": [null]}
{"messages": [{"role": "user"}]}
{"messages": [{"role": 1, "content": []}]}
{"messages": [{"role": "assistant", "content": "x"}]}
{"messages": [{"role": "tool", "content": "x"}]}
{"messages": [{"role": "user", "content": "x"}], "tools": 3}
{"text": ""}
{"text": 1}
{"text": NaN}
{"text": "\ud800"}
{"text": "a\u0000b"}
{"text": "x", "text": "y"}
{"text": "<|im_end|><|endoftext|>"}
{"prompt": "x"}
{"prompt": "", "completion": ""}
{"prompt": null, "completion": "x"}
{"prompt": [1], "completion": {"a": 1}}
{"chosen": "x", "rejected": "y"}
[]
1
{
""".splitlines()
ROWS += ["   ", "\ufeff{}", "[" * 50_000, json.dumps({"text": "z" * 200_000})]
DTYPES = ("F64", "BF16", "I8", "BOOL", "F8_E4M3", "C64", "f32", "U64", "F4")
NUMBERS = (b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\xff\xff\x7f\x7f", b"\1\0\0\0", b"\xff" * 4)  # NaN, Inf, huge, tiny
LENGTHS = (0, 1, 2**63, 2**64 - 1, 100_000_000)
MEMBERS = ("/etc/x", "../x", "a/../../x", "x" * 300, hostile.ESC, ".", "", "a//b", "CON", "a/", "\udc80")
TYPES = (tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, b"x", b"K")
Mutation = tuple[str, Callable[[], None]]


def value_of(value: Any, rng: random.Random) -> tuple[str, Any]:
    """A JSON value with one place changed."""
    at, new = rng.choice(hostile.places(value)), rng.choice([*hostile.VALUES, ...])
    return f"{'.'.join(map(str, at))} = {str(new)[:40]!r}", hostile.put(value, at, new) if at else (
        None if new is ... else new
    )


def mutate_header(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    """A safetensors file whose header lies."""
    length = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    how = rng.choice(
        ("value", "value", "value", "length", "dtype", "offsets", "rename", "twice", "metadata", "numbers")
    )
    names = [name for name in header if name != "__metadata__"]
    name = rng.choice(names)
    if how == "value":
        how, header = value_of(header, rng)
    elif how == "length":
        length = rng.choice((*LENGTHS, length - 1, length + 1, len(data)))
        return f"header's length {length}", struct.pack("<Q", length) + data[8:]
    elif how == "dtype":
        header[name]["dtype"] = rng.choice(DTYPES)
    elif how == "offsets":
        header[name]["data_offsets"] = rng.choice(
            ([0, 0], [0, len(body)], [-4, 4], [len(body), len(body) + 4], [4, 0], [0.0, 4.0], [0, 2**63])
        )
    elif how == "rename":
        header[rng.choice(("x", "", "../x", "\x1b[2J", name + ".weight", name.replace("0", "9"), name.upper()))] = (
            header.pop(name)
        )
    elif how == "twice":
        header[name] = header[rng.choice(names)]
    elif how == "metadata":
        header["__metadata__"] = rng.choice((1, [], {"a": 1}, {"format": "pt"}, {"x": "\x1b[2J"}, {"config": "{"}))
    else:
        body = bytearray(body)
        for _ in range(rng.choice((1, 20))):
            at = rng.randrange(len(body) // 4) * 4
            body[at : at + 4] = rng.choice(NUMBERS)
    text = json.dumps(header).encode(errors="surrogatepass")
    return how, struct.pack("<Q", len(text)) + text + bytes(body)


def mutate_tar(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    """An archive with a member that is not what it should be."""
    members = []
    with tarfile.open(fileobj=io.BytesIO(gzip.decompress(data))) as tar:
        members = [(member, tar.extractfile(member).read() if member.isfile() else b"") for member in tar]
    number = rng.randrange(len(members))
    member, content = members[number]
    how = rng.choice(("name", "type", "link", "mode", "size", "twice", "missing", "content", "tail"))
    if how == "name":
        member.name = rng.choice(MEMBERS)
    elif how == "type":
        member.type = rng.choice(TYPES)
    elif how == "link":
        member.type, member.linkname = tarfile.SYMTYPE, rng.choice(("/etc/passwd", "..", member.name, "x"))
    elif how == "mode":
        member.mode, member.mtime, member.uid = 0o7777, 2**33, 2**20
    elif how == "twice":
        members.append((member, content[: len(content) // 2]))
    elif how == "missing":
        del members[number]
    elif how == "content":
        content = rng.choice((b"", b"{}", b"[" * 9999, content[: len(content) // 2], content + b"x"))
        members[number] = (member, content)
    out = io.BytesIO()
    with tarfile.open(
        fileobj=out, mode="w", format=rng.choice((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)), errors="surrogatepass"
    ) as tar:
        for member, content in members:
            member.size = len(content) if member.isreg() else 0
            tar.addfile(member, io.BytesIO(content))
    raw = bytearray(out.getvalue())
    if how == "size":  # in the header of a member
        at = rng.randrange(len(raw) // 512) * 512 + 124
        raw[at : at + 12] = rng.choice((b"77777777777\0", b"\x80" + b"\xff" * 11, b"-0000000001\0", b"x" * 12))
    if how == "tail":
        raw += rng.randbytes(2000)
    return f"{how} of {member.name[:40]!r}", gzip.compress(bytes(raw), 1)


def mutate_bytes(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    how = rng.choice(("cut", "flip", "noise", "empty", "bom", "latin", "deep", "twice", "zeros"))
    at = rng.randrange(len(data)) if data else 0
    flipped = data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :] if data else b"x"
    changed = {
        "cut": data[:at],
        "flip": flipped,
        "noise": rng.randbytes(300),
        "empty": b"",
        "bom": b"\xef\xbb\xbf" + data,
        "latin": data.replace(b"a", b"\xe4", 1),
        "deep": b"[" * 100_000,
        "twice": data + data,
        "zeros": bytes(len(data)),
    }
    return f"{how} {at}", changed[how]


def mutate_rows(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    lines = data.decode().splitlines()
    if rng.random() < 0.4:
        how, value = value_of(json.loads(rng.choice(lines)), rng)
        new = json.dumps(value)
    else:
        new = how = rng.choice(ROWS)
    at = rng.randrange(len(lines))
    lines = [new] * len(lines) if rng.random() < 0.3 else [*lines[:at], new, *lines[at + 1 :]]
    return f"row {at}: {how[:60]!r}", ("\n".join(lines) + "\n").encode(errors="surrogatepass")


def mutate_yaml(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    if rng.random() < 0.3:
        text = rng.choice(YAML)
        return f"yaml {text[:40]!r}", text.encode()
    how, value = value_of(yaml.safe_load(data), rng)
    return how, json.dumps(value).encode(errors="surrogatepass")  # JSON is YAML


def mutation(path: Path, rng: random.Random) -> Mutation:
    """A label, and what puts the mutant into the file's place."""
    kind = rng.random()
    if kind < 0.06:
        what = rng.choice(("folder", "nothing", "dangling", "fifo"))
        if what == "fifo" and path.parent.name == "place":
            what = "nothing"  # a pipe that the user names is waited for
        return f"{path.name} is {what}", lambda: hostile.replace(path, what)
    data = path.read_bytes()
    how, changed = mutate_bytes(data, rng) if kind < 0.25 else mutate_form(path, data, rng)
    return f"{path.name} {how}", lambda: hostile.write(path, changed)


def mutate_form(path: Path, data: bytes, rng: random.Random) -> tuple[str, bytes]:
    """By the file's own form."""
    forms = {".safetensors": mutate_header, ".gz": mutate_tar, ".jsonl": mutate_rows, ".yaml": mutate_yaml}
    if path.suffix in forms:
        return forms[path.suffix](data, rng)
    if path.suffix != ".json":
        return mutate_bytes(data, rng)
    how, value = value_of(json.loads(data), rng)
    return how, json.dumps(value).encode(errors="surrogatepass")
