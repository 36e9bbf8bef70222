// Products with HQQ weights, of groups of 64: y = x Wᵀ for up to COLUMNS rows of x.
//
// Along axis 0, each input has a scale and a zero of its own in 64 rows that are R = rows / 64 apart, so they go with x:
//
//     y = Σ (q + o) · x s - Σ (z + o) · x s
//
// and the second sum is the same for all 64.  Along axis 1 each row has a scale and a zero for 64 inputs:
//
//     y = Σ_groups s · (Σ (q + o) · x - (z + o) · Σ x)
//
// q + o is exact in bfloat16.  What it is multiplied with is the sum of two bfloat16 numbers: the tensor cores have
// columns for both.  A block makes 16 TILES outputs; its warps share the inputs, 64 at a time.

const int HQQ_GROUP = 64, HQQ_WARPS = 8;

struct HqqProduct {
    Weight weight;
    const u8* x;  // [columns, inputs]
    u8* y;        // [columns, rows]
    int rows, inputs, columns;
};

template <class T>
__device__ inline void hqq_put(u8* at, float number);
template <>
__device__ inline void hqq_put<F16>(u8* at, float number) {
    *(u16*)at = (u16)two_halves(number, 0.0f);
}
template <>
__device__ inline void hqq_put<BF16>(u8* at, float number) {
    *(u16*)at = (u16)two_bfloats(number, 0.0f);
}

// Codes of 64 inputs of the rows of M that 16 outputs of a lane's are in: four words for each of two, rows g and g + 8.
template <int BITS>
struct HqqCodes {
    static const int PLANES = 8 / BITS, HEIGHT = HQQ_GROUP / PLANES, OFFSET = BITS == 8 ? -128 : 128, BYTES = 1;

    // Of tile i and half h: the row of packed codes, and the plane.
    __device__ static int packed(int i, int h, int g) {
        return 8 * (PLANES == 1 ? 2 * i + h : i / (PLANES > 1 ? PLANES / 2 : 1)) + g;
    }
    __device__ static int plane(int i, int h, int g) { return PLANES == 1 ? 0 : i % (PLANES > 1 ? PLANES / 2 : 1) * 2 + h; }
    __device__ static int row(int i, int h, int g) { return plane(i, h, g) * HEIGHT + packed(i, h, g); }

    // Where an input of 64 is among those that lanes take one after the other; its neighbour is two further.
    __device__ static int place(int c) { return c / 4 * 4 + c % 4 / 2; }

    // The pairs (0, 2) and (1, 3) of each of four words of four codes: inputs 16 t + 4 j + ...
    __device__ static void load(const u8* codes, i64 stride, int i, int h, int g, int t, u32* pairs) {
        u32 words[4];
        load_words<4>(codes + packed(i, h, g) * stride + 16 * t, words);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            if (BITS == 8) {
                const u32 w = words[j] ^ 0x80808080u;
                pairs[2 * j] = PairsBF16::signed_bytes(w), pairs[2 * j + 1] = PairsBF16::signed_bytes(w >> 8);
            } else {
                const int shift = BITS * (PLANES - 1 - plane(i, h, g));
                const u32 mask = ((1u << BITS) - 1) * 0x00010001u;
                pairs[2 * j] = PairsBF16::raised(words[j] >> shift, mask);
                pairs[2 * j + 1] = PairsBF16::raised(words[j] >> (8 + shift), mask);
            }
        }
    }
};

// Ten codes to a word, of rows of M that are seven apart.
template <>
struct HqqCodes<3> {
    static const int HEIGHT = 7, OFFSET = 128, BYTES = 4;
    __device__ static int row(int i, int h, int g) { return 16 * i + 8 * h + g; }
    __device__ static int place(int c) { return c % 16 / 4 * 16 + c / 16 * 4 + c % 4 / 2; }

