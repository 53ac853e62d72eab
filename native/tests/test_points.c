// An armed fault point that several threads come to at once: it lets as many pass as it is told to, one takes it, and
// the others go past it.
#include <pthread.h>
#include <stdatomic.h>
#include <unistd.h>

#include "../point.h"
#include "check.h"

#define THREADS 4
#define VISITS 20000
#define ROUNDS 20

static _Atomic int taken, started;

static void *visit(void *nothing) {
    (void)nothing;
    atomic_fetch_add(&started, 1);
    while (atomic_load(&started) < THREADS)
        ;
    for (int i = 0; i < VISITS; i++) {
        point(POINT_fork_made);
        if (point_fails(POINT_batch_begun, NULL))
            atomic_fetch_add(&taken, 1);
    }
    return NULL;
}

int main(void) {
    char flag[] = "/tmp/edm-test-points-XXXXXX";
    int fd = mkstemp(flag);
    CHECK(fd >= 0);
    close(fd);
    CHECK(edm_point_arm("no_such_point", EDM_POINT_KILL, 0, flag) == -ENOENT);
    CHECK(edm_point_arm("fork_made", EDM_POINT_FAIL, 0, flag) == -EINVAL);

    for (int round = 0; round < ROUNDS; round++) {
        pthread_t threads[THREADS];
        FILE *f = fopen(flag, "w");
        CHECK(f && fputs("armed", f) >= 0 && !fclose(f));
        CHECK(edm_point_arm("batch_begun", EDM_POINT_FAIL, round * 100, flag) == POINT_batch_begun);
        atomic_store(&taken, 0);
        atomic_store(&started, 0);
        for (int i = 0; i < THREADS; i++)
            CHECK(!pthread_create(&threads[i], NULL, visit, NULL));
        for (int i = 0; i < THREADS; i++)
            CHECK(!pthread_join(threads[i], NULL));
        CHECK(atomic_load(&taken) == 1);
        CHECK(access(flag, F_OK) && errno == ENOENT);
    }

    // It has been taken by somebody else: the file has gone, or was put back empty.
    CHECK(edm_point_arm("batch_begun", EDM_POINT_FAIL, 0, flag) == POINT_batch_begun);
    CHECK(!point_fails(POINT_batch_begun, NULL));
    FILE *f = fopen(flag, "w");
    CHECK(f && !fclose(f));
    CHECK(edm_point_arm("batch_begun", EDM_POINT_FAIL, 0, flag) == POINT_batch_begun);
    CHECK(!point_fails(POINT_batch_begun, NULL) && !access(flag, F_OK));
    return unlink(flag);
}
