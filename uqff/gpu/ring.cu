// y = x Wᵀ from the stored codes, for one row of x or up to eight, by blocks that stay (compute capability 9.0 and newer).
//
// The blocks that the GPU holds together share the tiles of 16 outputs.  One warp of a block copies weights into a ring of
// slots in shared memory, some 16 rows × WARPS × STAGE inputs at a time.  It does not wait for x, so that under
// programmatic launches weights are on their way while the kernel before ends.  Each of the other warps multiplies STAGE
// inputs of every tile, always the same ones, whose x it keeps in registers; sums of the warps are added up in their
// order, so that the same weights give the same bits.
//
// Codes are multiplied as float16, whole numbers that may be RAISED by setting bits of a mantissa, and so is x, times a
// power of two that brings its largest number near the end of the range; sums are float32.  With one row of x, the eight
// columns of the matrix instruction are the groups of the inputs: column i has the x of group i, and zeros elsewhere, so
// that each lane has sums of its own to scale.

const int MOST_SLOTS = 16;

__device__ constexpr int grain_of(int bytes) { return bytes % 16 == 0 ? 1 : bytes % 8 == 0 ? 2 : bytes % 4 == 0 ? 4 : 8; }
__device__ constexpr int larger(int a, int b) { return a > b ? a : b; }

// A whole number below 2048, twice.
__device__ constexpr u32 halves_of(int n) {
    const int e = n >= 1024 ? 10 : n >= 512 ? 9 : n >= 256 ? 8 : n >= 128 ? 7 : n >= 64 ? 6 : n >= 32 ? 5 : n >= 16 ? 4 :
                  n >= 8 ? 3 : n >= 4 ? 2 : n >= 2 ? 1 : 0;
    return n ? (u32)((15 + e) << 10 | (n << (10 - e) & 1023)) * 0x00010001u : 0;
}

template <class K, int COLUMNS, int WARPS_, int BLOCKS>
struct RingMemory {
    // Whose sums are kept together: a barrier of all warps for each costs more than slots in the ring, where rows are short.
    static const int TILES = COLUMNS == 1 || Fused<K>::BYTES[0] <= 160 ? 8 : 2;
    static const int ROWS = COLUMNS == 1 ? 16 : 20;  // numbers from column to column, of 16 rows
    static const int BARRIERS = 2 * MOST_SLOTS * 8, TERMS = TILES * WARPS_ * ROWS * COLUMNS * 4;
    static const int CONSTANTS = COLUMNS == 1 ? 0 : WARPS_ * (STAGE / Coded<K>::GROUP / Coded<K>::TOGETHER) * 4 * 24;
    static const int BYTES = 233472 / BLOCKS - 1024, SLOTS = BARRIERS + TERMS + CONSTANTS, ROOM = BYTES - SLOTS;
};

// A warp's part of x.
template <class C, class T, int COLUMNS>
struct RingX {
    static const int GROUPS = STAGE / C::GROUP, HALF = GROUPS / 8;
    static const int TOGETHER = COLUMNS == 1 ? 1 : C::TOGETHER, KEPT = GROUPS / TOGETHER;
    u32 pairs[16][2];  // of each step of the matrix instruction
    u32 ahead[4];      // of one row: what take() takes
    float back[COLUMNS == 1 ? 1 : 2];
    float raised[HALF][2], sum[HALF][2];  // of one row: of the groups that the lane scales

