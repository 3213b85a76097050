"""Make the notebooks out of their scripts: `./scripts/notebooks [NAME...]`.

`notebooks/NAME.py` is the source, cells begin with `# %%`; `notebooks/NAME.ipynb` is
what people read, with the outputs of one run from top to bottom: in an empty folder,
with a home that holds the base `demo` alone, and a stand-in for the Hub. A notebook
that fails, or prints a path of this machine, is not written.
"""

import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
LOCAL_PATH = re.compile(r"(?:/(?:home|Users|root|tmp|private|var)/[\w.-]+)")


def cells(source: str) -> list:
    """The cells of a script: `# %%` begins code, `# %% [markdown]` text in comments."""
    cells_read = []
    for number, part in enumerate(re.split(r"^# %%", source, flags=re.M)[1:]):
        head, _, body = part.partition("\n")
        if "[markdown]" in head:
            lines = body.strip().splitlines()
            text = [line.removeprefix("#").removeprefix(" ") for line in lines]
            cell = nbformat.v4.new_markdown_cell("\n".join(text))
        else:
            code = body.strip()
            cell = nbformat.v4.new_code_cell(code)
        cell["id"] = f"cell-{number}"
        cells_read.append(cell)
    return cells_read


def tidy(notebook: nbformat.NotebookNode) -> None:
    """Take out what differs from run to run and says nothing: times, stderr."""
    for cell in notebook.cells:
        cell.metadata.clear()
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook.metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}


def texts(notebook: nbformat.NotebookNode) -> Iterator[str]:
    """Every line of text in the outputs; pictures have none."""
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            data = output.get("data", {}).items()
            shown = [text for kind, text in data if kind.startswith("text/")]
            yield from "\n".join([output.get("text", ""), *shown]).splitlines()


def run(name: str) -> float:
    """Execute one notebook in an empty folder and write it; seconds it took."""
    notebook = nbformat.v4.new_notebook(cells=cells((HERE / f"{name}.py").read_text()))
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        where = {"metadata": {"path": folder}}
        NotebookClient(
            notebook,
            timeout=900,
            kernel_name="python3",
            resources=where,
            coalesce_streams=True,
        ).execute()
    seconds = time.perf_counter() - start
    tidy(notebook)
    if leaks := sorted({line for line in texts(notebook) if LOCAL_PATH.search(line)}):
        sys.exit("\n".join([f"{name} prints paths of this machine:", *leaks]))
    nbformat.write(notebook, HERE / f"{name}.ipynb")
    return seconds


def main() -> None:
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    from helpers.hub_server import WRITE_TOKEN, HubServer

    from mlx_adapters.sources.demo_base import demo_base_folder

    base = demo_base_folder()
    names = sys.argv[1:] or sorted(path.stem for path in HERE.glob("[0-9]*.py"))
    with HubServer() as hub:
        for name in names:
            with tempfile.TemporaryDirectory() as home:
                (Path(home) / "bases").mkdir()
                (Path(home) / "bases" / base.name).symlink_to(base)
                os.environ |= {
                    "PYTHONPATH": str(ROOT),
                    "MLX_ADAPTERS_HOME": home,
                    "HF_HOME": f"{home}/hf",
                    "HF_ENDPOINT": hub.url,
                    "HF_TOKEN": WRITE_TOKEN,
                    "HF_HUB_DISABLE_XET": "1",
                }
                print(f"{name}: {run(name):.0f} s", flush=True)


if __name__ == "__main__":
    main()
