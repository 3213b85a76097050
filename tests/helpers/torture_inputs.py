"""Mutated inputs of every kind, and the commands that read them.

A command may refuse or succeed; it may not end in a traceback, hang, take all memory, run code of the input or write
a control character. Bases are mutated by `hostile`, the rest here: adapters, runs, models, data, settings, recipes,
reports, PEFT folders, archives.
"""

import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from helpers import hostile
from helpers.forked import run
from helpers.torture_mutants import mutation
from helpers.torture_place import Place, in_rounds

PEAK_BYTES = 3 << 30

# Of each kind: the files (patterns below the place), and the commands that read them, one a line.
KINDS: dict[str, tuple[str, str]] = {
    "adapter": (
        "folder/*.json folder/*.safetensors",
        """
        show ./folder
        show ./folder --json --layers
        verify ./folder
        add ./folder --name n
        generate hi --adapter ./folder --max-tokens 1
        fuse ./folder out/f --method nearest --no-check
        merge ./folder b --name m
        scale ./folder 2 --name s
        compare ./folder b
        merge b ./folder --name m --method ties --density 0.5
        export-peft ./folder out/p --base-model x/y
        pack ./folder out/f.tar.gz
        publish ./folder user/x --dry-run --base-model user/base
        card ./folder --base-model x/y
        eval base ./folder --base BASE --data data --max-rows 2
        estimate BASE --adapter ./folder
        train --name new --iterations 1 --init-from ./folder
        interpolate ./folder b --steps 2 --name i
        advise ./folder --report bench.json
        """,
    ),
    "run": (
        "home/adapters/a/*.json home/adapters/a/*.safetensors home/adapters/a/checkpoints/*/*",
        """
        list
        list --json --sort loss
        show a
        verify --all
        use a@2
        tag a x
        prune a --yes --keep-last 0
        remove a@2 --yes
        remove a --yes
        rename a z
        train --resume a --iterations 5
        pack a out/a.tar.gz --checkpoints
        show a --plot out/l.svg
        scale b 2 --name a --overwrite
        train --name a --iterations 1 --overwrite
        generate hi --adapter a@2 --max-tokens 1
        card a --write --base-model x/y
        eval base a --base BASE --data data --max-rows 2
        """,
    ),
    "model": (
        "fused/*.json fused/*.safetensors fused8/*.json fused8/*.safetensors",
        """
        fuse --again fused out/again
        fuse --again fused8 out/again
        fuse --check-only fused8 --adapter a --check-rows 2
        pack ./fused out/f.tar.gz
        generate hi --base ./fused8 --max-tokens 1
        card ./fused8 --base-model x/y
        publish ./fused user/x --dry-run --base-model user/base
        extract ./fused BASE --rank 2 --name e
        add ./fused --out out/m
        estimate ./fused8
        fuse a out/f --base ./fused8 --any-base --method nearest --no-check
        fuse a out/f --base ./fused --any-base --format gguf --no-check
        eval base ./fused8 --base BASE --data data --max-rows 2
        fuse a fused --overwrite --method nearest --no-check
        """,
    ),
    "data": (
        "data/*.jsonl rows.jsonl",
        """
        train --name new --iterations 1
        train --name new --iterations 1 --mask-prompt
        train --name new --iterations 1 --packing
        data check data --base BASE --mask-prompt
        data check data --base BASE
        data split rows.jsonl out/s
        estimate BASE --data data --batch-size 1 --max-seq-length 32
        eval base a --base BASE --data data --score exact --max-rows 2 --max-tokens 2
        compare a b --data data
        fuse a out/c --bits 4 --group-size 32 --calibration data --calibration-rows 2 --check-rows 2 --quick
        eval a --data data --score sqlite --max-rows 2 --max-tokens 2
        ab rows.jsonl a b --max-tokens 1
        """,
    ),
    "settings": (
        "x.yaml",
        """
        train --config x.yaml --print-config
        train --config x.yaml --name new --iterations 1
        estimate --config x.yaml --batch-size 1 --max-seq-length 32
        """,
    ),
    "report": (
        "bench.json eval.json",
        """
        advise a --report bench.json
        card a --benchmark bench.json --base-model x/y
        publish a user/x --dry-run --benchmark bench.json --base-model user/base
        """,
    ),
    "peft": (
        "peft/*",
        """
        import-peft ./peft --base BASE --name p
        import-peft ./peft --base BASE --name p --tie
        fuse --from-peft ./peft --base BASE out/p --method nearest --no-check
        add ./peft --name p
        show ./peft
        """,
    ),
    "archive": (
        "a.tar.gz fused8.tar.gz",
        """
        add a.tar.gz --name n
        add a.tar.gz --out out/n
        add fused8.tar.gz --out out/m
        pack a a.tar.gz --overwrite
        add a.tar.gz --name b --overwrite
        """,
    ),
}


class Inputs:
    def __init__(self, place: Place) -> None:
        self.place = place
        self.kinds = {
            name: (files.split(), [place.words(line.strip()) for line in commands.strip().splitlines()])
            for name, (files, commands) in KINDS.items()
        }

    def broken(self, name: str, rng: random.Random) -> tuple[str, list[str]]:
        """Put a mutant into a fresh place; its label, and the command to give."""
        self.place.fresh()
        if name == "base":
            mutant = self.place.folder / "mutant"
            shutil.copytree(self.place.base, mutant)
            label, apply = hostile.mutation(rng, Path(self.place.base))
            hostile.write(mutant / "code.py", hostile.CODE)
            apply(mutant)
            hostile.write(self.place.folder / "prompts.txt", "hi\n")
            return label, rng.choice(sorted(hostile.commands("./mutant").items()))[1]
        files, commands = self.kinds[name]
        command = rng.choice(commands)
        paths = sorted(path for pattern in files for path in self.place.folder.glob(pattern))
        named = [
            path for path in paths if any(part.removeprefix("./") in (path.name, path.parent.name) for part in command)
        ]
        label, apply = mutation(rng.choice(named or paths), rng)
        apply()
        return label, command

    def trial(self, name: str, seed: str) -> str | None:
        label, command = self.broken(name, random.Random(seed))
        mine = {path: path.read_bytes() for path in self.place.folder.rglob("thesis.txt")}
        result = run(command, self.place.folder)
        wrong = hostile.fault(result, self.place.root)
        if wrong is None and result.peak_bytes > PEAK_BYTES:
            wrong = f"takes {result.peak_bytes / 1e9:.1f} GB"
        if wrong is None and any(not path.is_file() or path.read_bytes() != content for path, content in mine.items()):
            wrong = "touches the user's own"
        if wrong is None and self.place.rubbish():
            wrong = f"leaves {self.place.rubbish()[0].relative_to(self.place.folder)}"
        return wrong and f"{' '.join(command)} | {label}: {wrong}"


def trials(place: Place, seed: int, times: Callable[[str], int]) -> Iterator[tuple[str, str, Callable[[], str | None]]]:
    inputs = Inputs(place)
    for number, name in in_rounds(["base", *inputs.kinds], times):
        yield name, f"#{number}", lambda w=name, n=number: inputs.trial(w, f"{seed} {w} {n}")
