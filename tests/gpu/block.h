// The threads of a block, one after the other, each until it has to wait for others: whole kernels run on the CPU.
// Included before machine.h, whose __syncthreads and __syncwarp wait for nobody.
#define UQFF_BLOCK
#include <ucontext.h>

#include <cstdlib>
#include <cstring>
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

static unsigned shuffle_xor(unsigned number, int mask) {
    float held;
    memcpy(&held, &number, 4);
    held = shuffle_xor(held, mask);
    memcpy(&number, &held, 4);
    return number;
}
static float shuffle(float number, int lane) {
    passed[running] = number;
    __syncwarp();
    const float other = passed[running / 32 * 32 + lane % 32];
    __syncwarp();
    return other;
}

static Meeting named_meetings[16];
static void wait_for_threads(int barrier, int threads) { named_meetings[barrier].wait(threads); }

// A barrier in shared memory: a phase is over when all have arrived and all bytes are there.
struct Barrier {
    unsigned short members, left;
    int state;  // the phase's parity, and twice the bytes that it waits for
    void settle() {
        if (left == 0 && state / 2 == 0) left = members, state ^= 1;
    }
};
static void begin_barrier(unsigned long long* at, int arrivals) {
    *(Barrier*)at = {(unsigned short)arrivals, (unsigned short)arrivals, 0};
}
static void publish_barriers() {}
static void wait_barrier(unsigned long long* at, int phase) {
    while ((((Barrier*)at)->state & 1) == phase) swapcontext(&fibers[running].context, &scheduler);
}
static void arrive(unsigned long long* at) {
    ((Barrier*)at)->left--;
    ((Barrier*)at)->settle();
}
static void expect_bytes(unsigned long long* at, int bytes) {
    ((Barrier*)at)->state += 2 * bytes;
    arrive(at);
}
static void arrive_after_copies(unsigned long long* at) { arrive(at); }
static void copy_bytes(unsigned char* shared, const unsigned char* global, int bytes, unsigned long long* at) {
    if (((unsigned long long)global | (unsigned long long)shared | bytes) % 16) abort();
    memcpy(shared, global, bytes);
    ((Barrier*)at)->state -= 2 * bytes;
    ((Barrier*)at)->settle();
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
        for (auto& each : named_meetings) each = Meeting();
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
