/* Norms and sums of per-example gradients on a CPU: one pass over rows of float32 or bfloat16, without converting them
in memory. Sums are added up in several accumulators, in double where rounding could shorten a norm. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { PIECE = 256, TILE = 2048, LANES = 64 };

static inline float widen(uint16_t half) {
    uint32_t word = (uint32_t)half << 16;
    float x;
    memcpy(&x, &word, 4);
    return x;
}

static inline void widen_all(const uint16_t *restrict from, int64_t n, float *restrict into) {
    for (int64_t j = 0; j < n; j++) into[j] = widen(from[j]);
}

static inline float square(float x) { return x * x; }

/* A loop over n <= PIECE values that adds up in LANES accumulators, of which a compiler makes independent vectors. */
#define ADD_UP(total, n, term)                                                                                         \
    do {                                                                                                               \
        float lanes[LANES] = {0}, some = 0;                                                                            \
        int64_t l = 0;                                                                                                 \
        for (; l + LANES <= (n); l += LANES)                                                                           \
            for (int k = 0; k < LANES; k++) { const int64_t at = l + k; lanes[k] += (term); }                          \
        for (; l < (n); l++) { const int64_t at = l; some += (term); }                                                 \
        for (int k = 0; k < LANES; k++) some += lanes[k];                                                              \
        (total) += some;                                                                                               \
    } while (0)

/* squares[i] = sum of the squares of row i; a piece of PIECE values in float32, the pieces in double. */
void square_norms(const void *rows, int64_t begin, int64_t end, int64_t size, int64_t stride, int narrow,
                  double *squares) {
    float room[PIECE];
    for (int64_t i = begin; i < end; i++) {
        double total = 0;
        for (int64_t j = 0; j < size; j += PIECE) {
            int64_t n = size - j < PIECE ? size - j : PIECE;
            const float *x = room;
            if (narrow) widen_all((const uint16_t *)rows + i * stride + j, n, room);
            else x = (const float *)rows + i * stride + j;
            ADD_UP(total, n, x[at] * x[at]);
        }
        squares[i] = total;
    }
}

static inline float value(const void *rows, int64_t at, int narrow) {
    return narrow ? widen(((const uint16_t *)rows)[at]) : ((const float *)rows)[at];
}

/* total[j] = sum over rows of weights[i] * rows[i][j]; a row of weight zero is not read. */
static inline void add_rows(const void *rows, int64_t count, int64_t begin, int64_t end, int64_t stride, int narrow,
                            const float *weights, float *total) {
    for (int64_t j = begin; j < end; j += TILE) {
        int64_t n = end - j < TILE ? end - j : TILE;
        float *restrict into = total + j;
        memset(into, 0, (size_t)n * sizeof(float));
        for (int64_t i = 0; i < count;) { /* four rows at once */
            int64_t from[4], found = 0;
            float w[4] = {0};
            for (; i < count && found < 4; i++)
                if (weights[i] != 0) from[found] = i * stride + j, w[found++] = weights[i];
            if (found == 4)
                for (int64_t l = 0; l < n; l++)
                    into[l] += (w[0] * value(rows, from[0] + l, narrow) + w[1] * value(rows, from[1] + l, narrow)) +
                               (w[2] * value(rows, from[2] + l, narrow) + w[3] * value(rows, from[3] + l, narrow));
            else
                for (int64_t k = 0; k < found; k++)
                    for (int64_t l = 0; l < n; l++) into[l] += w[k] * value(rows, from[k] + l, narrow);
        }
    }
}

void weighted_sum(const void *rows, int64_t count, int64_t begin, int64_t end, int64_t stride, int narrow,
                  const float *weights, float *total) {
    if (narrow) add_rows(rows, count, begin, end, stride, 1, weights, total);
    else add_rows(rows, count, begin, end, stride, 0, weights, total);
}

/* Of filters in `pieces` pieces (pieces, filters, length), used as factor * gain * (w - mean(w)) / tau with
tau^2 = max(|w - mean(w)|^2, floor) + extra: h = (w - mean(w)) / tau, filter by filter, factor * gain / tau, and whether
the floor is passed. */
void standardize(const float *weights, const float *gains, int64_t pieces, int64_t filters, int64_t length, double floor,
                 double extra, double factor, float *directions, double *scales, double *projects) {
    for (int64_t f = 0; f < filters; f++) {
        double sum = 0, square = 0;
        for (int64_t p = 0; p < pieces; p++)
            for (int64_t j = 0; j < length; j++) sum += weights[(p * filters + f) * length + j];
        const double mean = sum / (pieces * length);
        for (int64_t p = 0; p < pieces; p++)
            for (int64_t j = 0; j < length; j++) {
                double away = weights[(p * filters + f) * length + j] - mean;
                square += away * away;
            }
        const double inverse = 1 / sqrt((square > floor ? square : floor) + extra);
        for (int64_t p = 0; p < pieces; p++)
            for (int64_t j = 0; j < length; j++)
                directions[(f * pieces + p) * length + j] =
                    (float)((weights[(p * filters + f) * length + j] - mean) * inverse);
        scales[f] = factor * inverse * (gains ? gains[f] : 1);
        projects[f] = square > floor;
    }
}

/* Of every example of begin..end, the sum over its filters of |d/dw|^2 + |d/dgain|^2, with G in `pieces` pieces of
`length` values: (scale * |G - mean(G) - project * h * (h.G)|)^2 + (factor * (h.G))^2. */
void standardized_square_norms(const void *parts, int64_t begin, int64_t end, int64_t pieces, int64_t filters,
                               int64_t length, int64_t by_example, int64_t by_piece, int64_t by_filter, int narrow,
                               const float *directions, const double *scales, const double *projects, double factor,
                               int of_weight, int of_gain, double *squares) {
    const int64_t count = pieces * length;
    float *room = malloc((size_t)count * sizeof(float));
    for (int64_t e = begin; e < end; e++) {
        squares[e] = room ? 0 : NAN;
        for (int64_t f = 0; room && f < filters; f++) {
            const float *g = room, *h = directions + f * count;
            for (int64_t p = 0; p < pieces; p++) {
                const int64_t from = e * by_example + p * by_piece + f * by_filter;
                if (narrow) widen_all((const uint16_t *)parts + from, length, room + p * length);
                else if (pieces > 1) memcpy(room + p * length, (const float *)parts + from, (size_t)length * 4);
                else g = (const float *)parts + from;
            }
            double sum = 0, along = 0, left = 0;
            for (int64_t j = 0; j < count; j += PIECE) {
                const int64_t n = count - j < PIECE ? count - j : PIECE;
                ADD_UP(sum, n, g[j + at]);
                ADD_UP(along, n, g[j + at] * h[j + at]);
            }
            if (of_weight) { /* once more, from the cache */
                const float mean = (float)(sum / count), moved = (float)(projects[f] * along);
                for (int64_t j = 0; j < count; j += PIECE) {
                    const int64_t n = count - j < PIECE ? count - j : PIECE;
                    ADD_UP(left, n, square(g[j + at] - mean - moved * h[j + at]));
                }
            }
            squares[e] += scales[f] * scales[f] * left;
            if (of_gain) squares[e] += factor * factor * along * along;
        }
    }
    free(room);
}
