"""A report as a page: what it says first, what it draws, and that it needs nothing else."""

import dataclasses
import re
import struct
import zlib
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
from helpers.benchmarks import SIZES, fused_report, synthetic
from helpers.browser import BROWSER
from helpers.browser import Page as Browser

from mlx_adapters.benchmarking import page, words
from mlx_adapters.benchmarking.measurements import Run
from mlx_adapters.display import png, svg
from mlx_adapters.display.layout import Dot, Label

TABLES = "[...document.querySelectorAll('section > .wide')]"


class Page(HTMLParser):
    """Collects what a browser would fetch, and checks that the tags nest."""

    VOID = frozenset(("meta", "br", "circle", "rect", "path"))

    def __init__(self):
        super().__init__()
        self.open, self.links, self.tags = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "data", "srcset", "action")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


QUALITY = {
    "data": {"source": "data", "split": "test", "rows": 3},
    "score": "exact",
    "reference": "base",
    "evaluations": [
        {
            "variant": name,
            "loss": {"value": 0.3, "error": 0.1},
            "kl": {"value": 0.1, "error": None},
            "same_top": None,
            "score": {"value": score, "error": 0.05},
            "error": None,
        }
        for name, score in (("base", 0.2), ("<slow & odd>", 0.7))
    ],
}


def test_page_is_self_contained_and_well_formed():
    report = dataclasses.replace(synthetic({"base": 100.0, "<slow & odd>": 90.0}), quality=QUALITY)
    text_ = page.html(report)
    parser = Page()
    parser.feed(text_)
    assert not parser.open and not parser.links and "script" not in parser.tags
    assert "url(" not in text_ and "@import" not in text_ and len(text_) < 100_000
    assert "<slow & odd>" not in text_ and "&lt;slow &amp; odd&gt;" in text_
    assert parser.tags.count("svg") == len(page.overview(report) | page.details(report)) == 7


def test_pictures_are_xml_and_inside_their_frame():
    report = dataclasses.replace(synthetic({"base": 100.0, "slow": 90.0, "x/" * 60: 3.0}), quality=QUALITY)
    for title, chart in (page.overview(report) | page.details(report)).items():
        root = ElementTree.fromstring(svg.picture(chart))
        width, height = map(float, root.attrib["viewBox"].split()[2:])
        for element in root.iter():
            for name, limit in (("x", width), ("cx", width), ("y", height), ("cy", height)):
                assert 0 <= float(element.attrib.get(name, 0)) <= limit, (title, ElementTree.tostring(element))


def test_a_png_shows_what_the_svg_has():
    pictures = page.details(synthetic({"base": 100.0, "slow": 90.0}))
    pixels = pixels_of(png.picture(pictures["Memory by part"]))
    for bar in ElementTree.fromstring(svg.picture(pictures["Memory by part"])).iter("{http://www.w3.org/2000/svg}rect"):
        color, x, y, width = (bar.attrib[name] for name in ("fill", "x", "y", "width"))
        rgb, share = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]), float(bar.attrib["fill-opacity"])
        if float(width) > 2:
            shown = pixels[round(2 * float(y)) + 8, round(2 * float(x)) + 2]
            assert np.abs(shown - (rgb * share + 255 * (1 - share))).max() < 45  # a grid line may lie below
    assert all(len(png.picture(picture)) > 1000 for picture in (pictures["Decode speed"], pictures["Against base"]))


def pixels_of(data: bytes) -> np.ndarray:
    """(height, width, 3) of a PNG file of ours, as floats."""
    width, height = struct.unpack(">II", data[16:24])
    start = data.index(b"IDAT") + 4
    lines = np.frombuffer(zlib.decompress(data[start:]), np.uint8).reshape(height, 1 + 3 * width)
    return lines[:, 1:].reshape(height, width, 3).astype(float)


def test_pages_of_failures_have_no_pictures():
    failed = dataclasses.replace(synthetic({"base": 1.0}), runs=(Run("base", 0, {"error": "no such model"}),))
    assert page.overview(failed) == page.details(failed) == {} and "no such model" in page.html(failed)


# -- the verdict and the one chart ---------------------------------------------------------------------


