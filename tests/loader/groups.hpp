// Bulk copies and the matrix units of a warpgroup, for warpgroups.cu on a CPU. Put behind block.hpp; the source is that of tile.cu
// and warpgroups.cu. Odd blocks copy at once and multiply as late as the program allows; even blocks the other way round.

#include <map>

#define IN_CLUSTER

namespace block {

struct Product {
    float (*sums)[4];
    const unsigned* weights;
    const unsigned short* inputs;
};
std::vector<Product> begun[MOST];

// A barrier of bulk copies: phases that are complete, and bytes and copies of the next one.
struct Barrier {
    int arrivals = 1, phases = 0, arrived = 0;
    long expected = 0, known = 0;
    std::vector<Copy> later;
};
std::map<void*, Barrier> barriers;

}  // namespace block

static unsigned long long described(const uint4* place) { return (unsigned long long)place; }
static void begin_products() {}
static void end_products() {}
static void make_barriers(unsigned long long* barriers, int count, int arrivals) {
    for (int k = 0; k < count; ++k) block::barriers[barriers + k] = {arrivals};
}
static void arrive(unsigned long long* barrier) { ++block::barriers[barrier].arrived; }
static void expect(unsigned long long* barrier, unsigned bytes) {
    block::barriers[barrier].expected += bytes;
    arrive(barrier);
}
static void copy_bulk(uint4* to, const uint4* from, unsigned bytes, unsigned long long* barrier) {
    block::Barrier& state = block::barriers[barrier];
    if ((uintptr_t)from % 16 || bytes % 16) std::abort();
    state.known += bytes;
    for (unsigned k = 0; k < bytes / 16; ++k) {
        const block::Copy copy{to + k, from + k, true, 0};
        if (blockIdx.x & 1)
            block::finish(copy);
        else
            state.later.push_back(copy);
    }
}
static void wait_for_phase(unsigned long long* barrier, unsigned phase) {
    block::Barrier& state = block::barriers[barrier];
    while ((state.phases & 1) == (int)phase) {
        if (state.arrived < state.arrivals || state.known != state.expected) {
            block::meet(block::WARP);
            continue;
        }
        for (const block::Copy& copy : state.later) block::finish(copy);
        state = {state.arrivals, state.phases + 1};
    }
}
static void hold(float&) {}
static void hold(unsigned&) {}
static void meet_cluster() { block::meet(block::CLUSTER); }
static void leave_cluster() { block::meet(block::CLUSTER); }
static float of_block(const float* place, int rank) {
    const int own = block::current / block::size;
    return *(const float*)((const char*)place + ((const char*)memories[rank] - (const char*)memories[own]));
}

// A warp multiplies its own 16 rows of a warpgroup's 64.
static void do_product(const block::Product& product) {
    int thread = block::current, lane = thread & 31, turn = block::parity[thread] ^= 1;
    block::Slot& own = block::slots[turn][thread];
    for (int r = 0; r < 4; ++r) own.weights[r] = product.weights[r];
    block::meet(block::WARP_PRODUCT);
    const block::Slot* warp = block::slots[turn] + (thread & ~31);
    for (int j = 0; j < TOKEN_TILES; ++j)
        for (int k = 0; k < 4; ++k) {
            int row = (lane >> 2) + 8 * (k >> 1), token = 8 * j + 2 * (lane & 3) + (k & 1);
            double sum = product.sums[j][k];
            for (int column = 0; column < 16; ++column) {
                int pair = column % 8 / 2, half = column & 1, far = column >= 8;
                unsigned weight = warp[4 * (row % 8) + pair].weights[(row >= 8) + 2 * far];
                unsigned input = product.inputs[(far * 8 * TOKEN_TILES + token) * 8 + column % 8];
                sum += widened(weight, half) * widened(input, 0);
            }
            product.sums[j][k] = (float)sum;
        }
}

static void multiply_group(float (*sums)[4], const unsigned* weights, unsigned long long inputs) {
    const block::Product product{sums, weights, (const unsigned short*)inputs};
    if (blockIdx.x & 1)
        block::begun[block::current].push_back(product);
    else
        do_product(product);
}
static void wait_for_products() {
    const std::vector<block::Product> products = block::begun[block::current];
    block::begun[block::current].clear();
    for (const block::Product& product : products) do_product(product);
    block::meet(block::WARP);
}
