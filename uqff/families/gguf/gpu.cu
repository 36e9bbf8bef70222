// The blocks of the ggml types; blocks.py draws them.

template <int BYTES, int SIZE>
struct Blocks {
    __device__ static const u8* block(const Weight& weight, i64 at) { return weight.part[0] + at / SIZE * BYTES; }
    __device__ static void touch(const Weight& weight, i64 at) { prefetch(block(weight, at) + (int)(at % SIZE) * BYTES / SIZE); }
    // A code of four, with a bit above it of four others.
    __device__ static u32 with_bits(u32 low, u32 high, int place) { return low | (high & 0x01010101u) << place; }
};

struct Q4_0 : Blocks<18, 32> {
    template <int N, bool WHOLE>
    __device__ static void decode(const Weight& weight, i64 at, float* values) {
        const u8* p = block(weight, at);
        int e = at % 32, shift = e / 16 * 4;
        float d = load_half(p);
#pragma unroll
        for (int i = 0; i < N; i++) {
            u32 q = load_u32<2>(p + 2 + e % 16 + i / 4 * 4) >> shift & 0x0F0F0F0Fu;
            values[i] = d * code(q, i % 4, 8);
        }
    }
    static const int PIECES = 2, APART = 16;
    __device__ static void pieces(const Weight& weight, i64 at, float (*values)[8]) {
        const u8* p = block(weight, at);
        const int e = at % 16;
        u32 words[2];
        const float d = load_half(p);
        load_eight_bytes<2>(p + 2 + e, words);
#pragma unroll
        for (int i = 0; i < 16; i++) {
            const u32 four = words[i % 8 / 4] >> i / 8 * 4 & 0x0F0F0F0Fu;
            values[i / 8][i % 8] = d * code(four, i % 4, 8);
        }
    }
};

struct Q4_1 : Blocks<20, 32> {
    template <int N, bool WHOLE>
    __device__ static void decode(const Weight& weight, i64 at, float* values) {
        const u8* p = block(weight, at);
        int e = at % 32, shift = e / 16 * 4;
        float d = load_half(p), m = load_half(p + 2);
#pragma unroll
        for (int i = 0; i < N; i++) {
            u32 q = load_u32<4>(p + 4 + e % 16 + i / 4 * 4) >> shift & 0x0F0F0F0Fu;
            values[i] = d * code(q, i % 4, 0) + m;
        }
    }
    static const int PIECES = 2, APART = 16;
    __device__ static void pieces(const Weight& weight, i64 at, float (*values)[8]) {
        const u8* p = block(weight, at);
        const int e = at % 16;
        u32 words[2];
        const float d = load_half(p), m = load_half(p + 2);
        load_eight_bytes<4>(p + 4 + e, words);
#pragma unroll
        for (int i = 0; i < 16; i++) {
            const u32 four = words[i % 8 / 4] >> i / 8 * 4 & 0x0F0F0F0Fu;
            values[i / 8][i % 8] = d * code(four, i % 4, 0) + m;
        }
    }
};

struct Q5_0 : Blocks<22, 32> {
    template <int N, bool WHOLE>
    __device__ static void decode(const Weight& weight, i64 at, float* values) {
        const u8* p = block(weight, at);
        int e = at % 32, shift = e / 16 * 4;
        float d = load_half(p);
        u32 qh = load_u32<2>(p + 2) >> e;
#pragma unroll
        for (int i = 0; i < N; i++) {
            u32 q = load_u32<2>(p + 6 + e % 16 + i / 4 * 4) >> shift & 0x0F0F0F0Fu;
            q |= bits_to_bytes(qh >> i / 4 * 4) << 4;
            values[i] = d * code(q, i % 4, 16);
        }
    }
    static const int PIECES = 2, APART = 16;
    __device__ static void pieces(const Weight& weight, i64 at, float (*values)[8]) {
        const u8* p = block(weight, at);
        const int e = at % 16;
        u32 words[2];
        const float d = load_half(p);
        const u32 qh = load_u32<2>(p + 2) >> e;
        load_eight_bytes<2>(p + 6 + e, words);
#pragma unroll
        for (int i = 0; i < 16; i++) {
            const u32 four = words[i % 8 / 4] >> i / 8 * 4 & 0x0F0F0F0Fu, high = bits_to_bytes(qh >> i / 8 * 16 + i % 8 / 4 * 4);
            values[i / 8][i % 8] = d * code(four | high << 4, i % 4, 16);
        }
    }
};

