// What a decoder does with one token beside its products.  Numbers are rounded to the model's dtype T where transformers
// rounds them; sums are float32.

template <class T>
__device__ inline void put(u8* at, float number);
template <>
__device__ inline void put<F32>(u8* at, float number) {
    *(float*)at = number;
}
template <>
__device__ inline void put<F16>(u8* at, float number) {
    *(u16*)at = (u16)two_halves(number, 0.0f);
}
template <>
__device__ inline void put<BF16>(u8* at, float number) {
    *(u16*)at = (u16)two_bfloats(number, 0.0f);
}

template <class T>
__device__ inline float rounded(float number) {
    u32 bits;
    put<T>((u8*)&bits, number);
    return T::load((const u8*)&bits);
}

// COUNT numbers from an address that is a multiple of their size, or of 16 bytes.
template <class T, int COUNT>
__device__ inline void get_many(const u8* at, float* values) {
    const int WORDS = COUNT * T::SIZE / 4, EACH = WORDS > 4 ? 4 : WORDS;
    u32 words[WORDS];
#pragma unroll
    for (int i = 0; i < WORDS / EACH; i++) load_words<EACH>(at + 16 * i, words + 4 * i);
#pragma unroll
    for (int i = 0; i < COUNT; i++) values[i] = T::load((const u8*)words + i * T::SIZE);
}

template <class T>
__device__ inline void put_four(u8* at, const float* values) {
    struct alignas(4 * T::SIZE) Four {
        u8 byte[4 * T::SIZE];
    } made;
#pragma unroll
    for (int i = 0; i < 4; i++) put<T>(made.byte + i * T::SIZE, values[i]);
    *(Four*)at = made;
}

__device__ inline float warp_sum(float number) {
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) number += shuffle_xor(number, mask);
    return number;
}

// sum = x + y, unless there is no y; out = RMSNorm(sum).  One block; width is a multiple of 4, at most 32 times its
// threads.  Four numbers of y are got by Y; in add_norm they are in memory.
struct Norm {
    const u8* x;
    const u8* y;
    const u8* weight;
    u8* sum;
    u8* out;
    int width;
    float eps;
};

const int NORM_THREADS = 512, NORM_RUNS = 8;

template <class T>
struct InMemory {
    const u8* y;
    __device__ bool there() const { return y; }
    __device__ void get(int at, float* values) const { get_many<T, 4>(y + (i64)at * T::SIZE, values); }
};

