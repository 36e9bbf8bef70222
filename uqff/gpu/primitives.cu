// What the kernels need of the machine: one instruction each.  The tests have the same in plain C++.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

__device__ inline float half_to_float(u32 bits) {
    float made;
    asm("cvt.f32.f16 %0, %1;" : "=f"(made) : "h"((u16)bits));
    return made;
}

__device__ inline u32 two_halves(float low, float high) {
    u32 made;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(made) : "f"(high), "f"(low));
    return made;
}

__device__ inline u32 two_bfloats(float low, float high) {
    u32 made;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(made) : "f"(high), "f"(low));
    return made;
}

// Products of pairs, rounded once; subnormals count.  A sum with -0 keeps every sign.
__device__ inline u32 multiply_halves(u32 a, u32 b) {
    u32 made;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(made) : "r"(a), "r"(b), "r"(0x80008000u));
    return made;
}

__device__ inline u32 multiply_bfloats(u32 a, u32 b) {
    u32 made;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(made) : "r"(a), "r"(b), "r"(0x80008000u));
    return made;
}

// The larger of each half, as whole numbers. Compute capability 9.0.
__device__ inline u32 larger_pair(u32 a, u32 b) {
    u32 made;
    asm("max.u16x2 %0, %1, %2;" : "=r"(made) : "r"(a), "r"(b));
    return made;
}

// a b + c of pairs, rounded once.
__device__ inline u32 fma_bfloats(u32 a, u32 b, u32 c) {
    u32 made;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(made) : "r"(a), "r"(b), "r"(c));
    return made;
}

// Two e4m3, the low or the high ones of four, as float16; exact. Compute capability 8.9.
__device__ inline u32 low_e4m3_to_halves(u32 four) {
    u32 made;
    asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %1;\ncvt.rn.f16x2.e4m3x2 %0, low;\n}" : "=r"(made) : "r"(four));
    return made;
}

__device__ inline u32 high_e4m3_to_halves(u32 four) {
    u32 made;
    asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %1;\ncvt.rn.f16x2.e4m3x2 %0, high;\n}" : "=r"(made) : "r"(four));
    return made;
}

// a - b of pairs, rounded once.
__device__ inline u32 subtract_halves(u32 a, u32 b) {
    u32 made;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(made) : "r"(b), "r"(0xBC00BC00u), "r"(a));
    return made;
}

__device__ inline u32 subtract_bfloats(u32 a, u32 b) {
    u32 made;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(made) : "r"(b), "r"(0xBF80BF80u), "r"(a));
    return made;
}

// (a & b) | c, which the compiler makes two of if b and c are constants.
__device__ inline u32 and_or(u32 a, u32 b, u32 c) {
    u32 made;
    asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(made) : "r"(a), "r"(b), "r"(c));
    return made;
}

// c += a b, of 16 x 16 and 16 x 8 numbers held by a warp; lane 4 g + t has, two to a register:
//   a: (row g, 2t), (row g + 8, 2t), (row g, 2t + 8), (row g + 8, 2t + 8)    b: (2t, column g), (2t + 8, column g)
//   c: (row g, column 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)
__device__ inline void mma_halves(float* c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ inline void mma_bfloats(float* c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Asynchronous copies from global into shared memory, in groups of which the oldest are waited for.
template <int BYTES>
__device__ inline void copy_async(u8* shared, const u8* global) {
    u32 to = (u32)__cvta_generic_to_shared(shared);
    if (BYTES == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(global), "n"(BYTES) : "memory");
}

__device__ inline void end_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int LEFT>
__device__ inline void wait_groups() {
    asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}

// Of the blocks of a cluster: all wait for all; a number in the shared memory of another, at the address of one's own.
// Compute capability 9.0.
__device__ inline void cluster_barrier() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

__device__ inline float load_of_cluster(const float* own, int rank) {
    float made;
    asm volatile(
        "{\n.reg .u32 at;\nmapa.shared::cluster.u32 at, %1, %2;\nld.shared::cluster.f32 %0, [at];\n}"
        : "=f"(made)
        : "r"((u32)__cvta_generic_to_shared(own)), "r"(rank)
        : "memory");
    return made;
}

__device__ inline u32 shuffle_xor(u32 number, int mask) { return __shfl_xor_sync(0xFFFFFFFFu, number, mask); }

__device__ inline float shuffle_xor(float number, int mask) { return __shfl_xor_sync(0xFFFFFFFFu, number, mask); }

__device__ inline float shuffle(float number, int lane) { return __shfl_sync(0xFFFFFFFFu, number, lane); }

__device__ inline float exponential(float number) { return expf(number); }

__device__ inline float load_volatile(const float* at) { return *(const volatile float*)at; }

__device__ inline u32 load_volatile(const u32* at) { return *(const volatile u32*)at; }

// Of GPUs and hosts that see each other's memory: what was written before a number is told is there for those who have
// been told; two or four words that others wrote; a clock.
__device__ inline void tell_ranks(u32* at, u32 number) {
    asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(at), "r"(number) : "memory");
}

__device__ inline u32 told_by_ranks(const u32* at) {
    u32 made;
    asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(made) : "l"(at) : "memory");
    return made;
}