struct Q5_1 : Blocks<24, 32> {
    template <int N, bool WHOLE>
    __device__ static void decode(const Weight& weight, i64 at, float* values) {
        const u8* p = block(weight, at);
        int e = at % 32, shift = e / 16 * 4;
        float d = load_half(p), m = load_half(p + 2);
        u32 qh = load_u32<4>(p + 4) >> e;
#pragma unroll
        for (int i = 0; i < N; i++) {
            u32 q = load_u32<4>(p + 8 + e % 16 + i / 4 * 4) >> shift & 0x0F0F0F0Fu;
            q |= bits_to_bytes(qh >> i / 4 * 4) << 4;
            values[i] = d * code(q, i % 4, 0) + m;
        }
    }
    static const int PIECES = 2, APART = 16;
    __device__ static void pieces(const Weight& weight, i64 at, float (*values)[8]) {
        const u8* p = block(weight, at);
        const int e = at % 16;
        u32 words[2];
        const float d = load_half(p), m = load_half(p + 2);
        const u32 qh = load_u32<4>(p + 4) >> e;
        load_eight_bytes<4>(p + 8 + e, words);
#pragma unroll
        for (int i = 0; i < 16; i++) {
            const u32 four = words[i % 8 / 4] >> i / 8 * 4 & 0x0F0F0F0Fu, high = bits_to_bytes(qh >> i / 8 * 16 + i % 8 / 4 * 4);
            values[i / 8][i % 8] = d * code(four | high << 4, i % 4, 0) + m;
        }
    }
};

template <int BYTES, int SIZE, int CODES>
struct Bytes8 : Blocks<BYTES, SIZE> {
    template <int N>
    __device__ static void decode_with(float d, const u8* p, int e, float* values) {
        u32 words[2];
        if (N == 8) load_eight_bytes<BYTES % 4 ? 2 : 4>(p + CODES + e, words);
        else words[0] = load_u32<BYTES % 4 ? 2 : 4>(p + CODES + e);
#pragma unroll
        for (int i = 0; i < N; i++) values[i] = d * signed_code(words[i / 4], i % 4);
    }
};

struct Q8_0 : Bytes8<34, 32, 2> {
    template <int N, bool WHOLE>
    __device__ static void decode(const Weight& weight, i64 at, float* values) {
        const u8* p = block(weight, at);
        decode_with<N>(load_half(p), p, at % 32, values);
    }
};

struct Q8_1 : Bytes8<36, 32, 4> {
    template <int N, bool WHOLE>
    __device__ static void decode(const Weight& weight, i64 at, float* values) {
        const u8* p = block(weight, at);
        decode_with<N>(load_half(p), p, at % 32, values);
    }
};

struct Q8K : Bytes8<292, 256, 4> {
    template <int N, bool WHOLE>
    __device__ static void decode(const Weight& weight, i64 at, float* values) {
        const u8* p = block(weight, at);
        decode_with<N>(F32::load(p), p, at % 256, values);
    }
};

