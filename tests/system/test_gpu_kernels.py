"""What is handed to CUDA's compiler; what stands in for MLX's sum along an axis, its values and gradients; and
functions that are compiled.

(What the kernels compute is tried where they are first used.)
"""

import os
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import numpy as np
import pytest

from mlx_adapters.storage.paths import TEMPORARY_PREFIX
from mlx_adapters.storage.temporaries import MARKER
from mlx_adapters.system import door, gpu_kernels


@pytest.mark.parametrize("inclusive", [True, False])
@pytest.mark.parametrize("reverse", [True, False])
@pytest.mark.parametrize("axis", [-2, 1, -1, 0])
def test_it_sums_as_mlx_does_on_a_cpu(axis, reverse, inclusive, monkeypatch):
    monkeypatch.setattr(gpu_kernels, "on_cuda", lambda: True)
    x, weighed = mx.random.normal((3, 4, 14, 5)).swapaxes(0, 1), mx.random.normal((4, 3, 14, 5))
    assert door.mx.cumsum is gpu_kernels.cumsum
    how = {"axis": axis, "reverse": reverse, "inclusive": inclusive}
    given = np.array(x)
    turned = np.flip(given, axis) if reverse else given
    summed = np.cumsum(turned, axis) - (0 if inclusive else turned)
    expected = np.flip(summed, axis) if reverse else summed
    np.testing.assert_allclose(mx.cumsum(x, **how), expected, atol=1e-5)
    back = mx.grad(lambda x: (mx.cumsum(x, **how) * weighed).sum())(x)
    with mx.stream(mx.cpu):
        own = mx.grad(lambda x: (gpu_kernels._plain_cumsum(x, **how) * weighed).sum())(x)
        assert mx.allclose(back, own, atol=1e-5)


@pytest.mark.parametrize("inclusive", [True, False])
def test_one_number_is_its_own_sum_whatever_lies_between_it_and_the_next(inclusive, monkeypatch):
    """A row of one token, cut out of a wider one: MLX would take the distance for that of the numbers to be summed."""
    monkeypatch.setattr(gpu_kernels, "on_cuda", lambda: True)
    monkeypatch.setattr(gpu_kernels, "_plain_cumsum", None)
    x = mx.arange(24.0).reshape(1, 1, 2, 12)[..., 3:7].swapaxes(1, 2)  # (1, 2, 1, 4)
    assert mx.array_equal(mx.cumsum(x, axis=-2, inclusive=inclusive), x * inclusive)


@pytest.fixture
def given(monkeypatch):
    """What the compiler and MLX were given."""
    told = []
    monkeypatch.setattr(gpu_kernels, "_compiler", lambda: "compiler")
    monkeypatch.setattr(
        gpu_kernels, "_machine_code", lambda _, name, body: told.append(body) or (f"{name}_{len(told)}", b"code")
    )
    monkeypatch.setattr(mx.fast, "precompiled_cuda_kernel", lambda **options: told.append(options) or ["out"])
    return told


def call(kernel, *arrays):
    return kernel(
        inputs=list(arrays),
        template=[("T", mx.bfloat16), ("R", 8)],
        grid=(64, 2, 1),
        threadgroup=(32, 1, 1),
        output_shapes=[(2, 3)],
        output_dtypes=[mx.float16],
    )


def test_shapes_are_handed_over_as_numbers_and_compiled_for_their_count_alone(given):
    kernel = gpu_kernels.build_quickly("add", ["x", "at"], ["out"], "int n = x_shape[x_ndim - 1];", "struct Own {};")
    assert call(kernel, mx.zeros((2, 3), mx.bfloat16), mx.zeros((4,), mx.uint32)) == ["out"]
    text, options = given
    head = "const bfloat16* x, const unsigned* at, float16* out, int x_shape_0, int x_shape_1) {"
    assert 'struct Own {};extern "C" __global__ void @NAME@(' + head in text
    assert "using T = bfloat16;\nconstexpr int R = 8;\nconstexpr int x_ndim = 2;" in text
    assert "const int x_shape[] = {x_shape_0, x_shape_1};\nint n = x_shape[x_ndim - 1];" in text
    assert (options["name"], options["compiled_source"], options["scalars"]) == ("add_1", b"code", [2, 3])
    call(kernel, mx.zeros((5, 7), mx.bfloat16), mx.zeros((4,), mx.uint32))
    assert given[2]["name"] == "add_1" and given[2]["scalars"] == [5, 7]
    call(kernel, mx.zeros((5, 7, 1), mx.bfloat16), mx.zeros((4,), mx.uint32))
    assert "const int x_shape[] = {x_shape_0, x_shape_1, x_shape_2};" in given[3]


def test_blocks_of_a_cluster_are_told_to_the_compiler(given):
    call(gpu_kernels.build_quickly("add", ["x", "at"], ["out"], "", "", 8), mx.zeros((2,)), mx.zeros((4,), mx.uint32))
    assert 'extern "C" __global__ void __cluster_dims__(8, 1, 1) @NAME@(' in given[0]


