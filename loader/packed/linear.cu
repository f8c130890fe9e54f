// Products with packed weights, and unpacking (layout.py defines the layout). A block multiplies ROW_TILES * ROW_WARPS tiles of 16
// rows; COL_WARPS warps share the columns of each. Packed words come through a ring of STAGES buffers in shared memory, filled by
// asynchronous copies, so that STAGES - 1 tiles of a warp are on their way while it multiplies one. A warp widens a tile's values in
// registers, exactly, and gives them to the matrix units, which sum in float32. Partial sums are added in the order of the warps,
// so a result does not depend on timing.
//
// Compiled at run time by NVRTC, and for the tests by a C++ compiler (block.hpp emulates a block). Macros that the caller defines:
//   BITS         2 to 8: codes;  12: bf16 weights
//   IS_HALF      inputs and outputs are float16, otherwise bfloat16
//   ROW_TILES, TOKEN_TILES (of 8 tokens), ROW_WARPS, COL_WARPS, STAGES

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;

#define EVERY 0xFFFFFFFFu
#define WARPS (ROW_WARPS * COL_WARPS)
#define THREADS (32 * WARPS)
#define ROWS (16 * ROW_TILES * ROW_WARPS)
#define TILE_BYTES (128 * BITS)
#define STAGE_WEIGHTS (WARPS * ROW_TILES * TILE_BYTES)
#if TOKEN_TILES > 1
#define STAGE_INPUTS (1024 * COL_WARPS * TOKEN_TILES)
#else
#define STAGE_INPUTS 0      // a single tile of tokens is read through the first-level cache, which all blocks of a multiprocessor share
#endif
#define STAGE_BYTES (STAGE_WEIGHTS + STAGE_INPUTS)
#define SHARE (THREADS / ROWS)      // threads that share the exceptions of a row, for one tile of tokens
#define HELD 2                      // exceptions that a thread loads before it needs them

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

extern __shared__ uint4 stage_memory[];   // STAGES * STAGE_BYTES

// Begins a copy of 16 bytes to shared memory; `present` false: of zeros.
static __device__ __forceinline__ void copy16(uint4* to, const void* from, bool present) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
        :: "r"((u32)__cvta_generic_to_shared(to)), "l"(from), "r"(present ? 16 : 0) : "memory");
}
// Ends a group of copies. `wait_for_groups` waits for all but the last STAGES - 2 groups of this thread.
static __device__ __forceinline__ void end_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
static __device__ __forceinline__ void wait_for_groups() { asm volatile("cp.async.wait_group %0;" :: "n"(STAGES - 2) : "memory"); }
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

#if TOKEN_TILES > 1
// Sixteen exceptions of a tile of 16 rows are the columns of a tile of weights, with zeros in all rows but their own. A code beyond
// 8 bits is the sum of two that the matrix units hold exactly. An infinite or NaN input of an exception reaches all 16 rows.
struct Sixteen {
    int start, end;         // entries start ... start + 15 below end
    int low[2], high[2];    // entries of row `group` and of row 8 + `group`
    u32 found[4];           // those of columns 2 quarter, 2 quarter + 1, and 8 columns further

    // top: first row of the tile.  share: the first sixteen that is taken.
    __device__ __forceinline__ void find(const int* first, int top, int rows, int share) {
        const int group = (threadIdx.x & 31) >> 2;
        start = first[top] + 16 * share;
        end = first[top + 16 < rows ? top + 16 : rows];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = top + group + 8 * half;
            low[half] = first[row < rows ? row : rows];
            high[half] = first[row < rows ? row + 1 : rows];
        }
    }
    __device__ __forceinline__ int slot(int k) const { return start + 2 * (threadIdx.x & 3) + (k & 1) + 8 * (k >> 1); }
    __device__ __forceinline__ void load(const u32* entries) {
#pragma unroll
        for (int k = 0; k < 4; ++k) found[k] = slot(k) < end ? entries[slot(k)] : 0;
    }
    // by_column: see packed_linear.
    __device__ __forceinline__ void add(float (*sums)[4], const u16* by_column) const {
        const int group = (threadIdx.x & 31) >> 2;
        const u16* places[4];
        u32 values[4], rests[4], weights[4];
        bool has_rest = false;
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            places[k] = by_column + (i64)(found[k] & 0xFFFF) * 8 * TOKEN_TILES + group;
#if BITS == 12
            values[k] = found[k] >> 16;
#else
            const int code = (int)found[k] >> 16, small = ((code + 128) & 255) - 128;
            values[k] = to_16_bits((float)small * (1.0f / ONE_OF_UNITS));
            rests[k] = to_16_bits((float)(code - small) * (1.0f / ONE_OF_UNITS));
            has_rest |= code != small;
#endif
        }
        u32 inputs[TOKEN_TILES][2];
