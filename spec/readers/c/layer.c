/* The pages of the families: what the parts of a layer must fulfil together, and the value of each number.
 *
 * Arithmetic is on float, one operation after the other (README.md, "Arithmetic"): compile without fused products
 * (-std=c99, or -ffp-contract=off) and without -ffast-math.
 */
#include <float.h>
#include <stdio.h>
#include <string.h>

#include "internal.h"

#if FLT_EVAL_METHOD != 0
#error "float must be computed as float (on 32-bit x86: -msse2 -mfpmath=sse)"
#endif

#define MAX_NUMBERS (UINT64_MAX / 512) /* of a weight, whose bytes then fit 64 bits; no file has as many */

/* ------------------------------------------------------------------------------------------------ numbers */

uint32_t uqff_u32(const unsigned char *at) {
    return (uint32_t)at[0] | (uint32_t)at[1] << 8 | (uint32_t)at[2] << 16 | (uint32_t)at[3] << 24;
}

static float of_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static uint32_t u16(const unsigned char *at) { return (uint32_t)at[0] | (uint32_t)at[1] << 8; }
static uint64_t u64(const unsigned char *at) { return uqff_u32(at) | (uint64_t)uqff_u32(at + 4) << 32; }
static int32_t i8(unsigned char byte) { return byte < 128 ? byte : (int32_t)byte - 256; }
static float f32(const unsigned char *at) { return of_bits(uqff_u32(at)); }

/* s eeeee mmmmmmmmmm */
static float f16(const unsigned char *at) {
    uint32_t h = u16(at), sign = (h & 0x8000) << 16, exponent = h >> 10 & 31, mantissa = h & 0x3ff;
    if (exponent == 31) return of_bits(sign | 0x7f800000 | mantissa << 13);
    if (exponent != 0) return of_bits(sign | (exponent + 112) << 23 | mantissa << 13);
    float magnitude = (float)mantissa * (1.0f / 16777216.0f); /* 2^-24, exact */
    return sign ? -magnitude : magnitude;
}

/* s eeee mmm */
static float e4m3(unsigned char code) {
    uint32_t sign = (uint32_t)(code & 0x80) << 24, exponent = code >> 3 & 15, mantissa = code & 7;
    if ((code & 0x7f) == 0x7f) return of_bits(sign | 0x7fc00000);
    if (exponent != 0) return of_bits(sign | (exponent + 120) << 23 | mantissa << 20);
    float magnitude = (float)mantissa * (1.0f / 512.0f);
    return sign ? -magnitude : magnitude;
}

float uqff_number(int dtype, const unsigned char *at) {
    uint64_t bits;
    int64_t integer;
    double wide;
    switch (dtype) {
    case UQFF_U8: return (float)at[0];
    case UQFF_U32: return (float)uqff_u32(at);
    case UQFF_I32: return (float)(uqff_u32(at) < 0x80000000u ? (int64_t)uqff_u32(at) : (int64_t)uqff_u32(at) - 0x100000000);
    case UQFF_I64:
        bits = u64(at);
        memcpy(&integer, &bits, 8);
        return (float)integer;
    case UQFF_F16: return f16(at);
    case UQFF_BF16: return of_bits(u16(at) << 16);
    case UQFF_F32: return f32(at);
    case UQFF_F64:
        bits = u64(at);
        memcpy(&wide, &bits, 8);
        return (float)wide;
    case UQFF_I16: return (float)(u16(at) < 0x8000 ? (int32_t)u16(at) : (int32_t)u16(at) - 0x10000);
    default: return e4m3(at[0]);
    }
}

uint64_t uqff_itemsize(int dtype) {
    static const unsigned char sizes[] = {1, 4, 4, 8, 2, 2, 4, 8, 2, 1};
    return dtype >= 0 && dtype < UQFF_OTHER ? sizes[dtype] : 0;
}

int uqff_product(const uint64_t *shape, int ndim, uint64_t limit, uint64_t *product) {
    *product = 1;
    for (int i = 0; i < ndim; i++)
        if (shape[i] == 0) *product = 0;
    for (int i = 0; i < ndim && *product != 0; i++) {
        if (shape[i] > limit / *product) return 0;
        *product *= shape[i];
    }
    return 1;
}

/* ------------------------------------------------------------------------------------------------ families/gguf.md */

