/* A barrier for the threads that run the stages of a plan. */

#ifndef STR_TRITON_WAITING_H
#define STR_TRITON_WAITING_H

#include <stdint.h>

#ifdef _OPENMP
#include <omp.h>
#include <sched.h>
#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#if defined(__x86_64__) || defined(__i386__)
#define PAUSE() __builtin_ia32_pause()
#else
#define PAUSE() __asm__ volatile("" ::: "memory")
#endif

/* A waiting thread checks about 20 microseconds long. Then it yields its processor: on a busy machine the thread that it
   waits for may be suspended, and needs a processor. After about 200 microseconds of that it sleeps, because yielding
   keeps a processor that has nothing else to do, and the system moves no thread there. */
#ifndef SPINS
#define SPINS 1000
#define YIELDS 500
#endif

/* All zeros at first. */
typedef struct {
    int32_t arrived, sleepers;
    uint32_t done; /* stages */
} barrier;

static void sleep_while(const uint32_t *done, uint32_t stage) {
#ifdef __linux__
    syscall(SYS_futex, done, FUTEX_WAIT_PRIVATE, stage, (void *)0);
#else
    (void)done, (void)stage;
    sched_yield();
#endif
}

static void wake_all(const uint32_t *done) {
#ifdef __linux__
    syscall(SYS_futex, done, FUTEX_WAKE_PRIVATE, INT32_MAX);
#else
    (void)done;
#endif
}

/* Returns when all threads have called it.

   Memory orders: what a thread wrote before it arrived is seen by the last one to arrive (both sides of `arrived`), which
   releases all of it, and the zero in `arrived`, with `done`; the others acquire `done`. `done` cannot change between its
   first load and the arrival, because this thread is missing. Between `sleepers` and `done` stands the only pair of a
   store and a load of different places, which need one order for all threads: either the last thread sees a sleeper, or
   the sleeper's FUTEX_WAIT finds another `done`. The last one to leave is inside the team, so `b` outlives the wake-up. */
static void wait_for_all(barrier *b, int64_t threads) {
    const uint32_t stage = __atomic_load_n(&b->done, __ATOMIC_ACQUIRE);
    if (__atomic_add_fetch(&b->arrived, 1, __ATOMIC_ACQ_REL) == threads) {
        __atomic_store_n(&b->arrived, 0, __ATOMIC_RELAXED);
        __atomic_store_n(&b->done, stage + 1, __ATOMIC_SEQ_CST);
        if (__atomic_load_n(&b->sleepers, __ATOMIC_SEQ_CST)) wake_all(&b->done);
        return;
    }
    for (int64_t waits = 0; __atomic_load_n(&b->done, __ATOMIC_ACQUIRE) == stage; waits++) {
        if (waits < SPINS)
            PAUSE();
        else if (waits < SPINS + YIELDS)
            sched_yield();
        else {
            __atomic_add_fetch(&b->sleepers, 1, __ATOMIC_SEQ_CST);
            sleep_while(&b->done, stage); /* Returns at once if the stage is done by now. */
            __atomic_sub_fetch(&b->sleepers, 1, __ATOMIC_SEQ_CST);
        }
    }
}
#else
typedef int barrier;
static inline void wait_for_all(barrier *b, int64_t threads) { (void)b, (void)threads; }
#endif

#endif
