"""Cards say what the metadata says and no more; nothing of this machine leaves it."""

import json
import re
import shutil
import xml.etree.ElementTree

import pytest
import yaml
from click.testing import CliRunner
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st

import mlx_adapters as ma
from mlx_adapters import errors, units
from mlx_adapters.cli import cli
from mlx_adapters.display import notebook
from mlx_adapters.publishing import card_sections, cards, cleaning
from mlx_adapters.publishing.uploads import make_card, write_card

pytest_plugins = ["helpers.hub_fixtures"]


def front(card) -> dict:
    """The YAML as huggingface_hub reads it."""
    return ModelCard(str(card)).data.to_dict()


def test_an_adapters_card(sql):
    card = make_card("sql", repo="user/sql-lora")
    assert front(card) == {
        "license": "apache-2.0",
        "language": ["en"],
        "library_name": "mlx",
        "pipeline_tag": "text-generation",
        "base_model": "user/tiny-llama",
        "base_model_relation": "adapter",
        "tags": ["mlx", "mlx-adapters", "lora"],
        "model-index": [
            {
                "name": "sql",
                "results": [
                    {
                        "task": {"type": "text-generation"},
                        "dataset": {"name": "sql", "type": "sql"},
                        "metrics": [{"type": "validation_loss", "name": "validation loss", "value": 1.25}],
                    }
                ],
            }
        ],
    }
    text = str(card)
    for said in (
        "rank 4, scale 2 (alpha 8), 2,560 parameters",
        "q_proj (2)",
        "up_proj (2)",
        "600",
        "learning rate | 0.0001",
        "Validation loss 1.25 at iteration 40",
        "mlx-adapters train tiny --data sql --name sql",
        "![Loss by iteration](loss.svg)",
        'adapter_path=snapshot_download("user/sql-lora")',
        "at most 512 tokens",
        "mlx_adapters 0.1.0 on 2026-01-02",
    ):
        assert said in text, said
    assert "joe" not in text and str(sql.folder.parent.parent) not in text


def test_a_checkpoints_card_gives_its_own_loss(sql):
    text = str(make_card("sql@20"))
    assert "Checkpoint of iteration 20" in text and "| validation loss | 1.8 |" in text
    assert "| validation loss | 1.25 |" not in text and front(make_card("sql@20"))["model-index"][0]["results"]


def test_nothing_is_invented(base, make_adapter, tmp_path):
    """An adapter of which nothing is known but its tensors gets a card without data, losses or evaluation."""
    adapter = make_adapter(base, "dora")
    folder = tmp_path / "bare"
    folder.mkdir()
    ma.write_adapter(ma.Adapter(adapter.config, adapter.weights), folder, overwrite=True)
    (folder / "adapter_metadata.json").unlink()
    card = make_card(folder)
    text = str(card)
    for heading in ("How it was made", "Evaluation", "What fusing", "Recipe"):
        assert f"## {heading}" not in text
    assert "A DoRA adapter" in text and "No evaluation is recorded" in text and "license is not recorded" in text
    assert {"license", "base_model", "datasets", "model-index"} & set(front(card)) == set()


def test_saved_evaluations_of_the_published_weights_are_shown(sql):
    path = sql.folder / "adapter_metadata.json"
    entry = {"data": "/home/joe/sql", "split": "test", "sha256": "0", "rows": 80, "score": "sqlite", "date": "2026"}
    saved = [
        entry | {"iteration": None, "metrics": {"loss": 0.5, "sqlite": 0.8125}, "errors": {"sqlite": 0.044}},
        entry | {"iteration": 20, "metrics": {"loss": 0.75}, "errors": {}},
    ]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"evaluations": saved}))
    text = str(make_card("sql"))
    assert "| sql (test, 80 rows) | sqlite | 0.8125 ± 0.044 |" in text and "0.75" not in text
    results = front(make_card("sql"))["model-index"][0]["results"]
    assert {"type": "sqlite", "name": "sqlite", "value": 0.8125} in results[1]["metrics"]
    assert "| loss | 0.75 |" in str(make_card("sql@20")) and "0.8125" not in str(make_card("sql@20"))


