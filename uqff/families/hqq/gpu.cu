// part: codes, scales, zeros.  number: weights, columns of M, packed rows of M.

template <int BITS, int AXIS, class S>
struct Hqq {
    static const int PLANES = BITS == 3 ? 10 : 8 / BITS;

    // One code, of the plane that its row of M belongs to.
    __device__ static float value(const Weight& weight, u32 word, int shift, i64 group) {
        u32 q = word >> shift & ((1u << BITS) - 1);
        return (code(q, 0, 0) - S::load(weight.part[2] + group * S::SIZE)) * S::load(weight.part[1] + group * S::SIZE);
    }
    __device__ static u32 word(const Weight& weight, i64 place) {
        return BITS == 3 ? ((const u32*)weight.part[0])[place] : weight.part[0][place];
    }
    __device__ static void touch(const Weight&, i64) {}
    template <int N, bool WHOLE>
    __device__ static void decode(const Weight& weight, i64 at, float* values) {
        i64 total = weight.number[0], columns = weight.number[1], height = weight.number[2];
        i64 row = total >> 32 ? at / columns : (u32)at / (u32)columns, column = at - row * columns;
        u32 plane = (u32)row / (u32)height;
        int shift = BITS * (PLANES - 1 - (int)plane);
        i64 place = (row - plane * height) * columns + column;
        if (AXIS == 0 && BITS != 3 && N == 8 && columns % N == 0) {
            u32 bytes[2];
            float scales[N], zeros[N];
            load_words<2>(weight.part[0] + place, bytes);
            load_eight<S>(weight.part[1] + column * S::SIZE, scales);
            load_eight<S>(weight.part[2] + column * S::SIZE, zeros);
#pragma unroll
            for (int i = 0; i < N; i++) {
                u32 q = bytes[i / 4] >> shift & 0x01010101u * ((1u << BITS) - 1);
                values[i] = (code(q, i % 4, 0) - zeros[i % N]) * scales[i % N];
            }
            return;
        }
        if (AXIS == 1 && columns % N == 0) {
            const float scale = S::load(weight.part[1] + row * S::SIZE), zero = S::load(weight.part[2] + row * S::SIZE);
            u32 words[N];
            if (BITS == 3) {
#pragma unroll
                for (int i = 0; i < N / 4; i++) load_words<4>(weight.part[0] + (place + 4 * i) * 4, words + 4 * i);
            } else if (N == 8) load_words<2>(weight.part[0] + place, words);
            else words[0] = load_u32<4>(weight.part[0] + place);
#pragma unroll
            for (int i = 0; i < N; i++) {
                u32 q = BITS == 3 ? words[BITS == 3 ? i : 0] >> shift & 7u
                                  : words[BITS == 3 ? 0 : i / 4] >> shift & 0x01010101u * ((1u << BITS) - 1);
                values[i] = (code(q, BITS == 3 ? 0 : i % 4, 0) - zero) * scale;
            }
            return;
        }
        if (column + N <= columns) {
#pragma unroll
            for (int i = 0; i < N; i++) values[i] = value(weight, word(weight, place + i), shift, AXIS == 0 ? column + i : row);
            return;
        }
        // The run goes on in the next row, which may be one of the next plane.
#pragma unroll
        for (int i = 0; i < N; i++) {
            values[i] = at + i < total ? value(weight, word(weight, place), shift, AXIS == 0 ? column : row) : 0.0f;
            place++;
            if (++column == columns) {
                column = 0;
                if (++row % height == 0) {
                    shift -= BITS;
                    place -= height * columns;
                }
            }
        }
    }
};

// All of M along axis 0: a thread has eight columns, whose scales and zeros it reads once, and every so many rows.
template <class K, class W>
struct HqqColumns;

template <int BITS, class S, class W>
struct HqqColumns<Hqq<BITS, 0, S>, W> {
    static const int PLANES = BITS == 3 ? 10 : 8 / BITS, WORDS = BITS == 3 ? 8 : 2, ROWS = 8;

    __device__ static void run(const Weight& weight, u8* out) {
        begin_next_kernel();
        wait_for_kernels_before();
        const i64 columns = weight.number[1], height = weight.number[2], rows = weight.number[0] / columns;
        const i64 column = 8 * ((i64)blockIdx.x * blockDim.x + threadIdx.x);
        if (column >= columns) return;
        float scales[8], zeros[8];
        load_eight<S>(weight.part[1] + column * S::SIZE, scales);
        load_eight<S>(weight.part[2] + column * S::SIZE, zeros);
        // All loads of a few rows are under way before the first numbers are written.
        for (i64 first = blockIdx.y; first < height; first += ROWS * (i64)gridDim.y) {
            u32 words[ROWS][WORDS];
#pragma unroll
            for (int i = 0; i < ROWS; i++) {
                const i64 packed = first + i * (i64)gridDim.y;
                if (packed >= height) continue;
                const u8* from = weight.part[0] + (packed * columns + column) * (WORDS / 2);
                if (BITS == 3) load_words<4>(from, words[i]), load_words<4>(from + 16, words[i] + WORDS - 4);
                else load_words<2>(from, words[i]);
            }
#pragma unroll
            for (int i = 0; i < ROWS; i++) {
                const i64 packed = first + i * (i64)gridDim.y;
                if (packed < height) write(words[i], packed, height, rows, columns, column, scales, zeros, out);
            }
        }
    }
    // The numbers of packed codes of eight columns.
    __device__ static void write(const u32* words, i64 packed, i64 height, i64 rows, i64 columns, i64 column,
                                 const float* scales, const float* zeros, u8* out) {
#pragma unroll
        for (int plane = 0; plane < PLANES; plane++) {
            const i64 row = plane * height + packed;
            if (row >= rows) break;
            const int shift = BITS * (PLANES - 1 - plane);
            float values[8];
#pragma unroll
            for (int i = 0; i < 8; i++) {
                u32 q = BITS == 3 ? words[BITS == 3 ? i : 0] >> shift & 7u
                                  : words[BITS == 3 ? 0 : i / 4] >> shift & 0x01010101u * ((1u << BITS) - 1);
                values[i] = (code(q, BITS == 3 ? 0 : i % 4, 0) - zeros[i]) * scales[i];
            }
#pragma unroll
            for (int run = 0; run < 8; run += W::RUN) {
                u32 made[4];
                W::pack(values + run, made);
                write_run<W>(out, row * columns + column + run, made);
            }
        }
    }
};
