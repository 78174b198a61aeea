// libcuda.so.1 stand-in: the dozen calls that llmgpu/cuda.py makes. Own code. Memory is the process's own.
//   MOCK_CUDA_DEVICES   number of GPUs (8)
//   /etc/mock-nvswitches: CUDA starts only while /run/mock-fabric-is-ready is there, which tests/doubles/nvml/fabric-manager makes
//   MOCK_CUDA_FAULT     "3:context" no context on GPU 3, "3:memory" its memory loses a bit, "3:hang" it never answers
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static int current = -1;

static int faulty(int gpu, const char *kind) {
	const char *fault = getenv("MOCK_CUDA_FAULT");
	char expected[32];
	snprintf(expected, sizeof expected, "%d:%s", gpu, kind);
	return fault && !strcmp(fault, expected);
}

// CUDA_ERROR_SYSTEM_NOT_READY while there are NVSwitches and no fabric manager has set them up.
int cuInit(unsigned flags) {
	(void)flags;
	return access("/etc/mock-nvswitches", F_OK) == 0 && access("/run/mock-fabric-is-ready", F_OK) != 0 ? 802 : 0;
}
int cuDeviceGetCount(int *count) {
	const char *set = getenv("MOCK_CUDA_DEVICES");
	*count = set ? atoi(set) : 8;
	return 0;
}
int cuDeviceGet(int *device, int index) { *device = index; return 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) {
	if (faulty(device, "hang")) pause();
	if (faulty(device, "context")) return 101;
	*context = (void *)(size_t)(device + 1);
	return 0;
}
int cuDevicePrimaryCtxRelease_v2(int device) { (void)device; return 0; }
int cuCtxSetCurrent(void *context) { current = (int)(size_t)context - 1; return 0; }
int cuMemAlloc_v2(unsigned long long *memory, size_t size) {
	*memory = (unsigned long long)(size_t)malloc(size);
	return *memory ? 0 : 2;
}
int cuMemsetD32_v2(unsigned long long memory, unsigned word, size_t count) {
	unsigned *words = (unsigned *)(size_t)memory;
	for (size_t i = 0; i < count; i++) words[i] = word;
	if (faulty(current, "memory")) words[7] ^= 1;
	return 0;
}
int cuMemcpyDtoH_v2(void *host, unsigned long long memory, size_t size) {
	memcpy(host, (void *)(size_t)memory, size);
	return 0;
}
int cuMemFree_v2(unsigned long long memory) { free((void *)(size_t)memory); return 0; }
int cuGetErrorName(int code, const char **name) {
	*name = code == 101 ? "CUDA_ERROR_INVALID_DEVICE" : "CUDA_ERROR_UNKNOWN";
	return 0;
}
