"""The server's page in a real browser: both panes must show what their adapters write, also after a Clear in the
middle of an answer.

Needs Chromium or Chrome. Builds a tiny model with two adapters, serves it on loopback, opens the page without a
window and holds the two answers against the solo runs. Ends with status 1 if they differ.

    python scripts/check_page.py
"""

import base64
import json
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from helpers.serving import Served  # noqa: E402

QUESTION = "List all students."
# What the panes show, and what they will send next time.
SHOWN = """[[...document.querySelectorAll('.log p')].map(p => p.textContent),
           panes.flatMap(pane => pane.messages.map(message => message.content))]"""
# What an impatient user does: asks, asks again at once (must wait), clears in the middle, asks anew.
IMPATIENT = f"""
const box = form.querySelector("textarea"), ask_now = () => {{ box.value = "{QUESTION}"; form.requestSubmit(); }};
ask_now(); ask_now();
setTimeout(() => {{ field("clear").click(); ask_now(); }}, 30);
"""


def build(folder):
    """Write the model, register two adapters, give what each answers."""
    from helpers.adapters import random_adapter
    from helpers.tiny_models import build_model

    from mlx_adapters.generation.live import load_model
    from mlx_adapters.sources.registry import register

    model, wanted = load_model(build_model(folder / "model", "llama")), {}
    for i, name in enumerate(("one", "two")):
        model.attach(register(random_adapter(model, seed=i + 1), name))
        wanted[name] = model.generate(QUESTION, max_tokens=256).text
    return wanted


class DevTools:
    """Just enough of Chrome's debugging protocol to evaluate expressions in the page."""

    def __init__(self, url):
        address, path = re.fullmatch(r"ws://([^/]+)(/.*)", url).groups()
        host, port = address.split(":")
        self.socket, self.number = socket.create_connection((host, int(port)), timeout=30), 0
        key = base64.b64encode(os.urandom(16)).decode()
        self.socket.sendall(
            f"GET {path} HTTP/1.1\r\nHost: {address}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        self.stream = self.socket.makefile("rb")
        while self.stream.readline().strip():
            pass

    def evaluate(self, expression):
        """The value of a JavaScript expression."""
        self.number += 1
        call = {
            "id": self.number,
            "method": "Runtime.evaluate",
            "params": {"expression": expression, "returnByValue": True},
        }
        data = json.dumps(call).encode()
        self.socket.sendall(struct.pack(">BBH4x", 0x81, 0x80 | 126, len(data)) + data)  # masked with zeros
        while True:
            answer = json.loads(self.read())
            if answer.get("id") == self.number:
                return answer["result"]["result"].get("value")

    def read(self):
        size = self.stream.read(2)[1] & 127
        if size >= 126:
            size = int.from_bytes(self.stream.read(2 if size == 126 else 8), "big")
        return self.stream.read(size)


def wait_for_answers(page):
    until = time.monotonic() + 60
    while time.monotonic() < until and page.evaluate("document.querySelectorAll('small:not(:empty)').length") != 2:
        time.sleep(0.2)


def browse(browser, address):
    """What the two panes show when both have answered, and when an impatient user has his answers."""
    url = f"{address}/#ask={QUESTION.replace(' ', '%20')}"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [
            browser,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--remote-debugging-port=0",
            f"--user-data-dir={profile}",
            url,
        ]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        try:
            listening = next(line for line in process.stderr if "DevTools listening" in line)
            port = re.search(r":(\d+)/", listening)[1]
            pages = json.load(urllib.request.urlopen(f"http://127.0.0.1:{port}/json"))
            page = DevTools(next(p["webSocketDebuggerUrl"] for p in pages if p["type"] == "page"))
            wait_for_answers(page)
            first = page.evaluate(SHOWN)
            page.evaluate("field('clear').click()")
            page.evaluate(IMPATIENT)
            wait_for_answers(page)
            time.sleep(1)  # an answer that was ended would be late
            return first, page.evaluate(SHOWN)
        finally:
            process.kill()
            process.communicate()


def main():
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        sys.exit("There is no Chromium or Chrome on this machine.")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MLX_ADAPTERS_HOME"] = folder + "/home"
        wanted = build(Path(folder))
        with Served(folder + "/model", adapters=("one", "two")) as server:
            shown = browse(browser, server.address)
    good = shown == ([[QUESTION, wanted["one"], QUESTION, wanted["two"]]] * 2,) * 2
    print("the page shows both answers, also after a Clear" if good else f"the page shows {shown}\nwanted {wanted}")
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