static const struct {
    unsigned code;
    const char *name;
    unsigned weights, bytes;
} GGML[] = {
    {0, "f32", 1, 4},
    {1, "f16", 1, 2},
    {2, "q4_0", 32, 2 + 16},
    {3, "q4_1", 32, 2 + 2 + 16},
    {6, "q5_0", 32, 2 + 4 + 16},
    {7, "q5_1", 32, 2 + 2 + 4 + 16},
    {8, "q8_0", 32, 2 + 32},
    {9, "q8_1", 32, 2 + 2 + 32},
    {10, "q2k", 256, 16 + 64 + 2 + 2},
    {11, "q3k", 256, 32 + 64 + 12 + 2},
    {12, "q4k", 256, 2 + 2 + 12 + 128},
    {13, "q5k", 256, 2 + 2 + 12 + 32 + 128},
    {14, "q6k", 256, 128 + 64 + 16 + 2},
    {15, "q8k", 256, 4 + 256 + 32},
    {30, "bf16", 1, 2},
};

static int ggml(uint32_t code) {
    for (int i = 0; i < (int)(sizeof GGML / sizeof *GGML); i++)
        if (GGML[i].code == code) return i;
    return -1;
}

/* Bytes of the blocks of a weight, whose shape is known. */
uqff_status uqff_blocks_bytes(const uqff_layer *layer, uint64_t *bytes, uqff_error *error) {
    int type = ggml(layer->ggml_type);
    uint64_t count;
    if (type < 0) FAIL(UQFF_FORMAT, "GGUF-01", "ggml_dtype", "unknown type");
    if (layer->ndim < 1) FAIL(UQFF_FORMAT, "BLOB-12", "shape", "weight has no dimensions");
    if (layer->shape[layer->ndim - 1] % GGML[type].weights != 0) FAIL(UQFF_FORMAT, "GGUF-02", "shape", "blocks of a row are not whole");
    if (!uqff_product(layer->shape, layer->ndim, MAX_NUMBERS, &count)) FAIL(UQFF_FORMAT, layer->key == NULL ? "BLOB-09" : "ENT-17", "shape", "weight is too large");
    *bytes = count / GGML[type].weights * GGML[type].bytes;
    return UQFF_OK;
}

/* Codes of 32-blocks: byte j holds element j low, j + 16 high. */
static int nibble(const unsigned char *qs, int i) { return qs[i % 16] >> 4 * (i / 16) & 15; }
/* Codes of Q4K and Q5K: byte 32c + l holds elements 64c + l low, 64c + 32 + l high. */
static int nibble_k(const unsigned char *qs, int i) { return qs[32 * (i / 64) + i % 32] >> 4 * (i % 64 / 32) & 15; }
/* Two bits of Q2K, Q3K, Q6K: byte 32h + l holds elements 128h + l, + 32, + 64, + 96, lowest bits first. */
static int pair(const unsigned char *qs, int i) { return qs[32 * (i / 128) + i % 32] >> 2 * (i % 128 / 32) & 3; }
/* Bit b of byte l belongs to element 32b + l. */
static int plane(const unsigned char *qh, int i) { return qh[i % 32] >> i / 32 & 1; }

/* d * s * q - dmin * m of Q4K and Q5K, of sub-block i / 32. */
static float scaled(const unsigned char *b, int i, int q) {
    const unsigned char *s = b + 4;
    int j = i / 32, scale, minimum;
    if (j < 4) {
        scale = s[j] & 63;
        minimum = s[4 + j] & 63;
    } else {
        scale = (s[4 + j] & 15) | s[j - 4] >> 6 << 4;
        minimum = s[4 + j] >> 4 | s[j] >> 6 << 4;
    }
    float step = f16(b) * (float)scale, below = f16(b + 2) * (float)minimum;
    float value = step * (float)q;
    return value - below;
}

