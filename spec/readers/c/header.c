/* container.md, "Framing": the header of a safetensors file, with all of its rules.
 *
 * The grammar of a header is fixed, so this is no parser of JSON at large: what no rule allows is refused where it is
 * met.  Nothing is allocated but names and entries, which are no more than some times the header.
 */
#include <stdlib.h>
#include <string.h>

#include "internal.h"

#define MAX_HEADER_BYTES 100000000u
#define MAX_HEADER_VALUES 600000u
#define MAX_DIMENSION 0x7fffffffffffffffu

typedef struct {
    const unsigned char *at, *end;
    char *names; /* room for as many bytes as are left of the header */
    size_t used;
    uqff_error *error;
} parser;

typedef struct {
    const char *data;
    size_t size;
} text;

static const struct {
    const char *name;
    int dtype;
    uint64_t bits;
} DTYPES[] = {
    {"U8", UQFF_U8, 8},     {"U32", UQFF_U32, 32},   {"I32", UQFF_I32, 32},         {"I64", UQFF_I64, 64},
    {"F16", UQFF_F16, 16},   {"BF16", UQFF_BF16, 16}, {"F32", UQFF_F32, 32},         {"F64", UQFF_F64, 64},
    {"I16", UQFF_I16, 16},   {"F8_E4M3", UQFF_F8E4M3, 8},
    {"BOOL", UQFF_OTHER, 8}, {"I8", UQFF_OTHER, 8},  {"U16", UQFF_OTHER, 16},       {"U64", UQFF_OTHER, 64},
    {"F8_E5M2", UQFF_OTHER, 8}, {"F8_E8M0", UQFF_OTHER, 8}, {"C64", UQFF_OTHER, 64},
    {"F4", UQFF_OTHER, 4},   {"F6_E2M3", UQFF_OTHER, 6}, {"F6_E3M2", UQFF_OTHER, 6},
};

static uqff_status bad(parser *p, const char *rule, const char *problem) {
    return uqff_fail(p->error, UQFF_FORMAT, rule, "header", 6, problem);
}

static void space(parser *p) {
    while (p->at < p->end && (*p->at == ' ' || *p->at == '\t' || *p->at == '\n' || *p->at == '\r')) p->at++;
}

static int take(parser *p, char c) {
    space(p);
    if (p->at == p->end || *p->at != (unsigned char)c) return 0;
    p->at++;
    return 1;
}

/* Length of the UTF-8 character at `at`; 0 if there is none: overlong, half of a pair, beyond U+10FFFF, cut off. */
static size_t utf8(const unsigned char *at, const unsigned char *end) {
    unsigned char a = at[0];
    size_t length = a < 0x80 ? 1 : a >= 0xc2 && a < 0xe0 ? 2 : (a & 0xf0) == 0xe0 ? 3 : a >= 0xf0 && a < 0xf5 ? 4 : 0;
    if (length > (size_t)(end - at)) return 0;
    for (size_t i = 1; i < length; i++)
        if ((at[i] & 0xc0) != 0x80) return 0;
    if (a == 0xe0 && at[1] < 0xa0) return 0;
    if (a == 0xed && at[1] > 0x9f) return 0;
    if (a == 0xf0 && at[1] < 0x90) return 0;
    if (a == 0xf4 && at[1] > 0x8f) return 0;
    return length;
}

static int hex4(parser *p, uint32_t *out) {
    static const char digits[] = "0123456789abcdef0123456789ABCDEF";
    if (p->end - p->at < 4) return 0;
    *out = 0;
    for (int i = 0; i < 4; i++) {
        const char *digit = *p->at == 0 ? NULL : strchr(digits, *p->at);
        if (digit == NULL) return 0;
        *out = *out << 4 | (uint32_t)((digit - digits) & 15);
        p->at++;
    }
    return 1;
}

static void put(parser *p, uint32_t c) {
    char *to = p->names + p->used;
    if (c < 0x80) {
        to[0] = (char)c;
        p->used += 1;
    } else if (c < 0x800) {
        to[0] = (char)(0xc0 | c >> 6);
        to[1] = (char)(0x80 | (c & 0x3f));
        p->used += 2;
    } else if (c < 0x10000) {
        to[0] = (char)(0xe0 | c >> 12);
        to[1] = (char)(0x80 | (c >> 6 & 0x3f));
        to[2] = (char)(0x80 | (c & 0x3f));
        p->used += 3;
    } else {
        to[0] = (char)(0xf0 | c >> 18);
        to[1] = (char)(0x80 | (c >> 12 & 0x3f));
        to[2] = (char)(0x80 | (c >> 6 & 0x3f));
        to[3] = (char)(0x80 | (c & 0x3f));
        p->used += 4;
    }
}

