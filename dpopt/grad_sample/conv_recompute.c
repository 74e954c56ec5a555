/* Norms and sums of weight gradients of a convolution that are formed twice, a few filters of one example at a time, and
not written to memory. Examples are laid out before (`conv_lay_out`), each in its own room. */

#include <string.h>

#include "conv.h"

/* to[filter][j][i] = from[filter][i][j] */
static void transpose_filters(const float *from, int64_t filters, int64_t rows, int64_t columns, float *to) {
    for (int64_t k = 0; k < filters; k++, from += rows * columns, to += rows * columns)
        for (int64_t j = 0; j < columns; j++)
            for (int64_t i = 0; i < rows; i++) to[j * rows + i] = from[i * columns + j];
}

/* Squared norms, (groups of ROWS filters, examples), of groups begin..end, and, of standardized filters, lengths: see
`standardized_square_norms`. `rows` is room for 4 * ROWS filters. */
void conv_square_norms(const uint32_t *room, const Form *f, int64_t examples, int64_t begin, int64_t end, int narrow,
                       const Filters *filters, float *rows, double *squares, double *lengths) {
    int64_t words[3];
    room_for(f, narrow, words);
    const int64_t length = fan_in(f), places = f->kernel_height * f->kernel_width;
    float *directions = rows + ROWS * length;
    double scales[ROWS], projects[ROWS], twices[ROWS];
    for (int64_t group = begin; group < end; group++) {
        const int64_t first = group * ROWS, count = f->out - first < ROWS ? f->out - first : ROWS;
        if (filters) {
            transpose_filters(filters->weights + first * length, count, f->channels, places, rows);
            standardize(rows, 0, count, filters->gains ? filters->gains + first : NULL, 1, count, length,
                        filters->floor, filters->extra, filters->factor, directions, scales, projects, twices);
        }
        for (int64_t e = 0; e < examples; e++) {
            double *square = squares + group * examples + e;
            form_filters(room + e * words[0], f, group, narrow, rows);
            if (filters)
                standardized_square_norms(rows, 0, 1, 1, count, length, 0, 0, length, 0, directions, scales, projects,
                                          twices, filters->factor, filters->of_weight, filters->of_gain, square,
                                          lengths + group * examples + e);
            else square_norms(rows, 0, 1, count * length, 0, 0, square);
        }
    }
}

/* Sum over examples of weights[e] * gradient, for groups begin..end of ROWS filters, added up in double; an example of
weight zero is not read. The result is (out, channels, kernel_height, kernel_width); of standardized filters it is
pulled back to them, and to their gains. */
void conv_weighted_sum(const uint32_t *room, const Form *f, int64_t examples, int64_t begin, int64_t end, int narrow,
                       const Filters *filters, float *rows, const double *weights, float *of_weight,
                       float *of_gain) {
    int64_t words[3];
    room_for(f, narrow, words);
    const int64_t length = fan_in(f), places = f->kernel_height * f->kernel_width;
    float *moved = rows + ROWS * length;
    double *restrict sums = (double *)(rows + 2 * ROWS * length);
    for (int64_t group = begin; group < end; group++) {
        const int64_t first = group * ROWS, count = f->out - first < ROWS ? f->out - first : ROWS;
        memset(sums, 0, (size_t)(count * length) * sizeof(double));
        for (int64_t e = 0; e < examples; e++) {
            if (weights[e] == 0) continue;
            form_filters(room + e * words[0], f, group, narrow, rows);
            for (int64_t i = 0; i < count * length; i++) sums[i] += weights[e] * rows[i];
        }
        if (filters) {
            transpose_filters(filters->weights + first * length, count, f->channels, places, rows);
            standardized_gradients(sums, rows, 0, count, filters->gains ? filters->gains + first : NULL, length,
                                   filters->floor, filters->extra, filters->factor, moved, of_gain + first);
        } else
            for (int64_t i = 0; i < count * length; i++) moved[i] = (float)sums[i];
        transpose_filters(moved, count, places, f->channels, of_weight + first * length);
    }
}
