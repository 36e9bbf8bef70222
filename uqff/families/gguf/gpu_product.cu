// Products with ggml blocks.

template <int BYTES_OF_32>
struct LegacyBasics : Basics {
    typedef Halves Order;
    static const int PARTS = 1, PITCH = BYTES_OF_32 * 8 / 16 % 2 ? BYTES_OF_32 * 8 : BYTES_OF_32 * 8 + 16;
    static constexpr int BYTES[1] = {BYTES_OF_32 * 8};
    // Four bits of the codes 4t to 4t + 3 and 16 + 4t to 16 + 4t + 3, and their fifth bits.
    template <class P, int ALIGN>
    __device__ static void nibbles(const u8* codes, int t, u32* a) {
        u32 w = load_u32<ALIGN>(codes + 4 * t);
#pragma unroll
        for (int i = 0; i < 4; i++) a[i] = P::raised(w >> (i % 2 * 8 + i / 2 * 4), 0x000F000Fu);
    }
    template <class P, int ALIGN>
    __device__ static void nibbles(const u8* codes, int t, u32 high, u32* a) {
        u32 w = load_u32<ALIGN>(codes + 4 * t), low5 = bits_to_bytes(high >> 4 * t) << 4;
        u32 high5 = bits_to_bytes(high >> (16 + 4 * t)) << 4;
        a[0] = P::raised((w & 0x000F000Fu) | (low5 & 0x00FF00FFu));
        a[1] = P::raised((w >> 8 & 0x000F000Fu) | (low5 >> 8 & 0x00FF00FFu));
        a[2] = P::raised((w >> 4 & 0x000F000Fu) | (high5 & 0x00FF00FFu));
        a[3] = P::raised((w >> 12 & 0x000F000Fu) | (high5 >> 8 & 0x00FF00FFu));
    }
};

template <>
struct Fused<Q4_0> : LegacyBasics<18> {
    template <class P>
    __device__ static void load(const u8* row, const Row&, int chunk, int t, u32* a, float* s, float* b) {
        const u8* p = row + 18 * chunk;
        nibbles<P, 2>(p + 2, t, a);
        s[0] = load_half(p), b[0] = -(P::RAISED + 8) * s[0];
    }
};

template <>
struct Fused<Q4_1> : LegacyBasics<20> {
    template <class P>
    __device__ static void load(const u8* row, const Row&, int chunk, int t, u32* a, float* s, float* b) {
        const u8* p = row + 20 * chunk;
        nibbles<P, 4>(p + 4, t, a);
        s[0] = load_half(p), b[0] = load_half(p + 2) - P::RAISED * s[0];
    }
};

template <>
struct Fused<Q5_0> : LegacyBasics<22> {
    template <class P>
    __device__ static void load(const u8* row, const Row&, int chunk, int t, u32* a, float* s, float* b) {
        const u8* p = row + 22 * chunk;
        nibbles<P, 2>(p + 6, t, load_u32<2>(p + 2), a);
        s[0] = load_half(p), b[0] = -(P::RAISED + 16) * s[0];
    }
};

template <>
struct Fused<Q5_1> : LegacyBasics<24> {
    template <class P>
    __device__ static void load(const u8* row, const Row&, int chunk, int t, u32* a, float* s, float* b) {
        const u8* p = row + 24 * chunk;
        nibbles<P, 4>(p + 8, t, load_u32<4>(p + 4), a);
        s[0] = load_half(p), b[0] = load_half(p + 2) - P::RAISED * s[0];
    }
};

template <int BYTES_OF_32, int CODES>
struct FusedBytes : Basics {
    typedef EvenOdd Order;
    static const int PARTS = 1, PITCH = BYTES_OF_32 * 8 / 16 % 2 ? BYTES_OF_32 * 8 : BYTES_OF_32 * 8 + 16;
    static constexpr int BYTES[1] = {BYTES_OF_32 * 8};
    static const bool AFFINE = false;
    template <class P>
    __device__ static void load(const u8* row, const Row&, int chunk, int t, u32* a, float* s, float* b) {
        const u8* p = row + BYTES_OF_32 * chunk;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            u32 w = load_u32<2>(p + CODES + 8 * t + 4 * i);
            a[2 * i] = P::signed_bytes(w), a[2 * i + 1] = P::signed_bytes(w >> 8);
        }
        s[0] = load_half(p);
    }
};