/* A text, with its escapes resolved, which never makes it longer; anything else breaks `rule`. */
static uqff_status read_text(parser *p, const char *rule, text *out) {
    if (!take(p, '"')) return bad(p, rule, "a text was expected");
    size_t begin = p->used;
    while (p->at < p->end && *p->at != '"') {
        if (*p->at == '\\') {
            static const char escapes[] = "\"\\/bfnrt", means[] = "\"\\/\b\f\n\r\t";
            const char *known;
            uint32_t c, low;
            if (p->end - p->at < 2) return bad(p, "FILE-04", "text is cut off");
            c = p->at[1];
            p->at += 2;
            if (c == 'u') {
                if (!hex4(p, &c)) return bad(p, "FILE-04", "escape is none");
                if (c >= 0xdc00 && c < 0xe000) return bad(p, "FILE-08", "half of a surrogate pair");
                if (c >= 0xd800 && c < 0xdc00) {
                    if (p->end - p->at < 6 || p->at[0] != '\\' || p->at[1] != 'u') return bad(p, "FILE-08", "half of a surrogate pair");
                    p->at += 2;
                    if (!hex4(p, &low) || low < 0xdc00 || low >= 0xe000) return bad(p, "FILE-08", "half of a surrogate pair");
                    c = 0x10000 + ((c - 0xd800) << 10) + (low - 0xdc00);
                }
                put(p, c);
            } else {
                if (c == 0 || (known = strchr(escapes, (int)c)) == NULL) return bad(p, "FILE-04", "escape is none");
                put(p, (unsigned char)means[known - escapes]);
            }
        } else {
            size_t length = utf8(p->at, p->end);
            if (length == 0) return bad(p, "FILE-04", "not UTF-8");
            if (*p->at < 0x20) return bad(p, "FILE-04", "control character in a text");
            memcpy(p->names + p->used, p->at, length);
            p->used += length;
            p->at += length;
        }
    }
    if (p->at == p->end) return bad(p, "FILE-04", "text is cut off");
    p->at++;
    out->data = p->names + begin;
    out->size = p->used - begin;
    return UQFF_OK;
}

static int is(text t, const char *name) { return t.size == strlen(name) && memcmp(t.data, name, t.size) == 0; }

/* An integer from 0, of at most 19 digits, which fit 64 bits; anything but a number below 0 or with more digits breaks
 * `rule`. */
static uqff_status read_integer(parser *p, const char *rule, uint64_t *out) {
    int digits = 0;
    space(p);
    for (*out = 0; p->at < p->end && *p->at >= '0' && *p->at <= '9'; p->at++) {
        if (++digits > 19) return bad(p, "FILE-07", "number of more than 19 digits");
        if (digits == 2 && *out == 0) return bad(p, "FILE-04", "number begins with 0");
        *out = *out * 10 + (*p->at - '0');
    }
    if (digits == 0 || (p->at < p->end && strchr(".eE", *p->at) != NULL))
        return bad(p, p->at < p->end && *p->at == '-' ? "FILE-07" : rule, "an integer from 0 was expected");
    return UQFF_OK;
}

/* Of at most `room` numbers; a list of another form breaks `rule`. */
static uqff_status read_integers(parser *p, const char *rule, uint64_t *out, int room, int *count) {
    uqff_status status;
    *count = 0;
    if (!take(p, '[')) return bad(p, rule, "a list was expected");
    if (take(p, ']')) return UQFF_OK;
    do {
        if (*count == room) return bad(p, rule, "list is too long");
        if ((status = read_integer(p, rule, &out[(*count)++])) != UQFF_OK) return status;
    } while (take(p, ','));
    return take(p, ']') ? UQFF_OK : bad(p, rule, "list has no end");
}

static int by_bytes(const void *one, const void *two) {
    const text *a = one, *b = two;
    int order = memcmp(a->data, b->data, a->size < b->size ? a->size : b->size);
    return order != 0 ? order : (a->size > b->size) - (a->size < b->size);
}

