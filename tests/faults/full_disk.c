/* LD_PRELOAD: while the file $FULL_DISK exists, no file whose path holds the line in it can grow: the disk is full. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static int has_no_room(int fd, off_t end)
{
    const char *name = getenv("FULL_DISK");
    FILE *file = name == NULL ? NULL : fopen(name, "r");
    char part[256] = "", link[64], path[4096];
    if (file == NULL) {
        return 0;
    }
    if (fscanf(file, "%255s", part) != 1) {
        part[0] = '\0';
    }
    fclose(file);
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    struct stat now;
    if (part[0] == '\0' || length < 0 || fstat(fd, &now) != 0) {
        return 0;
    }
    path[length] = '\0';
    return strstr(path, part) != NULL && end > now.st_size;
}

ssize_t pwrite64(int fd, const void *bytes, size_t count, off_t offset)
{
    static ssize_t (*real)(int, const void *, size_t, off_t);
    if (real == NULL) {
        real = (ssize_t (*)(int, const void *, size_t, off_t))dlsym(RTLD_NEXT, "pwrite64");
    }
    if (has_no_room(fd, offset + (off_t)count)) {
        errno = ENOSPC;
        return -1;
    }
    return real(fd, bytes, count, offset);
}

ssize_t pwrite(int fd, const void *bytes, size_t count, off_t offset)
{
    return pwrite64(fd, bytes, count, offset);
}

ssize_t pwritev64(int fd, const struct iovec *parts, int count, off_t offset)
{
    static ssize_t (*real)(int, const struct iovec *, int, off_t);
    if (real == NULL) {
        real = (ssize_t (*)(int, const struct iovec *, int, off_t))dlsym(RTLD_NEXT, "pwritev64");
    }
    off_t end = offset;
    for (int part = 0; part < count; part++) {
        end += (off_t)parts[part].iov_len;
    }
    if (has_no_room(fd, end)) {
        errno = ENOSPC;
        return -1;
    }
    return real(fd, parts, count, offset);
}

ssize_t pwritev(int fd, const struct iovec *parts, int count, off_t offset)
{
    return pwritev64(fd, parts, count, offset);
}

int posix_fallocate64(int fd, off_t offset, off_t length)
{
    static int (*real)(int, off_t, off_t);
    if (real == NULL) {
        real = (int (*)(int, off_t, off_t))dlsym(RTLD_NEXT, "posix_fallocate64");
    }
    return has_no_room(fd, offset + length) ? ENOSPC : real(fd, offset, length);
}