static float block_weight(uint32_t code, const unsigned char *b, int i) {
    float step;
    int q, j = i / 16;
    switch (code) {
    case 0: return f32(b);
    case 1: return f16(b);
    case 30: return of_bits(u16(b) << 16);
    case 2: return f16(b) * (float)(nibble(b + 2, i) - 8);
    case 3:
        step = f16(b) * (float)nibble(b + 4, i);
        return step + f16(b + 2);
    case 6:
        q = nibble(b + 6, i) | (int)(uqff_u32(b + 2) >> i & 1) << 4;
        return f16(b) * (float)(q - 16);
    case 7:
        q = nibble(b + 8, i) | (int)(uqff_u32(b + 4) >> i & 1) << 4;
        step = f16(b) * (float)q;
        return step + f16(b + 2);
    case 8: return f16(b) * (float)i8(b[2 + i]);
    case 9: return f16(b) * (float)i8(b[4 + i]);
    case 10: {
        float below = f16(b + 82) * (float)(b[j] >> 4);
        step = f16(b + 80) * (float)(b[j] & 15);
        step = step * (float)pair(b + 16, i);
        return step - below;
    }
    case 11: {
        const unsigned char *s = b + 96;
        int scale = (s[j % 8] >> 4 * (j / 8) & 15) | (s[8 + j % 4] >> 2 * (j / 4) & 3) << 4;
        q = pair(b + 32, i) | plane(b, i) << 2;
        step = f16(b + 108) * (float)(scale - 32);
        return step * (float)(q - 4);
    }
    case 12: return scaled(b, i, nibble_k(b + 16, i));
    case 13: return scaled(b, i, nibble_k(b + 48, i) | plane(b + 16, i) << 4);
    case 14:
        q = (b[64 * (i / 128) + i % 64] >> 4 * (i % 128 / 64) & 15) | pair(b + 128, i) << 4;
        step = f16(b + 208) * (float)i8(b[192 + j]);
        return step * (float)(q - 32);
    default: return f32(b) * (float)i8(b[4 + i]);
    }
}

/* ------------------------------------------------------------------------------------------------ one number */

float uqff_weight(const uqff_layer *layer, uint64_t i) {
    const unsigned char *codes = layer->codes.data.data;
    uint64_t in = layer->shape[layer->ndim - 1];
    float product;
    switch (layer->family) {
    case UQFF_GGUF: {
        int type = ggml(layer->ggml_type);
        return block_weight(layer->ggml_type, codes + i / GGML[type].weights * GGML[type].bytes, (int)(i % GGML[type].weights));
    }
    case UQFF_UNQUANT: return uqff_number(layer->codes.dtype, codes + i * uqff_itemsize(layer->codes.dtype));
    case UQFF_HQQ: {
        uint64_t rows = layer->codes.shape[0], columns = layer->codes.shape[1];
        uint64_t row = i / columns, column = i % columns, group = layer->axis == 0 ? column : row;
        uint64_t at = row % rows * columns + column;
        unsigned digit = (unsigned)(row / rows), digits = layer->bits == 3 ? 10 : 8 / layer->bits;
        uint32_t word = layer->bits == 3 ? uqff_u32(codes + 4 * at) : codes[at];
        uint32_t code = word >> layer->bits * (digits - 1 - digit) & ((1u << layer->bits) - 1);
        uint64_t item = uqff_itemsize(layer->scales.dtype);
        float zero = uqff_number(layer->zeros.dtype, layer->zeros.data.data + group * item);
        float difference = (float)code - zero;
        return difference * uqff_number(layer->scales.dtype, layer->scales.data.data + group * item);
    }
    case UQFF_FP8: return e4m3(codes[i]) * layer->scale;
    case UQFF_AFQ: {
        uint64_t bit = i % in * layer->bits, group = i / layer->group_size, item = uqff_itemsize(layer->scales.dtype);
        const unsigned char *at = codes + i / in * (in * layer->bits / 8) + bit / 8;
        uint32_t code = at[0];
        if (bit % 8 + layer->bits > 8) code |= (uint32_t)at[1] << 8;
        code = code >> bit % 8 & ((1u << layer->bits) - 1);
        product = (float)code * uqff_number(layer->scales.dtype, layer->scales.data.data + group * item);
        return product + uqff_number(layer->zeros.dtype, layer->zeros.data.data + group * item);
    }
    case UQFF_F8Q8: {
        const unsigned char *block = codes + i / 32 * 33;
        float step = e4m3(block[0]) / 416.0f;
        return (float)i8(block[1 + i % 32]) * step;
    }
    default: {
        static const float values[] = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f};
        int code = codes[i / 2] >> 4 * (i % 2) & 15;
        float magnitude = values[code & 7];
        return (code & 8 ? -magnitude : magnitude) * of_bits((uint32_t)layer->scales.data.data[i / 32] << 23);
    }
    }
}

float uqff_bias(const uqff_layer *layer, uint64_t i) {
    return uqff_number(layer->bias.dtype, layer->bias.data.data + i * uqff_itemsize(layer->bias.dtype));
}

/* ------------------------------------------------------------------------------------------------ rules of a layer */

static int same_shape(const uqff_tensor *tensor, const uint64_t *shape, int ndim) {
    return tensor->ndim == ndim && memcmp(tensor->shape, shape, (size_t)ndim * sizeof *shape) == 0;
}

static int plain(int dtype) { return dtype == UQFF_F32 || dtype == UQFF_F16 || dtype == UQFF_BF16; }

static int one_of(uint32_t value, const char *values) { return value > 0 && value < 256 && strchr(values, (int)value) != NULL; }

