"""What torture works on: a place with adapters, data, packs and things of the user's, and how it is looked at."""

import contextlib
import hashlib
import io
import json
import os
import shlex
import shutil
import struct
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from helpers.forked import in_a_fork, run

from mlx_adapters.system.machine import on_gpu

DRAFT = ".mlx-adapters-tmp-"
MINE = (
    "notes.txt",
    ".tmp-notes/thesis.txt",
    f"{DRAFT}mine/thesis.txt",
    "home/adapters/.tmp-mine/thesis.txt",
    f"home/adapters/{DRAFT}mine/thesis.txt",
    "out/notes.txt",
)
UNSEEN = ("home/locks", "home/checks", "home/hub", "hf", "tmp", ".cache")
TIMES = ("started", "date", "created", "seconds", "duration_seconds", "checksum", "command")  # and what depends on them
RUN = "--rank 2 --batch-size 2 --learning-rate 0.01 --eval-every 2 --save-every 2 --report-every 2 --max-seq-length 48"
MEASURED = "--base BASE --rounds 1 --trials 1 --prompt-tokens 8 --decode-tokens 2 --no-cold"
MADE = """
train --name a
train --name b --seed 1
export-peft a peft --base-model x/y
fuse a fused --method nearest --no-check
fuse a fused8 --bits 8 --group-size 32 --method nearest --no-check
pack a a.tar.gz --checkpoints
pack ./fused8 fused8.tar.gz
data split rows.jsonl split
add a.tar.gz --out folder
eval base a --base BASE --data data --no-save -o eval.json
benchmark base a MEASURED -o bench.json
"""


def in_rounds(names: Iterable[str], times: Callable[[str], int]) -> Iterator[tuple[int, str]]:
    """(round, name), each name as often as it is to be tried."""
    wanted = {name: times(name) for name in names}
    for number in range(max(wanted.values(), default=0)):
        yield from ((number, name) for name, count in wanted.items() if number < count)


def rows(count: int, start: int = 0) -> str:
    records = (
        {"prompt": f"List {i} of the titles.", "completion": f"SELECT {i};"} for i in range(start, start + count)
    )
    return "".join(json.dumps(row) + "\n" for row in records)


def tiny_base(folder: Path, **options: Any) -> None:
    """Made in a process of its own, so that the forks find an MLX that never ran."""
    if not on_gpu():
        from helpers.tiny_models import build_model

        assert in_a_fork(lambda: build_model(folder, "llama", **options)) == 0
        return
    code = "import pathlib; from helpers.tiny_models import build_model"
    code += f"; build_model(pathlib.Path({str(folder)!r}), 'llama', **{options!r})"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ)


class Place:
    """`root/place`, made anew from a template by `fresh`; the bases lie beside it and are only read."""

    def __init__(self, root: Path) -> None:
        self.root, self.folder, self.template = root, root / "place", root / "template"
        self.base = str(root / "base")

    def words(self, line: str) -> list[str]:
        """The arguments of a command as the tables here spell it; a training has this place's data and settings."""
        line = line.replace("MEASURED", MEASURED).replace("BASE", self.base)
        if line.startswith("train --name"):
            few = "" if "--iterations" in line else " --iterations 4"
            line = line.replace("train", f"train {self.base} --data data {RUN}{few}", 1)
        return shlex.split(line)

    def build(self) -> None:
        tiny_base(Path(self.base))
        (Path(self.base) / "generation_config.json").write_text('{"eos_token_id": [2], "max_length": 20}')
        for name in MINE:
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"mine: {name}")
        (self.folder / "data").mkdir()
        for name, count in (("train", 120), ("valid", 4), ("test", 4)):
            (self.folder / "data" / f"{name}.jsonl").write_text(rows(count))
        (self.folder / "rows.jsonl").write_text(rows(20))
        for line in MADE.strip().splitlines():
            done = run(self.words(line), self.folder, seconds=300)
            assert done.status == 0, (line, done.said)
        (self.folder / "x.yaml").write_text(run(self.words("train --name x --print-config"), self.folder).out)
        age(self.folder)
        self.folder.rename(self.template)

    def fresh(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        subprocess.run(["cp", "-a", self.template, self.folder], check=True)

    def rubbish(self) -> list[Path]:
        """Drafts that lie about; what only looks like one is the user's."""
        drafts = (path for path in self.folder.rglob(f"*{DRAFT}*") if f"{DRAFT}mine" not in path.name)
        return [path for path in drafts if DRAFT not in str(path.parent.relative_to(self.folder))]

    def state(self) -> dict[str, str]:
        """What is there, path by path, without times, locks, rubbish and whole kernels, made where they lack."""
        digests = {}
        for path in sorted(self.folder.rglob("*")):
            name = path.relative_to(self.folder).as_posix()
            ours = name.startswith(UNSEEN) or (DRAFT in name and f"{DRAFT}mine" not in name)
            if ours or (path.is_dir() and not path.is_symlink()):
                continue
            with contextlib.suppress(FileNotFoundError):
                if not (name.startswith("home/kernels/") and is_whole_kernel(path.read_bytes())):
                    digests[name] = digest(path)
        return digests


def is_whole_kernel(content: bytes) -> bool:
    """Whether a compiled kernel, an ELF file, is as long as its tables of segments and sections say, which end it."""
    if len(content) < 64 or not content.startswith(b"\x7fELF"):
        return False
    segments, sections = struct.unpack_from("<QQ", content, 0x20)
    size, count, section_size, section_count = struct.unpack_from("<HHHH", content, 0x36)
    return len(content) == max(segments + size * count, sections + section_size * section_count)


def digest(path: Path) -> str:
    """A file's content: of JSON without what differs from run to run, of measured reports only that they are whole."""
    if path.is_symlink():
        return f"link to {os.readlink(path)}"
    return digest_of(path, path.read_bytes())


def digest_of(path: Path, content: bytes) -> str:
    measured = path.parent.name == "reports"
    if path.suffix == ".gz":
        try:
            with tarfile.open(fileobj=io.BytesIO(content)) as tar:
                members = {m.name: digest_of(Path(m.name), tar.extractfile(m).read()) for m in tar if m.isfile()}
        except (tarfile.TarError, EOFError, OSError):
            return "broken archive"
        content = repr(members).encode()
    if path.suffix in (".json", ".jsonl"):
        try:
            values = [json.loads(line) for line in (content.splitlines() if path.suffix == ".jsonl" else [content])]
        except ValueError:
            return "broken JSON"
        if path.name == "adapter_metadata.json":
            values[0].pop("name", None)  # its folder's name counts
        content = b"whole" if measured else json.dumps(plain(values), sort_keys=True).encode()
    elif measured:
        ends = {".html": b"</html>", ".svg": b"</svg>"}.get(path.suffix, b"")
        content = b"whole" if content and content.rstrip().endswith(ends) else b"cut"
    return hashlib.sha256(content).hexdigest()[:12]


def plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items() if key not in TIMES}
    return [plain(item) for item in value] if isinstance(value, list) else value


def age(folder: Path) -> None:
    """As if an hour had gone by: what a killed writer left counts as left."""
    for path in [folder, *folder.rglob("*")]:
        with contextlib.suppress(OSError):
            os.utime(path, (1e9, 1e9), follow_symlinks=False)


def differences(one: dict[str, str], other: dict[str, str]) -> list[str]:
    return [name for name in sorted({*one, *other}) if one.get(name) != other.get(name)]
