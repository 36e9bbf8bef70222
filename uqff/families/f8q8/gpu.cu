// part: blocks of a scale, e4m3, and 32 codes.

struct F8q8 {
    // Over 416, rounded as a division is; it need not be one, because scales are few, and none of these is so small.
    __device__ static float scale(u32 byte) {
        const float number = e4m3_to_float(byte), size = bits_to_float(__float_as_uint(number) & 0x7FFFFFFFu);
        const float inverse = 1.0f / 416.0f, near = size * inverse;
        const float exact = __fmaf_rn(__fmaf_rn(-near, 416.0f, size), inverse, near);
        return bits_to_float(__float_as_uint(exact) | (__float_as_uint(number) & 0x80000000u));
    }
    __device__ static void touch(const Weight& weight, i64 at) { prefetch(weight.part[0] + at / 32 * 33 + at % 32); }
    template <int N, bool WHOLE>
    __device__ static void decode(const Weight& weight, i64 at, float* values) {
        const u8* p = weight.part[0] + at / 32 * 33;
        const float d = scale(p[0]);
        u32 words[2];
        if (N == 8) load_eight_bytes<1>(p + 1 + at % 32, words);
        else words[0] = load_u32<1>(p + 1 + at % 32);
#pragma unroll
        for (int i = 0; i < N; i++) values[i] = signed_code(words[i / 4], i % 4) * d;
    }
};
