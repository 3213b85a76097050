"""How many tenants how many replicas carry: requests of Zipf-distributed tenants, simulated with measured constants.

    python scripts/benchmarks/tenants.py measure --base demo --rank 8 --json constants.json   # minutes, on this machine
    python scripts/benchmarks/tenants.py simulate constants.json                              # half a minute, anywhere

`measure` takes the constants with random adapters of all linear layers: bringing an adapter in from the disk (its pages
dropped from the system's cache first, where it lets us) and from that cache, what a changed mix of adapters costs the
next step, one step of a batch of 1, 2, 4, ... rows (without adapter, with one, with a different one each; the fastest
round's median), a token of a prompt, and memory.

`simulate` plays Poisson arrivals: tenant number k asks with a probability in proportion to k^-s. A proxy sends it to a
replica: by a hash of its name, by that unless this one's queue is full, or anywhere. There it waits for its adapter
(least recently used of `slots`; brought in beside the decoding, one at a time) and for a place among `batch` rows.
Prompts are read alone, then all rows decode together, as `serve` does. Requests are turns of chats: a part of each
prompt is in the prompt cache of the replica that the tenant's last request went to. A tenant that is fused has its own
replica, at the speed without adapter.
"""

import argparse
import json
import os
import random
import statistics
import tempfile
from collections import Counter, OrderedDict, deque
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import accumulate
from pathlib import Path

SIZES = (1, 2, 4, 8, 16)


def measure(options):
    """The constants of this machine, in seconds and bytes."""
    import mlx_adapters  # noqa: F401  (before mlx: it sees to a fast BLAS)

    # isort: split
    import mlx.core as mx
    from serve import active_bytes, random_adapter, timed

    from mlx_adapters.generation.batching import Batcher
    from mlx_adapters.generation.live import load_model
    from mlx_adapters.generation.requests import Request
    from mlx_adapters.models.adapter import write_adapter
    from mlx_adapters.system.machine import environment

    model = load_model(options.base)
    base_bytes, prompt = active_bytes(), [(7 * i) % 1000 + 5 for i in range(options.prompt)]
    with tempfile.TemporaryDirectory() as folder:
        path = write_adapter(random_adapter(model, options.rank, 0), Path(folder) / "a")
        cold, warm = [], []
        for _ in range(5):
            dropped = all([drop(file) for file in path.iterdir()])
            cold.append(timed(lambda: model.attach(path, name="disk", use=False)))
            model.detach("disk")
            warm.append(timed(lambda: model.attach(path, name="disk", use=False)))
            model.detach("disk")
        file_bytes = sum(file.stat().st_size for file in path.iterdir())
    for i in range(max(SIZES)):
        model.attach(random_adapter(model, options.rank, i), name=str(i), use=False)
    adapter_bytes = (active_bytes() - base_bytes) / max(SIZES)
    attached = list(model.pool.attached.values())

    def steps(rows, prompt=(5, 6)):
        """(seconds until all rows are read, of the first step of all, the median of those after it)"""
        batcher = Batcher(model.module, model.pool, len(rows))
        for row in rows:
            batcher.submit(Request(list(prompt), row, options.tokens))
        reading = timed(lambda: [batcher.step() for _ in rows if len(batcher.rows) < len(rows)])
        first, *rest = [timed(batcher.step) for _ in range(options.tokens - 4)]
        batcher.clear()
        return reading, first, statistics.median(rest)

    kinds = {"none": lambda n: [None] * n, "one": lambda n: attached[:1] * n, "each": lambda n: attached[:n]}
    decode = {kind: {} for kind in kinds}
    for size in SIZES:
        runs = {kind: [] for kind in kinds}
        for _ in range(options.rounds):
            for kind, rows in kinds.items():  # in turn, so that all see the same machine
                runs[kind].append(steps(rows(size)))
        for kind, seen in runs.items():
            decode[kind][size] = min(one[2] for one in seen)  # other programs on the machine only ever add
        swap = statistics.median(one[1] - one[2] for one in runs["each"])
    long, short = (min(steps(attached[:1], p)[0] for _ in range(options.rounds)) for p in (prompt, prompt[:2]))
    seen = {
        "base": options.base,
        "rank": options.rank,
        "environment": environment(),
        "device": str(mx.default_device()),
        "load_cold": statistics.median(cold) if dropped else None,
        "load": statistics.median(warm),
        "swap": max(swap, 0.0),
        "prefill": (long - short) / (len(prompt) - 2),
        "decode": decode,
        "base_bytes": base_bytes,
        "adapter_bytes": adapter_bytes,
        "file_bytes": file_bytes,
    }
    text = json.dumps(seen, indent=1, default=str)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")


