/* Samples of rows: taken from a tensor, and the figures of their geometry that `geometry` defines. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "_helpers.h"
#include "_portable.h"

enum {
    TOGETHER = 1 << 16, /* bytes that a thread copies at once */
    MAGNITUDE = 0x7fffffff,
    SPARSE = 16 /* elements for one of those that the place of the median is guessed from */
};

/* Rows of `bytes` each, by their numbers, to be put one after the other. */
struct rows {
    const char *x;
    const int64_t *numbers;
    int64_t count, bytes, together;
    char *room;
};

static void take_some(void *context, int64_t piece) {
    const struct rows *r = context;
    int64_t end = (piece + 1) * r->together < r->count ? (piece + 1) * r->together : r->count;
    for (int64_t i = piece * r->together; i < end; i++) {
        const char *next = r->x + r->numbers[i + 1 < end ? i + 1 : i] * r->bytes; /* rows apart are not foreseen */
        for (int64_t byte = 0; byte < r->bytes; byte += LINE) PREFETCH(next + byte);
        memcpy(r->room + i * r->bytes, r->x + r->numbers[i] * r->bytes, (size_t)r->bytes);
    }
}

PUBLIC void take_rows(const char *x, const int64_t *numbers, int64_t count, int64_t bytes, int64_t threads, char *room) {
    struct rows r = {x, numbers, count, bytes, TOGETHER / bytes + 1, room};
    share_out(take_some, &r, (count + r.together - 1) / r.together, threads);
}

INLINE double number(int32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return (double)x;
}

/* Samples of one shape (sequence, position, width), float32. Of each: kurtosis, max_over_median, token_cosine. */
struct samples {
    const int32_t *const *x; /* numbers by their bits */
    int64_t sequences, positions, width;
    double *found;
};

/* |x| by its bits, which order as the numbers do, with NaN above infinity. */
WIDEST static int64_t at_most(const int32_t *x, int64_t n, int32_t limit) {
    int64_t count = 0;
    for (int64_t start = 0; start < n; start += 1 << 14) {
        int32_t few = 0;
        int64_t end = n - start < 1 << 14 ? n : start + (1 << 14);
        for (int64_t i = start; i < end; i++) few += (x[i] & MAGNITUDE) <= limit;
        count += few;
    }
    return count;
}

/* The k-th of n magnitudes, by halving what it may be: the smallest that k + 1 of them are at most. */
static int32_t kth(const int32_t *x, int64_t n, int64_t k) {
    int32_t low = 0, high = MAGNITUDE;
    while (low < high) {
        int32_t middle = low + (high - low) / 2;
        if (at_most(x, n, middle) > k) high = middle;
        else low = middle + 1;
    }
    return low;
}

/* The same of many: among those alone that lie between two which a few of them say it is between. */
static int32_t kth_of_many(const int32_t *x, int64_t n, int64_t k, int32_t *room, int64_t most) {
    int64_t few = n / SPARSE, guess = k / SPARSE, margin = (int64_t)(2 * sqrt((double)few));
    if (few < SPARSE * SPARSE || few > most) return kth(x, n, k);
    for (int64_t i = 0; i < few; i++) room[i] = x[i * SPARSE];
    int32_t low = guess > margin ? kth(room, few, guess - margin) : 0;
    int32_t high = guess + margin < few ? kth(room, few, guess + margin) : MAGNITUDE;
    int64_t before = low ? at_most(x, n, low - 1) : 0, kept = 0;
    for (int64_t i = 0; i < n && kept < most; i++) {
        room[kept] = x[i];
        kept += (x[i] & MAGNITUDE) >= low && (x[i] & MAGNITUDE) <= high;
    }
    return k >= before && k < before + kept && kept < most ? kth(room, kept, k - before) : kth(x, n, k);
}

/* One row: adds Σx⁴, and gives Σx². */
WIDEST static double read_row(const int32_t *x, int64_t width, double *fourth) {
    double square = 0, sum = 0;
#pragma omp simd reduction(+ : square, sum)
    for (int64_t i = 0; i < width; i++) {
        double v = number(x[i]) * number(x[i]);
        square += v;
        sum += v * v;
    }
    *fourth += sum;
    return square;
}

WIDEST static void add_row(double *to, const int32_t *x, int64_t width, double factor) {
    for (int64_t i = 0; i < width; i++) to[i] += factor * number(x[i]);
}

WIDEST static double squares(const double *x, int64_t n) {
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++) sum += x[i] * x[i];
    return sum;
}

WIDEST static int32_t largest_of(const int32_t *x, int64_t n) {
    int32_t largest = 0;
    for (int64_t i = 0; i < n; i++) largest = (x[i] & MAGNITUDE) > largest ? x[i] & MAGNITUDE : largest;
    return largest;
}

static void look_at(void *context, int64_t piece) {
    const struct samples *s = context;
    const int32_t *x = s->x[piece];
    int64_t width = s->width, n = s->sequences * s->positions * width, most = n / 4 + 1, valid = 0;
    double *found = s->found + 3 * piece, square = 0, fourth = 0, cosines = 0;
    int32_t *room = malloc((size_t)most * sizeof *room);
    double *together = malloc((size_t)width * sizeof *together);
    if (room && together) {
        for (int64_t sequence = 0; sequence < s->sequences; sequence++) {
            double count = 0;
            memset(together, 0, (size_t)width * sizeof *together);
            for (int64_t position = 0; position < s->positions; position++) {
                int64_t start = (sequence * s->positions + position) * width;
                double size = read_row(x + start, width, &fourth);
                square += size;
                if (size != 0) {
                    count++;
                    add_row(together, x + start, width, 1 / sqrt(size));
                }
            }
            if (count > 1) {
                cosines += (squares(together, width) - count) / (count * (count - 1));
                valid++;
            }
        }
        double middle = number(kth_of_many(x, n, (n - 1) / 2, room, most));
        found[0] = fourth / (double)n / (square / (double)n * (square / (double)n));
        found[1] = number(largest_of(x, n)) / middle;
        found[2] = cosines / (double)valid;
    } else {
        found[0] = found[1] = found[2] = NAN;
    }
    free(room);
    free(together);
}

PUBLIC void figures_of_samples(const int32_t *const *x, int64_t k, int64_t sequences, int64_t positions, int64_t width,
                               int64_t threads, double *found) {
    struct samples s = {x, sequences, positions, width, found};
    share_out(look_at, &s, k, threads);
}
