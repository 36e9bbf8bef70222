/* Loaded in front of the C library: counts the calls that change a file system, and ends the process before one of
 * them, or lets the disk be full from one on.  crash_arm(kill_at, full_at): 0 for never; counts from 1 begin anew. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static long armed, seen, kill_at, full_at;

void crash_arm(long kill, long full) { kill_at = kill; full_at = full; seen = 0; armed = 1; }
long crash_count(void) { return seen; }

/* 1 if the call is to fail for want of space. */
static int step(int needs_space) {
    if (!armed) return 0;
    long now = __sync_add_and_fetch(&seen, 1);
    if (kill_at && now == kill_at) kill(getpid(), SIGKILL);
    if (full_at && needs_space && now >= full_at) { errno = ENOSPC; return 1; }
    return 0;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

#define PASS(result, name, needs_space, parameters, arguments) \
    result name parameters { return step(needs_space) ? -1 : REAL(name) arguments; }

PASS(int, rename, 0, (const char *a, const char *b), (a, b))
PASS(int, renameat, 0, (int d, const char *a, int e, const char *b), (d, a, e, b))
PASS(int, renameat2, 0, (int d, const char *a, int e, const char *b, unsigned f), (d, a, e, b, f))
PASS(int, mkdir, 1, (const char *a, mode_t m), (a, m))
PASS(int, mkdirat, 1, (int d, const char *a, mode_t m), (d, a, m))
PASS(int, unlink, 0, (const char *a), (a))
PASS(int, unlinkat, 0, (int d, const char *a, int f), (d, a, f))
PASS(int, rmdir, 0, (const char *a), (a))
PASS(int, fsync, 1, (int d), (d))
PASS(int, fdatasync, 1, (int d), (d))
PASS(int, ftruncate, 1, (int d, off_t n), (d, n))
PASS(int, ftruncate64, 1, (int d, off64_t n), (d, n))
PASS(ssize_t, write, d > 2, (int d, const void *p, size_t n), (d, p, n))
PASS(ssize_t, pwrite, 1, (int d, const void *p, size_t n, off_t o), (d, p, n, o))
PASS(ssize_t, pwrite64, 1, (int d, const void *p, size_t n, off64_t o), (d, p, n, o))
PASS(ssize_t, writev, 1, (int d, const struct iovec *v, int n), (d, v, n))
PASS(ssize_t, pwritev, 1, (int d, const struct iovec *v, int n, off_t o), (d, v, n, o))
PASS(ssize_t, copy_file_range, 1, (int d, off64_t *o, int e, off64_t *p, size_t n, unsigned f), (d, o, e, p, n, f))
PASS(ssize_t, sendfile, 1, (int d, int e, off_t *o, size_t n), (d, e, o, n))
PASS(ssize_t, sendfile64, 1, (int d, int e, off64_t *o, size_t n), (d, e, o, n))

#define OPEN(name, before, second)                                                                    \
    int name(before const char *path, int flags, ...) {                                                      \
        mode_t mode = 0;                                                                                     \
        if (flags & (O_CREAT | O_TMPFILE)) {                                                                 \
            va_list rest;                                                                                    \
            va_start(rest, flags);                                                                           \
            mode = va_arg(rest, int);                                                                        \
            va_end(rest);                                                                                    \
        }                                                                                                    \
        if ((flags & (O_CREAT | O_TRUNC)) && step((flags & O_CREAT) != 0)) return -1;                        \
        return REAL(name) second;                                                                            \
    }
#define NOTHING
#define AT int at,
OPEN(open, NOTHING, (path, flags, mode))
OPEN(open64, NOTHING, (path, flags, mode))
OPEN(openat, AT, (at, path, flags, mode))
OPEN(openat64, AT, (at, path, flags, mode))
