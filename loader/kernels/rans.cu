// Decodes `rans` chunks: one warp a chunk, one lane of the warp a lane of the code (SPEC.md 6). The twin of `_decode_kernel` in
// rans.py, with what that one gathers from the first-level cache in shared memory: the chunk's table and a ring of its next words.
//
// Compiled at run time by NVRTC, and for the tests by a C++ compiler, 32 coroutines acting as a warp.
//
// Whatever the bytes are, a chunk takes as many steps as it has symbols and writes no byte but its own. No word outside of the
// chunk is read: the ring is filled with zeros there.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;

#define EVERY 0xFFFFFFFFu
#define LOWER 65536u

// A chunk's words, 128 at a time, two to a pair. Lane `lane` brings in pair `lane` of each half; one half ahead waits in registers.
struct Words {
    const u32* pairs;
    u32* ring;       // 64 pairs, shared
    u32 last;        // number of pairs
    u32 next;        // first pair that is not yet asked for
    u32 position;    // words read so far
    u32 boundary;    // of them, where the older half of the ring is used up
    u32 ahead;
    int lane;
};

static __device__ __forceinline__ u32 fetch(Words& words) {
    u32 pair = words.next + words.lane;
    words.next += 32;
    return pair < words.last ? words.pairs[pair] : 0;
}

static __device__ __forceinline__ void start(Words& words) {
    words.ring[words.lane] = fetch(words);
    words.ring[32 + words.lane] = fetch(words);
    words.ahead = fetch(words);
    __syncwarp();
}

// Gives each lane that needs one the next word, in the lanes' order.
static __device__ __forceinline__ u32 refill(Words& words, u32 state, bool needs, u32 before) {
    u32 vote = __ballot_sync(EVERY, needs);
    u32 place = words.position + __popc(vote & before);
    u32 word = ((const u16*)words.ring)[place & 127];
    words.position += __popc(vote);
    if (words.position >= words.boundary) {
        __syncwarp();
        words.ring[(words.boundary >> 1) - 32 + words.lane & 63] = words.ahead;
        words.boundary += 64;
        words.ahead = fetch(words);
        __syncwarp();
    }
    return needs ? state << 16 | word : state;
}

extern "C" __global__ void __launch_bounds__(32) decode_rans(
    const u8* stored, const i64* fields, const u8* symbols, const u32* ranges, const int* precisions, u8* arena, int* faults,
    int slots) {
    extern __shared__ uint4 shared[];
    u8* symbol_of = (u8*)shared;               // of each slot
    u32* range_of = (u32*)(symbol_of + slots);  // of each symbol: frequency | start << 16
    const int lane = threadIdx.x;
    const i64* own = fields + 5 * (i64)blockIdx.x;
    const u8* slot_bytes = stored + own[0];
    const u32 count = (u32)own[1], length = (u32)own[2];
    u8* out = arena + own[3] + lane;
    const i64 table = own[4];
    const int precision = precisions[table];
    const u32 mask = (1u << precision) - 1, before = (1u << lane) - 1;

    const uint4* symbols_there = (const uint4*)(symbols + table * slots);
    for (int index = lane; index < slots / 16; index += 32) shared[index] = symbols_there[index];
    for (int index = lane; index < 256; index += 32) range_of[index] = ranges[table * 256 + index];
    Words words = {(const u32*)(slot_bytes + 128), range_of + 256, (count + 1) / 2, 0, 0, 64, 0, lane};
    start(words);

    u32 state = ((const u32*)slot_bytes)[lane];
    const bool small = __any_sync(EVERY, state < LOWER);
#pragma unroll 4
    for (u32 step = length / 32; step > 0; --step) {
        u32 slot = state & mask;
        u32 symbol = symbol_of[slot];
        u32 range = range_of[symbol];
        *out = (u8)symbol;
        out += 32;
        state = (range & 0xFFFF) * (state >> precision) + slot - (range >> 16);
        state = refill(words, state, state < LOWER, before);
    }
    const bool active = lane < (int)(length % 32);
    u32 slot = state & mask;
    u32 symbol = symbol_of[slot];
    u32 range = range_of[symbol];
    if (active) *out = (u8)symbol;
    u32 following = (range & 0xFFFF) * (state >> precision) + slot - (range >> 16);
    following = refill(words, following, active && following < LOWER, before);
    state = active ? following : state;
    const bool open = __any_sync(EVERY, state != LOWER);
    if (lane == 0) faults[blockIdx.x] = small ? 1 : words.position != count ? 2 : open ? 3 : 0;
}
