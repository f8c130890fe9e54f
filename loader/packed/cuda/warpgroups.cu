// Products with packed weights by warpgroups, for the matrix units of Hopper (wgmma). Four warps multiply 64 rows by all tokens: a
// warp widens its tile of 16 rows in registers, step by step, and the inputs come from shared memory, where they lie as the matrix
// units read them. Weights and inputs come through a ring of STAGES buffers, filled by bulk copies. SPLITS blocks share
// the columns of a row; they are a cluster, and each adds up a share of the sums out of the shared memory of all, in their order.
// So a result does not depend on timing. A kernel that prepares the inputs runs before; the first weights are fetched meanwhile.
// Behind tile.cu. Macros: those there, and GROUPS (warpgroups of a block), SPLITS.

#define THREADS (128 * GROUPS)
#define ROWS (64 * GROUPS)
#define TOKENS (8 * TOKEN_TILES)
#define STEP_INPUTS (8 * TOKENS * STEP_TILES)                   // pieces of 16 bytes of the columns of a step
#define WARP_WEIGHTS (STEP_TILES * (TILE_BYTES / 16))
#define STAGE_WEIGHTS (4 * GROUPS * WARP_WEIGHTS)
#define STAGE_PIECES (STAGE_WEIGHTS + STEP_INPUTS)
#define BARRIER_PIECES 8                                        // room for 16 barriers ahead of the ring
#define CHUNK (TOKENS < 64 ? TOKENS : 64)                       // tokens whose sums lie in shared memory at the same time
#define PITCH (ROWS + 4)                                        // floats from token to token there: spreads a warp over the banks

#ifndef EMULATED
#if SPLITS > 1
#define IN_CLUSTER __cluster_dims__(1, SPLITS, 1)
#else
#define IN_CLUSTER
#endif

// How the matrix units find 16 columns of all tokens: matrices of 8 tokens x 8 columns, 128 bytes each, those of the next
// tokens behind one another, those of the next columns behind all tokens.
static __device__ __forceinline__ u64 described(const uint4* place) {
    const u64 address = (u32)__cvta_generic_to_shared(place) & 0x3FFFF;     // without the block's rank in its cluster
    return address >> 4 | (u64)TOKENS << 16 | (u64)8 << 32;
}
// Registers of weights and sums are written before, and products begin behind this.
static __device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
static __device__ __forceinline__ void end_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
static __device__ __forceinline__ void wait_for_products() { asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory"); }
// Begins a copy of a multiple of 16 bytes to shared memory; `barrier` counts its bytes.
static __device__ __forceinline__ void copy_bulk(uint4* to, const uint4* from, u32 bytes, u64* barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
        :: "r"((u32)__cvta_generic_to_shared(to)), "l"(from), "r"(bytes), "r"((u32)__cvta_generic_to_shared(barrier)) : "memory");
}
// Makes barriers whose phases end with this number of arrivals, and of bytes that are expected. The block meets before it uses them.
static __device__ __forceinline__ void make_barriers(u64* barriers, int count, int arrivals) {
    for (int k = 0; k < count; ++k)
        asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;"
            :: "r"((u32)__cvta_generic_to_shared(barriers + k)), "r"(arrivals) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
// Tells a barrier the bytes of its next phase.
static __device__ __forceinline__ void expect(u64* barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
        :: "r"((u32)__cvta_generic_to_shared(barrier)), "r"(bytes) : "memory");
}
static __device__ __forceinline__ void arrive(u64* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"((u32)__cvta_generic_to_shared(barrier)) : "memory");
}
// Waits until a phase is complete; phases are numbered 0, 1, 0, 1 ...
static __device__ __forceinline__ void wait_for_phase(u64* barrier, u32 phase) {
    u32 done;
    do {
        asm volatile("{ .reg .pred done; mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2; selp.u32 %0, 1, 0, done; }"
            : "=r"(done) : "r"((u32)__cvta_generic_to_shared(barrier)), "r"(phase) : "memory");
    } while (!done);
}
// Keeps the compiler from computing or moving a number later: behind the start of a product, or ahead of its end.
static __device__ __forceinline__ void hold(float& sum) { asm volatile("" : "+f"(sum)::"memory"); }
static __device__ __forceinline__ void hold(u32& weights) { asm volatile("" : "+r"(weights)::"memory"); }

