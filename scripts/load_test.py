"""Two hundred clients against one server: random adapters, clients that leave, requests that are wrong.

A tiny model with eight adapters is built, four of which fit into memory, and served on loopback, with room for a few
conversations that need not be read again. Every greedy answer, also a second turn's, is held against the adapter's solo
run, every drawn one against the same request's before; structured ones are JSON of their schema; every refusal must be
the one that was asked for; the server's memory must stay flat. Ends with status 1 if anything differs.

    python scripts/load_test.py --clients 200 --seconds 120
    python scripts/load_test.py --clients 32 --requests 5000 -- --prompt-lookup
"""

import argparse
import asyncio
import collections
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from helpers.schemas import FORMAT  # noqa: E402
from helpers.serving import Served  # noqa: E402

ADAPTERS = [f"tenant{i}" for i in range(8)]
PROMPTS = ["List all students.", "How many courses are there?", "Once upon a time", "SELECT", "a b c d e f g"]
LENGTHS = (1, 7, 24)
JSON = {"Content-Type": "application/json"}
WRONG = [
    (400, b"{"),
    (400, b"\xff\xfe"),
    (400, {"messages": []}),
    (400, {"max_tokens": -5}),
    (400, {"max_tokens": 10**12}),
    (400, {"temperature": "hot"}),
    (400, {"messages": [{"role": "user", "content": "x " * 20_000}]}),
    (400, {"unheard_of": 1}),
    (404, {"model": "nobody"}),
    (413, b" " * (2 << 20)),
]


def build(folder):
    """Write the model and register the adapters; give {(name, prompt, length): (text, second turn's)} of solo runs."""
    from helpers.adapters import random_adapter
    from helpers.tiny_models import build_model

    from mlx_adapters.generation.live import load_model
    from mlx_adapters.sources.registry import register

    model = load_model(build_model(folder / "model", "llama"))
    wanted = {}
    for i, name in enumerate(["base", *ADAPTERS]):
        if name != "base":
            model.attach(register(random_adapter(model, seed=i, rank=2 + i), name), name=name)
        model.use(None if name == "base" else name)
        for prompt in PROMPTS:
            for length in LENGTHS:
                text = model.generate(prompt, max_tokens=length).text
                following = model.generate(second_turn(prompt, text), max_tokens=length).text
                wanted[name, prompt, length] = text, following
    return wanted


def second_turn(prompt, text):
    """The messages of a conversation that goes on."""
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": text}]
    return [*messages, {"role": "user", "content": "And then?"}]


class Clients:
    """All clients and what they saw."""

    def __init__(self, http, wanted, seconds, requests):
        self.http, self.wanted, self.end, self.left = http, wanted, time.monotonic() + seconds, requests
        self.counts, self.failures, self.latencies = collections.Counter(), [], []
        self.seen = {}

    async def one(self, number):
        chance = random.Random(number)
        kinds = {"whole": 20, "stream": 20, "talk": 15, "formed": 10, "drawn": 10, "leave": 12, "wrong": 13}
        while time.monotonic() < self.end and self.left > 0:
            self.left -= 1
            kind = chance.choices(list(kinds), list(kinds.values()))[0]
            name, prompt, length = chance.choice(list(self.wanted))
            body = {
                "model": name,
                "messages": [{"role": "user", "content": prompt}],
                "temperature": 0,
                "max_tokens": length,
            }
            try:
                start = time.monotonic()
                await getattr(self, kind)(body, self.wanted[name, prompt, length], chance)
                self.counts[kind] += 1
                if kind in ("whole", "stream"):
                    self.latencies.append(time.monotonic() - start)
            except Exception as error:
                self.failures.append(f"{kind} {name}: {type(error).__name__} {str(error)[:200]}")

    async def whole(self, body, wanted, chance):
        answer = await self.http.post("/v1/chat/completions", json=body)
        assert answer.status_code == 200, answer.text[:200]
        assert answer.json()["choices"][0]["message"]["content"] == wanted[0], "another text than the solo run's"

    async def talk(self, body, wanted, chance):
        """A second turn, which may go on from what the first one left, from a part of it, or from nothing."""
        question = body["messages"][0]["content"]
        if chance.random() < 0.7:
            await self.whole(body, wanted, chance)
        await self.whole(body | {"messages": second_turn(question, wanted[0])}, wanted[1:], chance)

    async def stream(self, body, wanted, chance):
        text = ""
        async with self.http.stream("POST", "/v1/chat/completions", json=body | {"stream": True}) as answer:
            assert answer.status_code == 200, answer.status_code
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    text += json.loads(line[6:])["choices"][0]["delta"].get("content", "")
        assert text == wanted[0], "another text than the solo run's"

    async def formed(self, body, wanted, chance):
        """A grammar on the logits: the text is JSON of the schema, and the same for the same seed."""
        body |= {"response_format": FORMAT, "max_tokens": 200, "temperature": 1, "seed": chance.randint(0, 3)}
        text = await self.again(body)
        assert set(json.loads(text)) == {"name", "old"}, "no JSON of the schema"

    async def drawn(self, body, wanted, chance):
        """Sampling with all that a request may ask of it: the same for the same seed."""
        more = {"top_p": 0.9, "top_k": 50, "repetition_penalty": 1.2, "frequency_penalty": 0.3, "logit_bias": {"9": 1}}
        await self.again(body | more | {"temperature": 0.9, "seed": chance.randint(0, 3)})

    async def again(self, body):
        """The text of an answer, which must be the one that the same request got before."""
        answer = await self.http.post("/v1/chat/completions", json=body)
        assert answer.status_code == 200, answer.text[:200]
        text = answer.json()["choices"][0]["message"]["content"]
        assert self.seen.setdefault(json.dumps(body, sort_keys=True), text) == text, "another text than before"
        return text

    async def leave(self, body, wanted, chance):
        body |= {"stream": True, "max_tokens": 500}
        async with self.http.stream("POST", "/v1/chat/completions", json=body) as answer:
            assert answer.status_code == 200, answer.status_code
            lines = answer.aiter_lines()
            for _ in range(chance.randint(0, 5)):
                await anext(lines, None)

    async def wrong(self, body, wanted, chance):
        status, change = chance.choice(WRONG)
        content = change if isinstance(change, bytes) else json.dumps(body | change).encode()
        answer = await self.http.post("/v1/chat/completions", content=content, headers=JSON)
        assert answer.status_code == status and "error" in answer.json(), f"{answer.status_code} for {change!r:.60}"


