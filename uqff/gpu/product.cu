// y = x Wᵀ from the stored codes, for up to COLUMNS rows of x.
//
// A block of threads makes 16 outputs.  Its warps share the inputs, STAGE at a time: a warp copies the bytes of 16 rows
// into shared memory, asynchronously and some stages ahead, and multiplies them with the tensor cores.  Codes are whole
// numbers, exact as bfloat16 or float16; scales are applied to float32 sums over a group:
//
//     y = Σ_groups s · Σ q x + b · Σ x
//
// Where codes become floats by setting bits of a mantissa, they are too large by P::RAISED, which b takes off again.
//
// Fused<K> says of a type K:
//   BYTES      bytes of STAGE inputs in each stored part        PITCH     bytes from row to row in shared memory
//   CHUNK      inputs that are multiplied together              GROUPS    of them with a scale of their own
//   AFFINE     whether b is not 0                               WINDOW    rows may begin at any even address
//   Row        what is prepared for a row of a stage
//   load       CHUNK / 4 codes of a row, two to a register, of lane t of four, and s and b of the groups
//   Order      which codes those are, in each 32
//   finish     what a sum is multiplied with at the end
//   PLAIN      whether s is always 1 and b 0; the order is EvenOdd
//   direct     whether codes, scales and offsets are exact in the dtype of x, so that rounded() has the weights of a chunk
//              in the order of the codes, rounded once

const int STAGE = 256, WARPS = 8, AHEAD = 2;

struct Product {
    Weight weight;
    i64 row_bytes[3];
    const u8* x;          // [columns, inputs], or one for every `share` slots if there are experts
    u8* y;                // [columns, rows], or one for every slot
    const i64* experts;   // of each slot, or null
    int rows, inputs, columns, share, count;
};

struct PairsBF16 {
    static const bool BFLOATS = true;
    static const int RAISED = 128;
    static const u32 ONES = 0x3F803F80u;
    __device__ static u32 raised(u32 codes) { return codes | 0x43004300u; }  // of up to 7 bits
    __device__ static u32 raised(u32 codes, u32 mask) { return and_or(codes, mask, 0x43004300u); }
    // Bytes 0 and 2 as signed numbers: 128 and seven bits, less 128 or, with the sign bit, 256.
    __device__ static u32 signed_bytes(u32 w) {
        return subtract_bfloats(and_or(w, 0x007F007Fu, 0x43004300u), and_or(w, 0x00800080u, 0x43004300u));
    }
    __device__ static u32 pair(float low, float high) { return two_bfloats(low, high); }
    __device__ static void mma(float* c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
        mma_bfloats(c, a0, a1, a2, a3, b0, b1);
    }
    // Bytes 0 and 2, or 1 and 3, as e4m3; nibbles in the low bits of each half as e2m1.
    __device__ static u32 even_e4m3(u32 w) { return scaled((w << 8 & 0x80008000u) | (w << 4 & 0x07F007F0u), 0x7B807B80u); }
    __device__ static u32 odd_e4m3(u32 w) { return scaled((w & 0x80008000u) | (w >> 4 & 0x07F007F0u), 0x7B807B80u); }
    __device__ static u32 e2m1(u32 n) { return scaled((n << 12 & 0x80008000u) | (n << 6 & 0x01C001C0u), 0x7E807E80u); }
    __device__ static u32 scaled(u32 a, u32 b) { return multiply_bfloats(a, b); }
    __device__ static float low(u32 two) { return bits_to_float(two << 16); }
    __device__ static float high(u32 two) { return bits_to_float(two & 0xFFFF0000u); }
    static const u32 NANS = 0x7FC07FC0u;
};