/* The logical shape: that of the codes, with another last dimension. */
static void shape_of(uqff_layer *layer, uint64_t last) {
    memcpy(layer->shape, layer->codes.shape, sizeof layer->shape);
    layer->ndim = layer->codes.ndim;
    layer->shape[layer->ndim - 1] = last;
}

static uqff_status check_hqq(uqff_layer *layer, uqff_error *error) {
    static const uint64_t per_word[] = {0, 8, 4, 10, 2, 0, 0, 0, 1};
    if (!one_of(layer->bits, "\1\2\3\4\10")) FAIL(UQFF_FORMAT, "HQQ-01", "bits", "1, 2, 3, 4 or 8");
    if (layer->axis > 1) FAIL(UQFF_FORMAT, "HQQ-03", "axis", "0 or 1");
    if (layer->group_size == 0) FAIL(UQFF_FORMAT, "HQQ-02", "group_size", "at least 1");
    if (layer->codes.dtype != (layer->bits == 3 ? UQFF_I32 : UQFF_U8)) FAIL(UQFF_FORMAT, "HQQ-06", "w_q", "U8, for 3 bits I32");
    if (!plain(layer->scales.dtype)) FAIL(UQFF_FORMAT, "HQQ-07", "scales", "F32, F16 or BF16");
    if (layer->zeros.dtype != layer->scales.dtype) FAIL(UQFF_FORMAT, "HQQ-08", "zeros", "the dtype of the scales");
    if (layer->count % layer->group_size != 0) FAIL(UQFF_FORMAT, "HQQ-09", "shape", "groups are not whole");
    uint64_t groups = layer->count / layer->group_size, p = per_word[layer->bits];
    uint64_t rows = layer->axis == 0 ? layer->group_size : groups, columns = layer->axis == 0 ? groups : layer->group_size;
    if (layer->bits != 3 && rows % p != 0) FAIL(UQFF_FORMAT, "HQQ-10", "w_q", "elements are not full");
    uint64_t packed[2] = {rows / p + (rows % p != 0), columns};
    uint64_t each[2] = {layer->axis == 0 ? 1 : groups, layer->axis == 0 ? groups : 1};
    if (!same_shape(&layer->codes, packed, 2)) FAIL(UQFF_FORMAT, "HQQ-11", "w_q", "shape is not that of the groups");
    if (!same_shape(&layer->scales, each, 2)) FAIL(UQFF_FORMAT, "HQQ-11", "scales", "shape is not that of the groups");
    if (!same_shape(&layer->zeros, each, 2)) FAIL(UQFF_FORMAT, "HQQ-11", "zeros", "shape is not that of the groups");
    return UQFF_OK;
}

static uqff_status check_afq(uqff_layer *layer, uqff_error *error) {
    uint64_t groups[UQFF_MAX_RANK], words = layer->codes.shape[layer->codes.ndim - 1];
    if (layer->codes.dtype != UQFF_U32) FAIL(UQFF_FORMAT, "AFQ-03", "w_q", "U32");
    if (!plain(layer->scales.dtype)) FAIL(UQFF_FORMAT, "AFQ-04", "scales", "F32, F16 or BF16");
    if (layer->zeros.dtype != layer->scales.dtype) FAIL(UQFF_FORMAT, "AFQ-05", "biases", "the dtype of the scales");
    if (!one_of(layer->bits, "\2\3\4\6\10")) FAIL(UQFF_FORMAT, "AFQ-01", "bits", "2, 3, 4, 6 or 8");
    if (!one_of(layer->group_size, "\40\100\200")) FAIL(UQFF_FORMAT, "AFQ-02", "group_size", "32, 64 or 128");
    if (words * 32 % (layer->group_size * layer->bits) != 0) FAIL(UQFF_FORMAT, "AFQ-06", "w_q", "groups of a row are not whole");
    shape_of(layer, words * 32 / layer->bits);
    memcpy(groups, layer->shape, sizeof groups);
    groups[layer->ndim - 1] /= layer->group_size;
    if (!same_shape(&layer->scales, groups, layer->ndim)) FAIL(UQFF_FORMAT, "AFQ-07", "scales", "not one for each group");
    if (!same_shape(&layer->zeros, groups, layer->ndim)) FAIL(UQFF_FORMAT, "AFQ-07", "biases", "not one for each group");
    return UQFF_OK;
}

