"""Results as tables: frames, HTML, records and rows by name."""

import pandas
import pytest
from helpers.benchmarks import measure_here
from helpers.training_tools import write_data

import mlx_adapters as ma
from mlx_adapters.display.notebook import sparkline
from mlx_adapters.display.tables import Rows, flat, named
from mlx_adapters.errors import ConfigError

SETTINGS = ma.TrainConfig(iterations=4, batch_size=2, eval_every=2, save_every=2, report_every=2)


@pytest.fixture(scope="module")
def results(tiny_model, tmp_path_factory):
    """One result of each function that gives one, of a run on a tiny model."""
    place = tmp_path_factory.mktemp("tables")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLX_ADAPTERS_HOME", str(place / "home"))
        measure_here(patch)
        base, data = tiny_model("llama"), write_data(place / "data", rows=8, valid=4)
        run = ma.train(base, data, name="sql", lora=ma.LoraConfig(rank=2), training=SETTINGS)
        options = ma.FuseOptions(method="nearest", check=False)
        yield {
            "run": run,
            "list": ma.list_adapters(),
            "describe": ma.describe(run),
            "verify": ma.verify(run.best),
            "verify_all": ma.verify_all(),
            "compare": ma.compare(run.best, "sql@2"),
            "fuse": ma.fuse(base, run, place / "fused", quantization="none", options=options),
            "evaluate": ma.evaluate(["base", run], data),
            "estimate": ma.estimate(base, data, timed=False),
            "check_data": ma.check_data(data, base),
            "estimate_inference": ma.estimate_inference(base, bits=[8]),
            "benchmark": ma.benchmark(["base", run], prompt_tokens=4, decode_tokens=2, rounds=1, trials=1),
        }


ROWS = {
    "run": (["iteration", "train_loss", "validation_loss"], 3),
    "list": (["name", "base", "best_validation_loss"], 1),
    "describe": (["key"], None),
    "verify": (["what", "sound"], None),
    "compare": (["key", "cosine"], None),
    "fuse": ([], None),
    "evaluate": (["variant", "loss", "loss.error", "perplexity"], 2),
    "estimate": (["peak_bytes", "fits"], 1),
    "check_data": (["split", "rows", "trained_tokens"], 2),
    "estimate_inference": ([], None),
    "benchmark": (["label", "decode_tps", "prompt_tokens"], 2),
}


@pytest.mark.parametrize("name", ROWS)
def test_every_result_is_a_frame_and_a_table(name, results):
    columns, rows = ROWS[name]
    frame = results[name].to_pandas()
    assert isinstance(frame, pandas.DataFrame) and len(frame) and set(columns) <= set(frame.columns)
    assert rows is None or len(frame) == rows
    assert "<table>" in results[name]._repr_html_()


def test_every_result_reads_in_a_line(results):
    """Plain values in a few words: no NumPy's, no paths of pathlib, and of long lists how many."""
    shown = {name: repr(result) for name, result in results.items()}
    assert not [text for text in shown.values() if "np." in text or "Path(" in text or len(text) > 400], shown
    assert shown["describe"].startswith("Details(name='sql', folder='sql', type='lora', rank=2, scale=20, ")
    assert "layers=<14>" in shown["describe"] and repr(results["run"].best).startswith("Reference('sql@")
    assert "np." not in repr(results["evaluate"].evaluations)


def test_rows_are_found_by_name(results):
    assert results["evaluate"]["sql"].loss == results["evaluate"].evaluations[1].loss
    assert results["benchmark"]["base"].label == "base"
    assert results["list"]["sql"].name == "sql" and results["list"][0] is results["list"]["sql"]
    assert results["verify_all"]["sql"].sound and isinstance(results["verify_all"][:1], list)
    with pytest.raises(ConfigError, match="There is no 'sq' in it") as caught:
        results["evaluate"]["sq"]
    assert "sql" in caught.value.hint


def test_a_figure_stands_under_its_name_and_its_spread_beside_it():
    assert flat({"loss": {"value": 1.0, "error": 0.1}, "curve": [(1, 2)], "tags": ["a"]}) == {
        "loss": 1.0,
        "loss.error": 0.1,
        "tags": ["a"],
    }
    with pytest.raises(ConfigError, match="There is no 'x'"):
        named(Rows[object](), "x", "name")


def test_without_pandas_it_says_so(results, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pandas", None)
    with pytest.raises(ConfigError, match="pandas is not installed"):
        results["run"].to_pandas()


def test_a_sparkline():
    assert sparkline([3.0, 2.0, 1.0, 1.0]) == "█▅▁▁" and sparkline([1.0]) == "" and sparkline([2.0, 2.0]) == "▁▁"
