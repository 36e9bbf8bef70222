// c += a b by a warp, each lane from what the others have; primitives.cu says which numbers are whose.
struct Registers {
    u32 a[4], b[2];
};
static Registers held[1024];

template <float NUMBER(u32)>
static void mma(float* c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    held[running] = {{a0, a1, a2, a3}, {b0, b1}};
    __syncwarp();
    const int first = running / 32 * 32, g = running % 32 / 4, t = running % 4;
    for (int i = 0; i < 4; i++)
        for (int k = 0; k < 16; k++) {
            const u32 a = held[first + 4 * g + k % 8 / 2].a[i / 2 + k / 8 * 2];
            const u32 b = held[first + 4 * (2 * t + i % 2) + k % 8 / 2].b[k / 8];
            c[i] += NUMBER(a >> k % 2 * 16 & 0xFFFF) * NUMBER(b >> k % 2 * 16 & 0xFFFF);
        }
    __syncwarp();
}
static void mma_bfloats(float* c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) { mma<bfloat>(c, a0, a1, a2, a3, b0, b1); }
void mma_halves(float* c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) { mma<half_to_float>(c, a0, a1, a2, a3, b0, b1); }

// What wide.cu asks of compute capability 9.0, for blocks by themselves. A matrix in shared memory: number (k, n) lies in
// tiles of 8 n and 16 bytes, `along` bytes from tile to tile of the same n and `down` from those to the next.
static int matrix_along, matrix_down;
static u64 describe(const u8* shared, int along, int down) {
    matrix_along = along, matrix_down = down;
    if ((u64)shared % 16) abort();
    return (u64)shared >> 4;
}
static void copy_bulk(u8* shared, const u8* global, int bytes, u64* barrier) {
    expect_bytes(barrier, bytes), copy_bytes(shared, global, bytes, barrier);
}
static void begin_wide() {}
static void end_wide() {}
static void wait_wide_before() {}
template <int COUNT>
static void wait_wide(float (&)[COUNT]) {}
static void cluster_barrier() {}
static float load_of_cluster(const float* own, int) { return *own; }

template <int COUNT>
static void mma_wide(float (&sums)[COUNT], u32 a0, u32 a1, u32 a2, u32 a3, u64 matrix) {
    held[running] = {{a0, a1, a2, a3}, {}};
    __syncwarp();
    const int first = running / 4 * 4, t = running % 4;
    for (int i = 0; i < COUNT; i++)
        for (int k = 0; k < 16; k++) {
            const int n = i / 4 * 8 + 2 * t + i % 2;
            const u32 a = held[first + k % 8 / 2].a[i % 4 / 2 + k / 8 * 2];
            const u8* b = (const u8*)(matrix << 4) + k / 8 * matrix_along + n / 8 * matrix_down + n % 8 * 16 + k % 8 * 2;
            sums[i] += bfloat(a >> k % 2 * 16 & 0xFFFF) * bfloat(*(const u16*)b);
        }
    __syncwarp();
}
void end_group() {}
template <int LEFT>
void wait_groups() {}
