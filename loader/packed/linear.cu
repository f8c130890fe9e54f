// Products with packed weights, and unpacking (layout.py defines the layout). A block multiplies ROW_TILES * ROW_WARPS tiles of 16
// rows; COL_WARPS warps share the columns of each. A warp widens a tile's values in registers, exactly, and gives them to the matrix
// units, which sum in float32. Partial sums are added in the order of the warps, so a result does not depend on timing.
//
// Compiled at run time by NVRTC, and for the tests by a C++ compiler (block.hpp emulates a block). Macros that the caller defines:
//   BITS         2 to 8: codes;  12: bf16 weights
//   IS_HALF      inputs and outputs are float16, otherwise bfloat16
//   ROW_TILES, TOKEN_TILES (of 8 tokens), ROW_WARPS, COL_WARPS

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;

#define EVERY 0xFFFFFFFFu
#define WARPS (ROW_WARPS * COL_WARPS)
#define THREADS (32 * WARPS)
#define ROWS (16 * ROW_TILES * ROW_WARPS)
#define SHARE (THREADS / ROWS)          // threads that share the exceptions of a row

#if BITS < 8
#define WIDTH4 (BITS & 4)
#else
#define WIDTH4 4
#endif

// Where the planes of a lane begin among its words of a tile.
#define PLANE8 0
#if BITS == 12
#define PLANE4 8
#else
#define PLANE4 0
#endif
#define PLANE2 WIDTH4
#define PLANE1 (WIDTH4 + (BITS & 2))

#if IS_HALF
#define MAGIC 0x64006400u    // 1024: the last 10 bits are units
#define OFFSET 1024
#define ONE 0x3C003C00u
#else
#define MAGIC 0x43004300u    // 128: the last 7 bits are units
#define OFFSET 128
#define ONE 0x3F803F80u
#endif

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

