"""An adapter's config and metadata from strangers: nothing in them ends in a traceback or hides another adapter."""

import json
import math
import os
from contextlib import suppress

import mlx.core as mx
import pytest
from helpers.adapters import make_adapter, make_run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_adapters.adapters import inspecting, keeping, verifying
from mlx_adapters.errors import AdapterError, FormatError
from mlx_adapters.merging.recipes import scale
from mlx_adapters.models import metadata
from mlx_adapters.models.adapter import read_adapter
from mlx_adapters.publishing.uploads import make_card
from mlx_adapters.sources import lookup, registry
from mlx_adapters.storage import files, tensor_files
from mlx_adapters.storage.tensor_names import LORA_A

HUGE = 10**400


@pytest.fixture
def base(tiny_model):
    return tiny_model("llama")


odd_values = st.recursive(
    st.sampled_from([None, True, 0, -1, 1, HUGE, -(10**30), 1e308, math.nan, math.inf, "", "x", "\ud800", "\x1b[2J\n"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "name", "1", "\udfff"]), inner),
    max_leaves=5,
)


def plain_to_the_ground(value, depth=0) -> bool:
    """Whether it can be written, counted with and shown."""
    if isinstance(value, dict):
        return all(plain_to_the_ground(k) and plain_to_the_ground(v, depth + 1) for k, v in value.items())
    if isinstance(value, list):
        return depth < 30 and all(plain_to_the_ground(item, depth + 1) for item in value)
    if isinstance(value, str):
        return value.encode().decode() == value and all(c >= " " or c in "\t\n" for c in value)
    if isinstance(value, bool | None):
        return True
    return math.isfinite(float(value)) and (isinstance(value, float) or abs(value) < 1e308)


@given(st.dictionaries(st.sampled_from([*metadata.KINDS, "other"]), odd_values))
def test_whatever_comes_in_plain_values_of_their_kinds_come_out(raw):
    cleaned, wrong = metadata.clean(raw)
    assert plain_to_the_ground(cleaned) and plain_to_the_ground(wrong)
    assert metadata.clean(cleaned) == (cleaned, []), "what was cleaned is clean"
    assert set(cleaned) <= set(raw) and {name.partition(".")[0].partition("[")[0] for name in wrong} <= set(raw)
    for name, kind in (("name", str), ("iteration", int), ("tags", list), ("base", dict), ("sha256", dict)):
        assert isinstance(cleaned.get(name), kind | None)
    assert all(isinstance(tag, str | None) for tag in cleaned.get("tags") or [])


def test_our_own_metadata_pass_unchanged(base):
    folder = make_run(base, "sql")
    raw = json.loads((folder / "adapter_metadata.json").read_text())
    assert metadata.clean(raw) == (raw, [])
    assert lookup.load_adapter("sql").metadata == raw


def test_what_is_left_out_is_named_and_the_rest_stays(base):
    folder = make_run(base, "sql")
    raw = files.read_json(folder / "adapter_metadata.json")
    odd = raw | {"iteration": "x", "tags": ["a", 3, "b\ud800"], "name": "../../evil", "mine": {"kept": [1, "ü"]}}
    odd["base"] = raw["base"] | {"name": ["x"]}
    files.write_text(folder / "adapter_metadata.json", json.dumps(odd))
    entry = registry.read_entry(folder)
    assert metadata.examine_metadata(folder)[1] == ["base.name", "iteration", "name", "tags[1]"]
    assert "as 'base.name', 'iteration', 'name' and others" in entry.problem
    assert entry.tags == ("a", "b\ufffd") and entry.iteration == 200  # as the weights file tells
    adapter = lookup.load_adapter(folder)
    assert adapter.name == "sql" and adapter.base_name is None and adapter.metadata["mine"] == {"kept": [1, "ü"]}
    assert not verifying.verify("sql").sound


def test_a_name_that_leads_elsewhere_is_no_name():
    for name in ("../../evil", "/etc/passwd", "~root", ".hidden", "a/b", "a\\b", "", "x" * 300):
        assert metadata.clean({"name": name})[0] == {}
    assert metadata.clean({"name": "my run 2"})[0] == {"name": "my run 2"}


