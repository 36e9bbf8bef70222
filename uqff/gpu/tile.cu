// y = x Wᵀ from the stored codes, by tiles: many rows of x, or few with fewer instructions than product.cu.
//
// A block makes 16 outputs a warp for COLUMNS rows of x.  STAGE inputs of all of these are copied into shared memory
// together, asynchronously and some stages ahead: each warp copies and reads its own 16 rows of the weight, all share x.
// SPLITS blocks of a cluster share the inputs; their sums are added up in the order of the blocks, through the
// cluster's shared memory, so that the same weights give the same bits.
//
// Fused<K>, which product.cu describes, decodes.  Up to EXACTLY rows of x the codes are multiplied as whole numbers and
// sums of groups scaled, as there.  For more rows that would be more work than scaling the weights, which are rounded
// to the dtype of x then, as if dequantised.

const int EXACTLY = 16;

// How a part is copied by a warp: LANES of a row side by side, at addresses that only change from stage to stage.
template <class F, int PART>
struct Stream {
    typedef Segment<F, PART> S;
    static const int LANES = S::GRAINS <= 2 ? 2 : S::GRAINS <= 4 ? 4 : 8, SETS = LANES / 2;
    static const int STEPS = (S::GRAINS + LANES - 1) / LANES;
    const u8* from[SETS];
    __device__ void begin(const u8* part, i64 row_bytes, int row, int rows, int stage, int lane) {
#pragma unroll
        for (int i = 0; i < SETS; i++) {
            int r = row + lane / LANES + i * (32 / LANES);
            from[i] = part + (r < rows ? r : rows - 1) * row_bytes + (i64)stage * S::BYTES;
        }
    }
    // The next stage into the memory of the warp.
    __device__ void fetch(u8* shared, int lane) {
#pragma unroll
        for (int i = 0; i < SETS; i++) {
            const int before = F::WINDOW ? (u32)(u64)from[i] & 15 : 0, first = lane % LANES;
            const u8* source = from[i] - before + first * S::GRAIN;
            u8* to = shared + (lane / LANES + i * (32 / LANES)) * F::PITCH + S::OFFSET + first * S::GRAIN;
#pragma unroll
            for (int step = 0; step < STEPS; step++) {
                const int at = step * LANES * S::GRAIN;
                // A grain with nothing of the row may be nobody's memory.
                if (first * S::GRAIN + at < (F::WINDOW ? before + S::BYTES : S::GRAINS * S::GRAIN))
                    copy_async<S::GRAIN>(to + at, source + at);
            }
            from[i] += S::BYTES;
        }
    }
};
template <class F>
struct Streams {
    Stream<F, 0> first;
    Stream<F, (F::PARTS > 1 ? 1 : 0)> second;
    Stream<F, (F::PARTS > 2 ? 2 : 0)> third;
    __device__ void begin(const Product& product, i64 expert, int row, int stage, int lane) {
        const u8* part[F::PARTS];
        for (int i = 0; i < F::PARTS; i++) part[i] = product.weight.part[i] + expert * product.rows * product.row_bytes[i];
        first.begin(part[0], product.row_bytes[0], row, product.rows, stage, lane);
        if constexpr (F::PARTS > 1) second.begin(part[1], product.row_bytes[1], row, product.rows, stage, lane);
        if constexpr (F::PARTS > 2) third.begin(part[2], product.row_bytes[2], row, product.rows, stage, lane);
    }
    __device__ void fetch(u8* shared, int lane) {
        first.fetch(shared, lane);
        if constexpr (F::PARTS > 1) second.fetch(shared, lane);
        if constexpr (F::PARTS > 2) third.fetch(shared, lane);
    }
};

template <class K, int COLUMNS, int WARPS_, int BLOCKS>
struct TileMemory {
    static const int ROWS = 16 * WARPS_, X_PITCH = STAGE * 2 + Fused<K>::Order::X_PAD, X = ROWS * Fused<K>::PITCH;
    static const int STAGE_BYTES = X + COLUMNS * X_PITCH, ROOM = 233472 / BLOCKS - 1024, FIT = ROOM / STAGE_BYTES;
    static const int AHEAD = FIT < 2 ? 2 : FIT > 4 ? 4 : FIT;
    static const int TERMS = COLUMNS * (ROWS + 4) * 4;
    static const int BYTES = AHEAD * STAGE_BYTES > TERMS ? AHEAD * STAGE_BYTES : TERMS;
};

