/*
 * runtime.cpp - a stand-in for CUDA's runtime. Device memory is host memory that only the device's work and copies
 * may touch; a stream runs its work when somebody waits for it, so that nothing is there too early; copies, launches
 * and streams are checked as a driver would, and fail on demand (emulator_state.h).
 */
#include "emulator.h"
#include "emulator_state.h"

#include <deque>
#include <map>
#include <mutex>
#include <set>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <vector>

#ifdef EMULATOR_ASAN
#include <sanitizer/asan_interface.h>
#endif

#define EXPORTED extern "C" __attribute__((visibility("default")))

namespace emulator {
namespace {

constexpr size_t page = 4096, alignment = 256, default_shared = 48 * 1024, most_shared = 64 * 1024;

struct allocation {
    size_t bytes;
    char *mapping;
    size_t mapped;
    int device;
};

struct stream {
    emulated_stream shown;
    int device;
    std::deque<std::function<void()>> work;
};

std::recursive_mutex mutex;
std::map<char *, allocation> memory;
std::set<stream *> streams;
std::map<const void *, size_t> dynamic_limits; /* kernel -> bytes that were asked for */
std::string fault;
int mallocs, launches;
thread_local int current_device;
thread_local cudaError_t last_error;

cudaError_t fail(cudaError_t error)
{
    return last_error = error;
}

/* A kernel's fault stays, as a broken context does. */
cudaError_t broken()
{
    return fault.empty() ? cudaSuccess : fail(cudaErrorLaunchFailure);
}

/* ---- Settings ------------------------------------------------------------------------------------------- */

void set(settings *s, const std::string &key, const std::string &value)
{
    if (key == "schedule")
        s->schedule = value;
    else if (key == "report")
        s->report = value;
    else if (key == "seed")
        s->seed = (uint32_t)atoi(value.c_str());
    else if (key == "driver")
        s->driver = atoi(value.c_str());
    else if (key == "devices")
        s->devices = atoi(value.c_str());
    else if (key == "capability")
        s->capability = atoi(value.c_str());
    else if (key == "fail_malloc")
        s->fail_malloc = atoi(value.c_str());
    else if (key == "fail_launch")
        s->fail_launch = atoi(value.c_str());
    else if (key != "fail_gemm") { /* cublas.c's */
        fprintf(stderr, "GD_EMULATOR: what is %s?\n", key.c_str());
        exit(2);
    }
}

settings read_settings()
{
    settings s;
    const char *variable = getenv("GD_EMULATOR");
    std::string text = variable ? variable : "";
    while (!text.empty()) {
        const size_t end = text.find(','), equals = text.find('=');
        const std::string item = text.substr(0, end);
        set(&s, item.substr(0, equals), equals < item.size() ? item.substr(equals + 1) : "");
        text = end == std::string::npos ? "" : text.substr(end + 1);
    }
    return s;
}

/* ---- Device memory -------------------------------------------------------------------------------------- */

void allow_access(const std::pair<char *const, allocation> &entry, bool allowed)
{
#ifdef EMULATOR_ASAN
    if (allowed)
        __asan_unpoison_memory_region(entry.first, entry.second.bytes);
    else
        __asan_poison_memory_region(entry.first, entry.second.bytes);
#else
    mprotect(entry.second.mapping + page, entry.second.mapped - 2 * page,
             allowed ? PROT_READ | PROT_WRITE : PROT_NONE);
#endif
}

/* While one of these lives, device memory can be touched. */
struct access {
    access()
    {
        if (depth++ == 0)
            for (const auto &entry : memory)
                allow_access(entry, true);
    }
    ~access()
    {
        if (--depth == 0)
            for (const auto &entry : memory)
                allow_access(entry, false);
    }
    static int depth;
};
int access::depth;

/* Ends at an inaccessible page, as far as the alignment lets it; NaN in every float. */
char *take(size_t bytes, allocation *a)
{
#ifdef EMULATOR_ASAN
    void *taken;
    if (posix_memalign(&taken, alignment, bytes) != 0)
        return nullptr;
    a->mapping = static_cast<char *>(taken);
    char *start = a->mapping;
#else
    const size_t pages = (bytes + page - 1) / page * page;
    a->mapped = pages + 2 * page;
    void *taken = mmap(nullptr, a->mapped, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (taken == MAP_FAILED)
        return nullptr;
    a->mapping = static_cast<char *>(taken);
    mprotect(a->mapping + page, pages, PROT_READ | PROT_WRITE);
    char *start = a->mapping + page + (pages - bytes) / alignment * alignment;
#endif
    a->bytes = bytes;
    a->device = current_device;
    memset(start, 0xff, bytes);
    return start;
}

void give_back(char *start, const allocation &a)
{
#ifdef EMULATOR_ASAN
    __asan_unpoison_memory_region(start, a.bytes);
    free(start);
#else
    (void)start;
    munmap(a.mapping, a.mapped);
#endif
}

bool holds(const void *start, size_t bytes, int device)
{
    char *const at = static_cast<char *>(const_cast<void *>(start));
    auto next = memory.upper_bound(at);
    if (next == memory.begin())
        return false;
    const auto &entry = *--next;
    return entry.second.device == device && bytes <= entry.second.bytes &&
           (size_t)(at - entry.first) <= entry.second.bytes - bytes;
}

bool is_device_memory(const void *at)
{
    for (const auto &entry : memory)
        if (at >= entry.first && at < entry.first + entry.second.bytes)
            return true;
    return false;
}

/* ---- Streams -------------------------------------------------------------------------------------------- */

stream *open_stream(cudaStream_t handle)
{
    stream *s = reinterpret_cast<stream *>(handle);
    return streams.count(s) > 0 && s->device == current_device ? s : nullptr;
}

void drain(stream *s)
{
    access now;
    while (!s->work.empty()) {
        const std::function<void()> task = std::move(s->work.front());
        s->work.pop_front();
        if (fault.empty())
            task();
    }
}

void enqueue(emulated_stream *shown, void (*task)(void *), void *argument)
{
    std::lock_guard<std::recursive_mutex> lock(mutex);
    reinterpret_cast<stream *>(shown)->work.push_back([task, argument] { task(argument); });
}

int stream_holds(emulated_stream *shown, const void *at, size_t bytes)
{
    std::lock_guard<std::recursive_mutex> lock(mutex);
    return holds(at, bytes, reinterpret_cast<stream *>(shown)->device);
}

/* ---- The report ----------------------------------------------------------------------------------------- */

struct reporter {
    reporter() { get_settings(); } /* which then outlive it */
    ~reporter()
    {
        const std::string &path = get_settings().report;
        FILE *file = path.empty() ? nullptr : fopen(path.c_str(), "w");
        if (file == nullptr)
            return;
        fprintf(file, "%sleft: memory %zu streams %zu\n", report_launches().c_str(), memory.size(), streams.size());
        fclose(file);
    }
} at_exit;

} // namespace

const settings &get_settings()
{
    static const settings kept = read_settings();
    return kept;
}

const std::string &get_fault() { return fault; }

void set_fault(const std::string &message)
{
    if (!fault.empty())
        return;
    fault = message;
    fprintf(stderr, "emulator: %s\n", message.c_str());
}

cudaError_t start(const std::string &name, const void *kernel, dim3 grid, dim3 block, size_t dynamic_bytes,
                  cudaStream_t handle, std::function<void()> body)
{
    std::lock_guard<std::recursive_mutex> lock(mutex);
    if (broken() != cudaSuccess)
        return last_error;
    stream *s = open_stream(handle);
    if (s == nullptr)
        return fail(cudaErrorInvalidResourceHandle);
    const uint64_t threads = (uint64_t)block.x * block.y * block.z, blocks = (uint64_t)grid.x * grid.y * grid.z;
    if (threads == 0 || threads > 1024 || block.z > 64 || blocks == 0 || grid.x > 0x7fffffffu || grid.y > 65535 ||
        grid.z > 65535)
        return fail(cudaErrorInvalidConfiguration);
    const auto asked = dynamic_limits.find(kernel);
    const size_t limit = asked == dynamic_limits.end() ? default_shared : std::max(default_shared, asked->second);
    if (dynamic_bytes > limit || ++launches == get_settings().fail_launch)
        return fail(cudaErrorInvalidValue);
    s->work.push_back([=] { run_kernel(name, grid, block, dynamic_bytes, limit, body); });
    return cudaSuccess;
}

} // namespace emulator

using namespace emulator;

/* ---- What cuda_runtime_api.h declares -------------------------------------------------------------------- */

EXPORTED cudaError_t cudaDriverGetVersion(int *version)
{
    *version = get_settings().driver;
    return cudaSuccess;
}

EXPORTED cudaError_t cudaGetDeviceCount(int *number)
{
    if (get_settings().driver < CUDART_VERSION / 1000 * 1000)
        return fail(cudaErrorInsufficientDriver);
    *number = get_settings().devices;
    return *number > 0 ? cudaSuccess : fail(cudaErrorNoDevice);
}

EXPORTED cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device)
{
    if (device < 0 || device >= get_settings().devices)
        return fail(cudaErrorInvalidDevice);
    const int capability = get_settings().capability;
    *value = attribute == cudaDevAttrComputeCapabilityMajor ? capability / 10 : capability % 10;
    return cudaSuccess;
}

