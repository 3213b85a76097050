"""What the operating system knows about this process and about things that spoil a measurement.

Each reader of a tool's output is a function of its own on text, so that it can be checked with recorded output.
"""

import contextlib
import ctypes
import os
import re
import resource
import sys
from collections.abc import Iterable
from pathlib import Path

from mlx_adapters.system.machine import tool
from mlx_adapters.units import count

RUSAGE_INFO_V0_BYTES, FOOTPRINT_OFFSET = 96, 72
# Apple silicon tells `pmset` nothing about heat. A new process asks each time: a long one would see an old state.
THERMAL_STATE = "ObjC.import('Foundation'); $.NSProcessInfo.processInfo.thermalState"
THERMAL_STATES = ("nominal", "fair", "serious", "critical")  # NSProcessInfoThermalState, 0 to 3


def drop_from_file_cache(paths: Iterable[Path]) -> bool:
    """Ask the system to forget the files' contents; False where only root can (macOS: `sudo purge`)."""
    if sys.platform != "linux":
        return False
    for path in paths:
        with open(path, "rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True


def bytes_read_from_disk() -> int:
    """Bytes that this process made the disk deliver so far (Linux; 0 elsewhere)."""
    with contextlib.suppress(OSError):
        match = re.search(r"^read_bytes: (\d+)", Path("/proc/self/io").read_text(), re.M)
        return int(match[1]) if match else 0
    return 0


def process_memory() -> dict[str, int | None]:
    """Peak resident size of this process and, on a Mac, its footprint (what Activity Monitor shows)."""
    return {"peak_resident_bytes": peak_resident_bytes(), "footprint_bytes": footprint_bytes()}


def peak_resident_bytes() -> int:
    """The most memory that this process had at a time. Linux's `ru_maxrss` begins at the parent's size: not used."""
    with contextlib.suppress(OSError):
        match = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
        if match:
            return 1024 * int(match[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def footprint_bytes() -> int | None:
    """The footprint that macOS charges to this process; None elsewhere."""
    if sys.platform != "darwin":
        return None
    buffer = ctypes.create_string_buffer(4 * RUSAGE_INFO_V0_BYTES)
    failed = ctypes.CDLL("/usr/lib/libproc.dylib").proc_pid_rusage(os.getpid(), 0, ctypes.byref(buffer))
    return None if failed else int.from_bytes(buffer.raw[FOOTPRINT_OFFSET : FOOTPRINT_OFFSET + 8], "little")


def system_state() -> dict[str, str | float | None]:
    """What can spoil a run now: the machine's load; on a Mac power source, thermal limits, low-power mode."""
    state: dict[str, str | float | None] = {"load_average": os.getloadavg()[0]}
    if sys.platform == "darwin":
        power, settings = tool("pmset", "-g", "batt"), tool("pmset", "-g")
        state["power_source"] = power_source(power)
        state["low_power_mode"] = low_power_mode(settings)
        state["thermal"] = thermal_state(tool("osascript", "-l", "JavaScript", "-e", THERMAL_STATE))
        state["gpu"] = gpu_name(tool("system_profiler", "SPDisplaysDataType"))
    return state


def power_source(text: str) -> str | None:
    """ "AC Power" or "Battery Power" of `pmset -g batt`."""
    match = re.search(r"Now drawing from '([^']+)'", text)
    return match[1] if match else None


def low_power_mode(text: str) -> str | None:
    """ "on" or "off" of `pmset -g`."""
    match = re.search(r"^\s*(?:lowpowermode|powermode)\s+(\d)", text, re.M)
    return None if match is None else "on" if match[1] == "1" else "off"


def thermal_state(text: str) -> str:
    """What NSProcessInfo's number means; "unknown" where it is not to be had."""
    return THERMAL_STATES[int(text)] if text in ("0", "1", "2", "3") else "unknown"


def gpu_name(text: str) -> str | None:
    """Chip and number of GPU cores of `system_profiler SPDisplaysDataType`."""
    chip, cores = re.search(r"Chipset Model: (.+)", text), re.search(r"Total Number of Cores: (\d+)", text)
    return None if chip is None else chip[1].strip() + (f", {cores[1]} GPU cores" if cores else "")


def warnings(before: dict[str, str | float | None], after: dict[str, str | float | None], cores: int) -> list[str]:
    """What spoils the run, as sentences: states as they were before the first and after the last process."""
    sentences = []
    load = before.get("load_average")
    if isinstance(load, float) and load > max(1.0, 0.5 * cores):
        sentences.append(f"The machine was busy when the run began (load {load:.1f} on {count(cores, 'core')}).")
    for state in (before, after):
        if state.get("power_source") not in (None, "AC Power"):
            sentences.append("The machine ran on battery.")
        if state.get("low_power_mode") == "on":
            sentences.append("Low-power mode was on.")
        if state.get("thermal") in THERMAL_STATES[1:]:
            sentences.append(f"The machine was warm: macOS calls its thermal state '{state['thermal']}'.")
    return list(dict.fromkeys(sentences))
