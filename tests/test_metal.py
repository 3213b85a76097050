"""What only a Mac with Metal can show; deselected elsewhere. The readers are tested with recorded output."""

import mlx.core as mx
import pytest

from mlx_adapters.benchmarking import system
from mlx_adapters.machine import environment, memory_bytes, usable_memory_bytes
from mlx_adapters.model import load_model

pytestmark = pytest.mark.metal


def test_the_machine_is_a_mac_with_metal():
    found = environment()
    assert found.device == "gpu" and found.system.startswith("macOS") and found.blas == "Accelerate"
    assert found.chip.startswith("Apple") and found.device_name and found.cores >= 1
    assert 0 < usable_memory_bytes() <= memory_bytes()


def test_the_tools_of_macos_are_read():
    state = system.system_state()
    assert state["power_source"] and state["gpu"] and state["load_average"] >= 0


def test_memory_is_measured(tiny_model):
    before = system.footprint_bytes()
    assert 1_000_000 < before < memory_bytes() and system.peak_resident_bytes() > 1_000_000
    mx.reset_peak_memory()
    load_model(tiny_model("llama", bits=4)).logits([1, 2, 3])
    assert mx.get_peak_memory() > 0
