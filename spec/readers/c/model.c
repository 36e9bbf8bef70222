/* tensor.md: blobs; container.md: files of blobs; entries.md: files of entries. */
#include <stdlib.h>
#include <string.h>

#include "internal.h"

uqff_status uqff_fail(uqff_error *error, uqff_status status, const char *rule, const char *where, size_t size, const char *problem) {
    error->rule = rule;
    if (size > sizeof error->where - 1) size = sizeof error->where - 1;
    memcpy(error->where, where, size);
    error->where[size] = 0;
    size = strlen(problem) < sizeof error->problem ? strlen(problem) : sizeof error->problem - 1;
    memcpy(error->problem, problem, size);
    error->problem[size] = 0;
    return error->status = status;
}

/* ------------------------------------------------------------------------------------------------ blobs */

typedef struct {
    const unsigned char *at, *end;
    unsigned version; /* its place among those that were ever written */
    uqff_error *error;
} cursor;

static const unsigned char *take(cursor *c, uint64_t count) {
    const unsigned char *at = c->at;
    if (count > (uint64_t)(c->end - c->at)) return NULL;
    c->at += count;
    return at;
}

static int take_u8(cursor *c, uint32_t *out) {
    const unsigned char *at = take(c, 1);
    if (at != NULL) *out = *at;
    return at != NULL;
}

static int take_u32(cursor *c, uint32_t *out) {
    const unsigned char *at = take(c, 4);
    if (at != NULL) *out = uqff_u32(at);
    return at != NULL;
}

static uqff_status take_shape(cursor *c, uint64_t *shape, int *ndim, const char *where) {
    uqff_error *error = c->error;
    uint32_t count, size;
    if (!take_u32(c, &count)) FAIL(UQFF_FORMAT, "BLOB-01", where, "truncated");
    if (count > UQFF_MAX_RANK) FAIL(UQFF_FORMAT, "BLOB-12", where, "more than 8 dimensions");
    for (uint32_t i = 0; i < count; i++) {
        if (!take_u32(c, &size)) FAIL(UQFF_FORMAT, "BLOB-01", where, "truncated");
        if (size == 0) FAIL(UQFF_FORMAT, "BLOB-12", where, "dimension is 0");
        shape[i] = size;
    }
    *ndim = (int)count;
    return UQFF_OK;
}

/* length, dtype, ndim, shape, data */
static uqff_status take_tensor(cursor *c, uqff_tensor *out, const char *where) {
    static const unsigned char since[] = {0, 0, 0, 0, 0, 0, 0, 0, 1, 2};
    uqff_error *error = c->error;
    uqff_status status;
    uint32_t length, dtype;
    uint64_t elements;
    if (!take_u32(c, &length) || !take_u32(c, &dtype)) FAIL(UQFF_FORMAT, "BLOB-01", where, "truncated");
    if (dtype >= UQFF_OTHER) FAIL(UQFF_FORMAT, dtype < 14 ? "BLOB-11" : "BLOB-10", where, "dtype is unknown or reserved");
    if (since[dtype] > c->version) FAIL(UQFF_FORMAT, "BLOB-06", where, "dtype did not exist yet");
    out->dtype = (int)dtype;
    if ((status = take_shape(c, out->shape, &out->ndim, where)) != UQFF_OK) return status;
    if (!uqff_product(out->shape, out->ndim, UINT64_MAX / 8, &elements)) FAIL(UQFF_FORMAT, "BLOB-01", where, "tensor is too large");
    out->data.size = (size_t)(elements * uqff_itemsize(out->dtype));
    if ((uint32_t)(elements * uqff_itemsize(out->dtype)) != length) FAIL(UQFF_FORMAT, "BLOB-09", where, "length is not that of dtype and shape");
    out->data.data = take(c, elements * uqff_itemsize(out->dtype));
    if (out->data.data == NULL) FAIL(UQFF_FORMAT, "BLOB-01", where, "truncated");
    return UQFF_OK;
}