// Which outputs the rows of a block's tile are.
//   row      of the tile that thread number i of those that write a row of y takes
//   output   which that is, if there is one
struct OutputsInOrder {
    int begin, rows;
    __device__ OutputsInOrder(int block_row, int rows) : begin(block_row), rows(rows) {}
    template <int ROWS>
    __device__ static int row(int i) {
        return i;
    }
    __device__ bool there(int row) const { return begin + row < rows; }
    __device__ int output(int row) const { return begin + row; }
};

// Writes what a block's warps have summed up: 16 outputs each, `columns` of COLUMNS rows of x, in the memory of the stages.
// The blocks of a cluster, of which this is number `rank`, have shared the inputs, or BESIDE of them have tiles beside each
// other: each writes a part of these together, so that outputs which follow each other are written at once.
template <class P, int COLUMNS, int WARPS_, int SPLITS, int BESIDE = 1, class Outputs>
__device__ inline void end_tile(const float* sums, float* terms, u8* y, int rank, const Outputs& outputs, int rows,
                                int columns, float scale) {
    const int ROWS = 16 * WARPS_, PITCH = ROWS + 4, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    __syncthreads();
#pragma unroll
    for (int tile = 0; tile < COLUMNS / 8; tile++) {
        float* at = terms + (tile * 8 + 2 * (lane % 4)) * PITCH + warp * 16 + lane / 4;
        at[0] = sums[4 * tile], at[PITCH] = sums[4 * tile + 1];
        at[8] = sums[4 * tile + 2], at[PITCH + 8] = sums[4 * tile + 3];
    }
    if (SPLITS * BESIDE > 1) cluster_barrier();
    else __syncthreads();
    if constexpr (BESIDE > 1) {
        const int TOGETHER = 8;
        for (int at = rank * 32 * WARPS_ + threadIdx.x; at < COLUMNS / TOGETHER * ROWS * BESIDE; at += BESIDE * 32 * WARPS_) {
            const int r = Outputs::template row<ROWS * BESIDE>(at % (ROWS * BESIDE)), first = at / (ROWS * BESIDE) * TOGETHER;
            if (!outputs.there(r)) continue;
            float sum[TOGETHER];
#pragma unroll
            for (int i = 0; i < TOGETHER; i++) sum[i] = load_of_cluster(terms + (first + i) * PITCH + r % ROWS, r / ROWS);
#pragma unroll
            for (int i = 0; i < TOGETHER; i++)
                if (first + i < columns) ((u16*)y)[(i64)(first + i) * rows + outputs.output(r)] = (u16)P::pair(sum[i] * scale, 0.0f);
        }
        cluster_barrier();
        return;
    }
    for (int at = rank * 32 * WARPS_ + threadIdx.x; at < COLUMNS * ROWS; at += SPLITS * 32 * WARPS_) {
        const int r = Outputs::template row<ROWS>(at % ROWS), column = at / ROWS;
        if (outputs.there(r) && column < columns) {
            const float* term = terms + column * PITCH + r;
            float sum = 0;
            if (SPLITS == 1) sum = *term;
            else
#pragma unroll
                for (int i = 0; i < SPLITS; i++) sum += load_of_cluster(term, i);
            ((u16*)y)[(i64)column * rows + outputs.output(r)] = (u16)P::pair(sum * scale, 0.0f);
        }
    }
    if (SPLITS > 1) cluster_barrier();  // nobody's memory goes while others read it
}