def test_the_verdict_names_the_smallest_model_that_keeps_the_fine_tune():
    """f4 is smaller, but undid a tenth of the fine-tune; then nothing of it, then both too much."""
    assert words.verdict(fused_report((300, 220, 280, 300))) == (
        "f8 keeps the fine-tune: KL 0.002 (base 2); 600 MB against 356 MB, and decodes 1.3 times as fast."
    )
    small = words.verdict(fused_report((300, 300, 300, 300), kl=(2.0, 0.0, 0.002, 0.003)))
    assert small == (
        "f4 keeps the fine-tune: KL 0.003 (base 2); 350 MB instead of 356 MB, "
        "and decodes as fast as far as 5 rounds can tell."
    )
    assert words.verdict(fused_report((300, 220, 280, 300), kl=(2.0, 0.0, 0.5, 0.2))) == (
        "No fused model keeps the fine-tune; f4 comes nearest: KL 0.2 (base 2)."
    )
    scored = words.verdict(fused_report((300, 220, 280, 300), scores=(0.0, 0.9, 0.925, 0.5)))
    assert scored.startswith("f8 keeps the fine-tune: 92.5% right (adapter 90.0%, base 0.0%); 600 MB")


def test_the_verdict_claims_no_more_than_was_measured():
    unjudged = dataclasses.replace(fused_report((300, 220, 280, 300)), quality={})
    assert words.verdict(unjudged).startswith("Quality was not measured (--quality DATA); f4: 350 MB instead of 356 MB")
    few = dataclasses.replace(unjudged, runs=tuple(run for run in unjudged.runs if run.round == 0))
    assert words.verdict(few).endswith(" tok/s.") and "times" not in words.verdict(few)
    assert words.verdict(synthetic({"a": 100.0}, noise=0)) == "a decodes 100 tok/s and takes 1 kB."
    assert words.verdict(synthetic({"a": 100.0, "b": 90.0}, noise=0)) == (
        "a decodes fastest (100 tok/s) and is the smallest (1 kB)."
    )
    noisy = fused_report((300, 300, 300, 300), kl=(2.0, 0.0, 0.002, 0.003), noise=0.6)
    assert words.verdict(noisy).endswith("too few or too noisy to tell which decodes faster.")
    failed = dataclasses.replace(unjudged, runs=(Run("base", 0, {"error": "gone"}),))
    assert words.verdict(failed) == "Nothing could be measured."
    assert [line[1] for line in words.table(failed)[1]] == ["failed", *["not run"] * (len(failed.labels) - 1)]


def test_a_verdict_of_scores_alone_or_losses_alone():
    """A report without KL is judged by scores; one of losses says which is lowest."""
    report = fused_report((300, 220, 280, 300), scores=(0.0, 0.9, 0.9, 0.5))
    by_score = [e | {"kl": None} for e in report.quality["evaluations"]]
    alone = dataclasses.replace(report, quality=report.quality | {"evaluations": by_score})
    assert words.verdict(alone).startswith(
        "f8 keeps the fine-tune by its score: 90.0% right (adapter 90.0%, base 0.0%)"
    )
    losses = [
        e | {"kl": None, "score": None, "loss": {"value": value, "error": 0.1}}
        for e, value in zip(by_score, (2.0, 0.5, 0.51, 0.7), strict=True)
    ]
    alone = dataclasses.replace(report, quality=report.quality | {"evaluations": losses})
    assert words.verdict(alone) == (
        "No fused model is known to keep the fine-tune; f8 comes nearest: loss 0.51 (adapter 0.5, base 2)."
    )