    // The larger of pairs without their signs, and of all pairs of some lanes the largest number, 16 bits up.
    __device__ static u32 larger_of(u32 largest, u32 two) { return larger_pair(largest, two & 0x7FFF7FFFu); }
    __device__ static u32 largest_of(u32 two, int lanes) {
        u32 largest = two > two << 16 ? two & 0xFFFF0000u : two << 16;
#pragma unroll
        for (int mask = lanes / 2; mask > 0; mask /= 2) {
            const u32 other = shuffle_xor(largest, mask);
            largest = largest > other ? largest : other;
        }
        return largest;
    }
    // A power of two for numbers of up to that size, and its inverse.
    __device__ static float power(u32 largest, float& inverse) {
        const u16 bits = (u16)(largest >> 16);
        int exponent = 268 - (int)(__float_as_uint(T::load((const u8*)&bits)) >> 23);
        if (exponent > 253) exponent = 253;
        inverse = bits_to_float((u32)(254 - exponent + C::EXPONENT) << 23);
        return bits_to_float((u32)exponent << 23);
    }
    __device__ static float number(const u32* words, int i) {
        const u32 two = words[i / 2];
        const u16 half = (u16)(i % 2 ? two >> 16 : two);
        return T::load((const u8*)&half);
    }
    // The four words of a lane's eight numbers of 32.
    __device__ static void load(const u8* x, int t, u32* words) {
        if (C::HALVES) load_words<2>(x + 8 * t, words), load_words<2>(x + 32 + 8 * t, words + 2);
        else load_words<4>(x + 16 * t, words);
    }
    // Registers of a block of 32, the first four or two of them, of numbers times a power of two.
    template <int LAST>
    __device__ static void arrange(const float* numbers, float to, int block, u32* made) {
#pragma unroll
        for (int i = 0; i < LAST; i++) {
            const float by = to * bits_to_float((u32)(127 - C::shrunk(block, i)) << 23);
            made[i] = two_halves(numbers[C::place(2 * i)] * by, numbers[C::place(2 * i + 1)] * by);
        }
    }
    // What codes have too much in a group of each column, and the sum of x: of the columns 2t and 2t + 1.
    __device__ void constants(int group, float* up, float* all) const {
        const int STEPS = C::GROUP / 16, block = group * C::GROUP / 32;
        float c[4] = {};  // the rows g of the instruction are for one of them, the rows g + 8 for the other
#pragma unroll
        for (int i = 0; i < STEPS; i++) {
            const int step = group * STEPS + i, first = step % 2 * 2;
            u32 much[2], once[2];
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const int times = 1 << C::shrunk(block, first + j);
                much[j] = halves_of(C::RAISED + C::ZERO * times), once[j] = C::AFFINE ? halves_of(times) : 0;
            }
            if (C::RAISED + C::ZERO || C::AFFINE)
                mma_halves(c, much[0], once[0], much[1], once[1], pairs[step][0], pairs[step][1]);
        }
        up[0] += c[0], up[1] += c[1], all[0] += c[2], all[1] += c[3];
    }
    __device__ static float of_lanes(float number) {
        number += shuffle_xor(number, 1);
        return number + shuffle_xor(number, 2);
    }

    // A lane's numbers of the one row: of its column's group of 32, or of the two of 16.
    __device__ void fetch(const u8* x, int g, int t) {
        if (C::GROUP == 32) load(x + 64 * g, t, ahead);
        else load_words<2>(x + 32 * g + 8 * t, ahead), load_words<2>(x + 256 + 32 * g + 8 * t, ahead + 2);
    }
    __device__ void take(int g, int t) {
        u32 largest = 0;
#pragma unroll
        for (int i = 0; i < 4; i++) largest = larger_of(largest, ahead[i]);
        const float to = power(largest_of(largest, 32), back[0]);
        float numbers[8];
#pragma unroll
        for (int i = 0; i < 8; i++) numbers[i] = number(ahead, i) * to;
#pragma unroll
        for (int h = 0; h < HALF; h++) {
            u32 made[4];
            // The halves of 32 inputs are alike where groups are of 16.
            const int LAST = C::GROUP / 8, block = C::GROUP == 32 ? g : 4 * h + g / 2;
            const float* from = numbers + 4 * h;
            arrange<LAST>(from, 1.0f, block, made);
            float up = 0, all = 0;
#pragma unroll
            for (int i = 0; i < LAST; i++) {
                const float two = from[C::place(2 * i)] + from[C::place(2 * i + 1)];
                up += (C::RAISED * bits_to_float((u32)(127 - C::shrunk(block, i)) << 23) + C::ZERO) * two, all += two;
            }
            up = of_lanes(up), all = of_lanes(all);
#pragma unroll
            for (int i = 0; i < 2; i++) raised[h][i] = shuffle(up, 8 * t + 4 * i), sum[h][i] = shuffle(all, 8 * t + 4 * i);
#pragma unroll
            for (int step = 0; step < 16; step++) {
                if (C::GROUP == 16 && step / 8 != h) continue;
                const bool own = (C::GROUP == 32 ? step / 2 : step % 8) == g;
                const int first = C::GROUP == 32 ? step % 2 * 2 : 0;
                pairs[step][0] = own ? made[first] : 0, pairs[step][1] = own ? made[first + 1] : 0;
            }
        }
    }

    // Of row g, if it is there; what lanes need of other rows goes to shared memory.
    __device__ void take_rows(const u8* x, bool there, int g, int t, float* held) {
        u32 largest = 0;
#pragma unroll
        for (int block = 0; block < 8; block++) {
            u32 words[4] = {};
            if (there) load(x + 64 * block, t, words);
#pragma unroll
            for (int i = 0; i < 4; i++)
                largest = larger_of(largest, words[i]), pairs[2 * block + i / 2][i % 2] = words[i];
        }
        float inverse;
        const float to = power(largest_of(largest, 4), inverse);
        back[0] = shuffle(inverse, 8 * t), back[COLUMNS == 1 ? 0 : 1] = shuffle(inverse, 8 * t + 4);
        float up[2], all[2];
#pragma unroll
        for (int block = 0; block < 8; block++) {
            float numbers[8];
            u32 made[4];
#pragma unroll
            for (int i = 0; i < 8; i++) numbers[i] = number(pairs[2 * block + i / 4], i % 4);
            arrange<4>(numbers, to, block, made);
#pragma unroll
            for (int i = 0; i < 4; i++) pairs[2 * block + i / 2][i % 2] = made[i];
#pragma unroll
            for (int h = 0; h < HALF; h++) {
                const int group = block * HALF + h, kept = group / TOGETHER;
                if (group % TOGETHER == 0) up[0] = up[1] = all[0] = all[1] = 0;
                constants(group, up, all);
                if (g || group % TOGETHER < TOGETHER - 1) continue;
                const u32 a = __float_as_uint(-up[0]), b = __float_as_uint(-up[1]), less[4] = {a, b, a, b};
                write_four((u8*)(held + (kept * 4 + t) * 4), less);
                held[KEPT * 16 + (kept * 4 + t) * 2] = all[0], held[KEPT * 16 + (kept * 4 + t) * 2 + 1] = all[1];
            }
        }
        __syncwarp();
    }
};

