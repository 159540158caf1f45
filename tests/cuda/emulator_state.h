/*
 * emulator_state.h - what the emulator's parts share: the settings, the fault that a kernel met, the schedule, and
 * what a stream shows to the stand-in for cuBLAS.
 */
#ifndef GD_EMULATOR_STATE_H
#define GD_EMULATOR_STATE_H

#include <stddef.h>

/* What every cudaStream_t starts with. */
struct emulated_stream {
    /* Runs task(argument) when the stream gets to it. */
    void (*enqueue)(struct emulated_stream *, void (*task)(void *), void *argument);
    /* 1 if these bytes lie within one piece of device memory. */
    int (*holds)(struct emulated_stream *, const void *memory, size_t bytes);
};

#ifdef __cplusplus
#include <cuda_runtime.h>

#include <functional>
#include <stdint.h>
#include <string>

namespace emulator {

/* GD_EMULATOR, keys and values: "schedule=random,seed=3". */
struct settings {
    std::string schedule = "forward"; /* reverse, random; rotate: another after each synchronisation that waits */
    uint32_t seed = 1;
    int driver = CUDART_VERSION; /* what it knows; 0: there is none */
    int devices = 1, capability = 80;
    int fail_malloc = 0; /* the number, from 1, of the allocation that fails */
    int fail_launch = 0;
    std::string report; /* a file: how often each kernel ran in each schedule, and what was not released */
};
const settings &get_settings();

/* The first fault, "" if there was none. From then on nothing runs. */
const std::string &get_fault();
void set_fault(const std::string &message);

void next_schedule();
std::string report_launches();

/* Runs a kernel. Bytes of its static shared memory and dynamic_bytes together may be at most `limit`. */
void run_kernel(const std::string &name, dim3 grid, dim3 block, size_t dynamic_bytes, size_t limit,
                const std::function<void()> &body);

} // namespace emulator
#endif

#endif