#pragma unroll
        for (int j = 0; j < TOKEN_TILES; ++j)
#pragma unroll
            for (int half = 0; half < 2; ++half)
                inputs[j][half] = places[2 * half][8 * j] | (u32)places[2 * half + 1][8 * j] << 16;
        spread(weights, values);
#pragma unroll
        for (int j = 0; j < TOKEN_TILES; ++j) multiply(sums[j], weights, inputs[j][0], inputs[j][1]);
#if BITS != 12
        if (!__any_sync(EVERY, has_rest)) return;
        spread(weights, rests);
#pragma unroll
        for (int j = 0; j < TOKEN_TILES; ++j) multiply(sums[j], weights, inputs[j][0], inputs[j][1]);
#endif
    }
    // Puts values into the registers of a tile of weights.
    __device__ __forceinline__ void spread(u32* weights, const u32* values) const {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            weights[r] = 0;
#pragma unroll
            for (int k = 0; k < 2; ++k) {
                const int at = slot(2 * (r >> 1) + k);
                weights[r] |= at >= low[r & 1] && at < high[r & 1] ? values[2 * (r >> 1) + k] << 16 * k : 0u;
            }
        }
    }
};
#endif

// Computes out[token, row] = (sum over columns of inputs[token, column] * weight[row, column]) * scale[row] + bias[row].
//
// packed: [row tiles, column tiles, 32 * BITS] words.  inputs: [tokens, cols], 16-byte aligned, cols a multiple of 16.
// by_column: [cols, 8 * TOKEN_TILES], the same, read where there are exceptions and TOKEN_TILES > 1.
// split_sums: float32 [gridDim.y, tokens, rows] where blocks share the columns of a row; `finish_splits` adds them up. Else 0.
// exceptions of row r: entries first[r] ... first[r + 1] - 1, column | value << 16; first == 0: none.  scale, bias: may be 0.
// col_scale: of one token, which is multiplied by it and rounded once, into cols more 16-bit numbers of shared memory. Else 0.
extern "C" __global__ void __launch_bounds__(THREADS) packed_linear(
    const u32* packed, const u16* inputs, const u16* by_column, const int* first, const u32* entries, const float* scale,
    const float* col_scale, const u16* bias, u16* out, float* split_sums, int tokens, int rows, int cols, u32 factor) {
    __shared__ float partial[COL_WARPS][8][ROWS];
#if TOKEN_TILES == 1
    __shared__ float extra[8][ROWS];
#endif
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int row_warp = warp % ROW_WARPS, col_warp = warp / ROW_WARPS;
    const int group = lane >> 2, quarter = lane & 3;
    const int all_tiles = (cols + 63) / 64, row_tiles = (rows + 15) / 16;
    const int share_tiles = (all_tiles + gridDim.y - 1) / gridDim.y, first_col_tile = blockIdx.y * share_tiles;
    const int tiles = first_col_tile + share_tiles < all_tiles ? first_col_tile + share_tiles : all_tiles;
    const int steps = tiles > first_col_tile ? (tiles - first_col_tile + COL_WARPS - 1) / COL_WARPS : 0;
    const int first_row = blockIdx.x * ROWS, first_tile = blockIdx.x * (ROWS / 16) + row_warp * ROW_TILES;

    // Where the thread's next copies come from and go to.
    const uint4* weights_from[ROW_TILES];
#pragma unroll
    for (int i = 0; i < ROW_TILES; ++i) {
        const int tile = first_tile + i < row_tiles ? first_tile + i : row_tiles - 1;
        weights_from[i] = (const uint4*)(packed + ((i64)tile * all_tiles + first_col_tile + col_warp) * 32 * BITS) + lane;
    }
    int to_fetch = 0, fetch_at = 0, read_at = 0;

    // Begins the copies of a step: a column tile for each of COL_WARPS warps. Each warp copies its own weights. Lane 4 g + t of pair p
    // multiplies columns 16 t + 8 p ... 16 t + 8 p + 7 of token g. Adjacent threads copy adjacent inputs; the exclusive or spreads
    // them over the banks of shared memory. Tokens beyond the last are not copied: each token has sums of its own.
    const auto fetch = [&]() {
        if (to_fetch < steps) {
            uint4* stage = stage_memory + fetch_at;
            const int step_tile = first_col_tile + to_fetch * COL_WARPS;
            if (step_tile + col_warp < tiles) {
#pragma unroll
                for (int i = 0; i < ROW_TILES; ++i)
#pragma unroll
                    for (int k = 0; k < (BITS + 3) / 4; ++k)
                        if (32 * k + 32 <= TILE_BYTES / 16 || 32 * k + lane < TILE_BYTES / 16)
                            copy16(stage + (warp * ROW_TILES + i) * (TILE_BYTES / 16) + 32 * k + lane, weights_from[i] + 32 * k, true);
            }
#pragma unroll
            for (int i = 0; i < ROW_TILES; ++i) weights_from[i] += COL_WARPS * (TILE_BYTES / 16);
#if TOKEN_TILES > 1
#pragma unroll
            for (int n = 0; n < (STAGE_INPUTS / 16 + THREADS - 1) / THREADS; ++n) {
                const int piece = n * THREADS + threadIdx.x, pair = piece & 1, lane_of = piece >> 1 & 31, tile_of = piece >> 6;
                const int token = 8 * (tile_of % TOKEN_TILES) + (lane_of >> 2);
                const int column = 64 * (step_tile + tile_of / TOKEN_TILES) + 16 * (lane_of & 3) + 8 * pair;
                if (piece < STAGE_INPUTS / 16 && token < tokens)
                    copy16(
                        stage + STAGE_WEIGHTS / 16 + 64 * tile_of + 32 * pair + (lane_of ^ 4 * pair),
                        column < cols ? inputs + (i64)token * cols + column : inputs, column < cols);
            }
#endif
            ++to_fetch;
            fetch_at = fetch_at == (STAGES - 1) * (STAGE_BYTES / 16) ? 0 : fetch_at + STAGE_BYTES / 16;
        }
        end_group();
    };
#pragma unroll
    for (int step = 0; step < STAGES - 1; ++step) fetch();

    float sums[ROW_TILES][TOKEN_TILES][4];
#pragma unroll
    for (int i = 0; i < ROW_TILES; ++i)
#pragma unroll
        for (int j = 0; j < TOKEN_TILES; ++j)
#pragma unroll
            for (int k = 0; k < 4; ++k) sums[i][j][k] = 0.0f;

    // Exceptions are loaded while the first tiles are on their way, and used at the end.
#if TOKEN_TILES > 1
    Sixteen exceptions[ROW_TILES];
#pragma unroll
    for (int i = 0; i < ROW_TILES; ++i) {
        const int top = 16 * (first_tile + i);
        exceptions[i].start = exceptions[i].end = 0;
        if (first != 0 && top < rows) exceptions[i].find(first, top, rows, blockIdx.y * COL_WARPS + col_warp);
    }
#pragma unroll
    for (int i = 0; i < ROW_TILES; ++i)
        if (first != 0) exceptions[i].load(entries);
#else
    const int own = threadIdx.x / SHARE, stride = SHARE * gridDim.y;
    int entry = 0, last_entry = 0;
    if (first != 0 && first_row + own < rows) {
        entry = first[first_row + own] + blockIdx.y * SHARE + threadIdx.x % SHARE;
        last_entry = first[first_row + own + 1];
    }
    u32 found[HELD];
#pragma unroll
    for (int k = 0; k < HELD; ++k) found[k] = entry + k * stride < last_entry ? entries[entry + k * stride] : 0;
    u16 found_inputs[HELD];
#endif

#if TOKEN_TILES == 1
    // Read from global or from shared memory.
    const u16* source = inputs;
    if (col_scale != 0) {
        u16* scaled = (u16*)(stage_memory + STAGES * (STAGE_BYTES / 16));
        for (int column = threadIdx.x; column < cols; column += THREADS)
            scaled[column] = to_16_bits(from_16_bits(inputs[column]) * col_scale[column]);
        __syncthreads();
        source = scaled;
    }

    uint4 next[2] = {uint4{0, 0, 0, 0}, uint4{0, 0, 0, 0}};
    const auto load_inputs = [&](int tile) {
        const int column = 64 * tile + 16 * quarter;
        if (column >= cols) {
            next[0] = next[1] = uint4{0, 0, 0, 0};
        } else if (group < tokens) {
            const uint4* place = (const uint4*)(source + (i64)group * cols + column);
            next[0] = place[0];
            next[1] = place[1];
        }
    };
    load_inputs(first_col_tile + col_warp);
#endif

    for (int step = 0; step < steps; ++step) {
        const int tile = first_col_tile + step * COL_WARPS + col_warp;
#if TOKEN_TILES == 1
        const uint4 own_inputs[2] = {next[0], next[1]};
        if (step + 1 < steps) load_inputs(tile + COL_WARPS);
        if (first != 0 && step == 1) {
#pragma unroll
            for (int k = 0; k < HELD; ++k) found_inputs[k] = source[found[k] & 0xFFFF];
        }
#endif
        wait_for_groups();
        // Behind the copies of others, and before the buffer that was read in the last step is filled again.
        if (TOKEN_TILES == 1)
            __syncwarp();
        else
            __syncthreads();
        fetch();
        if (tile < tiles) {
            const uint4* stage = stage_memory + read_at;
            u32 words[ROW_TILES][BITS];
#pragma unroll
            for (int i = 0; i < ROW_TILES; ++i)
                take_tile(words[i], (const u32*)(stage + (warp * ROW_TILES + i) * (TILE_BYTES / 16)), lane);
#pragma unroll
            for (int pair = 0; pair < 2; ++pair) {
                uint4 vectors[TOKEN_TILES];
#if TOKEN_TILES == 1
                vectors[0] = own_inputs[pair];
#else
#pragma unroll
                for (int j = 0; j < TOKEN_TILES; ++j)
                    vectors[j] = stage[STAGE_WEIGHTS / 16 + 64 * (col_warp * TOKEN_TILES + j) + 32 * pair + (lane ^ 4 * pair)];
#endif
#pragma unroll
                for (int half = 0; half < 2; ++half) {
#pragma unroll
                    for (int i = 0; i < ROW_TILES; ++i) {
                        u32 weights[4];
#pragma unroll
                        for (int r = 0; r < 4; ++r) weights[r] = widen(words[i], 2 * pair + half, r, factor);
#pragma unroll
                        for (int j = 0; j < TOKEN_TILES; ++j)
                            multiply(
                                sums[i][j], weights, half ? vectors[j].z : vectors[j].x, half ? vectors[j].w : vectors[j].y);
                    }
                }
            }
        }
        read_at = read_at == (STAGES - 1) * (STAGE_BYTES / 16) ? 0 : read_at + STAGE_BYTES / 16;
    }
#if TOKEN_TILES > 1
#pragma unroll
    for (int i = 0; i < ROW_TILES; ++i) {
        Sixteen& sixteen = exceptions[i];
        while (sixteen.start < sixteen.end) {
            sixteen.add(sums[i], by_column);
            sixteen.start += 16 * gridDim.y * COL_WARPS;
            sixteen.load(entries);
        }
    }
#endif

#pragma unroll
    for (int j = 0; j < TOKEN_TILES; ++j) {
        if (8 * j >= tokens) break;
        if (j > 0) __syncthreads();
#pragma unroll
        for (int i = 0; i < ROW_TILES; ++i)
#pragma unroll
            for (int k = 0; k < 4; ++k)
                partial[col_warp][2 * quarter + (k & 1)][16 * (row_warp * ROW_TILES + i) + group + 8 * (k >> 1)] = sums[i][j][k];
#if TOKEN_TILES == 1
        // Rolled up: this is run once, and a device that comes from another kernel has to fetch every instruction of it.
        if (first != 0) {
#pragma unroll 1
            for (int token = 0; token < tokens; token += 4) {
                const u16* place = source + (i64)token * cols;
                float values[4] = {0.0f, 0.0f, 0.0f, 0.0f};
                int at = entry;
                if (tokens == 1 && steps > 1) {
#pragma unroll
                    for (int k = 0; k < HELD; ++k, at += stride)
                        if (at < last_entry) values[0] += exception_value(found[k]) * from_16_bits(found_inputs[k]);
                }
#pragma unroll 1
                for (; at < last_entry; at += stride) {
                    const u32 exception = entries[at];
#pragma unroll
                    for (int k = 0; k < 4; ++k)
                        if (token + k < tokens)
                            values[k] += exception_value(exception) * from_16_bits(place[(i64)k * cols + (exception & 0xFFFF)]);
                }
#pragma unroll
                for (int k = 0; k < 4; ++k) {
                    if (token + k >= tokens) break;
#pragma unroll 1
                    for (int away = SHARE / 2; away > 0; away /= 2) values[k] += __shfl_xor_sync(EVERY, values[k], away);
                    if (threadIdx.x % SHARE == 0) extra[token + k][own] = values[k];
                }
            }
        }
#endif
        __syncthreads();
        const int count = tokens - 8 * j < 8 ? tokens - 8 * j : 8;
        for (int index = threadIdx.x; index < count * ROWS; index += THREADS) {
            const int token = index / ROWS, local = index % ROWS, row = first_row + local;
            if (row >= rows) continue;
            float value = 0.0f;
#pragma unroll
            for (int i = 0; i < COL_WARPS; ++i) value += partial[i][token][local];
#if BITS != 12
            value *= ONE_OF_UNITS;
#endif
#if TOKEN_TILES == 1
            if (first != 0) value += extra[token][local];
#endif
            if (split_sums != 0) {
                split_sums[((i64)blockIdx.y * tokens + 8 * j + token) * rows + row] = value;
                continue;
            }
            if (scale != 0) value *= scale[row];
            if (bias != 0) value += from_16_bits(bias[row]);
            out[(i64)(8 * j + token) * rows + row] = to_16_bits(value);
        }
    }
}

