// What the threads of a GPU compute, one after the other.

template <class K, int RUN>
void decode_all(const Weight& weight, float* out) {
    for (i64 at = 0; at < weight.number[0]; at += RUN) {
        float values[RUN];
        if (at + RUN <= weight.number[0]) K::template decode<RUN, true>(weight, at, values);
        else K::template decode<RUN, false>(weight, at, values);
        for (int i = 0; i < RUN && at + i < weight.number[0]; i++) out[at + i] = values[i];
    }
}

static double product_of_pairs(u32 a, u32 b) {
    return (double)bfloat(a & 0xFFFF) * bfloat(b & 0xFFFF) + (double)bfloat(a >> 16) * bfloat(b >> 16);
}

// x Wᵀ of one row of x, whole stages; what lanes load and arrange, added up in double: y with codes, z with rounded
// weights.
template <class K>
void multiply_all(const Weight& weight, const i64* row_bytes, const u8* x, double* y, double* z, int rows, int inputs) {
    typedef Fused<K> F;
    const int REGISTERS = F::CHUNK / 8, EACH = REGISTERS / F::GROUPS;
    for (int row = 0; row < rows; row++) {
        double sum = 0, rounded = 0;
        for (int stage = 0; stage < inputs / STAGE; stage++) {
            alignas(16) u8 held[F::PITCH + 16];
            int at = 0;
            for (int part = 0; part < F::PARTS; at += F::BYTES[part++])
                memcpy(held + at, weight.part[part] + row * row_bytes[part] + (i64)stage * F::BYTES[part], F::BYTES[part]);
            typename F::Row prepared(held);
            for (int chunk = 0; chunk < STAGE / F::CHUNK; chunk++)
                for (int t = 0; t < 4; t++) {
                    u32 a[REGISTERS], pairs[REGISTERS];
                    float s[F::GROUPS], b[F::GROUPS];
                    F::template load<PairsBF16>(held, prepared, chunk, t, a, s, b);
                    const u8* from = x + (stage * STAGE + chunk * F::CHUNK) * 2;
                    arrange<F>(from, true, t, pairs);
                    // Settled, they are the same in order.
                    alignas(16) u8 own[F::CHUNK * 2];
                    u32 again[REGISTERS];
                    memcpy(own, from, sizeof own);
                    for (u8* eight = own; eight < own + sizeof own; eight += 16) F::Order::settle((u32*)eight);
                    settled<F>(own, t, again);
                    if (memcmp(pairs, again, sizeof pairs)) sum = NAN;
                    for (int k = 0; k < REGISTERS; k++) {
                        sum += s[k / EACH] * product_of_pairs(a[k], pairs[k]);
                        if (F::AFFINE) sum += b[k / EACH] * product_of_pairs(PairsBF16::ONES, pairs[k]);
                    }
                    const u8* image = from;
                    if constexpr (F::template direct<PairsBF16>()) {
                        F::template rounded<PairsBF16>(held, prepared, chunk, t, a);
                        image = own;
                    } else scaled<F, PairsBF16>(s, b, a);
                    settled<F>(image, t, pairs);
                    for (int k = 0; k < REGISTERS; k++) {
                        rounded += product_of_pairs(a[k], pairs[k]);
                        // And what a step of the wide instruction has, two halves of each.
                        u32 word;
                        memcpy(&word, image + 64 * (k / 4) + 4 * F::Order::word(k % 4 / 2, k % 2, t), 4);
                        if (word != pairs[k]) rounded = NAN;
                    }
                }
        }
        y[row] = sum * F::finish(weight), z[row] = rounded * F::finish(weight);
    }
}

// The weights that float16 codes and the scales of groups stand for.
template <class K>
void coded_all(const Weight& weight, const i64* row_bytes, float* out, int rows, int inputs) {
    typedef Fused<K> F;
    typedef Coded<K> C;
    for (int row = 0; row < rows; row++)
        for (int stage = 0; stage < inputs / STAGE; stage++) {
            alignas(16) u8 held[3][320];
            const u8* part[3] = {held[0], held[1], held[2]};
            for (int i = 0; i < F::PARTS; i++)
                memcpy(held[i], weight.part[i] + row * row_bytes[i] + (i64)stage * F::BYTES[i], F::BYTES[i]);
            for (int chunk = 0; chunk < STAGE / C::CHUNK; chunk++)
                for (int t = 0; t < 4; t++) {
                    u32 a[C::CHUNK / 8];
                    C::codes(part, chunk, t, a);
                    for (int i = 0; i < C::CHUNK / 4; i++) {
                        const int block = (chunk * C::CHUNK + i / 8 * 32) / 32, at = C::place(i % 8);
                        const int input = 32 * block + (C::HALVES ? 16 * (at / 4) + 4 * t + at % 4 : 8 * t + at);
                        float s[2], m[2] = {};
                        C::scales(part, input / C::GROUP / 2, s, m);
                        const int group = input / C::GROUP % 2;
                        const float code = half_to_float(a[i / 2] >> 16 * (i % 2) & 0xFFFF) - C::RAISED;
                        const float whole = std::ldexp(code, C::EXPONENT - C::shrunk(block, i % 8 / 2)) - C::ZERO;
                        out[(i64)row * inputs + stage * STAGE + input] = (s[group] * whole + m[group]) * F::finish(weight);
                    }
                }
        }
}
