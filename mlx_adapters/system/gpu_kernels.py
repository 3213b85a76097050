"""Kernels of our own, of one text for Metal and CUDA but for the words that the two spell differently; and `cumsum`,
`bounded_sqrt` and `compiled`, which stand in for MLX's functions where those go wrong.

MLX's CUDA build compiles a kernel anew in each process, with headers; `build_quickly` compiles without them, by the
same compiler: two kernels took 0.9 and 0.2 s on an H200, where MLX's way took 1.5 each. What it compiled, some 7 kB for
each kernel, is kept by text, chip and compiler in the home folder.
"""

import contextlib
import ctypes
import hashlib
import os
import re
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, Literal

import mlx.core as mx

from mlx_adapters.errors import AdapterError
from mlx_adapters.storage import files, paths, temporaries
from mlx_adapters.system.machine import on_cuda

Language = Literal["metal", "cuda"]
COMPILED = "MLX_PTX_CACHE_DIR"  # where MLX keeps what it compiled


def language() -> Language:
    """What this device's kernels are written in."""
    return "metal" if mx.metal.is_available() else "cuda"


def spelled(text: str, words: Mapping[str, str]) -> str:
    """The text with its words in capital letters as `words` has them; others stay."""
    return re.sub(r"\b[A-Z_]+\b", lambda word: words.get(word[0], word[0]), text)


def build(
    name: str, inputs: Sequence[str], outputs: Sequence[str], source: str, header: str
) -> Callable[..., list[mx.array]]:
    """The kernel of this device's language. It is compiled when it is first called."""
    make: Any = mx.fast.metal_kernel if language() == "metal" else mx.fast.cuda_kernel
    return make(name=name, input_names=list(inputs), output_names=list(outputs), source=source, header=header)


def ways() -> list[Callable[..., Any]]:
    """How a kernel may be built here, the best first: who uses one tries whether it computes right."""
    return [build] if language() == "metal" else [build_quickly, build]


def compiled_folder() -> str:
    """Where MLX keeps what it compiled on CUDA, for all processes that are not given another folder."""
    return os.environ.get(COMPILED) or f"{tempfile.gettempdir()}/mlx/{mx.__version__}/ptx"


def compile_apart(rank: str) -> None:
    """On CUDA give each of several processes but the first a folder of its own for what MLX compiles: in one that they
    share, MLX may read what another is just writing. To be called before the first kernel is compiled."""
    if rank != "0" and on_cuda():
        os.environ[COMPILED] = f"{compiled_folder().removesuffix(f'-{rank}')}-{rank}"  # also when called again


def build_best(
    name: str, inputs: Sequence[str], outputs: Sequence[str], source: str, header: str
) -> Callable[..., list[mx.array]]:
    """The kernel by the first of `ways` that compiles it, which is seen when it is called."""
    left = ways()

    @cache
    def built(way: Callable[..., Any]) -> Callable[..., list[mx.array]]:
        return way(name, inputs, outputs, source, header)

    def call(**given: Any) -> list[mx.array]:
        while len(left) > 1:
            try:
                return built(left[0])(**given)
            except (OSError, RuntimeError, KeyError):
                left.pop(0)
        return built(left[0])(**given)

    return call


FEW = "template <typename T, int N> struct alignas(sizeof(T) * N) Few { T v[N]; };"
# What a warp of a kernel of attention does with one more token's key and value (Milakov and Gimelshein,
# arXiv 1805.02867: the sum of exponentials without a pass for the largest).
ATTENTION = {
    "SEE_TOKEN": """float score = 0.0f;
      #pragma unroll
      for (int i = 0; i < NK; ++i) score += own[i] * (float) ks[j].v[i];
      for (int d = 16; d; d >>= 1) score += __shfl_xor_sync(0xffffffff, score, d);
      const float top = fmaxf(most, score), old = expf(most - top), now = expf(score - top);
      most = top;
      weight = weight * old + now;
      #pragma unroll
      for (int i = 0; i < NV; ++i) sum[i] = sum[i] * old + now * (float) vs[j].v[i];"""
}


def chosen(number: str, names: Sequence[str]) -> str:
    """In a kernel's text the one of these pointers that has this number."""
    text = names[0]
    for i, name in enumerate(names[1:], start=1):
        text = f"{number} == {i} ? {name} : ({text})"
    return text


