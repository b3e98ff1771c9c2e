/* A disk that fails on demand: preloaded into a process, it counts what that process changes under one path, and lets the
   n-th such operation fail. `armed` and `disarm` are called from Python; everything else goes to the C library. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static pthread_mutex_t guard = PTHREAD_MUTEX_INITIALIZER;
static char prefix[PATH_MAX], names[1 << 16];
static int active, failing_error, failing_number, for_ever, count, missed;

/* From now on, operation `number` (0: none) under `path` fails with `error`, and all after it where `stays`. */
void arm(const char *path, int number, int error, int stays) {
    pthread_mutex_lock(&guard);
    snprintf(prefix, sizeof prefix, "%s", path);
    failing_number = number, failing_error = error, for_ever = stays, count = missed = 0, names[0] = 0, active = 1;
    pthread_mutex_unlock(&guard);
}

/* Nothing fails any more. Returns how many operations there were. */
int disarm(void) {
    active = 0;
    return count;
}

int failed(void) { return missed; }
const char *operations(void) { return names; }

static int fails(const char *what, const char *path) {
    if (!active || strncmp(path, prefix, strlen(prefix))) return 0;
    pthread_mutex_lock(&guard);
    count++;
    size_t used = strlen(names);
    snprintf(names + used, sizeof names - used, "%s %s\n", what, path + strlen(prefix));
    int now = failing_number && (count == failing_number || (for_ever && count > failing_number));
    missed += now;
    pthread_mutex_unlock(&guard);
    if (now) errno = failing_error;
    return now;
}

static int fails_at(const char *what, int folder, const char *path) {
    char whole[2 * PATH_MAX], link[64];
    if (!active) return 0;
    if (path[0] == '/') return fails(what, path);
    if (folder == AT_FDCWD) {
        if (!getcwd(whole, PATH_MAX)) return 0;
    } else {
        snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
        ssize_t n = readlink(link, whole, PATH_MAX - 1);
        if (n < 0) return 0;
        whole[n] = 0;
    }
    if (path[0]) strcat(whole, "/"), strncat(whole, path, PATH_MAX - 2);
    return fails(what, whole);
}

static int fails_on(const char *what, int file) { return fails_at(what, file, ""); }

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define WRITES(flags) ((flags) & (O_CREAT | O_WRONLY | O_RDWR | O_TRUNC))
#define MODE(flags) \
    mode_t mode = 0; \
    if ((flags) & (O_CREAT | __O_TMPFILE)) { va_list more; va_start(more, flags); mode = va_arg(more, mode_t); va_end(more); }
#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        MODE(flags) \
        if (WRITES(flags) && fails_at("open", AT_FDCWD, path)) return -1; \
        return NEXT(name)(path, flags, mode); \
    }
#define OPENAT(name) \
    int name(int folder, const char *path, int flags, ...) { \
        MODE(flags) \
        if (WRITES(flags) && fails_at("open", folder, path)) return -1; \
        return NEXT(name)(folder, path, flags, mode); \
    }
#define FAILING(type, name, what, test, parameters, ...) \
    type name parameters { return test ? -1 : NEXT(name)(__VA_ARGS__); }
#define ON_FILE(type, name, parameters, ...) FAILING(type, name, #name, fails_on(#name, file), parameters, __VA_ARGS__)
#define ON_PATH(name, parameters, ...) FAILING(int, name, #name, fails_at(#name, AT_FDCWD, path), parameters, __VA_ARGS__)
#define IN_FOLDER(name, parameters, ...) FAILING(int, name, #name, fails_at(#name, folder, path), parameters, __VA_ARGS__)

OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)
ON_PATH(creat, (const char *path, mode_t mode), path, mode)
ON_PATH(creat64, (const char *path, mode_t mode), path, mode)
ON_FILE(ssize_t, write, (int file, const void *data, size_t n), file, data, n)
ON_FILE(ssize_t, pwrite, (int file, const void *data, size_t n, off_t at), file, data, n, at)
ON_FILE(ssize_t, pwrite64, (int file, const void *data, size_t n, off64_t at), file, data, n, at)
ON_FILE(ssize_t, writev, (int file, const struct iovec *parts, int n), file, parts, n)
ON_FILE(ssize_t, pwritev, (int file, const struct iovec *parts, int n, off_t at), file, parts, n, at)
ON_FILE(int, fsync, (int file), file)
ON_FILE(int, fdatasync, (int file), file)
ON_FILE(int, ftruncate, (int file, off_t size), file, size)
ON_FILE(int, ftruncate64, (int file, off64_t size), file, size)
ON_PATH(truncate, (const char *path, off_t size), path, size)
ON_PATH(mkdir, (const char *path, mode_t mode), path, mode)
IN_FOLDER(mkdirat, (int folder, const char *path, mode_t mode), folder, path, mode)
ON_PATH(rmdir, (const char *path), path)
ON_PATH(unlink, (const char *path), path)
IN_FOLDER(unlinkat, (int folder, const char *path, int flags), folder, path, flags)
ON_PATH(rename, (const char *path, const char *new), path, new)
IN_FOLDER(renameat, (int folder, const char *path, int to, const char *new), folder, path, to, new)
IN_FOLDER(renameat2, (int folder, const char *path, int to, const char *new, unsigned flags), folder, path, to, new, flags)
ON_PATH(link, (const char *path, const char *new), path, new)
IN_FOLDER(linkat, (int folder, const char *path, int to, const char *new, int flags), folder, path, to, new, flags)
ON_PATH(symlink, (const char *target, const char *path), target, path)
