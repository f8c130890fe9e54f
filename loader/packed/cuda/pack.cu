// Packs a matrix (layout.py defines the layout): counting what decides the width, then words and exceptions.
// A block has 8 warps and packs 16 rows; each warp takes a run of adjacent column tiles, so exceptions come in the order of columns.
// Lane 4 g + t of a warp reads columns 16 t ... 16 t + 15 of rows g and 8 + g of a tile: its own values of the layout.
//
// Compiled at run time by NVRTC, and for the tests by a C++ compiler (block.hpp emulates a block). Macros that the caller defines:
//   BITS            2 to 8: codes;  12: bf16 weights
//   SOURCE_BYTES    1: int8 codes;  2: int16 codes or bf16 weights
// `base` is the base exponent of bf16 weights, otherwise unused.

#define WARPS 8
#define THREADS (32 * WARPS)
#define HALF (1 << (BITS - 1))

// Reads 16 adjacent elements as integers: codes with their sign, or bf16 patterns.
static __device__ __forceinline__ void read_sixteen(int* values, const void* source, i64 index) {
    const uint4* place = (const uint4*)((const u8*)source + index * SOURCE_BYTES);
#pragma unroll
    for (int part = 0; part < SOURCE_BYTES; ++part) {
        const uint4 four = place[part];
        const u32 words[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
        for (int k = 0; k < 16 / SOURCE_BYTES; ++k) {
#if SOURCE_BYTES == 1
            values[k] = (int)(signed char)(words[k / 4] >> 8 * (k % 4));
#elif BITS == 12
            values[8 * part + k] = (int)(words[k / 2] >> 16 * (k % 2) & 0xFFFF);
#else
            values[8 * part + k] = (int)(short)(words[k / 2] >> 16 * (k % 2));
#endif
        }
    }
}

// Returns the field of a value and whether it is an exception, whose field stands for zero.
static __device__ __forceinline__ u32 field_of(int value, int base, bool* outside) {
#if BITS == 12
    const int exponent = (value >> 7 & 0xFF) - base;
    const bool is_zero = (value & 0x7FFF) == 0;
    *outside = !is_zero && (exponent < 1 || exponent > 15);
    const u32 field = (u32)(value & 0x7F | (is_zero ? 0 : exponent & 0xF) << 7 | value >> 15 << 11);
    return *outside ? 0u : field;
#else
    *outside = value < -HALF || value >= HALF;
    return *outside ? HALF : (u32)(value + HALF);
#endif
}

// Counts the exponents of the weights that are not zero: counts[256] += their number.
extern "C" __global__ void __launch_bounds__(THREADS) count_exponents(const u16* weights, int rows, int cols, u64* counts) {
    const i64 size = (i64)rows * cols;
    __shared__ u32 mine[256 * 32];   // of each lane: a warp meets no two of its threads at one place
    for (int index = threadIdx.x; index < 256 * 32; index += THREADS) mine[index] = 0;
    __syncthreads();
    const int lane = threadIdx.x & 31;
    for (i64 unit = blockIdx.x * (i64)THREADS + threadIdx.x; unit < size / 8; unit += gridDim.x * (i64)THREADS) {
        const uint4 four = ((const uint4*)weights)[unit];
        const u32 words[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
        for (int k = 0; k < 8; ++k) {
            const u32 pattern = words[k / 2] >> 16 * (k % 2);
            if (pattern & 0x7FFF) atomicAdd(&mine[32 * (pattern >> 7 & 0xFF) + lane], 1u);
        }
    }
    __syncthreads();
    for (int exponent = threadIdx.x; exponent < 256; exponent += THREADS) {
        u64 sum = 0;
        for (int k = 0; k < 32; ++k) sum += mine[32 * exponent + (k + lane) % 32];
        if (sum) atomicAdd(&counts[exponent], sum);
    }
}

// Counts the codes beyond each width: counts[b] += those outside of b bits, b = 2 ... 8.
extern "C" __global__ void __launch_bounds__(THREADS) count_beyond(const void* codes, int rows, int cols, u64* counts) {
    const i64 size = (i64)rows * cols;
    u32 mine[9];
#pragma unroll
    for (int b = 2; b <= 8; ++b) mine[b] = 0;
    for (i64 unit = blockIdx.x * (i64)THREADS + threadIdx.x; unit < size / 16; unit += gridDim.x * (i64)THREADS) {
        int values[16];
        read_sixteen(values, codes, 16 * unit);
#pragma unroll
        for (int k = 0; k < 16; ++k) {
            const int magnitude = values[k] < 0 ? ~values[k] : values[k];
#pragma unroll
            for (int b = 2; b <= 8; ++b) mine[b] += magnitude >> (b - 1) != 0;
        }
    }
    __shared__ u32 sums[9];
    if (threadIdx.x < 9) sums[threadIdx.x] = 0;
    __syncthreads();
#pragma unroll
    for (int b = 2; b <= 8; ++b)
        if (mine[b]) atomicAdd(&sums[b], mine[b]);
    __syncthreads();
    if (threadIdx.x >= 2 && threadIdx.x < 9 && sums[threadIdx.x]) atomicAdd(&counts[threadIdx.x], (u64)sums[threadIdx.x]);
}

// Counts the exceptions of the block's 16 rows in each warp's columns.
static __device__ __forceinline__ void count_block(
    int (*counts)[16], const void* source, int rows, int cols, int base, int first_tile, int last_tile) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, group = lane >> 2, quarter = lane & 3;
    int mine[2] = {0, 0};
    for (int tile = first_tile; tile < last_tile; ++tile) {
        const int column = 64 * tile + 16 * quarter;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = 16 * blockIdx.x + 8 * half + group;
            if (row >= rows || column >= cols) continue;
            int values[16];
            read_sixteen(values, source, (i64)row * cols + column);
#pragma unroll
            for (int k = 0; k < 16; ++k) {
                bool outside;
                field_of(values[k], base, &outside);
                mine[half] += outside;
            }
        }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        mine[half] += __shfl_xor_sync(EVERY, mine[half], 1);
        mine[half] += __shfl_xor_sync(EVERY, mine[half], 2);
        if (quarter == 0) counts[warp][8 * half + group] = mine[half];
    }
}