def drop(file):
    """Put a file out of the system's cache; whether that can be asked for."""
    if not hasattr(os, "posix_fadvise"):
        return False
    with open(file, "rb") as handle:
        os.fsync(handle.fileno())
        os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True


@dataclass
class Setup:
    """What is simulated. `load` of traffic: as a part of what all replicas can carry at full batches."""

    tenants: int
    replicas: int = 1
    slots: int = 8
    load: float = 0.6
    exponent: float = 1.0
    sent: str = "by name, unless full"
    fused: int = 0
    requests: int = 4000
    prompt: int = 200
    tokens: int = 100
    batch: int = 16
    queue: int = 1
    cached: float = 0.6
    rate: float | None = None
    seed: int = 0


@dataclass
class Outcome:
    """What came of it, over all replicas."""

    waits: list[float] = field(default_factory=list)
    hits: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def row(self, setup, constants):
        """The cells of a table: hit rate, TTFT's percentiles, tokens a second, memory of a replica."""
        waits, count, raw = sorted(self.waits), len(self.waits), constants.raw
        cut = [waits[min(int(count * share), count - 1)] for share in (0.5, 0.95, 0.99)]
        memory = raw["base_bytes"] + min(setup.slots, setup.tenants) * raw["adapter_bytes"]
        told = [f"{self.hits / count:.0%}", *(f"{seconds:.2f}" for seconds in cut)]
        return [*told, f"{self.tokens / self.seconds:.0f}", f"{memory / 1e6:,.0f}"]


class Constants:
    """Measured figures; the seconds of a step between two measured batches lie on the line between them.

    Other programs on the machine only ever add to a measured time: where more work took less, that is taken.
    """

    def __init__(self, raw):
        self.raw = raw
        self.load = raw["load_cold"] or raw["load"]
        self.swap, self.prefill = raw["swap"], raw["prefill"]
        seen = {kind: {int(size): seconds for size, seconds in of.items()} for kind, of in raw["decode"].items()}
        self.steps = {kind: self._line(self._least(seen, kind)) for kind in seen}

    @staticmethod
    def _least(seen, kind):
        """What a step can have taken: no more than one of more rows, or of these rows with more to do."""
        others = list(seen)[list(seen).index(kind) :]  # none, one, each
        return {n: min(seen[k][m] for k in others for m in seen[k] if m >= n) for n in seen[kind]}

    @staticmethod
    def _line(points):
        sizes, seen = sorted(points), {}
        for low, high in zip(sizes, [*sizes[1:], sizes[-1]], strict=True):
            for n in range(low, high + 1):
                part = (n - low) / max(high - low, 1)
                seen[n] = points[low] * (1 - part) + points[high] * part
        return seen

    def rate(self, setup):
        """Requests a second that one replica carries with full batches."""
        full = self.steps["each"][setup.batch] / setup.batch
        return 1 / (setup.prompt * (1 - setup.cached) * self.prefill + setup.tokens * full)


