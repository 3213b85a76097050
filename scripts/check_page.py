"""The server's page in a real browser: both panes must show what their adapters write.

Needs Chromium or Chrome. Builds a tiny model with two adapters, serves it on loopback, opens the page without a
window and holds the two answers against the solo runs. Ends with status 1 if they differ.

    python scripts/check_page.py
"""

import html
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
QUESTION = "List all students."


def build(folder):
    """Write the model, register two adapters, give what each answers."""
    from test_runtime import random_adapter
    from tiny_models import build_model

    from mlx_adapters.registry import register
    from mlx_adapters.runtime.live import load_model

    model, wanted = load_model(build_model(folder / "model", "llama")), {}
    for i, name in enumerate(("one", "two")):
        model.attach(register(random_adapter(model, seed=i + 1), name))
        wanted[name] = model.generate(QUESTION, max_tokens=256).text
    return wanted


def browse(browser, address):
    """The page's DOM after both panes have answered."""
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--timeout=15000", "--dump-dom"]
    with tempfile.TemporaryDirectory() as profile:
        command += [f"--user-data-dir={profile}", f"{address}/#ask={QUESTION.replace(' ', '%20')}"]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def plain(text):
    """Text as the page shows it: carriage returns and control characters do not survive HTML."""
    return re.sub(r"[^\x20-\x7e]+", "", html.unescape(text))


def main():
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        sys.exit("There is no Chromium or Chrome on this machine.")
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"MLX_ADAPTERS_HOME": folder + "/home", "PYTHONPATH": str(ROOT)}
        wanted = build(Path(folder))
        command = [sys.executable, "-m", "mlx_adapters", "serve", folder + "/model", "--name", "base", "--port", "0",
                   "--adapter", "one", "--adapter", "two"]  # fmt: skip
        server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        try:
            address = next(line.split()[2] for line in server.stderr if line.startswith("Listening"))
            page = browse(browser, address)
        finally:
            server.terminate()
            server.communicate(timeout=60)
    shown = [plain(text) for text in re.findall(r'<p class="assistant">(.*?)</p>', page, re.DOTALL)]
    good = shown == [plain(wanted["one"]), plain(wanted["two"])]
    print("the page shows both answers" if good else f"the page shows {shown}\nwanted {wanted}")
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