static __device__ __forceinline__ int first_tile_of(int warp, int cols) {
    return (int)((i64)((cols + 63) / 64) * warp / WARPS);
}

// counts[row]: the exceptions of each row.
extern "C" __global__ void __launch_bounds__(THREADS) count_exceptions(
    const void* source, int* counts, int rows, int cols, int base) {
    __shared__ int parts[WARPS][16];
    const int warp = threadIdx.x >> 5;
    count_block(parts, source, rows, cols, base, first_tile_of(warp, cols), first_tile_of(warp + 1, cols));
    __syncthreads();
    const int row = 16 * blockIdx.x + threadIdx.x;
    if (threadIdx.x < 16 && row < rows) {
        int sum = 0;
        for (int k = 0; k < WARPS; ++k) sum += parts[k][threadIdx.x];
        counts[row] = sum;
    }
}

// Puts WIDTH bits (from bit `low` on) of a lane's 32 values into WIDTH words. fields[half row][column].
template <int WIDTH>
static __device__ __forceinline__ void plane_of(u32* words, const u32 (*fields)[16], int low) {
#pragma unroll
    for (int k = 0; k < WIDTH; ++k) words[k] = 0;
#pragma unroll
    for (int step = 0; step < 4; ++step)
#pragma unroll
        for (int r = 0; r < 4; ++r)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const u32 field = fields[r & 1][4 * step + 2 * (r >> 1) + half] >> low & ((1u << WIDTH) - 1);
                if (WIDTH == 8)
                    words[2 * step + r / 2] |= field << (16 * half + 8 * (r & 1));
                else if (BITS == 12)   // the sign lies 4 places higher than the next of the other bits
                    words[step] |= (field & 7) << (16 * half + 4 * r) | (field >> 3) << (16 * half + 4 * r + 7) % 32;
                else
                    words[step * WIDTH / 4] |= field << (16 * half + 4 * WIDTH * (step % (4 / (WIDTH > 4 ? 4 : WIDTH))) + WIDTH * r);
            }
}

