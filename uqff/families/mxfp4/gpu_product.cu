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
    template <class P>
    __device__ static constexpr bool direct() {
        return P::BFLOATS;
    }
    template <class P>
    __device__ static void rounded(const u8* row, const Row&, int chunk, int t, u32* a) {
        const u32 w = load_u32<4>(row + 16 * chunk + 4 * t), scale = row[128 + chunk] * 0x00800080u;
#pragma unroll
        for (int i = 0; i < 4; i++) a[i] = multiply_bfloats(P::e2m1(w >> 4 * i & 0x000F000Fu), scale);
    }
};

// A nibble with its exponent in a float16's is 2^14 times too small.
template <>
struct Coded<Mxfp4> : CodedBasics {
    static const int RAISED = 0, EXPONENT = 14;
    __device__ static constexpr int place(int i) { return FourApart::place(i); }
    __device__ static void codes(const u8* const* part, int chunk, int t, u32* a) {
        const u32 w = load_u32<4>(part[0] + 16 * chunk + 4 * t);
        a[0] = and_or(w << 9, 0x0E000E00u, w << 12 & 0x80008000u);
        a[1] = and_or(w << 5, 0x0E000E00u, w << 8 & 0x80008000u);
        a[2] = and_or(w << 1, 0x0E000E00u, w << 4 & 0x80008000u);
        a[3] = and_or(w >> 3, 0x0E000E00u, w & 0x80008000u);
    }
    __device__ static void scales(const u8* const* part, int pair, float* s, float*) {
        const u32 both = *(const u16*)(part[1] + 2 * pair);
        s[0] = bits_to_float(both << 23 & 0x7F800000u), s[1] = bits_to_float(both >> 8 << 23);
    }
};
