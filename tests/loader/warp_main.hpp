// Put behind rans.cu: calls its kernel for each block. See warp.hpp.

static struct {
    const u8* stored;
    const i64* fields;
    const u8* symbols;
    const u32* ranges;
    const int* precisions;
    u8* arena;
    int* faults;
    int slots;
} given;

static void lane_body() {
    decode_rans(given.stored, given.fields, given.symbols, given.ranges, given.precisions, given.arena, given.faults, given.slots);
}

extern "C" void launch(int blocks, const u8* stored, const i64* fields, const u8* symbols, const u32* ranges,
                       const int* precisions, u8* arena, int* faults, int slots) {
    given = {stored, fields, symbols, ranges, precisions, arena, faults, slots};
    for (blockIdx.x = 0; blockIdx.x < (unsigned)blocks; ++blockIdx.x) warp::run(lane_body);
}
