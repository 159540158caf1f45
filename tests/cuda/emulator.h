/*
 * emulator.h - compiles the CUDA backend's kernels as plain C++, to run them on the CPU: cuda/kernel.cuh includes it
 * where GD_CUDA_EMULATOR is defined.
 *
 * The threads of a block are fibers that run one at a time, each until it waits for the others; blocks run one after
 * the other. In which order is the schedule: forward, reverse or random; right kernels give the same bits in each.
 * What is found:
 *   - barriers that not all threads reach, or that they reach on different lines of the source; a shuffle or
 *     __syncwarp() whose mask names a lane that is gone or not there, or not the caller;
 *   - launches that a device refuses: empty or too large, or with more than 48 kB of shared memory not asked for;
 *   - shared memory read before it is written (NaN), and device memory too;
 *   - under AddressSanitizer, accesses outside of device memory and of each shared array;
 *   - under ThreadSanitizer, races: it knows the fibers as threads and barriers as what orders them (a shuffle orders
 *     no memory), also between neighbouring blocks.
 * What cannot be found: anything about speed, registers, the compiler's device code, approximate functions (sqrtf,
 * expf and erff are the host's), and weak ordering of memory between blocks.
 *
 * Settings come from the environment: GD_EMULATOR="schedule=rotate,seed=7,...", see struct settings.
 */
#ifndef GD_EMULATOR_H
#define GD_EMULATOR_H

#include <cuda_runtime.h>

#include <functional>
#include <math.h>
#include <stdint.h>
#include <string.h>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#define __global__ static
#define __device__

namespace emulator {

/* Of the running thread. Functions, so that ThreadSanitizer sees no accesses of the emulator's own memory. */
const uint3 &thread_index();
const uint3 &block_index();
const dim3 &block_size();
const dim3 &grid_size();

void barrier(int line);
/* Memory accesses before it are ordered before those after it, for the lanes of the mask. */
void warp_barrier(unsigned mask, int line);
/* Publishes `value` and returns what `lane` of the same warp published. */
uint64_t exchange(unsigned mask, uint64_t value, int lane, int line);

/* One array of a block, the same for all of its threads; `key` tells arrays apart. */
void *shared_memory(const void *key, size_t bytes);
void *dynamic_shared_memory();

cudaError_t start(const std::string &name, const void *kernel, dim3 grid, dim3 block, size_t dynamic_bytes,
                  cudaStream_t stream, std::function<void()> body);

/* What tells a template's kernels apart: their parameters' types. */
template <class... Parameters> std::string name_with_types(const char *name)
{
    const std::string signature = __PRETTY_FUNCTION__, types = "Parameters = ";
    const size_t begin = signature.find(types) + types.size(), end = signature.find_first_of("}>;]", begin);
    return std::string(name) + " " + signature.substr(begin, end + 1 - begin);
}

/* Arguments are copied now, as a launch does: the kernel runs when the stream gets to it. */
template <class... Parameters, class... Arguments>
cudaError_t launch(const char *name, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t dynamic_bytes,
                   cudaStream_t stream, Arguments &&...arguments)
{
    std::tuple<Parameters...> values(std::forward<Arguments>(arguments)...);
    return start(name_with_types<Parameters...>(name), reinterpret_cast<const void *>(kernel), grid, block,
                 dynamic_bytes, stream, [kernel, values] { std::apply(kernel, values); });
}

template <class T> T shuffle(unsigned mask, T value, int lane, int line)
{
    static_assert(sizeof(T) <= sizeof(uint64_t) && std::is_trivially_copyable<T>::value, "not a shuffle's type");
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof value);
    bits = exchange(mask, bits, lane, line);
    memcpy(&value, &bits, sizeof value);
    return value;
}

inline int lane()
{
    const dim3 &size = block_size();
    const uint3 &index = thread_index();
    return (int)((index.x + size.x * (index.y + size.y * index.z)) % 32);
}

} // namespace emulator

#define threadIdx (emulator::thread_index())
#define blockIdx (emulator::block_index())
#define blockDim (emulator::block_size())
#define gridDim (emulator::grid_size())

inline void __syncthreads(int line = __builtin_LINE())
{
    emulator::barrier(line);
}

inline void __syncwarp(unsigned mask = 0xffffffffu, int line = __builtin_LINE())
{
    emulator::warp_barrier(mask, line);
}

template <class T> T __shfl_xor_sync(unsigned mask, T value, int bits, int line = __builtin_LINE())
{
    return emulator::shuffle(mask, value, emulator::lane() ^ bits, line);
}

template <class T> T __shfl_down_sync(unsigned mask, T value, unsigned distance, int line = __builtin_LINE())
{
    const int from = emulator::lane() + (int)distance;
    return emulator::shuffle(mask, value, from < 32 ? from : emulator::lane(), line);
}

/* Threads never run at the same time, so reading and writing is atomic; ThreadSanitizer is told that it is meant so. */
inline float atomicAdd(float *address, float value)
{
    float before, after;
    __atomic_load(address, &before, __ATOMIC_RELAXED);
    after = before + value;
    __atomic_store(address, &after, __ATOMIC_RELAXED);
    return before;
}

#define GD_LAUNCH(kernel, grid, block, dynamic_bytes, stream, ...) \
    emulator::launch(#kernel, kernel, grid, block, dynamic_bytes, stream, __VA_ARGS__)

/* Arrays from the heap: the sanitizers know where those end. */
#define GD_SHARED(type, name, dims) \
    static const char name##_key = 0; \
    using name##_array = type dims; \
    name##_array &name = *static_cast<name##_array *>(emulator::shared_memory(&name##_key, sizeof(name##_array)))

#define GD_DYNAMIC_SHARED(type, name) type *const name = static_cast<type *>(emulator::dynamic_shared_memory())

#endif