// Adds up the sums of blocks that share columns, in order; then as `packed_linear` ends.
extern "C" __global__ void __launch_bounds__(256) finish_splits(
    const float* split_sums, const float* scale, const u16* bias, u16* out, int splits, int tokens, int rows) {
    for (int index = blockIdx.x * 256 + threadIdx.x; index < tokens * rows; index += gridDim.x * 256) {
        const int row = index % rows;
        float value = 0.0f;
        for (int split = 0; split < splits; ++split) value += split_sums[(i64)split * tokens * rows + index];
        if (scale != 0) value *= scale[row];
        if (bias != 0) value += from_16_bits(bias[row]);
        out[index] = to_16_bits(value);
    }
}

// Writes 16 weights of a row of a dense model, bit for bit: row 8 half + group of a tile, 16 columns from `column` on.
// words: those of the lane that holds them.  step: scale of the row.  col_scale: of columns, or 0.
static __device__ __forceinline__ void write_sixteen(
    const u32* words, int half, float step, const float* col_scale, int column, u32 factor, u16* place) {
    u32 pairs[8];
#pragma unroll
    for (int k = 0; k < 8; ++k) {
        u32 pair = widen(words, k / 2, 2 * (k & 1) + half, factor);
#if BITS != 12
        float low = from_16_bits((u16)pair), high = from_16_bits((u16)(pair >> 16));
        low = low * ONE_OF_UNITS * (col_scale ? step * col_scale[column + 2 * k] : step);
        high = high * ONE_OF_UNITS * (col_scale ? step * col_scale[column + 2 * k + 1] : step);
        pair = to_16_bits(low) | (u32)to_16_bits(high) << 16;
#endif
        pairs[k] = pair;
    }
    ((uint4*)place)[0] = uint4{pairs[0], pairs[1], pairs[2], pairs[3]};
    ((uint4*)place)[1] = uint4{pairs[4], pairs[5], pairs[6], pairs[7]};
}

