// Codes as float16 numbers for ring.cu: whole ones, which may be RAISED by setting bits of a mantissa.
//
// Coded<K> says of a type K, beside Fused<K>, which product.cu describes:
//   CHUNK      inputs whose codes are taken together            GROUP     inputs with a scale of their own: 16 or 32
//   TOGETHER   groups that follow each other and have one scale, if it is for more than 32 inputs
//   HALVES     lane t has the inputs 4t to 4t + 3 and 16 + 4t to 16 + 4t + 3 of each 32, not 8t to 8t + 7
//   place      where number i of a lane's codes of 32 inputs is among these
//   shrunk     by which power of two a register's codes are too large
//   RAISED     what is added to them, large as they are          ZERO      and to codes of the right size
//   AFFINE     whether something is added to a scaled code      PLAIN     whether scales are always 1
//   EXPONENT   by which power of two the sums are too small     BESIDE    bytes between rows in shared memory, modulo 128
//   codes      CHUNK / 4 codes of a row's stage, two to a register, of lane t of four
//   scales     of the groups 2 i and 2 i + 1 of a stage: what sums are multiplied with, and Σ x

template <class K>
struct Coded;

struct CodedBasics {
    static const int CHUNK = 32, GROUP = 32, TOGETHER = 1, RAISED = 1024, ZERO = 0, EXPONENT = 0, BESIDE = 16;
    static const bool HALVES = false, AFFINE = false, PLAIN = false;
    __device__ static constexpr int place(int i) { return i; }
    __device__ static constexpr int shrunk(int block, int i) { return 0; }
    // Four whole bytes in order, as two registers.
    __device__ static void bytes(u32 w, u32* a) {
        a[0] = __byte_perm(w, 0x64646464u, 0x4140u), a[1] = __byte_perm(w, 0x64646464u, 0x4342u);
    }
    // A word that follows the first `offset` and 4t bytes of a row, an even number.
    __device__ static u32 word(const u8* row, int offset, int t) {
        const u32* words = (const u32*)(row + offset / 4 * 4 + 4 * t);
        return offset % 4 ? __byte_perm(words[0], words[1], 0x5432u) : words[0];
    }
    // Words of eight signed bytes that follow the first `offset` and 8t of a row; this is a multiple of four away.
    __device__ static void signed_bytes(const u8* row, int offset, int t, u32* a) {
        const int shift = offset % 4 * 8;
        const u32* words = (const u32*)(row + offset / 4 * 4 + 8 * t);
        const u32 w[3] = {words[0], words[1], shift ? words[2] : 0};
#pragma unroll
        for (int i = 0; i < 2; i++) bytes((shift ? __funnelshift_r(w[i], w[i + 1], shift) : w[i]) ^ 0x80808080u, a + 2 * i);
    }
    // The eight nibbles of a word: 0 and 4, 1 and 5, ... two of these times 16.
    __device__ static void nibbles(u32 w, u32* a) {
        a[0] = and_or(w, 0x000F000Fu, 0x64006400u), a[1] = and_or(w, 0x00F000F0u, 0x64006400u);
        w >>= 8;
        a[2] = and_or(w, 0x000F000Fu, 0x64006400u), a[3] = and_or(w, 0x00F000F0u, 0x64006400u);
    }
};

// Codes as Fused<K> has them.
template <class K>
struct CodedAsFused : CodedBasics {
    typedef Fused<K> F;
    static const int CHUNK = F::CHUNK;
    __device__ static constexpr int place(int i) { return F::Order::place(i); }
    __device__ static void codes(const u8* const* part, int chunk, int t, u32* a) {
        float s[F::GROUPS], b[F::GROUPS];
        typename F::Row row(part[0]);
        F::template load<PairsF16>(part[0], row, chunk, t, a, s, b);
    }
};
