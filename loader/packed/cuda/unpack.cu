// Unpacks matrices, whole or by rows. Behind tile.cu.

#define THREADS 256
#define WARPS 8

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
