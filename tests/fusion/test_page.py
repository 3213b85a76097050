"""The page of a fuse: what was lost, where the bits are, each layer."""

import re
from dataclasses import replace

import pytest
from click.testing import CliRunner
from helpers.fusing import fuse, visible_adapter

from mlx_adapters.calibration.fidelity import Fidelity
from mlx_adapters.cli import cli
from mlx_adapters.config.fusing import FuseOptions
from mlx_adapters.config.quantization import Quantization
from mlx_adapters.display.layout import Dot
from mlx_adapters.fusion import result as results
from mlx_adapters.sources.registry import register

CHECKED = Fidelity(3, 90, 0.0013, 0.0004, 0.02, 0.98, 0.5, 0.52, 2.5, 2.73, 0.4)


@pytest.fixture(scope="module")
def tiny(tiny_model):
    return tiny_model("llama")


def test_the_bits_are_told_to_the_last_one(tiny, tmp_path):
    """Groups of 64 take half a bit for a scale and an offset of 16 bits; a whole of float32 has no groups."""
    made = fuse(tiny, visible_adapter(tiny), tmp_path / "four", quantization=Quantization(4), dtype="float16")
    parts = results.bits_by_part(made)
    assert sum(parts.values()) == pytest.approx(made.bits_per_weight)
    assert parts["weights"] / parts["scales"] == pytest.approx(8) and 0 < parts["not quantized"] < 0.5
    text = results.html(made)
    assert "Larger groups (--group-size) take fewer" in text
    largest = replace(made, quantization=made.quantization | {"group_size": 128})
    assert "scales and offsets: a pair for each group of weights; " in results.html(largest)
    assert (
        f"{parts['scales']:.2f} of them are scales and offsets" in text and "Asked for: 4 bits in groups of 64" in text
    )
    assert "What fusing lost was not measured." in text and text.count("<svg") >= 1
    for layer in made.survival:
        assert re.search(rf"<td>{re.escape(layer.path)}</td><td>4</td>", text)
    for own, said in (
        ({}, "scales: a scale for each group of weights; "),
        (
            {"lm_head": {"bits": 8, "group_size": 64}},
            "a scale for each group of weights, with an offset in affine layers; ",
        ),
    ):
        page = results.html(replace(made, quantization=made.quantization | {"mode": "mxfp4"} | own))
        assert said in page and "--group-size" not in page
    whole = fuse(tiny, visible_adapter(tiny), tmp_path / "whole", quantization="none")
    assert results.bits_by_part(whole) == {} and "Asked for" not in results.html(whole)


def test_layers_of_other_precisions_are_counted(tiny, tmp_path):
    made = fuse(
        tiny,
        visible_adapter(tiny),
        tmp_path / "mixed",
        quantization="keep",
        options=FuseOptions(method="nearest", check=False, recipe="mixed_4_6"),
    )
    text, high = results.html(made), [v for v in made.quantization.values() if isinstance(v, dict) and v["bits"] == 6]
    assert f"{len(high)} layer" in text and "at 6 bits in groups of 64" in text
    assert {"4", "6"} <= set(re.findall(r"</td><td>(\d)</td><td>[\d.]+%", text))


def test_the_chart_stands_the_fused_model_between_adapter_and_base():
    dots = [
        mark.center
        for mark in results.distance_charts(CHECKED)["Distance from the adapter"].marks
        if isinstance(mark, Dot)
    ]
    (adapter, fused, base) = dots
    assert adapter[0] < fused[0] < base[0] and adapter[1] < fused[1] < base[1]
    alone = Fidelity(3, 90, 0.0, 0.0, 0.0, 1.0, 0.5, 0.5)
    (chart,) = results.distance_charts(alone).values()
    assert len([m for m in chart.marks if isinstance(m, Dot)]) == 2
    lost = Fidelity(3, 90, float("nan"), 0.0, 0.0, 1.0, 0.5, float("inf"))
    assert results.distance_charts(lost) == results.distance_charts(None) == {}


def test_the_command_writes_the_page_of_a_fuse_and_of_a_check(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    register(visible_adapter(tiny), "sql")
    run = ["fuse", "sql", "out", "--base", str(tiny), "--bits", "8", "--check-rows", "2", "--html"]
    shown = CliRunner().invoke(cli, [*run, "made.html"], catch_exceptions=False)
    assert shown.exit_code == 0, shown.output
    made = (tmp_path / "made.html").read_text()
    verdict = re.search("<h1>(.*)</h1>", made)[1]
    assert verdict.startswith("Answers ") and verdict in shown.stdout and "<h2>The check</h2>" in made
    checked = CliRunner().invoke(
        cli, ["fuse", "--check-only", "out", "--adapter", "sql", "--check-rows", "2", "--html", "checked.html"]
    )
    assert checked.exit_code == 0, checked.output
    page = (tmp_path / "checked.html").read_text()
    assert re.search("<h1>(.*)</h1>", page)[1].startswith("Answers ") and "changed layer" in page
    inside = CliRunner().invoke(cli, [*run, "out/report.html", "--overwrite"])
    assert inside.exit_code == 2 and "beside the model" in inside.stderr
    assert not (tmp_path / "out" / "report.html").exists()
