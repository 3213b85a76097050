"""From a reference to what it means."""

import logging

import pytest
from helpers.adapters import make_adapter, make_run

from mlx_adapters.adapters import keeping
from mlx_adapters.errors import ConfigError, NotFoundError
from mlx_adapters.models.adapter import write_adapter
from mlx_adapters.sources import bases, lookup, references
from mlx_adapters.sources.lookup import load_adapter


@pytest.mark.parametrize(("word", "iteration"), [("best", 200), ("last", 300)])
def test_best_and_last_name_checkpoints(tiny_model, word, iteration):
    folder = make_run(tiny_model("llama"), "sql")
    keeping.use("sql@100")  # what the bare name means is another matter
    for reference in (f"sql@{word}", f"{folder}@{word}"):
        assert lookup.locate(reference) == (folder, iteration)
        assert load_adapter(reference).iteration == iteration
    assert keeping.use(f"sql@{word}").iteration == iteration
    assert str(references.parse_reference(f"sql@{word}")) == f"sql@{word}"


def test_best_and_last_of_what_has_no_checkpoints(tiny_model, tmp_path):
    folder = tmp_path / "plain"
    write_adapter(make_adapter(tiny_model("llama")), folder)
    with pytest.raises(NotFoundError, match="no checkpoints"):
        lookup.locate(f"{folder}@last")
    with pytest.raises(NotFoundError, match="validation loss"):
        lookup.locate(f"{folder}@best")
    with pytest.raises(ConfigError, match="an iteration, 'best' or 'last'"):
        references.parse_reference("sql@first")


def test_a_folder_that_is_called_like_a_checkpoint_is_none(tiny_model):
    folder = make_run(tiny_model("llama"), "sql")
    (folder / "0000900_adapters.safetensors").mkdir()
    with pytest.raises(NotFoundError, match="no checkpoint 900") as caught:
        load_adapter("sql@900")
    assert "900" not in caught.value.hint
    assert load_adapter("sql@last").iteration == 300


@pytest.mark.parametrize(
    ("page", "repo"),
    [
        ("https://huggingface.co/org/Model-1.5", "org/Model-1.5"),
        ("https://huggingface.co/org/m/tree/main", "org/m"),
        ("http://www.hf.co/org/m/blob/v1/config.json", "org/m@v1"),
        ("https://huggingface.co/org/m?library=mlx", "org/m"),
    ],
)
def test_the_address_of_a_page_is_told_as_its_repository(page, repo):
    for ask in (bases.resolve_base, load_adapter):
        with pytest.raises((ConfigError, NotFoundError)) as caught:
            ask(page)
        assert f"write '{repo}'" in caught.value.hint


def test_a_folder_wins_over_the_hub_and_that_is_said(tiny_model, tmp_path, monkeypatch, caplog):
    write_adapter(make_adapter(tiny_model("llama")), tmp_path / "out" / "sql")
    (tmp_path / "out" / "model").symlink_to(tiny_model("llama"))
    monkeypatch.chdir(tmp_path)
    with caplog.at_level(logging.INFO, "mlx_adapters.events"):
        assert lookup.locate("out/sql") == (tmp_path / "out" / "sql", None)
        assert bases.resolve_base("out/model").folder == tmp_path / "out" / "model"
        lookup.locate("./out/sql")
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        f"'out/{name}' is the folder ./out/{name} here, not a repository of the Hub." for name in ("sql", "model")
    ]
