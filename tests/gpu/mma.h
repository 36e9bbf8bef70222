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
