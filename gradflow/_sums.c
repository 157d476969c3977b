/* Sums over numbers in memory, one pass each: what host_sums asks where this could be compiled.
 *
 * Every element is widened to double, which is exact, and every sum runs in double. A loop that reads, widens and adds
 * is limited by memory: a statistic more costs next to nothing, and asking for memory ahead of the loop saves a third
 * of the time. Long vectors are shared among the threads of OpenMP, which are PyTorch's own where both use one library;
 * the pieces depend on the length alone, so a sum is the same on any number of threads. No function looks at Python,
 * and none changes the floating-point environment (no -ffast-math, which would flush the caller's subnormal numbers).
 */
#include <stdint.h>
#include <string.h>

#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__gnu_linux__)
/* The widest vectors that the machine has, chosen when the library is loaded. */
#define WIDEST __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define WIDEST
#endif

#if defined(_MSC_VER)
#define restrict __restrict
#define INLINE static __forceinline
#define PUBLIC __declspec(dllexport)
#define PREFETCH(address) ((void)(address))
#else
#define INLINE static inline __attribute__((always_inline))
#define PUBLIC
#define PREFETCH(address) __builtin_prefetch(address) /* of an address that may lie behind the end: it cannot fail */
#endif

enum {
    BLOCK = 256,      /* elements summed at once; as many bytes are asked for, AHEAD of them */
    AHEAD = 8192,
    LINE = 64,
    SHARED = 1 << 17, /* elements from which on waking the other threads pays */
    PIECES = 32,      /* that they share */
    FIGURES = 4,
    LARGEST = 2       /* the one among them that is not a sum */
};

INLINE void ask(const void *at, size_t bytes) {
    for (size_t i = 0; i < bytes; i += LINE) PREFETCH((const char *)at + AHEAD + i);
}
INLINE uint32_t bits_of(float x) { uint32_t b; memcpy(&b, &x, sizeof b); return b; }
INLINE float float_of(uint32_t b) { float x; memcpy(&x, &b, sizeof x); return x; }

INLINE double wide_f32(uint32_t b) { return (double)float_of(b); }
INLINE double wide_f64(uint64_t b) { double x; memcpy(&x, &b, sizeof x); return x; }
INLINE double wide_bf16(uint16_t b) { return (double)float_of((uint32_t)b << 16); }
INLINE double wide_f16(uint16_t b) {
    uint32_t sign = (uint32_t)(b & 0x8000) << 16, rest = b & 0x7fff;
    uint32_t normal = (rest << 13) + (112u << 23);             /* exponents count from 127 here, from 15 there */
    uint32_t special = (rest << 13) | 0x7f800000u;             /* infinite or NaN */
    uint32_t small = bits_of((float)(int32_t)rest * 0x1p-24f); /* subnormal, or zero */
    return (double)float_of(sign | (rest >= 0x7c00 ? special : rest < 0x400 ? small : normal));
}

#define EACH_BLOCK(start, end, n)                                                                                      \
    for (int64_t start = 0, end; end = (n) - start < BLOCK ? (n) : start + BLOCK, start < (n); start = end)

/* The sum of x, the sum of x*x, the largest |x| (NaN if there is one), the number of zeros of either sign.
 * |x| is compared by its bits, which order as the numbers do, with NaN above infinity. */
#define MEASURE(name, word, magnitude)                                                                                 \
    WIDEST static void measure_part_##name(void *at, const void *unused, int64_t n, double *found) {                   \
        const word *restrict x = at;                                                                                   \
        double total = 0, square = 0;                                                                                  \
        word largest = 0;                                                                                              \
        int64_t zeros = 0;                                                                                             \
        (void)unused;                                                                                                  \
        EACH_BLOCK(start, end, n) {                                                                                    \
            double t = 0, q = 0;                                                                                       \
            word m = 0, z = 0;                                                                                         \
            ask(x + start, BLOCK * sizeof *x);                                                                         \
            _Pragma("omp simd reduction(+ : t, q, z) reduction(max : m)")                                              \
            for (int64_t i = start; i < end; i++) {                                                                    \
                double v = wide_##name(x[i]);                                                                          \
                word a = x[i] & (magnitude);                                                                           \
                t += v;                                                                                                \
                q += v * v;                                                                                            \
                m = a > m ? a : m;                                                                                     \
                z += a == 0;                                                                                           \
            }                                                                                                          \
            total += t;                                                                                                \
            square += q;                                                                                               \
            largest = m > largest ? m : largest;                                                                       \
            zeros += z;                                                                                                \
        }                                                                                                              \
        found[0] = total;                                                                                              \
        found[1] = square;                                                                                             \
        found[2] = wide_##name(largest);                                                                               \
        found[3] = (double)zeros;                                                                                      \
    }

