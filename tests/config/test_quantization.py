"""One way in for a precision: whatever else people give is refused, with a word on what is taken."""

import dataclasses
import json

import mlx.core as mx
import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from mlx_adapters.cli import cli
from mlx_adapters.config.quantization import BITS, KEEP, MODES, QUANTIZATIONS, UNQUANTIZED, Precision, Quantization
from mlx_adapters.config.training import TrainConfig
from mlx_adapters.errors import ConfigError

NOT_TAKEN = [4.0, np.float32(4), [4], (4,), None, True, np.bool_(True), "4", "Keep", "", b"keep", {}, {"bts": 4}, 4j]
NOT_TAKEN += [{"bits": 4.0}, {"bits": "4"}, {"bits": 4, "group": 32}, {"bits": None}, {4}, mx.array(4), 7, -1]
NOT_TAKEN += [{"bits": "keep", "group_size": 32}, {"bits": 4, "mode": "int4"}, {"bits": 4, "mode": [1]}, np.array([4])]
NOT_TAKEN += [{"bits": 4, "group_size": 0}, {"bits": 4, "mode": ""}, {"bits": 4, "group_size": True}]


@pytest.mark.parametrize("given", NOT_TAKEN, ids=repr)
def test_what_is_no_precision_is_refused(given):
    with pytest.raises(ConfigError) as caught:
        Precision.of(given)
    if isinstance(given, dict) and "bits" in given.keys() <= {"bits", "group_size", "mode"}:
        with pytest.raises(ConfigError):
            Precision(**given)
    assert caught.value.hint and "\n" not in caught.value.message and len(caught.value.message) < 150


@pytest.mark.parametrize(
    "given, expected",
    [
        (4, Precision(4)),
        (np.int64(4), Precision(4)),
        (np.uint8(4), Precision(4)),
        ("keep", KEEP),
        ("none", UNQUANTIZED),
        ({"bits": "none"}, UNQUANTIZED),
        ({"bits": 4}, Precision(4)),
        ({"bits": np.int32(3), "group_size": np.int32(32)}, Precision(3, 32)),
        (Quantization(4), Precision(4, 64, "affine")),
        ({"bits": 4, "mode": "mxfp4"}, Precision(4, None, "mxfp4")),
        (Precision(4, 32), Precision(4, 32)),
    ],
    ids=repr,
)
def test_what_is_taken(given, expected):
    precision = Precision.of(given)
    assert precision == expected
    assert json.loads(json.dumps(dataclasses.asdict(precision)))["bits"] == expected.bits  # plain Python


def test_open_numbers_are_the_bases_own_at_its_own_bits():
    own, floats = Quantization(4, 32), Quantization(4, 32, "mxfp4")
    assert Precision.of(4).settled(own) == KEEP == Precision.of(4).settled(floats)
    assert Precision.of({"bits": 4, "mode": "affine"}).settled(own) == KEEP
    assert Precision.of({"bits": 4, "mode": "affine"}).settled(floats) == Precision(4, 64, "affine")  # another mode
    assert Precision.of(4).settled(None) == Precision(4, 64, "affine") == Precision.of(4).settled(Quantization(8, 32))
    assert Precision.of({"bits": 4, "mode": "nvfp4"}).settled(own) == Precision(4, 16, "nvfp4")
    assert Precision.of(own).settled(own) == KEEP and KEEP.settled(own) == KEEP and KEEP.quantization is None
    assert Precision.spelled("6", 32).settled(own).quantization == Quantization(6, 32)


precisions = st.sampled_from(MODES).flatmap(
    lambda mode: st.builds(Quantization, *map(st.sampled_from, QUANTIZATIONS[mode]), mode=st.just(mode))
)


@given(precisions, st.none() | precisions)
def test_a_precision_survives_json_and_settling_it_is_final(quantization, own):
    settled = Precision.of(quantization).settled(own)
    assert Precision.of(json.loads(json.dumps(settled.to_json()))) == settled == settled.settled(own)
    assert settled == KEEP if quantization == own else settled.quantization == quantization


def test_every_spelling_of_the_command_line_is_one():
    assert [Precision.spelled(bits).bits for bits in BITS] == ["keep", "none", 2, 3, 4, 5, 6, 8]


@pytest.mark.parametrize(
    "text, flags, expected",
    [
        ("fuse_aware: 4", [], Quantization(4, 32)),  # as the base
        ("fuse_aware: 3", [], Quantization(3, 64)),
        ("fuse_aware: {bits: 4, group_size: 128}", [], Quantization(4, 128)),
        ("fuse_aware: {bits: 4, mode: mxfp4}", [], Quantization(4, 32, "mxfp4")),
        ("seed: 1", ["--fuse-aware", "4", "--fuse-aware-mode", "nvfp4"], Quantization(4, 16, "nvfp4")),
    ],
)
def test_fuse_aware_takes_what_fuse_takes(tiny_model, tmp_path, text, flags, expected):
    (tmp_path / "c.yaml").write_text(f"base: {tiny_model('llama', bits=4)}\ntraining: {{{text}}}\n")
    shown = CliRunner().invoke(cli, ["train", "--config", str(tmp_path / "c.yaml"), *flags, "--print-config"])
    assert shown.exit_code == 0, shown.output
    assert yaml.safe_load(shown.stdout)["training"]["fuse_aware"] == dataclasses.asdict(expected)


@pytest.mark.parametrize("given", ["4.0", "[4]", "'4'", "{bits: keep}", "none", "{bts: 4}", "true"])
def test_fuse_aware_refuses_what_fuse_refuses(tiny_model, tmp_path, given):
    (tmp_path / "c.yaml").write_text(f"base: {tiny_model('llama')}\ntraining: {{fuse_aware: {given}}}\n")
    shown = CliRunner().invoke(cli, ["train", "--config", str(tmp_path / "c.yaml"), "--print-config"])
    assert isinstance(shown.exception, ConfigError) or shown.exit_code == 2, shown.output


@pytest.mark.parametrize("given", [4, 4.0, {"bits": 4}, "keep"])
def test_in_python_fuse_aware_is_a_quantization(given):
    with pytest.raises(ConfigError, match="fuse_aware cannot be") as caught:
        TrainConfig(fuse_aware=given)
    assert "ma.Quantization(...)" in caught.value.hint


def test_numbers_of_a_quantization_are_whole():
    assert type(Quantization(np.int64(4), np.int64(32)).bits) is int
    for bad in ({"bits": 4.0}, {"group_size": 64.0}, {"bits": True}, {"bits": "4"}, {"mode": 4}):
        with pytest.raises(ConfigError, match="must be"):
            Quantization(**bad)
