"""Every `--json` document: one object with the schema's version and the fields that docs/json.md names."""

import json
import re

import pytest
from click.testing import CliRunner
from helpers.adapters import make_run
from helpers.public import DOCUMENT, LEAVES, WITHOUT_JSON, command_of, documented

from mlx_adapters.benchmarking import run as benchmarking
from mlx_adapters.benchmarking import worker
from mlx_adapters.cli import _output, cli
from mlx_adapters.demo import products
from mlx_adapters.demo.catalog import write_demo_data
from mlx_adapters.evaluation.variants import Variant
from mlx_adapters.sources import registry

pytest_plugins = ["helpers.hub_fixtures"]

LINES = """\
demo --data-only rows
doctor --base base --data data
data check data --base base
data split data/train.jsonl halves
models
estimate base
estimate base --data data
train base --data data --name new --iterations 1 --batch-size 1 --dry-run
train base --data data --name new --iterations 1 --batch-size 1
list
show sql
compare sql@100 sql@200
verify sql
rename new newer
tag sql good
use sql@200
prune sql --keep-best --yes
pack sql sql.tar.gz
add sql.tar.gz --name copy
remove newer --yes
init project
generate Hello --adapter sql --max-tokens 2
ab questions.txt sql copy --max-tokens 2
fuse sql full --bits none
fuse --check-only full --adapter sql --calibration data --check-rows 12
merge sql copy --name both
scale sql 0.5 --name half
subtract both half --name rest
interpolate sql copy --steps 2 --data data
extract full base --rank 2 --name extracted
benchmark base sql --prompt-tokens 4 --decode-tokens 2 --rounds 2 --trials 1 -o report.json
advise sql --report report.json
eval sql --data data --max-rows 2
card sql
publish sql user/sql --dry-run
publish sql user/sql
download user/sql --name down
export-peft sql peft
import-peft peft --base base --name back
env
env --check
"""


@pytest.fixture
def place(tiny_model, base, hub, tmp_path, monkeypatch):
    """A folder with a base, data, questions and the adapter `sql`; measuring happens in this process."""
    monkeypatch.chdir(tmp_path)
    for path in write_demo_data(tmp_path / "data").glob("*.jsonl"):
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:20]))
    (tmp_path / "questions.txt").write_text("List the Physics courses.\n")
    make_run(base, "sql", losses=[(100, 2.0), (200, 1.0)])

    def run_here(variant: Variant, config, own, *_):
        return worker.run_job(variant, config, own) | {"process_seconds": 1.0}

    monkeypatch.setattr(benchmarking, "run_worker", run_here)
    monkeypatch.setattr(products, "PRECISIONS", products.PRECISIONS[:1])  # of `env --check`: seconds for each
    return tmp_path


def test_the_lines_are_all_commands_with_json():
    tested = {f"mlx-adapters {command_of(line)}" for line in LINES.splitlines()}
    assert tested == set(LEAVES) - WITHOUT_JSON
    assert f'"schema": "{_output.SCHEMA}"' in DOCUMENT


@pytest.mark.parametrize(
    "line",
    [
        "verify sql",
        "eval ./none --data data --base base",
        "benchmark ./none --base base --rounds 1",
        "card sql --write",
    ],
)
def test_a_document_beside_a_failure(place, line, monkeypatch):
    """The commands of which docs/json.md says that a document comes with status 1 too, with the same fields."""
    failing = not line.startswith("card")
    if line.startswith("verify"):
        (registry.adapter_folder("sql") / "adapters.safetensors").write_bytes(b"damaged")
    monkeypatch.setattr(benchmarking, "run_worker", lambda *_: {"error": "It does not load."})
    result = CliRunner().invoke(cli, [*line.split(), "--json"])
    assert result.exit_code == failing, result.output
    fields = json.loads(result.stdout).keys() - {"schema"}
    assert fields == (documented(line) if failing else {"path"})
    named = re.search(r"a check failed\n\((.*?)\) or one of several variants did \((.*?)\)", DOCUMENT)
    assert f"`{line.split()[0]}`" in (" ".join(named.groups()) if failing else "`card`")


def test_every_document_is_as_documented(place):
    for line in LINES.splitlines():
        result = CliRunner().invoke(cli, [*line.split(), "--json"])
        error = getattr(result.exception, "message", result.exception)
        assert result.exit_code == 0, f"{line}\n{result.output}\n{error}"
        document = json.loads(result.stdout)
        assert next(iter(document.items())) == ("schema", _output.SCHEMA)
        assert document.keys() - {"schema"} == documented(line), line
