"""Every architecture that mlx-lm has, through everything; docs/architectures.md says what is expected."""

import os

import mlx.core as mx
import pytest
from helpers.matrix import YES, row_of
from helpers.matrix_page import PAGE, page_of, read_page
from helpers.tiny_configs import model_names

EXPECTED = read_page()
MOST_TUNED = (
    "qwen3_5",
    "qwen3_5_moe",
    "gemma4",
    "gpt_oss",
    "qwen3",
    "qwen3_moe",
    "llama",
    "mistral3",
    "ministral3",
    "gemma3",
    "phi3",
    "glm4_moe_lite",
)
OTHERS = [name for name in EXPECTED if name not in MOST_TUNED]
THIRD = {*MOST_TUNED, *OTHERS[::4]}  # the rest is for `scripts/architectures` and `-m rest`
AGAIN = "'scripts/architectures {}' brings the page up to date"


@pytest.mark.parametrize("name", [n if n in THIRD else pytest.param(n, marks=pytest.mark.rest) for n in EXPECTED])
def test_an_architecture_goes_through_what_the_page_says(name, tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_ADAPTERS_HOME", os.environ["MLX_ADAPTERS_HOME"])  # which row_of sets
    row, on_cpu = row_of(name, tmp_path), mx.default_device() == mx.cpu
    trains = on_cpu or "no gradient on this device" not in row["train"]  # on a GPU other kernels run
    for column, cell in row.items():
        expected = EXPECTED[name][column]
        assert not cell.startswith("FAULT"), f"{column}: {cell}"
        assert expected != YES or cell == YES or not trains, f"{column} was yes, and now: {cell}"
        assert expected == YES or cell != YES or not on_cpu, f"{column} is yes now: {AGAIN.format(name)}"


def test_the_page_names_all_of_mlx_lms_models():
    assert sorted(EXPECTED) == sorted(model_names()), AGAIN.format("")


def test_the_page_tells_no_fault_and_is_as_it_is_written():
    assert not [cell for row in EXPECTED.values() for cell in row.values() if cell.startswith("FAULT")]
    assert PAGE.read_text() == page_of(EXPECTED)


@pytest.mark.parametrize("name", MOST_TUNED)
def test_the_most_tuned_models_go_through_everything(name):
    assert {column: cell for column, cell in EXPECTED[name].items() if cell != YES} == {}
