// What primitives.cu and the compiler for GPUs have, in plain C++: kernels are compiled with it on the CPU.
#include <cmath>
#include <cstdint>
#include <cstring>

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#define __device__
#ifdef UQFF_BLOCK
#define __shared__ static
#else
#define __shared__
#endif
#define __align__(bytes)

#ifndef UQFF_BLOCK
struct Dim3 {
    unsigned x, y, z;
};
static Dim3 threadIdx, blockIdx, blockDim, gridDim;
static void __syncthreads() {}
static void __syncwarp() {}
#endif

static float __uint_as_float(u32 bits) {
    float made;
    memcpy(&made, &bits, 4);
    return made;
}
static u32 __float_as_uint(float number) {
    u32 made;
    memcpy(&made, &number, 4);
    return made;
}
static float __fdiv_rn(float a, float b) { return a / b; }
static float __frsqrt_rn(float a) { return (float)(1.0 / std::sqrt((double)a)); }
static float exponential(float number) { return std::exp(number); }
static void begin_next_kernel() {}
static void wait_for_kernels_before() {}
static void prefetch(const u8*) {}
static float load_volatile(const float* at) { return *at; }
static u32 load_volatile(const u32* at) { return *at; }
static void tell_ranks(u32* at, u32 number) { *at = number; }
static u32 told_by_ranks(const u32* at) { return *at; }
template <int WORDS>
static void load_shown(const u8* at, u32* words) {
    memcpy(words, at, 4 * WORDS);
}
static u64 nanoseconds() {
    static u64 asked;
    return ++asked;
}
static int count_up(u32* counter, int calls) {
    *counter = *counter + 1 == (u32)calls ? 0 : *counter + 1;
    return *counter == 0;
}
static float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
static u32 __byte_perm(u32 a, u32 b, u32 selector) {
    u64 both = a | (u64)b << 32;
    u32 made = 0;
    for (int i = 0; i < 4; i++) made |= (u32)(both >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
    return made;
}
static u32 __funnelshift_r(u32 low, u32 high, int shift) { return (u32)((low | (u64)high << 32) >> (shift & 31)); }

static float half_to_float(u32 bits) {
    u32 sign = (bits & 0x8000) << 16, exponent = bits >> 10 & 31, fraction = bits & 0x3FF;
    if (exponent == 31) return __uint_as_float(sign | 0x7F800000 | fraction << 13);
    if (exponent) return __uint_as_float(sign | (exponent + 112) << 23 | fraction << 13);
    float magnitude = std::ldexp((float)fraction, -24);
    return sign ? -magnitude : magnitude;
}
static u32 to_bfloat(float number) {
    u32 bits = __float_as_uint(number);
    return number != number ? 0x7FFF : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}
static u32 two_bfloats(float low, float high) { return to_bfloat(low) | to_bfloat(high) << 16; }
static float bfloat(u32 bits) { return __uint_as_float(bits << 16); }
static u32 multiply_bfloats(u32 a, u32 b) {
    return two_bfloats(bfloat(a & 0xFFFF) * bfloat(b & 0xFFFF), bfloat(a >> 16) * bfloat(b >> 16));
}
static u32 fma_bfloats(u32 a, u32 b, u32 c) {
    return two_bfloats(std::fma(bfloat(a & 0xFFFF), bfloat(b & 0xFFFF), bfloat(c & 0xFFFF)),
                       std::fma(bfloat(a >> 16), bfloat(b >> 16), bfloat(c >> 16)));
}
static u32 subtract_bfloats(u32 a, u32 b) {
    return two_bfloats(bfloat(a & 0xFFFF) - bfloat(b & 0xFFFF), bfloat(a >> 16) - bfloat(b >> 16));
}
static u32 larger_pair(u32 a, u32 b) {
    const u32 low = (a & 0xFFFF) > (b & 0xFFFF) ? a & 0xFFFF : b & 0xFFFF, high = a >> 16 > b >> 16 ? a >> 16 : b >> 16;
    return low | high << 16;
}
static u32 and_or(u32 a, u32 b, u32 c) { return (a & b) | c; }
u32 subtract_halves(u32 a, u32 b);
static u32 to_half(float number) {
    u32 bits = __float_as_uint(number), sign = bits >> 16 & 0x8000;
    float magnitude = __uint_as_float(bits & 0x7FFFFFFF);
    if (!(magnitude < 65520)) return sign | (number != number ? 0x7FFF : 0x7C00);
    if (magnitude < 0x1p-14f) return sign | (u32)std::nearbyint(magnitude * 0x1p24f);
    u32 rest = __float_as_uint(magnitude) - (112u << 23);
    return sign | (rest + 0xFFF + (rest >> 13 & 1)) >> 13;
}
static u32 two_halves(float low, float high) { return to_half(low) | to_half(high) << 16; }
u32 multiply_halves(u32 a, u32 b);
void mma_halves(float* c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1);
#ifndef UQFF_BLOCK
float shuffle_xor(float number, int mask);
void mma_bfloats(float* c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1);
#endif
template <int BYTES>
void copy_async(u8* shared, const u8* global) {
    memcpy(shared, global, BYTES);
}
void end_group();
template <int LEFT>
void wait_groups();
static u32 e4m3_to_half(u32 byte) {
    const u32 exponent = byte >> 3 & 15, fraction = byte & 7;
    const float magnitude = exponent ? std::ldexp(8.0f + fraction, (int)exponent - 10) : std::ldexp((float)fraction, -9);
    return (byte & 0x7F) == 0x7F ? 0x7FFF : (byte & 0x80) << 8 | to_half(magnitude);
}
static u32 low_e4m3_to_halves(u32 four) { return e4m3_to_half(four & 255) | e4m3_to_half(four >> 8 & 255) << 16; }
static u32 high_e4m3_to_halves(u32 four) { return low_e4m3_to_halves(four >> 16); }