template <int WORDS>
__device__ inline void load_shown(const u8* at, u32* words) {
    if (WORDS == 4)
        asm volatile("ld.volatile.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(words[0]), "=r"(words[1]), "=r"(words[WORDS - 2]), "=r"(words[WORDS - 1])
                     : "l"(at));
    else asm volatile("ld.volatile.global.v2.u32 {%0, %1}, [%2];" : "=r"(words[0]), "=r"(words[1]) : "l"(at));
}

__device__ inline u64 nanoseconds() {
    u64 made;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(made));
    return made;
}

// Whether this is the last of so many calls; the count begins again then.
__device__ inline int count_up(u32* counter, int calls) { return atomicInc(counter, calls - 1) == calls - 1; }

// Compute capability 9.0: barriers in shared memory that count arrivals and bytes, copies that arrive there, and matrix
// instructions of four warps together, which read their second operand from shared memory.
__device__ inline u32 shared_address(const void* at) { return (u32)__cvta_generic_to_shared(at); }

__device__ inline void begin_barrier(u64* barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

__device__ inline void publish_barriers() { asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async;" ::: "memory"); }

__device__ inline void wait_barrier(u64* barrier, int phase) {
    asm volatile(
        "{\n.reg .pred done;\nagain_%=:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra again_%=;\n}" ::"r"(
            shared_address(barrier)),
        "r"(phase)
        : "memory");
}

__device__ inline void arrive(u64* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Bytes that a barrier waits for beside one arrival; copies that arrive there.
__device__ inline void expect_bytes(u64* barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}

__device__ inline void copy_bytes(u8* shared, const u8* global, int bytes, u64* barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared_address(shared)),
        "l"(global), "r"(bytes), "r"(shared_address(barrier))
        : "memory");
}

// Arrives when the asynchronous copies of this thread so far are done.
__device__ inline void arrive_after_copies(u64* barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Of kernels that are launched one after the other and may overlap, from compute capability 9.0 on: the next may begin; what
// the ones before wrote is there.
__device__ inline void begin_next_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ inline void wait_for_kernels_before() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Brings the bytes from there into the cache that all multiprocessors share, whatever is written there later.
__device__ inline void prefetch(const u8* at) { asm volatile("prefetch.global.L2 [%0];" ::"l"(at)); }

// Some warps of a block wait for each other.
__device__ inline void wait_for_threads(int barrier, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

__device__ inline void copy_bulk(u8* shared, const u8* global, int bytes, u64* barrier) {
    asm volatile(
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%3], %2;\n"
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
            shared_address(shared)),
        "l"(global), "r"(bytes), "r"(shared_address(barrier))
        : "memory");
}

// A matrix in shared memory as tiles of 8 rows of 16 bytes: bytes from tile to tile along a row, and from row to row.
__device__ inline u64 describe(const u8* shared, int along, int down) {
    return (u64)(shared_address(shared) >> 4 & 0x3FFF) | (u64)(along >> 4) << 16 | (u64)(down >> 4) << 32;
}

__device__ inline void begin_wide() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ inline void end_wide() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// For all but the last that was ended.
__device__ inline void wait_wide_before() { asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory"); }

template <int COUNT>
__device__ inline void wait_wide(float (&sums)[COUNT]) {
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
    for (int i = 0; i < COUNT; i++) asm volatile("" : "+f"(sums[i])::"memory");
}
