/* Weight gradients of a convolution on a CPU, one for every example.

For each place of the kernel this is a matrix product over the positions of the output. Both factors are laid out as
words of 32 bits, a few channels of one position after another, so that the inner loop reads memory in order; it keeps
ROWS x WIDE vectors of the result in registers. A word is a float, or two bfloat16: of rows y and y + 1 of the output,
and of the rows of the input that these meet. */

#include <stdint.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#ifdef __AVX512F__
enum { ROWS = 8, WIDE = 2 };
#else
enum { ROWS = 4, WIDE = 1 };
#endif
enum { LANES = 16 };
#define INLINE static inline __attribute__((always_inline))

typedef float vector __attribute__((vector_size(64), aligned(4), may_alias));
typedef double doubles __attribute__((vector_size(128)));
typedef uint32_t words __attribute__((vector_size(64), aligned(4), may_alias));

/* Sizes and steps in values; rows and columns are those of the input with the zeros around it. */
typedef struct {
    int64_t views, out, height, width, channels, in_height, in_width, kernel_height, kernel_width;
    int64_t row_stride, column_stride, row_dilation, column_dilation, above, left, rows, columns;
    int64_t x_example, x_view, x_channel, x_row, x_column, g_example, g_view, g_channel, g_row, g_column;
} Form;

/* A row of an image, and the one whose values go into the upper halves of words; a row that is not there is NULL. */
typedef struct {
    const char *lower, *upper;
    int64_t by_channel, by_column;
    int narrow;
} Line;

int takes_bfloat16(void) {
#ifdef __AVX512BF16__
    return 1;
#else
    return 0;
#endif
}

INLINE uint32_t one_word(const Line *line, int64_t at) {
    uint32_t word = 0;
    if (!line->narrow) memcpy(&word, line->lower + 4 * at, 4);
    else {
        if (line->lower) word = ((const uint16_t *)line->lower)[at];
        if (line->upper) word |= (uint32_t)((const uint16_t *)line->upper)[at] << 16;
    }
    return word;
}

INLINE words next_words(const Line *line, int64_t at, int64_t count) {
    words found = {0};
#ifdef __AVX512BF16__
    if (line->narrow) {
        const __mmask16 some = (__mmask16)((1u << count) - 1);
        if (line->lower) found = (words)_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, line->lower + 2 * at));
        if (line->upper)
            found |= (words)_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, line->upper + 2 * at)) << 16;
        return found;
    }
#endif
#ifdef __AVX512F__
    return (words)_mm512_maskz_loadu_epi32((__mmask16)((1u << count) - 1), line->lower + 4 * at);
#endif
    memcpy(&found, line->lower + 4 * at, 4 * count);
    return found;
}

#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (words){__VA_ARGS__})
#endif
#define LOWER(d, j) ((j) & (d) ? LANES + (j) - (d) : (j))
#define UPPER(d, j) ((j) & (d) ? LANES + (j) : (j) + (d))
#define EIGHT(half, d, j)                                                                                              \
    half(d, j), half(d, j + 1), half(d, j + 2), half(d, j + 3), half(d, j + 4), half(d, j + 5), half(d, j + 6),        \
        half(d, j + 7)
#define EXCHANGE(d)                                                                                                    \
    for (int i = 0; i < LANES; i++)                                                                                    \
        if (!(i & d)) {                                                                                                \
            const words a = tile[i], b = tile[i + d];                                                                  \
            tile[i] = SHUFFLE(a, b, EIGHT(LOWER, d, 0), EIGHT(LOWER, d, 8));                                           \
            tile[i + d] = SHUFFLE(a, b, EIGHT(UPPER, d, 0), EIGHT(UPPER, d, 8));                                       \
        }

INLINE void transpose(words tile[LANES]) { EXCHANGE(1) EXCHANGE(2) EXCHANGE(4) EXCHANGE(8) }

/* to[channel / block][column][channel % block], for LANES channels. */
INLINE void put_channels(words found, uint32_t *to, int64_t channel, int64_t column, int64_t block, int64_t by_block) {
    const int64_t size = block < LANES ? block : LANES;
    for (int64_t k = 0; k < LANES; k += size)
        memcpy(to + (channel + k) / block * by_block + column * block + (channel + k) % block, (uint32_t *)&found + k,
               4 * size);
}

