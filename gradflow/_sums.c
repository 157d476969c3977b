/* Sums over numbers in memory, one pass each: what host_sums asks where this could be compiled.
 *
 * Every element is widened to double, which is exact, and every sum runs in double. Asking for memory ahead of the loop
 * saves a third of the time where it lies beyond the caches. Long vectors are shared among threads; the pieces depend on the length alone, so a sum is the same on any
 * number of them. No function looks at Python, and none changes the floating-point environment (no -ffast-math, which
 * would flush the caller's subnormal numbers).
 */
#include <stdint.h>
#include <string.h>

#include "_helpers.h"
#include "_portable.h"

enum {
    BLOCK = 256,      /* elements summed at once; as many bytes are asked for, AHEAD of them */
    AHEAD = 8192,
    SHARED = 1 << 15, /* elements from which on waking the other threads pays */
    PIECE = 1 << 14,  /* elements that a thread takes at once, more where a vector would be more than PIECES of them */
    PIECES = 64,
    GROUP = 32,       /* vectors that they are woken for at once */
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

/* Sums over a = x[i] and b = y[i]: what to add to `sum`, and to `other`. */
#define PAIRWISE(what, name, word, add)                                                                                \
    WIDEST static void what##_part_##name(void *one, const void *another, int64_t n, double *found) {                  \
        const word *restrict x = one, *restrict y = another;                                                           \
        EACH_BLOCK(start, end, n) {                                                                                    \
            double sum = 0, other = 0;                                                                                 \
            ask(x + start, BLOCK * sizeof *x);                                                                         \
            ask(y + start, BLOCK * sizeof *y);                                                                         \
            _Pragma("omp simd reduction(+ : sum, other)")                                                              \
            for (int64_t i = start; i < end; i++) {                                                                    \
                double a = wide_##name(x[i]), b = wide_##name(y[i]);                                                   \
                add                                                                                                    \
            }                                                                                                          \
            found[0] += sum;                                                                                           \
            found[1] += other;                                                                                         \
        }                                                                                                              \
    }

/* A block of a copy, past the caches: nobody reads it soon, and a cache would first ask memory for what it overwrites. */
#if defined(__SSE2__) || defined(_M_X64)
#include <emmintrin.h>
INLINE void put_aside(void *to, const void *from, size_t bytes) {
    if ((uintptr_t)to % sizeof(__m128i) || bytes % sizeof(__m128i)) {
        memcpy(to, from, bytes);
        return;
    }
    for (size_t i = 0; i < bytes / sizeof(__m128i); i++)
        _mm_stream_si128((__m128i *)to + i, _mm_loadu_si128((const __m128i *)from + i));
}
#define ARRIVED() _mm_sfence()
#else
#define put_aside memcpy
#define ARRIVED() ((void)0)
#endif

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
                sum += v * v;                                                                                          \
            }                                                                                                          \
            put_aside(room + start, x + start, (size_t)(end - start) * sizeof *x);                                     \
            found[0] += sum;                                                                                           \
        }                                                                                                              \
        ARRIVED();                                                                                                     \
    }

#define PARTS(name, word, magnitude)                                                                                   \
    MEASURE(name, word, magnitude)                                                                                     \
    PAIRWISE(dot, name, word, sum += a * b; other += a * a;)                                                           \
    PAIRWISE(distance, name, word, sum += (a - b) * (a - b);)                                                          \
    COPY(name, word)

PARTS(f32, uint32_t, 0x7fffffffu)
PARTS(f64, uint64_t, 0x7fffffffffffffffu)
PARTS(bf16, uint16_t, 0x7fff)
PARTS(f16, uint16_t, 0x7fff)

/* Where the processor has vectors of 512 or of 256 bits, asked when the library is loaded: _lanes.h. */
#if defined(__GNUC__) && defined(__x86_64__)
#include <immintrin.h>