static uqff_status take_body(cursor *c, uqff_layer *layer, uint32_t blocks) {
    uqff_error *error = c->error;
    uqff_status status = UQFF_OK;
    const unsigned char *at;
    uint32_t number, flag;
    uint64_t bytes;
    switch (layer->family) {
    case UQFF_GGUF: /* `blocks` is data_length, which stands before the bias flag */
        if (!take_u32(c, &layer->ggml_type)) FAIL(UQFF_FORMAT, "BLOB-01", "ggml_dtype", "truncated");
        if ((status = take_shape(c, layer->shape, &layer->ndim, "shape")) != UQFF_OK) return status;
        if ((status = uqff_blocks_bytes(layer, &bytes, error)) != UQFF_OK) return status;
        if ((uint32_t)bytes != blocks) FAIL(UQFF_FORMAT, "BLOB-09", "data_length", "not the bytes of the blocks");
        layer->codes.data.size = (size_t)bytes;
        if ((layer->codes.data.data = take(c, bytes)) == NULL) FAIL(UQFF_FORMAT, "BLOB-01", "data", "truncated");
        return UQFF_OK;
    case UQFF_UNQUANT: return take_tensor(c, &layer->codes, "weight");
    case UQFF_HQQ:
        if ((status = take_tensor(c, &layer->codes, "w_q")) != UQFF_OK) return status;
        if ((status = take_tensor(c, &layer->scales, "scales")) != UQFF_OK) return status;
        if ((status = take_tensor(c, &layer->zeros, "zeros")) != UQFF_OK) return status;
        if ((status = take_shape(c, layer->shape, &layer->ndim, "shape")) != UQFF_OK) return status;
        if (!take_u8(c, &layer->bits)) FAIL(UQFF_FORMAT, "BLOB-01", "bits", "truncated");
        if (!take_u32(c, &layer->group_size)) FAIL(UQFF_FORMAT, "BLOB-01", "group_size", "truncated");
        if (!take_u8(c, &layer->axis)) FAIL(UQFF_FORMAT, "BLOB-01", "axis", "truncated");
        if (!take_u32(c, &number)) FAIL(UQFF_FORMAT, "BLOB-01", "optimization_steps", "truncated");
        for (int i = 0; i < 2; i++) {
            if (!take_u8(c, &flag)) FAIL(UQFF_FORMAT, "BLOB-01", i == 0 ? "round_zeros" : "channel_wise", "truncated");
            if (flag > 1) FAIL(UQFF_FORMAT, i == 0 ? "HQQ-04" : "HQQ-05", i == 0 ? "round_zeros" : "channel_wise", "0 or 1");
        }
        return UQFF_OK;
    case UQFF_FP8:
        if ((status = take_tensor(c, &layer->codes, "weight")) != UQFF_OK) return status;
        if ((at = take(c, 12)) == NULL) FAIL(UQFF_FORMAT, "BLOB-01", "scales", "truncated");
        layer->scale = uqff_number(UQFF_F32, at);
        if (!take_u32(c, &number)) FAIL(UQFF_FORMAT, "BLOB-01", "dtype", "truncated");
        if (number != UQFF_F8E4M3) FAIL(UQFF_FORMAT, "FP8-02", "dtype", "always 9");
        return UQFF_OK;
    case UQFF_AFQ:
        if ((status = take_tensor(c, &layer->codes, "w_q")) != UQFF_OK) return status;
        if ((status = take_tensor(c, &layer->scales, "scales")) != UQFF_OK) return status;
        if ((status = take_tensor(c, &layer->zeros, "biases")) != UQFF_OK) return status;
        if (!take_u8(c, &layer->bits)) FAIL(UQFF_FORMAT, "BLOB-01", "bits", "truncated");
        if (!take_u8(c, &layer->group_size)) FAIL(UQFF_FORMAT, "BLOB-01", "group_size", "truncated");
        return UQFF_OK;
    case UQFF_F8Q8:
        if (!take_u32(c, &number)) FAIL(UQFF_FORMAT, "BLOB-01", "num_blocks", "truncated");
        if ((status = take_shape(c, layer->shape, &layer->ndim, "shape")) != UQFF_OK) return status;
        layer->codes.data.size = (size_t)number * 33;
        if ((layer->codes.data.data = take(c, (uint64_t)number * 33)) == NULL) FAIL(UQFF_FORMAT, "BLOB-01", "data", "truncated");
        return UQFF_OK;
    default:
        if ((status = take_tensor(c, &layer->codes, "blocks")) != UQFF_OK) return status;
        return take_tensor(c, &layer->scales, "scales");
    }
}

