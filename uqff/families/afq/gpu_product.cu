// Products with AFQ weights.

template <int BITS, int GROUP, class S>
struct Fused<Afq<BITS, GROUP, S>> : Basics {
    static const int PARTS = 3, SCALES = STAGE / GROUP * S::SIZE;
    static constexpr int BYTES[3] = {STAGE / 8 * BITS, SCALES, SCALES};
    static const int ALL = (STAGE / 8 * BITS + 2 * SCALES + 15) / 16, PITCH = 16 * (ALL + 1 - ALL % 2);

    static const int CHUNK = GROUP < 64 ? 32 : 64;
    typedef typename Either<BITS == 4, FourApart, InOrder>::Type Order;

    template <class P>
    __device__ static void load(const u8* row, const Row&, int chunk, int t, u32* a, float* s, float* b) {
        int group = CHUNK * chunk / GROUP;
        float scale = S::load(row + BYTES[0] + group * S::SIZE);
        s[0] = scale, b[0] = S::load(row + BYTES[0] + BYTES[1] + group * S::SIZE);
        if (BITS < 8) b[0] -= P::RAISED * scale;
#pragma unroll
        for (int i = 0; i < CHUNK / 32; i++) codes<P>(row + 4 * BITS * (CHUNK / 32 * chunk + i) + BITS * t, a + 4 * i);
    }
    // Eight codes.
    template <class P>
    __device__ static void codes(const u8* p, u32* a) {
        if (BITS == 8) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                u32 w = load_u32<4>(p + 4 * i);
                a[2 * i] = P::pair(code(w, 0, 0), code(w, 1, 0));
                a[2 * i + 1] = P::pair(code(w, 2, 0), code(w, 3, 0));
            }
            return;
        }
        if (BITS == 4) {
            u32 w = load_u32<4>(p);
#pragma unroll
            for (int i = 0; i < 4; i++) a[i] = P::raised(w >> 4 * i, 0x000F000Fu);
            return;
        }
        const u32 mask = (1u << BITS) - 1;
        u64 codes = 0;
#pragma unroll
        for (int i = 0; i < BITS; i++) codes |= (u64)p[i] << 8 * i;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            u32 two = (u32)(codes >> 2 * BITS * i);
            a[i] = P::raised((two & mask) | (two << (16 - BITS) & mask << 16));
        }
    }
};