#define LANES 8
#define OF(name) name##_512
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))
#define Doubles __m512d
#define Words __m512i
TARGET INLINE __m512i bits_f32_512(const uint32_t *x) { return _mm512_loadu_si512(x); }
TARGET INLINE __m512i bits_f16_512(const uint16_t *x) {
    return _mm512_castps_si512(_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)x)));
}
TARGET INLINE __m512i bits_bf16_512(const uint16_t *x) {
    return _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)x)), 16);
}
TARGET INLINE __m512d widen_f32_512(const uint32_t *x) { return _mm512_cvtps_pd(_mm256_loadu_ps((const float *)x)); }
TARGET INLINE __m512d widen_f16_512(const uint16_t *x) {
    return _mm512_cvtps_pd(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)x)));
}
TARGET INLINE __m512d widen_bf16_512(const uint16_t *x) {
    __m256i bits = _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)x)), 16);
    return _mm512_cvtps_pd(_mm256_castsi256_ps(bits));
}
TARGET INLINE __m512i magnitudes_512(__m512i x) { return _mm512_and_si512(x, _mm512_set1_epi32(0x7fffffff)); }
TARGET INLINE __m512i larger_512(__m512i a, __m512i b) { return _mm512_max_epu32(a, b); }
TARGET INLINE __m512i count_zeros_512(__m512i count, __m512i x) {
    return _mm512_mask_sub_epi32(count, _mm512_testn_epi32_mask(x, x), count, _mm512_set1_epi32(-1));
}
#include "_lanes.h"
#undef LANES
#undef OF
#undef TARGET
#undef Doubles
#undef Words

#define LANES 4
#define OF(name) name##_256
#define TARGET __attribute__((target("avx2,fma,f16c")))
#define Doubles __m256d
#define Words __m256i
TARGET INLINE __m256i bits_f32_256(const uint32_t *x) { return _mm256_loadu_si256((const __m256i *)x); }
TARGET INLINE __m256i bits_f16_256(const uint16_t *x) {
    return _mm256_castps_si256(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)x)));
}
TARGET INLINE __m256i bits_bf16_256(const uint16_t *x) {
    return _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)x)), 16);
}
TARGET INLINE __m256d widen_f32_256(const uint32_t *x) { return _mm256_cvtps_pd(_mm_loadu_ps((const float *)x)); }
TARGET INLINE __m256d widen_f16_256(const uint16_t *x) {
    return _mm256_cvtps_pd(_mm_cvtph_ps(_mm_loadl_epi64((const __m128i *)x)));
}
TARGET INLINE __m256d widen_bf16_256(const uint16_t *x) {
    __m128i bits = _mm_slli_epi32(_mm_cvtepu16_epi32(_mm_loadl_epi64((const __m128i *)x)), 16);
    return _mm256_cvtps_pd(_mm_castsi128_ps(bits));
}
TARGET INLINE __m256i magnitudes_256(__m256i x) { return _mm256_and_si256(x, _mm256_set1_epi32(0x7fffffff)); }
TARGET INLINE __m256i larger_256(__m256i a, __m256i b) { return _mm256_max_epu32(a, b); }
TARGET INLINE __m256i count_zeros_256(__m256i count, __m256i x) {
    return _mm256_sub_epi32(count, _mm256_cmpeq_epi32(x, _mm256_setzero_si256()));
}
#include "_lanes.h"

static int64_t vector_bits;

/* Bits of the vectors in use from now on: the most that the processor has and `most` allows; 0 for what is compiled for
 * any processor. */
PUBLIC int64_t widest_vectors(int64_t most) {
    __builtin_cpu_init();
    int some = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); /* who has them has f16c */
    int wide = some && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    return vector_bits = wide && most >= 512 ? 512 : some && most >= 256 ? 256 : 0;
}

__attribute__((constructor)) static void look_at_processor(void) { widest_vectors(512); }
#define BEST(part) (vector_bits == 512 ? part##_512 : vector_bits ? part##_256 : part)
#else
PUBLIC int64_t widest_vectors(int64_t most) { return 0 * most; }
#define BEST(part) part
#endif
#define PLAIN(part) part

typedef void part_function(void *, const void *, int64_t, double *);