// Writes the exceptions of a row of a dense model: entry `start` and every `stride`-th after it.
static __device__ __forceinline__ void write_exceptions(
    const int* first, const u32* entries, int row, int start, int stride, float step, const float* col_scale, u16* place) {
    for (int entry = first[row] + start; entry < first[row + 1]; entry += stride) {
        const int column = entries[entry] & 0xFFFF;
#if BITS == 12
        place[column] = entries[entry] >> 16;
#else
        place[column] = to_16_bits(exception_value(entries[entry]) * (col_scale ? step * col_scale[column] : step));
#endif
    }
}

// Writes the weights of a dense model, bit for bit: one block a tile of rows.
// scale: of rows; col_scale: of columns, or 0. Without IS_HALF the output is bfloat16.
extern "C" __global__ void __launch_bounds__(THREADS) packed_unpack(
    const u32* packed, const int* first, const u32* entries, const float* scale, const float* col_scale, u16* out, int rows,
    int cols, u32 factor) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int group = lane >> 2, quarter = lane & 3, tiles = (cols + 63) / 64;
    const u32* start = packed + (i64)blockIdx.x * tiles * 32 * BITS;
    for (int tile = warp; tile < tiles; tile += WARPS) {
        u32 words[BITS];
        load_tile(words, start + (i64)tile * 32 * BITS, lane);
        const int column = 64 * tile + 16 * quarter;
        if (column >= cols) continue;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = 16 * blockIdx.x + 8 * half + group;
            if (row >= rows) continue;
            write_sixteen(words, half, scale ? scale[row] : 0.0f, col_scale, column, factor, out + (i64)row * cols + column);
        }
    }
    if (first == 0) return;
    __syncthreads();
    const int top = 16 * (blockIdx.x + 1) < rows ? 16 * (blockIdx.x + 1) : rows;
    for (int row = 16 * blockIdx.x + warp; row < top; row += WARPS)
        write_exceptions(first, entries, row, lane, 32, scale ? scale[row] : 0.0f, col_scale, out + (i64)row * cols);
}