ODD_METADATA = {
    "numbers": {"best_validation_loss": HUGE, "iteration": HUGE, "duration_seconds": HUGE, "trained_tokens": "x"},
    "curves": {"train_losses": [[1, HUGE], [HUGE, 1], 3], "validation_losses": {"a": 1}},
    "lists": {"tags": "prod", "evaluations": [1, {"a": 1}, {"data": "x"}], "checkpoints": [1], "versions": 1},
    "records": {"base": [1], "data": 1, "training": ["x"], "merge": {"method": "cat", "sources": [1]}, "peft": 1},
    "nested": {
        "base": {"name": 1, "fingerprint": 1, "quantization": 1},
        "data": {"splits": {"train": 1}},
        "merge": {},
        "extract": {"energy_kept": "x"},
        "training": {"fuse_aware": 1, "fuse_aware_from": "x"},
    },
    "text": {"date": "\ud800", "command": "\udfff", "source": "\x1b]0;x\x07", "name": 1, "sha256": {"a": 1}},
    "peft": {"peft": {"config": {}}},
    "renames": {"peft": {"config": {"r": 4}, "renames": [1, ["a"]]}},
    "sums": {"sha256": {}},
    "string data": {"data": "rows"},
    "hub": {"hub": {"repo": 1}},
}


@pytest.mark.parametrize("kind", ODD_METADATA)
def test_odd_metadata_hinder_no_command(base, kind):
    """What the commands do, with whatever the metadata hold; errors of ours alone come out."""
    make_run(base, "good")
    folder = make_run(base, "odd")
    raw = files.read_json(folder / "adapter_metadata.json")
    (folder / "adapter_metadata.json").write_text(json.dumps(raw | ODD_METADATA[kind]))
    good, odd = registry.list_adapters()
    assert good.problem is None and (odd.rank, odd.scale) == (4, 2.0)
    details = inspecting.describe("odd")
    assert plain_to_the_ground(details.metadata) and len(details.checkpoints) == 3
    assert inspecting.compare("odd", "good").cosine == pytest.approx(1.0)
    assert {check.what: check.sound for check in verifying.verify("odd").checks}["tensors"] is True
    assert "# odd" in str(make_card("odd", base_model="a/b"))
    assert keeping.tag("odd", ["new"])[-1] == "new"
    assert registry.read_entry(folder).problem is None, "what was written is clean"
    assert keeping.prune("odd").iterations == (100,)


def mutated(raw, path, value):
    *parents, last = path
    for parent in parents:
        raw = raw[parent]
    raw[last] = value


CONFIG_PATHS = [
    ("model",),
    ("fine_tune_type",),
    ("num_layers",),
    ("lora_parameters",),
    ("lora_parameters", "rank"),
    ("lora_parameters", "scale"),
    ("lora_parameters", "dropout"),
    ("lora_parameters", "keys"),
]


@settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(path=st.sampled_from(CONFIG_PATHS), value=odd_values)
def test_odd_configs_are_read_or_refused(base, home, path, value):
    folder = registry.adapter_folder("odd")
    if not folder.is_dir():
        registry.register(make_adapter(base), "odd")
    config = folder / "adapter_config.json"
    kept = config.read_text()
    raw = json.loads(kept)
    mutated(raw, path, value)
    config.write_text(json.dumps(raw))
    try:
        entry = registry.read_entry(folder)
        readable = False
        with suppress(AdapterError):
            adapter = read_adapter(folder)
            readable = True
            assert adapter.config.rank == 4 and math.isfinite(adapter.config.scale)
        if path[-1] != "rank" or value != 1:  # another rank than the tensors have: the list reads no tensors
            assert readable or entry.problem, "what cannot be read is marked in the list"
        verifying.verify("odd")
    finally:
        config.write_text(kept)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("scale", None, "'scale', which is missing"),
        ("scale", HUGE, "'scale'"),
        ("rank", HUGE, "'rank'"),
        ("rank", 0, "at least 1 as 'rank', not '0'"),
        ("dropout", "x", "below 1 as 'dropout', not 'x'"),
        ("scale", 1e308, "float32 holds as 'scale', not '1e\\+308'"),
        ("scale", 1e-46, "has scale 1e-46, of which float32 makes nothing"),
        ("dropout", 1, "below 1 as 'dropout'"),
    ],
)
def test_a_config_error_names_the_culprit(base, field, value, words):
    registry.register(make_adapter(base), "odd")
    path = registry.adapter_folder("odd") / "adapter_config.json"
    raw = files.read_json(path)
    raw["lora_parameters"][field] = value
    path.write_text(json.dumps(raw))
    with pytest.raises(AdapterError, match=words):
        lookup.load_adapter("odd")


def test_layers_that_are_null_are_all_layers(base):
    registry.register(make_adapter(base), "odd")
    path = registry.adapter_folder("odd") / "adapter_config.json"
    files.write_json(path, files.read_json(path) | {"num_layers": None})
    assert lookup.load_adapter("odd").config.num_layers == -1