struct Q2K : Blocks<84, 256> {
    template <int N, bool WHOLE>
    __device__ static void decode(const Weight& weight, i64 at, float* values) {
        const u8* p = block(weight, at);
        int e = at % 256, shift = e % 128 / 32 * 2;
        u32 both = p[e / 16];
        float scale = load_half(p + 80) * code(both & 15u, 0, 0), minimum = load_half(p + 82) * code(both >> 4, 0, 0);
#pragma unroll
        for (int i = 0; i < N; i++) {
            u32 q = load_u32<4>(p + 16 + e / 128 * 32 + e % 32 + i / 4 * 4) >> shift & 0x03030303u;
            values[i] = scale * code(q, i % 4, 0) - minimum;
        }
    }
    static const int PIECES = 4, APART = 32;
    __device__ static void pieces(const Weight& weight, i64 at, float (*values)[8]) {
        const u8* p = block(weight, at);
        const int half = at % 256 / 128, e = at % 32;
        u32 words[2];
        load_eight_bytes<4>(p + 16 + half * 32 + e, words);
        const float d = load_half(p + 80), m = load_half(p + 82);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const u32 both = p[8 * half + 2 * j + e / 16];
            const float scale = d * code(both & 15u, 0, 0), minimum = m * code(both >> 4, 0, 0);
#pragma unroll
            for (int i = 0; i < 8; i++) values[j][i] = scale * code(words[i / 4] >> 2 * j & 0x03030303u, i % 4, 0) - minimum;
        }
    }
};

struct Q3K : Blocks<110, 256> {
    // The 16 six-bit scales, plus 32; reference_dequantize.py draws their packing.
    __device__ static u32 scale(const u8* packed, int i) {
        u32 low = i < 8 ? packed[i] & 15u : packed[i - 8] >> 4;
        return low | (packed[8 + i % 4] >> 2 * (i / 4) & 3u) << 4;
    }
    template <int N, bool WHOLE>
    __device__ static void decode(const Weight& weight, i64 at, float* values) {
        const u8* p = block(weight, at);
        int e = at % 256, shift = e % 128 / 32 * 2;
        float d = load_half(p + 108) * code(scale(p + 96, e / 16), 0, 32);
#pragma unroll
        for (int i = 0; i < N; i++) {
            u32 q = load_u32<2>(p + 32 + e / 128 * 32 + e % 32 + i / 4 * 4) >> shift & 0x03030303u;
            q |= (load_u32<2>(p + e % 32 + i / 4 * 4) >> e / 32 & 0x01010101u) << 2;
            values[i] = d * code(q, i % 4, 4);
        }
    }
    static const int PIECES = 4, APART = 32;
    __device__ static void pieces(const Weight& weight, i64 at, float (*values)[8]) {
        const u8* p = block(weight, at);
        const int half = at % 256 / 128, e = at % 32;
        u32 words[2], high[2];
        load_eight_bytes<2>(p + 32 + half * 32 + e, words);
        load_eight_bytes<2>(p + e, high);
        high[0] >>= 4 * half, high[1] >>= 4 * half;
        const float all = load_half(p + 108);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int i16 = 2 * j + e / 16;
            const u32 low = p[96 + i16] >> 4 * half & 15u, two = p[104 + i16 % 4] >> 4 * half >> j / 2 * 2 & 3u;
            const float d = all * code(low | two << 4, 0, 32);
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const u32 four = words[i / 4] >> 2 * j & 0x03030303u;
                values[j][i] = d * code(with_bits(four, high[i / 4] >> j, 2), i % 4, 4);
            }
        }
    }
};

// The scales and minimums of Q4K and Q5K, four to a word; reference_dequantize.py draws their packing.
struct Scales8 {
    u32 scales[2], minimums[2];
    __device__ Scales8(const u8* packed) {
        u32 s = load_u32<4>(packed), m = load_u32<4>(packed + 4), both = load_u32<4>(packed + 8);
        scales[0] = s & 0x3F3F3F3Fu;
        scales[1] = (both & 0x0F0F0F0Fu) | (s >> 2 & 0x30303030u);
        minimums[0] = m & 0x3F3F3F3Fu;
        minimums[1] = (both >> 4 & 0x0F0F0F0Fu) | (m >> 2 & 0x30303030u);
    }
};

