// Tiles of the packed layout (layout.py defines it): words of a lane, fields, exceptions. Put before each source of kernels.
//
// Compiled at run time by NVRTC, and for the tests by a C++ compiler (block.hpp emulates a block). Macros that the caller defines:
//   BITS         2 to 8: codes;  12: bf16 weights
//   IS_HALF      inputs and outputs are float16, otherwise bfloat16
//   STAGES       buffers of a ring in shared memory, for the kernels that have one
//   TOKEN_TILES  tiles of 8 tokens, for products

#define TILE_BYTES (128 * BITS)

// Where the planes of a lane begin among its words of a tile.
#define PLANE8 0
#if BITS == 12
#define PLANE4 8
#else
#define PLANE4 0
#endif
#define PLANE2 (BITS & 4)
#define PLANE1 (BITS & 6)

// A field at bit `place` of a 16-bit float whose other bits are zero is worth field * 2^(place - TINY), place + width <= 8. In the
// units 2^-UNITS a code has a factor for each plane that a 16-bit float can express.
#if IS_HALF
#define TINY 24
#define LARGEST 15
#define EXPONENT_AT 10
#define ONE_EXPONENT 15
#else
#define TINY 133
#define LARGEST 127
#define EXPONENT_AT 7
#define ONE_EXPONENT 127
#endif
// The last term is where the upper plane of a code begins.
#define UNITS (TINY - LARGEST + (BITS == 3 ? 1 : BITS > 4 && BITS < 8 ? BITS & 3 : 0))
#define POWER(exponent) (0x00010001u * ((u32)((exponent) + ONE_EXPONENT) << EXPONENT_AT))     // 2^exponent, twice
#define MINUS 0x80008000u

#ifndef EMULATED
static __device__ __forceinline__ u32 fma_pair(u32 a, u32 b, u32 c) {
    u32 result;
#if IS_HALF
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
#else
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
#endif
    return result;
}

// sums[16 x 8] += weights[16 x 16] inputs[16 x 8], as mma.m16n8k16 lays them out in a warp.
static __device__ __forceinline__ void multiply(float* sums, const u32* weights, u32 low, u32 high) {
#if IS_HALF
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#endif
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(weights[0]), "r"(weights[1]), "r"(weights[2]), "r"(weights[3]), "r"(low), "r"(high));
}

// Weights are read once: they should not displace the inputs from the first-level cache.
static __device__ __forceinline__ void load4(u32* words, const u32* place) {
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
        : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3]) : "l"(place));
}
static __device__ __forceinline__ void load2(u32* words, const u32* place) {
    asm("ld.global.nc.L1::no_allocate.v2.u32 {%0,%1}, [%2];" : "=r"(words[0]), "=r"(words[1]) : "l"(place));
}
static __device__ __forceinline__ void load1(u32* words, const u32* place) {
    asm("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(words[0]) : "l"(place));
}
static __device__ __forceinline__ u16 to_16_bits(float value) {
    u16 result;
#if IS_HALF
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result) : "f"(value));
#else
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result) : "f"(value));
#endif
    return result;
}
static __device__ __forceinline__ float from_half(u16 bits) {
    float result;
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(bits));
    return result;
}
static __device__ __forceinline__ void stop() { asm("trap;"); }

// Lets the next kernel of the stream begin, if it was launched to overlap with this one.
static __device__ __forceinline__ void launch_dependents() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
// Waits until the kernels ahead in the stream have ended, and shows what they wrote.
static __device__ __forceinline__ void wait_for_dependencies() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

#ifdef STAGES
extern __shared__ uint4 stage_memory[];   // the ring

// Begins a copy of 16 bytes to shared memory; `present` false: of zeros.
static __device__ __forceinline__ void copy16(uint4* to, const void* from, bool present) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
        :: "r"((u32)__cvta_generic_to_shared(to)), "l"(from), "r"(present ? 16 : 0) : "memory");
}
// Ends a group of copies. `wait_for_groups` waits for all but the last STAGES - 2 groups of this thread.
static __device__ __forceinline__ void end_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
static __device__ __forceinline__ void wait_for_groups() { asm volatile("cp.async.wait_group %0;" :: "n"(STAGES - 2) : "memory"); }
#endif
#endif

static __device__ __forceinline__ float from_16_bits(u16 bits) {
#if IS_HALF
    return from_half(bits);
#else
    return __uint_as_float((u32)bits << 16);
#endif
}

