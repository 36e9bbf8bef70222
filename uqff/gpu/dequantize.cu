// A weight as plain numbers: each thread writes 16 bytes at a time, the neighbour the next 16.
// K::decode<N, WHOLE>(weight, at, values) gives N of them from `at` on, a multiple of N, which is 4 or 8.  WHOLE says
// that the weight has as many from there.

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

template <class T>
__device__ inline void write_run(u8* out, i64 at, const u32* words) {
    Words made = {words[0], words[1], words[2], words[3]};
    *(Words*)__builtin_assume_aligned(out + at * T::SIZE, 16) = made;
}

template <class K, class T>
__device__ inline void dequantize(const Weight& weight, u8* out) {
    const int RUNS = 4;
    begin_next_kernel();
    wait_for_kernels_before();
    i64 total = weight.number[0];
    i64 first = (i64)blockIdx.x * RUNS * blockDim.x + threadIdx.x;
    if (((i64)blockIdx.x + 1) * RUNS * blockDim.x * T::RUN <= total) {
        // No branches, so that the loads of all runs are under way together.
        u32 words[RUNS][4];
#pragma unroll
        for (int run = 0; run < RUNS; run++) {
            float values[T::RUN];
            K::template decode<T::RUN, true>(weight, (first + run * blockDim.x) * T::RUN, values);
            T::pack(values, words[run]);
        }
#pragma unroll
        for (int run = 0; run < RUNS; run++) write_run<T>(out, (first + run * blockDim.x) * T::RUN, words[run]);
        return;
    }
#pragma unroll 1
    for (int run = 0; run < RUNS; run++) {
        i64 at = (first + run * blockDim.x) * T::RUN;
        if (at >= total) return;
        float values[T::RUN];
        u32 words[4];
        K::template decode<T::RUN, false>(weight, at, values);
        T::pack(values, words);
        if (at + T::RUN <= total) write_run<T>(out, at, words);
        else {
#pragma unroll
            for (int i = 0; i < T::RUN; i++) {
                u32 word = words[i * T::SIZE / 4];
                if (at + i >= total) return;
                if (T::SIZE == 4) *(u32*)(out + (at + i) * 4) = word;
                else *(u16*)(out + (at + i) * 2) = (u16)(word >> 16 * (i & 1));
            }
        }
    }
}