struct PairsF16 {
    static const bool BFLOATS = false;
    static const int RAISED = 1024;
    static const u32 ONES = 0x3C003C00u;
    __device__ static u32 raised(u32 codes) { return codes | 0x64006400u; }
    __device__ static u32 raised(u32 codes, u32 mask) { return and_or(codes, mask, 0x64006400u); }
    __device__ static u32 signed_bytes(u32 w) {
        return subtract_halves(and_or(w ^ 0x00800080u, 0x00FF00FFu, 0x64006400u), 0x64806480u);  // 1152
    }
    __device__ static u32 pair(float low, float high) { return two_halves(low, high); }
    __device__ static void mma(float* c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
        mma_halves(c, a0, a1, a2, a3, b0, b1);
    }
    __device__ static u32 even_e4m3(u32 w) { return scaled((w << 8 & 0x80008000u) | (w << 7 & 0x3F803F80u), 0x5C005C00u); }
    __device__ static u32 odd_e4m3(u32 w) { return scaled((w & 0x80008000u) | (w >> 1 & 0x3F803F80u), 0x5C005C00u); }
    __device__ static u32 e2m1(u32 n) { return scaled((n << 12 & 0x80008000u) | (n << 9 & 0x0E000E00u), 0x74007400u); }
    __device__ static u32 scaled(u32 a, u32 b) { return multiply_halves(a, b); }
    __device__ static float low(u32 two) { return half_to_float(two & 0xFFFFu); }
    __device__ static float high(u32 two) { return half_to_float(two >> 16); }
    static const u32 NANS = 0x7E007E00u;
};

// Four numbers of x from an address that is a multiple of 8; zeros if there is no such column.
struct Four {
    u32 a, b;
    __device__ Four(u32 a, u32 b) : a(a), b(b) {}
    __device__ Four(const u8* x, bool there) : a(0), b(0) {
        if (there) {
            u64 both = *(const u64*)x;
            a = (u32)both;
            b = (u32)(both >> 32);
        }
    }
    __device__ u32 even() const { return __byte_perm(a, b, 0x5410); }  // 0 and 2
    __device__ u32 odd() const { return __byte_perm(a, b, 0x7632); }   // 1 and 3
};

// Eight from an address that is a multiple of 16.
__device__ inline void load_eight(const u8* x, bool there, u32* words) {
    words[0] = words[1] = words[2] = words[3] = 0;
    if (there) load_words<4>(x, words);
}

// Orders in which lane t has the eight codes of 32 that are its own, two to a register.
//   arrange   the numbers of x that they are multiplied with, in that order
//   place     where number i of the order is among the eight
//   settle    puts eight numbers of x that follow each other into that order, where they are
//   in_order  the numbers of x as they follow each other
//   word      which two of them lane t multiplies in a half of a step, of two, of the matrix instruction
//   X_PAD     bytes between rows of x in shared memory with which lanes do not wait for each other
struct EightTogether {
    static const int X_PAD = 64;
    __device__ static void in_order(const u8* x, int t, u32* pairs) { load_words<4>(x + 16 * t, pairs); }
    __device__ static constexpr int word(int step, int half, int t) { return 4 * t + 2 * step + half; }
};
struct EvenOdd : EightTogether {  // 8t + (0, 2), (1, 3), (4, 6), (5, 7)
    __device__ static void arrange(const u8* x, bool there, int t, u32* pairs) {
        load_eight(x + 16 * t, there, pairs);
        settle(pairs);
    }
    __device__ static void settle(u32* words) {
        const Four low(words[0], words[1]), high(words[2], words[3]);
        words[0] = low.even(), words[1] = low.odd(), words[2] = high.even(), words[3] = high.odd();
    }
    __device__ static constexpr int place(int i) { return (i & 4) | (i & 1) << 1 | (i >> 1 & 1); }
};
struct InOrder : EightTogether {  // 8t + (0, 1), (2, 3), (4, 5), (6, 7)
    __device__ static void arrange(const u8* x, bool there, int t, u32* pairs) {
        load_eight(x + 16 * t, there, pairs);
    }
    __device__ static void settle(u32*) {}
    __device__ static constexpr int place(int i) { return i; }
};
struct FourApart : EightTogether {  // 8t + (0, 4), (1, 5), (2, 6), (3, 7)
    __device__ static void arrange(const u8* x, bool there, int t, u32* pairs) {
        load_eight(x + 16 * t, there, pairs);
        settle(pairs);
    }
    __device__ static void settle(u32* words) {
        const Four low(words[0], words[1]), high(words[2], words[3]);
        words[0] = __byte_perm(low.a, high.a, 0x5410), words[1] = __byte_perm(low.a, high.a, 0x7632);
        words[2] = __byte_perm(low.b, high.b, 0x5410), words[3] = __byte_perm(low.b, high.b, 0x7632);
    }
    __device__ static constexpr int place(int i) { return i >> 1 | (i & 1) << 2; }
};
struct Halves {  // 4t + (0, 2), (1, 3), then 16 + 4t + (0, 2), (1, 3)
    static const int X_PAD = 32;
    __device__ static void arrange(const u8* x, bool there, int t, u32* pairs) {
        Four low(x + 8 * t, there), high(x + 32 + 8 * t, there);
        pairs[0] = low.even(), pairs[1] = low.odd(), pairs[2] = high.even(), pairs[3] = high.odd();
    }
    __device__ static void settle(u32* words) { EvenOdd::settle(words); }
    __device__ static constexpr int place(int i) { return EvenOdd::place(i); }
    __device__ static void in_order(const u8* x, int t, u32* pairs) {
        load_words<2>(x + 8 * t, pairs), load_words<2>(x + 32 + 8 * t, pairs + 2);
    }
    __device__ static constexpr int word(int step, int half, int t) { return 8 * step + 2 * t + half; }
};