uqff_status uqff_read_blob(uqff_bytes blob, uqff_layer *layer, uqff_error *error) {
    static const uint32_t versions[] = {0x000100, 0x000101, 0x000102, 0x000103, 0x000200};
    static const unsigned char since[] = {0, 0, 0, 2, 3, 4, 4};
    cursor c = {blob.data, blob.data + blob.size, 0, error};
    uqff_status status;
    uint32_t version, family, flag, length = 0;
    memset(layer, 0, sizeof *layer);
    if (!take_u32(&c, &version)) FAIL(UQFF_FORMAT, "BLOB-01", "version", "truncated");
    while (c.version < 5 && versions[c.version] != version) c.version++;
    if (c.version == 5) FAIL(UQFF_UNSUPPORTED, "BLOB-03", "version", "unknown version");
    layer->version[0] = version >> 16;
    layer->version[1] = version >> 8 & 255;
    layer->version[2] = version & 255;
    if (!take_u8(&c, &family)) FAIL(UQFF_FORMAT, "BLOB-01", "quant_type", "truncated");
    if (family > UQFF_MXFP4) FAIL(UQFF_UNSUPPORTED, "BLOB-04", "quant_type", "unknown family");
    if (since[family] > c.version) FAIL(UQFF_FORMAT, "BLOB-05", "version", "the family did not exist yet");
    layer->family = (uqff_family)family;
    if (family == UQFF_GGUF && !take_u32(&c, &length)) FAIL(UQFF_FORMAT, "BLOB-01", "data_length", "truncated");
    if (!take_u8(&c, &flag)) FAIL(UQFF_FORMAT, "BLOB-01", "bias_flag", "truncated");
    if (flag > 1) FAIL(UQFF_FORMAT, "BLOB-07", "bias_flag", "0 or 1");
    layer->has_bias = (int)flag;
    if ((status = take_body(&c, layer, length)) != UQFF_OK) return status;
    if (flag && (status = take_tensor(&c, &layer->bias, "bias")) != UQFF_OK) return status;
    if (c.at != c.end) FAIL(UQFF_FORMAT, "BLOB-02", "blob", "bytes behind the last field");
    return uqff_check_layer(layer, error);
}

/* ------------------------------------------------------------------------------------------------ names of entries */

static int ends_with(const char *name, size_t size, const char *end) {
    size_t length = strlen(end);
    return size >= length && memcmp(name + size - length, end, length) == 0;
}

static int equals(const char *name, size_t size, const char *other) { return size == strlen(other) && memcmp(name, other, size) == 0; }

static int is_number(const uqff_entry *entry) {
    for (size_t i = 0; i < entry->name_size; i++)
        if (entry->name[i] < '0' || entry->name[i] > '9') return 0;
    return entry->name_size > 0;
}

static const char *const VERSION[] = {"uqff.version.major", "uqff.version.minor", "uqff.version.patch"};

static int version_of(const uqff_entry *entry) {
    for (int i = 0; i < 3; i++)
        if (equals(entry->name, entry->name_size, VERSION[i])) return i;
    return -1;
}

/* ------------------------------------------------------------------------------------------------ files of blobs */

static int by_index(const void *one, const void *two) {
    const uqff_layer *a = one, *b = two;
    const char *p = a->key, *q = b->key;
    size_t n = a->key_size, m = b->key_size;
    while (n > 1 && *p == '0') p++, n--;
    while (m > 1 && *q == '0') q++, m--;
    if (n != m) return n < m ? -1 : 1;
    return memcmp(p, q, n);
}

