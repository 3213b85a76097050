/* A GPU that is not there, for MLX's CUDA build: what is allocated is the host's memory, copies copy, and kernels do
   nothing, launched or in graphs. This file is libcuda.so.1, cuBLASLt and cuDNN; and of the CUDA runtime, which
   libmlx.so contains, `pretend` overwrites each function in memory by a jump to the one of its name here, or to one
   that is counted and does nothing. x86-64 alone. See pretend_gpu.py. */

#define _GNU_SOURCE
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <elf.h>
#include <fcntl.h>
#include <link.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>

/* ---- what is called, and how often */

struct Calls { const char *name; long count; struct Calls *next; };
static struct Calls *all_calls;

static void counted(struct Calls *one) {
  if (one->count++) return;
  one->next = all_calls;
  all_calls = one;
  if (getenv("PRETEND_GPU_SAYS")) fprintf(stderr, "first call of %s\n", one->name);
}

long pretended(const char *name) {
  for (struct Calls *one = all_calls; one; one = one->next)
    if (strcmp(one->name, name) == 0) return one->count;
  return 0;
}

void pretended_names(void (*each)(const char *)) {
  for (struct Calls *one = all_calls; one; one = one->next) each(one->name);
}

#define RESULT cudaError_t
#define DOES(name, arguments, ...) \
  RESULT name arguments { \
    static struct Calls calls = {#name, 0, 0}; \
    counted(&calls); \
    __VA_ARGS__; \
    return 0; \
  }

/* ---- functions of libmlx.so become those here */

static int nothing(struct Calls *calls) {
  counted(calls);
  return 0;
}

/* mov rdi, calls; mov rax, target; jmp rax */
static void write_jump(unsigned char *at, struct Calls *calls, const void *target) {
  if (calls) {
    memcpy(at, "\x48\xbf", 2);
    memcpy(at + 2, &calls, 8);
    at += 10;
  }
  memcpy(at, "\x48\xb8", 2);
  memcpy(at + 2, &target, 8);
  memcpy(at + 10, "\xff\xe0", 2);
}

static int pretend_one(void *self, const char *name, unsigned char *at, size_t size) {
  size_t page = (size_t) at & ~(size_t) 4095;
  void *own = dlsym(self, name);
  if (size < 22 || mprotect((void *) page, (size_t) at + 22 - page, PROT_READ | PROT_WRITE | PROT_EXEC)) return 0;
  struct Calls *calls = 0;
  if (!own) {
    calls = calloc(1, sizeof *calls);
    calls->name = strdup(name);
  }
  write_jump(at, calls, own ? own : nothing);
  return 1;
}

/* Overwrite the runtime's functions in the library at `path`, which is loaded; how many there are. */
int pretend(const char *path) {
  Dl_info info;
  struct stat status;
  struct link_map *loaded = dlopen(path, RTLD_NOLOAD | RTLD_LAZY);
  int file = open(path, O_RDONLY), count = 0;
  if (!loaded || file < 0 || fstat(file, &status) || !dladdr((void *) pretend, &info)) return 0;
  void *self = dlopen(info.dli_fname, RTLD_NOLOAD | RTLD_LAZY);
  const char *bytes = mmap(0, status.st_size, PROT_READ, MAP_PRIVATE, file, 0);
  const Elf64_Ehdr *header = (const void *) bytes;
  const Elf64_Shdr *sections = (const void *) (bytes + header->e_shoff);
  for (int i = 0; i < header->e_shnum; i++) {
    if (sections[i].sh_type != SHT_SYMTAB) continue;
    const Elf64_Sym *symbols = (const void *) (bytes + sections[i].sh_offset);
    const char *names = bytes + sections[sections[i].sh_link].sh_offset;
    for (size_t j = 0; j < sections[i].sh_size / sizeof *symbols; j++) {
      const char *name = names + symbols[j].st_name;
      int is_runtime = (!strncmp(name, "cuda", 4) && name[4] >= 'A' && name[4] <= 'Z') || !strncmp(name, "__cuda", 6);
      if (is_runtime && ELF64_ST_TYPE(symbols[j].st_info) == STT_FUNC && symbols[j].st_shndx != SHN_UNDEF)
        count += pretend_one(self, name, (unsigned char *) loaded->l_addr + symbols[j].st_value, symbols[j].st_size);
    }
  }
  return count;
}

/* ---- the device: an H200 */

static void *handle(void) { return calloc(1, 256); }

/* Zero at first; large arrays take room only where something is written. */
static void *memory(size_t bytes) {
  void *at = 0;
  if (bytes >= 1 << 20) return mmap(0, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (posix_memalign(&at, 256, bytes ? bytes : 1) == 0) memset(at, 0, bytes);
  return at;
}

static const size_t ALL_MEMORY = 150000000000;
DOES(cudaGetDeviceCount, (int *count), *count = 1)
DOES(cudaGetDevice, (int *device), *device = 0)
DOES(cudaDriverGetVersion, (int *version), *version = 13010)
DOES(cudaMemGetInfo, (size_t *free, size_t *total), *free = *total = ALL_MEMORY)
DOES(cudaGetDeviceProperties, (struct cudaDeviceProp *p, int device),
  memset(p, 0, sizeof *p); strcpy(p->name, "a GPU that is not there"); p->totalGlobalMem = ALL_MEMORY; p->major = 9;
  p->multiProcessorCount = 132; p->warpSize = 32; p->maxThreadsPerBlock = 1024; p->sharedMemPerBlock = 49152;
  p->sharedMemPerBlockOptin = 232448; p->regsPerBlock = 65536; p->l2CacheSize = 62914560)
DOES(cudaDeviceGetAttribute, (int *value, enum cudaDeviceAttr which, int device),
  switch (which) {
    case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
    case cudaDevAttrMultiProcessorCount: *value = 132; break;
    case cudaDevAttrWarpSize: *value = 32; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = 1024; break;
    case cudaDevAttrMaxGridDimX: *value = 0x7fffffff; break;
    case cudaDevAttrMaxGridDimY: case cudaDevAttrMaxGridDimZ: *value = 65535; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = 2048; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = 49152; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = 232448; break;
    case cudaDevAttrConcurrentManagedAccess: case cudaDevAttrManagedMemory: case cudaDevAttrMemoryPoolsSupported:
      *value = 1; break;
    default: *value = 0;
  })
const char *cudaGetErrorString(cudaError_t error) { return "an error"; }

/* ---- memory, streams, events */

DOES(cudaMalloc, (void **at, size_t bytes), *at = memory(bytes))
DOES(cudaMallocHost, (void **at, size_t bytes), *at = memory(bytes))
DOES(cudaMallocManaged, (void **at, size_t bytes, unsigned flags), *at = memory(bytes))
DOES(cudaMallocAsync, (void **at, size_t bytes, cudaStream_t stream), *at = memory(bytes))
DOES(cudaMemcpy, (void *to, const void *from, size_t n, enum cudaMemcpyKind kind), memmove(to, from, n))
DOES(cudaMemcpyAsync, (void *to, const void *from, size_t n, enum cudaMemcpyKind kind, cudaStream_t s), memmove(to, from, n))
DOES(cudaMemset, (void *to, int v, size_t n), memset(to, v, n))
DOES(cudaMemsetAsync, (void *to, int v, size_t n, cudaStream_t s), memset(to, v, n))
DOES(cudaDeviceGetDefaultMemPool, (cudaMemPool_t *pool, int device), *pool = handle())
DOES(cudaMemPoolGetAttribute, (cudaMemPool_t pool, enum cudaMemPoolAttr which, void *value), *(size_t *) value = 0)
DOES(cudaStreamCreateWithFlags, (cudaStream_t *stream, unsigned flags), *stream = handle())
DOES(cudaEventCreate, (cudaEvent_t *event), *event = handle())
DOES(cudaEventCreateWithFlags, (cudaEvent_t *event, unsigned flags), *event = handle())
DOES(cudaEventElapsedTime, (float *ms, cudaEvent_t start, cudaEvent_t end), *ms = 0)
DOES(cudaLaunchHostFunc, (cudaStream_t stream, cudaHostFn_t function, void *data), function(data))

/* ---- code, and graphs, of which nothing is kept but how many nodes they have */

struct Graph { long nodes; };
static cudaGraphNode_t node(cudaGraph_t graph) {
  ((struct Graph *) graph)->nodes++;
  return (cudaGraphNode_t) graph; /* never looked into, and gone with the graph */
}
static int nodes_of(cudaGraph_t graph, cudaGraphNode_t *nodes, size_t *count) {
  size_t n = ((struct Graph *) graph)->nodes;
  for (size_t i = 0; nodes && i < n && i < *count; i++) nodes[i] = (cudaGraphNode_t) graph;
  return *count = n, 0;
}
typedef const cudaGraphNode_t *Nodes;
DOES(__cudaGetKernel, (void **kernel, const void *function), *kernel = (void *) function)
DOES(cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags, (int *n, const void *f, int b, size_t s, unsigned flags), *n = 2)
DOES(cudaGetDriverEntryPointByVersion, (const char *name, void **at, unsigned v,
  unsigned long long f, enum cudaDriverEntryPointQueryResult *r),
  *at = dlsym(RTLD_DEFAULT, name); if (r) *r = *at ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound)
DOES(cudaGraphCreate, (cudaGraph_t *graph, unsigned flags), *graph = handle())
DOES(cudaGraphDestroy, (cudaGraph_t graph), free(graph))
DOES(cudaGraphAddKernelNode, (cudaGraphNode_t *made, cudaGraph_t graph, Nodes on, size_t n, const struct cudaKernelNodeParams *p), *made = node(graph))
DOES(cudaGraphAddChildGraphNode, (cudaGraphNode_t *made, cudaGraph_t graph, Nodes on, size_t n, cudaGraph_t child), *made = node(graph))
DOES(cudaGraphAddEmptyNode, (cudaGraphNode_t *made, cudaGraph_t graph, Nodes on, size_t n), *made = node(graph))
DOES(cudaGraphAddMemcpyNode1D, (cudaGraphNode_t *made, cudaGraph_t graph, Nodes on, size_t n, void *to,
  const void *from, size_t bytes, enum cudaMemcpyKind kind), *made = node(graph))
DOES(cudaGraphAddMemsetNode, (cudaGraphNode_t *made, cudaGraph_t graph, Nodes on, size_t n, const struct cudaMemsetParams *p), *made = node(graph))
DOES(cudaGraphGetNodes, (cudaGraph_t graph, cudaGraphNode_t *nodes, size_t *count), return nodes_of(graph, nodes, count))
DOES(cudaGraphGetRootNodes, (cudaGraph_t graph, cudaGraphNode_t *nodes, size_t *count), return nodes_of(graph, nodes, count))
DOES(cudaGraphNodeGetDependentNodes, (cudaGraphNode_t one, cudaGraphNode_t *nodes, cudaGraphEdgeData *edges, size_t *count), *count = 0)
DOES(cudaGraphNodeGetType, (cudaGraphNode_t one, enum cudaGraphNodeType *type), *type = cudaGraphNodeTypeKernel)
DOES(cudaGraphInstantiate, (cudaGraphExec_t *made, cudaGraph_t graph, unsigned long long flags), *made = handle())
DOES(cudaGraphExecDestroy, (cudaGraphExec_t made), free(made))
DOES(cudaGraphExecUpdate, (cudaGraphExec_t made, cudaGraph_t graph, cudaGraphExecUpdateResultInfo *info), memset(info, 0, sizeof *info))
DOES(cudaStreamEndCapture, (cudaStream_t stream, cudaGraph_t *graph), *graph = handle(); node(*graph))

/* ---- the driver, as far as MLX calls it by itself */

#undef RESULT
#define RESULT CUresult

DOES(cuFuncSetAttribute, (CUfunction function, CUfunction_attribute which, int value))
DOES(cuGetErrorString, (CUresult error, const char **text), *text = "an error")
DOES(cuGraphAddKernelNode, (CUgraphNode *made, CUgraph graph, const CUgraphNode *on, size_t n, const CUDA_KERNEL_NODE_PARAMS *p), *made = node(graph))
DOES(cuGraphCreate, (CUgraph *graph, unsigned flags), *graph = handle())
DOES(cuGraphGetNodes, (CUgraph graph, CUgraphNode *nodes, size_t *count), return nodes_of(graph, nodes, count))
DOES(cuGraphKernelNodeSetAttribute, (CUgraphNode one, CUkernelNodeAttrID which, const CUkernelNodeAttrValue *value))
DOES(cuLaunchKernelEx, (const CUlaunchConfig *config, CUfunction function, void **parameters, void **extra))
/* Says of each function in a kernel's machine code how many registers it takes, and bytes of shared and local memory:
   .nv.info has records (format, what, bytes, index of a symbol, number). */
static void say_needs(const char *image) {
  const Elf64_Ehdr *header = (const void *) image;
  if (!getenv("PRETEND_GPU_KERNELS") || memcmp(image, ELFMAG, SELFMAG)) return;
  const Elf64_Shdr *sections = (const void *) (image + header->e_shoff), *symbols = 0;
  const char *names = image + sections[header->e_shstrndx].sh_offset;
  for (int i = 0; i < header->e_shnum; i++)
    if (sections[i].sh_type == SHT_SYMTAB) symbols = sections + i;
  for (int i = 0; i < header->e_shnum; i++) {
    const char *name = names + sections[i].sh_name, *at = image + sections[i].sh_offset, *end = at + sections[i].sh_size;
    if (!strncmp(name, ".nv.shared.", 11) && end - at) fprintf(stderr, "%s: %ld bytes of shared memory\n", name + 11, end - at);
    for (; !strcmp(name, ".nv.info") && at < end; at += 4 + (at[0] == 4 ? *(unsigned short *) (at + 2) : 0)) {
      if (at[0] != 4 || (at[1] != 0x2f && at[1] != 0x12)) continue;
      unsigned index = ((unsigned *) (at + 4))[0], number = ((unsigned *) (at + 4))[1];
      const Elf64_Sym *symbol = (const Elf64_Sym *) (image + symbols->sh_offset) + index;
      const char *function = image + sections[symbols->sh_link].sh_offset + symbol->st_name;
      if (strncmp(function, "_Z", 2) == 0) continue; /* MLX's own */
      if (at[1] == 0x2f) fprintf(stderr, "%s: %u registers\n", function, number);
      else if (number) fprintf(stderr, "%s: %u bytes of local memory\n", function, number);
    }
  }
}
DOES(cuModuleLoadDataEx, (CUmodule *made, const void *image, unsigned n, CUjit_option *options, void **values), *made = handle(); say_needs(image))
DOES(cuModuleGetFunction, (CUfunction *function, CUmodule module, const char *name), *function = handle())
DOES(cuModuleUnload, (CUmodule module), free(module))
DOES(cuOccupancyMaxPotentialBlockSize, (int *least, int *threads, CUfunction f, CUoccupancyB2DSize size, size_t shared, int limit), *least = 132; *threads = 1024)
DOES(cuTensorMapEncodeTiled, (CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *at,
  const cuuint64_t *sizes, const cuuint64_t *strides, const cuuint32_t *box, const cuuint32_t *steps,
  CUtensorMapInterleave i, CUtensorMapSwizzle s, CUtensorMapL2promotion p, CUtensorMapFloatOOBfill f))

/* ---- cuBLASLt and cuDNN. cuDNN refuses all graphs, so that MLX computes attention and convolutions by others. */

#undef RESULT
#define RESULT int

DOES(cublasLtCreate, (void **made), *made = handle())
DOES(cublasLtDestroy, (void *made), free(made))
DOES(cublasLtMatmul, (void))
DOES(cublasLtMatmulAlgoGetHeuristic, (void *lt, void *desc, void *a, void *b, void *c, void *d, void *p, int n, char *results, int *count), (memset(results, 0, 96 * n), *count = 1))  // their workspaces are of no bytes
DOES(cublasLtMatmulDescCreate, (void **made), *made = handle())
DOES(cublasLtMatmulDescDestroy, (void *made), free(made))
DOES(cublasLtMatmulDescSetAttribute, (void))
DOES(cublasLtMatmulPreferenceCreate, (void **made), *made = handle())
DOES(cublasLtMatmulPreferenceDestroy, (void *made), free(made))
DOES(cublasLtMatmulPreferenceSetAttribute, (void))
DOES(cublasLtMatrixLayoutCreate, (void **made), *made = handle())
DOES(cublasLtMatrixLayoutDestroy, (void *made), free(made))
DOES(cublasLtMatrixLayoutSetAttribute, (void))
DOES(cudnnCreate, (void **made), *made = handle())
DOES(cudnnDestroy, (void *made), free(made))
DOES(cudnnSetStream, (void))
DOES(cudnnGetStream, (void *made, void **stream), *stream = 0)
size_t cudnnGetVersion(void) { return 92801; }
const char *cudnnGetErrorString(int error) { return "not there"; }
void cudnnGetLastErrorString(char *text, size_t room) { snprintf(text, room, "not there"); }
DOES(cudnnBackendCreateDescriptor, (int kind, void **made), *made = handle())
DOES(cudnnBackendDestroyDescriptor, (void *made), free(made))
DOES(cudnnBackendSetAttribute, (void))
DOES(cudnnBackendGetAttribute, (void *d, int which, int type, long room, long *count, void *values), if (count) *count = 0)
DOES(cudnnBackendFinalize, (void *made), return 3000)
DOES(cudnnBackendExecute, (void))
DOES(cudnnBackendPopulateCudaGraph, (void))
DOES(cudnnBackendUpdateCudaGraph, (void))
