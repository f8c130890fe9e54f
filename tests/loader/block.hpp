// Runs the kernels of the packed layout on a CPU: each thread of a block, or of a cluster of blocks, is a coroutine that runs until
// it meets its warp, its block or the cluster. Put before the kernel's source. Threads of a warp that meet at different operations
// end the program.

#define EMULATED
#ifndef STAGES
#define STAGES 2
#endif

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(threads)
#define __shared__ static

struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct Place {
    unsigned x, y;
};

Place threadIdx, blockIdx, gridDim;

namespace block {

const int MOST = 1024;
enum Meeting { ENDED, WARP, WARP_PRODUCT, BLOCK, CLUSTER };

struct Slot {
    int number;
    float value;
    unsigned weights[4], low, high;
};

int current, size;      // the running thread, and the threads of a block; a cluster's blocks lie behind one another
ucontext_t scheduler, contexts[MOST];
char stacks[MOST][1 << 16];
Meeting waits[MOST];
int parity[MOST];
Slot slots[2][MOST];

struct Copy {
    uint4* to;
    const void* from;
    bool present;
    int group;
};
std::vector<Copy> copies[MOST];
int groups[MOST];

void finish(const Copy& copy) {
    if (copy.present)
        std::memcpy(copy.to, copy.from, 16);
    else
        std::memset(copy.to, 0, 16);
}

void meet(Meeting kind) {
    int thread = current;
    waits[thread] = kind;
    swapcontext(&contexts[thread], &scheduler);
}

void resume(int thread, bool in_cluster) {
    current = thread;
    threadIdx.x = thread % size;
    if (in_cluster) blockIdx.y = thread / size;
    waits[thread] = ENDED;
    swapcontext(&scheduler, &contexts[thread]);
}

// blocks: of a cluster; 0 for a block without one.
void run(int threads, void (*body)(), int blocks = 0) {
    const bool in_cluster = blocks > 0;
    const int all = in_cluster ? threads * blocks : threads;
    if (all > MOST) std::abort();
    size = threads;
    for (int thread = 0; thread < all; ++thread) {
        getcontext(&contexts[thread]);
        contexts[thread].uc_stack.ss_sp = stacks[thread];
        contexts[thread].uc_stack.ss_size = sizeof stacks[thread];
        contexts[thread].uc_link = &scheduler;
        makecontext(&contexts[thread], body, 0);
        parity[thread] = groups[thread] = 0;
        copies[thread].clear();
        resume(thread, in_cluster);
    }
    for (bool alive = true; alive;) {
        alive = false;
        bool all_at_cluster = true;
        for (int start = 0; start < all; start += threads) {
            bool all_at_barrier = true;
            for (int first = start; first < start + threads; first += 32) {
                for (int lane = 1; lane < 32; ++lane)
                    if (waits[first + lane] != waits[first]) {
                        std::fprintf(stderr, "threads of a warp meet at different operations\n");
                        std::abort();
                    }
                if (waits[first] == WARP || waits[first] == WARP_PRODUCT) {
                    for (int lane = 0; lane < 32; ++lane) resume(first + lane, in_cluster);
                    all_at_barrier = all_at_cluster = false;
                }
                all_at_barrier &= waits[first] == BLOCK;
                all_at_cluster &= waits[first] == CLUSTER;
                alive |= waits[first] != ENDED;
            }
            if (all_at_barrier) {
                for (int thread = start; thread < start + threads; ++thread) resume(thread, in_cluster);
                all_at_cluster = false;
            }
        }
        if (all_at_cluster)
            for (int thread = 0; thread < all; ++thread) resume(thread, in_cluster);
    }
}

}  // namespace block