static uqff_status read_blobs(const uqff_entries *all, uqff_model *model, uqff_error *error) {
    for (size_t i = 0; i < all->count; i++) {
        const uqff_entry *entry = &all->entries[i];
        uqff_layer *layer = &model->layers[model->count++];
        error->file = entry->file;
        if (!is_number(entry) || entry->name_size > 9) FAIL(UQFF_FORMAT, "FILE-18", "index", "key is no number of one to nine digits");
        if (entry->tensor.dtype != UQFF_U8 || entry->tensor.ndim != 1) FAIL(UQFF_FORMAT, "FILE-20", "index", "blob is not U8 of one dimension");
        uqff_status status = uqff_read_blob(entry->tensor.data, layer, error);
        if (status != UQFF_OK) return status;
        layer->key = entry->name;
        layer->key_size = entry->name_size;
    }
    if (model->count > 0) qsort(model->layers, model->count, sizeof *model->layers, by_index);
    for (size_t i = 1; i < model->count; i++)
        if (by_index(&model->layers[i - 1], &model->layers[i]) == 0) FAIL(UQFF_FORMAT, "FILE-19", "index", "two keys are one number");
    return UQFF_OK;
}

/* ------------------------------------------------------------------------------------------------ files of entries */

/* What the tables of entries.md say: suffix, families as bits, dtypes as bits, dimensions (-1: any from one on). */
#define D(dtype) (1u << (dtype))
#define PLAIN (D(UQFF_F32) | D(UQFF_F16) | D(UQFF_BF16))
#define ANY 0x3ffu

static const struct {
    const char *suffix;
    unsigned families;
    unsigned dtypes[7];
    signed char ndim[7];
} TABLE[] = {
    {"bias", 0x7f, {ANY, ANY, ANY, ANY, ANY, ANY, ANY}, {-1, -1, -1, -1, -1, -1, -1}},
    {"weight", 0x7f, {D(UQFF_U8), ANY, D(UQFF_U8) | D(UQFF_I32), D(UQFF_F8E4M3), D(UQFF_U32), D(UQFF_U8), D(UQFF_U8)}, {1, -1, 2, -1, -1, 1, -1}},
    {"weight.format", 0x7f, {0}, {0}},
    {"weight.dtype", 0x09, {D(UQFF_U32), 0, 0, D(UQFF_U32)}, {0}},
    {"weight.shape", 0x25, {D(UQFF_U32), 0, D(UQFF_U32), 0, 0, D(UQFF_U32)}, {1, 0, 1, 0, 0, 1}},
    {"weight.scales", 0x54, {0, 0, PLAIN, 0, PLAIN, 0, D(UQFF_U8)}, {0, 0, 2, 0, -1, 0, -1}},
    {"weight.zeros", 0x04, {0, 0, PLAIN}, {0, 0, 2}},
    {"weight.bits", 0x14, {0, 0, D(UQFF_U8), 0, D(UQFF_U8)}, {0}},
    {"weight.group_size", 0x14, {0, 0, D(UQFF_U32), 0, D(UQFF_U8)}, {0}},
    {"weight.axis", 0x04, {0, 0, D(UQFF_U8)}, {0}},
    {"weight.optimization_steps", 0x04, {0, 0, D(UQFF_U32)}, {0}},
    {"weight.round_zeros", 0x04, {0, 0, D(UQFF_U8)}, {0}},
    {"weight.channel_wise", 0x04, {0, 0, D(UQFF_U8)}, {0}},
    {"weight.dequant_w_scale", 0x08, {0, 0, 0, D(UQFF_F32)}, {0}},
    {"weight.dequant_x_scale", 0x08, {0, 0, 0, D(UQFF_F32)}, {0}},
    {"weight.quant_scale", 0x08, {0, 0, 0, D(UQFF_F32)}, {0}},
    {"weight.biases", 0x10, {0, 0, 0, 0, PLAIN}, {0, 0, 0, 0, -1}},
    {"weight.num_blocks", 0x20, {0, 0, 0, 0, 0, D(UQFF_U32)}, {0}},
};
#define SUFFIXES (sizeof TABLE / sizeof *TABLE)