def resident_bytes(pid):
    """The process's memory; from /proc where there is one, else from ps."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except FileNotFoundError:
        return int(subprocess.check_output(["ps", "-o", "rss=", "-p", str(pid)])) * 1024


async def watch(pid, samples):
    while True:
        samples.append(resident_bytes(pid))
        await asyncio.sleep(0.5)


async def attack(address, pid, wanted, clients, seconds, requests):
    limits = httpx.Limits(max_connections=clients * 2, max_keepalive_connections=clients)
    async with httpx.AsyncClient(base_url=address, timeout=120, limits=limits) as http:
        crowd, samples = Clients(http, wanted, seconds, requests), []
        watching = asyncio.ensure_future(watch(pid, samples))
        await asyncio.gather(*(crowd.one(i) for i in range(clients)))
        watching.cancel()
        for _ in range(100):
            metrics = (await http.get("/metrics")).text
            values = dict(line.rsplit(" ", 1) for line in metrics.splitlines() if line[0] != "#")
            if values["mlx_adapters_running"] == values["mlx_adapters_queue_length"] == "0":
                break
            await asyncio.sleep(0.1)
        else:
            crowd.failures.append("the server still has rows after everybody left")
        health = (await http.get("/health")).status_code
    return crowd, samples, values, health


def report(crowd, samples, values, health, options):
    quarter = max(len(samples) // 4, 1)
    middle, last = (sum(s) / len(s) for s in (samples[quarter : 2 * quarter] or samples, samples[-quarter:]))
    latencies = sorted(crowd.latencies)
    answered = len(latencies)
    print(f"{options.clients} clients: " + ", ".join(f"{n} {k}" for k, n in crowd.counts.items()))
    print(
        f"{answered} full answers; latency median {latencies[answered // 2]:.2f} s, "
        f"99% {latencies[answered * 99 // 100]:.2f} s"
    )
    known = sum(float(v) for k, v in values.items() if k.startswith("mlx_adapters_cached_tokens_total"))
    given = sum(float(v) for k, v in values.items() if k.startswith("mlx_adapters_prompt_tokens_total"))
    kept = float(values["mlx_adapters_prompt_cache_bytes"])
    print(f"prompt tokens that were known: {known / given:.0%}; kept at the end: {kept / 1e6:.2f} MB")
    evictions = sum(float(v) for k, v in values.items() if "evictions_total{" in k)
    print(f"adapters put out and brought back: {evictions:.0f}")
    print(f"server memory: second quarter {middle / 1e6:.0f} MB, last quarter {last / 1e6:.0f} MB")
    print(f"MLX's part: {float(values['mlx_adapters_memory_active_bytes']) / 1e6:.1f} MB")
    print(f"failures: {len(crowd.failures)}")
    for failure in collections.Counter(crowd.failures).most_common(10):
        print("  ", failure)
    flat = last < middle * 1.05 + 5e6
    return 0 if flat and health == 200 and not crowd.failures and answered else 1


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--requests", type=int, help="end after so many")
    parser.add_argument("serve", nargs="*", metavar="OPTION", help="of `serve`, after --")
    options = parser.parse_args()
    options.seconds = options.seconds or (120 if options.requests is None else 3600)
    options.requests = options.requests or 10**9
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MLX_ADAPTERS_HOME"] = folder + "/home"
        wanted = build(Path(folder))
        limits = ("--max-adapters", 4, "--max-batch", 16, "--max-queue", options.clients * 2, "--prompt-cache-mb", 2)
        with Served(folder + "/model", *limits, *options.serve, adapters=ADAPTERS) as server:
            how_much = options.clients, options.seconds, options.requests
            outcome = asyncio.run(attack(server.address, server.process.pid, wanted, *how_much))
    said = [line for line in server.said.splitlines() if not line.startswith(("curl ", "Error: Interrupted."))]
    if said:
        print("the server said:", "\n".join(said)[:3000])
    sys.exit(report(*outcome, options))


if __name__ == "__main__":
    main()
