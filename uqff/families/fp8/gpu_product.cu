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

template <>
struct Coded<Fp8> : CodedBasics {
    static const int RAISED = 0, BESIDE = 32;
    static const bool PLAIN = true;
    __device__ static void codes(const u8* const* part, int chunk, int t, u32* a) {
        u32 w[2];
        load_words<2>(part[0] + 32 * chunk + 8 * t, w);
        a[0] = low_e4m3_to_halves(w[0]), a[1] = high_e4m3_to_halves(w[0]);
        a[2] = low_e4m3_to_halves(w[1]), a[3] = high_e4m3_to_halves(w[1]);
    }
    __device__ static void scales(const u8* const*, int, float* s, float*) { s[0] = s[1] = 1.0f; }
};
