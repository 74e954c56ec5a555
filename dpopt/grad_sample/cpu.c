/* Norms and sums of per-example gradients on a CPU: one pass over rows of float32 or bfloat16, without converting them
in memory. Sums are added up in several accumulators, in double where rounding could shorten a norm. */

#include <math.h>
#include <stdint.h>
#include <string.h>

enum { PIECE = 256, TILE = 2048, LANES = 64, HALF = 32 };

static inline float widen(uint16_t half) {
    uint32_t word = (uint32_t)half << 16;
    float x;
    memcpy(&x, &word, 4);
    return x;
}

static inline void widen_all(const uint16_t *restrict from, int64_t n, float *restrict into) {
    for (int64_t j = 0; j < n; j++) into[j] = widen(from[j]);
}

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
                            const float *weights, double *total) {
    for (int64_t j = begin; j < end; j += TILE) {
        int64_t n = end - j < TILE ? end - j : TILE;
        double *restrict into = total + j;
        memset(into, 0, (size_t)n * sizeof(double));
        for (int64_t i = 0; i < count;) { /* four rows at once */
            int64_t from[4], found = 0;
            double w[4] = {0};
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
                  const float *weights, double *total) {
    if (narrow) add_rows(rows, count, begin, end, stride, 1, weights, total);
    else add_rows(rows, count, begin, end, stride, 0, weights, total);
}

/* Of filters begin..end, in `pieces` pieces (pieces, filters, length), used as factor * gain * (w - mean(w)) / tau with
tau^2 = max(|w - mean(w)|^2, floor) + extra: h = (w - mean(w)) / tau, filter by filter, factor * gain / tau, whether the
floor is passed, and if so 2 - |h|^2. */
void standardize(const float *weights, int64_t begin, int64_t end, const float *gains, int64_t pieces, int64_t filters,
                 int64_t length, double floor, double extra, double factor, float *directions, double *scales,
                 double *projects, double *twices) {
    for (int64_t f = begin; f < end; f++) {
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
        double twice = 2;
        for (int64_t p = 0; p < pieces; p++)
            for (int64_t j = 0; j < length; j++) {
                const float h = (float)((weights[(p * filters + f) * length + j] - mean) * inverse);
                directions[(f * pieces + p) * length + j] = h;
                twice -= (double)h * h;
            }
        scales[f] = factor * inverse * (gains ? gains[f] : 1);
        projects[f] = square > floor;
        twices[f] = projects[f] * twice;
    }
}

/* Add up the squares of n values, the values, and their products with h: a piece of PIECE in float32. */
static inline void add_moments(const void *rows, int64_t from, int64_t n, int narrow, const float *h, double *square,
                               double *sum, double *along) {
    for (int64_t j = 0; j < n; j += PIECE) {
        const int64_t end = n - j < PIECE ? n : j + PIECE;
        float squares[HALF] = {0}, sums[HALF] = {0}, alongs[HALF] = {0}, a_square = 0, a_sum = 0, an_along = 0;
        int64_t l = j;
        for (; l + HALF <= end; l += HALF)
            for (int k = 0; k < HALF; k++) {
                const float x = value(rows, from + l + k, narrow);
                squares[k] += x * x, sums[k] += x, alongs[k] += x * h[l + k];
            }
        for (; l < end; l++) {
            const float x = value(rows, from + l, narrow);
            a_square += x * x, a_sum += x, an_along += x * h[l];
        }
        for (int k = 0; k < HALF; k++) a_square += squares[k], a_sum += sums[k], an_along += alongs[k];
        *square += a_square, *sum += a_sum, *along += an_along;
    }
}

/* In one pass from three sums: |G - mean(G) - project * h * (h.G)|^2 = |G|^2 - sum^2 / n - twice * (h.G)^2. Where that is
less than a quarter of |G|^2, rounding could make it too small, and the values are read once more, in double. */
static inline void add_filters(const void *parts, int64_t begin, int64_t end, int64_t pieces, int64_t filters,
                               int64_t length, int64_t by_example, int64_t by_piece, int64_t by_filter, int narrow,
                               const float *directions, const double *scales, const double *projects,
                               const double *twices, double factor, int of_weight, int of_gain, double *squares,
                               double *lengths) {
    const int64_t count = pieces * length;
    for (int64_t e = begin; e < end; e++) {
        squares[e] = lengths[e] = 0;
        for (int64_t f = 0; f < filters; f++) {
            const int64_t first = e * by_example + f * by_filter;
            const float *h = directions + f * count;
            double whole = 0, sum = 0, along = 0;
            for (int64_t p = 0; p < pieces; p++)
                add_moments(parts, first + p * by_piece, length, narrow, h + p * length, &whole, &sum, &along);
            double left = whole - sum * sum / count - twices[f] * along * along;
            if (of_weight && !(left >= whole / 4)) {
                const double mean = sum / count, moved = projects[f] * along;
                left = 0;
                for (int64_t p = 0; p < pieces; p++)
                    for (int64_t j = 0; j < length; j++) {
                        const double x = value(parts, first + p * by_piece + j, narrow);
                        const double away = x - mean - moved * h[p * length + j];
                        left += away * away;
                    }
            }
            if (of_weight) squares[e] += scales[f] * scales[f] * left, lengths[e] += scales[f] * scales[f] * whole;
            if (of_gain) squares[e] += factor * factor * along * along, lengths[e] += factor * factor * whole;
        }
    }
}

/* Of every example of begin..end, the sum over its filters of |d/dw|^2 + |d/dgain|^2, with G in `pieces` pieces of
`length` values: (scale * |G - mean(G) - project * h * (h.G)|)^2 + (factor * (h.G))^2, and what that is at most for such
|G|^2. */
void standardized_square_norms(const void *parts, int64_t begin, int64_t end, int64_t pieces, int64_t filters,
                               int64_t length, int64_t by_example, int64_t by_piece, int64_t by_filter, int narrow,
                               const float *directions, const double *scales, const double *projects,
                               const double *twices, double factor, int of_weight, int of_gain, double *squares,
                               double *lengths) {
    if (narrow)
        add_filters(parts, begin, end, pieces, filters, length, by_example, by_piece, by_filter, 1, directions, scales,
                    projects, twices, factor, of_weight, of_gain, squares, lengths);
    else
        add_filters(parts, begin, end, pieces, filters, length, by_example, by_piece, by_filter, 0, directions, scales,
                    projects, twices, factor, of_weight, of_gain, squares, lengths);
}

/* Of sums G (filters, length) of all examples, filters begin..end, used as in `standardize`, all in double:
d/dw = scale * (G - mean(G) - project * h * (h.G)) and d/dgain = factor * (h.G). */
void standardized_gradients(const double *sums, const float *weights, int64_t begin, int64_t end, const float *gains,
                            int64_t length, double floor, double extra, double factor, float *of_weight,
                            float *of_gain) {
    for (int64_t f = begin; f < end; f++) {
        const double *g = sums + f * length;
        const float *w = weights + f * length;
        double g_mean = 0, w_mean = 0, square = 0, along = 0;
        for (int64_t j = 0; j < length; j++) g_mean += g[j], w_mean += w[j];
        g_mean /= length, w_mean /= length;
        for (int64_t j = 0; j < length; j++) {
            const double away = w[j] - w_mean;
            square += away * away, along += away * g[j];
        }
        const double inverse = 1 / sqrt((square > floor ? square : floor) + extra);
        const double scale = factor * inverse * (gains ? gains[f] : 1);
        const double moved = square > floor ? along * inverse * inverse : 0;
        for (int64_t j = 0; j < length; j++)
            of_weight[f * length + j] = (float)(scale * (g[j] - g_mean - moved * (w[j] - w_mean)));
        of_gain[f] = (float)(factor * along * inverse);
    }
}
