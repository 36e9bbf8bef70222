// Sums and gathers over ranks whose GPUs see each other's memory.  Each rank has, at the same places:
//
//     boards  [2][BOARDS][BOARD]      bytes that it shows to the others
//     wide    [2][WIDE]               a larger one
//     turns   [BOARDS + 1][PEERS]     how often each rank has shown something there
//
// A block has one board, or the only one the wide board.  It puts its bytes there, tells every rank so, waits until all
// have told it, and reads theirs.  The next time it takes the other half: a rank that tells of turn n + 1 has read what
// was shown at turn n, so that when all have, turn n + 2 may overwrite it.  A rank that waits in vain gives up, now and at
// all later turns, and tells its host.
const int PEERS = 8, BOARDS = 64, BOARD = 8192, WIDE = 65536;

struct Peer {
    u8* boards[PEERS];   // of each rank, as this one sees them
    u32* turns[PEERS];   // likewise
    u32* count;          // [BOARDS + 2]: turns of this rank's blocks so far, of its wide one, whether it has given up
    u32* failed;         // the host's: set when it gives up
    const u8* x;
    u8* out;
    u64 patience;        // nanoseconds
    int bytes, each;     // of x; of them, a block's at most: a multiple of 16
    int rank, ranks;
};

__device__ inline int bytes_of_block(const Peer& peer) {
    const int left = peer.bytes - (int)blockIdx.x * peer.each;
    return left < peer.each ? left : peer.each;
}

// 4 or 16 bytes at such an address; those that another rank has shown have just been written.
template <int UNIT>
__device__ inline void copy_unit(u8* to, const u8* from) {
    if (UNIT == 4) *(u32*)to = *(const u32*)from;
    else {
        u32 words[4];
        load_words<4>(from, words);
        write_four(to, words);
    }
}

template <int UNIT>
__device__ inline void copy_shown(u8* to, const u8* from) {
    u32 words[4];
    if (UNIT == 4) *(u32*)to = load_volatile((const u32*)from);
    else load_shown<4>(from, words), write_four(to, words);
}

// Shows the bytes of this block; where they lie on each rank's boards.
template <int UNIT>
__device__ inline int show(const Peer& peer, int block, u32* turn) {
    const int begin = blockIdx.x * peer.each, half = (int)((*turn = peer.count[block] + 1) & 1);
    const int count = bytes_of_block(peer);
    const int board = block < BOARDS ? (half * BOARDS + block) * BOARD : 2 * BOARDS * BOARD + half * WIDE;
    for (int at = UNIT * (int)threadIdx.x; at < count; at += UNIT * blockDim.x)
        copy_unit<UNIT>(peer.boards[peer.rank] + board + at, peer.x + begin + at);
    __syncthreads();
    if ((int)threadIdx.x < peer.ranks) {
        const int of = block * PEERS;
        tell_ranks(peer.turns[threadIdx.x] + of + peer.rank, *turn);
        const u64 begun = nanoseconds();
        while ((int)(told_by_ranks(peer.turns[peer.rank] + of + threadIdx.x) - *turn) < 0 &&
               !load_volatile(peer.count + BOARDS + 1)) {
            if (nanoseconds() - begun <= peer.patience) continue;
            peer.count[BOARDS + 1] = 1;
            tell_ranks(peer.failed, 1);
        }
    }
    __syncthreads();
    return board;
}

__device__ inline void end_turn(const Peer& peer, int block, u32 turn) {
    __syncthreads();
    if (threadIdx.x == 0) peer.count[block] = turn;
}

// Numbers at such a place of all boards, added up.
template <class T, int COUNT>
__device__ inline void sum_of_ranks(const Peer& peer, int at, float* sums) {
    const int WORDS = COUNT * T::SIZE / 4;
    u32 words[PEERS][WORDS];
#pragma unroll
    for (int rank = 0; rank < PEERS; rank++)
        if (rank < peer.ranks) load_shown<WORDS>(peer.boards[rank] + at, words[rank]);
    for (int i = 0; i < COUNT; i++) sums[i] = T::load((const u8*)words[0] + i * T::SIZE);
#pragma unroll
    for (int rank = 1; rank < PEERS; rank++)
        if (rank < peer.ranks)
            for (int i = 0; i < COUNT; i++) sums[i] += T::load((const u8*)words[rank] + i * T::SIZE);
}

// out = the sum of every rank's x, in the order of ranks, in float32.
template <class T>
__device__ inline void sum_ranks(const Peer& peer) {
    const int EACH = 16 / T::SIZE, begin = blockIdx.x * peer.each;
    const int count = bytes_of_block(peer);
    u32 turn;
    const int board = show<16>(peer, blockIdx.x, &turn);
    for (int at = 16 * (int)threadIdx.x; at < count; at += 16 * blockDim.x) {
        float sums[EACH];
        sum_of_ranks<T, EACH>(peer, board + at, sums);
        for (int i = 0; i < EACH; i += 4) put_four<T>(peer.out + begin + at + i * T::SIZE, sums + i);
    }
    end_turn(peer, blockIdx.x, turn);
}

// out = every rank's x, one after the other.
template <class T, int UNIT>
__device__ inline void gather_ranks(const Peer& peer) {
    const int begin = blockIdx.x * peer.each;
    const int count = bytes_of_block(peer);
    u32 turn;
    const int board = show<UNIT>(peer, blockIdx.x, &turn);
    for (int rank = 0; rank < peer.ranks; rank++)
        for (int at = UNIT * (int)threadIdx.x; at < count; at += UNIT * blockDim.x)
            copy_shown<UNIT>(peer.out + (i64)rank * peer.bytes + begin + at, peer.boards[rank] + board + at);
    end_turn(peer, blockIdx.x, turn);
}

// add_norm of what is the sum of every rank's x, rounded as sum_ranks does it.
struct PeerNorm {
    Peer peer;
    Norm norm;
};

template <class T>
struct OfRanks {
    const Peer& peer;
    int board;
    __device__ bool there() const { return true; }
    __device__ void get(int at, float* values) const {
        sum_of_ranks<T, 4>(peer, board + at * T::SIZE, values);
        for (int i = 0; i < 4; i++) values[i] = rounded<T>(values[i]);
    }
};

template <class T>
__device__ inline void sum_add_norm(const PeerNorm& both) {
    u32 turn;
    const int board = show<16>(both.peer, BOARDS, &turn);
    add_and_norm<T>(both.norm, OfRanks<T>{both.peer, board});
    end_turn(both.peer, BOARDS, turn);
}
