// Put behind linear.cu: calls its kernels for each block. See block.hpp.

static struct {
    const u32* packed;
    const u16* inputs;
    u16* by_column;
    const i64* wanted;
    const int* first;
    const u32* entries;
    const float* scale;
    const float* col_scale;
    const u16* bias;
    u16* out;
    float* split_sums;
    int splits;
    int tokens, rows, cols;
    u32 factor;
} call;

static void linear_body() {
    packed_linear(call.packed, call.inputs, call.by_column, call.first, call.entries, call.scale, call.col_scale, call.bias,
                  call.out, call.split_sums, call.tokens, call.rows, call.cols, call.factor);
}
static void unpack_body() {
    packed_unpack(call.packed, call.first, call.entries, call.scale, call.col_scale, call.out, call.rows, call.cols, call.factor);
}
static void gather_body() {
    packed_gather(call.packed, call.wanted, call.first, call.entries, call.scale, call.col_scale, call.out, call.rows, call.cols,
                  call.factor);
}
static void prepare_body() {
    prepare_inputs(call.inputs, call.col_scale, call.out, call.by_column, call.tokens, call.cols, call.rows);
}
static void finish_body() {
    finish_splits(call.split_sums, call.scale, call.bias, call.out, call.splits, call.tokens, call.rows);
}

static void run_all(int blocks, int layers, int threads, void (*body)()) {
    gridDim.x = blocks;
    gridDim.y = layers;
    for (blockIdx.y = 0; blockIdx.y < (unsigned)layers; ++blockIdx.y)
        for (blockIdx.x = 0; blockIdx.x < (unsigned)blocks; ++blockIdx.x) block::run(threads, body);
}

extern "C" void launch_packed_linear(int blocks, int layers, int threads, const u32* packed, const u16* inputs, u16* by_column,
                                     const int* first, const u32* entries, const float* scale, const float* col_scale,
                                     const u16* bias, u16* out, float* split_sums, int tokens, int rows, int cols, u32 factor) {
    call = {};
    call.packed = packed, call.inputs = inputs, call.by_column = by_column, call.first = first, call.entries = entries;
    call.scale = scale, call.col_scale = col_scale, call.bias = bias, call.out = out, call.split_sums = split_sums;
    call.tokens = tokens, call.rows = rows, call.cols = cols, call.factor = factor;
    run_all(blocks, layers, threads, linear_body);
}
extern "C" void launch_packed_unpack(int blocks, int layers, int threads, const u32* packed, const int* first,
                                     const u32* entries, const float* scale, const float* col_scale, u16* out, int rows,
                                     int cols, u32 factor) {
    call = {};
    call.packed = packed, call.first = first, call.entries = entries, call.scale = scale, call.col_scale = col_scale;
    call.out = out, call.rows = rows, call.cols = cols, call.factor = factor;
    run_all(blocks, layers, threads, unpack_body);
}
extern "C" void launch_packed_gather(int blocks, int layers, int threads, const u32* packed, const i64* wanted,
                                     const int* first, const u32* entries, const float* scale, const float* col_scale,
                                     u16* out, int rows, int cols, u32 factor) {
    call = {};
    call.packed = packed, call.wanted = wanted, call.first = first, call.entries = entries, call.scale = scale;
    call.col_scale = col_scale, call.out = out, call.rows = rows, call.cols = cols, call.factor = factor;
    run_all(blocks, layers, threads, gather_body);
}
extern "C" void launch_prepare_inputs(int blocks, int layers, int threads, const u16* inputs, const float* col_scale, u16* scaled,
                                      u16* by_column, int tokens, int cols, int token_tiles) {
    call = {};
    call.inputs = inputs, call.col_scale = col_scale, call.out = scaled, call.by_column = by_column;
    call.tokens = tokens, call.cols = cols, call.rows = token_tiles;
    run_all(blocks, layers, threads, prepare_body);
}
extern "C" void launch_finish_splits(int blocks, int layers, int threads, float* split_sums, const float* scale, const u16* bias,
                                     u16* out, int splits, int tokens, int rows) {
    call = {};
    call.split_sums = split_sums, call.scale = scale, call.bias = bias, call.out = out, call.splits = splits;
    call.tokens = tokens, call.rows = rows;
    run_all(blocks, layers, threads, finish_body);
}
