"""A fuse that was stopped after a minute goes on where it was; one that was stopped before leaves nothing."""

import json
import os

import pytest
from click.testing import CliRunner
from helpers.fusing import visible_adapter

from mlx_adapters.assembly import spool
from mlx_adapters.cli import cli
from mlx_adapters.config.fusing import FuseOptions
from mlx_adapters.errors import ConfigError, NotFoundError, TrainingError
from mlx_adapters.events import Progress
from mlx_adapters.fusion.fuse import fuse
from mlx_adapters.models.adapter import write_adapter
from mlx_adapters.storage import locks
from mlx_adapters.storage.temporaries import MARKER

OPTIONS = FuseOptions(calibration_rows=8, check=False)
STOP_AFTER = 5


@pytest.fixture
def at_hand(tiny_model, tmp_path, monkeypatch):
    """(base, adapter, output); every stopped fuse is worth keeping."""
    monkeypatch.setattr(spool, "WORTH_KEEPING", 0.0)
    folder = tiny_model("llama", bits=4)
    (tmp_path / "fused").mkdir()
    return folder, visible_adapter(folder), tmp_path / "fused" / "out"


class Stops:
    """Listens to a fuse, and stops it after some layers; `rounded` counts them, `said` is what was told."""

    def __init__(self, after=10**6):
        self.after, self.rounded, self.said, self.later = after, 0, [], 0.0

    def __call__(self, event):
        self.said.append(str(event))
        if isinstance(event, Progress) and event.stage == "calibrate: round":
            self.rounded, self.later = self.rounded + 1, event.later
            if self.rounded == self.after:
                raise KeyboardInterrupt


def stop(at_hand, **arguments):
    base, adapter, out = at_hand
    listener = Stops(STOP_AFTER)
    with pytest.raises(KeyboardInterrupt):
        fuse(base, adapter, out, quantization=4, options=OPTIONS, on_event=listener, **arguments)
    return listener


def test_a_stopped_fuse_goes_on_to_the_same_bytes(at_hand, tmp_path):
    base, adapter, out = at_hand
    whole = Stops()
    fuse(base, adapter, tmp_path / "whole", quantization=4, options=OPTIONS, on_event=whole)
    listener = stop(at_hand)
    assert any("--continue" in text for text in listener.said)
    assert [path.name for path in out.parent.iterdir()] == [spool.kept_folder(out).name]
    rest = Stops()
    fuse(base, adapter, out, quantization=4, options=OPTIONS, resume=True, on_event=rest)
    assert 0 < rest.rounded == whole.rounded - STOP_AFTER
    assert whole.later > 0, "rounding is told with what judging will take"
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    for name in ("model.safetensors", "config.json"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_what_was_rounded_otherwise_is_not_taken_up(at_hand):
    base, adapter, out = at_hand
    stop(at_hand)
    others = {"options": FuseOptions(calibration_rows=9, check=False)}, {"quantization": 3}
    for other in others:
        with pytest.raises(NotFoundError, match="kept"):
            fuse(base, adapter, out, **{"quantization": 4, "options": OPTIONS, "resume": True} | other)
        assert list(out.parent.iterdir()) == [spool.kept_folder(out)]
    fresh = Stops()  # without --continue it begins anew, and sweeps
    fuse(base, adapter, out, quantization=4, options=OPTIONS, on_event=fresh)
    assert fresh.rounded > STOP_AFTER and [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("damage", ["record", "layer"])
def test_damaged_parts_are_rounded_anew(at_hand, damage):
    base, adapter, out = at_hand
    stop(at_hand)
    parts = spool.kept_folder(out)
    if damage == "record":
        (parts / spool.RECORD).write_text('{"key": ')
        with pytest.raises(NotFoundError):
            fuse(base, adapter, out, quantization=4, options=OPTIONS, resume=True)
        return
    last = sorted(parts.glob("0*.safetensors"))[-1]
    last.write_bytes(last.read_bytes()[:20])
    listener = Stops()
    fuse(base, adapter, out, quantization=4, options=OPTIONS, resume=True, on_event=listener)
    assert any(f"after {STOP_AFTER - 1} layers" in text for text in listener.said)


@pytest.mark.parametrize("goes_on", [True, False])
def test_what_a_kill_leaves_goes_on_or_is_swept(at_hand, goes_on):
    base, adapter, out = at_hand
    stop(at_hand)
    killed = spool.parts_folder(out)
    spool.kept_folder(out).rename(killed)  # as it lies while the fuse works
    os.utime(killed, (0, 0))
    if goes_on:
        rest = Stops()
        fuse(base, adapter, out, quantization=4, options=OPTIONS, resume=True, on_event=rest)
        assert any(f"after {STOP_AFTER} layers" in text for text in rest.said)
    else:
        fuse(base, adapter, out.with_name("other"), options=FuseOptions(method="nearest", check=False))
    assert len(list(out.parent.iterdir())) == 1


def test_stopped_early_or_busy(at_hand, monkeypatch):
    base, adapter, out = at_hand
    working = spool.parts_folder(out)
    working.mkdir()
    (working / MARKER).touch()
    with locks.lock_file(working / MARKER), pytest.raises(TrainingError, match="Another process"):
        fuse(base, adapter, out, quantization=4, options=OPTIONS)
    monkeypatch.setattr(spool, "WORTH_KEEPING", 60.0)
    stop(at_hand)
    assert list(out.parent.iterdir()) == []
    with pytest.raises(ConfigError, match="calibrated"):
        fuse(base, adapter, out, quantization="none", options=OPTIONS, resume=True)


def test_the_command_continues(at_hand, home):
    base, adapter, out = at_hand
    write_adapter(adapter, home / "adapters" / "tiny")
    stop((base, "tiny", out))
    arguments = ["fuse", "tiny", str(out), "--bits", "4", "--calibration-rows", "8", "--no-check", "--base", str(base)]
    done = CliRunner().invoke(cli, [*arguments, "--continue", "--json"])
    assert done.exit_code == 0, done.output
    assert f"after {STOP_AFTER} layers" in done.stderr and json.loads(done.stdout)["method"] == "calibrated"
    refused = CliRunner().invoke(cli, ["fuse", "tiny", str(out), "--bits", "none", "--continue"])
    assert refused.exit_code == 2 and "--continue does not go with" in refused.output
