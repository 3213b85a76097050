"""What a Mac does otherwise, simulated: tools by recorded output, limits by patches, shells by stand-ins."""

import contextlib
import json
import resource
import shutil
import socket
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import pytest
from packaging.requirements import Requirement

from mlx_adapters.errors import ConfigError, StorageError
from mlx_adapters.models.loading import load_model, load_module
from mlx_adapters.rounding.workers import Workers
from mlx_adapters.serving.start import bind
from mlx_adapters.sources.bases import resolve_base
from mlx_adapters.storage import paths
from mlx_adapters.system import conditions, limits, machine
from mlx_adapters.system.machine import on_gpu

GB = 1 << 30


# -- the machine, by its tools' recorded output -------------------------------------------------------

TOOLS = {
    ("sw_vers", "-productVersion"): "26.1",
    ("sysctl", "-n", "machdep.cpu.brand_string"): "Apple M4 Max",
    ("sysctl", "-n", "hw.perflevel0.physicalcpu"): "12",
    ("osascript", "-l", "JavaScript", "-e", conditions.THERMAL_STATE): "2",
    ("pmset", "-g", "batt"): "Now drawing from 'AC Power'",
    ("pmset", "-g"): " lowpowermode         0",
}


@pytest.fixture
def a_mac(monkeypatch):
    """`sys.platform` and the tools of an M4 Max with macOS 26, as a Python built before macOS 26 sees it."""

    def tool(*command: str) -> str:
        return TOOLS.get(command, "")

    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(machine, "tool", tool)
    monkeypatch.setattr(conditions, "tool", tool)
    monkeypatch.setattr(machine.platform, "mac_ver", lambda: ("16.0", ("", "", ""), "arm64"))
    monkeypatch.setattr(machine.platform, "machine", lambda: "arm64")
    monkeypatch.setattr(machine.os, "cpu_count", lambda: 16)


def test_a_mac_describes_itself(a_mac):
    assert machine.system_name() == "macOS 26.1 arm64"
    assert machine.chip_name() == "Apple M4 Max"
    assert machine.performance_cores() == 12


def test_a_mac_without_the_tools_is_described_too(a_mac, monkeypatch):
    monkeypatch.setattr(machine, "tool", lambda *_: "")
    assert machine.system_name() == "macOS 16.0 arm64"
    assert machine.performance_cores() == 16


def test_heat_is_what_macos_says_of_it(a_mac, monkeypatch):
    state = conditions.system_state()
    assert state["thermal"] == "serious" and state["power_source"] == "AC Power" and state["low_power_mode"] == "off"
    assert any("warm" in warning for warning in conditions.warnings(state, state, 16))
    monkeypatch.setattr(conditions, "tool", lambda *_: "")
    assert conditions.system_state()["thermal"] == "unknown"


def test_a_tool_that_fails_says_nothing():
    assert machine.tool("false") == "" == machine.tool("/no/such/tool")
    assert machine.tool("echo", " 12 ") == "12"
    assert machine.tool("printf", "\\377 Mac") == "\ufffd Mac"


# -- memory ------------------------------------------------------------------------------------------


@pytest.fixture
def metal(monkeypatch):
    """MLX as it presents itself with Metal; gives what the wired limit was set to."""
    wired = []
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda *_: {"max_recommended_working_set_size": 48 * GB})
    monkeypatch.setattr(mx, "set_wired_limit", lambda size: wired.append(size) or 0)
    monkeypatch.setattr(mx, "set_memory_limit", lambda size: wired.append(size) or 0)
    limits.wire_memory.cache_clear()
    yield wired
    limits.wire_memory.cache_clear()


def test_memory_is_wired_once_by_whatever_loads_a_model(metal, tiny_model):
    base = resolve_base(str(tiny_model("llama")))
    load_module(base)  # fuse, train, estimate
    load_model(resolve_base(base))  # generate, chat, serve, eval, benchmark
    assert metal == [48 * GB] * 2  # and MLX waits there instead of running on into swap


