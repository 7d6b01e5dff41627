/* A libcuda.so.1 whose calls do nothing and succeed: what Triton's driver and launcher need of it. Launches are kept,
   with the values of their parameters. */

#include <elf.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

enum { SUCCESS = 0, OUT_OF_MEMORY = 2, MULTIPROCESSORS = 132, SHARED_BYTES = 227 * 1024 };
enum { MAX_KERNELS = 4096, MAX_PARAMETERS = 128, MAX_LAUNCHES = 4096 };

/* CUlaunchConfig, as far as it is read. */
typedef struct {
  unsigned grid[3], block[3], shared_bytes;
  void *stream;
} Config;

typedef struct {
  char name[128];
  int num_parameters;
  uint8_t bytes[MAX_PARAMETERS]; /* of each parameter */
} Kernel;

typedef struct {
  const Kernel *kernel;
  uint64_t stream, grid[3], num_parameters, parameters[MAX_PARAMETERS];
} Launch;

static Kernel kernels[MAX_KERNELS];
static int num_kernels = 0;
static Launch launches[MAX_LAUNCHES]; /* the newest ones, each at its number modulo MAX_LAUNCHES */
static uint64_t num_launches = 0;

uint64_t stand_in_launches(void) { return num_launches; }
const Launch *stand_in_launch(uint64_t number) { return &launches[number % MAX_LAUNCHES]; }

static int keep(const Kernel *kernel, void *stream, unsigned x, unsigned y, unsigned z, void **parameters) {
  uint64_t number = __atomic_fetch_add(&num_launches, 1, __ATOMIC_RELAXED); /* threads launch without Python's lock */
  Launch *launch = &launches[number % MAX_LAUNCHES];
  launch->kernel = kernel;
  launch->stream = (uint64_t)stream;
  launch->grid[0] = x, launch->grid[1] = y, launch->grid[2] = z;
  launch->num_parameters = kernel->num_parameters;
  for (int i = 0; i < kernel->num_parameters; i++) {
    launch->parameters[i] = 0;
    memcpy(&launch->parameters[i], parameters[i], kernel->bytes[i]);
  }
  return SUCCESS;
}

int cuLaunchKernelEx(const Config *config, void *kernel, void **parameters, void **extra) {
  return keep(kernel, config->stream, config->grid[0], config->grid[1], config->grid[2], parameters);
}

int cuLaunchKernel(void *kernel, unsigned x, unsigned y, unsigned z, unsigned block_x, unsigned block_y,
                   unsigned block_z, unsigned shared_bytes, void *stream, void **parameters, void **extra) {
  return keep(kernel, stream, x, y, z, parameters);
}

/* The parameters' sizes stand in the ELF file's section .nv.info.<kernel>, an entry each. Larger ones than 8 bytes, and
   what lies beyond MAX_PARAMETERS, are not kept. */
static void read_parameters(const char *image, Kernel *kernel) {
  const Elf64_Ehdr *header = (const Elf64_Ehdr *)image;
  const Elf64_Shdr *sections = (const Elf64_Shdr *)(image + header->e_shoff);
  const char *names = image + sections[header->e_shstrndx].sh_offset;
  char wanted[sizeof kernel->name + 16];
  snprintf(wanted, sizeof wanted, ".nv.info.%s", kernel->name);
  for (int i = 0; i < header->e_shnum; i++) {
    if (strcmp(names + sections[i].sh_name, wanted))
      continue;
    const uint8_t *entry = (const uint8_t *)image + sections[i].sh_offset, *end = entry + sections[i].sh_size;
    while (entry < end) {
      uint16_t length, ordinal;
      uint32_t layout;
      memcpy(&length, entry + 2, 2);
      if (entry[0] == 4 && entry[1] == 0x17) { /* with a payload; KPARAM_INFO */
        memcpy(&ordinal, entry + 8, 2);
        memcpy(&layout, entry + 12, 4);
        if (ordinal < MAX_PARAMETERS) {
          kernel->bytes[ordinal] = (layout >> 18) <= 8 ? layout >> 18 : 0;
          kernel->num_parameters += 1;
        }
      }
      entry += 4 + (entry[0] == 4 ? length : 0);
    }
  }
}

int cuModuleLoadData(void **module, const void *image) { return *module = (void *)image, SUCCESS; }

int cuModuleGetFunction(void **kernel, void *module, const char *name) {
  if (num_kernels == MAX_KERNELS)
    return OUT_OF_MEMORY;
  Kernel *added = &kernels[num_kernels++];
  snprintf(added->name, sizeof added->name, "%s", name);
  read_parameters(module, added);
  *kernel = added;
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
int cuModuleUnload(void *module) { return SUCCESS; }
int cuFuncSetAttribute(void *kernel, int attribute, int value) { return SUCCESS; }
int cuFuncSetCacheConfig(void *kernel, int config) { return SUCCESS; }
int cuOccupancyMaxActiveClusters(int *clusters, void *kernel, const void *config) { return *clusters = 1, SUCCESS; }
int cuGetErrorString(int error, const char **text) { return *text = "the stand-in's tables are full", SUCCESS; }
int cuTensorMapEncodeTiled(void) { return SUCCESS; }
int cuTensorMapEncodeIm2col(void) { return SUCCESS; }
