// gcc -shared -fPIC -o preload.so preload.c -ldl
// One read of a file whose path holds $FAIL_PATH fails with $FAIL_ERRNO; the file $FAIL_ONCE is made then.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static int fails(int descriptor) {
    const char *wanted = getenv("FAIL_PATH"), *once = getenv("FAIL_ONCE");
    char link[64], path[4096];
    if (!wanted || !once) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length <= 0) return 0;
    path[length] = 0;
    if (!strstr(path, wanted)) return 0;
    int made = open(once, O_CREAT | O_EXCL | O_WRONLY, 0644);
    if (made < 0) return 0;
    close(made);
    errno = atoi(getenv("FAIL_ERRNO"));
    return 1;
}

ssize_t read(int descriptor, void *to, size_t size) {
    ssize_t (*real)(int, void *, size_t) = dlsym(RTLD_NEXT, "read");
    return fails(descriptor) ? -1 : real(descriptor, to, size);
}

ssize_t pread(int descriptor, void *to, size_t size, off_t offset) {
    ssize_t (*real)(int, void *, size_t, off_t) = dlsym(RTLD_NEXT, "pread");
    return fails(descriptor) ? -1 : real(descriptor, to, size, offset);
}

ssize_t pread64(int descriptor, void *to, size_t size, off64_t offset) {
    ssize_t (*real)(int, void *, size_t, off64_t) = dlsym(RTLD_NEXT, "pread64");
    return fails(descriptor) ? -1 : real(descriptor, to, size, offset);
}
