/* A libcuda.so.1 whose calls do nothing and succeed: what Triton's driver and launcher need of it. Launches are counted. */

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

enum { SUCCESS = 0, MULTIPROCESSORS = 132, SHARED_BYTES = 227 * 1024 };
enum { MAX_KERNELS = 4096, NAME_BYTES = 128, MAX_LAUNCHES = 4096 };

/* CUlaunchConfig, as far as it is read. */
typedef struct {
  unsigned grid[3], block[3], shared_bytes;
  void *stream;
} Config;

typedef struct {
  uint64_t kernel, stream, grid[3];
} Launch;

static char names[MAX_KERNELS][NAME_BYTES];
static int num_kernels = 0;
static Launch launches[MAX_LAUNCHES]; /* the newest ones, each at its number modulo MAX_LAUNCHES */
static uint64_t num_launches = 0;

uint64_t stand_in_launches(void) { return num_launches; }
const Launch *stand_in_launch(uint64_t number) { return &launches[number % MAX_LAUNCHES]; }
const char *stand_in_kernel(uint64_t kernel) { return names[kernel - 1]; }

static int count(uint64_t kernel, void *stream, unsigned x, unsigned y, unsigned z) {
  uint64_t number = __atomic_fetch_add(&num_launches, 1, __ATOMIC_RELAXED); /* threads launch without Python's lock */
  launches[number % MAX_LAUNCHES] = (Launch){kernel, (uint64_t)stream, {x, y, z}};
  return SUCCESS;
}

int cuLaunchKernelEx(const Config *config, void *kernel, void **parameters, void **extra) {
  return count((uint64_t)kernel, config->stream, config->grid[0], config->grid[1], config->grid[2]);
}

int cuLaunchKernel(void *kernel, unsigned x, unsigned y, unsigned z, unsigned block_x, unsigned block_y,
                   unsigned block_z, unsigned shared_bytes, void *stream, void **parameters, void **extra) {
  return count((uint64_t)kernel, stream, x, y, z);
}

int cuModuleGetFunction(void **kernel, void *module, const char *name) {
  if (num_kernels == MAX_KERNELS)
    return 2; /* CUDA_ERROR_OUT_OF_MEMORY */
  snprintf(names[num_kernels], NAME_BYTES, "%s", name);
  *kernel = (void *)(uint64_t)++num_kernels;
  return SUCCESS;
}

int cuDeviceGetAttribute(int *value, int attribute, int device) {
  switch (attribute) {
  case 10: *value = 32; break;              /* WARP_SIZE */
  case 12: *value = 65536; break;           /* MAX_REGISTERS_PER_BLOCK */
  case 13: *value = 1980000; break;         /* CLOCK_RATE, in kHz */
  case 16: *value = MULTIPROCESSORS; break; /* MULTIPROCESSOR_COUNT */
  case 36: *value = 3201000; break;         /* MEMORY_CLOCK_RATE, in kHz */
  case 37: *value = 6144; break;            /* GLOBAL_MEMORY_BUS_WIDTH */
  case 75: *value = 9; break;               /* COMPUTE_CAPABILITY_MAJOR */
  case 76: *value = 0; break;               /* COMPUTE_CAPABILITY_MINOR */
  case 81: *value = SHARED_BYTES + 1024; break; /* MAX_SHARED_MEMORY_PER_MULTIPROCESSOR */
  case 97: *value = SHARED_BYTES; break;    /* MAX_SHARED_MEMORY_PER_BLOCK_OPTIN */
  default: *value = 0;
  }
  return SUCCESS;
}

int cuFuncGetAttribute(int *value, int attribute, void *kernel) {
  *value = attribute == 0 ? 1024 : attribute == 4 ? 64 : 0; /* MAX_THREADS_PER_BLOCK, NUM_REGS */
  return SUCCESS;
}

int cuPointerGetAttribute(void *value, int attribute, uint64_t pointer) {
  *(uint64_t *)value = pointer;
  return SUCCESS;
}

int cuInit(unsigned flags) { return SUCCESS; }
int cuDriverGetVersion(int *version) { return *version = 13000, SUCCESS; }
int cuDeviceGetCount(int *devices) { return *devices = 2, SUCCESS; }
int cuDeviceGet(int *device, int index) { return *device = index, SUCCESS; }
int cuDevicePrimaryCtxRetain(void **context, int device) { return *context = (void *)1, SUCCESS; }
int cuCtxGetCurrent(void **context) { return *context = (void *)1, SUCCESS; }
int cuCtxSetCurrent(void *context) { return SUCCESS; }
int cuCtxGetDevice(int *device) { return *device = 0, SUCCESS; }
int cuCtxGetLimit(size_t *value, int limit) { return *value = 0, SUCCESS; }
int cuCtxSetLimit(int limit, size_t value) { return SUCCESS; }
int cuStreamIsCapturing(void *stream, int *status) { return *status = 0, SUCCESS; }
int cuModuleLoadData(void **module, const void *image) { return *module = (void *)1, SUCCESS; }
int cuModuleUnload(void *module) { return SUCCESS; }
int cuFuncSetAttribute(void *kernel, int attribute, int value) { return SUCCESS; }
int cuFuncSetCacheConfig(void *kernel, int config) { return SUCCESS; }
int cuOccupancyMaxActiveClusters(int *clusters, void *kernel, const void *config) { return *clusters = 1, SUCCESS; }
int cuGetErrorString(int error, const char **text) { return *text = "the stand-in's tables are full", SUCCESS; }
int cuTensorMapEncodeTiled(void) { return SUCCESS; }
int cuTensorMapEncodeIm2col(void) { return SUCCESS; }