def test_without_the_base_only_scores_tell_whether_the_fine_tune_is_kept():
    """And they do not where the adapter's own is missing: 0 % right then kept the fine-tune."""

    def verdict(failed=(), **given):
        report = fused_report((300, 220, 280, 300), **given)
        judged = [
            e | ({"error": "no tokens", "kl": None, "score": None} if e["variant"] in failed else {})
            for e in report.quality["evaluations"]
            if e["variant"] != "base"
        ]
        variants = tuple(v for v in report.variants if v.label != "base")
        return words.verdict(
            dataclasses.replace(report, variants=variants, quality=report.quality | {"evaluations": judged})
        )

    assert verdict() == (
        "Whether a fused model keeps the fine-tune is not known without `base` among the variants; "
        "f8 comes nearest: KL 0.002."
    )
    assert verdict(scores=(0.0, 0.9, 0.9, 0.5)).startswith("f8 keeps the fine-tune by its score: 90.0% right")
    assert verdict(scores=(0.0, 0.9, 0.5, 0.7)) == (
        "No fused model keeps the fine-tune by its score; f4 comes nearest: 70.0% right (adapter 90.0%)."
    )
    for failed in (("sql",), ("sql", "f8")):
        said = verdict(failed, scores=(0.0, 0.9, 0.0, 0.0))
        assert said.startswith("No fused model is known to keep the fine-tune; f") and "0.0% right" in said


@pytest.mark.parametrize("judged", [True, False])
def test_the_page_opens_with_the_verdict_then_one_chart_then_the_figures(judged):
    report = fused_report((300, 220, 280, 300))
    report = report if judged else dataclasses.replace(report, quality={})
    text = page.html(report)
    first = text.index(f"<h1>{words.verdict(report)}</h1>")
    svgs = [match.start() for match in re.finditer("<svg", text)]
    figures, folded = text.index("<h2>Figures</h2>"), text.index("<details>")
    assert first < svgs[0] < figures < folded and sum(place < figures for place in svgs) == (2 if judged else 1)
    assert text.index("best 3 steps") > folded and not re.search(r"\(\d+-\d+\)", text[:folded])  # spread and method
    for chart in page.overview(report).values():
        assert [mark.text for mark in chart.marks if isinstance(mark, Label) and mark.text in SIZES] == list(SIZES)
        assert len([mark for mark in chart.marks if isinstance(mark, Dot)]) == len(SIZES)


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), 0.0, -1e-9, 1e-300])
def test_odd_figures_leave_a_page(odd):
    """A model that has fallen apart has no mark on the chart of quality, and all others theirs."""
    report = fused_report((300, 220, 280, 300), kl=(2.0, 0.0, 0.002, odd))
    texts = [m.text for m in page.overview(report)["Quality and size"].marks if isinstance(m, Label)]
    assert ("f4" in texts) == (abs(odd) < 1) and {"base", "sql", "f8"} <= set(texts)
    assert "<h1>" in page.html(report)


def test_a_variant_that_could_not_be_judged_is_told_and_has_no_mark():
    report = fused_report((300, 220, 280, 300))
    evaluations = [
        e | ({"error": "no tokens", "kl": None} if e["variant"] == "f4" else {}) for e in report.quality["evaluations"]
    ]
    report = dataclasses.replace(report, quality=report.quality | {"evaluations": evaluations})
    assert "&#x27;f4&#x27; failed: no tokens" in page.html(report)
    texts = [m.text for m in page.overview(report)["Quality and size"].marks if isinstance(m, Label)]
    assert "f8" in texts and "f4" not in texts


@pytest.mark.skipif(BROWSER is None, reason="Chromium or Chrome draws it")
def test_all_columns_are_seen_on_a_screen_and_the_names_stay_on_a_phone(tmp_path):
    report = fused_report(
        [14.5, 12.3, 11.8, 10.2], kl=(2.469, 0.0, 0.002469, 0.2469), scores=[0.0, 0.875, 0.863, 0.812]
    )
    evaluations = [e | {"loss": e["kl"], "same_top": e["score"]} for e in report.quality["evaluations"]]
    quality = report.quality | {"score": "accuracy", "evaluations": evaluations}
    (tmp_path / "page.html").write_text(page.html(dataclasses.replace(report, quality=quality)))
    with Browser((tmp_path / "page.html").as_uri()) as browser:
        browser.look(1200, 800)
        assert browser.evaluate(f"{TABLES}.every(one => one.scrollWidth <= one.clientWidth)")
        browser.look(390, 800)
        browser.evaluate(f"{TABLES}[0].scrollLeft = 1000")
        left = "document.querySelector('td').getBoundingClientRect().left"
        assert browser.evaluate("document.body.scrollWidth <= 390") and browser.evaluate(f"{left} > 0")
        assert browser.evaluate(f"{TABLES}[0].scrollLeft > 0")
