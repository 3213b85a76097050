"""A page in Chromium or Chrome without a window, driven by its debugging protocol."""

import base64
import contextlib
import json
import os
import re
import shutil
import socket
import struct
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = "--headless --no-sandbox --disable-gpu --disable-extensions --no-first-run --hide-scrollbars"
KEYS = {"Enter": 13, "Escape": 27, "ArrowUp": 38}


class Page:
    """One page. `complaints`: what the browser logged of errors, refused loads and exceptions."""

    def __init__(self, url: str = "about:blank") -> None:
        self._profile = tempfile.mkdtemp()
        more = ["--remote-debugging-port=0", f"--user-data-dir={self._profile}", "about:blank"]
        self._process = subprocess.Popen([str(BROWSER), *FLAGS.split(), *more], stderr=subprocess.PIPE, text=True)
        assert self._process.stderr is not None
        port = next(m[1] for line in self._process.stderr if (m := re.search(r"DevTools listening.*:(\d+)/", line)))
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json") as answer:
            target = next(one for one in json.load(answer) if one["type"] == "page")
        self._connect(target["webSocketDebuggerUrl"])
        self._number = 0
        self.complaints: list[str] = []
        for domain in ("Page", "Log", "Runtime"):
            self.call(f"{domain}.enable")
        if url != "about:blank":
            self.open(url)

    def __enter__(self) -> "Page":
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
        self._stream.close()
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        self._process.kill()
        self._process.communicate()
        shutil.rmtree(self._profile, ignore_errors=True)

    def open(self, url: str) -> None:
        """Go there, and wait until it is loaded."""
        if url != "about:blank":
            self.call("Page.navigate", url="about:blank")  # else only the fragment would change
        self.call("Page.navigate", url=url)
        self.until(f"location.href === {json.dumps(url)} && document.readyState === 'complete'")

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression, of a promise what it comes to. Raises AssertionError if it throws."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def until(self, expression: str, seconds: float = 30.0) -> None:
        """Wait until it is true. Raises AssertionError if it does not become so."""
        end = time.monotonic() + seconds
        while not self.evaluate(expression):
            assert time.monotonic() < end, f"never true: {expression}; {self.complaints}"
            time.sleep(0.02)

    def press(self, key: str, **more: Any) -> None:
        """A key goes down and up."""
        text = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            told = {"key": key, "code": key, "windowsVirtualKeyCode": KEYS[key], **more}
            self.call("Input.dispatchKeyEvent", type=kind, **told, **(text if kind == "keyDown" else {}))

    def write(self, text: str) -> None:
        """Text goes where the focus is, as if pasted."""
        self.call("Input.insertText", text=text)

    def look(self, width: int, height: int, dark: bool = False) -> None:
        """Set the window's size and the color scheme; up to 600 pixels it is a phone."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width <= 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def picture(self, path: Path) -> None:
        """Write what is seen as PNG."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """A call of the protocol."""
        self._number += 1
        data = json.dumps({"id": self._number, "method": method, "params": params}).encode()
        size = struct.pack(">BBH", 0x81, 0xFE, len(data)) if len(data) < 1 << 16 else None
        self._socket.sendall((size or struct.pack(">BBQ", 0x81, 0xFF, len(data))) + bytes(4) + data)  # masked by zeros
        while True:
            told = json.loads(self._read())
            if told.get("id") == self._number:
                assert "error" not in told, told["error"]
                return told["result"]
            if told.get("method") == "Log.entryAdded" and told["params"]["entry"]["level"] == "error":
                self.complaints.append(told["params"]["entry"]["text"])
            if told.get("method") == "Runtime.exceptionThrown":
                details = told["params"]["exceptionDetails"]
                self.complaints.append(details.get("exception", {}).get("description", details["text"]))

    def _connect(self, url: str) -> None:
        parts = re.fullmatch(r"ws://([^/]+)(/.*)", url)
        assert parts is not None
        address, path = parts.groups()
        host, port = address.split(":")
        self._socket = socket.create_connection((host, int(port)), timeout=60)
        self._stream = self._socket.makefile("rb")
        key = base64.b64encode(os.urandom(16)).decode()
        self._socket.sendall(
            f"GET {path} HTTP/1.1\r\nHost: {address}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        while self._stream.readline().strip():
            pass

    def _read(self) -> bytes:
        size = self._stream.read(2)[1] & 127
        if size >= 126:
            size = int.from_bytes(self._stream.read(2 if size == 126 else 8), "big")
        return self._stream.read(size)
