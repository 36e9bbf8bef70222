// part: nibbles, the lower first; scale bytes.

__device__ inline float e2m1_to_float(u32 nibble) {
    float magnitude = bits_to_float((nibble & 7u) << 22) * bits_to_float(0x7E800000u);  // 2^126
    return bits_to_float(__float_as_uint(magnitude) | (nibble & 8u) << 28);
}

struct Mxfp4 {
    __device__ static void touch(const Weight& weight, i64 at) { prefetch(weight.part[0] + at / 2), prefetch(weight.part[1] + at / 32); }
    template <int N, bool WHOLE>
    __device__ static void decode(const Weight& weight, i64 at, float* values) {
        u32 codes = N == 8 ? load_u32<4>(weight.part[0] + at / 2) : *(const u16*)(weight.part[0] + at / 2);
        float power = bits_to_float((u32)weight.part[1][at / 32] << 23);
#pragma unroll
        for (int i = 0; i < N; i++) values[i] = e2m1_to_float(codes >> 4 * i & 15u) * power;
    }
};