def test_a_huge_or_deep_file_is_refused_and_hides_nothing(base, monkeypatch):
    make_run(base, "good")
    for name in ("deep", "huge"):
        registry.register(make_adapter(base), name)
    (registry.adapter_folder("deep") / "adapter_metadata.json").write_text(
        '{"x": ' + "[" * 100_000 + "]" * 100_000 + "}"
    )
    (registry.adapter_folder("huge") / "adapter_metadata.json").write_text(json.dumps({"x": "y" * 100_000}))
    monkeypatch.setattr(metadata, "MAX_BYTES", 90_000)
    (registry.adapter_folder("deep") / "adapter_config.json").write_text(json.dumps({"x": [[[1]]] * 3}))
    assert [(e.name, e.problem is None) for e in registry.list_adapters()] == [
        ("deep", False),
        ("good", True),
        ("huge", False),
    ]


NOT_TENSORS_OF_AN_ADAPTER = {
    "empty": (lambda a: a[:0], "is empty, with shape"),
    "whole numbers": (lambda a: a.astype(mx.int32), "is int32; an adapter's are float32"),
    "one row too many": (lambda a: mx.concatenate([a, a], axis=1), "do not fit rank 4"),
    "a scalar": (lambda a: a[0, 0], "do not fit rank 4"),
    "NaN": (lambda a: a * mx.nan, "holds NaN or Inf"),
}


@pytest.mark.parametrize("how", NOT_TENSORS_OF_AN_ADAPTER)
def test_tensors_that_no_adapter_has_are_refused_by_name(base, how):
    change, words = NOT_TENSORS_OF_AN_ADAPTER[how]
    registry.register(make_adapter(base), "odd")
    path = registry.adapter_folder("odd") / "adapters.safetensors"
    weights = dict(mx.load(str(path)))
    name = sorted(weights)[0]
    tensor_files.write_safetensors(path, weights | {name: change(weights[name])})
    for read in (lookup.load_adapter, inspecting.describe, lambda one: inspecting.compare(one, one)):
        with pytest.raises(FormatError, match=words):
            read("odd")
    assert not verifying.verify("odd").sound


def test_an_adapter_that_would_do_nothing_is_not_made(base):
    """float32 has no number that small: it would be kept, listed and called sound, and be the base."""
    registry.register(make_adapter(base, factor=2.0), "a")
    assert scale("a", 1e-30).config.scale == 2e-30
    for name in (None, "tiny"):
        with pytest.raises(FormatError, match="has scale 2e-46, of which float32 makes nothing"):
            scale("a", 1e-46, name=name)
    assert registry.names() == ["a"]


def test_norms_of_huge_factors_are_numbers(base):
    weights = make_adapter(base).weights
    huge = {name: mx.full(array.shape, 1e30 if name.endswith(LORA_A) else 1e-20) for name, array in weights.items()}
    registry.register(make_adapter(base).with_weights(huge), "huge")
    assert all(math.isfinite(layer.norm) and layer.norm > 1e10 for layer in inspecting.describe("huge").layers)
    assert inspecting.compare("huge", "huge").cosine == pytest.approx(1.0)


@pytest.mark.parametrize("name", ["adapters.safetensors", "adapter_config.json", "adapter_metadata.json"])
def test_a_pipe_or_a_folder_in_place_of_a_file_is_reported_and_not_waited_for(base, name):
    make_run(base, "good")
    for make, odd in ((os.mkfifo, "odd-pipe"), (os.mkdir, "odd-folder")):
        path = make_run(base, odd) / name
        path.unlink()
        make(path)
        with pytest.raises(AdapterError):
            lookup.load_adapter(odd)
    assert [(e.name, e.problem is None) for e in registry.list_adapters()] == [
        ("good", True),
        ("odd-folder", False),
        ("odd-pipe", False),
    ]
    assert [one.sound for one in verifying.verify_all()] == [True, False, False]


def test_what_is_pruned_while_it_is_looked_at_is_not_shown(base, monkeypatch):
    folder = make_run(base, "sql")
    read, times = registry.read_entry, []

    def late(place):
        entry = read(place)
        times.append(place)
        (folder / "0000100_adapters.safetensors").unlink(missing_ok=True)
        return entry

    monkeypatch.setattr(registry, "read_entry", late)
    assert [one.iteration for one in inspecting.describe("sql").checkpoints] == [200, 300] and len(times) == 1
