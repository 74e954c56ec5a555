/* One step of MicroAdam on rows of blocks, on a CPU: what reference.py computes, one pass over each block.

A block of 4,096 values stays in the cache from reading its feedback to updating its parameters. Loops over the block
are written so that a compiler vectorises them. Compiled without fused or reassociated arithmetic, so that the result is
the reference's, bit for bit. */

#include <math.h>
#include <stdint.h>
#include <string.h>

typedef struct {
    int64_t size, k, window, bits, bucket, stochastic; /* of the layout */
    int64_t row, step;                                           /* row of the window to write, t */
    float minus_lr, shrink, eps;                                 /* shrink: 1 - lr * weight_decay */
} Options;

typedef struct {
    float *parameter;
    const float *gradient;
    int64_t count, first; /* values; first row of the table */
} Tensor;

static uint32_t word_of(float x) { uint32_t w; memcpy(&w, &x, 4); return w; }
static float float_of(uint32_t w) { float x; memcpy(&x, &w, 4); return x; }
static float widen(uint16_t half) { return float_of((uint32_t)half << 16); }

static uint16_t narrow(float x) { /* to bfloat16: nearest, ties to even */
    uint32_t w = word_of(x);
    return x == x ? (uint16_t)((w + 0x7FFF + ((w >> 16) & 1)) >> 16) : 0x7FC0;
}

static uint16_t outwards(float x, int down) { /* to bfloat16: towards -inf or +inf */
    x += 0.0f; /* -0 becomes 0 */
    return (uint16_t)((word_of(x) + ((down ? x < 0 : x > 0) ? 0xFFFF : 0)) >> 16);
}

/* k-th largest of n words below 2^31, bit by bit from above; stops early where exactly k are as large. */
static int32_t kth_largest(const int32_t *words, int64_t n, int64_t k) {
    int32_t threshold = 0;
    for (int bit = 30; bit >= 0; bit--) {
        int32_t trial = threshold | (1 << bit), enough = 0;
        for (int64_t j = 0; j < n; j++) enough += words[j] >= trial;
        if (enough >= k) threshold = trial;
        if (enough == k) break;
    }
    return threshold;
}

/* Positions, ascending, of the k largest magnitudes: ties go to the lower position, NaN counts as infinite.

The k-th largest of the maxima of n/8 groups is a bound below the k-th largest value: few values reach it, and only they
are searched. words, others, chosen: room for n each. */
static void select_largest(const float *a, int32_t *restrict words, int32_t *restrict others, int32_t *restrict chosen,
                           int64_t n, int64_t k) {
    enum { CHUNK = 8 };
    int64_t groups = n / 8, found = 0, candidates = 0;
    for (int64_t j = 0; j < n; j++) {
        int32_t word = (int32_t)(word_of(a[j]) & 0x7FFFFFFF);
        words[j] = word < 0x7F800000 ? word : 0x7F800000;
    }
    int32_t bound = 0;
    if (k <= groups) {
        memcpy(others, words, (size_t)groups * 4);
        for (int64_t start = groups; start + groups <= n; start += groups)
            for (int64_t g = 0; g < groups; g++)
                others[g] = words[start + g] > others[g] ? words[start + g] : others[g];
        bound = kth_largest(others, groups, k);
    }
    for (int64_t start = 0; start < n; start += CHUNK) {
        int64_t end = start + CHUNK < n ? start + CHUNK : n;
        int32_t any = 0;
        for (int64_t j = start; j < end; j++) any |= words[j] >= bound;
        if (!any) continue;
        for (int64_t j = start; j < end; j++) {
            others[candidates] = words[j];
            chosen[candidates] = (int32_t)j;
            candidates += words[j] >= bound;
        }
    }
    int32_t threshold = kth_largest(others, candidates, k);
    int64_t ties = k;
    for (int64_t i = 0; i < candidates; i++) ties -= others[i] > threshold;
    for (int64_t i = 0; i < candidates && found < k; i++)
        if (others[i] > threshold || (others[i] == threshold && ties-- > 0)) chosen[found++] = chosen[i];
}

