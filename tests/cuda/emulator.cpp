/*
 * emulator.cpp - fibers and their schedule. Compiled without sanitizers, so that they see the kernels' accesses only;
 * EMULATOR_ASAN and EMULATOR_TSAN tell it which one to inform of its fibers.
 */
#include "emulator.h"
#include "emulator_state.h"

#include <map>
#include <numeric>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <vector>

#ifdef EMULATOR_ASAN
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef EMULATOR_TSAN
#include <sanitizer/tsan_interface.h>
extern "C" void AnnotateIgnoreWritesBegin(const char *file, int line);
extern "C" void AnnotateIgnoreWritesEnd(const char *file, int line);
#endif
#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace emulator {
namespace {

constexpr int max_threads = 1024, warp_size = 32;
constexpr size_t stack_bytes = 256 * 1024;

enum class state : uint8_t { ready, at_barrier, at_warp_barrier, done };

struct fiber {
#ifdef __x86_64__
    void *stack_pointer;
#else
    ucontext_t registers;
#endif
    char *stack;
    int number;
    uint3 index;
    state now;
    int line;      /* where it waits */
    unsigned mask; /* of the lanes that it waits for */
    uint64_t value, seen; /* what a shuffle publishes, and what it reads */
    int from;             /* lane */
    unsigned barriers, warp_barriers;
    void *asan_stack, *tsan_fiber;
};

/* A block's fibers and shared arrays. Neighbouring blocks get different ones, so that ThreadSanitizer does not take
 * one's end for something that the other waits for. */
struct room {
    fiber fibers[max_threads];
    std::map<const void *, std::pair<char *, size_t>> arrays;
    char *dynamic;
    unsigned blocks; /* that ran in it */
#ifdef EMULATOR_TSAN
    char end[2], barrier[2], warp_barrier[max_threads / warp_size][2];
#endif
};

room rooms[2];
room *here;       /* the running block's */
fiber *current;   /* the running thread */
int count;        /* of the block's threads */
dim3 grid, block;
uint3 block_at;
size_t dynamic_size, limit;
std::string kernel_name;
const std::function<void()> *body;

#ifdef __x86_64__
void *scheduler_stack_pointer;
#else
ucontext_t scheduler_registers;
#endif
#ifdef EMULATOR_ASAN
void *scheduler_asan_stack;
const void *scheduler_stack;
size_t scheduler_stack_bytes;
#endif
#ifdef EMULATOR_TSAN
void *scheduler_tsan_fiber;
char launch_begin, launch_end;
#endif

/* ---- Schedules ------------------------------------------------------------------------------------------ */

enum schedule { forward, reverse, random_order, num_schedules };
const char *const schedule_names[] = {"forward", "reverse", "random"};
int rotations;
uint32_t random_state;
std::map<std::string, std::vector<long>> launches; /* kernel -> in each schedule */

int get_schedule()
{
    const std::string &name = get_settings().schedule;
    for (int i = 0; i < num_schedules; i++)
        if (name == schedule_names[i])
            return i;
    return rotations % num_schedules;
}

uint32_t random_number()
{
    if (random_state == 0)
        random_state = get_settings().seed * 2654435769u | 1;
    random_state ^= random_state << 13;
    random_state ^= random_state >> 17;
    random_state ^= random_state << 5;
    return random_state;
}

/* ---- Fibers --------------------------------------------------------------------------------------------- */

#ifdef __x86_64__
/* Keeps what the calling convention says a function must keep, and goes on where `to` was left. */
extern "C" void emulator_switch(void **from, void *to);
__asm__(".text\n.type emulator_switch,@function\nemulator_switch:\n"
        "pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\n"
        "movq %rsp,(%rdi)\nmovq %rsi,%rsp\n"
        "popq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\nret\n");
#endif

void to_scheduler()
{
    fiber *self = current;
#ifdef EMULATOR_ASAN
    __sanitizer_start_switch_fiber(&self->asan_stack, scheduler_stack, scheduler_stack_bytes);
#endif
#ifdef EMULATOR_TSAN
    __tsan_switch_to_fiber(scheduler_tsan_fiber, __tsan_switch_to_fiber_no_sync);
#endif
#ifdef __x86_64__
    emulator_switch(&self->stack_pointer, scheduler_stack_pointer);
#else
    swapcontext(&self->registers, &scheduler_registers);
#endif
#ifdef EMULATOR_ASAN
    __sanitizer_finish_switch_fiber(self->asan_stack, &scheduler_stack, &scheduler_stack_bytes);
#endif
}

void to_fiber(fiber *next)
{
    current = next;
#ifdef EMULATOR_ASAN
    __sanitizer_start_switch_fiber(&scheduler_asan_stack, next->stack, stack_bytes);
#endif
#ifdef EMULATOR_TSAN
    __tsan_switch_to_fiber(next->tsan_fiber, __tsan_switch_to_fiber_no_sync);
#endif
#ifdef __x86_64__
    emulator_switch(&scheduler_stack_pointer, next->stack_pointer);
#else
    swapcontext(&scheduler_registers, &next->registers);
#endif
#ifdef EMULATOR_ASAN
    __sanitizer_finish_switch_fiber(scheduler_asan_stack, nullptr, nullptr);
#endif
}

/* A fiber's whole life: the same thread of one block after the other. */
void live()
{
#ifdef EMULATOR_ASAN
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
#endif
    for (;;) {
#ifdef EMULATOR_TSAN
        __tsan_acquire(&launch_begin);
        __tsan_acquire(&here->end[(here->blocks - 1) & 1]);
#endif
        (*body)();
#ifdef EMULATOR_TSAN
        __tsan_release(&here->end[here->blocks & 1]);
        __tsan_release(&launch_end);
#endif
        current->now = state::done;
        to_scheduler();
    }
}

void make_fiber(fiber *made)
{
    made->stack = static_cast<char *>(
        mmap(nullptr, stack_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (made->stack == MAP_FAILED) {
        fputs("emulator: out of memory\n", stderr);
        abort();
    }
    mprotect(made->stack, 4096, PROT_NONE); /* where it would overflow */
#ifdef __x86_64__
    void **top = reinterpret_cast<void **>(made->stack + stack_bytes);
    *--top = nullptr; /* live() starts with the stack as a call leaves it */
    *--top = reinterpret_cast<void *>(live);
    for (int i = 0; i < 6; i++)
        *--top = nullptr;
    made->stack_pointer = top;
#else
    getcontext(&made->registers);
    made->registers.uc_stack.ss_sp = made->stack;
    made->registers.uc_stack.ss_size = stack_bytes;
    made->registers.uc_link = nullptr;
    makecontext(&made->registers, live, 0);
#endif
#ifdef EMULATOR_TSAN
    made->tsan_fiber = __tsan_create_fiber(0);
#endif
}

/* ---- Faults --------------------------------------------------------------------------------------------- */

template <class... Values> void fault(const char *format, Values... values)
{
    char text[256], message[512];
    snprintf(text, sizeof text, format, values...);
    snprintf(message, sizeof message, "%s, block (%u, %u, %u): %s", kernel_name.c_str(), block_at.x, block_at.y,
             block_at.z, text);
    set_fault(message);
}

/* The running thread does not go on. */
template <class... Values> void fault_here(const char *format, Values... values)
{
    fault(format, values...);
    for (;;)
        to_scheduler();
}

/* ---- A block -------------------------------------------------------------------------------------------- */

/* NaN in every float. Not memset(), which ThreadSanitizer would take for an access of the program's. */
void spoil(char *memory, size_t bytes)
{
    volatile char *to = memory;
    for (size_t i = 0; i < bytes; i++)
        to[i] = (char)0xff;
}

/* Lets the block's threads go on if all of them wait at the same barrier. */
bool pass_barrier()
{
    int waiting = 0, done = 0, line = 0;
    for (int i = 0; i < count; i++) {
        const fiber &f = here->fibers[i];
        done += f.now == state::done;
        if (f.now != state::at_barrier)
            continue;
        if (waiting++ > 0 && f.line != line) {
            fault("threads wait at __syncthreads() in line %d and in line %d", line, f.line);
            return false;
        }
        line = f.line;
    }
    if (waiting == 0 || waiting + done < count)
        return false;
    if (done > 0) {
        fault("%d of %d threads have ended and don't reach __syncthreads() in line %d", done, count, line);
        return false;
    }
    for (int i = 0; i < count; i++)
        here->fibers[i].now = state::ready;
    return true;
}

/* Do all lanes that this one waits for wait for each other? */
bool complete(const fiber &waiting)
{
    const int first = waiting.number / warp_size * warp_size;
    bool all = true;
    for (int lane = 0; lane < warp_size; lane++) {
        if (!(waiting.mask >> lane & 1))
            continue;
        if (first + lane >= count || here->fibers[first + lane].now == state::done) {
            fault("line %d: the mask names lane %d, which has ended or does not exist", waiting.line, lane);
            return false;
        }
        const fiber &other = here->fibers[first + lane];
        all = all && other.now == state::at_warp_barrier && other.mask == waiting.mask && other.line == waiting.line;
    }
    return all;
}

bool pass_warp_barriers()
{
    bool passed = false;
    for (int i = 0; i < count && get_fault().empty(); i++) {
        const fiber &waiting = here->fibers[i];
        if (waiting.now != state::at_warp_barrier || !complete(waiting))
            continue;
        const unsigned mask = waiting.mask;
        fiber *warp = &here->fibers[i / warp_size * warp_size];
        for (int lane = 0; lane < warp_size; lane++)
            if (mask >> lane & 1) {
                warp[lane].seen = warp[warp[lane].from].value;
                warp[lane].now = state::ready;
            }
        passed = true;
    }
    return passed;
}

void run_block(int schedule)
{
    static int order[max_threads];
    spoil(here->dynamic, dynamic_size);
    for (auto &array : here->arrays)
        spoil(array.second.first, array.second.second);
    for (int i = 0; i < count; i++) {
        fiber &f = here->fibers[i];
        f.now = state::ready;
        f.barriers = f.warp_barriers = 0;
        f.index = uint3{(unsigned)i % block.x, (unsigned)i / block.x % block.y, (unsigned)i / (block.x * block.y)};
        order[i] = schedule == reverse ? count - 1 - i : i;
    }
    for (int done = 0; done < count;) {
        for (int i = count - 1; schedule == random_order && i > 0; i--)
            std::swap(order[i], order[random_number() % (unsigned)(i + 1)]);
        bool moved = false;
        done = 0;
        for (int i = 0; i < count; i++) {
            fiber &f = here->fibers[order[i]];
            if (f.now == state::ready) {
                to_fiber(&f);
                moved = true;
            }
            if (!get_fault().empty())
                return;
            done += f.now == state::done;
        }
        moved = pass_barrier() || moved;
        moved = pass_warp_barriers() || moved;
        if (!get_fault().empty())
            return;
        if (!moved && done < count) {
            fault("%d of %d threads wait for each other at different barriers", count - done, count);
            return;
        }
    }
    here->blocks++;
}

} // namespace

/* ---- What kernels call ---------------------------------------------------------------------------------- */

const uint3 &thread_index() { return current->index; }
const uint3 &block_index() { return block_at; }
const dim3 &block_size() { return block; }
const dim3 &grid_size() { return grid; }
void *dynamic_shared_memory() { return here->dynamic; }

void *shared_memory(const void *key, size_t bytes)
{
    auto &array = here->arrays[key];
    if (array.first == nullptr) {
#ifdef EMULATOR_TSAN
        AnnotateIgnoreWritesBegin(__FILE__, __LINE__); /* malloc() would be this thread's access */
#endif
        array = {static_cast<char *>(malloc(bytes)), bytes};
#ifdef EMULATOR_TSAN
        AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
#endif
        spoil(array.first, bytes);
        size_t total = dynamic_size;
        for (const auto &other : here->arrays)
            total += other.second.second;
        if (total > limit)
            fault_here("%zu bytes of shared memory, of which %zu are allowed", total, limit);
    }
    return array.first;
}

void barrier(int line)
{
    fiber *self = current;
#ifdef EMULATOR_TSAN
    char *token = &here->barrier[self->barriers++ & 1];
    __tsan_release(token);
#endif
    self->line = line;
    self->now = state::at_barrier;
    to_scheduler();
#ifdef EMULATOR_TSAN
    __tsan_acquire(token);
#endif
}

namespace {

void wait_for_lanes(unsigned mask, int line)
{
    fiber *self = current;
    if (!(mask >> self->number % warp_size & 1))
        fault_here("line %d: lane %d is not in its mask %08x", line, self->number % warp_size, mask);
    self->mask = mask;
    self->line = line;
    self->now = state::at_warp_barrier;
    to_scheduler();
}

} // namespace

void warp_barrier(unsigned mask, int line)
{
    fiber *self = current;
#ifdef EMULATOR_TSAN
    char *token = &here->warp_barrier[self->number / warp_size][self->warp_barriers++ & 1];
    __tsan_release(token);
#endif
    self->from = self->number % warp_size;
    wait_for_lanes(mask, line);
#ifdef EMULATOR_TSAN
    __tsan_acquire(token);
#endif
}

uint64_t exchange(unsigned mask, uint64_t value, int lane, int line)
{
    fiber *self = current;
    if (lane < 0 || lane >= warp_size || !(mask >> lane & 1))
        fault_here("line %d: a shuffle reads lane %d, which its mask %08x does not name", line, lane, mask);
    self->value = value;
    self->from = lane;
    wait_for_lanes(mask, line);
    return self->seen;
}

/* ---- What the runtime calls ----------------------------------------------------------------------------- */

void next_schedule() { rotations++; }

std::string report_launches()
{
    std::string text;
    for (const auto &entry : launches) {
        text += entry.first + ":";
        for (int i = 0; i < num_schedules; i++)
            text += std::string(" ") + schedule_names[i] + " " + std::to_string(entry.second[(size_t)i]);
        text += "\n";
    }
    return text;
}

void run_kernel(const std::string &name, dim3 grid_of, dim3 block_of, size_t dynamic_bytes, size_t shared_limit,
                const std::function<void()> &kernel)
{
    const int schedule = get_schedule();
    kernel_name = name;
    body = &kernel;
    grid = grid_of;
    block = block_of;
    count = (int)(block.x * block.y * block.z);
    dynamic_size = dynamic_bytes;
    limit = shared_limit;
    auto &ran = launches[name];
    ran.resize(num_schedules);
    ran[(size_t)schedule]++;
    for (room &r : rooms) {
        r.dynamic = static_cast<char *>(malloc(dynamic_bytes > 0 ? dynamic_bytes : 1));
        for (int i = 0; i < count; i++) {
            r.fibers[i].number = i;
            if (r.fibers[i].stack == nullptr)
                make_fiber(&r.fibers[i]);
        }
    }
#ifdef EMULATOR_TSAN
    scheduler_tsan_fiber = __tsan_get_current_fiber();
    __tsan_release(&launch_begin);
#endif
    const uint64_t blocks = (uint64_t)grid.x * grid.y * grid.z;
    uint64_t step = 1, at = 0; /* a random order: steps of a length that shares no factor with the number */
    if (schedule == random_order && blocks > 1)
        do
            step = random_number() % blocks;
        while (std::gcd(step, blocks) != 1);
    for (uint64_t i = 0; i < blocks && get_fault().empty(); i++, at = (at + step) % blocks) {
        const uint64_t number = schedule == reverse ? blocks - 1 - i : at;
        block_at = uint3{(unsigned)(number % grid.x), (unsigned)(number / grid.x % grid.y),
                         (unsigned)(number / grid.x / grid.y)};
        here = &rooms[i & 1];
        run_block(schedule);
    }
#ifdef EMULATOR_TSAN
    __tsan_acquire(&launch_end);
#endif
    for (room &r : rooms) {
        free(r.dynamic);
        for (auto &array : r.arrays)
            free(array.second.first);
        r.arrays.clear();
    }
}

} // namespace emulator