// Stores a plane of a lane: four words at most are adjacent.
template <int WIDTH>
static __device__ __forceinline__ u32* store_plane(u32* plane, const u32 (*fields)[16], int low, int lane) {
    u32 words[WIDTH];
    plane_of<WIDTH>(words, fields, low);
    if (WIDTH == 1) plane[lane] = words[0];
    if (WIDTH == 2) ((uint2*)plane)[lane] = uint2{words[0], words[WIDTH > 1 ? 1 : 0]};
#pragma unroll
    for (int k = 0; k + 3 < WIDTH; k += 4) ((uint4*)plane)[8 * k + lane] = uint4{words[k], words[k + 1], words[k + 2], words[k + 3]};
    return plane + 32 * WIDTH;
}

// Writes the words of 16 rows, and their exceptions: row r's begin at first[r].  packed: [row tiles, column tiles, 32 * BITS].
extern "C" __global__ void __launch_bounds__(THREADS) pack_rows(
    const void* source, const int* first, u32* packed, u32* entries, int rows, int cols, int base) {
    __shared__ int parts[WARPS][16];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, group = lane >> 2, quarter = lane & 3;
    const int first_tile = first_tile_of(warp, cols), last_tile = first_tile_of(warp + 1, cols);
    int next[2] = {0, 0};
    if (first != 0) {
        count_block(parts, source, rows, cols, base, first_tile, last_tile);
        __syncthreads();
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = 16 * blockIdx.x + 8 * half + group;
            if (row < rows) next[half] = first[row];
            for (int k = 0; k < warp; ++k) next[half] += parts[k][8 * half + group];
        }
    }
    u32* out = packed + ((i64)blockIdx.x * ((cols + 63) / 64) + first_tile) * 32 * BITS;
    for (int tile = first_tile; tile < last_tile; ++tile, out += 32 * BITS) {
        const int column = 64 * tile + 16 * quarter;
        u32 fields[2][16];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = 16 * blockIdx.x + 8 * half + group;
            int values[16];
            u32 outside_of = 0;
#pragma unroll
            for (int k = 0; k < 16; ++k) values[k] = 0;
            if (row < rows && column < cols) read_sixteen(values, source, (i64)row * cols + column);
#pragma unroll
            for (int k = 0; k < 16; ++k) {
                bool outside;
                fields[half][k] = field_of(values[k], base, &outside);
                outside_of |= (u32)outside << k;
            }
            if (first != 0) {
                const int mine = __popc(outside_of), left = __shfl_up_sync(EVERY, mine, 1, 4);
                const int two = mine + (quarter >= 1 ? left : 0), further = __shfl_up_sync(EVERY, two, 2, 4);
                const int until = two + (quarter >= 2 ? further : 0);      // exceptions of lanes 0 ... quarter
                int place = next[half] + until - mine;
#pragma unroll
                for (int k = 0; k < 16; ++k)
                    if (outside_of >> k & 1) entries[place++] = (u32)values[k] << 16 | (u32)(column + k);
                next[half] += __shfl_sync(EVERY, until, 3, 4);
            }
        }
        u32* plane = out;
#if BITS == 12
        plane = store_plane<8>(plane, fields, 0, lane);
        store_plane<4>(plane, fields, 8, lane);
#elif BITS == 8
        store_plane<8>(plane, fields, 0, lane);
#else
#if BITS & 4
        plane = store_plane<4>(plane, fields, BITS & 3, lane);
#endif
#if BITS & 2
        plane = store_plane<2>(plane, fields, BITS & 1, lane);
#endif
#if BITS & 1
        store_plane<1>(plane, fields, 0, lane);
#endif
#endif
    }
}