template <class K, class T, class P, int COLUMNS, int WARPS_, int BLOCKS>
struct Ring {
    typedef Fused<K> F;
    typedef Coded<K> C;
    typedef RingMemory<K, COLUMNS, WARPS_, BLOCKS> Memory;
    typedef RingX<C, T, COLUMNS> X;
    static const int PARTS = F::PARTS, TILES = Memory::TILES, GROUPS = X::GROUPS;
    __device__ static constexpr int bytes(int part) { return F::BYTES[part < PARTS ? part : 0]; }
    static const int GRAIN =
        larger(grain_of(bytes(0)), larger(PARTS > 1 ? grain_of(bytes(1)) : 1, PARTS > 2 ? grain_of(bytes(2)) : 1));

    // How a slot is laid out: rows of each part, so far apart that lanes do not wait for each other.
    struct Layout {
        int per, passes, slots, size, pitch[3], offset[3];
        __device__ Layout(int stages) {
            const int least = (stages + WARPS_ - 1) / WARPS_;
            per = ((stages + least - 1) / least + GRAIN - 1) / GRAIN * GRAIN, passes = (stages + per - 1) / per;
            size = 0;
#pragma unroll
            for (int i = 0; i < PARTS; i++) {
                const int beside = i == 0 ? C::BESIDE : 16, wide = per * bytes(i);
                pitch[i] = wide + ((beside - wide) & 127), offset[i] = size, size += 16 * pitch[i];
            }
            size = (size + 127) / 128 * 128;
            slots = Memory::ROOM / size;
            if (slots > MOST_SLOTS) slots = MOST_SLOTS;
        }
    };