INLINE void lay_out(Line line, int64_t channels, int64_t width, uint32_t *to, int64_t block, int64_t by_block) {
    if (!line.lower && !line.upper) return;
    const int64_t whole = channels / LANES * LANES;
    const int in_rows = line.by_column == 1, in_channels = !in_rows && line.by_channel == 1;
    for (int64_t c = 0; in_rows && c < width; c += LANES) {
        const int64_t count = width - c < LANES ? width - c : LANES;
        for (int64_t k = 0; k < whole; k += LANES) {
            words tile[LANES];
            for (int l = 0; l < LANES; l++) tile[l] = next_words(&line, (k + l) * line.by_channel + c, count);
            transpose(tile);
            for (int l = 0; l < count; l++) put_channels(tile[l], to, k, c + l, block, by_block);
        }
    }
    for (int64_t c = 0; in_channels && c < width; c++)
        for (int64_t k = 0; k < whole; k += LANES)
            put_channels(next_words(&line, k + c * line.by_column, LANES), to, k, c, block, by_block);
    for (int64_t c = 0; c < width; c++)
        for (int64_t k = in_rows || in_channels ? whole : 0; k < channels; k++) {
            const int64_t at = k * line.by_channel + c * line.by_column;
            to[k / block * by_block + c * block + k % block] = one_word(&line, at);
        }
}

INLINE vector add_product(vector sum, uint32_t g, vector x, int narrow) {
#ifdef __AVX512BF16__
    if (narrow) return (vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32((int)g), (__m512bh)x);
#endif
    float factor;
    memcpy(&factor, &g, 4);
    return sum + x * factor;
}

/* sums[r][v] = sum over positions of g[position][r] * x[position][v]. */
INLINE void multiply(const uint32_t *g, const uint32_t *x, int64_t height, int64_t width, int64_t by_row,
                     int64_t by_column, int narrow, int wide, vector sums[ROWS][WIDE]) {
    vector found[ROWS][WIDE] = {0};
    for (int64_t y = 0; y < height; y++, x += by_row) {
        const uint32_t *at = x;
        for (int64_t c = 0; c < width; c++, at += by_column, g += ROWS)
            for (int r = 0; r < ROWS; r++)
                for (int v = 0; v < wide; v++)
                    found[r][v] = add_product(found[r][v], g[r], *(const vector *)(at + v * LANES), narrow);
    }
    memcpy(sums, found, sizeof(found));
}

/* Past the caches where `to` is aligned: gradients of all examples are larger than they are. Returns what it writes. */
INLINE vector write(vector sum, int64_t count, int narrow, char *to) {
    const size_t size = (size_t)(count < LANES ? count : LANES) * (narrow ? 2 : 4);
#ifdef __AVX512BF16__
    if (narrow) {
        const __m256i rounded = (__m256i)_mm512_cvtneps_pbh((__m512)sum);
        if (size == 32 && (uintptr_t)to % 32 == 0) _mm256_stream_si256((__m256i *)to, rounded);
        else memcpy(to, &rounded, size);
        return (vector)((words)_mm512_cvtepu16_epi32(rounded) << 16);
    }
#endif
#ifdef __AVX512F__
    if (size == 64 && (uintptr_t)to % 64 == 0) {
        _mm512_stream_ps((float *)to, (__m512)sum);
        return sum;
    }
#endif
    memcpy(to, &sum, size);
    return sum;
}

