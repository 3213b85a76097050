"""Safetensors files from strangers: what is read lies in the file, each byte once."""

import contextlib
import errno
import hashlib
import io
import json
import os
import struct
from types import SimpleNamespace

import mlx.core as mx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_adapters.errors import FormatError, StorageError
from mlx_adapters.storage import files, tensor_files
from mlx_adapters.storage.tensor_files import glance_at_safetensors, read_safetensors, read_safetensors_header


def write(path, header: dict, data: bytes):
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)
    return path


def entry(first, last, shape=None, dtype="F32") -> dict:
    return {"dtype": dtype, "shape": [(last - first) // 4] if shape is None else shape, "data_offsets": [first, last]}


@pytest.mark.parametrize(
    "header",
    [
        {"a": entry(0, 16), "b": entry(0, 16)},
        {"a": entry(0, 16), "b": entry(8, 16)},
        {"a": entry(0, 8), "b": entry(12, 16)},
        {"a": entry(4, 16)},
        {"a": entry(0, 12)},
        {"a": entry(0, 16, [-2, -2])},
        {"a": entry(0, 16, [4.0])},
        {"a": entry(0, 16, [True, 4])},
        {"a": entry(0, 16, [2])},
        {"a": entry(0, 16, [2, 2, 2])},
        {"a": entry(0, 16, "4")},
        {"a": entry(0, 16), "b": entry(16, 16, [0, 2**40])},
        {"a": entry(0, 16), "b": entry(-4, 0, [1])},
        {"a": entry(0.0, 16.0, [4])},
        {"a": {"dtype": "F32", "shape": [4]}},
        {"a": [0, 16]},
    ],
)
def test_tensors_that_overlap_leave_holes_or_cannot_be_are_refused(tmp_path, header):
    path = write(tmp_path / "x.safetensors", header, bytes(16))
    for read in (read_safetensors_header, read_safetensors):  # the first alone reads what is copied as it is
        with pytest.raises(FormatError):
            read(path)


def test_a_type_that_is_not_known_is_copied_and_not_read(tmp_path):
    path = write(tmp_path / "x.safetensors", {"a": entry(0, 16, [4], "F9")}, bytes(16))
    assert read_safetensors_header(path)[0]["a"]["dtype"] == "F9"
    with pytest.raises(FormatError):
        read_safetensors(path)


def test_many_tensors_on_the_same_bytes_take_no_memory(tmp_path):
    """400 layers that all point at the same megabyte would be 400 MB."""
    size = 1 << 20
    path = write(tmp_path / "x.safetensors", {f"layers.{i}": entry(0, size) for i in range(400)}, bytes(size))
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    with pytest.raises(FormatError, match="not a whole safetensors file"):
        read_safetensors(path)
    assert mx.get_peak_memory() - before < size


def test_empty_tensors_scalars_and_any_order_are_read(tmp_path):
    header = {
        "z": entry(0, 4, []),
        "b": entry(12, 16),
        "e": entry(4, 4, [0, 3]),
        "a": entry(4, 12),
        "f": entry(16, 16, [0]),
    }
    arrays = read_safetensors(write(tmp_path / "x.safetensors", header, struct.pack("<4f", 1, 2, 3, 4)))
    assert {name: array.tolist() for name, array in arrays.items()} == {"z": 1, "a": [2, 3], "b": [4], "e": [], "f": []}
    assert read_safetensors(write(tmp_path / "none.safetensors", {}, b"")) == {}


numbers = st.one_of(st.integers(-8, 40), st.sampled_from([2**31, 2**63, 10**30, 1.5, None, "4", True]))
entries = st.builds(
    lambda dtype, shape, offsets: {"dtype": dtype, "shape": shape, "data_offsets": offsets},
    st.sampled_from(["F32", "BF16", "U8", "I64", "F8_E4M3", "F9", 3]),
    st.lists(numbers, max_size=3),
    st.lists(numbers, min_size=1, max_size=3),
)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(st.text(max_size=3), st.one_of(entries, st.none(), st.integers()), max_size=3), st.integers(0, 40)
)
def test_any_header_is_read_within_its_file_or_refused(tmp_path, header, size):
    path = write(tmp_path / "x.safetensors", header, bytes(size))
    try:
        names = read_safetensors_header(path)[0]
        arrays = read_safetensors(path)
    except FormatError:
        return
    assert set(arrays) == set(names) and sum(array.nbytes for array in arrays.values()) == size


@pytest.mark.parametrize("number", [errno.EACCES, errno.EMFILE, errno.EIO])
@pytest.mark.parametrize("read", [tensor_files.read_safetensors_header, files.read_json])
def test_what_the_system_refuses_to_open_is_not_called_damaged(tmp_path, monkeypatch, read, number):
    path = tmp_path / "file"
    path.write_bytes(b"{}")

    def refused(*_, **__):
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr("builtins.open", refused)
    with pytest.raises(StorageError, match=f"Cannot read '{path}': {os.strerror(number).lower()}") as caught:
        read(path)
    assert ("ulimit" in caught.value.hint) == (number == errno.EMFILE)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    for look in (read_safetensors_header, glance_at_safetensors):
        with pytest.raises(FormatError, match="is a pipe"):
            look(tmp_path / "model.safetensors")


@pytest.mark.parametrize("hashed", [False, True])
def test_large_tensors_and_small_ones_come_in_their_order_and_a_disk_that_refuses_is_heard(
    tmp_path, monkeypatch, hashed
):
    monkeypatch.setattr(tensor_files, "LARGE", 40)
    monkeypatch.setattr(mx, "default_device", lambda: SimpleNamespace(type=mx.DeviceType.gpu))
    tensors = {f"{i:02d}": mx.full((7 + 5 * (i % 3),), i, mx.float32) for i in range(12)}  # 28, 48 or 68 bytes
    layout = [(name, "float32", tensor.shape) for name, tensor in tensors.items()]

    def stream(path):
        return tensor_files.stream_safetensors(path, layout, iter(tensors.values()), hashed=hashed)

    digest, data = stream(tmp_path / "whole"), (tmp_path / "whole").read_bytes()
    assert digest == (hashlib.sha256(data).hexdigest() if hashed else "")
    assert all(mx.array_equal(tensor, tensors[name]) for name, tensor in read_safetensors(tmp_path / "whole").items())
    small = io.BytesIO()

    def write_some(piece):
        if small.tell() + len(piece) == len(data):  # the last one
            raise OSError(errno.ENOSPC, "full")
        return small.write(piece)

    @contextlib.contextmanager
    def small_disk(path):
        yield SimpleNamespace(write=write_some)

    monkeypatch.setattr(tensor_files, "atomic_file", small_disk)
    with pytest.raises(OSError, match="full"):
        stream(tmp_path / "refused")
    assert data.startswith(small.getvalue()) and len(small.getvalue()) == len(data) - 68


def test_a_long_file_goes_to_the_disk_beside_the_writing_of_its_rest_and_a_disk_that_refuses_is_heard(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(tensor_files, "DIRTY", 1000)
    tensors = [mx.full((100,), i, mx.float32) for i in range(20)]
    layout = [(f"{i:02d}", "float32", (100,)) for i in range(20)]
    sizes = []

    def flush(descriptor, platter=True):
        sizes.append(os.fstat(descriptor).st_size)
        if len(sizes) > 1:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(tensor_files, "flush", flush)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        tensor_files.stream_safetensors(tmp_path / "refused", layout, iter(tensors))
    assert len(sizes) == 2 and not list(tmp_path.iterdir())
    monkeypatch.setattr(tensor_files, "flush", lambda *_: sizes.append(0))
    tensor_files.stream_safetensors(tmp_path / "whole", layout, iter(tensors))
    assert len(sizes) > 3 and mx.array_equal(read_safetensors(tmp_path / "whole")["19"], tensors[19])