template <class K, class P, int COLUMNS, int WARPS_, int SPLITS, int BLOCKS>
__device__ inline void multiply_tile(const Product& product) {
    typedef Fused<K> F;
    typedef TileMemory<K, COLUMNS, WARPS_, BLOCKS> Memory;
    extern __shared__ __align__(16) u8 shared[];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int rank = blockIdx.x % SPLITS, block_row = blockIdx.x / SPLITS * Memory::ROWS, row = block_row + 16 * warp;
    const int rows = product.rows, slot = product.experts ? blockIdx.y : 0;
    const int first_column = product.experts ? 0 : blockIdx.y * COLUMNS;
    const int columns = product.columns - first_column < COLUMNS ? product.columns - first_column : COLUMNS;
    if (product.experts) wait_for_kernels_before();
    i64 expert = product.experts ? product.experts[slot] : 0;
    // What is no expert's number selects nothing: zeros, and nothing outside the weight is read.
    const bool known = expert >= 0 && expert < product.count;
    if (!known) expert = 0;
    const u8* x = product.x + ((i64)(slot / product.share) + first_column) * product.inputs * 2;
    u8* y = product.y + ((i64)slot + first_column) * rows * 2;
    const int all = known ? product.inputs / STAGE : 0, begin = all * rank / SPLITS, mine = all * (rank + 1) / SPLITS - begin;
    const int TILES = COLUMNS / 8, AHEAD = Memory::AHEAD;

    Streams<F> streams;
    streams.begin(product, expert, row, begin, lane);
    auto fetch = [&](int i, bool weights, bool numbers) {
        if (i < mine) {
            u8* to = shared + i % AHEAD * Memory::STAGE_BYTES;
            if (weights) streams.fetch(to + warp * 16 * F::PITCH, lane);
            if (!numbers) return;
#pragma unroll
            for (int j = 0; j < (COLUMNS + WARPS_ - 1) / WARPS_; j++) {
                const int column = warp + j * WARPS_, there = column < columns ? column : columns - 1;
                if (COLUMNS % WARPS_ == 0 || column < COLUMNS)
                    copy_async<16>(to + Memory::X + column * Memory::X_PITCH + 16 * lane,
                                   x + ((i64)there * product.inputs + (begin + i) * STAGE) * 2 + 16 * lane);
            }
        }
        if (numbers) end_group();
    };

    float sums[TILES][4] = {};
#pragma unroll
    for (int i = 0; i < AHEAD - 1; i++) fetch(i, true, false);
    wait_for_kernels_before();  // weights are on their way
#pragma unroll
    for (int i = 0; i < AHEAD - 1; i++) fetch(i, false, true);
    for (int i = 0; i < mine; i++) {
        wait_groups<AHEAD - 2>();
        __syncthreads();
        fetch(i + AHEAD - 1, true, true);  // where all are done with stage i - 1
        const u8* held = shared + i % AHEAD * Memory::STAGE_BYTES;
        const u8* low = held + (warp * 16 + g) * F::PITCH;
        const u8* high = low + 8 * F::PITCH;
        const u8* xs = held + Memory::X;
        if (F::WINDOW) {
            u64 from = (u64)product.weight.part[0] + expert * rows * product.row_bytes[0] + (i64)(begin + i) * F::BYTES[0];
            low += from + (row + g < rows ? row + g : rows - 1) * product.row_bytes[0] & 15;
            high += from + (row + g + 8 < rows ? row + g + 8 : rows - 1) * product.row_bytes[0] & 15;
        }
        typename F::Row low_row(low), high_row(high);
        const int REGISTERS = F::CHUNK / 8, EACH = REGISTERS / F::GROUPS;
#pragma unroll
        for (int chunk = 0; chunk < STAGE / F::CHUNK; chunk++) {
            u32 a[REGISTERS], b[REGISTERS];
            float s[F::GROUPS], m[F::GROUPS], s8[F::GROUPS], m8[F::GROUPS];
            F::template load<P>(low, low_row, chunk, t, a, s, m);
            F::template load<P>(high, high_row, chunk, t, b, s8, m8);
            if (COLUMNS > EXACTLY) {
                scaled<F, P>(s, m, a);
                scaled<F, P>(s8, m8, b);
            }
#pragma unroll
            for (int tile = 0; tile < TILES; tile++) {
                u32 pairs[REGISTERS];
                const u8* from = xs + (tile * 8 + g) * Memory::X_PITCH + chunk * F::CHUNK * 2;
                float* sum = sums[tile];
                if (COLUMNS > EXACTLY) {
                    settled<F>(from, t, pairs);
#pragma unroll
                    for (int k = 0; k < REGISTERS; k += 2) P::mma(sum, a[k], b[k], a[k + 1], b[k + 1], pairs[k], pairs[k + 1]);
                    continue;
                }
                arrange<F>(from, true, t, pairs);
#pragma unroll
                for (int group = 0; group < F::GROUPS; group++) {
                    float c[4] = {}, e[4] = {};
#pragma unroll
                    for (int k = group * EACH; k < (group + 1) * EACH; k += 2) {
                        P::mma(c, a[k], b[k], a[k + 1], b[k + 1], pairs[k], pairs[k + 1]);
                        if (F::AFFINE) P::mma(e, P::ONES, P::ONES, P::ONES, P::ONES, pairs[k], pairs[k + 1]);
                    }
#pragma unroll
                    for (int j = 0; j < 4; j++) {
                        sum[j] = __fmaf_rn(j < 2 ? s[group] : s8[group], c[j], sum[j]);
                        if (F::AFFINE) sum[j] = __fmaf_rn(j < 2 ? m[group] : m8[group], e[j % 2], sum[j]);
                    }
                }
            }
        }
    }

    begin_next_kernel();  // as late as this, so that its blocks find all multiprocessors equally busy
    wait_groups<0>();
    const OutputsInOrder outputs(block_row, rows);
    end_tile<P, COLUMNS, WARPS_, SPLITS>(&sums[0][0], (float*)shared, y, rank, outputs, rows, columns, F::finish(product.weight));
}