// The numbers of x for a chunk that is settled, or as it is stored.
template <class F>
__device__ inline void settled(const u8* x, int t, u32* pairs) {
#pragma unroll
    for (int i = 0; i < F::CHUNK / 32; i++) F::Order::in_order(x + 64 * i, t, pairs + 4 * i);
}
template <class F>
__device__ inline void arrange(const u8* x, bool there, int t, u32* pairs) {
#pragma unroll
    for (int i = 0; i < F::CHUNK / 32; i++) F::Order::arrange(x + 64 * i, there, t, pairs + 4 * i);
}

template <bool FIRST, class A, class B>
struct Either {
    typedef A Type;
};
template <class A, class B>
struct Either<false, A, B> {
    typedef B Type;
};

struct NoRow {
    __device__ NoRow(const u8*) {}
};

template <class K>
struct Fused;
template <class K>
struct WideRows;

// The weights that codes of a chunk stand for, rounded, in the order of the inputs: 8t + (0, 1), (2, 3), (4, 5), (6, 7)
// of each 32, or as Halves has them.
template <class F, class P>
__device__ inline void scaled(const float* s, const float* b, u32* a) {
    const int EACH = F::CHUNK / 8 / F::GROUPS;
#pragma unroll
    for (int first = 0; first < F::CHUNK / 8; first += 4) {
        if (F::PLAIN) {
#pragma unroll
            for (int i = first; i < first + 4; i += 2) {
                const Four four(a[i], a[i + 1]);
                a[i] = four.even(), a[i + 1] = four.odd();
            }
            continue;
        }
        float values[8];
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const int k = first + i / 2;
            const float code = i % 2 ? P::high(a[k]) : P::low(a[k]);
            values[F::Order::place(i)] = F::AFFINE ? __fmaf_rn(s[k / EACH], code, b[k / EACH]) : s[k / EACH] * code;
        }
#pragma unroll
        for (int i = 0; i < 4; i++) a[first + i] = P::pair(values[2 * i], values[2 * i + 1]);
    }
}

struct Basics {
    static const int CHUNK = 32, GROUPS = 1;
    static const bool AFFINE = true, WINDOW = false, PLAIN = false;
    typedef NoRow Row;
    template <class P>
    __device__ static constexpr bool direct() {
        return false;
    }
    __device__ static float finish(const Weight&) { return 1.0f; }
};

template <class F, int PART>
struct Segment {
    static const int BYTES = F::BYTES[PART];
    static const int GRAIN = F::WINDOW || BYTES % 16 == 0 ? 16 : BYTES % 8 == 0 ? 8 : 4;
    static const int GRAINS = F::WINDOW ? (BYTES + 14 + 15) / 16 : BYTES / GRAIN;
    static const int OFFSET = PART == 0 ? 0 : PART == 1 ? F::BYTES[0] : F::BYTES[0] + F::BYTES[1];