// Waits for all threads of the cluster, and shows each what the others wrote.
static __device__ __forceinline__ void meet_cluster() {
#if SPLITS > 1
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
    __syncthreads();
#endif
}
// Waits for all threads of the cluster, which have read what they need.
static __device__ __forceinline__ void leave_cluster() {
#if SPLITS > 1
    asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
#else
    __syncthreads();
#endif
}
// Returns a number at a place in the shared memory of block `rank` of the cluster.
static __device__ __forceinline__ float of_block(const float* place, int rank) {
#if SPLITS > 1
    float value;
    asm volatile("{ .reg .u32 there; mapa.shared::cluster.u32 there, %1, %2; ld.shared::cluster.f32 %0, [there]; }"
        : "=f"(value) : "r"((u32)__cvta_generic_to_shared(place)), "r"(rank) : "memory");
    return value;
#else
    return *place;
#endif
}
#endif

// Computes out[token, row] = (sum over columns of inputs[token, column] * weight[row, column]) * scale[row] + bias[row].
//
// Adjacent blocks multiply the same rows by blocks of TOKENS tokens.
//
// packed: [row tiles, column tiles, 32 * BITS] words.  prepared, by_column: inputs as `prepare_groups` writes them.
// exceptions of row r: entries first[r] ... first[r + 1] - 1, column | value << 16; first == 0: none.  scale, bias: may be 0.
extern "C" __global__ void IN_CLUSTER __launch_bounds__(THREADS) packed_groups(
    const u32* packed, const uint4* prepared, const u16* by_column, const int* first, const u32* entries, const float* scale,
    const u16* bias, u16* out, int tokens, int rows, int cols, u32 factor) {
    const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;
    const int group = lane >> 2, quarter = lane & 3;
    const int all_tiles = (cols + 63) / 64, row_tiles = (rows + 15) / 16;
    const int share_tiles = ((all_tiles + SPLITS - 1) / SPLITS + STEP_TILES - 1) / STEP_TILES * STEP_TILES;
    const int first_tile = blockIdx.y * share_tiles;
    const int tiles = first_tile + share_tiles < all_tiles ? share_tiles : all_tiles - first_tile;
    const int steps = tiles > 0 ? (tiles + STEP_TILES - 1) / STEP_TILES : 0;
    const int token_blocks = (tokens + TOKENS - 1) / TOKENS, row_block = blockIdx.x / token_blocks;
    const int token_block = blockIdx.x % token_blocks, first_token = token_block * TOKENS;
    const int row_tile = row_block * 4 * GROUPS + warp, first_row = row_block * ROWS;

    u64 *full = (u64*)stage_memory, *empty = full + STAGES;
    uint4* ring = stage_memory + BARRIER_PIECES;
    by_column += (i64)token_block * cols * TOKENS;

    // The first lane of each warp copies its weights, and one the inputs too.
    const int copied_tile = row_tile < row_tiles ? row_tile : row_tiles - 1;
    const uint4* weights_from = (const uint4*)(packed + ((i64)copied_tile * all_tiles + first_tile) * 32 * BITS);
    const uint4* inputs_from = prepared + ((i64)token_block * all_tiles + first_tile) * 8 * TOKENS;
    const auto in_step = [&](int step) { return STEP_TILES == 1 || STEP_TILES * (step + 1) <= tiles ? STEP_TILES : 1; };
    const auto expect_step = [&](int step, int stage) {
        if (thread == 0) expect(full + stage, in_step(step) * (4 * GROUPS * TILE_BYTES + 128 * TOKENS));
    };
    const auto copy_weights = [&](int step, int stage) {
        uint4* to = ring + stage * STAGE_PIECES + warp * WARP_WEIGHTS;
        if (lane == 0) copy_bulk(to, weights_from + (i64)step * WARP_WEIGHTS, in_step(step) * TILE_BYTES, full + stage);
    };
    const auto copy_inputs = [&](int step, int stage) {
        uint4* to = ring + stage * STAGE_PIECES + STAGE_WEIGHTS;
        if (thread == 0) copy_bulk(to, inputs_from + (i64)step * STEP_INPUTS, in_step(step) * 128 * TOKENS, full + stage);
    };
    if (thread == 0) {
        make_barriers(full, STAGES, 1);
        make_barriers(empty, STAGES, 4 * GROUPS);
    }
    for (int step = 0; step < STAGES && step < steps; ++step) expect_step(step, step);
    __syncthreads();
    for (int step = 0; step < STAGES && step < steps; ++step) copy_weights(step, step);
    Sixteen exceptions;
    exceptions.start = exceptions.end = 0;
    if (first != 0 && 16 * row_tile < rows) exceptions.find(first, entries, 16 * row_tile, rows, blockIdx.y, 16 * SPLITS);
    wait_for_dependencies();
    for (int step = 0; step < STAGES && step < steps; ++step) copy_inputs(step, step);
    __syncwarp();

    float sums[TOKEN_TILES][4];
#pragma unroll
    for (int j = 0; j < TOKEN_TILES; ++j)
#pragma unroll
        for (int k = 0; k < 4; ++k) sums[j][k] = 0.0f;

    int stage = 0, last = STAGES - 1;
    u32 phase = 0, last_phase = 1;
    for (int step = 0; step < steps; ++step) {
        wait_for_phase(full + stage, phase);
        const uint4* buffer = ring + stage * STAGE_PIECES;
        u32 weights[STEP_TILES][16];    // in use until the products have ended
#pragma unroll
        for (int tile = 0; tile < STEP_TILES; ++tile) {
            if (tile > 0 && STEP_TILES * step + tile >= tiles) break;
            u32 words[BITS];
            take_tile(words, (const u32*)(buffer + warp * WARP_WEIGHTS + tile * (TILE_BYTES / 16)), lane);
            // The matrix units work on 16 columns while the next 16 are widened.
#pragma unroll
            for (int k = 0; k < 4; ++k) {
#pragma unroll
                for (int r = 0; r < 4; ++r) {
                    weights[tile][4 * k + r] = widen(words, k, r, factor);
                    hold(weights[tile][4 * k + r]);
                }
                begin_products();
                multiply_group(sums, weights[tile] + 4 * k, described(buffer + STAGE_WEIGHTS + (8 * tile + 2 * k) * TOKENS));
                end_products();
            }
        }
        // The buffer of the step before, which the other warps have left by now, is filled again.
        if (step > 0 && step + STAGES - 1 < steps) {
            if (warp == 0) wait_for_phase(empty + last, last_phase);
            expect_step(step + STAGES - 1, last);
            copy_weights(step + STAGES - 1, last);
            copy_inputs(step + STAGES - 1, last);
            __syncwarp();
        }
        wait_for_products();
        if (lane == 0) arrive(empty + stage);
        last = stage;
        last_phase = phase;
        if (++stage == STAGES) {
            stage = 0;
            phase ^= 1;
        }
    }
#pragma unroll
    for (int j = 0; j < TOKEN_TILES; ++j)
#pragma unroll
        for (int k = 0; k < 4; ++k) hold(sums[j][k]);

    if (TOKEN_TILES <= 8 && exceptions.left()) exceptions.gather(by_column, 0);
    while (exceptions.left()) {
        exceptions.add(sums, by_column);
        exceptions.advance(entries, by_column, 16 * SPLITS);
    }

    float* partial = (float*)ring;
    __syncthreads();    // all have read the ring
#pragma unroll
    for (int chunk = 0; chunk < TOKENS; chunk += CHUNK) {
        if (first_token + chunk >= tokens) break;
#pragma unroll
        for (int j = 0; j < CHUNK / 8; ++j)
#pragma unroll
            for (int k = 0; k < 4; ++k)
                partial[(8 * j + 2 * quarter + (k & 1)) * PITCH + 16 * warp + group + 8 * (k >> 1)] = sums[chunk / 8 + j][k];
        meet_cluster();
        const int share = CHUNK / SPLITS, start = blockIdx.y * share;
        for (int index = thread; index < share * ROWS; index += THREADS) {
            const int token = start + index / ROWS, local = index % ROWS, row = first_row + local;
            if (first_token + chunk + token >= tokens || row >= rows) continue;
            float value = 0.0f;
#pragma unroll
            for (int rank = 0; rank < SPLITS; ++rank) value += of_block(partial + token * PITCH + local, rank);
#if BITS != 12
            value *= ONE_OF_UNITS;
#endif
            if (scale != 0) value *= scale[row];
            if (bias != 0) value += from_16_bits(bias[row]);
            out[(i64)(first_token + chunk + token) * rows + row] = to_16_bits(value);
        }
        leave_cluster();    // nobody writes, or ends, while others read
    }
}