    // Inputs 16 j + 4 t + ...: four lanes read 64 bytes together.
    __device__ static void load(const u8* codes, i64 stride, int i, int h, int g, int t, u32* pairs) {
        const int at = row(i, h, g), shift = 3 * (9 - at / HEIGHT);
        const u8* p = codes + at % HEIGHT * stride + 16 * t;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            u32 w[4];
            load_words<4>(p + 64 * j, w);
#pragma unroll
            for (int k = 0; k < 2; k++)
                pairs[2 * j + k] = PairsBF16::raised((w[k] >> shift & 7u) | (w[k + 2] >> shift & 7u) << 16);
        }
    }
};

template <int COLUMNS>
struct HqqShared {
    // Inputs that are prepared together: 32 KiB at most.
    static const int INPUTS = COLUMNS == 1 ? 4096 : 8192 / COLUMNS, CHUNKS = INPUTS / HQQ_GROUP;
};

template <class K, class T, int COLUMNS, int TILES>
struct HqqMultiply;

template <int BITS, int AXIS, class S, class T, int COLUMNS, int TILES>
struct HqqMultiply<Hqq<BITS, AXIS, S>, T, COLUMNS, TILES> {
    typedef HqqCodes<BITS> C;
    static const int INPUTS = HqqShared<COLUMNS>::INPUTS, CHUNKS = HqqShared<COLUMNS>::CHUNKS;
    static const int NUMBERS = COLUMNS * 2 * INPUTS / 2, TERMS = HQQ_WARPS * 16 * TILES * COLUMNS;
    static const int WORDS = NUMBERS > TERMS ? NUMBERS : TERMS, N = (2 * COLUMNS + 7) / 8;

