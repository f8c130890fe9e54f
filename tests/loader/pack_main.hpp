// Put behind pack.cu: calls its kernels for each block. See block.hpp.

static struct {
    const void* source;
    const int* first;
    int* row_counts;
    u64* counts;
    u32* packed;
    u32* entries;
    int rows, cols, base;
} call;

static void exponents_body() { count_exponents((const u16*)call.source, call.rows, call.cols, call.counts); }
static void beyond_body() { count_beyond(call.source, call.rows, call.cols, call.counts); }
static void exceptions_body() { count_exceptions(call.source, call.row_counts, call.rows, call.cols, call.base); }
static void rows_body() { pack_rows(call.source, call.first, call.packed, call.entries, call.rows, call.cols, call.base); }

static void run_all(int blocks, int threads, void (*body)()) {
    gridDim.x = blocks;
    gridDim.y = 1;
    for (blockIdx.x = 0; blockIdx.x < (unsigned)blocks; ++blockIdx.x) block::run(threads, body);
}

extern "C" void launch_count_exponents(int blocks, int, int threads, const void* weights, int rows, int cols, u64* counts) {
    call = {};
    call.source = weights, call.rows = rows, call.cols = cols, call.counts = counts;
    run_all(blocks, threads, exponents_body);
}
extern "C" void launch_count_beyond(int blocks, int, int threads, const void* codes, int rows, int cols, u64* counts) {
    call = {};
    call.source = codes, call.rows = rows, call.cols = cols, call.counts = counts;
    run_all(blocks, threads, beyond_body);
}
extern "C" void launch_count_exceptions(int blocks, int, int threads, const void* source, int* counts, int rows, int cols, int base) {
    call = {};
    call.source = source, call.row_counts = counts, call.rows = rows, call.cols = cols, call.base = base;
    run_all(blocks, threads, exceptions_body);
}
extern "C" void launch_pack_rows(int blocks, int, int threads, const void* source, const int* first, u32* packed, u32* entries,
                                 int rows, int cols, int base) {
    call = {};
    call.source = source, call.first = first, call.packed = packed, call.entries = entries;
    call.rows = rows, call.cols = cols, call.base = base;
    run_all(blocks, threads, rows_body);
}
