"""The server's page in a real browser, with a real model: each column must show what its adapter writes.

Needs Chromium or Chrome. Builds a tiny model with two adapters, serves it on loopback, asks through the page without
a window and holds the answers against the solo runs: whole, after a new conversation in the middle of an answer, and
after a restart of the browser's page. Ends with status 1 if they differ, or if the browser complained.

    python scripts/check_page.py [--pictures FOLDER]
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from helpers.browser import BROWSER, Page  # noqa: E402
from helpers.serving import Served  # noqa: E402

QUESTION, TOKENS = "List all students.", 48
SHOWN = "[...document.querySelectorAll('.text')].map(found => found.textContent.trim())"
CHOOSE = f"""(() => {{
    const most = document.getElementById("max_tokens"), cold = document.getElementById("temperature");
    most.value = {TOKENS}, cold.value = 0;
    for (const field of [most, cold]) field.dispatchEvent(new Event("input"));
    document.querySelectorAll(".pane select").forEach((select, number) => {{
        select.value = ["one", "two"][number];
        select.dispatchEvent(new Event("change"));
    }});
}})()"""


def build(folder):
    """Write the model, register two adapters, give what each answers."""
    from helpers.adapters import random_adapter
    from helpers.tiny_models import build_model

    from mlx_adapters.generation.live import load_model
    from mlx_adapters.sources.registry import register

    model, wanted = load_model(build_model(folder / "model", "llama")), []
    for i, name in enumerate(("one", "two")):
        model.attach(register(random_adapter(model, seed=i + 1), name))
        wanted.append(model.generate(QUESTION, max_tokens=TOKENS).text)
    return wanted


def ask(page):
    page.evaluate("document.getElementById('text').focus()")
    page.write(QUESTION)
    page.press("Enter")


def answers(page):
    """What the columns show when all is written."""
    page.until("!document.body.classList.contains('running')", 60)
    return page.evaluate(SHOWN)


def pictures(page, folder, what):
    folder.mkdir(parents=True, exist_ok=True)
    for width in (390, 1200):
        for dark in (False, True):
            page.look(width, 800, dark)
            page.picture(folder / f"{what}-{width}-{'dark' if dark else 'light'}.png")


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pictures", type=Path, help="write what is seen here, narrow and wide, light and dark")
    options = parser.parse_args()
    if BROWSER is None:
        sys.exit("There is no Chromium or Chrome on this machine.")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MLX_ADAPTERS_HOME"] = folder + "/home"
        wanted = build(Path(folder))
        with Served(folder + "/model", adapters=("one", "two")) as server, Page(server.address + "/") as page:
            page.until("document.querySelectorAll('.pane').length === 2")
            page.evaluate(CHOOSE)
            if options.pictures:
                pictures(page, options.pictures, "welcome")
                page.look(1200, 800, False)
            ask(page)
            shown = [answers(page)]
            ask(page)
            page.until("document.querySelectorAll('.turn').length === 2")
            page.evaluate("document.getElementById('new').click()")
            ask(page)
            shown.append(answers(page))
            page.open(server.address + "/#again")
            page.evaluate("document.querySelector('#history button').click()")
            shown.append(page.evaluate(SHOWN))
            if options.pictures:
                pictures(page, options.pictures, "answers")
            complaints = page.complaints
    plain = lambda text: "".join(text.split())  # noqa: E731  (Markdown makes other space of it)
    good = all([plain(one) for one in texts] == [plain(one) for one in wanted] for texts in shown) and not complaints
    print(
        "the page shows both answers" if good else f"the page shows {shown}\nwanted {wanted}\ncomplaints {complaints}"
    )
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
