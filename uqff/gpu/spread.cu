// Rows of x as wide.cu takes them: in tiles of 8 rows and 16 bytes, and in the order in which lanes have the codes.

struct Spread {
    const u8* x;  // [columns, inputs]
    u8* image;    // [columns / COLUMNS, inputs / 8, COLUMNS, 8]
    int inputs, columns;
};

// A block takes RUN numbers of some rows; rows that there are not are zeros.  A thread reads eight numbers, and writes
// what four lanes multiply with in a half of a step.
const int RUN = 64, SPREAD_ROWS = 32;

template <class Order, bool SETTLED, int COLUMNS>
__device__ inline void spread(const Spread& from) {
    const int PITCH = RUN / 2 + 4, EIGHTS = RUN / 8;
    __shared__ __align__(16) u32 held[SPREAD_ROWS * PITCH];
    wait_for_kernels_before();
    begin_next_kernel();
    {
        const int row = blockIdx.y * SPREAD_ROWS + threadIdx.x / EIGHTS, i = threadIdx.x % EIGHTS;
        u32 words[4] = {};
        if (row < from.columns) load_words<4>(from.x + ((i64)row * from.inputs + RUN * blockIdx.x + 8 * i) * 2, words);
        if (SETTLED) Order::settle(words);
        write_four((u8*)(held + threadIdx.x / EIGHTS * PITCH + 4 * i), words);
    }
    __syncthreads();
    const int row = blockIdx.y * SPREAD_ROWS + threadIdx.x % SPREAD_ROWS, i = threadIdx.x / SPREAD_ROWS;
    u8* to = from.image + (i64)(row / COLUMNS) * from.inputs * COLUMNS * 2;
    u32 four[4];
#pragma unroll
    for (int t = 0; t < 4; t++) four[t] = held[threadIdx.x % SPREAD_ROWS * PITCH + i / 4 * 16 + Order::word(i % 4 / 2, i % 2, t)];
    write_four(to + ((i64)(EIGHTS * blockIdx.x + i) * COLUMNS + row % COLUMNS) * 16, four);
}