static __device__ __forceinline__ float exception_value(u32 entry) {
#if BITS == 12
    return __uint_as_float(entry & 0xFFFF0000u);
#else
    return (float)((int)entry >> 16);
#endif
}

// Loads a lane's words of a tile from global memory.
static __device__ __forceinline__ void load_tile(u32* words, const u32* tile, int lane) {
#if BITS == 12
    load4(words, tile + 4 * lane);
    load4(words + 4, tile + 128 + 4 * lane);
    load4(words + 8, tile + 256 + 4 * lane);
#elif BITS == 8
    load4(words, tile + 4 * lane);
    load4(words + 4, tile + 128 + 4 * lane);
#else
#if BITS & 4
    load4(words, tile + 4 * lane);
#endif
#if BITS & 2
    load2(words + PLANE2, tile + 32 * PLANE2 + 2 * lane);
#endif
#if BITS & 1
    load1(words + PLANE1, tile + 32 * PLANE1 + lane);
#endif
#endif
}

static __device__ __forceinline__ void take4(u32* words, const u32* place) {
    const uint4 four = *(const uint4*)place;
    words[0] = four.x;
    words[1] = four.y;
    words[2] = four.z;
    words[3] = four.w;
}

// Loads a lane's words of a tile from shared memory.
static __device__ __forceinline__ void take_tile(u32* words, const u32* tile, int lane) {
#if BITS == 12 || BITS == 8
#pragma unroll
    for (int k = 0; k < BITS / 4; ++k) take4(words + 4 * k, tile + 128 * k + 4 * lane);
#else
#if BITS & 4
    take4(words, tile + 4 * lane);
#endif
#if BITS & 2
    const uint2 two = *(const uint2*)(tile + 32 * PLANE2 + 2 * lane);
    words[PLANE2] = two.x;
    words[PLANE2 + 1] = two.y;
#endif
#if BITS & 1
    words[PLANE1] = tile[32 * PLANE1 + lane];
#endif
#endif
}

// Adds to two numbers, in units 2^-UNITS, the fields of `width` bits that lie at bit `place` of the halves of a word; `low` is
// their place in a code.
static __device__ __forceinline__ u32 add_fields(u32 sums, u32 word, int place, int width, int low) {
    const u32 mask = ((1u << width) - 1) << place % 8;
    const u32 fields = (place < 8 ? word : word >> 8) & (mask | mask << 16);
    return fma_pair(fields, POWER(TINY - UNITS + low - place % 8), sums);
}

// Returns two weights as 16-bit floats: register `r` of `step`. Codes in units 2^-UNITS, exactly; bf16 weights are the very weights.
// `factor` is 2^base twice, for bf16 weights.
static __device__ __forceinline__ u32 widen(const u32* words, int step, int r, u32 factor) {
#if BITS == 12
    const u32 upper = words[PLANE4 + step];
    const u32 placed = r == 0 ? upper << 8 : r == 1 ? upper << 4 : r == 2 ? upper : __funnelshift_r(upper, upper, 4);
    const u32 small = __byte_perm(words[PLANE8 + 2 * step + r / 2], placed & 0x87008700u, r & 1 ? 0x7351 : 0x7250);
    return fma_pair(small, factor, MINUS);
#else
    u32 codes = POWER(BITS - 1 - UNITS) | MINUS;     // -2^(BITS - 1)
#if BITS == 8
    codes = add_fields(codes, words[2 * step + r / 2], 8 * (r & 1), 8, 0);
#endif
#if BITS & 4
    codes = add_fields(codes, words[PLANE4 + step], 4 * r, 4, BITS & 3);
#endif
#if BITS & 2
    codes = add_fields(codes, words[PLANE2 + step / 2], 8 * (step & 1) + 2 * r, 2, BITS & 1);
#endif
#if BITS & 1
    codes = add_fields(codes, words[PLANE1], 4 * step + r, 1, 0);
#endif
    return codes;
#endif
}

#define ONE_OF_UNITS ((float)(1 << UNITS))