class Replica:
    """One server in time: what waits, what is decoded, which adapters are in memory. `slots` 0: it needs none."""

    def __init__(self, setup, constants, outcome, kind="each", slots=None):
        self.setup, self.constants, self.outcome = setup, constants, outcome
        self.steps, self.slots = constants.steps[kind], setup.slots if slots is None else slots
        self.waiting, self.rows, self.now = deque(), [], 0.0
        self.resident, self.used, self.loading = OrderedDict(), Counter(), None
        self.missed = set()

    @property
    def full(self):
        return len(self.waiting) + len(self.rows) >= self.setup.batch + self.setup.queue

    def advance(self, until):
        """Work until then; a step that is begun is ended."""
        while self.now < until:
            if self.loading and self.loading[0] <= self.now:
                self.resident[self.loading[1]], self.loading = True, None
            joined = self.join()
            if self.rows or joined:
                self.step(joined)
            elif self.loading:
                self.now = min(self.loading[0], until)
            else:
                self.now = until

    def join(self):
        """Those of the waiting that have their adapter and a place; begins to load for the first that has none."""
        joined, later = [], deque()
        for one in self.waiting:
            tenant = one[1]
            if self.slots and tenant not in self.resident:
                self.missed.add(one)
                if self.loading is None and (len(self.resident) < self.slots or self.make_room()):
                    self.loading = self.now + self.constants.load, tenant
                later.append(one)
            elif len(self.rows) + len(joined) < self.setup.batch:
                if self.slots:
                    self.resident.move_to_end(tenant)
                self.used[tenant] += 1
                self.outcome.hits += one not in self.missed
                joined.append(one)
            else:
                later.append(one)
        self.waiting = later
        return joined

    def make_room(self):
        """Put the least recently used adapter out that no row needs. False if all are needed."""
        for tenant in self.resident:
            if not self.used[tenant]:
                del self.resident[tenant]
                return True
        return False

    def step(self, joined):
        """Read the prompts that joined, and decode one token of all rows."""
        self.now += sum(one[3] for one in joined) * self.constants.prefill
        self.now += self.constants.swap if joined and self.slots else 0.0
        self.now += self.steps[len(self.rows) + len(joined)]
        self.outcome.waits += [self.now - one[0] for one in joined]
        self.rows += [[length, tenant] for _, tenant, length, _ in joined]
        self.outcome.tokens += len(self.rows)
        for row in self.rows:
            row[0] -= 1
            if not row[0]:
                self.used[row[1]] -= 1
        self.rows = [row for row in self.rows if row[0]]
        self.outcome.seconds = max(self.outcome.seconds, self.now)


def simulate(setup, constants):
    """Arrivals, who gets them, and what the replicas make of them."""
    rng, anywhere = random.Random(setup.seed), random.Random(setup.seed + 1)  # the same requests, however they are sent
    outcome, at, homes, last = Outcome(), 0.0, {}, {}
    weights = list(accumulate((k + 1) ** -setup.exponent for k in range(setup.tenants)))
    rate = setup.rate or setup.load * setup.replicas * constants.rate(setup)
    shared = [Replica(setup, constants, outcome) for _ in range(setup.replicas)]
    own = [Replica(setup, constants, outcome, "none", 0) for _ in range(setup.fused)]
    for tenant in rng.choices(range(setup.tenants), cum_weights=weights, k=setup.requests):
        at += rng.expovariate(rate)
        length = max(1, round(rng.expovariate(1 / setup.tokens)))
        for replica in [*shared, *own]:
            replica.advance(at)
        if tenant not in homes:  # the replicas by their hashes with the name, as Caddy orders them
            homes[tenant] = sorted(shared, key=lambda r, t=tenant: sha256(f"{t} {shared.index(r)}".encode()).digest())
        free = [replica for replica in homes[tenant] if setup.sent == "by name" or not replica.full]
        chosen = anywhere.choice(shared) if setup.sent == "anywhere" else (free or homes[tenant])[0]
        chosen = own[tenant] if tenant < setup.fused else chosen
        known = setup.cached if last.get(tenant) is chosen else 0.0
        last[tenant] = chosen
        chosen.waiting.append((at, tenant, length, setup.prompt * (1 - known)))
    for replica in [*shared, *own]:
        while replica.waiting or replica.rows:
            replica.advance(replica.now + 1.0)
    return outcome