// Loads a lane's words of a tile.
static __device__ __forceinline__ void load_tile(u32* words, const u32* tile, int lane) {
#if BITS == 12
    load4(words, tile + 4 * lane);
    load4(words + 4, tile + 128 + 4 * lane);
    load4(words + 8, tile + 256 + 4 * lane);
#elif BITS == 8
    load4(words, tile + 4 * lane);
    load4(words + 4, tile + 128 + 4 * lane);
#else
#if WIDTH4
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

static __device__ __forceinline__ u32 shifted(u32 word, int right) {
    return right >= 0 ? word >> right : word << -right;
}

// Returns two weights as 16-bit floats: register `r` of `step`. Codes are exact, bf16 weights are the very weights.
// `factor` is 2^base twice, for bf16 weights.
static __device__ __forceinline__ u32 widen(const u32* words, int step, int r, u32 factor) {
#if BITS == 12
    u32 pair = words[PLANE8 + 2 * step + r / 2] >> 8 * (r & 1);
    u32 small = (pair & 0x007F007Fu) | (pair & 0x00800080u) << 8 | (shifted(words[PLANE4 + step], 4 * r - 7) & 0x07800780u);
    return fma_pair(small, factor, 0x80008000u);
#elif BITS == 8
    u32 low = words[step] >> 4 * r & 0x000F000Fu, high = words[4 + step] >> 4 * r & 0x000F000Fu;
#if IS_HALF
    return fma_pair(low | high << 4 | MAGIC, ONE, 0xE480E480u);          // -(1024 + 128)
#else
    high = fma_pair(high | MAGIC, ONE, 0xC308C308u);                     // -(128 + 8)
    low = fma_pair(low | MAGIC, ONE, 0xC300C300u);                       // -128
    return fma_pair(high, 0x41804180u, low);                             // 16 high + low
#endif
#else
    u32 code = MAGIC;
#if WIDTH4
    code |= words[step] >> 4 * r & 0x000F000Fu;
#endif
#if BITS & 2
    code |= (words[PLANE2 + step / 2] >> (8 * (step & 1) + 2 * r) & 0x00030003u) << WIDTH4;
#endif
#if BITS & 1
    code |= (words[PLANE1] >> (4 * step + r) & 0x00010001u) << (WIDTH4 + (BITS & 2));
#endif
#if IS_HALF
    const u32 zero = 0xE400u + (1 << BITS - 1);      // -(1024 + 2^(BITS - 1))
#else
    const u32 zero = 0xC300u + (1 << BITS - 1);      // -(128 + 2^(BITS - 1))
#endif
    return fma_pair(code, ONE, zero << 16 | zero);
#endif
}

// Computes out[token, row] = (sum over columns of inputs[token, column] * weight[row, column]) * scale[row] + bias[row].
//
// packed: [row tiles, column tiles, 32 * BITS] words.  inputs, 16-byte aligned, cols a multiple of 16: [tokens, cols] for one tile
// of tokens; for more as `prepare_inputs` lays them out, so that a warp reads 512 adjacent bytes.
// split_sums: float32 [gridDim.y, tokens, rows] where blocks share the columns of a row; `finish_splits` adds them up. Else 0.
// by_column: the inputs as [cols, 8 * TOKEN_TILES], read where there are exceptions; for one token in one tile the inputs.
// exceptions of row r: entries first[r] ... first[r + 1] - 1, column | value << 16; first == 0: none.  scale, bias: may be 0.
extern "C" __global__ void __launch_bounds__(THREADS) packed_linear(
    const u32* packed, const u16* inputs, const u16* by_column, const int* first, const u32* entries, const float* scale,
    const u16* bias, u16* out, float* split_sums, int tokens, int rows, int cols, u32 factor) {
    __shared__ float partial[COL_WARPS][8][ROWS];
    __shared__ float extra[8][ROWS];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int row_warp = warp % ROW_WARPS, col_warp = warp / ROW_WARPS;
    const int group = lane >> 2, quarter = lane & 3;
    const int all_tiles = (cols + 63) / 64, row_tiles = (rows + 15) / 16;
    const int share_tiles = (all_tiles + gridDim.y - 1) / gridDim.y, first_col_tile = blockIdx.y * share_tiles;
    const int tiles = first_col_tile + share_tiles < all_tiles ? first_col_tile + share_tiles : all_tiles;
    const int first_row = blockIdx.x * ROWS, first_tile = blockIdx.x * (ROWS / 16) + row_warp * ROW_TILES;

    float sums[ROW_TILES][TOKEN_TILES][4];
#pragma unroll
    for (int i = 0; i < ROW_TILES; ++i)
#pragma unroll
        for (int j = 0; j < TOKEN_TILES; ++j)
#pragma unroll
            for (int k = 0; k < 4; ++k) sums[i][j][k] = 0.0f;

    const u32* start[ROW_TILES];
#pragma unroll
    for (int i = 0; i < ROW_TILES; ++i) {
        int tile = first_tile + i < row_tiles ? first_tile + i : row_tiles - 1;
        start[i] = packed + (i64)tile * all_tiles * 32 * BITS;
    }
    u32 next[ROW_TILES][BITS];
    if (first_col_tile + col_warp < tiles) {
#pragma unroll
        for (int i = 0; i < ROW_TILES; ++i)
            load_tile(next[i], start[i] + (i64)(first_col_tile + col_warp) * 32 * BITS, lane);
    }
    // Asked for early: the exceptions are read at the end.
    const int own = threadIdx.x / SHARE, part = threadIdx.x % SHARE;
    int begin = 0, end = 0;
    if (first != 0 && blockIdx.y == 0 && first_row + own < rows) {
        begin = first[first_row + own];
        end = first[first_row + own + 1];
    }

    for (int tile = first_col_tile + col_warp; tile < tiles; tile += COL_WARPS) {
        u32 words[ROW_TILES][BITS];
#pragma unroll
        for (int i = 0; i < ROW_TILES; ++i)
#pragma unroll
            for (int k = 0; k < BITS; ++k) words[i][k] = next[i][k];
        if (tile + COL_WARPS < tiles) {
#pragma unroll
            for (int i = 0; i < ROW_TILES; ++i) load_tile(next[i], start[i] + (i64)(tile + COL_WARPS) * 32 * BITS, lane);
        }
#pragma unroll
        for (int pair = 0; pair < 2; ++pair) {
            uint4 vectors[TOKEN_TILES];
#pragma unroll
            for (int j = 0; j < TOKEN_TILES; ++j) {
#if TOKEN_TILES == 1
                const int column = 64 * tile + 16 * quarter;
                vectors[j] = uint4{0, 0, 0, 0};
                if (group < tokens && column < cols) vectors[j] = ((const uint4*)(inputs + (i64)group * cols + column))[pair];
#else
                vectors[j] = ((const uint4*)inputs)[((tile * TOKEN_TILES + j) * 2 + pair) * 32 + lane];
#endif
            }
#pragma unroll
            for (int half = 0; half < 2; ++half) {
#pragma unroll
                for (int i = 0; i < ROW_TILES; ++i) {
                    u32 weights[4];
#pragma unroll
                    for (int r = 0; r < 4; ++r) weights[r] = widen(words[i], 2 * pair + half, r, factor);
#pragma unroll
                    for (int j = 0; j < TOKEN_TILES; ++j)
                        multiply(sums[i][j], weights, half ? vectors[j].z : vectors[j].x, half ? vectors[j].w : vectors[j].y);
                }
            }
        }
    }

#pragma unroll
    for (int j = 0; j < TOKEN_TILES; ++j) {
        if (8 * j >= tokens) break;
        if (j > 0) __syncthreads();
#pragma unroll
        for (int i = 0; i < ROW_TILES; ++i)
#pragma unroll
            for (int k = 0; k < 4; ++k)
                partial[col_warp][2 * quarter + (k & 1)][16 * (row_warp * ROW_TILES + i) + group + 8 * (k >> 1)] = sums[i][j][k];
        if (first != 0) {
            float values[8];
#pragma unroll
            for (int k = 0; k < 8; ++k) values[k] = 0.0f;
            for (int entry = begin + part; entry < end; entry += SHARE) {
                const u32 found = entries[entry];
                const float value = exception_value(found);
                const i64 place = found & 0xFFFF;
                if (TOKEN_TILES == 1 && tokens == 1) {
                    values[0] += value * from_16_bits(by_column[place]);
                    continue;
                }
                const uint4 eight = *(const uint4*)(by_column + place * 8 * TOKEN_TILES + 8 * j);
                const u32 pairs[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
                for (int k = 0; k < 8; ++k) values[k] += value * from_16_bits((u16)(pairs[k / 2] >> 16 * (k & 1)));
            }
#pragma unroll
            for (int k = 0; k < 8; ++k) {
                if (8 * j + k >= tokens) break;
#pragma unroll
                for (int away = SHARE / 2; away > 0; away /= 2) values[k] += __shfl_xor_sync(EVERY, values[k], away);
                if (part == 0) extra[k][own] = values[k];
            }
        }
        __syncthreads();
        const int count = tokens - 8 * j < 8 ? tokens - 8 * j : 8;
        for (int index = threadIdx.x; index < count * ROWS; index += THREADS) {
            const int token = index / ROWS, local = index % ROWS, row = first_row + local;
            if (row >= rows) continue;
            float value = first != 0 ? extra[token][local] : 0.0f;
#pragma unroll
            for (int i = 0; i < COL_WARPS; ++i) value += partial[i][token][local];
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
        low *= col_scale ? step * col_scale[column + 2 * k] : step;
        high *= col_scale ? step * col_scale[column + 2 * k + 1] : step;
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

// Writes inputs * col_scale, rounded once (without col_scale: the inputs), for `packed_linear`, and where by_column != 0 the same as
// [cols, 8 * token_tiles]. One tile of tokens stays [tokens, cols]. More are cut into [column tiles, token_tiles, 2, lanes, 8]:
// lane 4 g + t of pair p has columns 16 t + 8 p ... 16 t + 8 p + 7 of token g. Tokens and columns beyond the last are zero there.
extern "C" __global__ void __launch_bounds__(256) prepare_inputs(
    const u16* inputs, const float* col_scale, u16* prepared, u16* by_column, int tokens, int cols, int token_tiles) {
    const int width = 8 * token_tiles, padded = (cols + 63) / 64 * 64;
    for (int index = blockIdx.x * 256 + threadIdx.x; index < width * padded; index += gridDim.x * 256) {
        const int token = index / padded, column = index % padded;
        u16 value = 0;
        if (token < tokens && column < cols) {
            value = inputs[(i64)token * cols + column];
            if (col_scale != 0) value = to_16_bits(from_16_bits(value) * col_scale[column]);
        }
        if (by_column != 0 && column < cols) by_column[(i64)column * width + token] = value;
        if (token_tiles == 1) {
            if (token < tokens && column < cols) prepared[(i64)token * cols + column] = value;
        } else {
            const int lane = 4 * (token % 8) + column % 64 / 16;
            prepared[((((i64)column / 64 * token_tiles + token / 8) * 2 + column % 16 / 8) * 32 + lane) * 8 + column % 8] = value;
        }
    }
}
