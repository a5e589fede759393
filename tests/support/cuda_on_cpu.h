// Enough of CUDA to run a kernel on the host. A warp's 32 threads are 32 contexts that take turns. They wait
// for each other at each shuffle.
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <functional>

using std::max, std::min, std::sqrt, std::exp, std::erfc;
typedef _Float16 __half;
#define __device__ static
#define __global__

struct Index { int x, y; };
static Index threadIdx, blockIdx, blockDim;
static ucontext_t lanes[32], scheduler;
static char stacks[32][1 << 16];
static bool done[32];
static int turn[32];
static double slots[2][32];
static std::function<void()> body;

template <class T> T __shfl_xor_sync(unsigned, T value, int distance) {
    int lane = threadIdx.x, now = turn[lane] ^= 1;
    slots[now][lane] = value;
    swapcontext(&lanes[lane], &scheduler);
    return T(slots[now][lane ^ distance]);
}

static void run_lane() {
    body();
    done[threadIdx.x] = true;
}

static void launch(int grid, int warps, std::function<void()> kernel) {
    body = kernel;
    blockDim = {32, warps};
    for (int warp = 0; warp < grid * warps; warp++) {
        blockIdx = {warp / warps, 0};
        threadIdx.y = warp % warps;
        for (int i = 0; i < 32; i++) {
            done[i] = turn[i] = 0;
            getcontext(&lanes[i]);
            lanes[i].uc_stack = {stacks[i], 0, sizeof stacks[i]};
            lanes[i].uc_link = &scheduler;
            makecontext(&lanes[i], run_lane, 0);
        }
        while (std::count(done, done + 32, false))
            for (int i = 0; i < 32; i++)
                if (threadIdx.x = i; !done[i]) swapcontext(&scheduler, &lanes[i]);
    }
}
