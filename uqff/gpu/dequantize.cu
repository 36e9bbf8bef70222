// A weight as plain numbers: each thread writes 16 bytes at a time, the neighbour the next 16.
// K::decode<N>(weight, at, values) gives N of them from `at` on, a multiple of N, which is 4 or 8.

struct WriteF32 {
    static const int RUN = 4, SIZE = 4;
    __device__ static void pack(const float* values, u32* words) {
        for (int i = 0; i < 4; i++) words[i] = __float_as_uint(values[i]);
    }
};
struct WriteF16 {
    static const int RUN = 8, SIZE = 2;
    __device__ static void pack(const float* values, u32* words) {
        for (int i = 0; i < 4; i++) words[i] = two_halves(values[2 * i], values[2 * i + 1]);
    }
};
struct WriteBF16 {
    static const int RUN = 8, SIZE = 2;
    __device__ static void pack(const float* values, u32* words) {
        for (int i = 0; i < 4; i++) words[i] = two_bfloats(values[2 * i], values[2 * i + 1]);
    }
};

struct Words {
    u32 x, y, z, w;
};

template <class K, class T>
__device__ inline void dequantize(const Weight& weight, u8* out) {
    const int RUNS = 2;
    i64 total = weight.number[0];
    i64 first = (i64)blockIdx.x * RUNS * blockDim.x + threadIdx.x;
    u32 words[RUNS][4];
#pragma unroll
    for (int run = 0; run < RUNS; run++) {
        i64 at = (first + run * blockDim.x) * T::RUN;
        if (at < total) {
            float values[T::RUN];
            K::template decode<T::RUN>(weight, at, values);
            T::pack(values, words[run]);
        }
    }
#pragma unroll
    for (int run = 0; run < RUNS; run++) {
        i64 at = (first + run * blockDim.x) * T::RUN;
        if (at + T::RUN <= total) {
            Words made = {words[run][0], words[run][1], words[run][2], words[run][3]};
            *(Words*)__builtin_assume_aligned(out + at * T::SIZE, 16) = made;
        } else if (at < total) {
            for (i64 i = at; i < total; i++) {
                int word = (int)(i - at) * T::SIZE / 4;
                if (T::SIZE == 4) *(u32*)(out + i * 4) = words[run][word];
                else *(u16*)(out + i * 2) = (u16)(words[run][word] >> 16 * ((i - at) & 1));
            }
        }
    }
}
