// A weight as plain numbers: each thread writes 16 bytes at a time, the neighbour the next 16.
// K::decode<N, WHOLE>(weight, at, values) gives N of them from `at` on, a multiple of N, which is 4 or 8.  WHOLE says
// that the weight has as many from there.
//
// Of some types the bytes of eight numbers hold parts of others, too.  These have K::PIECES, a power of two up to 4, each
// K::APART from the one before, and K::pieces(weight, at, values) gives eight numbers of each.

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

// Blocks that are there before the kernel before has ended, about: as many as a large GPU has room for.  They bring what
// they read nearer until then, by K::touch(weight, at).  Of others only those gain that decode more at once.
const int FIRST = 1056;

template <class K, class = void>
struct PiecesOf {
    static const int COUNT = 1, APART = 8;
};
template <class K>
struct PiecesOf<K, decltype((void)K::PIECES)> {
    static const int COUNT = K::PIECES, APART = K::APART;
};

template <class K, class T, int RUNS>
__device__ inline void dequantize(const Weight& weight, u8* out) {
    const int COUNT = T::RUN == 8 ? PiecesOf<K>::COUNT : 1, APART = COUNT == 1 ? T::RUN : PiecesOf<K>::APART;
    static_assert(RUNS % COUNT == 0, "a thread decodes whole units");
    const int LANES = APART / T::RUN, UNITS = RUNS / COUNT;
    const i64 total = weight.number[0], first = (i64)blockIdx.x * UNITS * blockDim.x + threadIdx.x;
    auto begin = [&](int unit) {
        const i64 i = first + unit * blockDim.x;
        return COUNT == 1 ? i * T::RUN : i / LANES * (COUNT * APART) + i % LANES * T::RUN;
    };
    begin_next_kernel();
#pragma unroll
    for (int unit = 0; unit < UNITS; unit++)
        if ((RUNS > 2 || blockIdx.x < FIRST) && begin(unit) < total) K::touch(weight, begin(unit));
    wait_for_kernels_before();
    if (((i64)blockIdx.x + 1) * RUNS * blockDim.x * T::RUN <= total) {
        // No branches, so that the loads of all runs are under way together.
        u32 words[RUNS][4];
#pragma unroll
        for (int unit = 0; unit < UNITS; unit++) {
            float values[COUNT][T::RUN];
            if constexpr (COUNT == 1) K::template decode<T::RUN, true>(weight, begin(unit), values[0]);
            else K::pieces(weight, begin(unit), values);
#pragma unroll
            for (int i = 0; i < COUNT; i++) T::pack(values[i], words[unit * COUNT + i]);
        }
#pragma unroll
        for (int run = 0; run < RUNS; run++) write_run<T>(out, begin(run / COUNT) + run % COUNT * APART, words[run]);
        return;
    }
#pragma unroll 1
    for (int run = 0; run < RUNS; run++) {
        i64 at = begin(run / COUNT) + run % COUNT * APART;
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