static int64_t piece_of(int64_t n) {
    int64_t least = (n / PIECES / BLOCK + 1) * BLOCK;
    return least < PIECE ? PIECE : least;
}

/* Vectors of elements of `size` bytes, cut into pieces: vector i begins with the piece first[i]. */
struct vectors {
    part_function *part;
    int64_t size;
    char *const *x, *const *y;
    const int64_t *n;
    int64_t first[GROUP + 1];
    double figures[GROUP * PIECES][FIGURES];
};

static void read_piece(void *context, int64_t piece) {
    struct vectors *v = context;
    int64_t i = 0;
    while (v->first[i + 1] <= piece) i++;
    int64_t step = piece_of(v->n[i]), start = (piece - v->first[i]) * step;
    int64_t count = v->n[i] - start < step ? v->n[i] - start : step;
    v->part(v->x[i] + start * v->size, v->y ? v->y[i] + start * v->size : NULL, count, v->figures[piece]);
}

/* Up to GROUP vectors. The sum of one is that of its pieces, in their order. */
static void group(part_function *part, int64_t size, char *const *x, char *const *y, const int64_t *n, int64_t k,
                  int64_t threads, double *found) {
    struct vectors v; /* of its figures only those of pieces that there are */
    int64_t total = 0, *first = v.first;
    v.part = part, v.size = size, v.x = x, v.y = y, v.n = n;
    *first = 0;
    for (int64_t i = 0; i < k; i++) {
        total += n[i];
        first[i + 1] = first[i] + (n[i] + piece_of(n[i]) - 1) / piece_of(n[i]);
    }
    memset(v.figures, 0, (size_t)first[k] * sizeof *v.figures);
    share_out(read_piece, &v, first[k], total < SHARED ? 1 : threads);
    for (int64_t i = 0; i < k; i++)
        for (int64_t piece = first[i]; piece < first[i + 1]; piece++) {
            double *sums = found + i * FIGURES, largest = v.figures[piece][LARGEST];
            for (int j = 0; j < FIGURES; j++)
                if (j != LARGEST) sums[j] += v.figures[piece][j];
            if (largest > sums[LARGEST] || largest != largest) sums[LARGEST] = largest; /* no number is above NaN */
        }
}

static void each(part_function *part, int64_t size, char *const *x, char *const *y, const int64_t *n, int64_t k,
                 int64_t threads, double *found) {
    memset(found, 0, (size_t)k * FIGURES * sizeof *found);
    if (k == 1 && *n <= piece_of(*n)) {
        part(*x, y ? *y : NULL, *n, found);
        return;
    }
    for (int64_t i = 0; i < k; i += GROUP)
        group(part, size, x + i, y ? y + i : NULL, n + i, k - i < GROUP ? k - i : GROUP, threads, found + i * FIGURES);
}

/* One vector, or pair of vectors. */
#define ONE(what, name, word, which)                                                                                   \
    PUBLIC void what##_##name(void *one, void *other, int64_t n, int64_t threads, double *found) {                     \
        char *x = one, *y = other;                                                                                     \
        each(which(what##_part_##name), sizeof(word), &x, y ? &y : NULL, &n, 1, threads, found);                       \
    }

/* Several at once. */
#define EACH(what, name, word, which)                                                                                  \
    PUBLIC void what##_each_##name(char *const *x, char *const *y, const int64_t *n, int64_t k, int64_t threads,       \
                                   double *found) {                                                                    \
        each(which(what##_part_##name), sizeof(word), x, y, n, k, threads, found);                                     \
    }

#define ALL(name, word, which)                                                                                         \
    ONE(measure, name, word, which)                                                                                    \
    ONE(dot, name, word, which)                                                                                        \
    EACH(measure, name, word, which)                                                                                   \
    EACH(distance, name, word, which)                                                                                  \
    EACH(copy, name, word, which)

/* Another number where a function takes other arguments than before: who loads an old library must not call it. */
PUBLIC const int64_t edition = 4;

ALL(f32, uint32_t, BEST)
ALL(f64, uint64_t, PLAIN)
ALL(bf16, uint16_t, BEST)
ALL(f16, uint16_t, BEST)
