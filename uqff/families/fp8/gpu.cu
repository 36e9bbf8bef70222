// part: codes, the scale.

struct Fp8 {
    __device__ static void touch(const Weight& weight, i64 at) { prefetch(weight.part[0] + at); }
    template <int N, bool WHOLE>
    __device__ static void decode(const Weight& weight, i64 at, float* values) {
        float scale = F32::load(weight.part[1]);
#pragma unroll
        for (int i = 0; i < N; i++) {
            i64 from = at + i / 4 * 4;
            u32 four = 0;
            if (WHOLE || from + 4 <= weight.number[0]) four = load_u32<4>(weight.part[0] + from);
            else
                for (int j = 0; from + j < weight.number[0]; j++) four |= (u32)weight.part[0][from + j] << 8 * j;
            values[i] = e4m3_to_float(four >> i % 4 * 8 & 255u) * scale;
        }
    }
};
