/* A team of threads in place of libgomp's, which ThreadSanitizer can follow: threads that are made and joined in every
   parallel region. Linked into the kernels with -Wl,-Bsymbolic. */

#include <pthread.h>
#include <stdlib.h>

enum { MOST = 64 };

typedef struct {
    void (*run)(void *);
    void *data;
    int number, count;
} member;

static __thread member current = {0, 0, 0, 1};

int omp_get_thread_num(void) { return current.number; }
int omp_get_num_threads(void) { return current.count; }

static void *begin(void *of) {
    current = *(member *)of;
    current.run(current.data);
    return 0;
}

void GOMP_parallel(void (*run)(void *), void *data, unsigned count, unsigned flags) {
    (void)flags;
    count = count < 1 ? 1 : count > MOST ? MOST : count;
    member members[MOST];
    pthread_t threads[MOST];
    for (unsigned i = 0; i < count; i++) members[i] = (member){run, data, (int)i, (int)count};
    for (unsigned i = 1; i < count; i++)
        if (pthread_create(threads + i, 0, begin, members + i)) abort();
    begin(members);
    current = (member){0, 0, 0, 1};
    for (unsigned i = 1; i < count; i++) pthread_join(threads[i], 0);
}
