// Runs a CUDA kernel of one warp a block on a CPU: 32 coroutines, each a lane, that take turns between the warp's meetings
// (votes and barriers). Put before the kernel's source with `-include`. A lane that meets the others elsewhere ends the program.

#include <ucontext.h>

#include <cstdio>
#include <cstdlib>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(threads)
#define __shared__

struct uint4 {
    unsigned x, y, z, w;
};
struct Place {
    unsigned x;
};

Place threadIdx, blockIdx;
uint4 shared[4096];

namespace warp {

ucontext_t scheduler, lanes[32];
char stacks[32][1 << 16];
unsigned votes, result;
int met[32];  // where each lane waits; 0 once it has ended

unsigned meet(int where, bool vote) {
    int lane = threadIdx.x;
    votes |= (unsigned)vote << lane;
    met[lane] = where;
    swapcontext(&lanes[lane], &scheduler);
    return result;
}

void run(void (*body)()) {
    for (int lane = 0; lane < 32; ++lane) {
        getcontext(&lanes[lane]);
        lanes[lane].uc_stack.ss_sp = stacks[lane];
        lanes[lane].uc_stack.ss_size = sizeof stacks[lane];
        lanes[lane].uc_link = &scheduler;
        makecontext(&lanes[lane], body, 0);
    }
    do {
        votes = 0;
        for (int lane = 0; lane < 32; ++lane) {
            met[lane] = 0;
            threadIdx.x = lane;
            swapcontext(&scheduler, &lanes[lane]);
            if (met[lane] != met[0]) {
                std::fprintf(stderr, "lane %d waits at %d, lane 0 at %d\n", lane, met[lane], met[0]);
                std::abort();
            }
        }
        result = votes;
    } while (met[0]);
}

}  // namespace warp

#define __ballot_sync(lanes, vote) warp::meet(1, vote)
#define __any_sync(lanes, vote) (warp::meet(2, vote) != 0)
#define __syncwarp() ((void)warp::meet(3, false))
#define __popc __builtin_popcount
