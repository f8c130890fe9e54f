// Products with packed weights by single warps. A block multiplies ROW_TILES * ROW_WARPS tiles of 16 rows; COL_WARPS warps share the
// columns of each. Packed words come through a ring of STAGES buffers in shared memory, filled by asynchronous copies, so that
// STAGES - 1 tiles of a warp are on their way while it multiplies one. A warp widens a tile's values in registers, exactly, and
// gives them to the matrix units, which sum in float32. Partial sums are added in the order of the warps, so a result does not
// depend on timing. Behind tile.cu. Macros: those there, and ROW_TILES, ROW_WARPS, COL_WARPS.

#define WARPS (ROW_WARPS * COL_WARPS)
#define THREADS (32 * WARPS)
#define ROWS (16 * ROW_TILES * ROW_WARPS)
#define STAGE_WEIGHTS (WARPS * ROW_TILES * TILE_BYTES)
#if TOKEN_TILES > 1
#define STAGE_INPUTS (1024 * COL_WARPS * TOKEN_TILES)
#else
#define STAGE_INPUTS 0      // a single tile of tokens is read through the first-level cache, which all blocks of a multiprocessor share
#endif
#define STAGE_BYTES (STAGE_WEIGHTS + STAGE_INPUTS)
#define SHARE (THREADS / ROWS)      // threads that share the exceptions of a row, for one tile of tokens
#define HELD 2                      // exceptions that a thread loads before it needs them

// Computes out[token, row] = (sum over columns of inputs[token, column] * weight[row, column]) * scale[row] + bias[row].
//
// packed: [row tiles, column tiles, 32 * BITS] words.  inputs: [tokens, cols], 16-byte aligned, cols a multiple of 16.
// by_column: the same as `Sixteen` takes them, read where there are exceptions and TOKEN_TILES > 1.
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
    const int sixteens = 16 * gridDim.y * COL_WARPS;
#pragma unroll
    for (int i = 0; i < ROW_TILES; ++i) {
        const int top = 16 * (first_tile + i);
        exceptions[i].start = exceptions[i].end = 0;
        if (first != 0 && top < rows) exceptions[i].find(first, entries, top, rows, blockIdx.y * COL_WARPS + col_warp, sixteens);
    }
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
        if (TOKEN_TILES <= 8 && sixteen.left()) sixteen.gather(by_column, 0);
        while (sixteen.left()) {
            sixteen.add(sums[i], by_column);
            sixteen.advance(entries, by_column, sixteens);
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