def test_wired_memory_that_is_refused_stops_nothing(metal, monkeypatch, tiny_model):
    def refuse(_):
        raise ValueError("[metal::set_wired_limit] larger than the maximum working set size")

    monkeypatch.setattr(mx, "set_wired_limit", refuse)
    assert limits.wire_memory() == 0
    assert load_model(resolve_base(tiny_model("llama"))).logits([1, 2]).shape[-1] == 512


@pytest.mark.parametrize("gpu", [True, False])
def test_what_a_step_needs_is_measured_with_a_gpu_that_does_not_run_ahead(gpu, monkeypatch):
    limits_set = []
    monkeypatch.setattr(limits, "on_gpu", lambda: gpu)
    monkeypatch.setattr(mx, "set_memory_limit", lambda size: limits_set.append(size) or 96 * GB)
    with contextlib.suppress(ZeroDivisionError), limits.as_little_memory_as_will_do():
        assert limits_set == [1] * gpu
        raise ZeroDivisionError
    assert limits_set == [1, 96 * GB] * gpu


@pytest.mark.parametrize(("kept", "cleared"), [(0, 0), (3 * GB, 0), (5 * GB, 1)])
def test_at_most_a_quarter_of_the_memory_is_kept_for_what_comes_next(monkeypatch, kept, cleared):
    calls = []
    monkeypatch.setattr(limits, "_memory", lambda: 16 * GB)
    monkeypatch.setattr(mx, "get_cache_memory", lambda: kept)
    monkeypatch.setattr(mx, "clear_cache", lambda: calls.append(1))
    limits.trim_cache()
    assert len(calls) == cleared


def test_without_metal_nothing_is_wired(monkeypatch):
    monkeypatch.setattr(mx, "set_wired_limit", lambda _: pytest.fail("there is no Metal"))
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    limits.wire_memory.cache_clear()
    assert limits.wire_memory() == 0


def test_workers_leave_the_memory_that_the_model_holds_on_a_shared_one(metal, monkeypatch):
    monkeypatch.setattr(machine, "memory_bytes", lambda: 64 * GB)
    monkeypatch.setattr(mx, "get_active_memory", lambda: 40 * GB)
    monkeypatch.setattr(mx, "get_cache_memory", lambda: 4 * GB)
    assert machine.memory_beside_model_bytes() == 5 * GB == Workers(2).memory
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    assert machine.memory_beside_model_bytes() == 16 * GB


# -- open files --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "before, hard, after",
    [
        (256, resource.RLIM_INFINITY, 10_240),  # Terminal's
        (256, 4096, 4096),
        (256, 256, 256),
        (20_000, resource.RLIM_INFINITY, 20_000),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, resource.RLIM_INFINITY),
    ],
)
def test_the_limit_of_open_files_is_raised_and_never_lowered(monkeypatch, before, hard, after):
    held = [(before, hard)]
    monkeypatch.setattr(limits.resource, "getrlimit", lambda _: held[-1])
    monkeypatch.setattr(limits.resource, "setrlimit", lambda _, pair: held.append(pair))
    assert limits.raise_open_files() == after == held[-1][0]
    assert held[-1][1] == hard


def test_a_system_that_refuses_more_open_files_is_left_as_it_is(monkeypatch):
    def refuse(*_):
        raise ValueError("current limit exceeds maximum limit")

    monkeypatch.setattr(limits.resource, "getrlimit", lambda _: (256, resource.RLIM_INFINITY))
    monkeypatch.setattr(limits.resource, "setrlimit", refuse)
    assert limits.raise_open_files() == 256


