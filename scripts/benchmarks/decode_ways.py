"""Ways that one token could be computed by, for decode.py to measure beside those that are in.

Attention (`attending`): "by clusters", of blocks that share out the tokens of heads with the same keys; "by 32 warps",
the kernel that is in with twice its warps. An adapter's update: `After` the base's product, by one kernel; `Apart`, by
two.
"""

import contextlib
from functools import cache

from mlx_adapters.drafting import attention
from mlx_adapters.drafting.attention import INPUTS, RECENT
from mlx_adapters.runtime.additions import ForAll, split
from mlx_adapters.runtime.kernel import add_update, first
from mlx_adapters.system.door import mx
from mlx_adapters.system.gpu_kernels import FEW, build_quickly

SPLITS, WARPS = 8, 8
ROOM = (8192 + RECENT) // SPLITS + 1  # tokens of a block, at most
CLUSTER = """
__device__ inline float remote(const float* mine, int rank) {
  unsigned own = (unsigned) __cvta_generic_to_shared(mine), at;
  float v;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(at) : "r"(own), "r"(rank));
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(v) : "r"(at));
  return v;
}
__device__ inline void wait_for_cluster() {
  asm volatile("barrier.cluster.arrive.aligned;\\nbarrier.cluster.wait.aligned;" ::: "memory");
}
"""
# A cluster for the heads that share keys; each of its blocks has some of the tokens. Of a token LK lanes take 16 bytes
# each: scores first, then their exponentials, then values, of which the first are under way from the beginning.
SPLIT = """
constexpr int N = 16 / sizeof(T), LK = K / N, LV = V / N, AT_ONCE = 32 / LK, SUBS = 32 * WARPS / LV, AHEAD = 2;
const int me = threadIdx.x, lane = me % 32, warp = me / 32, rank = blockIdx.x % SPLITS, group = blockIdx.x / SPLITS;
const int room = keys_shape[2], cached = counts[0], length = cached + counts[1] + 1;
const int share = (length + SPLITS - 1) / SPLITS, begin = min(rank * share, length), mine = min(share, length - begin);
const size_t recent = ((size_t) layer[0] * keys_shape[1] + group) * RECENT;
auto at = [&](const T* old, const T* beside, const T* last, int token, int width) {
  return token < cached ? old + ((size_t) group * room + token) * width
    : token < length - 1 ? beside + (recent + token - cached) * width : last + (size_t) group * width;
};
__shared__ float scores[SHARED][ROOM];
__shared__ float parts[WARPS][SHARED * V];
__shared__ float whole[SHARED * V];
__shared__ float tops[SHARED];
__shared__ float totals[SHARED];
const int sub = me / LV, column = me % LV * N;
Few<T, N> ahead[AHEAD];
#pragma unroll
for (int j = 0; j < AHEAD; ++j)
  if (sub + j * SUBS < mine)
    ahead[j] = *(const Few<T, N>*) (at(values, recent_values, new_values, begin + sub + j * SUBS, V) + column);
float own[SHARED][N];
#pragma unroll
for (int h = 0; h < SHARED; ++h) {
  const Few<T, N> few = *(const Few<T, N>*) (q + (size_t) (group * SHARED + h) * K + lane % LK * N);
  #pragma unroll
  for (int i = 0; i < N; ++i) own[h][i] = (float) few.v[i] * scale[0];
}
#pragma unroll 2
for (int first = warp * AT_ONCE; first < mine; first += WARPS * AT_ONCE) {
  const int token = first + lane / LK;
  float dots[SHARED];
  #pragma unroll
  for (int h = 0; h < SHARED; ++h) dots[h] = 0.0f;
  if (token < mine) {
    const Few<T, N> k = *(const Few<T, N>*) (at(keys, recent_keys, new_keys, begin + token, K) + lane % LK * N);
    #pragma unroll
    for (int h = 0; h < SHARED; ++h) {
      #pragma unroll
      for (int i = 0; i < N; ++i) dots[h] += own[h][i] * (float) k.v[i];
    }
  }
  #pragma unroll
  for (int d = LK / 2; d; d >>= 1) {
    #pragma unroll
    for (int h = 0; h < SHARED; ++h) dots[h] += __shfl_xor_sync(0xffffffff, dots[h], d);
  }
  if (lane % LK == 0 && token < mine) {
    #pragma unroll
    for (int h = 0; h < SHARED; ++h) scores[h][token] = dots[h];
  }
}
__syncthreads();
#pragma unroll 1
for (int h = warp; h < SHARED; h += WARPS) {
  float top = -INFINITY, total = 0.0f;
  #pragma unroll 1
  for (int t = lane; t < mine; t += 32) top = fmaxf(top, scores[h][t]);
  for (int d = 16; d; d >>= 1) top = fmaxf(top, __shfl_xor_sync(0xffffffff, top, d));
  #pragma unroll 1
  for (int t = lane; t < mine; t += 32) total += scores[h][t] = expf(scores[h][t] - top);
  for (int d = 16; d; d >>= 1) total += __shfl_xor_sync(0xffffffff, total, d);
  if (lane == 0) {
    tops[h] = top;
    totals[h] = total;
  }
}
__syncthreads();
float sum[SHARED][N];
#pragma unroll
for (int h = 0; h < SHARED; ++h) {
  #pragma unroll
  for (int i = 0; i < N; ++i) sum[h][i] = 0.0f;
}
auto add = [&](const Few<T, N>& v, int t) {
  #pragma unroll
  for (int h = 0; h < SHARED; ++h) {
    const float weight = scores[h][t];
    #pragma unroll
    for (int i = 0; i < N; ++i) sum[h][i] += weight * (float) v.v[i];
  }
};
#pragma unroll
for (int j = 0; j < AHEAD; ++j)
  if (sub + j * SUBS < mine) add(ahead[j], sub + j * SUBS);
#pragma unroll 2
for (int t = sub + AHEAD * SUBS; t < mine; t += SUBS)
  add(*(const Few<T, N>*) (at(values, recent_values, new_values, begin + t, V) + column), t);
#pragma unroll
for (int h = 0; h < SHARED; ++h) {
  #pragma unroll
  for (int i = 0; i < N; ++i) {
    float v = sum[h][i];
    for (int d = LV; d < 32; d <<= 1) v += __shfl_xor_sync(0xffffffff, v, d);
    if (lane < LV) parts[warp][h * V + column + i] = v;
  }
}
__syncthreads();
#pragma unroll 1
for (int i = me; i < SHARED * V; i += 32 * WARPS) {
  float v = 0.0f;
  #pragma unroll
  for (int w = 0; w < WARPS; ++w) v += parts[w][i];
  whole[i] = v;
}
wait_for_cluster();
constexpr int OWN = SHARED * V / SPLITS;
#pragma unroll 1
for (int i = rank * OWN + me; i < (rank + 1) * OWN; i += 32 * WARPS) {
  float top = -INFINITY, total = 0.0f, v = 0.0f, its[SPLITS];
  #pragma unroll
  for (int r = 0; r < SPLITS; ++r) top = fmaxf(top, its[r] = remote(&tops[i / V], r));
  #pragma unroll
  for (int r = 0; r < SPLITS; ++r) {
    const float weight = its[r] == -INFINITY ? 0.0f : expf(its[r] - top);
    total += weight * remote(&totals[i / V], r);
    v += weight * remote(&whole[i], r);
  }
  out[(size_t) group * SHARED * V + i] = (T) (v / total);
}
wait_for_cluster();
"""