HEAD = ["hits", "TTFT 50 %, s", "95 %", "99 %", "tokens/s", "MB of a replica"]


def table(title, names, rows):
    """A table in Markdown."""
    print(f"\n{title}\n")
    print("| " + " | ".join([*names, *HEAD]) + " |")
    print("| " + " | ".join(["---"] * (len(names) + len(HEAD))) + " |")
    for row in rows:
        print("| " + " | ".join(map(str, row)) + " |")


def tell(options):
    """Play all, and print the tables."""
    constants = Constants(json.loads(options.constants.read_text()))

    def played(*names, **how):
        setup = Setup(**{"requests": options.requests, "tokens": options.tokens, "prompt": options.prompt_tokens} | how)
        return [*names, *simulate(setup, constants).row(setup, constants)]

    one = constants.rate(Setup(1, tokens=options.tokens, prompt=options.prompt_tokens))
    raw, steps = constants.raw, constants.steps
    print(
        f"{raw['base']}, rank {raw['rank']}, {raw['device']}; prompts of {options.prompt_tokens}, answers of", end=" "
    )
    print(
        f"{options.tokens} tokens; load {constants.load * 1e3:.0f} ms, swap {constants.swap * 1e3:.1f} ms, prefill",
        end=" ",
    )
    print(f"{constants.prefill * 1e3:.2f} ms a token; a step of 1, 4, 16 rows:", end=" ")
    print(", ".join(f"{kind} {'/'.join(f'{of[n] * 1e3:.0f}' for n in (1, 4, 16))} ms" for kind, of in steps.items()))
    print(f"one replica carries {one:.2f} requests/s")
    many = (10, 100, 1_000, 10_000, 100_000)
    slots = [played(f"{n:,}", m, tenants=n, slots=m) for n in many for m in (8, 32, 128)]
    table("Slots: one replica at 60 % of what it carries", ["tenants", "slots"], slots)
    ways = ("by name", "by name, unless full", "anywhere")
    routes = [played(f"{n:,}", how, tenants=n, replicas=4, slots=32, sent=how) for n in many for how in ways]
    table("Routing: four replicas of 32 slots at 60 %", ["tenants", "sent"], routes)
    loads = (0.3, 0.5, 0.7, 0.8, 0.9, 1.0)
    macs = [
        played(f"{part:.0%}", n, tenants=1_000, replicas=n, slots=32, rate=part * one) for part in loads for n in (1, 2)
    ]
    table("One more: 1,000 tenants, 32 slots; load as a part of what one replica carries", ["load", "replicas"], macs)
    largest = [
        played(
            f"{n:,}", "shared" if not k else f"{k} fused", tenants=n, replicas=4 - k, slots=32, fused=k, rate=2.4 * one
        )
        for n in (10, 1_000, 100_000)
        for k in (0, 1, 2)
    ]
    table(
        "Fusing: four machines at 60 %, of which the largest tenants may have one each",
        ["tenants", "machines"],
        largest,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    measuring = commands.add_parser("measure")
    measuring.add_argument("--base", default="demo")
    measuring.add_argument("--rank", type=int, default=8)
    measuring.add_argument("--prompt", type=int, default=130)
    measuring.add_argument("--tokens", type=int, default=16, help="steps of each trial")
    measuring.add_argument("--rounds", type=int, default=5)
    measuring.add_argument("--json", type=Path)
    measuring.set_defaults(work=measure)
    playing = commands.add_parser("simulate")
    playing.add_argument("constants", type=Path)
    playing.add_argument("--requests", type=int, default=4000)
    playing.add_argument("--prompt-tokens", type=int, default=200)
    playing.add_argument("--tokens", type=int, default=100)
    playing.set_defaults(work=tell)
    options = parser.parse_args()
    options.work(options)


if __name__ == "__main__":
    main()