    // The sums of two rows, g and g + 8, over a stage: of x's one row, or of its rows 2t and 2t + 1.
    __device__ static void multiply(const u8* const* low, const u8* const* high, const X& x, const float* constants, int t,
                                    float* sums) {
        const int REGISTERS = C::CHUNK / 8, STEPS = C::CHUNK / 16, PER_GROUP = C::GROUP / 16;
        float c[2][4] = {}, d[4], known[2];
        sums[0] = sums[1] = sums[2] = sums[3] = 0;
#pragma unroll
        for (int chunk = 0; chunk < STAGE / C::CHUNK; chunk++) {
            u32 a[REGISTERS], b[REGISTERS];
            C::codes(low, chunk, t, a);
            C::codes(high, chunk, t, b);
            if (COLUMNS == 1 || C::PLAIN) {
#pragma unroll
                for (int i = 0; i < STEPS; i++) {
                    const int step = chunk * STEPS + i;
                    mma_halves(c[C::GROUP == 32 ? step % 2 : step / 8], a[2 * i], b[2 * i], a[2 * i + 1], b[2 * i + 1],
                               x.pairs[step][0], x.pairs[step][1]);
                }
                continue;
            }
#pragma unroll
            for (int i = 0; i < STEPS; i += 2 * PER_GROUP) {
                // Two groups, if the chunk has two; their scales are neighbours.
                const int first = (chunk * STEPS + i) / PER_GROUP;
                float s[2], m[2], s8[2], m8[2];
                C::scales(low, first / 2, s, m);
                C::scales(high, first / 2, s8, m8);
#pragma unroll
                for (int j = 0; j < 2 && i + j * PER_GROUP < STEPS; j++) {
                    const int which = C::CHUNK == C::GROUP ? first % 2 : j;
                    const int place = (first + j) % X::TOGETHER, kept = (first + j) / X::TOGETHER * 4 + t;
                    if (place == 0) {  // what is raised is off from the beginning
                        load_words<4>((const u8*)(constants + kept * 4), (u32*)d);
                        if (C::AFFINE) load_words<2>((const u8*)(constants + X::KEPT * 16 + kept * 2), (u32*)known);
                    }
#pragma unroll
                    for (int k = i + j * PER_GROUP; k < i + (j + 1) * PER_GROUP; k++)
                        mma_halves(d, a[2 * k], b[2 * k], a[2 * k + 1], b[2 * k + 1], x.pairs[chunk * STEPS + k][0],
                                   x.pairs[chunk * STEPS + k][1]);
                    if (place < X::TOGETHER - 1) continue;
#pragma unroll
                    for (int k = 0; k < 4; k++) {
                        sums[k] = __fmaf_rn(k < 2 ? s[which] : s8[which], d[k], sums[k]);
                        if (C::AFFINE) sums[k] = __fmaf_rn(k < 2 ? m[which] : m8[which], known[k % 2], sums[k]);
                    }
                }
            }
        }
        if (C::PLAIN) {
#pragma unroll
            for (int i = 0; i < 4; i++) sums[i] = c[0][i] + c[1][i];
            if (COLUMNS == 1) sums[0] += sums[1], sums[1] = sums[2] + sums[3];
        } else if (COLUMNS == 1) {
#pragma unroll
            for (int h = 0; h < X::HALF; h++) {
                float s[2], m[2], s8[2], m8[2];
                C::scales(low, 4 * h + t, s, m);
                C::scales(high, 4 * h + t, s8, m8);
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const float first = C::GROUP == 32 ? c[0][i] + c[1][i] : c[h][i];
                    const float second = C::GROUP == 32 ? c[0][2 + i] + c[1][2 + i] : c[h][2 + i];
                    sums[0] = __fmaf_rn(s[i], first - x.raised[h][i], sums[0]);
                    sums[1] = __fmaf_rn(s8[i], second - x.raised[h][i], sums[1]);
                    if (C::AFFINE) {
                        sums[0] = __fmaf_rn(m[i], x.sum[h][i], sums[0]);
                        sums[1] = __fmaf_rn(m8[i], x.sum[h][i], sums[1]);
                    }
                }
            }
        }
        if (COLUMNS == 1) {
            sums[0] = X::of_lanes(sums[0]) * x.back[0], sums[1] = X::of_lanes(sums[1]) * x.back[0];
        } else {
#pragma unroll
            for (int i = 0; i < 4; i++) sums[i] *= x.back[COLUMNS == 1 ? 0 : i % 2];
        }
    }

    __device__ static void run(const Product& product) {
        extern __shared__ __align__(128) u8 shared[];
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
        const int rows = product.rows, stages = product.inputs / STAGE, tiles = (rows + 15) / 16;
        const int mine = (tiles - (int)blockIdx.x + (int)gridDim.x - 1) / (int)gridDim.x;
        const Layout layout(stages);
        u64* full = (u64*)shared;
        u64* empty = full + MOST_SLOTS;
        float* terms = (float*)(shared + Memory::BARRIERS);
        float* constants = (float*)(shared + Memory::BARRIERS + Memory::TERMS) + warp * X::KEPT * 4 * 6;
        u8* ring = shared + Memory::SLOTS;

        if (threadIdx.x == WARPS_ * 32) {
            const int arrivals = PARTS > 1 ? 33 : 1;  // of a thread that expects bytes, and of asynchronous copies
            for (int i = 0; i < layout.slots; i++) begin_barrier(full + i, arrivals), begin_barrier(empty + i, WARPS_);
            publish_barriers();
        }
        __syncthreads();
        begin_next_kernel();
        int slot = 0, phase = 0;
        if (warp == WARPS_) {
            bool again = false;  // whether slots have been used
            for (int first = 0; first < mine; first += TILES)
                for (int pass = 0; pass < layout.passes; pass++) {
                    const int begin = pass * layout.per, count = stages - begin < layout.per ? stages - begin : layout.per;
                    for (int i = first; i < mine && i < first + TILES; i++) {
                        if (again) wait_barrier(empty + slot, phase ^ 1);
                        const int row = ((int)blockIdx.x + i * (int)gridDim.x) * 16, last = rows - 1;
                        u8* to = ring + slot * layout.size;
                        if (lane == 0) expect_bytes(full + slot, 16 * count * bytes(0));
                        __syncwarp();
                        if (lane < 16)
                            copy_bytes(to + lane * layout.pitch[0],
                                       product.weight.part[0] + (row + lane < last ? row + lane : last) * product.row_bytes[0] +
                                           begin * bytes(0),
                                       count * bytes(0), full + slot);
                        // The other parts are short: of so many copies of that kind each would wait for the one before.
                        if constexpr (PARTS > 1) {
#pragma unroll
                            for (int part = 1; part < PARTS; part++) {
                                const int grains = count * bytes(part) / 16, r = lane / 2;
                                const u8* from = product.weight.part[part] +
                                                 (row + r < last ? row + r : last) * product.row_bytes[part] + begin * bytes(part);
                                for (int j = lane % 2; j < grains; j += 2)
                                    copy_async<16>(to + layout.offset[part] + r * layout.pitch[part] + 16 * j, from + 16 * j);
                            }
                            arrive_after_copies(full + slot);
                        }
                        if (++slot == layout.slots) slot = 0, phase ^= 1, again = true;
                    }
                }
            return;
        }

        wait_for_kernels_before();
        const float scale = F::finish(product.weight);
        X x;
        if (COLUMNS == 1 && warp < layout.per && warp < stages) x.fetch(product.x + warp * STAGE * 2, g, t);
        for (int first = 0; first < mine; first += TILES) {
            const int together = mine - first < TILES ? mine - first : TILES;
            for (int pass = 0; pass < layout.passes; pass++) {
                const int stage = pass * layout.per + warp;
                const bool busy = warp < layout.per && stage < stages;
                if (busy && (first == 0 || layout.passes > 1)) {
                    if (COLUMNS == 1) {
                        x.take(g, t);
                        // Of the next pass, while this one multiplies.
                        const int next = stage + layout.per < stages ? stage + layout.per : warp;
                        if (layout.passes > 1) x.fetch(product.x + next * STAGE * 2, g, t);
                    } else {
                        __syncwarp();
                        x.take_rows(product.x + ((i64)g * product.inputs + stage * STAGE) * 2, g < product.columns, g, t,
                                    constants);
                    }
                }
                for (int i = 0; i < together; i++) {
                    wait_barrier(full + slot, phase);
                    float sums[4] = {};
                    if (busy) {
                        const u8 *low[PARTS], *high[PARTS];
#pragma unroll
                        for (int part = 0; part < PARTS; part++) {
                            low[part] = ring + slot * layout.size + layout.offset[part] + g * layout.pitch[part] +
                                        warp * bytes(part);
                            high[part] = low[part] + 8 * layout.pitch[part];
                        }
                        multiply(low, high, x, constants, t, sums);
                    }
                    __syncwarp();
                    if (lane == 0) arrive(empty + slot);
                    if (++slot == layout.slots) slot = 0, phase ^= 1;
                    float* at = terms + (i * WARPS_ + warp) * Memory::ROWS * COLUMNS + g;
                    if (COLUMNS == 1) {
                        if (t == 0) {
                            at[0] = pass ? at[0] + sums[0] : sums[0];
                            at[8] = pass ? at[8] + sums[1] : sums[1];
                        }
                    } else {
#pragma unroll
                        for (int j = 0; j < 4; j++) {
                            float& to = at[(2 * t + j % 2) % COLUMNS * Memory::ROWS + j / 2 * 8];
                            to = pass ? to + sums[j] : sums[j];
                        }
                    }
                }
            }
            wait_for_threads(1, WARPS_ * 32);
            for (int at = threadIdx.x; at < together * 16 * COLUMNS; at += WARPS_ * 32) {
                const int i = at / (16 * COLUMNS), r = at % 16, column = at / 16 % COLUMNS;
                const int row = ((int)blockIdx.x + (first + i) * (int)gridDim.x) * 16 + r;
                if (row < rows && column < product.columns) {
                    float sum = 0;
#pragma unroll
                    for (int w = 0; w < WARPS_; w++) sum += terms[((i * WARPS_ + w) * COLUMNS + column) * Memory::ROWS + r];
                    ((u16*)product.y)[(i64)column * rows + row] = (u16)P::pair(sum * scale, 0.0f);
                }
            }
            wait_for_threads(1, WARPS_ * 32);
        }
    }
};