@cache
def _attend_split():
    return build_quickly("attend_split", INPUTS, ["out"], SPLIT, FEW + CLUSTER, SPLITS)


def by_clusters(q, cached, recent, layer, new, counts, scale):
    """`attention.attend` by clusters. Shapes as there."""
    heads, groups = q.shape[1], cached[0].shape[1]
    sizes = {"K": q.shape[-1], "V": cached[1].shape[-1], "SHARED": heads // groups, "RECENT": RECENT}
    (out,) = _attend_split()(
        inputs=[q, *cached, *recent, *new, counts, *constants(scale, layer)],
        template=[("T", q.dtype), *sizes.items(), ("WARPS", WARPS), ("SPLITS", SPLITS), ("ROOM", ROOM)],
        grid=(groups * SPLITS * WARPS * 32, 1, 1),
        threadgroup=(WARPS * 32, 1, 1),
        output_shapes=[(*q.shape[:3], sizes["V"])],
        output_dtypes=[q.dtype],
    )
    return out


def by_warps(*given, warps=32):
    """`attention.attend` as it is in, with so many warps."""
    before, attention.WARPS = attention.WARPS, warps
    try:
        return IN(*given)
    finally:
        attention.WARPS = before


IN = attention._by_kernel
WAYS = {"": IN, "by clusters": by_clusters, "by 32 warps": by_warps}


@cache
def constants(scale, layer):
    """(scale, layer), each the first of some numbers that the GPU itself has written."""
    made = mx.full((16,), scale, mx.float32), mx.full((16,), layer, mx.int32)
    mx.eval(made)
    return made


@contextlib.contextmanager
def attending(way):
    """Within the block steps are traced with attention by this one of `WAYS`; gives how far it is off."""
    for width in (64, 128):  # what is found of the kernel that is in is remembered
        attention.is_right(mx.bfloat16, (width, width))
    attention._by_kernel = WAYS[way]
    try:
        yield attention._error(mx.bfloat16, (128, 128)) if way else 0.0
    finally:
        attention._by_kernel = IN


class _Chosen(ForAll):
    """An update by one kernel after the product, or by two."""

    apart: bool

    def of_few(self, product, x, widths):
        return self.linears(product(x), x, widths)

    def linears(self, y, x, widths):
        if not self.by_kernel(x):
            return super().linears(y, x, widths)
        f, slots = self.factors, first(x)
        given = y, x, self.kernel_a, self.kernel_b, widths, slots, f.gain, f.shift
        return split(add_update(*given, apart=self.apart), widths)


class After(_Chosen):
    """As one token's is, of several too."""

    apart = False


class Apart(_Chosen):
    """As several tokens' are, of one too."""

    apart = True
