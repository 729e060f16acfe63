/* LD_PRELOAD: the wall clock goes wrong by as many seconds as the file $WALL_CLOCK says; others stay right. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

int clock_gettime(clockid_t clock, struct timespec *now)
{
    static int (*real)(clockid_t, struct timespec *);
    if (real == NULL) {
        real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    }
    int result = real(clock, now);
    const char *path = getenv("WALL_CLOCK");
    if (result == 0 && path != NULL && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) {
        FILE *file = fopen(path, "r");
        long wrong = 0;
        if (file != NULL) {
            if (fscanf(file, "%ld", &wrong) == 1) {
                now->tv_sec += wrong;
            }
            fclose(file);
        }
    }
    return result;
}