def test_my_part_and_my_keys_survive(sql):
    path = write_card("sql")
    text = path.read_text()
    mine = "It answers in SQLite.\n\n```sql\nSELECT 1\n```"
    text = text.replace(f"{cards.MINE}\n\n{cards.END_MINE}", f"{cards.MINE}\n{mine}\n{cards.END_MINE}")
    text = text.replace("tags:\n", "tags:\n- sqlite\n").replace("license: apache-2.0", "license: mit\ninference: false")
    text = text.replace("rank 4", "rank 400")
    path.write_text(text)
    again = write_card("sql").read_text()
    assert mine in again and "rank 400" not in again and again.count("<!-- /yours -->") == 1
    head = front(again)
    assert head["license"] == "mit" and head["inference"] is False and "sqlite" in head["tags"]
    assert write_card("sql").read_text() == again
    assert front(write_card("sql", license="cc-by-4.0").read_text())["license"] == "cc-by-4.0"


def test_a_readme_written_by_hand_is_kept_whole(sql):
    (sql.folder / "README.md").write_text("---\nlicense: mit\n---\n# By hand\n\nKeep me.\n")
    text = write_card("sql").read_text()
    assert re.search(r"<!-- yours.*\n# By hand\n\nKeep me.\n<!-- /yours -->", text) and "license: mit" in text


@pytest.mark.parametrize("bits", [None, 4])
def test_a_fused_models_card(sql, base, tmp_path, bits):
    folder = tmp_path / "out" / "fused"
    ma.fuse(base, sql, folder, quantization=ma.Quantization(bits, 32) if bits else "none")
    card = make_card(folder, base_model="user/tiny-llama", repo="user/fused")
    assert ("4-bit weights in groups of 32" if bits else "not quantized") in str(card)
    assert ("4-bit" in front(card)["tags"]) == bool(bits) and 'load("user/fused")' in str(card)
    assert "model.safetensors" in str(card) and front(card)["library_name"] == "mlx"
    assert front(card)["base_model_relation"] == "finetune" and "with `sql` fused into its weights" in str(card)
    report = json.loads((folder / "fuse_report.json").read_text())
    assert f"| **this model** | {units.number(report['fidelity']['kl_mean'], 4)} |" in str(card)
    assert "How the adapter was made" in str(card) and "joe" not in str(card)
    assert ("calibrated on" in str(card)) == (report["method"] == "calibrated")


def test_a_card_claims_no_calibration_that_was_not_done(sql, base, tmp_path):
    options = ma.FuseOptions(method="nearest", check_rows=4)
    fused = ma.fuse(base, sql, tmp_path / "fused", quantization=4, options=options)
    assert "FuseResult('fused', nearest" in repr(fused)  # no path of this machine in a notebook
    text = str(make_card(tmp_path / "fused"))
    assert "Rounding: nearest" in text and "calibrated on" not in text


def test_several_bases_and_bad_ones_are_told_apart():
    def card(**values):
        return cards.Card({"license": "mit", **values}, "")

    card(base_model=["a/b", "c/d"]).check()
    card(base_model="a/b").check()
    for bad in ({"base_model": ["a/b", "x"]}, {"base_model": "a b/c"}, {"license": "apache"}):
        with pytest.raises(errors.ConfigError):
            card(**bad).check()
    with pytest.raises(errors.ConfigError) as caught:
        card(license="apache").check()
    assert "apache-2.0" in caught.value.hint


def test_front_matter_that_cannot_be_read_is_no_front_matter():
    for text in ("", "# x", "---\n: [\n---\n", "---\n- a\n---\n", "---\nunclosed"):
        assert cards.parse_front(text) == {}


def test_the_command_prints_and_writes_cards(sql):
    def run(*arguments):
        done = CliRunner().invoke(cli, ["card", "sql", *arguments])
        assert done.exit_code == 0, done.output
        return done.stdout

    assert run() == str(make_card("sql"))
    assert json.loads(run("--json"))["front_matter"]["license"] == "apache-2.0"
    assert run("--write").strip() == str(sql.folder / "README.md")
    assert (sql.folder / "loss.svg").is_file()


