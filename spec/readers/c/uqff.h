/* A reader of UQFF, both generations: C99 and its standard library, nothing else.
 *
 * Written from the pages of this specification, which say why; the names are theirs.  Layers are views of the bytes
 * that the caller keeps in memory; a weight is decoded number by number, in any order.
 */
#ifndef UQFF_H
#define UQFF_H

#include <stddef.h>
#include <stdint.h>

#define UQFF_MAX_RANK 8

typedef struct {
    const unsigned char *data;
    size_t size;
} uqff_bytes;

typedef enum {
    UQFF_OK,
    UQFF_FORMAT,      /* a rule is broken */
    UQFF_UNSUPPORTED, /* of another version or family */
    UQFF_SHAPE,       /* weight and bias do not fit each other */
    UQFF_SHARD,       /* files that do not make up a set */
    UQFF_MEMORY       /* no memory left for the list of entries */
} uqff_status;

typedef struct {
    uqff_status status;
    const char *rule;  /* id of the rule that is broken, as in rules.md; empty where memory was short */
    int file;          /* which of the files */
    char where[128];   /* entry or field, as far as it fits */
    char problem[128]; /* in words */
} uqff_error;

/* Codes of tensor.md; those behind F8E4M3 cannot be stored in a layer, but may stand in a file of 1.x. */
typedef enum {
    UQFF_U8, UQFF_U32, UQFF_I32, UQFF_I64, UQFF_F16, UQFF_BF16, UQFF_F32, UQFF_F64, UQFF_I16, UQFF_F8E4M3,
    UQFF_OTHER
} uqff_dtype;

typedef struct {
    int dtype;
    int ndim;
    uint64_t shape[UQFF_MAX_RANK];
    uqff_bytes data;
} uqff_tensor;

typedef enum { UQFF_GGUF, UQFF_UNQUANT, UQFF_HQQ, UQFF_FP8, UQFF_AFQ, UQFF_F8Q8, UQFF_MXFP4 } uqff_family;

typedef struct {
    const char *key; /* UTF-8, not terminated; the digits of an index before 1.0; NULL in a blob alone */
    size_t key_size;
    uint32_t version[3];
    uqff_family family;
    int ndim; /* of the logical weight */
    uint64_t shape[UQFF_MAX_RANK];
    uint64_t count; /* of its numbers */
    int has_bias;
    uqff_tensor bias;

    /* What the family keeps; see its page. */
    uqff_tensor codes, scales, zeros; /* zeros: of HQQ, and the biases of AFQ's groups */
    uint32_t ggml_type, bits, group_size, axis;
    float scale; /* dequant_w_scale of FP8 */
} uqff_layer;

typedef struct {
    uqff_layer *layers; /* sorted by key as bytes; before 1.0 by index */
    size_t count;
    uint32_t version[3]; /* of 1.x; 0 before, where every blob has its own */
    void *names;         /* what keys point into */
} uqff_model;

/* One pre-1.0 blob. */
uqff_status uqff_read_blob(uqff_bytes blob, uqff_layer *layer, uqff_error *error);

/* All shards of one model, in order.  The bytes stay the caller's, and must outlive the model. */
uqff_status uqff_read(const uqff_bytes *shards, int count, uqff_model *model, uqff_error *error);
void uqff_free(uqff_model *model);

/* Number i of the weight, row major, and of the bias. */
float uqff_weight(const uqff_layer *layer, uint64_t i);
float uqff_bias(const uqff_layer *layer, uint64_t i);

/* The type within the family: q4_0, hqq3, afq4, ...; at least 16 bytes of text. */
void uqff_kind(const uqff_layer *layer, char *text);
const char *uqff_family_name(uqff_family family);
const char *uqff_dtype_name(int dtype);

#endif