    __device__ static void run(const HqqProduct& product) {
        // [column][high, low][input], in the order that lanes have codes in; later the terms of warps.
        __shared__ __align__(16) u32 shared[WORDS];
        __shared__ float totals[COLUMNS][CHUNKS], constants[HQQ_WARPS][COLUMNS];
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
        const int first = blockIdx.y * TILES, inputs = product.inputs, rows = product.rows;
        const int apart = AXIS == 0 ? rows / HQQ_GROUP : 1, groups = inputs / HQQ_GROUP;
        const i64 stride = (i64)inputs * C::BYTES * apart;
        const u8* codes = product.weight.part[0] +
                          (i64)blockIdx.x * inputs * C::BYTES * (AXIS == 0 ? 1 : C::HEIGHT);
        const u8 *scales = product.weight.part[1], *zeros = product.weight.part[2];
        float sums[TILES][N][2] = {}, constant[COLUMNS] = {};
        wait_for_kernels_before();

        for (int begin = 0; begin < inputs; begin += INPUTS) {
            const int count = inputs - begin < INPUTS ? inputs - begin : INPUTS, chunks = count / HQQ_GROUP;
            // Two inputs a thread, so that a warp has 64.
#pragma unroll (COLUMNS == 1 ? 4 : 1)
            for (int c = 2 * (int)threadIdx.x; c < count; c += 64 * HQQ_WARPS) {
                float scale[2] = {1, 1}, zero[2] = {0, 0};
                if (AXIS == 0) {
                    const i64 group = (i64)blockIdx.x * inputs + begin + c;
#pragma unroll
                    for (int i = 0; i < 2; i++)
                        scale[i] = S::load(scales + (group + i) * S::SIZE), zero[i] = S::load(zeros + (group + i) * S::SIZE);
                }
                u16* to = (u16*)shared + c / HQQ_GROUP * HQQ_GROUP + C::place(c % HQQ_GROUP);
#pragma unroll
                for (int column = 0; column < COLUMNS; column++) {
                    float total = 0;
                    u32 two = 0;
                    if (column < product.columns) two = *(const u32*)(product.x + ((i64)column * inputs + begin + c) * 2);
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        const u16 half = (u16)(two >> 16 * i);
                        const float x = T::load((const u8*)&half) * scale[i];
                        const u32 high = two_bfloats(x, 0.0f) & 0xFFFFu;
                        const u32 low = two_bfloats(x - bits_to_float(high << 16), 0.0f) & 0xFFFFu;
                        const float taken = bits_to_float(high << 16) + bits_to_float(low << 16);
                        total += AXIS == 0 ? (zero[i] + C::OFFSET) * taken : taken;
                        to[column * 2 * INPUTS + 2 * i] = (u16)high, to[(column * 2 + 1) * INPUTS + 2 * i] = (u16)low;
                    }
                    if (AXIS == 0) constant[column] += total;
                    else {
                        total = warp_total(total);
                        if (lane == 0) totals[column][c / HQQ_GROUP] = total;
                    }
                }
            }
            __syncthreads();
            // Neighbouring chunks, because their scales are neighbours.
#pragma unroll (COLUMNS > 1 ? 1 : TILES == 4 ? 2 : 4)
            for (int chunk = warp * chunks / HQQ_WARPS; chunk < (warp + 1) * chunks / HQQ_WARPS; chunk++) {
                const u8* from = codes + (i64)(begin + chunk * HQQ_GROUP) * C::BYTES;
                u32 a[TILES][2][8];
#pragma unroll
                for (int i = 0; i < TILES; i++) {
                    C::load(from, stride, first + i, 0, g, t, a[i][0]);
                    C::load(from, stride, first + i, 1, g, t, a[i][1]);
                }
#pragma unroll
                for (int n = 0; n < N; n++) {
                    const int column = 4 * n + g / 2;
                    u32 b[8] = {};
                    if (column < COLUMNS) {
                        const u32* held = shared + (column * 2 + g % 2) * (INPUTS / 2) + chunk * 32 + 8 * t;
                        load_words<4>((const u8*)held, b);
                        load_words<4>((const u8*)(held + 4), b + 4);
                    }
#pragma unroll
                    for (int i = 0; i < TILES; i++) {
                        float c[4] = {};
#pragma unroll
                        for (int j = 0; j < 8; j += 2)
                            mma_bfloats(c, a[i][0][j], a[i][1][j], a[i][0][j + 1], a[i][1][j + 1], b[j], b[j + 1]);
                        const int mine = 4 * n + t;  // column of x
#pragma unroll
                        for (int h = 0; h < 2; h++) {
                            const float sum = c[2 * h] + c[2 * h + 1];
                            if (AXIS == 0) sums[i][n][h] += sum;
                            else if (mine < COLUMNS) {
                                const i64 group = row_of(first + i, h, g, rows) * groups + begin / HQQ_GROUP + chunk;
                                const float scale = S::load(scales + group * S::SIZE);
                                const float zero = S::load(zeros + group * S::SIZE) + C::OFFSET;
                                sums[i][n][h] += scale * (sum - zero * totals[mine][chunk]);
                            }
                        }
                    }
                }
            }
            __syncthreads();
        }
        begin_next_kernel();  // as late as this, so that its blocks find all multiprocessors equally busy
        // The terms of the warps are added up in their order.
        float* terms = (float*)shared;
#pragma unroll
        for (int i = 0; i < TILES; i++)
#pragma unroll
            for (int n = 0; n < N; n++)
                if (4 * n + t < COLUMNS) {
#pragma unroll
                    for (int h = 0; h < 2; h++)
                        terms[((warp * TILES + i) * 16 + 8 * h + g) * COLUMNS + 4 * n + t] = sums[i][n][h];
                }
        if (AXIS == 0) {
            for (int i = 0; i < COLUMNS; i++) {
                const float total = warp_total(constant[i]);
                if (lane == 0) constants[warp][i] = total;
            }
        }
        __syncthreads();
        for (int at = threadIdx.x; at < 16 * TILES * COLUMNS; at += 32 * HQQ_WARPS) {
            const int place = at / COLUMNS, column = at % COLUMNS;
            if (column >= product.columns) continue;
            float sum = 0, less = 0;
            for (int w = 0; w < HQQ_WARPS; w++) {
                sum += terms[(w * TILES * 16 + place) * COLUMNS + column];
                if (AXIS == 0) less += constants[w][column];
            }
            const i64 row = row_of(first + place / 16, place / 8 % 2, place % 8, rows);
            hqq_put<T>(product.y + ((i64)column * rows + row) * 2, sum - less);
        }
    }
    // The output of a row of M.
    __device__ static i64 row_of(int tile, int half, int g, int rows) {
        if (AXIS == 0) return blockIdx.x + (i64)C::row(tile, half, g) * (rows / HQQ_GROUP);
        return (i64)blockIdx.x * C::HEIGHT + C::row(tile, half, g) % C::HEIGHT +
               (i64)(C::row(tile, half, g) / C::HEIGHT) * (rows / HQQ_GROUP * C::HEIGHT);
    }
    __device__ static float warp_total(float number) {
#pragma unroll
        for (int mask = 16; mask > 0; mask /= 2) number += shuffle_xor(number, mask);
        return number;
    }
};