# -- paths and secrets -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/home/joe/data/sql", "sql"),
        ("~/models/x/", "x"),
        ("C:\\Users\\joe\\data", "data"),
        ("file:///home/joe/x.json", "x.json"),
        ("train /Users/joe/base --data=/mnt/d/sql -n a", "train base --data=sql -n a"),
        ("at:/home/joe/x", "at:x"),
        ("'/Users/joe/x', '/Users/joe/y'", "'x', 'y'"),
        ("https://huggingface.co/user/repo/tree/main", "https://huggingface.co/user/repo/tree/main"),
        ("user/repo", "user/repo"),
        ("./data/sql", "./data/sql"),
        ("hf:user/data", "hf:user/data"),
        ("and/or", "and/or"),
        ("</s>", "</s>"),
        ("/think", "/think"),
        ("say /no_think here", "say /no_think here"),
        ("model.layers.0", "model.layers.0"),
        ("1/2 of 3/4", "1/2 of 3/4"),
    ],
)
def test_paths_are_cut_down(text, expected):
    assert cleaning.clean_text(text) == expected


NAMES = st.text("abcxyz-_.0189", min_size=1, max_size=8).filter(lambda s: s.strip("."))


@given(st.lists(NAMES, min_size=2, max_size=5), st.sampled_from(["", "x ", "--data ", "--data=", "(", '"', "\n"]))
def test_no_folder_of_a_path_survives(parts, before):
    text = f"{before}/home/{'/'.join(parts)} rest"
    cleaned = cleaning.clean_text(text)
    assert cleaned == f"{before}{parts[-1]} rest"
    cleaning.check_paths("x", cleaned)


def test_cleaning_reaches_every_corner():
    value = {"a": ["/home/joe/x", {"/home/joe/key": ("~/y", 3, None, True)}], "chat_template": "{{ '/a/b' }}"}
    assert cleaning.clean(value) == {"a": ["x", {"key": ["y", 3, None, True]}], "chat_template": "{{ '/a/b' }}"}


def test_secrets_are_found():
    for secret in (
        "hf_" + "a" * 34,
        "ghp_" + "a" * 36,
        "sk-" + "a" * 40,
        "AKIA" + "A" * 16,
        "-----BEGIN PRIVATE KEY-----",
    ):
        with pytest.raises(errors.HubError, match="line 2"):
            cleaning.check_secrets("x", f"first\nkey = '{secret}'")
    for harmless in ("hf_hub_download", "hf_model", "sk-learn", "mask-" + "a" * 40):
        cleaning.check_secrets("x", harmless)


# -- pictures --------------------------------------------------------------------------------------


def test_the_curve_is_a_picture_of_the_losses(sql):
    svg = make_card("sql").pictures["loss.svg"]
    root = xml.etree.ElementTree.fromstring(svg)
    lines = [element.get("points").split() for element in root.iter("{http://www.w3.org/2000/svg}polyline")]
    assert [len(line) for line in lines] == [4, 2]
    heights = [float(point.split(",")[1]) for point in lines[0]]
    assert heights == sorted(heights)  # the loss falls, and SVG counts downward


def test_yaml_of_a_card_is_what_was_meant(sql):
    text = str(make_card("sql"))
    assert yaml.safe_load(text.split("---")[1]) == front(text)


# -- notebooks -------------------------------------------------------------------------------------


def test_facts_are_rounded_and_escaped():
    shown = notebook.html_facts({"loss": 1.320185966232196, "rank": 8, "none": None, "<b>": "x & y"})
    assert (
        ">1.32<" in shown and ">8<" in shown and "none" not in shown and "&lt;b&gt;" in shown and "x &amp; y" in shown
    )


def test_notebooks_show_tables_and_pictures(sql, base, tmp_path):
    shown = sql._repr_html_()
    assert "<strong>sql</strong>" in shown and "2,560" in shown and shown.count("<polyline") == 2
    fused = ma.fuse(base, sql, tmp_path / "fused", quantization=4, options=ma.FuseOptions(calibration_rows=4))
    shown = fused._repr_html_()
    assert f"{fused.fidelity.kl_mean:.5f}" in shown and f"{fused.bits_per_weight:.2f}" in shown
    for html in (shown, sql._repr_html_()):
        xml.etree.ElementTree.fromstring(html)
    shown = make_card("sql")._repr_markdown_()
    assert shown.startswith("# sql") and "](data:image/svg+xml;base64," in shown and "loss.svg" not in shown


