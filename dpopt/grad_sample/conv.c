/* Weight gradients of a convolution on a CPU, one for every example.

For each place of the kernel this is a matrix product over the positions of the output. Both factors are laid out as
words of 32 bits, a few channels of one position after another, so that the inner loop reads memory in order; it keeps
ROWS x WIDE vectors of the result in registers. A word is a float, or two bfloat16: of rows y and y + 1 of the output,
and of the rows of the input that these meet. */

#include <string.h>

#include "conv.h"
#ifdef __AVX512F__
#include <immintrin.h>
#endif

enum { LANES = 16 };
#define INLINE static inline __attribute__((always_inline))

typedef float vector __attribute__((vector_size(64), aligned(4), may_alias));
typedef double doubles __attribute__((vector_size(128)));
typedef uint32_t words __attribute__((vector_size(64), aligned(4), may_alias));

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

static int64_t wide_of(const Form *f) { return f->channels > LANES ? WIDE : 1; }
static int64_t groups_of(const Form *f) { return (f->out + ROWS - 1) / ROWS; }

/* Words that an example takes for one view, x and g. */
static void words_of(const Form *f, int narrow, int64_t *x_words, int64_t *g_words) {
    const int64_t block = wide_of(f) * LANES, pair = narrow ? 2 : 1;
    *x_words = f->rows * f->columns * ((f->channels + block - 1) / block * block);
    *g_words = groups_of(f) * ROWS * ((f->height + pair - 1) / pair) * f->width;
}

void room_for(const Form *f, int narrow, int64_t *words) {
    int64_t x_words, g_words;
    words_of(f, narrow, &x_words, &g_words);
    words[0] = f->views * (x_words + g_words);
    words[1] = ROWS * fan_in(f);
    words[2] = groups_of(f);
}

/* Lay out one example, in room that is zero: the words around what is laid out are zero, for all examples the same. */
static void lay_out_example(const char *x, const char *g, const Form *f, int narrow, uint32_t *room) {
    const int64_t size = narrow ? 2 : 4, pair = narrow ? 2 : 1, block = wide_of(f) * LANES;
    int64_t x_words, g_words;
    words_of(f, narrow, &x_words, &g_words);
    for (int64_t view = 0; view < f->views; view++, x += size * f->x_view, g += size * f->g_view) {
        for (int64_t r = 0; r < f->rows; r++) {
            const int64_t y = r - f->above, next = y + f->row_stride;
            Line line = {y >= 0 && y < f->in_height ? x + size * y * f->x_row : NULL,
                         narrow && next >= 0 && next < f->in_height ? x + size * next * f->x_row : NULL, f->x_channel,
                         f->x_column, narrow};
            lay_out(line, f->channels, f->in_width, room + (r * f->columns + f->left) * block, block,
                    f->rows * f->columns * block);
        }
        room += x_words;
        for (int64_t y = 0; y < f->height; y += pair) {
            Line line = {g + size * y * f->g_row, narrow && y + 1 < f->height ? g + size * (y + 1) * f->g_row : NULL,
                         f->g_channel, f->g_column, narrow};
            lay_out(line, f->out, f->width, room + y / pair * f->width * ROWS, ROWS, g_words / groups_of(f));
        }
        room += g_words;
    }
}

/* rows[ROWS][kernel_height][kernel_width][channels] of one example that is laid out. */
INLINE void form_rows(const uint32_t *room, const Form *f, int64_t group, int narrow, int wide, float *rows) {
    const int64_t pair = narrow ? 2 : 1, block = wide * LANES, height = (f->height + pair - 1) / pair;
    const int64_t blocks = (f->channels + block - 1) / block, places = f->kernel_height * f->kernel_width;
    int64_t x_words, g_words;
    words_of(f, narrow, &x_words, &g_words);
    for (int64_t view = 0; view < f->views; view++, room += x_words + g_words) {
        const uint32_t *g = room + x_words + group * height * f->width * ROWS;
        for (int64_t task = 0; task < blocks * places; task++) {
            const int64_t b = task / places, place = task % places;
            const int64_t row = place / f->kernel_width * f->row_dilation;
            const int64_t column = place % f->kernel_width * f->column_dilation;
            vector sums[ROWS][WIDE];
            multiply(g, room + ((b * f->rows + row) * f->columns + column) * block, height, f->width,
                     pair * f->row_stride * f->columns * block, f->column_stride * block, narrow, wide, sums);
            for (int r = 0; r < ROWS; r++)
                for (int v = 0; v < wide && b * block + v * LANES < f->channels; v++) {
                    const int64_t channel = b * block + v * LANES, left = f->channels - channel;
                    float *to = rows + (r * places + place) * f->channels + channel;
                    if (left < LANES)
                        for (int64_t l = 0; l < left; l++) to[l] = view > 0 ? to[l] + sums[r][v][l] : sums[r][v][l];
                    else if (view > 0) *(vector *)to += sums[r][v];
                    else *(vector *)to = sums[r][v];
                }
        }
    }
}

