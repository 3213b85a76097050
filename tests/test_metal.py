"""What only a Mac with Metal can show; deselected elsewhere. The readers are tested with recorded output."""

import mlx.core as mx
import pytest

from mlx_adapters.demo.selftest import self_test
from mlx_adapters.models.loading import load_model
from mlx_adapters.sources.bases import resolve_base
from mlx_adapters.system import conditions
from mlx_adapters.system.limits import wire_memory
from mlx_adapters.system.machine import environment, memory_bytes, performance_cores, tool, usable_memory_bytes

pytestmark = pytest.mark.metal


def test_the_machine_is_a_mac_with_metal():
    machine = environment()
    assert machine.device == "gpu" and machine.system.startswith("macOS") and machine.blas == "Accelerate"
    assert machine.chip.startswith("Apple") and machine.device_name and machine.cores >= 1
    assert machine.system.split()[1] == tool("sw_vers", "-productVersion")
    assert 0 < usable_memory_bytes() <= memory_bytes() and 1 <= performance_cores() <= machine.cores


def test_the_tools_of_macos_are_read():
    state = conditions.system_state()
    assert state["power_source"] and state["gpu"] and state["load_average"] >= 0
    assert state["thermal"] in conditions.THERMAL_STATES


def test_memory_is_wired():
    assert wire_memory() == usable_memory_bytes()
    assert mx.set_wired_limit(wire_memory()) == wire_memory()  # gives what held before


def test_the_self_tests_pass():
    assert [f"{check.name}: {check.seen}" for check in self_test().checks if not check.passed] == []


def test_memory_is_measured(tiny_model):
    before = conditions.footprint_bytes()
    assert 1_000_000 < before < memory_bytes() and conditions.peak_resident_bytes() > 1_000_000
    mx.reset_peak_memory()
    load_model(resolve_base(tiny_model("llama", bits=4))).logits([1, 2, 3])
    assert mx.get_peak_memory() > 0
