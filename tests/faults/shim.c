/* Counts the operations of a process below one folder, and lets the n-th of them fail, be cut short, or be the last.
 *
 * Preloaded into Python (LD_PRELOAD). `shim_arm` chooses folder, fault and number; 0 only counts. Counted are what changes
 * the folder: files that are made, writes, truncations, fsyncs, renames, removals. Each that succeeds may be logged as a line:
 *     operation path second-path offset length
 * Behind the line of a write stand its bytes. The length of `create` is 1 where an older file is emptied. An fsync has a line
 * when it begins, and the line `synced` when it has ended.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { NONE, NO_SPACE, IO_ERROR, SHORT_WRITE, KILL, TERMINATE, INTERRUPT, HANG_UP, INTERRUPT_TWICE, DEAD_DISK };
enum { MAX_FILES = 1024, MAX_PATH = 512 };

static char root[MAX_PATH];
static char paths[MAX_FILES][MAX_PATH];
static int fault, log_file = -1;
static long at, count;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

long shim_count(void) { return count; }

void shim_arm(const char *folder, int kind, long number, int log) {
    snprintf(root, sizeof root, "%s", folder);
    fault = kind;
    at = number;
    log_file = log;
    count = 0;
}

static int inside(const char *path) {
    size_t size = strlen(root);
    return size && !strncmp(path, root, size) && (path[size] == 0 || path[size] == '/');
}

static const char *path_of(int file) { return file >= 0 && file < MAX_FILES && paths[file][0] ? paths[file] : NULL; }

static void join(char *out, int folder, const char *name) {
    const char *base = name[0] == '/' || folder == AT_FDCWD ? NULL : path_of(folder);
    if (base) snprintf(out, MAX_PATH, "%s/%s", base, name);
    else snprintf(out, MAX_PATH, "%s", name);
}

/* Returns 0 to go on, an errno to fail with, or -1 for a short write. */
static int strike(long length) {
    pthread_mutex_lock(&lock);
    long number = ++count;
    pthread_mutex_unlock(&lock);
    if (fault == DEAD_DISK && number >= at && at) return EIO;
    if (fault == INTERRUPT_TWICE && (number == at || number == at + 1 || number == at + 2)) kill(getpid(), SIGINT);
    if (number != at) return 0;
    switch (fault) {
    case NO_SPACE: return ENOSPC;
    case IO_ERROR: return EIO;
    case SHORT_WRITE: return length > 1 ? -1 : 0;
    case KILL: kill(getpid(), SIGKILL); return 0;
    case TERMINATE: kill(getpid(), SIGTERM); return 0;
    case INTERRUPT: kill(getpid(), SIGINT); return 0;
    case HANG_UP: kill(getpid(), SIGHUP); return 0;
    default: return 0;
    }
}

/* Logs an operation that has succeeded, with `length` bytes of `parts` where it is a write. */
static void note(const char *operation, const char *path, const char *second, long offset, long length, const struct iovec *parts) {
    if (log_file < 0) return;
    pthread_mutex_lock(&lock);
    dprintf(log_file, "%s\t%s\t%s\t%ld\t%ld\n", operation, path, second, offset, length);
    for (; parts && length > 0; parts++) {
        long size = (long)parts->iov_len < length ? (long)parts->iov_len : length;
        /* Past the functions below; the disk of the tests takes it whole. */
        if (syscall(SYS_write, log_file, parts->iov_base, size) != size) abort();
        length -= size;
    }
    pthread_mutex_unlock(&lock);
}

#define REAL(name) \
    static __typeof__(name) *real; \
    if (!real) real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)
#define FAIL_IF(problem) \
    do { int error_ = (problem); if (error_ > 0) { errno = error_; return -1; } } while (0)

static int remember(int file, const char *path) {
    if (file >= 0 && file < MAX_FILES) snprintf(paths[file], MAX_PATH, "%s", inside(path) ? path : "");
    return file;
}

#define MODE() \
    mode_t mode = 0; \
    if (flags & (O_CREAT | O_TMPFILE)) { va_list rest; va_start(rest, flags); mode = va_arg(rest, mode_t); va_end(rest); }

