/* LD_PRELOAD: writes down, in order, what a process does to the files below RECORD_FOLDER, and the answers it sends.
 *
 * Each record is appended to RECORD_LOG (see struct head; tests/faults/power_cut.py reads them). A lock makes the
 * order of the records that of the calls. A sync is recorded when it has returned, with the place in the log at
 * which it began: it vouches only for what stood before that place. An answer is recorded before it is sent.
 *
 * RECORDER_KILL_AT="before 17" or "after 17" makes the process end itself with SIGKILL at its 17th write, truncation,
 * sync, rename, link or unlink, not counting those of lock files and shared memory.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum kind { OPEN = 1, WRITE, TRUNCATE, SYNC, RENAME, UNLINK, CLOSE, SEND, LINK, MAP };

struct head {
    uint32_t kind;
    int32_t pid;
    int32_t descriptor;
    uint32_t length; /* bytes of data that follow */
    uint64_t number; /* OPEN: 1 created | 2 truncated; WRITE: offset; TRUNCATE: size; SYNC: place in the log */
};

#define DESCRIPTORS 65536
#define ANSWER_BYTES 1024
#define TRACKED 1
#define COUNTED 2

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER, starting = PTHREAD_MUTEX_INITIALIZER;
static char tracked[DESCRIPTORS]; /* 0, or TRACKED, or COUNTED: its calls count for RECORDER_KILL_AT */
static const char *folder;
static int out = -1;
static char kill_when[8];
static unsigned long kill_at, done;

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

