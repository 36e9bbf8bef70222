// The threads of a block, one after the other, each until it has to wait for others: whole kernels run on the CPU.
// Included before machine.h, whose __syncthreads and __syncwarp wait for nobody.
#define UQFF_BLOCK
#include <ucontext.h>

#include <functional>
#include <vector>

struct Fiber {
    ucontext_t context;
    std::vector<char> stack;
    bool over = false;
};
static ucontext_t scheduler;
static std::vector<Fiber> fibers;
static int running;
static std::function<void()> body;

// Threads that wait for each other: all of a block, or of a warp.
struct Meeting {
    int came = 0, turn = 0;
    void wait(int members) {
        const int mine = turn;
        if (++came == members) {
            came = 0, turn++;
            return;
        }
        while (turn == mine) swapcontext(&fibers[running].context, &scheduler);
    }
};
static Meeting block_meeting, warp_meetings[32];
static float passed[1024];

static void enter() {
    body();
    fibers[running].over = true;
    swapcontext(&fibers[running].context, &scheduler);
}

static void __syncthreads() { block_meeting.wait((int)fibers.size()); }
static void __syncwarp() { warp_meetings[running / 32].wait(32); }
static void __threadfence() {}

static float shuffle_xor(float number, int mask) {
    passed[running] = number;
    __syncwarp();
    const float other = passed[running ^ mask];
    __syncwarp();
    return other;
}

struct Dim3 {
    unsigned x, y, z;
};
static Dim3 threadIdx, blockIdx, blockDim, gridDim;

// A kernel on a grid of blocks.
static void launch(int columns, int rows, int threads, std::function<void()> kernel) {
    body = kernel;
    gridDim = {(unsigned)columns, (unsigned)rows, 1}, blockDim = {(unsigned)threads, 1, 1};
    for (int block = 0; block < columns * rows; block++) {
        blockIdx = {(unsigned)(block % columns), (unsigned)(block / columns), 0};
        fibers.resize(threads);
        block_meeting = Meeting();
        for (auto& each : warp_meetings) each = Meeting();
        for (auto& each : fibers) {
            each.stack.resize(1 << 16), each.over = false;
            getcontext(&each.context);
            each.context.uc_stack.ss_sp = each.stack.data(), each.context.uc_stack.ss_size = each.stack.size();
            each.context.uc_link = nullptr;
            makecontext(&each.context, enter, 0);
        }
        for (bool any = true; any;) {
            any = false;
            for (running = 0; running < threads; running++)
                if (!fibers[running].over) {
                    any = true, threadIdx = {(unsigned)running, 0, 0};
                    swapcontext(&scheduler, &fibers[running].context);
                }
        }
    }
}
