/* LD_PRELOAD shim: count the file operations of a process below one directory, and end it, or fill its disk, at one.

   GALLEY_FAULT_DIR    only paths that contain this count
   GALLEY_FAULT_AT     "12": SIGKILL before operation 12 (from 1); "12-pause": SIGSTOP there; "12-full": from operation
                       12 on, writes fail with ENOSPC; unset: only count
   GALLEY_FAULT_COUNT  file that gets one byte for each operation
   GALLEY_FAULT_SLOW   milliseconds that each operation of another thread than the main one takes
*/
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static int seen = 0;

static int wanted(const char *path) {
    const char *dir = getenv("GALLEY_FAULT_DIR");
    return dir && path && strstr(path, dir);
}

static int wanted_fd(int fd) {
    char link[64], path[PATH_MAX];
    if (!getenv("GALLEY_FAULT_DIR")) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t size = readlink(link, path, sizeof path - 1);
    if (size <= 0) return 0;
    path[size] = 0;
    return wanted(path);
}

/* Count one operation; returns 1 where it has to fail as on a full disk. */
static int operation(int is_write) {
    const char *at = getenv("GALLEY_FAULT_AT"), *count = getenv("GALLEY_FAULT_COUNT"), *slow = getenv("GALLEY_FAULT_SLOW");
    if (slow && syscall(SYS_gettid) != syscall(SYS_getpid)) usleep(1000 * atoi(slow));
    seen++;
    if (count) {
        int fd = syscall(SYS_openat, AT_FDCWD, count, O_WRONLY | O_CREAT | O_APPEND, 0600);
        syscall(SYS_write, fd, "x", 1);
        syscall(SYS_close, fd);
    }
    if (!at) return 0;
    if (strstr(at, "full")) return is_write && seen >= atoi(at);
    /* To this very thread: of a process-wide signal another thread may be told, while this one goes on. */
    if (seen == atoi(at)) syscall(SYS_tgkill, syscall(SYS_getpid), syscall(SYS_gettid), strstr(at, "pause") ? SIGSTOP : SIGKILL);
    return 0;
}

#define REAL(name) ((typeof(&name))dlsym(RTLD_NEXT, #name))
#define FULL(check, is_write) if ((check) && operation(is_write)) { errno = ENOSPC; return -1; }
#define MODE(flags) mode_t mode = 0; if (flags & (O_CREAT | O_TMPFILE)) { va_list a; va_start(a, flags); mode = va_arg(a, mode_t); va_end(a); }
#define WRITES(flags) ((flags & O_ACCMODE) != O_RDONLY)

int open(const char *p, int flags, ...) { MODE(flags) FULL(WRITES(flags) && wanted(p), 0) return REAL(open)(p, flags, mode); }
int open64(const char *p, int flags, ...) { MODE(flags) FULL(WRITES(flags) && wanted(p), 0) return REAL(open64)(p, flags, mode); }
int openat(int d, const char *p, int flags, ...) { MODE(flags) FULL(WRITES(flags) && wanted(p), 0) return REAL(openat)(d, p, flags, mode); }
int openat64(int d, const char *p, int flags, ...) { MODE(flags) FULL(WRITES(flags) && wanted(p), 0) return REAL(openat64)(d, p, flags, mode); }
ssize_t write(int fd, const void *b, size_t n) { FULL(wanted_fd(fd), 1) return REAL(write)(fd, b, n); }
ssize_t pwrite64(int fd, const void *b, size_t n, off64_t o) { FULL(wanted_fd(fd), 1) return REAL(pwrite64)(fd, b, n, o); }
ssize_t writev(int fd, const struct iovec *v, int n) { FULL(wanted_fd(fd), 1) return REAL(writev)(fd, v, n); }
int ftruncate(int fd, off_t n) { FULL(wanted_fd(fd), 1) return REAL(ftruncate)(fd, n); }
int ftruncate64(int fd, off64_t n) { FULL(wanted_fd(fd), 1) return REAL(ftruncate64)(fd, n); }
int posix_fallocate64(int fd, off64_t o, off64_t n) { if (wanted_fd(fd) && operation(1)) return ENOSPC; return REAL(posix_fallocate64)(fd, o, n); }
int fsync(int fd) { FULL(wanted_fd(fd), 0) return REAL(fsync)(fd); }
int fdatasync(int fd) { FULL(wanted_fd(fd), 0) return REAL(fdatasync)(fd); }
int rename(const char *a, const char *b) { FULL(wanted(b), 0) return REAL(rename)(a, b); }
int renameat(int x, const char *a, int y, const char *b) { FULL(wanted(b), 0) return REAL(renameat)(x, a, y, b); }
int unlink(const char *p) { FULL(wanted(p), 0) return REAL(unlink)(p); }
int unlinkat(int d, const char *p, int f) { FULL(wanted(p) || (d != AT_FDCWD && wanted_fd(d)), 0) return REAL(unlinkat)(d, p, f); }
int rmdir(const char *p) { FULL(wanted(p), 0) return REAL(rmdir)(p); }
int mkdir(const char *p, mode_t m) { FULL(wanted(p), 0) return REAL(mkdir)(p, m); }
int mkdirat(int d, const char *p, mode_t m) { FULL(wanted(p), 0) return REAL(mkdirat)(d, p, m); }