// Many rows of x, by wide.cu.  Along axis 0 the 64 rows of M are the rows of the tile of four warps: an input has one
// scale and one zero in all of them.  Codes are scaled as code · s - z s, rounded to the dtype of x.
template <int BITS, class S>
struct Fused<Hqq<BITS, 0, S>> : Basics {
    typedef InOrder Order;
};

template <int BITS, class S>
struct WideRows<Hqq<BITS, 0, S>> {
    typedef HqqCodes<BITS> C;
    static const int CHUNK = 32;
    // Packed rows that a warp reads of a stage, and from which on; grains of a row.
    static const int PACKED = BITS == 8 ? 16 : BITS == 3 ? 7 : 8, GRAINS = STAGE * C::BYTES / 16;
    static const int PITCH = 16 * GRAINS + (BITS == 3 ? 16 : 32), NUMBERS = STAGE * S::SIZE;
    static const int BYTES = PACKED * PITCH + 2 * NUMBERS;
    static const int RAISED = BITS == 8 ? 32768 : 128;
    const u8 *codes, *scales, *zeros, *taken;
    i64 stride;
    int tile;

    // The blocks of 64 rows that go with column o of the outputs; a warp beyond the last has that one's.
    __device__ void begin(const Product& product, int row, int stage, int lane) {
        const int apart = product.rows / HQQ_GROUP, o = row / HQQ_GROUP < apart ? row / HQQ_GROUP : apart - 1;
        const i64 from = (i64)o * product.inputs + stage * STAGE;
        tile = row % HQQ_GROUP / 16, stride = (i64)apart * product.inputs * C::BYTES;
        int first = 0;
        if constexpr (BITS != 3) first = C::packed(tile, 0, 0);
        codes = product.weight.part[0] + first * stride + from * C::BYTES + lane / GRAINS * stride + lane % GRAINS * 16;
        scales = product.weight.part[1] + from * S::SIZE + lane * 16, zeros = product.weight.part[2] + from * S::SIZE + lane * 16;
    }
    __device__ void fetch(u8* held, int lane) {
        if (GRAINS < 32) {
#pragma unroll
            for (int i = 0; i < PACKED * GRAINS / 32; i++) {
                const int row = i * 32 / GRAINS;
                copy_async<16>(held + (row + lane / GRAINS) * PITCH + lane % GRAINS * 16, codes + row * stride);
            }
        } else {
#pragma unroll
            for (int i = 0; i < PACKED * GRAINS / 32; i++) {
                const int row = i * 32 / GRAINS, grain = i * 32 % GRAINS;
                copy_async<16>(held + row * PITCH + (grain + lane) * 16, codes + row * stride + grain * 16);
            }
        }
        u8* beside = held + PACKED * PITCH + lane * 16;
#pragma unroll
        for (int i = 0; i < NUMBERS / 512; i++) {
            copy_async<16>(beside + i * 512, scales + i * 512);
            copy_async<16>(beside + NUMBERS + i * 512, zeros + i * 512);
        }
        codes += 16 * GRAINS, scales += NUMBERS, zeros += NUMBERS;
    }
    __device__ void take(const Product&, const u8* held, int, int, int lane) {
        const int g = lane / 4;
        taken = held;
        low.begin(held, tile, 0, g), high.begin(held, tile, 1, g);
    }
    // A lane's codes of a row: where they are, and how far they are shifted.
    struct Codes {
        const u8* at;
        int shift;
        __device__ void begin(const u8* held, int tile, int half, int g) {
            if constexpr (BITS == 3) {
                const int row = C::row(tile, half, g);
                at = held + row % C::HEIGHT * PITCH, shift = 3 * (9 - row / C::HEIGHT);
            } else {
                at = held + (C::packed(tile, half, g) - C::packed(tile, 0, 0)) * PITCH;
                shift = BITS * (C::PLANES - 1 - C::plane(tile, half, g));
            }
        }
        // Eight, plus RAISED.
        __device__ void load(int chunk, int t, float* raised) const {
            if constexpr (BITS == 3) {
                u32 words[8];
                load_words<4>(at + 128 * chunk + 32 * t, words), load_words<4>(at + 128 * chunk + 32 * t + 16, words + 4);
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    const u32 turned = __funnelshift_r(words[i], words[i], shift + 16);
                    raised[i] = bits_to_float(and_or(turned, 0x00070000u, 0x43000000u));
                }
            } else {
                u32 words[2];
                load_words<2>(at + 32 * chunk + 8 * t, words);
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    const u32 four = BITS == 8 ? words[i / 4] : words[i / 4] >> shift & 0x01010101u * ((1u << BITS) - 1);
                    raised[i] = bits_to_float(BITS == 8 ? __byte_perm(four, 0x47000000u, 0x7404u | i % 4 << 4)
                                                        : __byte_perm(four, 0x43000000u, 0x7044u | i % 4 << 8));
                }
            }
        }
    } low, high;
    template <class P, int CHUNKS>
    __device__ void decode(int first, int t, u32* low_pairs, u32* high_pairs) const {
#pragma unroll
        for (int i = 0; i < CHUNKS; i++) {
            float s[8], b[8], values[8];
            const u8* beside = taken + PACKED * PITCH + (32 * (first + i) + 8 * t) * S::SIZE;
            load_eight<S>(beside, s), load_eight<S>(beside + NUMBERS, b);
#pragma unroll
            for (int j = 0; j < 8; j++) b[j] = -s[j] * (b[j] + RAISED);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                (half ? high : low).load(first + i, t, values);
#pragma unroll
                for (int j = 0; j < 8; j++) values[j] = __fmaf_rn(s[j], values[j], b[j]);
#pragma unroll
                for (int j = 0; j < 4; j++) (half ? high_pairs : low_pairs)[4 * i + j] = P::pair(values[2 * j], values[2 * j + 1]);
            }
        }
    }
    // Neighbouring threads write neighbouring outputs: those of the same row of M.
    struct Outputs {
        int begin, apart;
        __device__ Outputs(int block_row, int rows) : begin(block_row / HQQ_GROUP), apart(rows / HQQ_GROUP) {}
        template <int ROWS>
        __device__ static int row(int i) {
            return i % (ROWS / HQQ_GROUP) * HQQ_GROUP + i / (ROWS / HQQ_GROUP);
        }
        __device__ bool there(int row) const { return begin + row / HQQ_GROUP < apart; }
        __device__ int output(int row) const {
            return C::row(row % HQQ_GROUP / 16, row / 8 % 2, row % 8) * apart + begin + row / HQQ_GROUP;
        }
    };
    __device__ static float finish(const Weight&) { return 1.0f; }
};