    // Bytes of the rows of a block in one stage, from global into shared memory, by one warp.
    __device__ static void fetch(const u8* stage, i64 row_bytes, int row, int rows, u8* shared, int lane) {
#pragma unroll
        for (int i = 0; i < (16 * GRAINS + 31) / 32; i++) {
            int at = lane + 32 * i, r = at / GRAINS, grain = at % GRAINS;
            if (at < 16 * GRAINS) {
                const u8* from = stage + (row + r < rows ? row + r : rows - 1) * row_bytes;
                if (F::WINDOW) {
                    const int before = (u64)from & 15;
                    if (grain * GRAIN >= before + BYTES) continue;  // nothing of the row: it may be nobody's memory
                    from -= before;
                }
                copy_async<GRAIN>(shared + r * F::PITCH + OFFSET + grain * GRAIN, from + grain * GRAIN);
            }
        }
    }
};

// What a warp has of a stage: 16 rows and, if x is a single one, its part of that.
template <class K, int COLUMNS>
struct SharedMemory {
    static const int ROWS_BYTES = 16 * Fused<K>::PITCH, STAGE_BYTES = ROWS_BYTES + (COLUMNS == 1 ? STAGE * 2 : 0);
    static const int STAGES = WARPS * AHEAD * STAGE_BYTES, TERMS = WARPS * 16 * COLUMNS * 4;
    static const int BYTES = STAGES > TERMS ? STAGES : TERMS;
};

