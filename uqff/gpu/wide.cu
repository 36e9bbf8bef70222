// y = x Wᵀ from the stored codes, for many rows of x, by the matrix instructions of warpgroups (compute capability 9.0).
//
// A block makes 16 outputs a warp of COLUMNS rows of x.  Weights are decoded, scaled and rounded in the registers that the
// instructions take them from, while those of the codes before are multiplied; x comes through shared memory, in which
// it must lie in tiles of 8 rows and 16 bytes and in the order in which lanes have the codes.  spread.cu brings it there.

// What a warp has of the weight: 16 rows of a tile.  Families may have their own.
//   CHUNK    inputs that are decoded together        BYTES    in shared memory, of a stage
//   begin    with which row of the tiles and which stage            fetch    the next stage, into shared memory
//   take     a stage that is there                   decode   so many chunks of it, rows g and g + 8, as scaled() says
//   Outputs  which outputs these rows are: see end_tile()
template <class K>
struct WideRows {
    typedef Fused<K> F;
    typedef OutputsInOrder Outputs;
    static const int CHUNK = F::CHUNK, BYTES = 16 * F::PITCH;
    Streams<F> streams;
    const u8* low;
    const u8* high;
    __device__ void begin(const Product& product, int row, int stage, int lane) {
        streams.begin(product, 0, row, stage, lane);
    }
    __device__ void fetch(u8* held, int lane) { streams.fetch(held, lane); }
    __device__ void take(const Product& product, const u8* held, int row, int stage, int lane) {
        const int g = lane / 4, rows = product.rows;
        low = held + g * F::PITCH, high = low + 8 * F::PITCH;
        if (F::WINDOW) {
            u64 from = (u64)product.weight.part[0] + (i64)stage * F::BYTES[0];
            low += from + (row + g < rows ? row + g : rows - 1) * product.row_bytes[0] & 15;
            high += from + (row + g + 8 < rows ? row + g + 8 : rows - 1) * product.row_bytes[0] & 15;
        }
    }
    template <class P, int CHUNKS>
    __device__ void decode(int first, int t, u32* low_pairs, u32* high_pairs) const {
        const int EACH = CHUNK / 8;
        typename F::Row low_row(low), high_row(high);
        if constexpr (F::template direct<P>()) {
#pragma unroll
            for (int i = 0; i < CHUNKS; i++) {
                F::template rounded<P>(low, low_row, first + i, t, low_pairs + i * EACH);
                F::template rounded<P>(high, high_row, first + i, t, high_pairs + i * EACH);
            }
            return;
        }
        float s[F::GROUPS], m[F::GROUPS];
#pragma unroll
        for (int i = 0; i < CHUNKS; i++) {
            F::template load<P>(low, low_row, first + i, t, low_pairs + i * EACH, s, m);
            scaled<F, P>(s, m, low_pairs + i * EACH);
            F::template load<P>(high, high_row, first + i, t, high_pairs + i * EACH, s, m);
            scaled<F, P>(s, m, high_pairs + i * EACH);
        }
    }
    __device__ static float finish(const Weight& weight) { return F::finish(weight); }
};

template <class K, int COLUMNS, int WARPS_, int BLOCKS, int LEAST>
struct WideMemory {
    typedef WideRows<K> Rows;
    static const int ROWS = 16 * WARPS_, UNIT = Rows::CHUNK < LEAST ? LEAST : Rows::CHUNK;
    static const int WEIGHTS = WARPS_ * Rows::BYTES, X = UNIT * COLUMNS * 2, ROOM = 232448 / BLOCKS - 1024 - 128;
    static const int AHEAD = 2, LEFT = (ROOM - AHEAD * WEIGHTS) / X, X_AHEAD = LEFT < 2 ? 2 : LEFT > 6 ? 6 : LEFT;
    static const int TERMS = COLUMNS * (ROWS + 4) * 4;
    static const int BUFFERS = X_AHEAD * X + AHEAD * WEIGHTS, BYTES = 128 + (BUFFERS > TERMS ? BUFFERS : TERMS);
};