/* Where the suffix of a name begins, and which row of the table it is; SUFFIXES if none. */
static size_t suffix_of(const uqff_entry *entry, size_t *key_size) {
    size_t last = entry->name_size, before;
    while (last > 0 && entry->name[last - 1] != '.') last--; /* begin of the last word */
    before = last;
    if (!equals(entry->name + last, entry->name_size - last, "weight") && !equals(entry->name + last, entry->name_size - last, "bias")
        && ends_with(entry->name, last, "weight.") && (last == 7 || entry->name[last - 8] == '.'))
        before = last - 7;
    *key_size = before == 0 ? 0 : before - 1;
    for (size_t i = 0; i < SUFFIXES; i++)
        if (equals(entry->name + before, entry->name_size - before, TABLE[i].suffix)) return i;
    return SUFFIXES;
}

static const uqff_entry *find(const uqff_entries *all, const char *key, size_t size, const char *suffix) {
    size_t low = 0, high = all->count, length = strlen(suffix);
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        const uqff_entry *entry = &all->entries[middle];
        /* compare with key + "." + suffix */
        size_t n = entry->name_size, k = n < size ? n : size;
        int order = memcmp(entry->name, key, k);
        if (order == 0 && n <= size) order = -1;
        if (order == 0) order = (unsigned char)entry->name[size] - '.';
        if (order == 0) {
            size_t rest = n - size - 1, m = rest < length ? rest : length;
            order = memcmp(entry->name + size + 1, suffix, m);
            if (order == 0) order = (rest > length) - (rest < length);
        }
        if (order == 0) return entry;
        if (order < 0) low = middle + 1; else high = middle;
    }
    return NULL;
}

static uint32_t value(const uqff_entry *entry) {
    return entry->tensor.dtype == UQFF_U32 ? uqff_u32(entry->tensor.data.data) : entry->tensor.data.data[0];
}