/* The sum of a term of a = x[i] and b = y[i]. */
#define PAIRWISE(what, name, word, term)                                                                               \
    WIDEST static void what##_part_##name(void *one, const void *other, int64_t n, double *found) {                    \
        const word *restrict x = one, *restrict y = other;                                                             \
        EACH_BLOCK(start, end, n) {                                                                                    \
            double sum = 0;                                                                                            \
            ask(x + start, BLOCK * sizeof *x);                                                                         \
            ask(y + start, BLOCK * sizeof *y);                                                                         \
            _Pragma("omp simd reduction(+ : sum)")                                                                     \
            for (int64_t i = start; i < end; i++) {                                                                    \
                double a = wide_##name(x[i]), b = wide_##name(y[i]);                                                   \
                sum += term;                                                                                           \
            }                                                                                                          \
            found[0] += sum;                                                                                           \
        }                                                                                                              \
    }

/* Copies to where there is room, and the sum of x*x. */
#define COPY(name, word)                                                                                               \
    WIDEST static void copy_part_##name(void *to, const void *from, int64_t n, double *found) {                        \
        word *restrict room = to;                                                                                      \
        const word *restrict x = from;                                                                                 \
        EACH_BLOCK(start, end, n) {                                                                                    \
            double sum = 0;                                                                                            \
            ask(x + start, BLOCK * sizeof *x);                                                                         \
            _Pragma("omp simd reduction(+ : sum)")                                                                     \
            for (int64_t i = start; i < end; i++) {                                                                    \
                double v = wide_##name(x[i]);                                                                          \
                room[i] = x[i];                                                                                        \
                sum += v * v;                                                                                          \
            }                                                                                                          \
            found[0] += sum;                                                                                           \
        }                                                                                                              \
    }

typedef void part_function(void *, const void *, int64_t, double *);

/* All n elements of `size` bytes, in pieces if they are many. */
static void whole(part_function *part, int64_t size, char *x, const char *y, int64_t n, double *found) {
    double figures[PIECES][FIGURES] = {{0}};
    int64_t step = (n / PIECES / BLOCK + 1) * BLOCK;
    memset(found, 0, FIGURES * sizeof *found);
    if (n < SHARED) {
        part(x, y, n, found);
        return;
    }
#pragma omp parallel for schedule(dynamic)
    for (int i = 0; i < PIECES; i++) {
        int64_t start = i * step, count = n - start < step ? n - start : step;
        if (count > 0) part(x + start * size, y ? y + start * size : y, count, figures[i]);
    }
    for (int i = 0; i < PIECES; i++) {
        double largest = figures[i][LARGEST];
        for (int j = 0; j < FIGURES; j++)
            if (j != LARGEST) found[j] += figures[i][j];
        if (largest > found[LARGEST] || largest != largest) found[LARGEST] = largest; /* no number is above NaN */
    }
}

#define ENTRY(what, name, word)                                                                                        \
    PUBLIC void what##_##name(void *x, const void *y, int64_t n, double *found) {                                      \
        whole(what##_part_##name, sizeof(word), x, y, n, found);                                                       \
    }

#define ALL(name, word, magnitude)                                                                                     \
    MEASURE(name, word, magnitude)                                                                                     \
    PAIRWISE(dot, name, word, a * b)                                                                                   \
    PAIRWISE(distance, name, word, (a - b) * (a - b))                                                                  \
    COPY(name, word)                                                                                                   \
    ENTRY(measure, name, word)                                                                                         \
    ENTRY(dot, name, word)                                                                                             \
    ENTRY(distance, name, word)                                                                                        \
    ENTRY(copy, name, word)

ALL(f32, uint32_t, 0x7fffffffu)
ALL(f64, uint64_t, 0x7fffffffffffffffu)
ALL(bf16, uint16_t, 0x7fff)
ALL(f16, uint16_t, 0x7fff)