/* A fork gets the variables after the library was loaded (tests/tools/forks.py). */
static void start(void)
{
    const char *path = getenv("RECORD_LOG"), *kill = getenv("RECORDER_KILL_AT");
    if (path == NULL || getenv("RECORD_FOLDER") == NULL) {
        return;
    }
    pthread_mutex_lock(&starting);
    if (out < 0) {
        folder = strdup(getenv("RECORD_FOLDER"));
        if (kill && sscanf(kill, "%7s %lu", kill_when, &kill_at) != 2) {
            abort();
        }
        out = REAL(open)(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    }
    pthread_mutex_unlock(&starting);
}

static int ours(const char *path)
{
    size_t length;
    if (out < 0) {
        start();
    }
    if (out < 0 || path == NULL) {
        return 0;
    }
    length = strlen(folder);
    return strncmp(path, folder, length) == 0 && (path[length] == '/' || path[length] == 0);
}

static int ends_with(const char *path, const char *end)
{
    size_t length = strlen(path), of_end = strlen(end);
    return length >= of_end && strcmp(path + length - of_end, end) == 0;
}

static int counts(const char *path)
{
    return !ends_with(path, ".lock") && !ends_with(path, "-shm");
}

static void die(void)
{
    kill(getpid(), SIGKILL);
    for (;;) {
        pause();
    }
}

static void begin(int is_counted)
{
    if (is_counted && done + 1 == kill_at && strcmp(kill_when, "before") == 0) {
        die();
    }
}

static void end(int is_counted)
{
    if (is_counted && ++done == kill_at && strcmp(kill_when, "after") == 0) {
        die();
    }
}

static int is_tracked(int descriptor)
{
    return descriptor >= 0 && descriptor < DESCRIPTORS && tracked[descriptor];
}

static void record(enum kind kind, int descriptor, uint64_t number, const void *data, size_t length)
{
    struct head head = {kind, getpid(), descriptor, (uint32_t)length, number};
    struct iovec parts[2] = {{&head, sizeof head}, {(void *)data, length}};
    if (REAL(writev)(out, parts, 2) != (ssize_t)(sizeof head + length)) {
        abort(); /* a recording with a hole would prove nothing */
    }
}

static int open_recorded(int at, const char *path, int flags, mode_t mode)
{
    struct stat status;
    int existed, descriptor;
    if (!ours(path)) {
        return REAL(openat)(at, path, flags, mode);
    }
    pthread_mutex_lock(&lock);
    existed = stat(path, &status) == 0;
    descriptor = REAL(openat)(at, path, flags, mode);
    if (descriptor >= 0 && descriptor < DESCRIPTORS) {
        tracked[descriptor] = counts(path) ? COUNTED : TRACKED;
        record(OPEN, descriptor, (existed ? 0 : 1) | (flags & O_TRUNC ? 2 : 0), path, strlen(path));
    }
    pthread_mutex_unlock(&lock);
    return descriptor;
}

#define MODE(flags, mode)                                  \
    mode_t mode = 0;                                       \
    if ((flags) & (O_CREAT | O_TMPFILE)) {                 \
        va_list arguments;                                 \
        va_start(arguments, flags);                        \
        mode = (mode_t)va_arg(arguments, int);             \
        va_end(arguments);                                 \
    }

int open(const char *path, int flags, ...)
{
    MODE(flags, mode)
    return open_recorded(AT_FDCWD, path, flags, mode);
}

int open64(const char *path, int flags, ...)
{
    MODE(flags, mode)
    return open_recorded(AT_FDCWD, path, flags, mode);
}

int openat(int at, const char *path, int flags, ...)
{
    MODE(flags, mode)
    return open_recorded(at, path, flags, mode);
}

int openat64(int at, const char *path, int flags, ...)
{
    MODE(flags, mode)
    return open_recorded(at, path, flags, mode);
}

int close(int descriptor)
{
    int result;
    if (!is_tracked(descriptor)) {
        return REAL(close)(descriptor);
    }
    pthread_mutex_lock(&lock);
    tracked[descriptor] = 0;
    record(CLOSE, descriptor, 0, NULL, 0);
    result = REAL(close)(descriptor);
    pthread_mutex_unlock(&lock);
    return result;
}

static ssize_t written(ssize_t result, int descriptor, const void *data, off_t offset)
{
    if (result > 0) {
        record(WRITE, descriptor, (uint64_t)offset, data, (size_t)result);
        end(tracked[descriptor] == COUNTED);
    }
    pthread_mutex_unlock(&lock);
    return result;
}

ssize_t pwrite(int descriptor, const void *data, size_t size, off_t offset)
{
    if (!is_tracked(descriptor)) {
        return REAL(pwrite)(descriptor, data, size, offset);
    }
    pthread_mutex_lock(&lock);
    begin(tracked[descriptor] == COUNTED);
    return written(REAL(pwrite)(descriptor, data, size, offset), descriptor, data, offset);
}

ssize_t pwrite64(int descriptor, const void *data, size_t size, off64_t offset)
{
    return pwrite(descriptor, data, size, offset);
}

static void answered(int descriptor, const struct iovec *parts, int count)
{
    char text[ANSWER_BYTES];
    size_t length = 0;
    int number;
    if (out < 0 || count < 1 || parts[0].iov_len < 7 || memcmp(parts[0].iov_base, "HTTP/1.", 7) != 0) {
        return;
    }
    for (number = 0; number < count && length < ANSWER_BYTES; number++) {
        size_t part = parts[number].iov_len < ANSWER_BYTES - length ? parts[number].iov_len : ANSWER_BYTES - length;
        memcpy(text + length, parts[number].iov_base, part);
        length += part;
    }
    pthread_mutex_lock(&lock);
    record(SEND, descriptor, 0, text, length);
    pthread_mutex_unlock(&lock);
}

ssize_t write(int descriptor, const void *data, size_t size)
{
    struct iovec part = {(void *)data, size};
    off_t offset;
    if (!is_tracked(descriptor)) {
        answered(descriptor, &part, 1);
        return REAL(write)(descriptor, data, size);
    }
    pthread_mutex_lock(&lock);
    begin(tracked[descriptor] == COUNTED);
    offset = lseek(descriptor, 0, SEEK_CUR);
    return written(REAL(write)(descriptor, data, size), descriptor, data, offset);
}

ssize_t send(int descriptor, const void *data, size_t size, int flags)
{
    struct iovec part = {(void *)data, size};
    answered(descriptor, &part, 1);
    return REAL(send)(descriptor, data, size, flags);
}

ssize_t sendmsg(int descriptor, const struct msghdr *message, int flags)
{
    answered(descriptor, message->msg_iov, (int)message->msg_iovlen);
    return REAL(sendmsg)(descriptor, message, flags);
}

ssize_t writev(int descriptor, const struct iovec *parts, int count)
{
    if (is_tracked(descriptor)) {
        abort(); /* neither SQLite nor Python does that to a file */
    }
    answered(descriptor, parts, count);
    return REAL(writev)(descriptor, parts, count);
}

int ftruncate(int descriptor, off_t size)
{
    int result;
    if (!is_tracked(descriptor)) {
        return REAL(ftruncate)(descriptor, size);
    }
    pthread_mutex_lock(&lock);
    begin(tracked[descriptor] == COUNTED);
    result = REAL(ftruncate)(descriptor, size);
    if (result == 0) {
        record(TRUNCATE, descriptor, (uint64_t)size, NULL, 0);
        end(tracked[descriptor] == COUNTED);
    }
    pthread_mutex_unlock(&lock);
    return result;
}

int ftruncate64(int descriptor, off64_t size)
{
    return ftruncate(descriptor, size);
}

static int synced(int (*sync)(int), int descriptor)
{
    off_t place;
    int result;
    if (!is_tracked(descriptor)) {
        return sync(descriptor);
    }
    pthread_mutex_lock(&lock);
    begin(tracked[descriptor] == COUNTED);
    place = lseek(out, 0, SEEK_END);
    pthread_mutex_unlock(&lock);
    result = sync(descriptor);
    if (result == 0) {
        pthread_mutex_lock(&lock);
        record(SYNC, descriptor, (uint64_t)place, NULL, 0);
        end(tracked[descriptor] == COUNTED);
        pthread_mutex_unlock(&lock);
    }
    return result;
}

int fsync(int descriptor)
{
    return synced(REAL(fsync), descriptor);
}

int fdatasync(int descriptor)
{
    return synced(REAL(fdatasync), descriptor);
}

static int named(enum kind kind, int result, const char *from, const char *to)
{
    char text[8192];
    int length = snprintf(text, sizeof text, "%s%c%s", from, 0, to);
    if (result == 0) {
        record(kind, -1, 0, text, (size_t)length);
        end(counts(from));
    }
    pthread_mutex_unlock(&lock);
    return result;
}

int unlink(const char *path)
{
    if (!ours(path)) {
        return REAL(unlink)(path);
    }
    pthread_mutex_lock(&lock);
    begin(counts(path));
    return named(UNLINK, REAL(unlink)(path), path, "");
}

int rename(const char *from, const char *to)
{
    if (!ours(from) && !ours(to)) {
        return REAL(rename)(from, to);
    }
    pthread_mutex_lock(&lock);
    begin(counts(from));
    return named(RENAME, REAL(rename)(from, to), from, to);
}

int link(const char *from, const char *to)
{
    if (!ours(from) && !ours(to)) {
        return REAL(link)(from, to);
    }
    pthread_mutex_lock(&lock);
    begin(counts(from));
    return named(LINK, REAL(link)(from, to), from, to);
}

static void *mapped(void *start, size_t size, int protection, int flags, int descriptor, off_t offset)
{
    if (is_tracked(descriptor) && (protection & PROT_WRITE) && (flags & MAP_SHARED)) {
        pthread_mutex_lock(&lock);
        record(MAP, descriptor, (uint64_t)offset, NULL, 0);
        pthread_mutex_unlock(&lock);
    }
    return REAL(mmap)(start, size, protection, flags, descriptor, offset);
}

void *mmap(void *start, size_t size, int protection, int flags, int descriptor, off_t offset)
{
    return mapped(start, size, protection, flags, descriptor, offset);
}

void *mmap64(void *start, size_t size, int protection, int flags, int descriptor, off64_t offset)
{
    return mapped(start, size, protection, flags, descriptor, offset);
}
