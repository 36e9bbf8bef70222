// part: codes, scales, biases.  A row is whole words, so the codes are one stream of bits.

template <int BITS, int GROUP, class S>
struct Afq {
    __device__ static void touch(const Weight& weight, i64 at) {
        prefetch(weight.part[0] + at / 8 * BITS);
        prefetch(weight.part[1] + at / GROUP * S::SIZE), prefetch(weight.part[2] + at / GROUP * S::SIZE);
    }
    template <int N, bool WHOLE>
    __device__ static void decode(const Weight& weight, i64 at, float* values) {
        const u8* p = weight.part[0] + at / 8 * BITS;
        u64 codes;
        if (BITS == 2) codes = *(const u16*)p;
        else if (BITS == 4) codes = load_u32<4>(p);
        else if (BITS == 8) codes = load_u32<4>(p) | (u64)load_u32<4>(p + 4) << 32;
        else {
            // The words that hold the first and the last byte.
            const u32 first = *(const u32*)((u64)p & ~3ull), last = *(const u32*)((u64)(p + BITS - 1) & ~3ull);
            const int shift = 8 * ((int)(u64)p & 3);
            codes = __funnelshift_r(first, last, shift) | (u64)(last >> shift) << 32;
        }
        if (N == 4) codes >>= (int)(at % 8) * BITS;
        float scale = S::load(weight.part[1] + at / GROUP * S::SIZE), bias = S::load(weight.part[2] + at / GROUP * S::SIZE);
#pragma unroll
        for (int i = 0; i < N; i++) {
            u32 q = (u32)(codes >> i * BITS) & ((1u << BITS) - 1);
            values[i] = code(q, 0, 0) * scale + bias;
        }
    }
};