EXPORTED cudaError_t cudaSetDevice(int device)
{
    if (device < 0 || device >= get_settings().devices)
        return fail(cudaErrorInvalidDevice);
    current_device = device;
    return broken();
}

EXPORTED cudaError_t cudaGetLastError(void)
{
    const cudaError_t error = last_error;
    last_error = cudaSuccess;
    return error;
}

EXPORTED const char *cudaGetErrorString(cudaError_t error)
{
    static const std::map<int, const char *> texts = {
        {cudaSuccess, "no error"}, {cudaErrorInvalidValue, "invalid argument"},
        {cudaErrorMemoryAllocation, "out of memory"}, {cudaErrorInvalidConfiguration, "invalid configuration argument"},
        {cudaErrorInsufficientDriver, "CUDA driver version is insufficient for CUDA runtime version"},
        {cudaErrorNoDevice, "no CUDA-capable device is detected"}, {cudaErrorInvalidDevice, "invalid device ordinal"},
        {cudaErrorInvalidResourceHandle, "invalid resource handle"},
    };
    if (error == cudaErrorLaunchFailure)
        return fault.c_str();
    const auto text = texts.find(error);
    return text == texts.end() ? "unrecognized error code" : text->second;
}

EXPORTED cudaError_t cudaStreamCreateWithFlags(cudaStream_t *handle, unsigned int flags)
{
    std::lock_guard<std::recursive_mutex> lock(mutex);
    if (flags != cudaStreamNonBlocking)
        return fail(cudaErrorInvalidValue);
    stream *s = new stream{{enqueue, stream_holds}, current_device, {}};
    streams.insert(s);
    *handle = reinterpret_cast<cudaStream_t>(s);
    return cudaSuccess;
}

