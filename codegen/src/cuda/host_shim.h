// A stand-in for the CUDA device language, so that a C++ compiler for a CPU takes kernel text as it is.
//
// By default a block is one thread, a plain call. Otherwise its threads are fibers that take turns at barriers and
// shuffles, in ascending, descending or a mixed order (order 0, 1 or another number, the seed), so that results that
// depend on the order of threads show. Shared memory starts as NaN in every block; threads that do not all
// reach a barrier, and lanes that do not all take part in a shuffle, are an error.
#include <csetjmp>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ucontext.h>
#include <utility>
#include <vector>

// Without a name, so that what several libraries of one process have is not taken for the same.
namespace {
namespace shim {
struct Dim3 { unsigned x, y, z; };
enum State { RUNNING, AT_BARRIER, AT_SHUFFLE, ENDED };
struct Fiber {
    std::vector<char> stack;
    jmp_buf place;
    bool started;
    State state;
    unsigned long long sent;
};
static thread_local Dim3 thread_index, block_index, block_extent, grid_extent;
static thread_local std::vector<Fiber> fibers;
static thread_local jmp_buf scheduler;
static thread_local unsigned current;
static thread_local void (*entry)(void **);
static thread_local void **entry_arguments;
static thread_local std::vector<unsigned char> dynamic;
static thread_local std::vector<unsigned char> fixed;
static thread_local const char *fault;

// Fibers are entered by way of contexts once, and change by jumps from then on, which cost no system call.
inline void pause(State why) {
    fibers[current].state = why;
    if (_setjmp(fibers[current].place) == 0) _longjmp(scheduler, 1);
}
inline void barrier() {
    if (block_extent.x > 1) pause(AT_BARRIER);
}
template <class T> T shuffle(T x, int mask) {
    static_assert(sizeof(T) <= 8, "a shuffle of a wide type");
    fibers[current].sent = 0;
    memcpy(&fibers[current].sent, &x, sizeof x);
    pause(AT_SHUFFLE);
    memcpy(&x, &fibers[current ^ (unsigned)mask].sent, sizeof x);
    // Nobody sends again before all have received.
    pause(AT_SHUFFLE);
    return x;
}
// A place for each shared array of the program text; all of a block lie in one piece of memory.
static size_t shared_bytes = 0;
inline size_t reserve(size_t bytes) {
    size_t at = shared_bytes;
    shared_bytes += (bytes + 15) / 16 * 16;
    return at;
}
inline void *at(size_t place) {
    if (fixed.size() < shared_bytes) { fprintf(stderr, "shared memory was reserved while a block ran\n"); abort(); }
    return fixed.data() + place;
}
template <class Tag, class T, size_t COUNT> struct Place { static const size_t offset; };
template <class Tag, class T, size_t COUNT> const size_t Place<Tag, T, COUNT>::offset = reserve(sizeof(T) * COUNT);
inline void run_fiber() {
    for (;;) {
        entry(entry_arguments);
        pause(ENDED);
    }
}
inline void resume(unsigned index) {
    current = index;
    thread_index = Dim3{index, 0, 0};
    if (_setjmp(scheduler) != 0) return;
    Fiber &fiber = fibers[index];
    if (fiber.started) _longjmp(fiber.place, 1);
    fiber.started = true;
    fiber.stack.resize(64 << 10);
    static thread_local ucontext_t first, here;
    getcontext(&first);
    first.uc_stack.ss_sp = fiber.stack.data();
    first.uc_stack.ss_size = fiber.stack.size();
    first.uc_link = nullptr;
    makecontext(&first, run_fiber, 0);
    swapcontext(&here, &first);
}
inline unsigned long long mix(unsigned long long x) {
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
    return x ^ (x >> 31);
}
// What became of the block is of no use to a next one.
inline bool fail(const char *why) {
    fault = why;
    fibers.clear();
    return false;
}
// Lets every thread that may go on go on until all wait at the same place, over and over.
inline bool run_block(unsigned long long seed) {
    unsigned count = block_extent.x;
    if (fibers.size() < count) fibers.resize(count);
    for (unsigned i = 0; i < count; i++) fibers[i].state = RUNNING;
    for (unsigned long long round = 0;; round++) {
        for (unsigned i = 0; i < count; i++) {
            unsigned turn = seed == 0 ? i : seed == 1 ? count - 1 - i : (unsigned)((i * 7919ULL + mix(seed + round)) % count);
            if (fibers[turn].state != RUNNING) continue;
            resume(turn);
        }
        unsigned ended = 0, barriers = 0;
        for (unsigned i = 0; i < count; i++) {
            ended += fibers[i].state == ENDED;
            barriers += fibers[i].state == AT_BARRIER;
        }
        if (ended == count) return true;
        if (barriers > 0 && barriers < count && barriers + ended == count) {
            return fail("some threads of a block reached a barrier, others ended");
        }
        bool moved = false;
        for (unsigned first = 0; first < count; first += 32) {
            unsigned last = first + 32 < count ? first + 32 : count, waiting = 0;
            for (unsigned i = first; i < last; i++) waiting += fibers[i].state == AT_SHUFFLE;
            if (waiting == 0 || waiting < last - first) continue;
            for (unsigned i = first; i < last; i++) fibers[i].state = RUNNING;
            moved = true;
        }
        if (!moved && barriers == count) {
            for (unsigned i = 0; i < count; i++) fibers[i].state = RUNNING;
            moved = true;
        }
        if (!moved) {
            return fail("some threads wait for others that never come");
        }
    }
}
template <class... A, size_t... I> void unpack(void (*kernel)(A...), void **arguments, std::index_sequence<I...>) {
    kernel(*static_cast<std::remove_reference_t<A> *>(arguments[I])...);
}
template <class... A> void call(void (*kernel)(A...), void **arguments) {
    unpack(kernel, arguments, std::index_sequence_for<A...>());
}
template <class... A> constexpr unsigned count(void (*)(A...)) { return sizeof...(A); }
struct Kernel { const char *name; void (*call)(void **); unsigned parameters; };
}  // namespace shim
}  // namespace

#define __device__
#define __global__
#define __forceinline__ inline
#define __restrict__ __restrict
#define __launch_bounds__(...)
#define UNROLL
#define threadIdx shim::thread_index
#define blockIdx shim::block_index
#define blockDim shim::block_extent
#define gridDim shim::grid_extent
#define __syncthreads shim::barrier
#define __shfl_xor_sync(mask, x, step) shim::shuffle(x, step)
#define SHARED(type, name, count) \
    struct Tag_##name; \
    type *name = static_cast<type *>(shim::at(shim::Place<Tag_##name, type, count>::offset))
#define DYNAMIC_SHARED(type, name) type *name = reinterpret_cast<type *>(shim::dynamic.data())
static inline float __int_as_float(int x) { float y; memcpy(&y, &x, sizeof y); return y; }
static inline int __float_as_int(float x) { int y; memcpy(&y, &x, sizeof y); return y; }
static inline long long __double_as_longlong(double x) { long long y; memcpy(&y, &x, sizeof y); return y; }
