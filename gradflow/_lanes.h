/* The loops of _sums.c over numbers of 16 and 32 bits, for processors with vectors of LANES doubles.
 *
 * Compilers widen half a vector at a time and add to one sum, which waits for itself: this is twice as fast. It is
 * included once for every kind of vector, with LANES, the name's ending OF(name), TARGET, and what differs: Doubles,
 * Words (2 LANES of 32 bits), and widen_*, bits_*, larger, count_zeros.
 */
#define STEP (4 * LANES)

#define MEASURE_LANES(name, word)                                                                                      \
    TARGET static void OF(measure_part_##name)(void *at, const void *unused, int64_t n, double *found) {               \
        const word *restrict x = at;                                                                                   \
        Doubles t[4] = {{0}}, q[4] = {{0}};                                                                            \
        Words m[2] = {{0}}, z[2] = {{0}};                                                                              \
        int64_t i = 0;                                                                                                 \
        for (; i + STEP <= n; i += STEP) {                                                                             \
            ask(x + i, STEP * sizeof *x);                                                                              \
            for (int j = 0; j < 4; j++) {                                                                              \
                Doubles v = OF(widen_##name)(x + i + j * LANES);                                                       \
                t[j] += v;                                                                                             \
                q[j] += v * v;                                                                                         \
            }                                                                                                          \
            for (int j = 0; j < 2; j++) {                                                                              \
                Words a = OF(magnitudes)(OF(bits_##name)(x + i + 2 * j * LANES));                                      \
                m[j] = OF(larger)(m[j], a);                                                                            \
                z[j] = OF(count_zeros)(z[j], a);                                                                       \
            }                                                                                                          \
        }                                                                                                              \
        uint32_t most[2 * LANES], none[2 * LANES], largest = 0;                                                        \
        measure_part_##name((void *)(x + i), unused, n - i, found);                                                    \
        m[0] = OF(larger)(m[0], m[1]);                                                                                 \
        memcpy(most, &m[0], sizeof most);                                                                              \
        for (int j = 0; j < 2; j++) {                                                                                  \
            memcpy(none, &z[j], sizeof none);                                                                          \
            for (int k = 0; k < 2 * LANES; k++) found[3] += none[k];                                                   \
        }                                                                                                              \
        for (int k = 0; k < 2 * LANES; k++) largest = most[k] > largest ? most[k] : largest;                           \
        found[0] += OF(total)(t);                                                                                      \
        found[1] += OF(total)(q);                                                                                      \
        if (bits_of((float)found[LARGEST]) < largest) found[LARGEST] = float_of(largest);                              \
    }

#define PAIRWISE_LANES(what, name, word, add)                                                                          \
    TARGET static void OF(what##_part_##name)(void *one, const void *another, int64_t n, double *found) {              \
        const word *restrict x = one, *restrict y = another;                                                           \
        Doubles sums[4] = {{0}}, others[4] = {{0}};                                                                    \
        int64_t i = 0;                                                                                                 \
        for (; i + STEP <= n; i += STEP) {                                                                             \
            ask(x + i, STEP * sizeof *x);                                                                              \
            ask(y + i, STEP * sizeof *y);                                                                              \
            for (int j = 0; j < 4; j++) {                                                                              \
                Doubles a = OF(widen_##name)(x + i + j * LANES), b = OF(widen_##name)(y + i + j * LANES);              \
                Doubles sum = sums[j], other = others[j];                                                              \
                add                                                                                                    \
                sums[j] = sum;                                                                                         \
                others[j] = other;                                                                                     \
            }                                                                                                          \
        }                                                                                                              \
        what##_part_##name((void *)(x + i), y + i, n - i, found);                                                      \
        found[0] += OF(total)(sums);                                                                                   \
        found[1] += OF(total)(others);                                                                                 \
    }

#define COPY_LANES(name, word)                                                                                         \
    TARGET static void OF(copy_part_##name)(void *to, const void *from, int64_t n, double *found) {                    \
        word *restrict room = to;                                                                                      \
        const word *restrict x = from;                                                                                 \
        Doubles sum[4] = {{0}};                                                                                        \
        int64_t start = 0;                                                                                             \
        for (; start + BLOCK <= n; start += BLOCK) {                                                                   \
            ask(x + start, BLOCK * sizeof *x);                                                                         \
            for (int64_t i = start; i < start + BLOCK; i += STEP)                                                      \
                for (int j = 0; j < 4; j++) {                                                                          \
                    Doubles v = OF(widen_##name)(x + i + j * LANES);                                                   \
                    sum[j] += v * v;                                                                                   \
                }                                                                                                      \
            put_aside(room + start, x + start, BLOCK * sizeof *x);                                                     \
        }                                                                                                              \
        copy_part_##name(room + start, x + start, n - start, found);                                                   \
        found[0] += OF(total)(sum);                                                                                    \
    }

TARGET INLINE double OF(total)(const Doubles *of) {
    Doubles all = (of[0] + of[1]) + (of[2] + of[3]);
    double each[LANES], sum = 0;
    memcpy(each, &all, sizeof each);
    for (int i = 0; i < LANES; i++) sum += each[i];
    return sum;
}

#define ALL_LANES(name, word)                                                                                          \
    MEASURE_LANES(name, word)                                                                                          \
    PAIRWISE_LANES(dot, name, word, sum += a * b; other += a * a;)                                                     \
    PAIRWISE_LANES(distance, name, word, sum += (a - b) * (a - b);)                                                    \
    COPY_LANES(name, word)

ALL_LANES(f32, uint32_t)
ALL_LANES(bf16, uint16_t)
ALL_LANES(f16, uint16_t)