template <>
struct Fused<Q8_0> : FusedBytes<34, 2> {};
template <>
struct Fused<Q8_1> : FusedBytes<36, 4> {};

template <>
struct Fused<Q8K> : Basics {
    typedef EvenOdd Order;
    static const int PARTS = 1, PITCH = 336;
    static constexpr int BYTES[1] = {292};
    static const bool AFFINE = false, WINDOW = true;
    template <class P>
    __device__ static void load(const u8* row, const Row&, int chunk, int t, u32* a, float* s, float* b) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            u32 w = load_u32<4>(row + 4 + 32 * chunk + 8 * t + 4 * i);
            a[2 * i] = P::signed_bytes(w), a[2 * i + 1] = P::signed_bytes(w >> 8);
        }
        s[0] = F32::load(row);
    }
};

// Of 64 inputs, the first half is in the low nibbles and the second in the high ones.
template <int BYTES_OF_256, int HIGH, int LOW>
struct Fused<Affine8<BYTES_OF_256, HIGH, LOW>> : Basics {
    static const int PARTS = 1, CHUNK = 64, GROUPS = 2;
    typedef EvenOdd Order;
    static const int PITCH = (BYTES_OF_256 + 31) / 32 * 32;
    static constexpr int BYTES[1] = {BYTES_OF_256};

    struct Row {
        Scales8 packed;
        float d, dmin;
        __device__ Row(const u8* row) : packed(row + 4), d(load_half(row)), dmin(load_half(row + 2)) {}
    };
    template <class P>
    __device__ static void load(const u8* row, const Row& prepared, int chunk, int t, u32* a, float* s, float* b) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            u32 w = load_u32<4>(row + LOW + 32 * chunk + 8 * t + 4 * i), low5 = 0, high5 = 0;
            if (HIGH) {
                u32 bits = load_u32<4>(row + HIGH + 8 * t + 4 * i) >> 2 * chunk;
                low5 = (bits & 0x01010101u) << 4, high5 = (bits >> 1 & 0x01010101u) << 4;
            }
            const int group = 2 * chunk + i;
            s[i] = prepared.d * code(prepared.packed.scales[group / 4], group % 4, 0);
            b[i] = -prepared.dmin * code(prepared.packed.minimums[group / 4], group % 4, 0) - P::RAISED * s[i];
            if (!HIGH) {
                a[2 * i] = P::raised(w, 0x000F000Fu), a[2 * i + 1] = P::raised(w >> 8, 0x000F000Fu);
                a[2 * i + 4] = P::raised(w >> 4, 0x000F000Fu), a[2 * i + 5] = P::raised(w >> 12, 0x000F000Fu);
                continue;
            }
            a[2 * i] = P::raised((w & 0x000F000Fu) | (low5 & 0x00FF00FFu));
            a[2 * i + 1] = P::raised((w >> 8 & 0x000F000Fu) | (low5 >> 8 & 0x00FF00FFu));
            a[2 * i + 4] = P::raised((w >> 4 & 0x000F000Fu) | (high5 & 0x00FF00FFu));
            a[2 * i + 5] = P::raised((w >> 12 & 0x000F000Fu) | (high5 >> 8 & 0x00FF00FFu));
        }
    }
};

// Groups of 16: lane t has 4 codes of each, 4t to 4t + 3, in four planes of 32 that share bytes.
struct SixteensBasics : Basics {
    static const int PARTS = 1, CHUNK = 128, GROUPS = 8;
    typedef Halves Order;
    template <class P>
    __device__ static void put(u32 codes, u32* a) {
        a[0] = P::raised(codes, 0x003F003Fu), a[1] = P::raised(codes >> 8, 0x003F003Fu);
    }
};

