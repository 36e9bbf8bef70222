// Products with FP8 weights.

template <>
struct Fused<Fp8> : Basics, EvenOdd {
    static const int PARTS = 1, PITCH = 272;
    static constexpr int BYTES[1] = {256};
    static const bool AFFINE = false;

    template <class P>
    __device__ static void load(const u8* row, const Row&, int chunk, int t, u32* a, float* s, float* b) {
        u64 both = *(const u64*)(row + 32 * chunk + 8 * t);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            u32 w = (u32)(both >> 32 * i);
            a[2 * i] = P::even_e4m3(w), a[2 * i + 1] = P::odd_e4m3(w);
            if ((w & 0x7F7F7F7Fu) + 0x01010101u & 0x80808080u) {  // one is NaN
#pragma unroll
                for (int j = 0; j < 4; j++)
                    if ((w >> 8 * j & 0x7Fu) == 0x7Fu) a[2 * i + j % 2] |= P::NAN_LOW << j / 2 * 16;
            }
        }
        s[0] = 1.0f;
    }
    __device__ static float finish(const Weight& weight) { return F32::load(weight.part[1]); }
};
