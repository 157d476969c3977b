/* Threads that help to read a long vector.
 *
 * Not OpenMP's: a parallel region ends when every one of its threads has come, so whoever asks waits for one that wakes
 * up and finds nothing left, and is itself put to sleep and woken while it waits (two thirds of the time that reading
 * 1.5 MB takes on two cores). Here pieces are taken from a counter, and the caller waits for pieces that are being
 * worked on, for nobody else. It takes them from the front and its helpers from the back: PyTorch's operations leave the
 * front of what they have just written in the cache of the thread that called them.
 */
#if defined(__linux__) && !defined(_GNU_SOURCE)
#define _GNU_SOURCE
#endif
#include "_helpers.h"

#if defined(_WIN32)

void share_out(piece_function *work, void *context, int64_t pieces, int64_t threads) {
    (void)threads;
    for (int64_t piece = 0; piece < pieces; piece++) work(context, piece);
}

#else

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>

enum {
    MOST = 15,        /* helpers: memory is not read faster by more */
    PIECES_EACH = 2,  /* for fewer pieces than that nobody is woken */
    PATIENCE = 200,   /* looks at a bell before who waits for it lets others run, 5 to 10 µs */
    OPEN = 1 << 16    /* in `gate`, beside the number of helpers inside */
};

static struct helper {
    pthread_t thread;
    pthread_mutex_t mutex;
    pthread_cond_t bell;
    atomic_uint rung;
    atomic_bool asleep;
} helpers[MOST];
static int hired;               /* changed by who holds `taken` */
static bool refused, registered; /* no more threads can be started; children forget those that were */
static atomic_flag taken = ATOMIC_FLAG_INIT;

static struct {
    piece_function *work;
    void *context;
    int64_t pieces;
    int helpers;
} job;                               /* stands while the gate is open or somebody is inside */
static atomic_int gate;              /* who comes late finds it closed and touches nothing */
static _Atomic uint64_t claimed;     /* pieces taken from the front, and << 32 from the back */

INLINE void breathe(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("yield");
#endif
}

static int64_t claim(bool front) {
    uint64_t old = atomic_load(&claimed);
    for (;;) {
        int64_t before = (int64_t)(old & UINT32_MAX), behind = (int64_t)(old >> 32);
        if (before + behind >= job.pieces) return -1;
        if (atomic_compare_exchange_weak(&claimed, &old, old + (front ? 1 : (uint64_t)1 << 32)))
            return front ? before : job.pieces - 1 - behind;
    }
}

static void take_part(bool front) {
    for (int64_t piece; (piece = claim(front)) >= 0;) job.work(job.context, piece);
}

static void ring(int i) {
    struct helper *helper = &helpers[i];
    atomic_fetch_add(&helper->rung, 1);
    if (atomic_load(&helper->asleep)) {
        pthread_mutex_lock(&helper->mutex);
        pthread_mutex_unlock(&helper->mutex); /* from here on it waits for the bell, or has heard it */
        pthread_cond_signal(&helper->bell);
    }
}

static bool enter(void) {
    int inside = atomic_load(&gate);
    while (inside & OPEN)
        if (atomic_compare_exchange_weak(&gate, &inside, inside + 1)) return true;
    return false;
}

static void *help(void *self) {
    struct helper *helper = self;
    int me = (int)(helper - helpers);
    unsigned heard = 0;
    for (;;) {
        for (int looked = 0; looked < PATIENCE && atomic_load(&helper->rung) == heard; looked++) breathe();
        if (atomic_load(&helper->rung) == heard) {
            pthread_mutex_lock(&helper->mutex);
            atomic_store(&helper->asleep, true);
            while (atomic_load(&helper->rung) == heard) pthread_cond_wait(&helper->bell, &helper->mutex);
            atomic_store(&helper->asleep, false);
            pthread_mutex_unlock(&helper->mutex);
        }
        heard = atomic_load(&helper->rung);
        if (!enter()) continue;
        for (int next = 2 * me + 1; next <= 2 * me + 2; next++) /* each wakes two more */
            if (next < job.helpers) ring(next);
        take_part(false);
        atomic_fetch_sub(&gate, 1);
    }
    return NULL;
}

/* In a new process there is one thread, the one that forked. */
static void forget(void) {
    hired = 0;
    atomic_store(&gate, 0);
    atomic_flag_clear(&taken);
}

/* Processors that the calling thread may run on, and with it whom it starts. */
static int processors(void) {
#if defined(__linux__)
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
    return MOST + 1;
}

/* Starts helpers up to a number, where there are processors for them. They take no signals from the program. */
static void hire(int wanted) {
    int most = processors() - 1;
    sigset_t all, before;
    sigfillset(&all);
    if (!registered) registered = pthread_atfork(NULL, NULL, forget) == 0;
    if (!registered || hired >= most) return;
    pthread_sigmask(SIG_SETMASK, &all, &before);
    while (hired < wanted && hired < most) {
        struct helper *helper = &helpers[hired];
        pthread_mutex_init(&helper->mutex, NULL);
        pthread_cond_init(&helper->bell, NULL);
        atomic_store(&helper->rung, 0);
        atomic_store(&helper->asleep, false);
        if ((refused = pthread_create(&helper->thread, NULL, help, helper) != 0)) break;
        pthread_detach(helper->thread);
#if defined(__linux__)
        pthread_setname_np(helper->thread, "gradflow");
#endif
        hired++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

void share_out(piece_function *work, void *context, int64_t pieces, int64_t threads) {
    int64_t useful = pieces / PIECES_EACH < threads ? pieces / PIECES_EACH : threads;
    if (useful < 2 || pieces > INT32_MAX || atomic_flag_test_and_set(&taken)) { /* taken: another thread reads as well */
        for (int64_t piece = 0; piece < pieces; piece++) work(context, piece);
        return;
    }
    int wanted = (int)(useful - 1 < MOST ? useful - 1 : MOST);
    if (hired < wanted && !refused) hire(wanted);
    job.work = work, job.context = context, job.pieces = pieces, job.helpers = hired < wanted ? hired : wanted;
    atomic_store(&claimed, 0);
    atomic_store(&gate, OPEN);
    if (job.helpers) ring(0);
    take_part(true);
    atomic_fetch_and(&gate, ~OPEN);
    for (int looked = 0; atomic_load(&gate); looked++) looked < PATIENCE ? breathe() : (void)sched_yield();
    atomic_flag_clear(&taken);
}

#endif