// Writes rows of a dense model, bit for bit: one block a row, out[i] = weights[wanted[i]]. A row outside of the matrix stops
// the kernel with an error, as in torch's own gather.
extern "C" __global__ void __launch_bounds__(THREADS) packed_gather(
    const u32* packed, const i64* wanted, const int* first, const u32* entries, const float* scale, const float* col_scale,
    u16* out, int rows, int cols, u32 factor) {
    const i64 row = wanted[blockIdx.x];
    if (row < 0 || row >= rows) stop();
    const int group = row % 8, half = row % 16 / 8, tiles = (cols + 63) / 64;
    const float step = scale ? scale[row] : 0.0f;
    const u32* start = packed + row / 16 * tiles * 32 * BITS;
    u16* place = out + (i64)blockIdx.x * cols;
    for (int unit = threadIdx.x; unit < 4 * tiles; unit += THREADS) {
        const int column = 16 * unit;
        if (column >= cols) continue;
        u32 words[BITS];
        load_tile(words, start + (i64)(unit / 4) * 32 * BITS, 4 * group + unit % 4);
        write_sixteen(words, half, step, col_scale, column, factor, place + column);
    }
    if (first == 0) return;
    __syncthreads();
    write_exceptions(first, entries, (int)row, threadIdx.x, THREADS, step, col_scale, place);
}