template <class K, class P, int COLUMNS, int WARPS_, int SPLITS, int BLOCKS, int LEAST, int BESIDE = 1>
__device__ inline void multiply_wide(const Product& product) {
    typedef WideMemory<K, COLUMNS, WARPS_, BLOCKS, LEAST> Memory;
    typedef WideRows<K> Rows;
    extern __shared__ __align__(128) u8 shared[];
    const int UNIT = Memory::UNIT, UNITS = STAGE / UNIT, AHEAD = Memory::AHEAD, X_AHEAD = Memory::X_AHEAD;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, t = lane % 4, rows = product.rows;
    const int rank = blockIdx.x % SPLITS, block_row = blockIdx.x / SPLITS * Memory::ROWS, row = block_row + 16 * warp;
    const int first_column = blockIdx.y * COLUMNS;
    const int columns = product.columns - first_column < COLUMNS ? product.columns - first_column : COLUMNS;
    const int all = product.inputs / STAGE, begin = all * rank / SPLITS, mine = all * (rank + 1) / SPLITS - begin;
    const u8* x = product.x + ((i64)first_column * product.inputs + (i64)begin * STAGE * COLUMNS) * 2;
    u8* y = product.y + (i64)first_column * rows * 2;
    u64* full = (u64*)shared;
    u64* empty = full + X_AHEAD;
    u8* xs = shared + 128;
    u8* held = xs + X_AHEAD * Memory::X + warp * Rows::BYTES;

    Rows weights;
    weights.begin(product, row, begin, lane);
    auto fetch = [&](int stage) {
        if (stage < mine) weights.fetch(held + stage % AHEAD * Memory::WEIGHTS, lane);
        end_group();
    };
    fetch(0);
    if (threadIdx.x == 0) {
        for (int i = 0; i < X_AHEAD; i++) begin_barrier(full + i, 1), begin_barrier(empty + i, WARPS_);
        publish_barriers();
    }
    __syncthreads();
    const int units = mine * UNITS;
    auto copy_x = [&](int unit, int slot) {
        copy_bulk(xs + slot * Memory::X, x + (i64)unit * Memory::X, Memory::X, full + slot);
    };
    wait_for_kernels_before();  // weights are on their way
    if (threadIdx.x == 0)
        for (int i = 0; i < X_AHEAD && i < units; i++) copy_x(i, i);

    float sums[COLUMNS / 2];
#pragma unroll
    for (int i = 0; i < COLUMNS / 2; i++) sums[i] = 0;
    const int CHUNKS = UNIT / Rows::CHUNK, REGISTERS = UNIT / 8, LATER = X_AHEAD > 2 ? 2 : 1;
    u32 a[2][REGISTERS], b[2][REGISTERS];
    auto begin_stage = [&](int stage) {
        wait_groups<0>();
        __syncwarp();
        fetch(stage + 1);
        weights.take(product, held + stage % AHEAD * Memory::WEIGHTS, row, begin + stage, lane);
    };
    auto decode = [&](int unit, u32* low_pairs, u32* high_pairs) {
        weights.template decode<P, CHUNKS>(unit * CHUNKS, t, low_pairs, high_pairs);
    };

    if (mine) {
        begin_stage(0);
        decode(0, a[0], b[0]);
    }
    // While the products of a unit are made, the next one is decoded, and those of the one before are waited for.
    int slot = 0, phase = 0, free = 0, free_phase = 0;
    for (int stage = 0; stage < mine; stage++) {
#pragma unroll
        for (int unit = 0; unit < UNITS; unit++) {
            const int now = unit % 2, at = stage * UNITS + unit;
            wait_barrier(full + slot, phase);
            const u64 matrix = describe(xs + slot * Memory::X, COLUMNS * 16, 128);
            begin_wide();
#pragma unroll
            for (int k = 0; k < REGISTERS; k += 2)
                Wide::mma(sums, a[now][k], b[now][k], a[now][k + 1], b[now][k + 1], matrix + (u64)(k * COLUMNS));
            end_wide();
            wait_wide_before();
            if (at && lane == 0) arrive(empty + (slot ? slot : X_AHEAD) - 1);
            // A copy takes the place of a unit that the other warps have most likely done.
            if (at >= LATER) {
                if (threadIdx.x == 0 && at - LATER + X_AHEAD < units) {
                    wait_barrier(empty + free, free_phase);
                    copy_x(at - LATER + X_AHEAD, free);
                }
                if (++free == X_AHEAD) free = 0, free_phase ^= 1;
            }
            if (unit + 1 < UNITS) decode(unit + 1, a[1 - now], b[1 - now]);
            else if (stage + 1 < mine) {
                begin_stage(stage + 1);
                decode(0, a[1 - now], b[1 - now]);
            }
            if (++slot == X_AHEAD) slot = 0, phase ^= 1;
        }
    }
    begin_next_kernel();  // as late as this, so that its blocks find all multiprocessors equally busy
    wait_wide(sums);

    wait_groups<0>();
    const int beside = blockIdx.x % BESIDE;  // SPLITS or BESIDE is 1
    const typename Rows::Outputs outputs(block_row - beside * Memory::ROWS, rows);
    end_tile<P, COLUMNS, WARPS_, SPLITS, BESIDE>(sums, (float*)xs, y, rank + beside, outputs, rows, columns, Rows::finish(product.weight));
}