template <class K, class P, int COLUMNS>
__device__ inline void multiply(const Product& product) {
    typedef Fused<K> F;
    extern __shared__ __align__(16) u8 shared[];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int row = blockIdx.x * 16, rows = product.rows, slot = blockIdx.y;
    begin_next_kernel();
    if (COLUMNS == 1 || product.experts) wait_for_kernels_before();
    i64 expert = product.experts ? product.experts[slot] : 0;
    // What is no expert's number selects nothing: zeros, and nothing outside the weight is read.
    const bool known = expert >= 0 && expert < product.count;
    if (!known) expert = 0;
    const u8* x = product.x + (i64)(slot / product.share) * product.inputs * 2;
    u8* y = product.y + (i64)slot * rows * 2;
    const int stages = known ? product.inputs / STAGE : 0, mine = (stages - warp + WARPS - 1) / WARPS;
    const int TILES = (COLUMNS + 7) / 8, STAGE_BYTES = SharedMemory<K, COLUMNS>::STAGE_BYTES;
    u8* buffers = shared + warp * AHEAD * STAGE_BYTES;

    const u8* part[F::PARTS];
    for (int i = 0; i < F::PARTS; i++) part[i] = product.weight.part[i] + expert * rows * product.row_bytes[i];

#define FETCH(i)                                                                                                       \
    if ((i) < mine) {                                                                                                  \
        i64 stage = warp + (i64)(i) * WARPS;                                                                           \
        u8* to = buffers + (i) % AHEAD * STAGE_BYTES;                                                                  \
        if (COLUMNS == 1) copy_async<16>(to + 16 * F::PITCH + 16 * lane, x + stage * STAGE * 2 + 16 * lane);           \
        Segment<F, 0>::fetch(part[0] + stage * F::BYTES[0], product.row_bytes[0], row, rows, to, lane);                \
        if constexpr (F::PARTS > 1)                                                                                    \
            Segment<F, 1>::fetch(part[1] + stage * F::BYTES[1], product.row_bytes[1], row, rows, to, lane);            \
        if constexpr (F::PARTS > 2)                                                                                    \
            Segment<F, 2>::fetch(part[2] + stage * F::BYTES[2], product.row_bytes[2], row, rows, to, lane);            \
    }                                                                                                                  \
    end_group();

    float sums[TILES][4] = {};
#pragma unroll
    for (int i = 0; i < AHEAD; i++) { FETCH(i) }
    wait_for_kernels_before();  // weights are on their way
    for (int i = 0; i < mine; i++) {
        wait_groups<AHEAD - 1>();
        if (COLUMNS == 1) {  // a lane has copied these itself
            u32 words[4];
            u8* own = buffers + i % AHEAD * STAGE_BYTES + 16 * F::PITCH + 16 * lane;
            load_words<4>(own, words);
            F::Order::settle(words);
            write_four(own, words);
        }
        __syncwarp();
        const i64 stage = warp + (i64)i * WARPS;
        const u8* held = buffers + i % AHEAD * STAGE_BYTES;
        const u8* low = held + g * F::PITCH;
        const u8* high = low + 8 * F::PITCH;
        if (F::WINDOW) {
            u64 from = (u64)part[0] + stage * F::BYTES[0];
            low += from + (row + g < rows ? row + g : rows - 1) * product.row_bytes[0] & 15;
            high += from + (row + g + 8 < rows ? row + g + 8 : rows - 1) * product.row_bytes[0] & 15;
        }
        typename F::Row low_row(low), high_row(high);
        const int REGISTERS = F::CHUNK / 8, STEPS = REGISTERS / 2 / F::GROUPS;
#pragma unroll
        for (int chunk = 0; chunk < STAGE / F::CHUNK; chunk++) {
            u32 a[REGISTERS], b[REGISTERS];
            float s[F::GROUPS], m[F::GROUPS], s8[F::GROUPS], m8[F::GROUPS];
            F::template load<P>(low, low_row, chunk, t, a, s, m);
            F::template load<P>(high, high_row, chunk, t, b, s8, m8);
#pragma unroll
            for (int tile = 0; tile < TILES; tile++) {
                const int column = tile * 8 + g;
                u32 pairs[REGISTERS];
                if (COLUMNS == 1) settled<F>(held + 16 * F::PITCH + chunk * F::CHUNK * 2, t, pairs);
                else
                    arrange<F>(x + ((i64)column * product.inputs + stage * STAGE + chunk * F::CHUNK) * 2,
                               column < product.columns, t, pairs);
                float* sum = sums[tile];
#pragma unroll
                for (int group = 0; group < F::GROUPS; group++) {
                    float c[4] = {}, e[4] = {};
#pragma unroll
                    for (int step = 0; step < STEPS; step++) {
                        const int k = 2 * (group * STEPS + step);
                        P::mma(c, a[k], b[k], a[k + 1], b[k + 1], pairs[k], pairs[k + 1]);
                        if (F::AFFINE) P::mma(e, P::ONES, P::ONES, P::ONES, P::ONES, pairs[k], pairs[k + 1]);
                    }
                    sum[0] = __fmaf_rn(s[group], c[0], sum[0]);
                    sum[2] = __fmaf_rn(s8[group], c[2], sum[2]);
                    if (COLUMNS > 1) {
                        sum[1] = __fmaf_rn(s[group], c[1], sum[1]);
                        sum[3] = __fmaf_rn(s8[group], c[3], sum[3]);
                    }
                    if (F::AFFINE) {
                        sum[0] = __fmaf_rn(m[group], e[0], sum[0]);
                        sum[2] = __fmaf_rn(m8[group], e[0], sum[2]);
                        if (COLUMNS > 1) {
                            sum[1] = __fmaf_rn(m[group], e[1], sum[1]);
                            sum[3] = __fmaf_rn(m8[group], e[1], sum[3]);
                        }
                    }
                }
            }
        }
        __syncwarp();
        FETCH(i + AHEAD)
    }
#undef FETCH

    // The terms of the warps are added up in their order, so that the same weights give the same bits.
    wait_groups<0>();
    __syncthreads();
    float* terms = (float*)shared;
    if (COLUMNS == 1) {
        if (t == 0) terms[warp * 16 + g] = sums[0][0], terms[warp * 16 + g + 8] = sums[0][2];
    } else for (int tile = 0; tile < TILES; tile++) {
        float* at = terms + warp * 16 * COLUMNS + tile * 8 + 2 * t;
        at[g * COLUMNS] = sums[tile][0], at[g * COLUMNS + 1] = sums[tile][1];
        at[(g + 8) * COLUMNS] = sums[tile][2], at[(g + 8) * COLUMNS + 1] = sums[tile][3];
    }
    __syncthreads();
    const float scale = F::finish(product.weight);
    for (int at = threadIdx.x; at < 16 * COLUMNS; at += 32 * WARPS) {
        int r = at % 16, column = at / 16;
        if (row + r < rows && column < product.columns) {
            float sum = 0;
            for (int i = 0; i < WARPS; i++) sum += terms[i * 16 * COLUMNS + r * COLUMNS + column];
            ((u16*)y)[(i64)column * rows + row + r] = (u16)P::pair(sum * scale, 0.0f);
        }
    }
}