static uqff_status check_mxfp4(uqff_layer *layer, uqff_error *error) {
    uint64_t blocks[UQFF_MAX_RANK], bytes = layer->codes.shape[layer->codes.ndim - 1];
    if (layer->codes.dtype != UQFF_U8) FAIL(UQFF_FORMAT, "MXFP4-01", "blocks", "U8");
    if (layer->scales.dtype != UQFF_U8) FAIL(UQFF_FORMAT, "MXFP4-01", "scales", "U8");
    if (bytes % 16 != 0) FAIL(UQFF_FORMAT, "MXFP4-02", "blocks", "blocks of a row are not whole");
    shape_of(layer, bytes * 2);
    memcpy(blocks, layer->shape, sizeof blocks);
    blocks[layer->ndim - 1] /= 32;
    if (!same_shape(&layer->scales, blocks, layer->ndim)) FAIL(UQFF_FORMAT, "MXFP4-03", "scales", "not one for each block");
    return UQFF_OK;
}

/* Families whose blob states the shape have set `shape` and `ndim` already. */
uqff_status uqff_check_layer(uqff_layer *layer, uqff_error *error) {
    uqff_status status = UQFF_OK;
    uint64_t bytes, size = layer->codes.data.size;
    int states_shape = layer->family == UQFF_GGUF || layer->family == UQFF_HQQ || layer->family == UQFF_F8Q8;
    if ((states_shape ? layer->ndim : layer->codes.ndim) < 1) FAIL(UQFF_FORMAT, "BLOB-12", "shape", "weight has no dimensions");
    if (layer->family == UQFF_FP8 && layer->codes.dtype != UQFF_F8E4M3) FAIL(UQFF_FORMAT, "FP8-01", "weight", "F8E4M3");
    if (layer->family == UQFF_UNQUANT || layer->family == UQFF_FP8) shape_of(layer, layer->codes.shape[layer->codes.ndim - 1]);
    if (layer->family == UQFF_AFQ) status = check_afq(layer, error);
    if (layer->family == UQFF_MXFP4) status = check_mxfp4(layer, error);
    if (status != UQFF_OK) return status;
    for (int i = 0; i < layer->ndim; i++)
        if (layer->shape[i] == 0) FAIL(UQFF_FORMAT, "BLOB-12", "shape", "dimension is 0");
    if (!uqff_product(layer->shape, layer->ndim, MAX_NUMBERS, &layer->count))
        FAIL(UQFF_FORMAT, layer->family == UQFF_F8Q8 ? "F8Q8-01" : layer->key == NULL ? "BLOB-09" : "ENT-17", "shape", "weight is too large");

    if (layer->family == UQFF_GGUF) {
        if ((status = uqff_blocks_bytes(layer, &bytes, error)) != UQFF_OK) return status;
        if (size != bytes) FAIL(UQFF_FORMAT, "ENT-17", "data", "not the bytes of the blocks");
    }
    if (layer->family == UQFF_F8Q8 && size != (layer->count + 31) / 32 * 33) FAIL(UQFF_FORMAT, "F8Q8-01", "num_blocks", "not the blocks of the weight");
    if (layer->family == UQFF_HQQ && (status = check_hqq(layer, error)) != UQFF_OK) return status;

    if (layer->has_bias) { /* [out], or with dimensions of the stack before it */
        int ndim = layer->bias.ndim;
        if (ndim < 1 || ndim >= layer->ndim || !same_shape(&layer->bias, layer->shape + layer->ndim - 1 - ndim, ndim))
            FAIL(UQFF_SHAPE, "BLOB-08", "bias.shape", "bias does not fit weight");
    }
    return UQFF_OK;
}

/* ------------------------------------------------------------------------------------------------ names */

const char *uqff_family_name(uqff_family family) {
    static const char *const names[] = {"GGUF", "Unquant", "HQQ", "FP8", "AFQ", "F8Q8", "MXFP4"};
    return names[family];
}

const char *uqff_dtype_name(int dtype) {
    static const char *const names[] = {"U8", "U32", "I32", "I64", "F16", "BF16", "F32", "F64", "I16", "F8E4M3"};
    return dtype >= 0 && dtype < UQFF_OTHER ? names[dtype] : "other";
}

void uqff_kind(const uqff_layer *layer, char *out) {
    static const char *const names[] = {"", "unquant", "hqq", "fp8", "afq", "f8q8", "mxfp4"};
    if (layer->family == UQFF_GGUF) strcpy(out, GGML[ggml(layer->ggml_type)].name);
    else if (layer->family == UQFF_HQQ || layer->family == UQFF_AFQ) sprintf(out, "%s%u", names[layer->family], (unsigned)layer->bits);
    else strcpy(out, names[layer->family]);
}