// Writes inputs * col_scale, rounded once, as [tokens, cols] and, where by_column != 0, as [cols, 8 * token_tiles] with zeros for the
// tokens beyond the last.  col_scale == 0: the inputs themselves, and scaled is not written.
extern "C" __global__ void __launch_bounds__(256) prepare_inputs(
    const u16* inputs, const float* col_scale, u16* scaled, u16* by_column, int tokens, int cols, int token_tiles) {
    for (int index = blockIdx.x * 256 + threadIdx.x; index < token_tiles * cols; index += gridDim.x * 256) {
        const int tile = index / cols, column = index % cols;
        u32 values[8];
#pragma unroll
        for (int k = 0; k < 8; ++k) {
            const i64 place = (i64)(8 * tile + k) * cols + column;
            values[k] = 8 * tile + k < tokens ? inputs[place] : 0;
            if (col_scale == 0 || 8 * tile + k >= tokens) continue;
            values[k] = to_16_bits(from_16_bits((u16)values[k]) * col_scale[column]);
            scaled[place] = (u16)values[k];
        }
        if (by_column != 0)
            ((uint4*)by_column)[(i64)column * token_tiles + tile] = uint4{
                values[0] | values[1] << 16, values[2] | values[3] << 16, values[4] | values[5] << 16, values[6] | values[7] << 16};
    }
}