static uqff_status read_metadata(parser *p) {
    uqff_status status = UQFF_OK;
    text *keys = NULL, value;
    size_t count = 0, room = 0;
    if (!take(p, '{')) return bad(p, "FILE-09", "metadata are no object");
    if (take(p, '}')) return UQFF_OK;
    do {
        if (count == room) {
            text *more = realloc(keys, (room = room * 2 + 8) * sizeof *keys);
            if (more == NULL) {
                free(keys);
                return uqff_fail(p->error, UQFF_MEMORY, "", "header", 6, "no memory");
            }
            keys = more;
        }
        if ((status = read_text(p, "FILE-04", &keys[count++])) != UQFF_OK) break;
        if (!take(p, ':')) { status = bad(p, "FILE-04", "a colon was expected"); break; }
        if ((status = read_text(p, "FILE-09", &value)) != UQFF_OK) break;
    } while (take(p, ','));
    if (status == UQFF_OK && !take(p, '}')) status = bad(p, "FILE-04", "metadata have no end");
    if (status == UQFF_OK) {
        qsort(keys, count, sizeof *keys, by_bytes);
        for (size_t i = 1; i < count; i++)
            if (by_bytes(&keys[i - 1], &keys[i]) == 0) status = bad(p, "FILE-06", "key occurs twice");
    }
    free(keys);
    return status;
}

/* dtype, shape and data_offsets, each once, in any order. */
static uqff_status read_entry(parser *p, uqff_entry *entry, uqff_bytes data) {
    uqff_status status;
    text key, value;
    uint64_t offsets[2], product;
    int have = 0, count = 0, bit;
    size_t dtype = 0;
    if (!take(p, '{')) return bad(p, p->at < p->end && strchr("\"-0123456789tfn[", *p->at) ? "FILE-10" : "FILE-04", "entry is no object");
    do {
        size_t used = p->used;
        if ((status = read_text(p, "FILE-04", &key)) != UQFF_OK) return status;
        bit = is(key, "dtype") ? 1 : is(key, "shape") ? 2 : is(key, "data_offsets") ? 4 : 0;
        p->used = used; /* these names need not be kept */
        if (bit == 0 || have & bit) return bad(p, bit == 0 ? "FILE-10" : "FILE-06", "entry has another key, or one twice");
        have |= bit;
        if (!take(p, ':')) return bad(p, "FILE-04", "a colon was expected");
        if (bit == 1) {
            if ((status = read_text(p, "FILE-11", &value)) != UQFF_OK) return status;
            for (dtype = 0; dtype < sizeof DTYPES / sizeof *DTYPES; dtype++)
                if (is(value, DTYPES[dtype].name)) break;
            p->used = used;
            if (dtype == sizeof DTYPES / sizeof *DTYPES) return uqff_fail(p->error, UQFF_UNSUPPORTED, "FILE-11", "header", 6, "unknown dtype");
        } else if (bit == 2) {
            if ((status = read_integers(p, "FILE-12", entry->tensor.shape, UQFF_MAX_RANK, &entry->tensor.ndim)) != UQFF_OK) return status;
        } else if ((status = read_integers(p, "FILE-13", offsets, 2, &count)) != UQFF_OK) {
            return status;
        }
    } while (take(p, ','));
    if (!take(p, '}')) return bad(p, "FILE-04", "entry has no end");
    if (have != 7 || count != 2) return bad(p, have != 7 ? "FILE-10" : "FILE-13", "entry lacks dtype, shape or data_offsets");
    for (int i = 0; i < entry->tensor.ndim; i++)
        if (entry->tensor.shape[i] > MAX_DIMENSION) return bad(p, "FILE-12", "dimension is too large");
    if (offsets[1] < offsets[0]) return bad(p, "FILE-13", "data end before they begin");
    if (offsets[1] > data.size) return bad(p, "FILE-15", "data are not in the file");
    if (!uqff_product(entry->tensor.shape, entry->tensor.ndim, UINT64_MAX / 64, &product)
        || product * DTYPES[dtype].bits % 8 != 0 || product * DTYPES[dtype].bits / 8 != offsets[1] - offsets[0])
        return bad(p, "FILE-14", "data have another size than dtype and shape");
    entry->tensor.dtype = DTYPES[dtype].dtype;
    entry->other = DTYPES[dtype].dtype == UQFF_OTHER ? (int)dtype : -1;
    entry->tensor.data.data = data.data + offsets[0];
    entry->tensor.data.size = (size_t)(offsets[1] - offsets[0]);
    return UQFF_OK;
}

static int by_place(const void *one, const void *two) {
    const uqff_entry *a = one, *b = two;
    const unsigned char *p = a->tensor.data.data, *q = b->tensor.data.data;
    if (p != q) return p < q ? -1 : 1;
    return (a->tensor.data.size > b->tensor.data.size) - (a->tensor.data.size < b->tensor.data.size);
}

static int by_name(const void *one, const void *two) {
    const uqff_entry *a = one, *b = two;
    text s = {a->name, a->name_size}, t = {b->name, b->name_size};
    return by_bytes(&s, &t);
}