def test_a_type_without_a_word_in_c_is_left_to_mlx(given):
    kernel = gpu_kernels.build_quickly("add", ["x", "at"], ["out"], "", "")
    with pytest.raises(KeyError):  # who tries it goes on to MLX's own way
        call(kernel, mx.zeros((2,), mx.complex64), mx.zeros((4,), mx.uint32))


class Compiler:
    """NVRTC, which makes of a text its beginning and how many were compiled before."""

    def __init__(self) -> None:
        self.version, self.texts = (13, 0), []

    def nvrtcVersion(self, major, minor) -> None:
        major._obj.value, minor._obj.value = self.version

    def nvrtcCreateProgram(self, program, text, *_) -> int:
        self.texts.append(text.decode())
        return 0

    def nvrtcCompileProgram(self, program, count, options) -> int:
        return 1 if "wrong" in self.texts[-1] else 0

    def nvrtcGetCUBINSize(self, program, size) -> int:
        size._obj.value = 2
        return 0

    def nvrtcGetCUBIN(self, program, binary) -> int:
        binary.raw = b"%c%d" % (self.texts[-1][:1].encode(), len(self.texts))
        return 0

    def nvrtcGetProgramLogSize(self, *_) -> int:
        return 0

    nvrtcGetProgramLog = nvrtcDestroyProgram = nvrtcGetProgramLogSize


def test_what_was_compiled_is_kept_for_the_same_text_chip_and_compiler(home, monkeypatch):
    chip = {"compute_capability_major": 9, "compute_capability_minor": 0}
    monkeypatch.setattr(mx, "device_info", lambda: chip)
    compiler = Compiler()

    def code(body: str) -> tuple[str, bytes]:
        return gpu_kernels._machine_code(compiler, "add", body)

    first = code("a @NAME@")
    assert first[1] == b"a1" and compiler.texts == [f"a {first[0]}"]
    assert code("a @NAME@") == first and len(compiler.texts) == 1
    assert code("b @NAME@")[1] == b"b2" and code("b @NAME@")[1] == b"b2"
    chip["compute_capability_major"] = 10
    assert code("a @NAME@") == (first[0], b"a3")
    compiler.version = (13, 1)
    assert code("a @NAME@") == (first[0], b"a4")
    with pytest.raises(RuntimeError, match="nvrtcCompileProgram failed for the kernel 'add'"):
        code("wrong @NAME@")
    assert len(list((home / "kernels").iterdir())) == 4


def test_a_kernel_that_cannot_be_kept_is_compiled_again(home, monkeypatch):
    monkeypatch.setattr(mx, "device_info", lambda: {"compute_capability_major": 9, "compute_capability_minor": 0})
    home.mkdir(parents=True, exist_ok=True)
    (home / "kernels").write_text("in the way")
    compiler = Compiler()
    assert [gpu_kernels._machine_code(compiler, "add", "a @NAME@")[1] for _ in range(2)] == [b"a1", b"a2"]


def test_what_a_kill_left_beside_a_kernel_that_is_kept_goes(home, monkeypatch):
    monkeypatch.setattr(mx, "device_info", lambda: {"compute_capability_major": 9, "compute_capability_minor": 0})
    compiler = Compiler()
    gpu_kernels._machine_code(compiler, "add", "a @NAME@")
    left = home / "kernels" / f"{TEMPORARY_PREFIX}1"
    left.mkdir()
    (left / MARKER).touch()
    os.utime(left, (1e9, 1e9))
    gpu_kernels._machine_code(compiler, "add", "a @NAME@")
    assert len(compiler.texts) == 1 and not left.exists()


def test_metal_has_one_way(monkeypatch):
    monkeypatch.setattr(gpu_kernels, "language", lambda: "metal")
    assert gpu_kernels.ways() == [gpu_kernels.build]


@pytest.mark.parametrize("fails", ["when built", "when called", "never", "everywhere"])
def test_a_kernel_is_built_by_the_first_way_that_compiles_it(monkeypatch, fails):
    built = []

    def refused(*_, **__):
        raise OSError("MLX has loaded no libnvrtc") if fails == "when built" else RuntimeError("nvrtc: error")

    def quick(*arguments):
        return refused() if fails == "when built" else built.append("quick") or call_of("quick")

    def call_of(way):
        return refused if fails == "everywhere" or (fails, way) == ("when called", "quick") else lambda **given: way

    monkeypatch.setattr(gpu_kernels, "ways", lambda: [quick, lambda *_: built.append("slow") or call_of("slow")])
    kernel = gpu_kernels.build_best("add", ["x"], ["out"], "", "")
    if fails == "everywhere":
        with pytest.raises(RuntimeError, match="nvrtc: error"):
            kernel(inputs=[])
    else:
        assert [kernel(inputs=[]), kernel(inputs=[])] == 2 * ["quick" if fails == "never" else "slow"]
    assert len(built) == (2 if fails in ("when called", "everywhere") else 1)


def test_a_compiled_function_computes_what_it_says_whoever_called_others_before():
    def answer():
        return held[0](mx.ones(2)).tolist()

    with ThreadPoolExecutor(1) as other:
        for number in range(20):  # each at the address of the one before
            factor = mx.array(float(number))
            held = [gpu_kernels.compiled(lambda x, factor=factor: x * factor)]
            assert answer() == other.submit(answer).result() == [number, number]
            held.clear()
