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

// x Wᵀ of one row of x, whole stages; what lanes load and arrange, added up in double.
template <class K>
void multiply_all(const Weight& weight, const i64* row_bytes, const u8* x, double* y, int rows, int inputs) {
    typedef Fused<K> F;
    const int REGISTERS = F::CHUNK / 8, EACH = REGISTERS / F::GROUPS;
    for (int row = 0; row < rows; row++) {
        double sum = 0;
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
                    F::arrange(x + (stage * STAGE + chunk * F::CHUNK) * 2, true, t, pairs);
                    for (int k = 0; k < REGISTERS; k++) {
                        float low = bfloat(pairs[k] & 0xFFFF), high = bfloat(pairs[k] >> 16);
                        double c = (double)bfloat(a[k] & 0xFFFF) * low + (double)bfloat(a[k] >> 16) * high;
                        sum += s[k / EACH] * c + (F::AFFINE ? b[k / EACH] * ((double)low + high) : 0);
                    }
                }
        }
        y[row] = sum * F::finish(weight);
    }
}
