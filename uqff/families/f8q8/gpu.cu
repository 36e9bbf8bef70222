// part: blocks of a scale, e4m3, and 32 codes.

struct F8q8 {
    template <int N, bool WHOLE>
    __device__ static void decode(const Weight& weight, i64 at, float* values) {
        const u8* p = weight.part[0] + at / 32 * 33;
        float d = __fdiv_rn(e4m3_to_float(p[0]), 416.0f);
#pragma unroll
        for (int i = 0; i < N; i++) values[i] = signed_code(load_u32<1>(p + 1 + at % 32 + i / 4 * 4), i % 4) * d;
    }
};
