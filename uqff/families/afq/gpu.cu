// part: codes, scales, biases.  A row is whole words, so the codes are one stream of bits.

template <int BITS, int GROUP, class S>
struct Afq {
    template <int N, bool WHOLE>
    __device__ static void decode(const Weight& weight, i64 at, float* values) {
        const u8* p = weight.part[0] + at / 8 * BITS;
        u64 codes = 0;
        if (BITS == 4 || BITS == 8) {
#pragma unroll
            for (int i = 0; i < BITS / 4; i++) codes |= (u64)load_u32<4>(p + 4 * i) << 32 * i;
        } else {
#pragma unroll
            for (int i = 0; i < BITS; i++) codes |= (u64)p[i] << 8 * i;
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