__attribute__((noinline)) void form_filters(const uint32_t *room, const Form *f, int64_t group, int narrow, float *rows) {
    if (wide_of(f) == 1) narrow ? form_rows(room, f, group, 1, 1, rows) : form_rows(room, f, group, 0, 1, rows);
    else narrow ? form_rows(room, f, group, 1, WIDE, rows) : form_rows(room, f, group, 0, WIDE, rows);
}

/* Past the caches where `to` is aligned: gradients of all examples are larger than they are. In 16 bits, `rows` are
rounded, too. */
static void write_rows(float *rows, int64_t count, int narrow, char *to) {
    int64_t i = 0;
#ifdef __AVX512BF16__
    for (; narrow && i < count; i += LANES) {
        const int64_t n = count - i < LANES ? count - i : LANES;
        const __mmask16 some = (__mmask16)((1u << n) - 1);
        const __m256i rounded = (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(some, rows + i));
        if (n == LANES && (uintptr_t)to % 32 == 0) _mm256_stream_si256((__m256i *)(to + 2 * i), rounded);
        else _mm256_mask_storeu_epi16(to + 2 * i, some, rounded);
        _mm512_mask_storeu_ps(rows + i, some, (__m512)((words)_mm512_cvtepu16_epi32(rounded) << 16));
    }
    if (narrow) return;
#endif
#ifdef __AVX512F__
    for (; (uintptr_t)to % 64 == 0 && i + LANES <= count; i += LANES)
        _mm512_stream_ps((float *)(to + 4 * i), _mm512_loadu_ps(rows + i));
#endif
    memcpy(to + 4 * i, rows + i, 4 * (count - i));
}

/* Of examples begin..end: the gradients (out, kernel_height, kernel_width, channels), and squared norms, of what
`through` makes of them if it is there (then `lengths`, too: `standardized_square_norms`). `room` is that of
`room_for`. */
void conv_weight_gradients(const char *x, const char *g, const Form *f, int64_t begin, int64_t end, int narrow,
                           uint32_t *room, char *result, const Through *through, double *squares, double *lengths) {
    int64_t words[3];
    room_for(f, narrow, words);
    const int64_t size = narrow ? 2 : 4, length = fan_in(f);
    float *rows = (float *)(room + words[0]);
    memset(room, 0, 4 * words[0]);
    for (int64_t e = begin; e < end; e++) {
        lay_out_example(x + size * e * f->x_example, g + size * e * f->g_example, f, narrow, room);
        squares[e] = 0;
        if (through) lengths[e] = 0;
        for (int64_t group = 0; group < groups_of(f); group++) {
            const int64_t first = group * ROWS, count = f->out - first < ROWS ? f->out - first : ROWS;
            double square, long_square;
            form_filters(room, f, group, narrow, rows);
            write_rows(rows, count * length, narrow, result + size * (e * f->out + first) * length);
            if (through) {
                const Through *t = through;
                standardized_square_norms(rows, 0, 1, 1, count, length, 0, 0, length, 0, t->directions + first * length,
                                          t->scales + first, t->projects + first, t->twices + first, t->factor,
                                          t->of_weight, t->of_gain, &square, &long_square);
                lengths[e] += long_square;
            } else
                square_norms(rows, 0, 1, count * length, 0, 0, &square);
            squares[e] += square;
        }
    }
#ifdef __AVX512F__
    _mm_sfence();
#endif
}

/* Lay out examples begin..end, each in its own room. */
void conv_lay_out(const char *x, const char *g, const Form *f, int64_t begin, int64_t end, int narrow, uint32_t *room) {
    int64_t words[3];
    room_for(f, narrow, words);
    const int64_t size = narrow ? 2 : 4;
    memset(room + begin * words[0], 0, 4 * (end - begin) * words[0]);
    for (int64_t e = begin; e < end; e++)
        lay_out_example(x + size * e * f->x_example, g + size * e * f->g_example, f, narrow, room + e * words[0]);
}