template <>
struct Fused<Q6K> : SixteensBasics {
    static const int PITCH = 240;
    static constexpr int BYTES[1] = {210};
    static const bool WINDOW = true;
    template <class P>
    __device__ static void load(const u8* row, const Row&, int chunk, int t, u32* a, float* s, float* b) {
        float d = load_half(row + 208);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const u8* p = row + 64 * chunk + 16 * half + 4 * t;
            u32 first = load_u32<2>(p), second = load_u32<2>(p + 32);
            u32 high = load_u32<2>(row + 128 + 32 * chunk + 16 * half + 4 * t);
            put<P>((first & 0x0F0F0F0Fu) | (high << 4 & 0x30303030u), a + 2 * half);
            put<P>((second & 0x0F0F0F0Fu) | (high << 2 & 0x30303030u), a + 4 + 2 * half);
            put<P>((first >> 4 & 0x0F0F0F0Fu) | (high & 0x30303030u), a + 8 + 2 * half);
            put<P>((second >> 4 & 0x0F0F0F0Fu) | (high >> 2 & 0x30303030u), a + 12 + 2 * half);
        }
#pragma unroll
        for (int i = 0; i < 8; i++) {
            s[i] = d * signed_code(row[192 + 8 * chunk + i], 0);
            b[i] = -(P::RAISED + 32) * s[i];
        }
    }
};

template <>
struct Fused<Q2K> : SixteensBasics {
    static const int PITCH = 112;
    static constexpr int BYTES[1] = {84};
    template <class P>
    __device__ static void load(const u8* row, const Row&, int chunk, int t, u32* a, float* s, float* b) {
        float d = load_half(row + 80), dmin = load_half(row + 82);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            u32 w = load_u32<4>(row + 16 + 32 * chunk + 16 * half + 4 * t);
#pragma unroll
            for (int plane = 0; plane < 4; plane++) put<P>(w >> 2 * plane & 0x03030303u, a + 4 * plane + 2 * half);
        }
#pragma unroll
        for (int i = 0; i < 8; i++) {
            u32 both = row[8 * chunk + i];
            s[i] = d * code(both & 15u, 0, 0);
            b[i] = -dmin * code(both >> 4, 0, 0) - P::RAISED * s[i];
        }
    }
};

template <>
struct Fused<Q3K> : SixteensBasics {
    static const int PITCH = 144;
    static constexpr int BYTES[1] = {110};
    static const bool WINDOW = true;
    template <class P>
    __device__ static void load(const u8* row, const Row&, int chunk, int t, u32* a, float* s, float* b) {
        float d = load_half(row + 108);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            u32 w = load_u32<2>(row + 32 + 32 * chunk + 16 * half + 4 * t);
            u32 high = load_u32<2>(row + 16 * half + 4 * t) >> 4 * chunk;
#pragma unroll
            for (int plane = 0; plane < 4; plane++)
                put<P>((w >> 2 * plane & 0x03030303u) | (high >> plane & 0x01010101u) << 2, a + 4 * plane + 2 * half);
        }
#pragma unroll
        for (int i = 0; i < 8; i++) {
            s[i] = d * code(Q3K::scale(row + 96, 8 * chunk + i), 0, 32);
            b[i] = -(P::RAISED + 4) * s[i];
        }
    }
};

// The same for ring.cu.

struct CodedLegacy : CodedBasics {
    static const bool HALVES = true;
    // 4t + (0, 2), 16 + 4t + (0, 2), 4t + (1, 3), 16 + 4t + (1, 3).
    __device__ static constexpr int place(int i) { return i / 4 + i % 2 * 2 + i / 2 % 2 * 4; }
    __device__ static constexpr int shrunk(int, int i) { return i % 2 * 4; }
    // And fifth bits: those of 4t to 4t + 3 are bits 0 to 3 of high, the others bits 16 to 19.
    __device__ static void fives(u32 w, u32 high, u32* a) {
        nibbles(w, a);
        const u32 first = (high & 15u) * 0x00040010u, second = (high >> 16 & 15u) * 0x00400100u;
        a[0] = and_or(first, 0x00100010u, a[0]), a[1] = and_or(second, 0x01000100u, a[1]);
        a[2] = and_or(first >> 1, 0x00100010u, a[2]), a[3] = and_or(second >> 1, 0x01000100u, a[3]);
    }
};
template <>
struct Coded<Q4_0> : CodedLegacy {
    static const int ZERO = 8;
    __device__ static void codes(const u8* const* part, int chunk, int t, u32* a) {
        nibbles(word(part[0], 18 * chunk + 2, t), a);
    }
    __device__ static void scales(const u8* const* part, int pair, float* s, float*) {
        s[0] = load_half(part[0] + 36 * pair), s[1] = load_half(part[0] + 36 * pair + 18);
    }
};
template <>
struct Coded<Q4_1> : CodedLegacy {
    static const bool AFFINE = true;
    __device__ static void codes(const u8* const* part, int chunk, int t, u32* a) {
        nibbles(load_u32<4>(part[0] + 20 * chunk + 4 + 4 * t), a);
    }
    __device__ static void scales(const u8* const* part, int pair, float* s, float* m) {
        const u8* p = part[0] + 40 * pair;
        s[0] = load_half(p), s[1] = load_half(p + 20), m[0] = load_half(p + 2), m[1] = load_half(p + 22);
    }
};
template <>
struct Coded<Q5_0> : CodedLegacy {
    static const int ZERO = 16;
    __device__ static void codes(const u8* const* part, int chunk, int t, u32* a) {
        fives(word(part[0], 22 * chunk + 6, t), word(part[0], 22 * chunk + 2, 0) >> 4 * t, a);
    }
    __device__ static void scales(const u8* const* part, int pair, float* s, float*) {
        s[0] = load_half(part[0] + 44 * pair), s[1] = load_half(part[0] + 44 * pair + 22);
    }
};
template <>
struct Coded<Q5_1> : CodedLegacy {
    static const bool AFFINE = true;
    __device__ static void codes(const u8* const* part, int chunk, int t, u32* a) {
        fives(word(part[0], 24 * chunk + 8, t), word(part[0], 24 * chunk + 4, 0) >> 4 * t, a);
    }
    __device__ static void scales(const u8* const* part, int pair, float* s, float* m) {
        const u8* p = part[0] + 48 * pair;
        s[0] = load_half(p), s[1] = load_half(p + 24), m[0] = load_half(p + 2), m[1] = load_half(p + 26);
    }
};