#define EXPAND_RECALL(BITS)                                                                               \
    for (int place = 0; place < 8 / BITS; place++)                                                        \
        for (int64_t j = 0; j < bytes; j++)                                                               \
            a[place * bytes + j] = (float)((codes[j] >> (BITS * place)) & ((1 << BITS) - 1)) * unit + low;

static void recall(float *restrict a, const uint8_t *restrict codes, const uint16_t *ranges, const Options *o) {
    int64_t bytes = o->bucket * o->bits / 8;
    for (int64_t start = 0; start < o->size; start += o->bucket, a += o->bucket, codes += bytes, ranges += 2) {
        float low = widen(ranges[0]), unit = (widen(ranges[1]) - low) / (float)((1 << o->bits) - 1);
        if (o->bits == 2) { EXPAND_RECALL(2) }
        else if (o->bits == 4) { EXPAND_RECALL(4) }
        else { EXPAND_RECALL(8) }
    }
}

#define EXPAND_PACK(BITS)                                                                                 \
    for (int64_t j = 0; j < bytes; j++) {                                                                 \
        int32_t code = (int32_t)scaled[j];                                                                \
        for (int place = 1; place < 8 / BITS; place++)                                                    \
            code |= (int32_t)scaled[place * bytes + j] << (BITS * place);                                 \
        codes[j] = (uint8_t)code;                                                                         \
    }

static uint32_t mix(uint32_t word, uint32_t multiplier) { return (word ^ (word >> 16)) * multiplier; }

static void remember(float *restrict a, float *restrict scaled, uint8_t *restrict codes, uint16_t *ranges,
                     int64_t number, const Options *o) {
    int64_t bytes = o->bucket * o->bits / 8, buckets = o->size / o->bucket;
    float levels = (float)((1 << o->bits) - 1);
    for (int64_t b = 0; b < buckets; b++, a += o->bucket, codes += bytes, ranges += 2) {
        /* As integers, magnitudes with the sign's complement are in the order of the floats: minima of integers are
           vectorised, those of floats are not. */
        int32_t least = INT32_MAX, most = INT32_MIN;
        for (int64_t j = 0; j < o->bucket; j++) {
            a[j] = fabsf(a[j]) < 0x1p126f ? a[j] : 0.0f;
            int32_t word = (int32_t)word_of(a[j]);
            word ^= (word >> 31) & 0x7FFFFFFF;
            least = word < least ? word : least;
            most = word > most ? word : most;
        }
        ranges[0] = outwards(float_of((uint32_t)(least ^ ((least >> 31) & 0x7FFFFFFF))), 1);
        ranges[1] = outwards(float_of((uint32_t)(most ^ ((most >> 31) & 0x7FFFFFFF))), 0);
        float low = widen(ranges[0]), unit = (widen(ranges[1]) - low) / levels;
        float inverse = unit > 0x1p-120f ? 1.0f / unit : 0.0f, shift = low * inverse;
        if (o->stochastic) {
            uint32_t word = (uint32_t)(number * buckets + b) * 0x9E3779B1u + (uint32_t)o->step * 0x85EBCA6Bu;
            word = mix(mix(word, 0x7FEB352Du), 0x846CA68Bu);
            word = (word ^ (word >> 16)) >> 8;
            for (int64_t j = 0; j < o->bucket; j++) {
                uint32_t dither = (word + (((uint32_t)j * 0x9E3779B1u) >> 8)) & 0xFFFFFF;
                float x = a[j] * inverse + (float)(int32_t)dither * 0x1p-24f - shift;
                x = x > 0.0f ? x : 0.0f;
                scaled[j] = x < levels ? x : levels;
            }
        } else {
            for (int64_t j = 0; j < o->bucket; j++) scaled[j] = a[j] * inverse + (0.5f - shift);
        }
        if (o->bits == 2) { EXPAND_PACK(2) }
        else if (o->bits == 4) { EXPAND_PACK(4) }
        else { EXPAND_PACK(8) }
    }
}