#if defined(TOKEN_TILES) && TOKEN_TILES > 1
// Sixteen exceptions of a tile of 16 rows are the columns of a tile of weights, with zeros in all rows but their own. A code beyond
// 8 bits is the sum of two that the matrix units hold exactly. An infinite or NaN input of an exception reaches all 16 rows.
//
// Loads come long before their use: entries two turns ahead, inputs one. Tokens are taken in parts, since a part's inputs lie in
// registers, 8 tiles at most; where there are several parts, inputs are loaded when they are needed.
#define PART (TOKEN_TILES < 8 ? TOKEN_TILES : 8)
struct Sixteen {
    int start, end;         // entries start ... start + 15 below end
    int low[2], high[2];    // entries of row `group` and of row 8 + `group`
    u32 found[4], next[4];  // those of columns 2 quarter, 2 quarter + 1, and 8 columns further; and of the next sixteen
    u32 inputs[4][PART / 2];    // of these columns and tokens 8 j + group, two tiles in a word

    // top: first row of the tile.  share: the first sixteen that is taken.  stride: from one sixteen to the next, in entries.
    __device__ __forceinline__ void find(const int* first, const u32* entries, int top, int rows, int share, int stride) {
        const int group = (threadIdx.x & 31) >> 2;
        start = first[top] + 16 * share;
        end = first[top + 16 < rows ? top + 16 : rows];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = top + group + 8 * half;
            low[half] = first[row < rows ? row : rows];
            high[half] = first[row < rows ? row + 1 : rows];
        }
        load(found, entries, 0);
        load(next, entries, stride);
    }
    __device__ __forceinline__ bool left() const { return start < end; }
    __device__ __forceinline__ int slot(int k) const { return start + 2 * (threadIdx.x & 3) + (k & 1) + 8 * (k >> 1); }
    __device__ __forceinline__ void load(u32* words, const u32* entries, int away) const {
#pragma unroll
        for (int k = 0; k < 4; ++k) words[k] = slot(k) + away < end ? entries[slot(k) + away] : 0;
    }
    // Loads the inputs of a part. by_column: [cols, 8, TOKEN_TILES], the tokens 8 j + g at [g, j].
    __device__ __forceinline__ void gather(const u16* by_column, int part) {
        const int group = (threadIdx.x & 31) >> 2;
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            const u16* place = by_column + ((i64)(found[k] & 0xFFFF) * 8 + group) * TOKEN_TILES + part;
#if TOKEN_TILES >= 8
            take4(inputs[k], (const u32*)place);
#elif TOKEN_TILES == 4
            *(uint2*)inputs[k] = *(const uint2*)place;
#else
            inputs[k][0] = *(const u32*)place;
#endif
        }
    }
    // Goes on to the next sixteen, `stride` entries further.
    __device__ __forceinline__ void advance(const u32* entries, const u16* by_column, int stride) {
        start += stride;
#pragma unroll
        for (int k = 0; k < 4; ++k) found[k] = next[k];
        load(next, entries, stride);
#if TOKEN_TILES <= 8
        if (left()) gather(by_column, 0);
#endif
    }
    // Adds the products of the sixteen, whose inputs were gathered where there is one part.
    __device__ __forceinline__ void add(float (*sums)[4], const u16* by_column) {
        u32 values[4], rests[4];
        bool has_rest = false;
#pragma unroll
        for (int k = 0; k < 4; ++k) {
#if BITS == 12
            values[k] = found[k] >> 16;
#else
            const int code = (int)found[k] >> 16, small = ((code + 128) & 255) - 128;
            values[k] = to_16_bits((float)small * (1.0f / ONE_OF_UNITS));
            rests[k] = to_16_bits((float)(code - small) * (1.0f / ONE_OF_UNITS));
            has_rest |= code != small;
#endif
        }
#pragma unroll
        for (int part = 0; part < TOKEN_TILES; part += PART) {
#if TOKEN_TILES > 8
            gather(by_column, part);
#endif
            add_part(sums + part, values);
#if BITS != 12
            if (__any_sync(EVERY, has_rest)) add_part(sums + part, rests);
#endif
        }
    }
    __device__ __forceinline__ void add_part(float (*sums)[4], const u32* values) const {
        u32 weights[4];
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            weights[r] = 0;
#pragma unroll
            for (int k = 0; k < 2; ++k) {
                const int at = slot(2 * (r >> 1) + k);
                weights[r] |= at >= low[r & 1] && at < high[r & 1] ? values[2 * (r >> 1) + k] << 16 * k : 0u;
            }
        }
#pragma unroll
        for (int j = 0; j < PART; ++j) {
            const u32 select = j & 1 ? 0x7632 : 0x5410;
            multiply(
                sums[j], weights, __byte_perm(inputs[0][j / 2], inputs[1][j / 2], select),
                __byte_perm(inputs[2][j / 2], inputs[3][j / 2], select));
        }
    }
};
#endif