template <class T, class Y>
__device__ inline void add_and_norm(const Norm& norm, const Y& y) {
    __shared__ float terms[NORM_THREADS / 32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float held[NORM_RUNS][4], weight[NORM_RUNS][4], sum = 0;
#pragma unroll
    for (int run = 0; run < NORM_RUNS; run++) {
        const int at = 4 * (run * NORM_THREADS + (int)threadIdx.x);
        if (at < norm.width) {
            get_many<T, 4>(norm.weight + (i64)at * T::SIZE, weight[run]);
            get_many<T, 4>(norm.x + (i64)at * T::SIZE, held[run]);
            if (y.there()) {
                float added[4];
                y.get(at, added);
                for (int i = 0; i < 4; i++) held[run][i] = rounded<T>(held[run][i] + added[i]);
                put_four<T>(norm.sum + (i64)at * T::SIZE, held[run]);
            }
            for (int i = 0; i < 4; i++) sum += held[run][i] * held[run][i];
        }
    }
    sum = warp_sum(sum);
    if (lane == 0) terms[warp] = sum;
    __syncthreads();
    sum = 0;
    for (int i = 0; i < NORM_THREADS / 32; i++) sum += terms[i];
    const float scale = __frsqrt_rn(sum / (float)norm.width + norm.eps);
#pragma unroll
    for (int run = 0; run < NORM_RUNS; run++) {
        const int at = 4 * (run * NORM_THREADS + (int)threadIdx.x);
        if (at < norm.width) {
            for (int i = 0; i < 4; i++) weight[run][i] *= rounded<T>(held[run][i] * scale);
            put_four<T>(norm.out + (i64)at * T::SIZE, weight[run]);
        }
    }
}

template <class T>
__device__ inline void add_norm(const Norm& norm) {
    add_and_norm<T>(norm, InMemory<T>{norm.y});
}

// out = SiLU(gate) · up
struct Gated {
    const u8* gate;
    const u8* up;
    u8* out;
    int width;
};

template <class T>
__device__ inline void silu_gate(const Gated& gated) {
    const int at = 4 * (int)(blockIdx.x * blockDim.x + threadIdx.x);
    if (at >= gated.width) return;
    float gate[4], up[4];
    get_many<T, 4>(gated.gate + (i64)at * T::SIZE, gate);
    get_many<T, 4>(gated.up + (i64)at * T::SIZE, up);
    for (int i = 0; i < 4; i++) up[i] *= rounded<T>(gate[i] / (1.0f + exponential(-gate[i])));
    put_four<T>(gated.out + (i64)at * T::SIZE, up);
}

// Attention of one token: rotary embedding, the token's key and value into the cache, and
//
//     out = Σ softmax(scale · q Kᵀ) V
//
// A block has GROUP query heads of one key and value head, and a chunk of the positions.  Eight lanes have a position; a
// team keeps a maximum, a sum and the numbers that go with them, which are merged at the end: over the lanes of a warp,
// its warps, and then, by the last block that is done, over chunks.  Their order does not depend on time.
struct Attend {
    const u8* q;
    const u8* k;
    const u8* v;
    const u8* q_norm;  // weights of norms over a head, or null
    const u8* k_norm;
    const u8* cos;     // [tokens, HEAD]
    const u8* sin;
    u8* keys;          // [heads, tokens, HEAD]
    u8* values;
    const i64* position;
    u8* out;
    float* partial;    // [blocks, chunks, GROUP, HEAD + 2]
    u32* done;         // [blocks], zeros
    int tokens, chunk, blocks_of_head;
    float scale, eps;
};

const int TEAM = 8, ATTEND_WARPS = 8;
#define NOTHING (-1e30f)

// A row of HEAD numbers, normalised and rotated, by one warp.
template <class T, int HEAD>
__device__ inline void rotate(const u8* row, const u8* norm, float eps, const u8* cos, const u8* sin, float* to) {
    const int EACH = HEAD / 32, lane = threadIdx.x % 32;
    float held[EACH], sum = 0;
    for (int i = 0; i < EACH; i++) {
        held[i] = T::load(row + (lane + 32 * i) * T::SIZE);
        sum += held[i] * held[i];
    }
    if (norm) {
        const float scale = __frsqrt_rn(warp_sum(sum) / (float)HEAD + eps);
        for (int i = 0; i < EACH; i++)
            held[i] = rounded<T>(T::load(norm + (lane + 32 * i) * T::SIZE) * rounded<T>(held[i] * scale));
    }
    for (int i = 0; i < EACH; i++) to[lane + 32 * i] = held[i];
    __syncwarp();
    float turned[EACH];
    for (int i = 0; i < EACH; i++) {
        const int at = lane + 32 * i;
        const float other = at < HEAD / 2 ? -to[at + HEAD / 2] : to[at - HEAD / 2];
        turned[i] = rounded<T>(rounded<T>(held[i] * T::load(cos + at * T::SIZE)) +
                               rounded<T>(other * T::load(sin + at * T::SIZE)));
    }
    __syncwarp();
    for (int i = 0; i < EACH; i++) to[lane + 32 * i] = turned[i];
}

template <class T, int HEAD, int GROUP>
__device__ inline void attend(const Attend& a) {
    const int PART = HEAD / TEAM, RUN = PART % (16 / T::SIZE) ? 4 : 16 / T::SIZE, TEAMS = 32 / TEAM * ATTEND_WARPS, KEPT = HEAD + 2;
    __shared__ float queries[GROUP][HEAD], key[HEAD], merged[ATTEND_WARPS][GROUP][KEPT];
    __shared__ int last;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, t = lane % TEAM, team = threadIdx.x / TEAM;
    const int block = blockIdx.x, head = block / a.blocks_of_head, chunks = gridDim.y;
    const i64 position = a.position[0], cached = (i64)head * a.tokens * HEAD;
    const i64 begin = (i64)blockIdx.y * a.chunk, end = begin + a.chunk < position + 1 ? begin + a.chunk : position + 1;
    float most[GROUP], sum[GROUP], numbers[GROUP][PART];
#pragma unroll
    for (int g = 0; g < GROUP; g++) {
        most[g] = NOTHING, sum[g] = 0;
#pragma unroll
        for (int i = 0; i < PART; i++) numbers[g][i] = 0;
    }
    if (begin < end) {
        const u8 *cos = a.cos + position * HEAD * T::SIZE, *sin = a.sin + position * HEAD * T::SIZE;
        const bool newest = end == position + 1;
        for (int row = warp; row < GROUP + newest; row += ATTEND_WARPS) {
            if (row < GROUP)
                rotate<T, HEAD>(a.q + ((i64)block * GROUP + row) * HEAD * T::SIZE, a.q_norm, a.eps, cos, sin, queries[row]);
            else rotate<T, HEAD>(a.k + (i64)head * HEAD * T::SIZE, a.k_norm, a.eps, cos, sin, key);
        }
        __syncthreads();
        if (newest) {
            const i64 at = cached + position * HEAD;
            for (int i = threadIdx.x; i < HEAD; i += 32 * ATTEND_WARPS) {
                put<T>(a.keys + (at + i) * T::SIZE, key[i]);
                put<T>(a.values + (at + i) * T::SIZE, T::load(a.v + ((i64)head * HEAD + i) * T::SIZE));
            }
            __syncthreads();
        }
        float query[GROUP][PART];
#pragma unroll
        for (int g = 0; g < GROUP; g++)
#pragma unroll
            for (int i = 0; i < PART; i++) query[g][i] = queries[g][(i / RUN * TEAM + t) * RUN + i % RUN] * a.scale;
        // Every team takes as many turns, so that the lanes of a warp stay together.
        for (i64 first = begin; first < end; first += TEAMS) {
            const i64 at = first + team;
            const i64 row = cached + (at < end ? at : end - 1) * HEAD;
            float k[PART], v[PART];
#pragma unroll
            for (int i = 0; i < PART / RUN; i++) {
                get_many<T, RUN>(a.keys + (row + (i * TEAM + t) * RUN) * T::SIZE, k + i * RUN);
                get_many<T, RUN>(a.values + (row + (i * TEAM + t) * RUN) * T::SIZE, v + i * RUN);
            }
#pragma unroll
            for (int g = 0; g < GROUP; g++) {
                float score = 0;
#pragma unroll
                for (int i = 0; i < PART; i++) score = __fmaf_rn(query[g][i], k[i], score);
#pragma unroll
                for (int mask = TEAM / 2; mask > 0; mask /= 2) score += shuffle_xor(score, mask);
                const float peak = at < end && score > most[g] ? score : most[g];
                const float before = exponential(most[g] - peak), now = at < end ? exponential(score - peak) : 0.0f;
                most[g] = peak;
                sum[g] = __fmaf_rn(sum[g], before, now);
#pragma unroll
                for (int i = 0; i < PART; i++) numbers[g][i] = __fmaf_rn(now, v[i], numbers[g][i] * before);
            }
        }
#pragma unroll
        for (int g = 0; g < GROUP; g++) {
#pragma unroll
            for (int mask = TEAM; mask < 32; mask *= 2) {
                const float other = shuffle_xor(most[g], mask), peak = other > most[g] ? other : most[g];
                const float mine = exponential(most[g] - peak), theirs = exponential(other - peak);
                most[g] = peak;
                sum[g] = sum[g] * mine + shuffle_xor(sum[g], mask) * theirs;
#pragma unroll
                for (int i = 0; i < PART; i++)
                    numbers[g][i] = numbers[g][i] * mine + shuffle_xor(numbers[g][i], mask) * theirs;
            }
            if (lane < TEAM) {
#pragma unroll
                for (int i = 0; i < PART; i++) merged[warp][g][(i / RUN * TEAM + t) * RUN + i % RUN] = numbers[g][i];
                if (t == 0) merged[warp][g][HEAD] = most[g], merged[warp][g][HEAD + 1] = sum[g];
            }
        }
        __syncthreads();
    }
    // Of the warps; then, if there are several, of the chunks.
    float* kept = a.partial + ((i64)block * chunks + blockIdx.y) * GROUP * KEPT;
    for (int at = threadIdx.x; begin < end && at < GROUP * HEAD; at += 32 * ATTEND_WARPS) {
        const int g = at / HEAD, i = at % HEAD;
        float peak = NOTHING, total = 0, number = 0;
        for (int w = 0; w < ATTEND_WARPS; w++) peak = merged[w][g][HEAD] > peak ? merged[w][g][HEAD] : peak;
        for (int w = 0; w < ATTEND_WARPS; w++) {
            const float share = exponential(merged[w][g][HEAD] - peak);
            total += merged[w][g][HEAD + 1] * share, number += merged[w][g][i] * share;
        }
        if (chunks == 1) put<T>(a.out + (((i64)block * GROUP + g) * HEAD + i) * T::SIZE, number / total);
        else {
            kept[g * KEPT + i] = number;
            if (i == 0) kept[g * KEPT + HEAD] = peak, kept[g * KEPT + HEAD + 1] = total;
        }
    }
    if (chunks == 1) return;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) last = count_up(a.done + block, chunks);
    __syncthreads();
    if (!last) return;
    __threadfence();
    const int used = (int)(position / a.chunk) + 1;
    const float* all = a.partial + (i64)block * chunks * GROUP * KEPT;
    for (int at = threadIdx.x; at < GROUP * HEAD; at += 32 * ATTEND_WARPS) {
        const int g = at / HEAD, i = at % HEAD;
        float peak = NOTHING, total = 0, number = 0;
        for (int c = 0; c < used; c++) {
            const float other = load_volatile(all + ((i64)c * GROUP + g) * KEPT + HEAD);
            peak = other > peak ? other : peak;
        }
        for (int c = 0; c < used; c++) {
            const float* from = all + ((i64)c * GROUP + g) * KEPT;
            const float share = exponential(load_volatile(from + HEAD) - peak);
            total += load_volatile(from + HEAD + 1) * share, number += load_volatile(from + i) * share;
        }
        put<T>(a.out + (((i64)block * GROUP + g) * HEAD + i) * T::SIZE, number / total);
    }
}
