/* What the files on convolutions share. */

#include <stdint.h>

#ifdef __AVX512F__
enum { ROWS = 8, WIDE = 2 };
#else
enum { ROWS = 4, WIDE = 1 };
#endif

/* Sizes and steps in values; rows and columns are those of the input with the zeros around it. */
typedef struct {
    int64_t views, out, height, width, channels, in_height, in_width, kernel_height, kernel_width;
    int64_t row_stride, column_stride, row_dilation, column_dilation, above, left, rows, columns;
    int64_t x_example, x_view, x_channel, x_row, x_column, g_example, g_view, g_channel, g_row, g_column;
} Form;

/* What `standardize` makes of filters, (out, kernel_height, kernel_width, channels), and what is trained. */
typedef struct {
    const float *directions;
    const double *scales, *projects, *twices;
    double factor;
    int of_weight, of_gain;
} Through;

/* Filters of a convolution that are standardized, (out, channels, kernel_height, kernel_width), and how: the arguments
of `standardize`. */
typedef struct {
    const float *weights, *gains;
    double floor, extra, factor;
    int of_weight, of_gain;
} Filters;

static inline int64_t fan_in(const Form *f) { return f->kernel_height * f->kernel_width * f->channels; }

/* Words of room: for an example that is laid out, and for a group of ROWS filters; and how many groups. */
void room_for(const Form *f, int narrow, int64_t *words);

/* rows[ROWS][kernel_height][kernel_width][channels] of one example that is laid out: filters from group * ROWS on.
Filters that are taken twice get the same bits. */
void form_filters(const uint32_t *room, const Form *f, int64_t group, int narrow, float *rows);

void square_norms(const void *rows, int64_t begin, int64_t end, int64_t size, int64_t stride, int narrow,
                  double *squares);
void standardize(const float *weights, int64_t begin, int64_t end, const float *gains, int64_t pieces, int64_t filters,
                 int64_t length, double floor, double extra, double factor, float *directions, double *scales,
                 double *projects, double *twices);
void standardized_square_norms(const void *parts, int64_t begin, int64_t end, int64_t pieces, int64_t filters,
                               int64_t length, int64_t by_example, int64_t by_piece, int64_t by_filter, int narrow,
                               const float *directions, const double *scales, const double *projects,
                               const double *twices, double factor, int of_weight, int of_gain, double *squares,
                               double *lengths);
void standardized_gradients(const double *sums, const float *weights, int64_t begin, int64_t end, const float *gains,
                            int64_t length, double floor, double extra, double factor, float *of_weight,
                            float *of_gain);