static float __uint_as_float(unsigned bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

static void __syncthreads() { block::meet(block::BLOCK); }

// The value of lane `from` of those `width` that the caller is among; its own where there is none.
static int shuffled(int value, int from, int width) {
    int thread = block::current, turn = block::parity[thread] ^= 1;
    block::slots[turn][thread].number = value;
    block::meet(block::WARP);
    int group = thread / width * width;
    return from < 0 || from >= width ? value : block::slots[turn][group + from].number;
}
static int __shfl_sync(unsigned, int value, int from, int width) { return shuffled(value, from, width); }
static int __shfl_up_sync(unsigned, int value, int away, int width) { return shuffled(value, (int)threadIdx.x % width - away, width); }
static int __shfl_xor_sync(unsigned, int value, int mask) { return shuffled(value, (int)threadIdx.x % 32 ^ mask, 32); }
static unsigned __funnelshift_r(unsigned low, unsigned high, int shift) {
    return (unsigned)(((unsigned long long)high << 32 | low) >> shift);
}
static unsigned __byte_perm(unsigned low, unsigned high, unsigned select) {
    unsigned long long both = (unsigned long long)high << 32 | low;
    unsigned result = 0;
    for (int k = 0; k < 4; ++k) result |= (unsigned)(both >> 8 * (select >> 4 * k & 7) & 255) << 8 * k;
    return result;
}
static float __shfl_xor_sync(unsigned, float value, int mask) {
    int thread = block::current, turn = block::parity[thread] ^= 1;
    block::slots[turn][thread].value = value;
    block::meet(block::WARP);
    return block::slots[turn][thread ^ mask].value;
}
static bool __any_sync(unsigned, bool vote) {
    int thread = block::current, turn = block::parity[thread] ^= 1;
    block::slots[turn][thread].number = vote;
    block::meet(block::WARP);
    bool any = false;
    for (int lane = 0; lane < 32; ++lane) any |= block::slots[turn][(thread & ~31) + lane].number != 0;
    return any;
}
static int __popc(unsigned value) { return __builtin_popcount(value); }
template <typename T>
static void atomicAdd(T* place, T value) { *place += value; }

static void __syncwarp() { block::meet(block::WARP); }

// Dynamic shared memory of each block of a cluster.
const int MOST_BLOCKS = 8;
static uint4 memories[MOST_BLOCKS][1 << 14];
#define stage_memory memories[block::current / block::size]

// Odd blocks copy at once, even ones as late as the program allows: both may happen on a device.
static void copy16(uint4* to, const void* from, bool present) {
    int thread = block::current;
    if ((uintptr_t)from % 16 && present) std::abort();
    block::Copy copy{to, from, present, block::groups[thread]};
    if (blockIdx.x & 1)
        block::finish(copy);
    else
        block::copies[thread].push_back(copy);
}
static void end_group() { ++block::groups[block::current]; }
static void wait_for_groups() {
    int thread = block::current, done = block::groups[thread] - (STAGES - 2);
    std::vector<block::Copy> later;
    for (const block::Copy& copy : block::copies[thread])
        if (copy.group < done)
            block::finish(copy);
        else
            later.push_back(copy);
    block::copies[thread] = later;
}

static double widened(unsigned pair, int half) {
    unsigned short bits = (unsigned short)(pair >> 16 * half);
#if IS_HALF
    int sign = bits >> 15, exponent = bits >> 10 & 31, mantissa = bits & 1023;
    double value = exponent ? std::ldexp(1024 + mantissa, exponent - 25) : std::ldexp(mantissa, -24);
    if (exponent == 31) value = mantissa ? NAN : INFINITY;
    return sign ? -value : value;
#else
    return __uint_as_float((unsigned)bits << 16);
#endif
}

static void stop() { std::abort(); }
static void launch_dependents() {}
static void wait_for_dependencies() {}

static float from_half(unsigned short bits) { return (float)widened(bits, 0); }

// Rounds to nearest, ties to even. A double has room for the products and sums here without a rounding of its own.
static unsigned short rounded(double value) {
    unsigned short sign = std::signbit(value) ? 0x8000 : 0;
    double size = std::fabs(value);
    if (std::isnan(value)) return 0x7FFF;
#if IS_HALF
    const int bits = 10, least = -14, bias = 15, most = 31;
#else
    const int bits = 7, least = -126, bias = 127, most = 255;
#endif
    if (size == 0) return sign;
    int exponent = std::isinf(size) ? 1024 : std::ilogb(size);
    if (exponent < least) exponent = least;
    double units = std::nearbyint(std::ldexp(size, bits - exponent));
    if (std::isinf(size)) return sign | most << bits;
    long field = (long)units + ((long)(exponent + bias - 1) << bits);
    if (field >= (long)most << bits) field = (long)most << bits;
    return sign | (unsigned short)field;
}

static unsigned short to_16_bits(float value) { return rounded(value); }

static unsigned fma_pair(unsigned a, unsigned b, unsigned c) {
    unsigned low = rounded(widened(a, 0) * widened(b, 0) + widened(c, 0));
    return low | (unsigned)rounded(widened(a, 1) * widened(b, 1) + widened(c, 1)) << 16;
}

static void multiply(float* sums, const unsigned* weights, unsigned low, unsigned high) {
    int thread = block::current, lane = thread & 31, turn = block::parity[thread] ^= 1;
    block::Slot& own = block::slots[turn][thread];
    for (int r = 0; r < 4; ++r) own.weights[r] = weights[r];
    own.low = low;
    own.high = high;
    block::meet(block::WARP_PRODUCT);
    const block::Slot* warp = block::slots[turn] + (thread & ~31);
    for (int k = 0; k < 4; ++k) {
        int row = (lane >> 2) + 8 * (k >> 1), token = 2 * (lane & 3) + (k & 1);
        double sum = sums[k];
        for (int column = 0; column < 16; ++column) {
            int pair = column % 8 / 2, half = column & 1, far = column >= 8;
            unsigned weight = warp[4 * (row % 8) + pair].weights[(row >= 8) + 2 * far];
            const block::Slot& input = warp[4 * token + pair];
            sum += widened(weight, half) * widened(far ? input.high : input.low, half);
        }
        sums[k] = (float)sum;
    }
}

static void load(unsigned* words, const unsigned* place, int count) {
    if ((uintptr_t)place % (4 * count)) std::abort();
    std::memcpy(words, place, 4 * count);
}
static void load4(unsigned* words, const unsigned* place) { load(words, place, 4); }
static void load2(unsigned* words, const unsigned* place) { load(words, place, 2); }
static void load1(unsigned* words, const unsigned* place) { load(words, place, 1); }