EXPORTED cudaError_t cudaStreamDestroy(cudaStream_t handle)
{
    std::lock_guard<std::recursive_mutex> lock(mutex);
    stream *s = open_stream(handle);
    if (s == nullptr)
        return fail(cudaErrorInvalidResourceHandle);
    drain(s);
    streams.erase(s);
    delete s;
    return broken();
}

EXPORTED cudaError_t cudaStreamSynchronize(cudaStream_t handle)
{
    std::lock_guard<std::recursive_mutex> lock(mutex);
    stream *s = open_stream(handle);
    if (s == nullptr)
        return fail(cudaErrorInvalidResourceHandle);
    if (!s->work.empty()) {
        drain(s);
        next_schedule();
    }
    return broken();
}

EXPORTED cudaError_t cudaMalloc(void **start, size_t bytes)
{
    std::lock_guard<std::recursive_mutex> lock(mutex);
    if (broken() != cudaSuccess)
        return last_error;
    allocation a = {};
    char *taken = ++mallocs == get_settings().fail_malloc ? nullptr : take(bytes, &a);
    if (taken == nullptr)
        return fail(cudaErrorMemoryAllocation);
    allow_access(*memory.emplace(taken, a).first, false);
    *start = taken;
    return cudaSuccess;
}

EXPORTED cudaError_t cudaFree(void *start)
{
    std::lock_guard<std::recursive_mutex> lock(mutex);
    if (start == nullptr)
        return broken();
    const auto found = memory.find(static_cast<char *>(start));
    if (found == memory.end())
        return fail(cudaErrorInvalidValue);
    for (stream *s : streams)
        drain(s);
    give_back(found->first, found->second);
    memory.erase(found);
    return broken();
}

/* An open stream of a device that works, or null, and the error is the last one. */
static stream *working_stream(cudaStream_t handle)
{
    stream *s = open_stream(handle);
    if (broken() != cudaSuccess)
        return nullptr;
    if (s == nullptr)
        fail(cudaErrorInvalidResourceHandle);
    return s;
}

/* Host memory is pageable: it is read at once, and written before the call returns. */
EXPORTED cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind,
                                     cudaStream_t handle)
{
    std::lock_guard<std::recursive_mutex> lock(mutex);
    stream *s = working_stream(handle);
    if (s == nullptr)
        return last_error;
    const bool up = kind == cudaMemcpyHostToDevice;
    if (!holds(up ? to : from, bytes, s->device) || is_device_memory(up ? from : to))
        return fail(cudaErrorInvalidValue);
    if (up) {
        const char *bytes_from = static_cast<const char *>(from);
        std::vector<char> staged(bytes_from, bytes_from + bytes);
        s->work.push_back([to, staged] { memcpy(to, staged.data(), staged.size()); });
        return cudaSuccess;
    }
    access now;
    drain(s);
    if (broken() == cudaSuccess)
        memcpy(to, from, bytes);
    return broken();
}

EXPORTED cudaError_t cudaMemset2DAsync(void *to, size_t pitch, int value, size_t width, size_t height,
                                       cudaStream_t handle)
{
    std::lock_guard<std::recursive_mutex> lock(mutex);
    stream *s = working_stream(handle);
    if (s == nullptr)
        return last_error;
    if (pitch < width || (height > 0 && !holds(to, (height - 1) * pitch + width, s->device)))
        return fail(cudaErrorInvalidValue);
    s->work.push_back([=] {
        for (size_t row = 0; row < height; row++)
            memset(static_cast<char *>(to) + row * pitch, value, width);
    });
    return cudaSuccess;
}

EXPORTED cudaError_t cudaMemsetAsync(void *to, int value, size_t bytes, cudaStream_t handle)
{
    return cudaMemset2DAsync(to, bytes, value, bytes, 1, handle);
}

EXPORTED cudaError_t cudaFuncSetAttribute(const void *kernel, enum cudaFuncAttribute attribute, int value)
{
    std::lock_guard<std::recursive_mutex> lock(mutex);
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0 || (size_t)value > most_shared)
        return fail(cudaErrorInvalidValue);
    dynamic_limits[kernel] = (size_t)value;
    return cudaSuccess;
}