static uqff_status read_layer(const uqff_entries *all, const uqff_entry *format, size_t key_size, const uint32_t *version, uqff_layer *layer, uqff_error *error) {
    const uqff_entry *parts[SUFFIXES];
    memset(layer, 0, sizeof *layer);
    error->file = format->file;
    if (format->tensor.dtype != UQFF_U8 || format->tensor.ndim != 0) FAIL(UQFF_FORMAT, "ENT-03", "weight.format", "U8 []");
    uint32_t family = value(format);
    if (family > UQFF_MXFP4) FAIL(UQFF_UNSUPPORTED, "ENT-04", "weight.format", "unknown family");
    if (family == UQFF_UNQUANT && version[1] < 1) FAIL(UQFF_FORMAT, "ENT-05", "weight.format", "the family did not exist yet");
    layer->family = (uqff_family)family;
    layer->key = format->name;
    layer->key_size = key_size;
    memcpy(layer->version, version, sizeof layer->version);
    for (size_t i = 0; i < SUFFIXES; i++) {
        parts[i] = find(all, layer->key, key_size, TABLE[i].suffix);
        if (strcmp(TABLE[i].suffix, "weight.format") == 0) continue;
        if (!(TABLE[i].families >> family & 1)) {
            if (parts[i] != NULL) FAIL(UQFF_FORMAT, "ENT-02", TABLE[i].suffix, "entry of another family");
            continue;
        }
        if (parts[i] == NULL) {
            if (i == 0) continue; /* the bias */
            FAIL(UQFF_FORMAT, "ENT-01", TABLE[i].suffix, "missing entry");
        }
        error->file = parts[i]->file;
        int dtype = parts[i]->tensor.dtype, ndim = TABLE[i].ndim[family];
        if (dtype == UQFF_OTHER || !(TABLE[i].dtypes[family] & D(dtype))) FAIL(UQFF_FORMAT, "ENT-07", TABLE[i].suffix, "another dtype");
        if (ndim >= 0 ? parts[i]->tensor.ndim != ndim : parts[i]->tensor.ndim < 1) FAIL(UQFF_FORMAT, i == 0 ? "BLOB-08" : "ENT-08", TABLE[i].suffix, "another number of dimensions");
        if (strcmp(TABLE[i].suffix, "bias") == 0) layer->bias = parts[i]->tensor, layer->has_bias = 1;
        else if (strcmp(TABLE[i].suffix, "weight") == 0) layer->codes = parts[i]->tensor;
        else if (strcmp(TABLE[i].suffix, "weight.scales") == 0) layer->scales = parts[i]->tensor;
        else if (strcmp(TABLE[i].suffix, "weight.zeros") == 0) layer->zeros = parts[i]->tensor;
        else if (strcmp(TABLE[i].suffix, "weight.biases") == 0) layer->zeros = parts[i]->tensor;
        else if (strcmp(TABLE[i].suffix, "weight.bits") == 0) layer->bits = value(parts[i]);
        else if (strcmp(TABLE[i].suffix, "weight.group_size") == 0) layer->group_size = value(parts[i]);
        else if (strcmp(TABLE[i].suffix, "weight.axis") == 0) layer->axis = value(parts[i]);
        else if (strcmp(TABLE[i].suffix, "weight.dequant_w_scale") == 0) layer->scale = uqff_number(UQFF_F32, parts[i]->tensor.data.data);
        else if (strcmp(TABLE[i].suffix, "weight.dtype") == 0) {
            if (family == UQFF_FP8 && value(parts[i]) != UQFF_F8E4M3) FAIL(UQFF_FORMAT, "FP8-02", "weight.dtype", "always 9");
            if (family == UQFF_GGUF) layer->ggml_type = value(parts[i]);
        } else if (strcmp(TABLE[i].suffix, "weight.round_zeros") == 0 || strcmp(TABLE[i].suffix, "weight.channel_wise") == 0) {
            if (value(parts[i]) > 1) FAIL(UQFF_FORMAT, TABLE[i].suffix[7] == 'r' ? "HQQ-04" : "HQQ-05", TABLE[i].suffix, "0 or 1");
        } else if (strcmp(TABLE[i].suffix, "weight.shape") == 0) {
            if (parts[i]->tensor.shape[0] < 1 || parts[i]->tensor.shape[0] > UQFF_MAX_RANK) FAIL(UQFF_FORMAT, "BLOB-12", "weight.shape", "1 to 8 dimensions");
            layer->ndim = (int)parts[i]->tensor.shape[0];
            for (int k = 0; k < layer->ndim; k++) layer->shape[k] = uqff_u32(parts[i]->tensor.data.data + 4 * k);
        }
    }
    const uqff_entry *blocks = find(all, layer->key, key_size, "weight.num_blocks");
    if (blocks != NULL && (uint64_t)value(blocks) * 33 != layer->codes.data.size) FAIL(UQFF_FORMAT, "ENT-17", "weight.num_blocks", "not the blocks of the weight");
    uqff_status status = uqff_check_layer(layer, error);
    if (status != UQFF_OK) return status;
    int flat = family == UQFF_HQQ || family == UQFF_FP8 || family == UQFF_F8Q8;
    if (flat && layer->ndim > 2 && version[1] >= 2) FAIL(UQFF_FORMAT, "ENT-06", "weight", "stacked weights of this family ended with 1.1");
    return UQFF_OK;
}

static uqff_status read_versions(const uqff_entries *all, uint32_t *version, uqff_error *error) {
    int have = 0;
    for (size_t i = 0; i < all->count; i++) {
        const uqff_entry *entry = &all->entries[i];
        int which = version_of(entry);
        if (which < 0) continue;
        error->file = entry->file;
        if (entry->tensor.dtype != UQFF_U32 || entry->tensor.ndim != 0) FAIL(UQFF_FORMAT, "ENT-11", VERSION[which], "U32 []");
        if (have >> which & 1 && version[which] != value(entry)) FAIL(UQFF_SHARD, "ENT-15", VERSION[which], "shards of two versions");
        version[which] = value(entry);
        have |= 1 << which;
    }
    if (have != 7) FAIL(UQFF_FORMAT, "ENT-09", "uqff.version", "missing version entry");
    if (version[0] != 1 || version[1] > 2) FAIL(UQFF_UNSUPPORTED, "ENT-10", "uqff.version", "unknown version");
    return UQFF_OK;
}

