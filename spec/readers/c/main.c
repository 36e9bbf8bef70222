/* uqff-read FILE... | -: what a blob (.bin), or the shards of a model (.uqff), hold, as JSON.
 *
 * The report is that of the conformance runner: outcome, error, and each layer with all of its numbers in hexadecimal.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "uqff.h"

static void put_text(const char *text, size_t size) {
    putchar('"');
    for (size_t i = 0; i < size; i++) {
        unsigned char c = (unsigned char)text[i];
        if (c < 0x20 || c == '"' || c == '\\') printf("\\u%04x", c);
        else putchar(c);
    }
    putchar('"');
}

static void put_shape(const uint64_t *shape, int ndim) {
    putchar('[');
    for (int i = 0; i < ndim; i++) printf("%s%llu", i ? ", " : "", (unsigned long long)shape[i]);
    putchar(']');
}

static void put_floats(const uqff_layer *layer, uint64_t count, float (*number)(const uqff_layer *, uint64_t)) {
    putchar('"');
    for (uint64_t i = 0; i < count; i++) {
        float value = number(layer, i);
        uint32_t bits;
        memcpy(&bits, &value, 4);
        for (int at = 0; at < 4; at++) printf("%02x", (unsigned)(bits >> 8 * at & 255));
    }
    putchar('"');
}

static void put_layer(const uqff_layer *layer) {
    char kind[16];
    uqff_kind(layer, kind);
    printf("{\"key\": ");
    if (layer->key == NULL) printf("null");
    else put_text(layer->key, layer->key_size);
    printf(", \"version\": \"%u.%u.%u\", \"family\": \"%s\", \"kind\": \"%s\", \"shape\": ", (unsigned)layer->version[0],
           (unsigned)layer->version[1], (unsigned)layer->version[2], uqff_family_name(layer->family), kind);
    put_shape(layer->shape, layer->ndim);
    printf(", \"float32\": ");
    put_floats(layer, layer->count, uqff_weight);
    printf(", \"bias\": ");
    if (layer->has_bias) {
        uint64_t count = 1;
        for (int i = 0; i < layer->bias.ndim; i++) count *= layer->bias.shape[i];
        printf("{\"dtype\": \"%s\", \"shape\": ", uqff_dtype_name(layer->bias.dtype));
        put_shape(layer->bias.shape, layer->bias.ndim);
        printf(", \"float32\": ");
        put_floats(layer, count, uqff_bias);
        printf("}}");
    } else {
        printf("null}");
    }
}

static int load(const char *path, uqff_bytes *out) {
    FILE *file = fopen(path, "rb");
    long size;
    unsigned char *data = NULL;
    if (file == NULL || fseek(file, 0, SEEK_END) != 0 || (size = ftell(file)) < 0 || fseek(file, 0, SEEK_SET) != 0
        || (data = malloc((size_t)size + 1)) == NULL || fread(data, 1, (size_t)size, file) != (size_t)size) {
        if (file != NULL) fclose(file);
        free(data);
        return 0;
    }
    fclose(file);
    out->data = data;
    out->size = (size_t)size;
    return 1;
}

/* container.md, "Shards": the number of <stem>-<i>.uqff; -1 of another name. */
static long shard_number(const char *path) {
    const char *end = strrchr(path, '.'), *at = end;
    long number = 0;
    if (end == NULL || strcmp(end, ".uqff") != 0) return -1;
    while (at > path && at[-1] >= '0' && at[-1] <= '9') at--;
    if (at == end || at == path || at[-1] != '-' || end - at > 6) return -1;
    for (; at < end; at++) number = number * 10 + (*at - '0');
    return number;
}

/* Whether the files, given in order, are the shards 0, 1, ... of a set; a file alone may have any name. */
static int is_set(char **paths, int count) {
    if (count == 1) return 1;
    for (int i = 0; i < count; i++)
        if (shard_number(paths[i]) != i) return 0;
    return 1;
}

/* The report on one case; 0 accepted, 1 refused, 2 not to be read. */
static int read_case(char **paths, int count) {
    static const char *const names[] = {"", "FormatError", "UnsupportedError", "ShapeError", "ShardError", "MemoryError"};
    uqff_error error;
    uqff_model model;
    uqff_layer layer;
    uqff_status status;
    uqff_bytes *files = calloc((size_t)count, sizeof *files);
    int is_blob, code = 0;
    if (files == NULL) return 2;
    for (int i = 0; i < count; i++) {
        if (!load(paths[i], &files[i])) {
            fprintf(stderr, "%s: cannot be read\n", paths[i]);
            code = 2;
        }
    }
    memset(&error, 0, sizeof error);
    memset(&model, 0, sizeof model);
    is_blob = count == 1 && strlen(paths[0]) > 4 && strcmp(paths[0] + strlen(paths[0]) - 4, ".bin") == 0;
    if (code != 0) {
        status = UQFF_OK;
    } else if (is_blob) {
        status = uqff_read_blob(files[0], &layer, &error);
    } else if (is_set(paths, count)) {
        status = uqff_read(files, count, &model, &error);
    } else {
        status = error.status = UQFF_SHARD;
        error.rule = "FILE-17";
        strcpy(error.where, "shards");
        strcpy(error.problem, "numbers do not run from 0 without a gap");
    }
    if (status != UQFF_OK) {
        printf("{\"outcome\": \"refuse\", \"rule\": \"%s\", \"error\": \"%s\", \"file\": %d, \"where\": ", error.rule, names[status], error.file);
        put_text(error.where, strlen(error.where));
        printf(", \"problem\": ");
        put_text(error.problem, strlen(error.problem));
        printf("}\n");
        code = 1;
    } else if (code == 0) {
        printf("{\"outcome\": \"accept\", \"layers\": [");
        if (is_blob) put_layer(&layer);
        for (size_t i = 0; i < model.count; i++) {
            if (i > 0) printf(", ");
            put_layer(&model.layers[i]);
        }
        printf("]}\n");
        uqff_free(&model);
    }
    for (int i = 0; i < count; i++) free((void *)files[i].data);
    free(files);
    return code;
}

/* Cases from standard input, a line each, paths separated by tabs; a line of JSON for each. */
static int read_cases(void) {
    static char line[65536];
    while (fgets(line, sizeof line, stdin) != NULL) {
        char *paths[256], *path;
        int count = 0;
        line[strcspn(line, "\n")] = 0;
        for (path = strtok(line, "\t"); path != NULL && count < 256; path = strtok(NULL, "\t")) paths[count++] = path;
        if (count > 0 && read_case(paths, count) == 2) return 2;
        fflush(stdout);
    }
    return 0;
}

int main(int argc, char **argv) {
    if (argc < 2) {
        fprintf(stderr, "usage: uqff-read FILE.bin | FILE.uqff... | - (cases from standard input, a line each)\n");
        return 2;
    }
    return argc == 2 && strcmp(argv[1], "-") == 0 ? read_cases() : read_case(argv + 1, argc - 1);
}
