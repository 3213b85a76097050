"""Two processes on one name: whatever the moment, what comes of it is what one after the other would have given.

Of each pair the four serial outcomes are known beforehand: one alone, the other alone, and both in either order. A
command that refuses must have changed nothing; one that reads must have seen one version.
"""

import random
import time
from collections.abc import Callable, Iterator

from helpers.forked import Command, Result, wrong_end
from helpers.torture_place import Place, differences, in_rounds

Outcome = tuple[dict[str, str], tuple[int, int], tuple[str, str]]
READERS = ("show", "verify", "generate", "list", "compare", "export-peft")


# First and second command; either may start first.
PAIRS = """
train --name t --overwrite & train --name t --overwrite --seed 2
train --name b --overwrite --seed 3 & train --name b --overwrite --seed 4
train --name b --overwrite --seed 3 & remove b --yes
train --name b --overwrite --seed 3 & rename a b
train --name b --overwrite --seed 3 & scale a 3 --name b --overwrite
train --resume a --iterations 6 & train --resume a --iterations 6
train --resume a --iterations 6 & use a@2
train --resume a --iterations 6 & tag a good
use a@2 & generate hi --max-tokens 3 --adapter a
use a@2 & verify a
use a@2 & show a --json
use a@2 & prune a --yes --keep-last 0
use a@2 & export-peft a out/peft --base-model x/y
scale a 3 --name b --overwrite & generate hi --max-tokens 3 --adapter b
scale a 3 --name b --overwrite & verify b
scale a 3 --name b --overwrite & pack b out/b.tar.gz
scale a 3 --name b --overwrite & add ./folder --name b --overwrite
pack a out/a.tar.gz --checkpoints & remove a --yes
pack a a.tar.gz --overwrite & pack b a.tar.gz --overwrite
rename a y & rename a z
rename a z & rename b z
rename a z & list
tag a one & tag a two
tag a one & rename a z
prune a --yes --keep-last 0 & remove a --yes
remove a --yes & remove a --yes
add a.tar.gz --name x --overwrite & add a.tar.gz --name x --overwrite
fuse a fused8 --method nearest --no-check --overwrite & fuse b fused8 --method nearest --no-check --overwrite
fuse b fused --method nearest --no-check --overwrite & generate hi --base ./fused --max-tokens 3
data split rows.jsonl split --seed 1 --overwrite & data split rows.jsonl split --seed 2 --overwrite
init project & init project
download user/there --base BASE --name d --overwrite & download user/there --base BASE --name d --overwrite
import-peft ./peft --base BASE --name p --overwrite & import-peft ./peft --base BASE --name p --overwrite
"""


class Pair:
    def __init__(self, place: Place, commands: tuple[list[str], list[str]]) -> None:
        self.place, self.commands = place, commands
        self.seconds = 0.1
        self.serial = [self.outcome(order) for order in ((0,), (1,), (0, 1), (1, 0))]

    def read(self, number: int, result: Result) -> str:
        """What a command that reads has seen."""
        return result.out if self.commands[number][0] in READERS else ""

    def outcome(self, order: tuple[int, ...]) -> Outcome:
        self.place.fresh()
        statuses, seen = [-1, -1], ["", ""]
        for number in order:
            result = Command(self.commands[number], self.place.folder).finish(120)
            assert (wrong := wrong_end(result)) is None, wrong
            statuses[number], seen[number] = result.status, self.read(number, result)
            self.seconds = max(self.seconds, result.seconds)
        return self.place.state(), (statuses[0], statuses[1]), (seen[0], seen[1])

    def trial(self, rng: random.Random) -> str | None:
        """Both at once, the second a moment after the first."""
        self.place.fresh()
        first = rng.randrange(2)
        running: list[Command | None] = [None, None]
        running[first] = Command(self.commands[first], self.place.folder)
        time.sleep(rng.uniform(0, self.seconds))
        running[1 - first] = Command(self.commands[1 - first], self.place.folder)
        results = [command.finish(120) for command in running if command is not None]
        for result in results:
            if wrong := wrong_end(result):
                return wrong
        if self.place.rubbish():
            return f"leaves {self.place.rubbish()[0].name}"
        state, statuses = self.place.state(), tuple(result.status for result in results)
        said = " / ".join(result.err.strip()[-80:] for result in results)
        if all(statuses) and statuses not in [known[1] for known in self.serial]:
            return f"both refuse: {said}"
        allowed = [known for known in self.serial if self.possible(statuses, known[1])]
        if not any(state == known[0] for known in allowed):
            return f"as no order leaves it: {[differences(state, known[0])[:3] for known in allowed]} ({said})"
        for number, result in enumerate(results):
            if result.status == 0 and self.read(number, result) not in {known[2][number] for known in self.serial}:
                known = self.serial[number][2][number].splitlines()
                strange = [line for line in result.out.splitlines() if line not in known]
                return f"saw what was never there: {strange[:3] or result.out[-120:]!r}"
        return None

    @staticmethod
    def possible(statuses: tuple[int, ...], serial: tuple[int, int]) -> bool:
        """Whether a serial outcome fits: the same statuses, or alone where the other refused."""
        return all(
            status == known or (known == -1 and status != 0) for status, known in zip(statuses, serial, strict=True)
        )


def trials(place: Place, seed: int, times: Callable[[str], int]) -> Iterator[tuple[str, str, Callable[[], str | None]]]:
    prepared = []
    for name in PAIRS.strip().splitlines():
        if times(name):
            first, second = name.split(" & ")
            try:
                prepared.append((name, Pair(place, (place.words(first), place.words(second)))))
            except AssertionError as error:
                yield name, "alone", lambda error=error: str(error)
    pairs = dict(prepared)
    for number, name in in_rounds(pairs, times):
        rng = random.Random(f"{seed} {name} {number}")
        yield name, f"round {number}", lambda p=pairs[name], r=rng: p.trial(r)