template <int BYTES_OF_32, int CODES>
struct CodedBytes : CodedBasics {
    static const int ZERO = 128;
    __device__ static void codes(const u8* const* part, int chunk, int t, u32* a) {
        signed_bytes(part[0], BYTES_OF_32 * chunk + CODES, t, a);
    }
    __device__ static void scales(const u8* const* part, int pair, float* s, float*) {
        const u8* p = part[0] + 2 * BYTES_OF_32 * pair;
        s[0] = load_half(p), s[1] = load_half(p + BYTES_OF_32);
    }
};
template <>
struct Coded<Q8_0> : CodedBytes<34, 2> {};
template <>
struct Coded<Q8_1> : CodedBytes<36, 4> {};
template <>
struct Coded<Q8K> : CodedBasics {
    static const int ZERO = 128, BESIDE = 32;
    __device__ static void codes(const u8* const* part, int chunk, int t, u32* a) {
        signed_bytes(part[0], 4 + 32 * chunk, t, a);
    }
    __device__ static void scales(const u8* const* part, int, float* s, float*) { s[0] = s[1] = F32::load(part[0]); }
};

template <int BYTES_OF_256, int HIGH, int LOW>
struct Coded<Affine8<BYTES_OF_256, HIGH, LOW>> : CodedAsFused<Affine8<BYTES_OF_256, HIGH, LOW>> {
    static const int BESIDE = 32;
    static const bool AFFINE = true;
    __device__ static constexpr int shrunk(int block, int) { return HIGH ? 0 : block % 2 * 4; }
    __device__ static void codes(const u8* const* part, int chunk, int t, u32* a) {
        if (HIGH) {
            CodedAsFused<Affine8<BYTES_OF_256, HIGH, LOW>>::codes(part, chunk, t, a);
            return;
        }
        u32 w[2];
        load_words<2>(part[0] + LOW + 32 * chunk + 8 * t, w);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            u32 four[4];
            CodedBasics::nibbles(w[i], four);
            a[2 * i] = four[0], a[2 * i + 1] = four[2], a[2 * i + 4] = four[1], a[2 * i + 5] = four[3];
        }
    }
    __device__ static void scales(const u8* const* part, int pair, float* s, float* m) {
        const u8* p = part[0] + 4 + pair % 2 * 2;
        const u32 scale = *(const u16*)p, minimum = *(const u16*)(p + 4), both = *(const u16*)(p + 8);
        const u32 q = pair < 2 ? scale & 0x3F3Fu : (both & 0x0F0Fu) | (scale >> 2 & 0x3030u);
        const u32 r = pair < 2 ? minimum & 0x3F3Fu : (both >> 4 & 0x0F0Fu) | (minimum >> 2 & 0x3030u);
        const float d = load_half(part[0]), dmin = load_half(part[0] + 2);
#pragma unroll
        for (int i = 0; i < 2; i++) s[i] = d * code(q, i, 0), m[i] = -dmin * code(r, i, 0);
    }
};

