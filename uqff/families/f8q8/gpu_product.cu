// Products with F8Q8 weights.

template <>
struct Fused<F8q8> : Basics {
    typedef EvenOdd Order;
    static const int PARTS = 1, PITCH = 272;
    static constexpr int BYTES[1] = {264};
    static const bool AFFINE = false;

    template <class P>
    __device__ static void load(const u8* row, const Row&, int chunk, int t, u32* a, float* s, float* b) {
        const int first = 33 * chunk + 1, shift = first % 4 * 8;
        const u32* words = (const u32*)(row + first / 4 * 4 + 8 * t);
        u32 w[3] = {words[0], words[1], shift ? words[2] : 0};
#pragma unroll
        for (int i = 0; i < 2; i++) {
            u32 four = __funnelshift_r(w[i], w[i + 1], shift);
            a[2 * i] = P::signed_bytes(four), a[2 * i + 1] = P::signed_bytes(four >> 8);
        }
        s[0] = e4m3_to_float(row[33 * chunk]) * (1.0f / 416.0f);
    }
};

template <>
struct Coded<F8q8> : CodedBasics {
    static const int ZERO = 128;
    __device__ static void codes(const u8* const* part, int chunk, int t, u32* a) {
        signed_bytes(part[0], 33 * chunk + 1, t, a);
    }
    __device__ static void scales(const u8* const* part, int pair, float* s, float*) {
#pragma unroll
        for (int i = 0; i < 2; i++) s[i] = e4m3_to_float(part[0][66 * pair + 33 * i]) * (1.0f / 416.0f);
    }
};
