"""Kills and refusals of the disk at the n-th operation of every command that writes.

After each: the old state or the new one, whole; nothing of the user's touched; every adapter sound; and the same
command, given once more, ends as if nothing had happened and leaves no rubbish.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass

from helpers.forked import FAULTS, Command, Trap, run, wrong_end
from helpers.torture_place import Place, age, differences

# Each command that writes. After "|": where it may stop half-way, between one whole file and the next. After "~": what
# a user gives after a failure, each in turn until one succeeds [the command itself].
COMMANDS = """
train --name t | home/adapters/t/ ~ train --resume t ~ train --name t
train --name b --overwrite | home/adapters/b/ ~ train --resume b ~ train --name b --overwrite
train --resume b --iterations 6 | home/adapters/b/ ~ train --resume b --iterations 6 ~ train --resume b
train --name i --init-from a | home/adapters/i/ ~ train --resume i ~ train --name i --init-from a
train --name ./run | run/ ~ train --resume ./run ~ train --name ./run
fuse a out/f --bits 8 --group-size 32 --method nearest --no-check
fuse b fused8 --overwrite --bits none --method nearest --no-check
fuse a out/c --bits 4 --group-size 32 --calibration data --calibration-rows 24 --check-rows 2 --quick
fuse a out/h --format hf --no-check
fuse a out/g --format gguf --no-check
fuse --again fused8 out/again
fuse --from-peft ./peft --base BASE out/p --method nearest --no-check
merge a b --name m
merge a b --method svd --name v
merge a a@2 --name b --overwrite
subtract a b --name m
scale a 0.5 --name s
scale b 0.5 --name a --overwrite
interpolate a b --steps 3 --name i | home/adapters/i- ~ interpolate a b --steps 3 --name i --overwrite
extract ./fused BASE --rank 2 --name e
rename a z
tag a good
use a@2 | home/adapters/a/adapter
remove a --yes
remove a@2 --yes | home/adapters/a/
prune a --yes --keep-last 0 | home/adapters/a/
pack a out/a.tar.gz --checkpoints
pack b a.tar.gz --overwrite
pack ./fused out/f.tar.gz
add a.tar.gz --name n
add ./folder --name n
add a.tar.gz --name b --overwrite
add fused8.tar.gz --out out/m
init project | project/
export-peft a out/peft --base-model x/y
export-peft b peft --base-model x/y --overwrite
import-peft ./peft --base BASE --name p
import-peft ./peft --base BASE --name b --overwrite
data split rows.jsonl out/split
data split rows.jsonl split --seed 1 --overwrite
card a --write --base-model x/y | home/adapters/a/
card ./fused --write --base-model x/y | fused/
show a --plot out/loss.svg
eval base a b --base BASE --data data -o reports/e.json | home/adapters/ reports/
benchmark base a MEASURED -o reports/b.json --html reports/b.html --markdown reports/b.md --plots reports | reports/
publish a user/new --dry-run --base-model user/base
publish a user/a --base-model user/base | home/adapters/a/
publish ./fused user/model --base-model user/base | fused/
download user/there --base BASE --name d
completion zsh
generate hi --adapter a --max-tokens 2
env --check
"""


@dataclass
class Scenario:
    """A command that writes, what is given after a failure, and prefixes of paths where it may stop half-way."""

    arguments: list[str]
    again: list[list[str]]
    steps: tuple[str, ...]


def scenarios(place: Place) -> dict[str, Scenario]:
    made = {}
    for line in COMMANDS.strip().splitlines():
        first, *more = line.split(" ~ ")
        command, _, steps = first.partition(" | ")
        again = [place.words(text) for text in more or [command]]
        made[command] = Scenario(place.words(command), again, tuple(steps.split()))
    return made


class Tried:
    """One scenario: what a whole run of it does, and the trials of it."""

    def __init__(self, place: Place, name: str, scenario: Scenario) -> None:
        self.place, self.name, self.scenario = place, name, scenario
        place.fresh()
        self.before = place.state()
        ends = []
        for _ in range(2):
            place.fresh()
            result = run(scenario.arguments, place.folder, Trap(), seconds=300)
            assert result.status == 0, (name, result.said)
            ends.append(place.state())
        self.after, self.steps, self.seconds = ends[0], result.steps, result.seconds
        assert ends[0] == ends[1], (name, "is not the same twice", differences(*ends))
        self.rubbish = place.rubbish()

    def points(self) -> Iterator[Trap]:
        for fault, (hits, _) in FAULTS.items():
            for at in range(1, sum(step in hits for step in self.steps) + 1):
                yield Trap(fault, at)

    def trial(self, trap: Trap) -> str | None:
        """What went wrong, if anything."""
        place = self.place
        place.fresh()
        command = Command(self.scenario.arguments, place.folder, trap)
        result = command.finish(120)
        if command.left_behind():
            return "a process stays behind"
        state = place.state()
        if trap.fault == "kill":
            if result.status != -9:
                return f"was not killed: {result.status}" if result.status else None  # fewer operations this time
        elif wrong := wrong_end(result):
            return wrong
        elif trap.fault not in ("EROFS", "EACCES") and place.rubbish():  # which may have refused to clear up
            return f"leaves {place.rubbish()[0].name}"
        elif result.status == 0 and not self.fits(state, (self.after,)) and not self.warned(result.err):
            return f"says nothing, and lacks {self.between(state, self.after)}"
        if wrong := self.unlike(state):
            return wrong
        if wrong := self.unsound():
            return f"{wrong} ({result.err.strip()[-100:]})"
        return self.repeated(state)

    def warned(self, said: str) -> bool:
        return any(word in said.lower() for word in ("warning", "note", "could not", "cannot"))

    def between(self, state: dict[str, str], whole: dict[str, str]) -> list[str]:
        return differences(state, whole)[:4]

    def fits(self, state: dict[str, str], wholes: tuple[dict[str, str], ...]) -> bool:
        return state in wholes

    def unlike(self, state: dict[str, str]) -> str | None:
        """What is neither old nor new."""
        if self.fits(state, (self.before, self.after)):
            return None
        strange = [
            name
            for name in differences(state, self.before)
            if not name.startswith(self.scenario.steps or ("\0",)) or state.get(name, "").startswith("broken")
        ]
        return f"neither old nor new: {strange[:4]}, {self.between(state, self.after)}" if strange else None

    def unsound(self) -> str | None:
        listed = run(["list", "--json"], self.place.folder)
        if listed.status:
            return f"list: {listed.err}"
        text = json.dumps([entry for entry in json.loads(listed.out)["adapters"] if entry.get("problem")])
        if text != "[]":
            return f"list: {text[:200]}"
        verified = run(["verify", "--all"], self.place.folder)
        return f"verify: {verified.said[-200:]}" if verified.status else None

    def repeated(self, state: dict[str, str]) -> str | None:
        """The command once more, an hour later."""
        place = self.place
        age(place.folder)
        for arguments in self.scenario.again:
            result = run(arguments, place.folder, seconds=120)
            if wrong := wrong_end(result):
                return f"again: {wrong}"
            if result.status == 0:
                break
        final = place.state()
        if final != self.after:
            return f"again: {result.err.strip()[-120:]!r}, differs in {differences(final, self.after)[:4]}"
        if place.rubbish() and (result.status == 0 or state != self.after):
            return f"rubbish stays: {place.rubbish()[0].relative_to(place.folder)}"
        return None
