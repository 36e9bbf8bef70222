// Numbers as they are stored, and what is written.

__device__ inline float bits_to_float(u32 bits) { return __uint_as_float(bits); }

// Little-endian integers at addresses that are multiples of ALIGN.
template <int ALIGN>
__device__ inline u32 load_u32(const u8* at) {
    if (ALIGN >= 4) return *(const u32*)at;
    if (ALIGN == 2) return *(const u16*)at | (u32) * (const u16*)(at + 2) << 16;
    return at[0] | (u32)at[1] << 8 | (u32)at[2] << 16 | (u32)at[3] << 24;
}

// Eight bytes at an address that is a multiple of ALIGN, in words of which each holds one of them.
template <int ALIGN>
__device__ inline void load_eight_bytes(const u8* at, u32* words) {
    if (ALIGN >= 4) {
        words[0] = *(const u32*)at, words[1] = *(const u32*)(at + 4);
        return;
    }
    const int shift = 8 * ((int)(u64)at & 3);
    const u32* from = (const u32*)((u64)at & ~3ull);
    const u32 next = from[1];
    words[0] = __funnelshift_r(from[0], next, shift);
    words[1] = __funnelshift_r(next, *(const u32*)((u64)(at + 7) & ~3ull), shift);
}

__device__ inline float load_half(const u8* at) { return half_to_float(*(const u16*)at); }

// The four numbers of a group of bytes: byte i of codes, less an offset; exact.
__device__ inline float code(u32 codes, int i, float offset) {
    return bits_to_float(__byte_perm(codes, 0x4B000000u, 0x7440u | i)) - (8388608.0f + offset);
}

__device__ inline float signed_code(u32 codes, int i) { return code(codes ^ 0x80808080u, i, 128.0f); }

// Bit i of four moves to bit 8 i.
__device__ inline u32 bits_to_bytes(u32 four) { return (four & 15u) * 0x00204081u & 0x01010101u; }

__device__ inline float e4m3_to_float(u32 byte) {
    float magnitude = bits_to_float((byte & 0x7Fu) << 20) * bits_to_float(0x7B800000u);  // 2^120
    u32 sign = (byte & 0x80u) << 24;
    if ((byte & 0x7Fu) == 0x7Fu) return bits_to_float(0x7FC00000u);
    return bits_to_float(__float_as_uint(magnitude) | sign);
}

// Scales as they are stored.
struct F32 {
    static const bool BFLOAT = false;
    static const int SIZE = 4;
    __device__ static float load(const u8* at) { return *(const float*)at; }
};
struct F16 {
    static const bool BFLOAT = false;
    static const int SIZE = 2;
    __device__ static float load(const u8* at) { return load_half(at); }
};
struct BF16 {
    static const bool BFLOAT = true;
    static const int SIZE = 2;
    __device__ static float load(const u8* at) { return bits_to_float((u32) * (const u16*)at << 16); }
};

// Words at an address that is a multiple of their number of bytes, or of 16.
template <int WORDS>
__device__ inline void load_words(const u8* at, u32* words) {
    struct alignas(WORDS == 2 ? 8 : 16) Together {
        u32 word[WORDS];
    } both = *(const Together*)at;
#pragma unroll
    for (int i = 0; i < WORDS; i++) words[i] = both.word[i];
}

__device__ inline void write_four(u8* at, const u32* words) {
    struct alignas(16) Four {
        u32 word[4];
    } made = {{words[0], words[1], words[2], words[3]}};
    *(Four*)at = made;
}

// Eight scales at an address that is a multiple of 8 of them.
template <class S>
__device__ inline void load_eight(const u8* at, float* values) {
    u32 words[2 * S::SIZE];
#pragma unroll
    for (int i = 0; i < S::SIZE / 2; i++) load_words<4>(at + 16 * i, words + 4 * i);
#pragma unroll
    for (int i = 0; i < 8; i++) values[i] = S::load((const u8*)words + i * S::SIZE);
}

// A weight: the addresses of its stored parts, and numbers whose meaning the family knows; number[0] is how many
// weights there are.
struct Weight {
    const u8* part[4];
    i64 number[6];
};