/* One example's, (out, kernel_height, kernel_width, channels), and the sum of its squares, which are added up in
float32 within a task and then in double. The words around what is laid out are zero, for all examples the same;
`kept` is room for sums over the views so far. */
INLINE double of_example(const char *x, const char *g, const Form *f, int narrow, int wide, uint32_t *x_words,
                       uint32_t *g_words, float *kept, char *result) {
    const int64_t size = narrow ? 2 : 4, pair = narrow ? 2 : 1, block = wide * LANES;
    const int64_t blocks = (f->channels + block - 1) / block, groups = (f->out + ROWS - 1) / ROWS;
    const int64_t height = (f->height + pair - 1) / pair, places = f->kernel_height * f->kernel_width;
    const int64_t x_block = f->rows * f->columns * block, g_group = height * f->width * ROWS;
    doubles total = {0};
    for (int64_t view = 0; view < f->views; view++, x += size * f->x_view, g += size * f->g_view) {
        for (int64_t r = 0; r < f->rows; r++) {
            const int64_t y = r - f->above, next = y + f->row_stride;
            Line line = {y >= 0 && y < f->in_height ? x + size * y * f->x_row : NULL,
                         narrow && next >= 0 && next < f->in_height ? x + size * next * f->x_row : NULL, f->x_channel,
                         f->x_column, narrow};
            lay_out(line, f->channels, f->in_width, x_words + (r * f->columns + f->left) * block, block, x_block);
        }
        for (int64_t y = 0; y < f->height; y += pair) {
            Line line = {g + size * y * f->g_row, narrow && y + 1 < f->height ? g + size * (y + 1) * f->g_row : NULL,
                         f->g_channel, f->g_column, narrow};
            lay_out(line, f->out, f->width, g_words + y / pair * f->width * ROWS, ROWS, g_group);
        }
        for (int64_t task = 0; task < blocks * places * groups; task++) {
            const int64_t b = task / groups / places, place = task / groups % places, o = task % groups;
            const int64_t row = place / f->kernel_width * f->row_dilation;
            const int64_t column = place % f->kernel_width * f->column_dilation;
            vector sums[ROWS][WIDE], squares = {0};
            multiply(g_words + o * g_group, x_words + b * x_block + (row * f->columns + column) * block, height,
                     f->width, pair * f->row_stride * f->columns * block, f->column_stride * block, narrow, wide, sums);
            for (int r = 0; r < ROWS && o * ROWS + r < f->out; r++)
                for (int v = 0; v < wide && b * block + v * LANES < f->channels; v++) {
                    vector *before = (vector *)(kept + ((task * ROWS + r) * wide + v) * LANES);
                    const int64_t channel = b * block + v * LANES;
                    if (view > 0) sums[r][v] += *before;
                    if (view < f->views - 1) {
                        *before = sums[r][v];
                        continue;
                    }
                    const vector written =
                        write(sums[r][v], f->channels - channel, narrow,
                              result + size * (((o * ROWS + r) * places + place) * f->channels + channel));
                    squares += written * written;
                }
            total += __builtin_convertvector(squares, doubles);
        }
    }
    double square = 0;
    for (int l = 0; l < LANES; l++) square += total[l];
    return square;
}

/* Words of room that an example takes: x and g laid out, and, with several views, sums. */
void room_for(const Form *f, int narrow, int64_t *words) {
    const int64_t block = (f->channels > LANES ? WIDE : 1) * LANES, groups = (f->out + ROWS - 1) / ROWS;
    const int64_t channels = (f->channels + block - 1) / block * block, pair = narrow ? 2 : 1;
    words[0] = f->rows * f->columns * channels;
    words[1] = groups * ROWS * ((f->height + pair - 1) / pair) * f->width;
    words[2] = f->views > 1 ? groups * ROWS * channels * f->kernel_height * f->kernel_width : 0;
}

/* Those of examples begin..end, each (out, kernel_height, kernel_width, channels), and the sums of their squares, with
`room` as of `room_for`, all zero. */
void conv_weight_gradients(const char *x, const char *g, const Form *f, int64_t begin, int64_t end, int narrow,
                           uint32_t *room, char *result, double *squares) {
    int64_t words[3];
    room_for(f, narrow, words);
    uint32_t *g_words = room + words[0];
    float *kept = (float *)(g_words + words[1]);
    for (int64_t e = begin; e < end; e++) {
        const int64_t size = narrow ? 2 : 4;
        const char *own_x = x + size * e * f->x_example, *own_g = g + size * e * f->g_example;
        char *own = result + size * e * f->out * f->kernel_height * f->kernel_width * f->channels;
        if (f->channels <= LANES || WIDE == 1) {
            if (narrow) squares[e] = of_example(own_x, own_g, f, 1, 1, room, g_words, kept, own);
            else squares[e] = of_example(own_x, own_g, f, 0, 1, room, g_words, kept, own);
        } else {
            if (narrow) squares[e] = of_example(own_x, own_g, f, 1, WIDE, room, g_words, kept, own);
            else squares[e] = of_example(own_x, own_g, f, 0, WIDE, room, g_words, kept, own);
        }
    }
#ifdef __AVX512F__
    _mm_sfence();
#endif
}
