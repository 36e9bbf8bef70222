/* What the parts of the reader share. */
#ifndef UQFF_INTERNAL_H
#define UQFF_INTERNAL_H

#include "uqff.h"

/* An entry of a safetensors file. */
typedef struct {
    const char *name;
    size_t name_size;
    int file;
    int other; /* which dtype of safetensors, if none of tensor.md */
    uqff_tensor tensor;
} uqff_entry;

typedef struct {
    uqff_entry *entries;
    size_t count, room;
    char *names; /* one block for the names of all files */
    size_t used;
} uqff_entries;

uqff_status uqff_fail(uqff_error *error, uqff_status status, const char *rule, const char *where, size_t size, const char *problem);
#define FAIL(status, rule, where, problem) return uqff_fail(error, status, rule, where, strlen(where), problem)

/* header.c: the entries of one file, behind those of the files before it. */
uqff_status uqff_read_header(uqff_bytes file, int number, uqff_entries *out, uqff_error *error);

/* layer.c: the rules that span several parts, the same in both generations; gives the layer its shape. */
uqff_status uqff_check_layer(uqff_layer *layer, uqff_error *error);
uqff_status uqff_blocks_bytes(const uqff_layer *layer, uint64_t *bytes, uqff_error *error);
uint64_t uqff_itemsize(int dtype); /* 0 of an unknown one */
/* Whether a product of dimensions is at most `limit`, and which it is. */
int uqff_product(const uint64_t *shape, int ndim, uint64_t limit, uint64_t *product);

uint32_t uqff_u32(const unsigned char *at);
float uqff_number(int dtype, const unsigned char *at);

#endif