PRELUDE = """
#define INFINITY __int_as_float(0x7f800000)
struct bfloat16 {
  unsigned short bits;
  bfloat16() = default;
  __device__ bfloat16(float f) {
    const unsigned u = __float_as_uint(f);
    bits = (u & 0x7fffffff) > 0x7f800000 ? 0x7fff : (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  }
  __device__ operator float() const { return __uint_as_float((unsigned) bits << 16); }
};
struct float16 {
  unsigned short bits;
  float16() = default;
  __device__ float16(float f) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(f)); }
  __device__ operator float() const {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(bits));
    return f;
  }
};
"""
C_TYPES = {
    mx.float32: "float",
    mx.bfloat16: "bfloat16",
    mx.float16: "float16",
    mx.uint8: "unsigned char",
    mx.uint32: "unsigned",
    mx.int32: "int",
}


def build_quickly(
    name: str, inputs: Sequence[str], outputs: Sequence[str], source: str, header: str, cluster: int = 1
) -> Callable[..., list[mx.array]]:
    """`build`, on CUDA, of a text that needs none of MLX's headers. Raises OSError where MLX's compiler is not found,
    and, when it is first called, RuntimeError for a text that it refuses. `cluster`: so many blocks run together."""
    compiler, shaped = _compiler(), [i for i, given in enumerate(inputs) if f"{given}_shape" in source]
    compiled: dict[tuple, tuple[str, bytes]] = {}
    kind = 'extern "C" __global__ void' + (f" __cluster_dims__({cluster}, 1, 1)" if cluster > 1 else "")

    def compile(arrays: Sequence[mx.array], template: Sequence[tuple[str, Any]], types: Sequence[mx.Dtype]) -> Any:
        arguments = [f"const {C_TYPES[array.dtype]}* {n}" for n, array in zip(inputs, arrays, strict=True)]
        arguments += [f"{C_TYPES[dtype]}* {n}" for n, dtype in zip(outputs, types, strict=True)]
        constants = [_constant(*pair) for pair in template]
        for given, count in ((inputs[i], arrays[i].ndim) for i in shaped):
            sizes = [f"{given}_shape_{axis}" for axis in range(count)]
            arguments += [f"int {each}" for each in sizes]
            constants += [
                f"constexpr int {given}_ndim = {count};",
                f"const int {given}_shape[] = {{{', '.join(sizes)}}};",
            ]
        lines = "\n".join(constants)
        return _machine_code(
            compiler, name, f"{PRELUDE}{header}{kind} @NAME@({', '.join(arguments)}) {{\n{lines}\n{source}\n}}\n"
        )

    def call(
        *,
        inputs: Sequence[mx.array],
        template: Sequence[tuple[str, Any]],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        output_shapes: Sequence[tuple[int, ...]],
        output_dtypes: Sequence[mx.Dtype],
    ) -> list[mx.array]:
        key = (*template, *output_dtypes, *(array.dtype for array in inputs), *(inputs[i].ndim for i in shaped))
        if key not in compiled:
            compiled[key] = compile(inputs, template, output_dtypes)
        own, code = compiled[key]
        return mx.fast.precompiled_cuda_kernel(
            name=own,
            compiled_source=code,
            inputs=list(inputs),
            output_shapes=list(output_shapes),
            output_dtypes=list(output_dtypes),
            scalars=[size for i in shaped for size in inputs[i].shape],
            grid=grid,
            threadgroup=threadgroup,
            ensure_row_contiguous=True,
        )

    return call


def _constant(name: str, value: Any) -> str:
    return f"using {name} = {C_TYPES[value]};" if isinstance(value, mx.Dtype) else f"constexpr int {name} = {value};"


@cache
def _compiler() -> Any:
    """NVRTC, as MLX has loaded it."""
    with open("/proc/self/maps") as maps:
        found = re.search(r"/\S*/libnvrtc\.so\S*", maps.read())
    if found is None:
        raise OSError("MLX has loaded no libnvrtc")
    return ctypes.CDLL(found[0])


