"""An adapter in memory is what it holds, whatever lies in the folder that it was read from."""

import json

import mlx.core as mx
import numpy as np
import pytest
from helpers.adapters import make_adapter

import mlx_adapters as ma
from mlx_adapters.errors import NotFoundError
from mlx_adapters.evaluation.variants import read_variants
from mlx_adapters.models.adapter import place_of
from mlx_adapters.sources import registry

ROWS = [{"text": "The cat sat on the mat and the dog sat on the rug."}, {"text": "A bird in the hand."}]


@pytest.fixture
def sql(tiny_model):
    return registry.register(make_adapter(tiny_model("llama"), seed=3), "sql")


@pytest.fixture
def rows(tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path / "rows.jsonl"


def without(adapter):
    return adapter.with_weights({name: mx.zeros_like(array) for name, array in adapter.weights.items()})


def on_disk_again(adapter):
    """The folder holds another adapter now."""
    registry.register(make_adapter(adapter.base_name, seed=9), "sql", overwrite=True)
    return adapter


def changed_in_place(adapter):
    for name in adapter.weights:
        adapter.weights[name] = mx.zeros_like(adapter.weights[name])
    return adapter


def test_what_is_judged_is_what_it_holds(sql, rows):
    report = ma.evaluate(["base", "sql", without(sql), sql], rows)
    base, own, zeros, same = (e.loss.value for e in report.evaluations)
    assert zeros == base != own == same
    assert [e.variant for e in report.evaluations] == ["base", "sql", "sql (in memory)", str(sql.folder)]


def test_two_without_a_name_are_two(sql, rows):
    one, other = ma.scale(sql, 0.5), ma.scale(sql, 2.0)
    report = ma.evaluate([one, other, one], rows)
    losses = [e.loss.value for e in report.evaluations]
    assert [e.variant for e in report.evaluations] == ["adapter", "adapter (2)", "adapter (3)"]
    assert losses[0] == losses[2] != losses[1]


@pytest.mark.parametrize("change", [without, changed_in_place, on_disk_again])
def test_a_changed_adapter_lies_nowhere(sql, tmp_path, change):
    assert place_of(sql) == str(sql.folder)
    held = {name: np.array(array) for name, array in sql.weights.items()}
    changed = change(sql)
    wanted = held if change is on_disk_again else {name: np.zeros_like(array) for name, array in held.items()}
    assert place_of(changed) is None
    (variant,) = read_variants([changed], None, tmp_path / "work", print)
    measured = ma.load_adapter(variant.adapter)
    assert all(np.array_equal(measured.weights[name], array) for name, array in wanted.items())
    with pytest.raises(NotFoundError, match="No folder holds 'sql'"):
        ma.publish(changed, "user/sql", dry_run=True)
    details = ma.describe(changed)
    assert details.folder is None and details.files == {} and details.checkpoints == ()
    assert ma.merge([changed], [1.0]).metadata["merge"]["sources"][0]["sha256"] is None


def test_the_recipe_of_a_fuse_names_a_folder_only_if_it_holds_the_adapter(sql, tmp_path):
    options = ma.FuseOptions(method="nearest", check=False)
    for adapter, expected in ((sql, str(sql.folder)), (without(sql), None)):
        out = ma.fuse(None, adapter, tmp_path / str(expected is None), options=options).folder
        assert json.loads((out / "fuse_recipe.json").read_text())["adapters"][0]["reference"] == expected


def test_adapters_without_a_name_do_not_replace_each_other(sql):
    model = ma.load_model(sql.base_name)
    names = [model.attach(ma.scale(sql, factor)) for factor in (0.5, 2.0, 4.0)]
    assert names == ["adapter", "adapter (2)", "adapter (3)"]
    model.detach("adapter (2)")
    assert model.attach(ma.scale(sql, 3.0)) == "adapter (2)"
    assert model.attach(sql) == model.attach(without(sql)) == "sql"  # a name that was given is taken over
    logits = []
    for name in ("adapter", "adapter (3)", "sql", None):
        model.use(name)
        logits.append(np.array(model.logits([1, 2, 3])))
    assert not np.array_equal(logits[0], logits[1]) and np.array_equal(logits[2], logits[3])