template <class K>
struct CodedSixteens : CodedAsFused<K> {
    static const int GROUP = 16;
    static const bool HALVES = true;
};
template <>
struct Coded<Q6K> : CodedSixteens<Q6K> {
    static const int ZERO = 32;
    __device__ static constexpr int place(int i) { return i; }
    __device__ static void codes(const u8* const* part, int chunk, int t, u32* a) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const u8* p = part[0] + 64 * chunk + 16 * half + 4 * t;
            const u32 first = load_u32<2>(p), second = load_u32<2>(p + 32);
            const u32 high = load_u32<2>(part[0] + 128 + 32 * chunk + 16 * half + 4 * t);
            bytes((first & 0x0F0F0F0Fu) | (high << 4 & 0x30303030u), a + 2 * half);
            bytes((second & 0x0F0F0F0Fu) | (high << 2 & 0x30303030u), a + 4 + 2 * half);
            bytes((first >> 4 & 0x0F0F0F0Fu) | (high & 0x30303030u), a + 8 + 2 * half);
            bytes((second >> 4 & 0x0F0F0F0Fu) | (high >> 2 & 0x30303030u), a + 12 + 2 * half);
        }
    }
    __device__ static void scales(const u8* const* part, int pair, float* s, float*) {
        const u32 both = *(const u16*)(part[0] + 192 + 2 * pair);
        const float d = load_half(part[0] + 208);
        s[0] = d * signed_code(both, 0), s[1] = d * signed_code(both, 1);
    }
};
template <>
struct Coded<Q2K> : CodedSixteens<Q2K> {
    static const bool AFFINE = true;
    __device__ static constexpr int shrunk(int block, int) { return block % 4 * 2; }
    __device__ static void codes(const u8* const* part, int chunk, int t, u32* a) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const u32 w = load_u32<4>(part[0] + 16 + 32 * chunk + 16 * half + 4 * t);
#pragma unroll
            for (int plane = 0; plane < 4; plane++) {
                const u32 mask = 0x00030003u << 2 * plane;
                a[4 * plane + 2 * half] = and_or(w, mask, 0x64006400u);
                a[4 * plane + 2 * half + 1] = and_or(w >> 8, mask, 0x64006400u);
            }
        }
    }
    __device__ static void scales(const u8* const* part, int pair, float* s, float* m) {
        const u32 both = *(const u16*)(part[0] + 2 * pair);
        const float d = load_half(part[0] + 80), dmin = load_half(part[0] + 82);
#pragma unroll
        for (int i = 0; i < 2; i++)
            s[i] = d * code(both & 0x0F0Fu, i, 0), m[i] = -dmin * code(both >> 4 & 0x0F0Fu, i, 0);
    }
};
template <>
struct Coded<Q3K> : CodedSixteens<Q3K> {
    static const int ZERO = 4;
    __device__ static constexpr int shrunk(int block, int) { return block % 4 * 2; }
    __device__ static void codes(const u8* const* part, int chunk, int t, u32* a) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const u32 w = load_u32<2>(part[0] + 32 + 32 * chunk + 16 * half + 4 * t);
            const u32 high = load_u32<2>(part[0] + 16 * half + 4 * t);
#pragma unroll
            for (int i = 0; i < 8; i++) {
                // Bit 4 chunk + plane of each byte goes to bit 2 plane + 2.
                const int plane = i / 2, up = plane + 2 - 4 * chunk - i % 2 * 8;
                const u32 mask = 0x00010001u << 2 * plane, third = up < 0 ? high >> (up < 0 ? -up : 0) : high << (up < 0 ? 0 : up);
                a[4 * plane + 2 * half + i % 2] =
                    and_or(third, 4 * mask, and_or(i % 2 ? w >> 8 : w, 3 * mask, 0x64006400u));
            }
        }
    }
    __device__ static void scales(const u8* const* part, int pair, float* s, float*) {
        const float d = load_half(part[0] + 108);
#pragma unroll
        for (int i = 0; i < 2; i++) s[i] = d * code(Q3K::scale(part[0] + 96, 2 * pair + i), 0, 32);
    }
};
