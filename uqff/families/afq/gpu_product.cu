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
    template <class P>
    __device__ static constexpr bool direct() {
        return P::BFLOATS && S::BFLOAT;
    }
    template <class P>
    __device__ static void rounded(const u8* row, const Row&, int chunk, int t, u32* a) {
        const int group = CHUNK * chunk / GROUP;
        const u32 scale = *(const u16*)(row + BYTES[0] + group * 2) * 0x00010001u;
        const u32 bias = *(const u16*)(row + BYTES[0] + BYTES[1] + group * 2) * 0x00010001u;
#pragma unroll
        for (int i = 0; i < CHUNK / 32; i++) codes<P>(row + 4 * BITS * (CHUNK / 32 * chunk + i) + BITS * t, a + 4 * i);
#pragma unroll
        for (int i = 0; i < CHUNK / 8; i++)
            a[i] = fma_bfloats(BITS < 8 ? subtract_bfloats(a[i], 0x43004300u) : a[i], scale, bias);
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

template <int BITS, int GROUP_, class S>
struct Coded<Afq<BITS, GROUP_, S>> : CodedBasics {
    static const bool AFFINE = true;
    static const int TOGETHER = GROUP_ < 64 ? 1 : 2;
    __device__ static constexpr int place(int i) { return BITS == 2 || BITS == 8 ? i : FourApart::place(i); }
    __device__ static constexpr int shrunk(int, int i) {
        return BITS == 2 || BITS == 4 ? i % 2 * 4 : BITS == 3 ? i % 3 * 3 : 0;
    }
    __device__ static void codes(const u8* const* part, int chunk, int t, u32* a) {
        const u8* p = part[0] + 4 * BITS * chunk + BITS * t;
        if (BITS == 4) nibbles(load_u32<4>(p), a);
        else if (BITS == 8) bytes(load_u32<4>(p), a), bytes(load_u32<4>(p + 4), a + 2);
        else if (BITS == 2) {
            const u32 eight = *(const u16*)p, w = eight | eight << 14;
            a[0] = and_or(w, 0x00030003u, 0x64006400u), a[1] = and_or(w, 0x00300030u, 0x64006400u);
            a[2] = and_or(w >> 8, 0x00030003u, 0x64006400u), a[3] = and_or(w >> 8, 0x00300030u, 0x64006400u);
        } else {
            // The four or six bytes from there, in two words; four codes in each half of a register.
            const int first = BITS * t % 4;
            const u32 *words = (const u32*)(p - first), shift = 8 * first;
            const u32 low = __funnelshift_r(words[0], words[1], shift);
            if (BITS == 3) {
                const u32 w = (low & 0x00000FFFu) | (low << 4 & 0x0FFF0000u);
                a[0] = and_or(w, 0x00070007u, 0x64006400u), a[1] = and_or(w, 0x00380038u, 0x64006400u);
                a[2] = and_or(w, 0x01C001C0u, 0x64006400u), a[3] = and_or(w >> 9, 0x00070007u, 0x64006400u);
            } else {
                const u32 high = __funnelshift_r(low, words[1] >> shift, 24);
                const u32 v = (low & 0x00000FFFu) | (high << 16 & 0x0FFF0000u);
                const u32 w = (low >> 12 & 0x00000FFFu) | (high << 4 & 0x0FFF0000u);
                a[0] = and_or(v, 0x003F003Fu, 0x64006400u), a[1] = and_or(v >> 6, 0x003F003Fu, 0x64006400u);
                a[2] = and_or(w, 0x003F003Fu, 0x64006400u), a[3] = and_or(w >> 6, 0x003F003Fu, 0x64006400u);
            }
        }
    }
    __device__ static void scales(const u8* const* part, int pair, float* s, float* m) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int group = (2 * pair + i) * 32 / GROUP_;
            s[i] = S::load(part[1] + group * S::SIZE), m[i] = S::load(part[2] + group * S::SIZE);
        }
    }
};
