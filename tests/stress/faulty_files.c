/* A layer below every library of a process: what it asks of the file system in one folder fails at a chosen point.
 *
 * Preloaded (LD_PRELOAD), so that Python's writes, Rust's, onnxruntime's and C's own streams all come through here.
 * Counted are calls that write, name, push to the disk or map: open to write, write, rename, unlink, mkdir, fsync,
 * truncate, mmap of a file.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#define NEXT(name) __typeof__(&name) next = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

static char folder[4096];
static long point, count;
static int error;

/* Let the at-th call in a folder fail with an errno, 0 for a kill. */
void fault_arm(const char *name, long at, int number) {
  strncpy(folder, name, sizeof folder - 1);
  point = at, error = number, count = 0;
}

long fault_count(void) { return count; }

static int fails(int is_inside) {
  if (!is_inside || ++count != point) return 0;
  if (!error) kill(getpid(), SIGKILL);
  errno = error;
  return 1;
}

static int path_inside(const char *path) { return folder[0] && path && strstr(path, folder); }

static int file_inside(int file) {
  char link[64], path[4096];
  if (!folder[0] || file < 0) return 0;
  snprintf(link, sizeof link, "/proc/self/fd/%d", file);
  ssize_t length = readlink(link, path, sizeof path - 1);
  if (length < 0) return 0;
  path[length] = 0;
  return path_inside(path);
}

#define OPEN(name)                                                                                     \
  int name(const char *path, int flags, ...) {                                                         \
    NEXT(name);                                                                                        \
    va_list rest;                                                                                      \
    va_start(rest, flags);                                                                             \
    int mode = va_arg(rest, int);                                                                      \
    va_end(rest);                                                                                      \
    return (flags & (O_WRONLY | O_RDWR)) && fails(path_inside(path)) ? -1 : next(path, flags, mode);  \
  }
#define OPENAT(name)                                                                                         \
  int name(int at, const char *path, int flags, ...) {                                                       \
    NEXT(name);                                                                                              \
    va_list rest;                                                                                            \
    va_start(rest, flags);                                                                                   \
    int mode = va_arg(rest, int);                                                                            \
    va_end(rest);                                                                                            \
    return (flags & (O_WRONLY | O_RDWR)) && fails(path_inside(path)) ? -1 : next(at, path, flags, mode);    \
  }
OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)

ssize_t write(int file, const void *bytes, size_t size) {
  NEXT(write);
  return fails(file_inside(file)) ? -1 : next(file, bytes, size);
}
ssize_t pwrite(int file, const void *bytes, size_t size, off_t at) {
  NEXT(pwrite);
  return fails(file_inside(file)) ? -1 : next(file, bytes, size, at);
}
ssize_t pwrite64(int file, const void *bytes, size_t size, off64_t at) {
  NEXT(pwrite64);
  return fails(file_inside(file)) ? -1 : next(file, bytes, size, at);
}
ssize_t writev(int file, const struct iovec *pieces, int number) {
  NEXT(writev);
  return fails(file_inside(file)) ? -1 : next(file, pieces, number);
}
size_t fwrite(const void *bytes, size_t size, size_t number, FILE *stream) {
  NEXT(fwrite);
  return fails(file_inside(fileno(stream))) ? 0 : next(bytes, size, number, stream);
}
int fsync(int file) {
  NEXT(fsync);
  return fails(file_inside(file)) ? -1 : next(file);
}
int fdatasync(int file) {
  NEXT(fdatasync);
  return fails(file_inside(file)) ? -1 : next(file);
}
int ftruncate(int file, off_t size) {
  NEXT(ftruncate);
  return fails(file_inside(file)) ? -1 : next(file, size);
}
int ftruncate64(int file, off64_t size) {
  NEXT(ftruncate64);
  return fails(file_inside(file)) ? -1 : next(file, size);
}
int rename(const char *from, const char *to) {
  NEXT(rename);
  return fails(path_inside(to)) ? -1 : next(from, to);
}
int renameat(int from_at, const char *from, int to_at, const char *to) {
  NEXT(renameat);
  return fails(path_inside(to)) ? -1 : next(from_at, from, to_at, to);
}
int unlink(const char *path) {
  NEXT(unlink);
  return fails(path_inside(path)) ? -1 : next(path);
}
int mkdir(const char *path, mode_t mode) {
  NEXT(mkdir);
  return fails(path_inside(path)) ? -1 : next(path, mode);
}
void *mmap(void *at, size_t size, int protection, int flags, int file, off_t offset) {
  NEXT(mmap);
  return fails(file_inside(file)) ? MAP_FAILED : next(at, size, protection, flags, file, offset);
}
void *mmap64(void *at, size_t size, int protection, int flags, int file, off64_t offset) {
  NEXT(mmap64);
  return fails(file_inside(file)) ? MAP_FAILED : next(at, size, protection, flags, file, offset);
}
