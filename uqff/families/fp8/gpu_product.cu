// Products with FP8 weights.

template <>
struct Fused<Fp8> : Basics {
    typedef EvenOdd Order;
    static const int PARTS = 1, PITCH = 272;
    static constexpr int BYTES[1] = {256};
    static const bool AFFINE = false, PLAIN = true;

    template <class P>
    __device__ static void load(const u8* row, const Row&, int chunk, int t, u32* a, float* s, float* b) {
        u64 both = *(const u64*)(row + 32 * chunk + 8 * t);
        u32 low = (u32)both, high = (u32)(both >> 32);
        a[0] = P::even_e4m3(low), a[1] = P::odd_e4m3(low), a[2] = P::even_e4m3(high), a[3] = P::odd_e4m3(high);
        // One is NaN, and with it the sum.
        if (((low & 0x7F7F7F7Fu) + 0x01010101u | (high & 0x7F7F7F7Fu) + 0x01010101u) & 0x80808080u) a[0] = P::NANS;
        s[0] = 1.0f;
    }
    __device__ static float finish(const Weight& weight) { return F32::load(weight.part[1]); }
};
