/* Counts the operations of a process below one folder, and lets the n-th of them fail, be cut short, or be the last.
 *
 * Preloaded into Python (LD_PRELOAD). `shim_arm` chooses folder, fault and number; 0 only counts. Counted are what changes
 * the folder: files that are made, writes, truncations, fsyncs, renames, removals. Each may be logged as a line:
 *     number operation path [second path] [offset length]
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
#include <sys/types.h>
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
static int strike(const char *operation, const char *path, const char *second, long offset, long length) {
    pthread_mutex_lock(&lock);
    long number = ++count;
    if (log_file >= 0)
        dprintf(log_file, "%ld\t%s\t%s\t%s\t%ld\t%ld\n", number, operation, path, second ? second : "", offset, length);
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

#define REAL(name) \
    static __typeof__(name) *real; \
    if (!real) real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)
#define FAIL_IF(problem) \
    do { int error_ = (problem); if (error_ > 0) { errno = error_; return -1; } } while (0)

static int remember(int file, const char *path) {
    if (file >= 0 && file < MAX_FILES) snprintf(paths[file], MAX_PATH, "%s", inside(path) ? path : "");
    return file;
}

#define OPENS(name, ...) \
    mode_t mode = 0; \
    if (flags & (O_CREAT | O_TMPFILE)) { va_list rest; va_start(rest, flags); mode = va_arg(rest, mode_t); va_end(rest); }

int open64(const char *path, int flags, ...) {
    OPENS(open64)
    REAL(open64);
    if (inside(path) && flags & O_CREAT) FAIL_IF(strike("create", path, NULL, 0, 0));
    return remember(real(path, flags, mode), path);
}

int open(const char *path, int flags, ...) {
    OPENS(open)
    return open64(path, flags, mode);
}

int openat64(int folder, const char *name, int flags, ...) {
    OPENS(openat64)
    REAL(openat64);
    char path[MAX_PATH];
    join(path, folder, name);
    if (inside(path) && flags & O_CREAT) FAIL_IF(strike("create", path, NULL, 0, 0));
    return remember(real(folder, name, flags, mode), path);
}

int openat(int folder, const char *name, int flags, ...) {
    OPENS(openat)
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
    if (path) {
        int problem = strike("write", path, NULL, lseek(file, 0, SEEK_CUR), size);
        FAIL_IF(problem);
        if (problem < 0) size /= 2;
    }
    return real(file, data, size);
}

int ftruncate64(int file, off64_t size) {
    REAL(ftruncate64);
    if (path_of(file)) FAIL_IF(strike("truncate", path_of(file), NULL, size, 0));
    return real(file, size);
}

int ftruncate(int file, off_t size) { return ftruncate64(file, size); }

int fsync(int file) {
    REAL(fsync);
    if (path_of(file)) FAIL_IF(strike("fsync", path_of(file), NULL, 0, 0));
    return real(file);
}

int rename(const char *old, const char *new) {
    REAL(rename);
    if (inside(old) || inside(new)) FAIL_IF(strike("rename", old, new, 0, 0));
    return real(old, new);
}

int mkdir(const char *path, mode_t mode) {
    REAL(mkdir);
    if (inside(path)) FAIL_IF(strike("mkdir", path, NULL, 0, 0));
    return real(path, mode);
}

int unlink(const char *path) {
    REAL(unlink);
    if (inside(path)) FAIL_IF(strike("unlink", path, NULL, 0, 0));
    return real(path);
}

int unlinkat(int folder, const char *name, int flags) {
    REAL(unlinkat);
    char path[MAX_PATH];
    join(path, folder, name);
    if (inside(path)) FAIL_IF(strike(flags & AT_REMOVEDIR ? "rmdir" : "unlink", path, NULL, 0, 0));
    return real(folder, name, flags);
}

int rmdir(const char *path) {
    REAL(rmdir);
    if (inside(path)) FAIL_IF(strike("rmdir", path, NULL, 0, 0));
    return real(path);
}
