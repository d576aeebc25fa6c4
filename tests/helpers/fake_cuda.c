/* Stands for the CUDA runtime, preloaded before it: one device on which nothing is ever launched. */
#include <stddef.h>
#include <string.h>

#define DONE(...) { __VA_ARGS__; return 0; }

int cudaDriverGetVersion(int *version) DONE(*version = 99000)
int cudaGetDeviceCount(int *count) DONE(*count = 1)
int cudaGetDevice(int *device) DONE(*device = 0)
int cudaSetDevice(int device) DONE()
int cudaGetDeviceProperties(void *properties, int device) DONE(memset(properties, 0, 1000))
int cudaGetDeviceProperties_v2(void *properties, int device) DONE(memset(properties, 0, 1000))
int cudaGetLastError(void) DONE()
int cudaMemGetInfo(size_t *free, size_t *total) DONE(*free = *total = (size_t)80 << 30)
int cudaStreamIsCapturing(void *stream, int *status) DONE(*status = 0)
int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) DONE(*least = 0; *greatest = -1)
int cudaEventCreateWithFlags(void **event, unsigned flags) DONE(*event = event)
int cudaEventRecord(void *event, void *stream) DONE()
int cudaEventRecordWithFlags(void *event, void *stream, unsigned flags) DONE()
int cudaEventQuery(void *event) DONE()
int cudaEventDestroy(void *event) DONE()
int cudaStreamWaitEvent(void *stream, void *event, unsigned flags) DONE()
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) DONE(*flags = 0; *active = 1)