/* Opens by `call`; making a file is an operation. */
#define OPEN(call) \
    int is_change = inside(path) && flags & O_CREAT; \
    if (is_change) FAIL_IF(strike(0)); \
    int file = remember(call, path); \
    if (is_change && file >= 0) note("create", path, "", 0, (flags & O_TRUNC) != 0, NULL); \
    return file

int open64(const char *path, int flags, ...) {
    MODE()
    REAL(open64);
    OPEN(real(path, flags, mode));
}

int open(const char *path, int flags, ...) {
    MODE()
    return open64(path, flags, mode);
}

int openat64(int folder, const char *name, int flags, ...) {
    MODE()
    REAL(openat64);
    char path[MAX_PATH];
    join(path, folder, name);
    OPEN(real(folder, name, flags, mode));
}

int openat(int folder, const char *name, int flags, ...) {
    MODE()
    return openat64(folder, name, flags, mode);
}

int close(int file) {
    REAL(close);
    if (file >= 0 && file < MAX_FILES) paths[file][0] = 0;
    return real(file);
}

ssize_t write(int file, const void *data, size_t size) {
    REAL(write);
    const char *path = path_of(file);
    if (!path) return real(file, data, size);
    int problem = strike(size);
    FAIL_IF(problem);
    if (problem < 0) size /= 2;
    off_t offset = lseek(file, 0, SEEK_CUR);
    ssize_t done = real(file, data, size);
    struct iovec part = {(void *)data, size};
    if (done >= 0) note("write", path, "", offset, done, &part);
    return done;
}

/* Python's os.pwritev calls one of four functions, by the C library it was built for. */
ssize_t pwritev64v2(int file, const struct iovec *parts, int number, off64_t offset, int flags) {
    REAL(pwritev64v2);
    const char *path = path_of(file);
    if (!path) return real(file, parts, number, offset, flags);
    long size = 0;
    for (int part = 0; part < number; part++) size += parts[part].iov_len;
    int problem = strike(size);
    FAIL_IF(problem);
    struct iovec half = {parts->iov_base, (parts->iov_len + 1) / 2};
    ssize_t done = problem < 0 ? real(file, &half, 1, offset, flags) : real(file, parts, number, offset, flags);
    if (done >= 0) note("write", path, "", offset, done, parts);
    return done;
}

ssize_t pwritev2(int file, const struct iovec *parts, int number, off_t offset, int flags) {
    return pwritev64v2(file, parts, number, offset, flags);
}

ssize_t pwritev64(int file, const struct iovec *parts, int number, off64_t offset) {
    return pwritev64v2(file, parts, number, offset, 0);
}

ssize_t pwritev(int file, const struct iovec *parts, int number, off_t offset) {
    return pwritev64v2(file, parts, number, offset, 0);
}

/* An operation on `path` that takes effect by `call`. */
#define CHANGE(condition, call, operation, path, second, offset) \
    int is_change = (condition); \
    if (is_change) FAIL_IF(strike(0)); \
    int result = call; \
    if (is_change && !result) note(operation, path, second, offset, 0, NULL); \
    return result

int ftruncate64(int file, off64_t size) {
    REAL(ftruncate64);
    CHANGE(path_of(file) != NULL, real(file, size), "truncate", path_of(file), "", size);
}

int ftruncate(int file, off_t size) { return ftruncate64(file, size); }

int fsync(int file) {
    REAL(fsync);
    if (path_of(file)) note("fsync", path_of(file), "", 0, 0, NULL);
    CHANGE(path_of(file) != NULL, real(file), "synced", path_of(file), "", 0);
}

int rename(const char *old, const char *new) {
    REAL(rename);
    CHANGE(inside(old) || inside(new), real(old, new), "rename", old, new, 0);
}

int mkdir(const char *path, mode_t mode) {
    REAL(mkdir);
    CHANGE(inside(path), real(path, mode), "mkdir", path, "", 0);
}

int unlink(const char *path) {
    REAL(unlink);
    CHANGE(inside(path), real(path), "unlink", path, "", 0);
}

int unlinkat(int folder, const char *name, int flags) {
    REAL(unlinkat);
    char path[MAX_PATH];
    join(path, folder, name);
    CHANGE(inside(path), real(folder, name, flags), flags & AT_REMOVEDIR ? "rmdir" : "unlink", path, "", 0);
}

int rmdir(const char *path) {
    REAL(rmdir);
    CHANGE(inside(path), real(path), "rmdir", path, "", 0);
}