static uqff_status read_object(parser *p, int number, uqff_bytes data, uqff_entries *out) {
    uqff_status status;
    size_t first = out->count;
    int metadata = 0;
    if (!take(p, '{')) return bad(p, "FILE-04", "header is no object");
    if (!take(p, '}')) {
        do {
            text name;
            if ((status = read_text(p, "FILE-04", &name)) != UQFF_OK) return status;
            if (!take(p, ':')) return bad(p, "FILE-04", "a colon was expected");
            if (is(name, "__metadata__")) {
                if (metadata++) return bad(p, "FILE-06", "key occurs twice");
                if ((status = read_metadata(p)) != UQFF_OK) return status;
                continue;
            }
            if (out->count == out->room) {
                uqff_entry *more = realloc(out->entries, (out->room = out->room * 2 + 16) * sizeof *more);
                if (more == NULL) return uqff_fail(p->error, UQFF_MEMORY, "", "header", 6, "no memory");
                out->entries = more;
            }
            uqff_entry *entry = &out->entries[out->count++];
            memset(entry, 0, sizeof *entry);
            entry->name = name.data;
            entry->name_size = name.size;
            entry->file = number;
            if ((status = read_entry(p, entry, data)) != UQFF_OK) return status;
        } while (take(p, ','));
        if (!take(p, '}')) return bad(p, "FILE-04", "header has no end");
    }
    space(p);
    if (p->at != p->end) return bad(p, "FILE-04", "something follows the header's object");

    uqff_entry *mine = out->entries + first;
    size_t count = out->count - first;
    if (count > 0) qsort(mine, count, sizeof *mine, by_name);
    for (size_t i = 1; i < count; i++)
        if (by_name(&mine[i - 1], &mine[i]) == 0) return bad(p, "FILE-06", "key occurs twice");
    if (count > 0) qsort(mine, count, sizeof *mine, by_place);
    const unsigned char *at = data.data;
    for (size_t i = 0; i < count; at += mine[i++].tensor.data.size)
        if (mine[i].tensor.data.data != at) return bad(p, "FILE-15", "data overlap, or leave a hole");
    if (at != data.data + data.size) return bad(p, "FILE-15", "bytes behind the last tensor");
    return UQFF_OK;
}

/* container.md, "Foreign": the rule that a file breaks which is no safetensors file: FILE-16 if it is a known other. */
static const char *rule_of_other(uqff_bytes file, const char *rule) {
    static const struct {
        const char *bytes;
        size_t size;
    } known[] = {{"version https://git-lfs", 23}, {"GGUF", 4}, {"PK\3\4", 4}, {"\x80\2", 2}, {"\x80\3", 2}, {"\x80\4", 2}, {"\x80\5", 2},
                 {"<!doctype html", 14}, {"<html", 5}, {"<?xml", 5}, {"{", 1}, {"[", 1}, {"\x1f\x8b", 2}};
    for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
        size_t at = 0;
        while (at < known[i].size && at < file.size) {
            unsigned char c = file.data[at];
            if (i >= 7 && c >= 'A' && c <= 'Z') c = (unsigned char)(c - 'A' + 'a');
            if (c != (unsigned char)known[i].bytes[at]) break;
            at++;
        }
        if (at == known[i].size) return "FILE-16";
    }
    return rule;
}

uqff_status uqff_read_header(uqff_bytes file, int number, uqff_entries *out, uqff_error *error) {
    parser p = {NULL, NULL, NULL, 0, error};
    uint64_t n = 0;
    size_t values = 0;
    error->file = number;
    if (file.size < 8) return bad(&p, "FILE-01", "file is cut off");
    for (int i = 7; i >= 0; i--) n = n << 8 | file.data[i];
    if (n > MAX_HEADER_BYTES || n > file.size - 8)
        return bad(&p, rule_of_other(file, n > MAX_HEADER_BYTES ? "FILE-02" : "FILE-03"), "header is longer than the file, or than any header");
    p.at = file.data + 8;
    p.end = p.at + n;
    if (n == 0 || *p.at != '{') return bad(&p, "FILE-04", "header does not begin with {");
    for (const unsigned char *c = p.at; c < p.end; c++) values += *c == '{' ? 2 : *c == ',' || *c == '[';
    if (values > MAX_HEADER_VALUES) return bad(&p, "FILE-05", "header has too many values");
    p.names = out->names + out->used;
    uqff_bytes data = {p.end, file.size - 8 - (size_t)n};
    uqff_status status = read_object(&p, number, data, out);
    out->used += p.used;
    return status;
}