def test_a_process_under_a_shells_low_limit_raises_it():
    program = """
        import resource
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, 5000))
        import mlx_adapters.system.door
        print(resource.getrlimit(resource.RLIMIT_NOFILE))
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    shown = subprocess.run(command, capture_output=True, text=True, env=machine.child_environment())
    assert shown.stdout.strip() == "(5000, 5000)", shown.stderr


MANY_SHARDS = """
    import resource, sys
    resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[2]), int(sys.argv[2])))
    import mlx_adapters as ma
    from mlx_adapters.config.training import LoraConfig, TrainConfig
    base, data = sys.argv[1], sys.argv[3]
    print(ma.estimate(base, data).fits)
    ma.train(base, data, name="many", lora=LoraConfig(rank=4), training=TrainConfig(iterations=2, batch_size=2))
    attached = ma.load_model(base)
    with attached.using(ma.load_adapter("many")):
        print(len(attached.generate("List all.", max_tokens=4).token_ids))
    del attached
    options = ma.FuseOptions(method="calibrated", calibration_rows=4, check_rows=2, thorough=False)
    print(ma.fuse(base, "many", "out", quantization=4, options=options).method)
"""


def in_shards(folder, copy, count):
    """A copy of a model in so many files."""
    shutil.copytree(folder, copy)
    tensors = mx.load(str(copy / "model.safetensors"))
    (copy / "model.safetensors").unlink()
    names, where = sorted(tensors), {}
    for i in range(count):
        file = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
        part = {name: tensors[name] for name in names[i::count]}
        mx.save_safetensors(str(copy / file), part, {"format": "mlx"})
        where |= dict.fromkeys(part, file)
    (copy / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return copy


def with_few_files(tmp_path, program, base, limit):
    data = tmp_path / "data"
    data.mkdir()
    for name in ("train", "valid"):
        row = json.dumps({"prompt": "List all students.", "completion": "SELECT * FROM students;"})
        (data / f"{name}.jsonl").write_text((row + "\n") * 4)
    command = [sys.executable, "-c", textwrap.dedent(program), str(base), str(limit), str(data)]
    environment = machine.child_environment()
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)


def test_a_base_in_many_shards_needs_few_open_files(tmp_path, tiny_model):
    """A fuse goes through two copies of the base at a time; three would not fit."""
    base = in_shards(tiny_model("llama", num_hidden_layers=6), tmp_path / "base", 52)
    done = with_few_files(tmp_path, MANY_SHARDS, base, 150 + (100 if on_gpu() else 0))  # a driver opens its own
    assert done.stdout.split() == ["True", "4", "calibrated"], done.stderr


def test_too_few_open_files_are_named(tmp_path, tiny_model):
    base = in_shards(tiny_model("llama", num_hidden_layers=6), tmp_path / "base", 52)
    program = """
        import resource, sys
        resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
        import mlx_adapters as ma
        try:
            ma.load_model(sys.argv[1])
        except ma.ModelError as error:
            print(error.hint)
    """
    done = with_few_files(tmp_path, program, base, 40)
    assert done.stdout.strip() == "it is in 52 files, and this process may open 40: run 'ulimit -n 10240' before."


# -- the disk and the network -------------------------------------------------------------------------


def test_the_space_that_finder_shows_is_explained(monkeypatch, tmp_path):
    monkeypatch.setattr(paths.shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    for platform, said in (("darwin", True), ("linux", False)):
        monkeypatch.setattr(sys, "platform", platform)
        with pytest.raises(StorageError) as refused:
            paths.require_free_space(tmp_path / "out", GB)
        assert ("purgeable" in refused.value.hint) == said


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_a_port_that_a_mac_would_give_twice_is_refused(host, monkeypatch):
    """There 127.0.0.1 can be bound beside a program that has the port on all addresses."""
    with socket.create_server(("0.0.0.0", 0)) as other:
        port = other.getsockname()[1]
        monkeypatch.setattr(socket.socket, "bind", lambda *_: None)
        with pytest.raises(ConfigError, match=f"Cannot listen on {host}:{port}: another program answers there"):
            bind(host, port)
    bind(host, port).close()  # it is gone


def test_on_a_mac_numpy_is_one_that_knows_accelerate():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    asked = [r for r in map(Requirement, project["dependencies"]) if r.name == "numpy"]
    on_a_mac = [r for r in asked if r.marker.evaluate({"sys_platform": "darwin"})]
    assert [r.specifier.contains("2.3.5") for r in on_a_mac] == [False]
    assert [r.specifier.contains("2.4.0") for r in on_a_mac] == [True]