template <int BYTES, int HIGH, int LOW>
struct Affine8 : Blocks<BYTES, 256> {
    template <int N, bool WHOLE>
    __device__ static void decode(const Weight& weight, i64 at, float* values) {
        const u8* p = Blocks<BYTES, 256>::block(weight, at);
        int e = at % 256, group = e / 32, shift = group % 2 * 4;
        Scales8 packed(p + 4);
        u32 s = group < 4 ? packed.scales[0] : packed.scales[1], m = group < 4 ? packed.minimums[0] : packed.minimums[1];
        float scale = load_half(p) * code(s, group % 4, 0), minimum = load_half(p + 2) * code(m, group % 4, 0);
#pragma unroll
        for (int i = 0; i < N; i++) {
            u32 q = load_u32<4>(p + LOW + e / 64 * 32 + e % 32 + i / 4 * 4) >> shift & 0x0F0F0F0Fu;
            if (HIGH) q |= (load_u32<4>(p + HIGH + e % 32 + i / 4 * 4) >> group & 0x01010101u) << 4;
            values[i] = scale * code(q, i % 4, 0) - minimum;
        }
    }
    static const int PIECES = 2, APART = 32;
    __device__ static void pieces(const Weight& weight, i64 at, float (*values)[8]) {
        typedef Blocks<BYTES, 256> B;
        const u8* p = B::block(weight, at);
        const int pair = at % 256 / 64, e = at % 32;
        u32 words[2], high[2] = {};
        load_eight_bytes<4>(p + LOW + pair * 32 + e, words);
        if (HIGH) load_eight_bytes<4>(p + HIGH + e, high), high[0] >>= 2 * pair, high[1] >>= 2 * pair;
        const Scales8 packed(p + 4);
        const u32 s = (pair < 2 ? packed.scales[0] : packed.scales[1]) >> pair % 2 * 16;
        const u32 m = (pair < 2 ? packed.minimums[0] : packed.minimums[1]) >> pair % 2 * 16;
        const float d = load_half(p), dmin = load_half(p + 2);
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const float scale = d * code(s, j, 0), minimum = dmin * code(m, j, 0);
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const u32 four = words[i / 4] >> 4 * j & 0x0F0F0F0Fu;
                values[j][i] = scale * code(HIGH ? B::with_bits(four, high[i / 4] >> j, 4) : four, i % 4, 0) - minimum;
            }
        }
    }
};

typedef Affine8<144, 0, 16> Q4K;
typedef Affine8<176, 16, 48> Q5K;

struct Q6K : Blocks<210, 256> {
    template <int N, bool WHOLE>
    __device__ static void decode(const Weight& weight, i64 at, float* values) {
        const u8* p = block(weight, at);
        int e = at % 256, r = e % 128, low = r / 64 * 4, high = r / 32 * 2;
        float d = load_half(p + 208) * signed_code(p[192 + e / 16], 0);
#pragma unroll
        for (int i = 0; i < N; i++) {
            u32 q = load_u32<2>(p + e / 128 * 64 + e % 64 + i / 4 * 4) >> low & 0x0F0F0F0Fu;
            q |= (load_u32<2>(p + 128 + e / 128 * 32 + e % 32 + i / 4 * 4) >> high & 0x03030303u) << 4;
            values[i] = d * code(q, i % 4, 32);
        }
    }
    static const int PIECES = 4, APART = 32;
    __device__ static void pieces(const Weight& weight, i64 at, float (*values)[8]) {
        const u8* p = block(weight, at);
        const int half = at % 256 / 128, e = at % 32;
        u32 words[2][2], high[2];
        load_eight_bytes<2>(p + half * 64 + e, words[0]);
        load_eight_bytes<2>(p + half * 64 + 32 + e, words[1]);
        load_eight_bytes<2>(p + 128 + half * 32 + e, high);
        const float all = load_half(p + 208);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const float d = all * signed_code(p[192 + 8 * half + 2 * j + e / 16], 0);
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const u32 four = words[j % 2][i / 4] >> j / 2 * 4 & 0x0F0F0F0Fu, two = high[i / 4] >> 2 * j & 0x03030303u;
                values[j][i] = d * code(four | two << 4, i % 4, 32);
            }
        }
    }
};
