// Products with MXFP4 weights.

template <>
struct Fused<Mxfp4> : Basics {
    typedef FourApart Order;
    static const int PARTS = 2, PITCH = 144;
    static constexpr int BYTES[2] = {128, 8};
    static const bool AFFINE = false;

    template <class P>
    __device__ static void load(const u8* row, const Row&, int chunk, int t, u32* a, float* s, float* b) {
        u32 w = load_u32<4>(row + 16 * chunk + 4 * t);
#pragma unroll
        for (int i = 0; i < 4; i++) a[i] = P::e2m1(w >> 4 * i & 0x000F000Fu);
        s[0] = bits_to_float((u32)row[128 + chunk] << 23);
    }
};