static uqff_status read_entries(uqff_entries *all, uqff_model *model, uqff_error *error) {
    uqff_status status = read_versions(all, model->version, error);
    size_t key_size;
    for (size_t i = 0; status == UQFF_OK && i < all->count; i++) {
        const uqff_entry *entry = &all->entries[i];
        const uqff_entry *before = i == 0 ? NULL : &all->entries[i - 1];
        error->file = entry->file;
        if (is_number(entry)) FAIL(UQFF_FORMAT, "ENT-12", "index", "a blob among entries");
        if (version_of(entry) >= 0) continue;
        if (before != NULL && before->name_size == entry->name_size && memcmp(before->name, entry->name, entry->name_size) == 0)
            FAIL(UQFF_SHARD, "ENT-16", "entry", "entry occurs in two shards");
        size_t suffix = suffix_of(entry, &key_size);
        if (suffix == SUFFIXES || TABLE[suffix].suffix[0] == 'b') continue;
        if (strcmp(TABLE[suffix].suffix, "weight") == 0) continue;
        if (key_size == 0) FAIL(UQFF_FORMAT, "ENT-13", TABLE[suffix].suffix, "layer has no key");
        if (strcmp(TABLE[suffix].suffix, "weight.format") == 0)
            status = read_layer(all, entry, key_size, model->version, &model->layers[model->count++], error);
        else if (find(all, entry->name, key_size, "weight.format") == NULL)
            FAIL(UQFF_FORMAT, "ENT-14", TABLE[suffix].suffix, "no weight.format beside the entry");
    }
    return status;
}

/* ------------------------------------------------------------------------------------------------ both */

static int by_name(const void *one, const void *two) {
    const uqff_entry *a = one, *b = two;
    int order = memcmp(a->name, b->name, a->name_size < b->name_size ? a->name_size : b->name_size);
    return order != 0 ? order : (a->name_size > b->name_size) - (a->name_size < b->name_size);
}

static uqff_status read_set(const uqff_bytes *shards, int count, uqff_entries *all, uqff_model *model, uqff_error *error) {
    size_t room = 1;
    int entries = 0;
    for (int i = 0; i < count; i++) {
        if (shards[i].size >= 8) { /* names take no more than the headers; a header no more than its file */
            uint64_t n = uqff_u32(shards[i].data) | (uint64_t)uqff_u32(shards[i].data + 4) << 32;
            room += n < shards[i].size ? (size_t)n : shards[i].size;
        }
    }
    if ((all->names = malloc(room)) == NULL) FAIL(UQFF_MEMORY, "", "names", "no memory");
    for (int i = 0; i < count; i++) {
        uqff_status status = uqff_read_header(shards[i], i, all, error);
        if (status != UQFF_OK) return status;
    }
    for (size_t i = 0; i < all->count; i++)
        entries |= version_of(&all->entries[i]) >= 0 || ends_with(all->entries[i].name, all->entries[i].name_size, ".weight.format");
    if (all->count > 0) qsort(all->entries, all->count, sizeof *all->entries, by_name);
    if ((model->layers = calloc(all->count + 1, sizeof *model->layers)) == NULL) FAIL(UQFF_MEMORY, "", "layers", "no memory");
    return entries ? read_entries(all, model, error) : read_blobs(all, model, error);
}

uqff_status uqff_read(const uqff_bytes *shards, int count, uqff_model *model, uqff_error *error) {
    uqff_entries all = {NULL, 0, 0, NULL, 0};
    memset(model, 0, sizeof *model);
    memset(error, 0, sizeof *error);
    uqff_status status = read_set(shards, count, &all, model, error);
    free(all.entries);
    model->names = all.names;
    if (status != UQFF_OK) uqff_free(model);
    return status;
}

void uqff_free(uqff_model *model) {
    free(model->layers);
    free(model->names);
    memset(model, 0, sizeof *model);
}