static void update(float *parameter, int64_t inside, const int16_t *indices, const float *values,
                   const float *weights, float *first, float *second, const Options *o) {
    int64_t entries = o->window * o->k;
    for (int64_t i = 0; i < entries; i++) first[indices[i]] = second[indices[i]] = 0.0f;
    for (int64_t r = 0, i = 0; r < o->window; r++)
        for (int64_t end = i + o->k; i < end; i++) {
            first[indices[i]] += values[i] * weights[r];
            second[indices[i]] += values[i] * values[i] * weights[o->window + r];
        }
    if (o->shrink != 1.0f)
        for (int64_t j = 0; j < inside; j++) parameter[j] *= o->shrink;
    for (int64_t i = 0; i < entries; i++) {
        int64_t j = indices[i];
        if (second[j] < 0 || j >= inside) continue; /* done before, or padding */
        parameter[j] += first[j] / (sqrtf(second[j]) + o->eps) * o->minus_lr;
        second[j] = -1.0f;
    }
}

/* Step the blocks [begin, end) of the tensors, counted through all of them.

feedback, ranges: null without feedback, ranges also at 32 bits. values: bfloat16, at 32 bits float. weights: (2, window).
scratch: 4 * size + window * k floats. */
void microadam_step(const Tensor *tensors, int64_t begin, int64_t end, void *feedback, uint16_t *ranges,
                    int16_t *indices, void *values, const float *weights, float *scratch, const Options *o) {
    int64_t size = o->size, entries = o->window * o->k, exact = o->bits == 32, number = begin;
    float *a = scratch, *first = a + size, *second = first + size, *third = second + size, *window = third + size;
    int32_t *chosen = (int32_t *)third;
    for (int64_t block = begin; block < end; block++, number++) {
        while (number * size >= tensors->count) { /* count is positive: the next tensor's blocks begin */
            number -= (tensors->count + size - 1) / size;
            tensors++;
        }
        int64_t row = tensors->first + number, start = number * size;
        int64_t inside = tensors->count - start < size ? tensors->count - start : size;
        const float *gradient = tensors->gradient + start;
        uint8_t *codes = exact || !feedback ? 0 : (uint8_t *)feedback + row * size * o->bits / 8;
        uint16_t *grid = exact || !feedback ? 0 : ranges + row * (size / o->bucket) * 2;
        float *rest = (float *)feedback + row * size;

        if (!feedback) memset(a, 0, (size_t)size * 4);
        else if (exact) memcpy(a, rest, (size_t)size * 4);
        else recall(a, codes, grid, o);
        for (int64_t j = 0; j < inside; j++) a[j] += gradient[j];
        memset(a + inside, 0, (size_t)(size - inside) * 4);

        select_largest(a, (int32_t *)first, (int32_t *)second, chosen, size, o->k);
        int16_t *places = indices + row * entries;
        uint16_t *halves = (uint16_t *)values + row * entries;
        float *floats = (float *)values + row * entries;
        for (int64_t i = 0; i < o->k; i++) {
            int64_t at = o->row * o->k + i;
            float value = a[chosen[i]], stored = exact ? value : widen(narrow(value));
            places[at] = (int16_t)chosen[i];
            if (exact) floats[at] = value;
            else halves[at] = narrow(value);
            a[chosen[i]] = value - stored;
        }
        if (feedback && exact) memcpy(rest, a, (size_t)size * 4);
        else if (feedback) remember(a, first, codes, grid, number, o);
        if (!exact) for (int64_t i = 0; i < entries; i++) window[i] = widen(halves[i]);
        update(tensors->parameter + start, inside, places, exact ? floats : window, weights, first, second, o);
    }
}

/* Step tensors with dense moments, a row of the table for each value. Constants: beta1, 1 - beta1, beta2, 1 - beta2, and
the reciprocals of 1 - beta1^t and 1 - beta2^t. */
void microadam_dense_step(const Tensor *tensors, int64_t count, float *exp_avg, float *exp_avg_sq,
                          const float *constants, const Options *o) {
    for (const Tensor *t = tensors; t < tensors + count; t++) {
        float *first = exp_avg + t->first, *second = exp_avg_sq + t->first;
        for (int64_t j = 0; j < t->count; j++) {
            float g = t->gradient[j];
            first[j] = first[j] * constants[0] + g * constants[1];
            second[j] = second[j] * constants[2] + g * g * constants[3];
            float root = sqrtf(second[j] * constants[5]);
            t->parameter[j] = t->parameter[j] * o->shrink + first[j] * constants[4] / (root + o->eps) * o->minus_lr;
        }
    }
}
