/* A libcuda.so.1 of a GPU of compute capability 9.0 that launches nothing, and records what each launch was given:
   Triton's JIT and its launcher run on it, and fastlock's. Anything else that Triton's launcher links to is added by
   libcuda.py, and returns 999. What the variable FAKE_LIBCUDA_REFUSES names fails as for a binary of another GPU. */
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include "cuda.h"
#define PARAMETERS 6
#define CONTEXT ((CUcontext)0xC0DE0000)

typedef struct {
  uint64_t function, grid[3], block[3], shared, stream, parameters[PARAMETERS], attributes, launches;
} Recorded;

static Recorded last;

void recorded(Recorded *out) { *out = last; }

static CUresult refused(const char *function) {
  const char *name = getenv("FAKE_LIBCUDA_REFUSES");
  return name && !strcmp(name, function) ? 209 : 0;
}

static CUresult record(CUfunction f, const unsigned *grid, const unsigned *block, unsigned shared, CUstream stream,
                       void **parameters, unsigned attributes) {
  last.function = (uint64_t)f;
  for (int i = 0; i < 3; i++) {
    last.grid[i] = grid[i];
    last.block[i] = block[i];
  }
  last.shared = shared;
  last.stream = (uint64_t)stream;
  for (int i = 0; i < PARAMETERS; i++)
    last.parameters[i] = *(uint64_t *)parameters[i];
  last.attributes = attributes;
  last.launches++;
  return 0;
}

CUresult cuLaunchKernel(CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                        unsigned shared, CUstream stream, void **parameters, void **extra) {
  unsigned grid[] = {gx, gy, gz}, block[] = {bx, by, bz};
  return extra ? 1 : record(f, grid, block, shared, stream, parameters, 0);
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction f, void **parameters, void **extra) {
  unsigned grid[] = {c->gridDimX, c->gridDimY, c->gridDimZ}, block[] = {c->blockDimX, c->blockDimY, c->blockDimZ};
  return extra ? 1 : record(f, grid, block, c->sharedMemBytes, c->hStream, parameters, c->numAttrs);
}

CUresult cuInit(unsigned flags) { return 0; }
CUresult cuDriverGetVersion(int *version) { *version = 13000; return 0; }
CUresult cuDeviceGet(CUdevice *device, int index) { *device = index; return 0; }
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  switch ((int)attribute) {
  case 75: *value = 9; break;
  case 18: case 76: *value = 0; break;
  default: *value = 232448;
  }
  return 0;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { *context = CONTEXT; return 0; }
CUresult cuCtxGetCurrent(CUcontext *context) { *context = CONTEXT; return 0; }
CUresult cuCtxSetCurrent(CUcontext context) { return 0; }
CUresult cuCtxPushCurrent_v2(CUcontext context) { return 0; }
CUresult cuCtxPopCurrent_v2(CUcontext *context) { *context = CONTEXT; return 0; }
CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  *module = (CUmodule)0xA0;
  return refused("cuModuleLoadData");
}
CUresult cuModuleUnload(CUmodule module) { return 0; }
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  *function = (CUfunction)0xF0;
  return 0;
}
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == 0 ? 1024 : 0;
  return 0;
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) { return 0; }
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return 0; }
CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  *(CUdeviceptr *)data = pointer;
  return 0;
}
CUresult cuGetErrorName(CUresult error, const char **text) { *text = "CUDA_ERROR"; return 0; }
CUresult cuGetErrorString(CUresult error, const char **text) { *text = "an error"; return 0; }