def _machine_code(compiler: Any, name: str, body: str) -> tuple[str, bytes]:
    """(the function's name, its machine code), which is kept for the next process."""
    own = f"{name}_{hashlib.sha256(body.encode()).hexdigest()[:16]}"
    device, major, minor = mx.device_info(), ctypes.c_int(), ctypes.c_int()
    compiler.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    chip = f"{device['compute_capability_major']}{device['compute_capability_minor']}"
    kept = paths.home() / "kernels" / f"{own}_sm{chip}_{major.value}.{minor.value}.cubin"
    temporaries.sweep(kept.parent)  # also where a kill came after a kernel was kept
    with contextlib.suppress(OSError):
        return own, kept.read_bytes()
    code = _compiled(compiler, name, body.replace("@NAME@", own), chip)
    with contextlib.suppress(AdapterError), files.atomic_file(kept) as file:  # a full disk: it is compiled again
        file.write(code)
    return own, code


def _compiled(compiler: Any, name: str, text: str, chip: str) -> bytes:
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    options = (ctypes.c_char_p * 2)(f"--gpu-architecture=sm_{chip}".encode(), b"--std=c++17")

    def ask(function: str, *given: Any) -> None:
        if getattr(compiler, function)(*given) != 0:
            raise RuntimeError(f"{function} failed for the kernel '{name}': {log()}")

    def log() -> str:
        compiler.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        written = ctypes.create_string_buffer(size.value + 1)
        compiler.nvrtcGetProgramLog(program, written)
        return written.value.decode(errors="replace")

    ask("nvrtcCreateProgram", ctypes.byref(program), text.encode(), b"kernel.cu", 0, None, None)
    try:
        ask("nvrtcCompileProgram", program, len(options), options)
        ask("nvrtcGetCUBINSize", program, ctypes.byref(size))
        binary = ctypes.create_string_buffer(size.value)
        ask("nvrtcGetCUBIN", program, binary)
    finally:
        compiler.nvrtcDestroyProgram(ctypes.byref(program))
    return binary.raw


_plain_cumsum = mx.cumsum


def cumsum(
    a: mx.array, axis: int | None = None, *, reverse: bool = False, inclusive: bool = True, **more: Any
) -> mx.array:
    """`mx.cumsum`, as MLX's CUDA build computes it right; the door puts it in that one's place.

    MLX 0.32.4 starts too many blocks there for a sum along an axis whose numbers do not lie side by side, and they read
    and write past the array's end: a state space's decays (`segsum` of mlx-lm's `ssm`) spoilt other arrays now and
    then. Here a copy in which they do is summed, and so is the gradient's.
    """
    if axis is None or a.ndim < 2 or not on_cuda():
        return _plain_cumsum(a, axis, reverse=reverse, inclusive=inclusive, **more)
    if a.shape[axis] == 1 and a.dtype != mx.bool_:  # whatever its stride is
        return a if inclusive else mx.zeros_like(a)

    @mx.custom_function
    def along_last(a: mx.array) -> mx.array:
        return _plain_cumsum(mx.contiguous(a), -1, reverse=reverse, inclusive=inclusive, **more)

    @along_last.vjp
    def backward(a: mx.array, cotangent: mx.array, _: mx.array) -> mx.array:
        return _plain_cumsum(mx.contiguous(cotangent), -1, reverse=not reverse, inclusive=inclusive, **more)

    return along_last(a.swapaxes(axis, -1)).swapaxes(axis, -1)


@mx.custom_function
def bounded_sqrt(x: mx.array) -> mx.array:
    """`mx.sqrt` with a slope of at most 1000, as in the code that RecurrentGemma was published with; the door puts it
    into mlx-lm's. At 0 MLX's slope is infinite, and the gradient NaN even where nothing depends on it."""
    return mx.sqrt(x)


@bounded_sqrt.vjp
def _bounded_slope(x: mx.array, cotangent: mx.array, root: mx.array) -> mx.array:
    return cotangent / mx.maximum(2 * root, 1e-3)


def compiled(function: Callable[..., Any], inputs: Any = None, outputs: Any = None) -> Callable[..., Any]:
    """`mx.compile`, anew in each thread that calls it.

    MLX 0.32.4 keeps what it compiled by the function's address, in each thread that called it, and forgets it in one
    alone when the function is gone. Another function that comes to lie there then computes, in the others, what the
    first one did: with an adapter that was let go, say.
    """
    here = threading.local()

    def call(*arguments: Any) -> Any:
        try:
            made = here.compiled
        except AttributeError:
            made = here.compiled = mx.compile(lambda *given: function(*given), inputs=inputs, outputs=outputs)
        return made(*arguments)

    return call