def test_a_saved_benchmark_is_shown_in_the_card(sql, base, tmp_path, measured_here):
    report = ma.benchmark(["base", "sql"], str(base), prompt_tokens=8, decode_tokens=4, rounds=1, trials=1)
    saved = tmp_path / "report.json"
    saved.write_text(json.dumps(report.to_json()))
    card = make_card("sql", benchmark=saved)
    text, picture = str(card), xml.etree.ElementTree.fromstring(card.pictures["quality.svg"])
    names = [element.text for element in picture.iter("{http://www.w3.org/2000/svg}text")]
    assert {"base", "sql"} <= set(names) and str(tmp_path) not in card.pictures["quality.svg"]
    assert text.index("![Quality](quality.svg)") < text.index("## ") < text.index("## Speed and memory")
    assert "## Speed and memory" in text and re.search(r"\| sql \|.*\d", text) and str(tmp_path) not in text
    assert "sql on its base: " in report._repr_html_() and "<svg" in report._repr_html_()


def test_a_card_says_what_it_is_how_good_and_how_to_use_it_before_how_it_was_made_and_hashes_last(sql, base, tmp_path):
    ma.fuse(base, sql, tmp_path / "fused", quantization=8, options=ma.FuseOptions(check_rows=3))
    for source in ("sql", str(tmp_path / "fused")):
        card = make_card(source)
        headings = re.findall("^## (.*)$", card.body, re.M)
        assert headings[0] == "How to use it" and headings[-2:] == ["Files", "Recipe"]
        hashes = [m.start() for m in re.finditer("[0-9a-f]{16}", card.body)]
        assert hashes and min(hashes) > card.body.index("## Recipe")
    picture = xml.etree.ElementTree.fromstring(card.pictures["quality.svg"])
    names = [element.text for element in picture.iter("{http://www.w3.org/2000/svg}text")]
    assert {"adapter", "this model", "base"} <= set(names)
    assert (
        card.body.index("same token ") < card.body.index("![Quality](quality.svg)") < card.body.index("## How to use")
    )


def test_a_card_shows_the_answers_that_were_asked_for(sql, base):
    """The base's and the adapter's, as they are generated, between the chart and how to use it."""
    model, question = ma.load_model(base), "List | all\ncourses."
    plain = model.generate(question, max_tokens=128).text
    model.attach(sql)
    tuned = model.generate(question, max_tokens=128).text
    shown = CliRunner().invoke(cli, ["card", "sql", "--ask", question], catch_exceptions=False)
    card = make_card("sql", answers={question: {"base": plain, "sql": tuned}})
    assert shown.exit_code == 0 and plain != tuned
    asked = card.body[card.body.index("## What it answers") : card.body.index("## How to use it")]
    assert asked in shown.stdout
    assert card.body.index("**List | all courses.**") < card.body.index("## How to use it")
    said = make_card("sql", answers={"Why?": {"sql": "word " * 100}}).body
    assert f"| sql | {('word ' * 60).rstrip()} … |" in said and "## What it answers" not in make_card("sql").body


DAMAGED = [
    ("fuse_recipe.json", {"adapters": ["1"]}),
    ("fuse_recipe.json", {"adapters": [{"reference": 1, "name": []}], "options": 1, "versions": [], "date": {}}),
    ("fuse_recipe.json", {"adapters": 3, "base": "x", "options": {"format": {}}, "command": ["x"]}),
    ("fuse_report.json", {"fidelity": {"tokens": "x"}, "text": 3, "bits_per_weight": "x", "update_survival": []}),
    ("fuse_report.json", {"fidelity": {"tokens": 1}, "text": {"source": 1, "calibration_rows": "x"}}),
    ("fuse_report.json", {"fidelity": [1], "method": {}, "text": {"calibration_rows": 3}}),
]


@pytest.mark.parametrize("file, values", DAMAGED, ids=str)
def test_a_damaged_record_beside_a_fused_model_is_left_out_of_its_card(tiny_model, tmp_path, file, values):
    folder = shutil.copytree(tiny_model("llama"), tmp_path / "model")
    (folder / file).write_text(json.dumps(values))
    assert str(make_card(str(folder))).startswith("---")


def test_settings_read_as_words():
    told = card_sections.settings_table({"objective": {"name": "sft"}, "lora": {"rank": 8, "scale": 2.0}, "seed": None})
    assert told.splitlines()[2:] == ["| objective | sft |", "| lora | rank 8, scale 2 |"]
