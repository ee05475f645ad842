/* Layers on 8-bit integers: the same integers as graph/quantized.py, bit for bit.

   Images of bytes are stored like those of floats, with the code of zero in their padding. A convolution takes its weights
   in quads: the bytes at any four places are put side by side, and dot4 adds their products. */

#ifndef STR_TRITON_INTEGERS_H
#define STR_TRITON_INTEGERS_H

#include "copies.h"
#include "dot.h"
#include "operations.h"

typedef struct {
    int32_t offset[4]; /* in bytes, from the pixel's place in the first input channel */
    int32_t weights;   /* four of them, int8 */
} quad;

typedef struct {
    int32_t weight, offset;
} byte_tap;

typedef struct {
    const uint8_t *x, *residual, *mask;
    uint8_t *y;
    const int32_t *first;
    int64_t begin, end, left; /* channels; bytes from here to the end of the plane */
} byte_strip;

static inline bytes bytes_at(const uint8_t *x, int64_t index) { return *(const bytes *)(x + index * WIDE); }

/* As much of a vector as fits. */
static inline void store(const byte_strip *s, uint8_t *y, int64_t index, bytes value, uint8_t zero) {
    if (s->mask) {
        const bytes real = bytes_at(s->mask, index);
        value = (value & real) | (((bytes){0} + zero) & ~real);
    }
    const int64_t left = s->left - index * WIDE;
    if (left >= WIDE)
        *(bytes *)(y + index * WIDE) = value;
    else if (left > 0)
        memcpy(y + index * WIDE, &value, left);
}

#define MAGIC 12582912.0f /* 1.5 * 2^23: adding it rounds numbers far below 2^22 to integers, ties to even, in the lowest bits */

static inline reals limited(reals v, reals low, reals high) {
#if WIDE == 64
    return (reals)_mm512_min_ps((__m512)high, _mm512_max_ps((__m512)low, (__m512)v));
#elif WIDE == 32
    return (reals)_mm256_min_ps((__m256)high, _mm256_max_ps((__m256)low, (__m256)v));
#else
    v = (reals)(((low > v) & (ints)low) | (~(low > v) & (ints)v));
    return (reals)(((v > high) & (ints)high) | (~(v > high) & (ints)v));
#endif
}

static inline bytes looked_up(const uint8_t *table, bytes codes) {
    uint8_t found[WIDE];
    memcpy(found, &codes, WIDE);
    for (int i = 0; i < WIDE; i++) found[i] = table[found[i]];
    memcpy(&codes, found, WIDE);
    return codes;
}

/* What follows the sums of a channel, in registers: a store of a byte might change what lies behind a pointer. */
typedef struct {
    reals low, high, factor, residual;
    ints base, zero_residual; /* base: what the bits of MAGIC plus a code are above the code's byte */
} scaling;

/* The codes of numbers of steps from zero. */
static inline ints codes_of(const scaling *by, reals steps) {
    return (ints)(limited(steps, by->low, by->high) + MAGIC) - by->base;
}

static inline ints output(const scaling *by, ints sum) {
    return codes_of(by, __builtin_convertvector(sum, reals) * by->factor);
}

static inline ints output_with(const scaling *by, ints sum, bytes residual) {
    reals v = __builtin_convertvector(sum, reals) * by->factor;
    ROUNDED(v);
    reals r = __builtin_convertvector((ints)residual - by->zero_residual, reals) * by->residual;
    ROUNDED(r);
    return codes_of(by, v + r);
}

static inline __attribute__((always_inline)) void convolve_bytes(const operation *op, byte_strip s, const int width) {
    const integers *codes = op->codes;
    const uint8_t *table = codes->table, fill = (uint8_t)codes->fill;
    const int32_t *bias = (const int32_t *)op->bias;
    const quad *taps = (const quad *)op->taps;
    const float *factors = codes->factors;
    const int64_t channel = op->y.channel, residual_channel = op->residual.channel;
    const bytes nothing = {0};
    const reals magic = (reals){0} + MAGIC;
    scaling by = {
        (reals){0} + op->low, (reals){0} + op->high, {0}, (reals){0} + codes->residual, (ints)magic - codes->zero_y,
        (ints){0} + codes->zero_residual};
    for (int64_t i = s.begin; i < s.end; i++) {
        ints sum[4 * WIDEST_BYTES];
#pragma GCC unroll 16
        for (int j = 0; j < 4 * width; j++) sum[j] = (ints){0} + bias[i];
        const quad *end = taps + s.first[i + 1];
        for (const quad *t = taps + s.first[i]; t < end; t++) {
            const ints weights = (ints){0} + t->weights;
#pragma GCC unroll 4
            for (int j = 0; j < width; j++) {
                const bytes a = bytes_at(s.x + t->offset[0], j), b = bytes_at(s.x + t->offset[1], j);
                const bytes c = bytes_at(s.x + t->offset[2], j), d = bytes_at(s.x + t->offset[3], j);
                const bytes ab = low_bytes(a, b), cd = low_bytes(c, d);
                sum[4 * j] = dot4(sum[4 * j], low_pairs(ab, cd), weights);
                sum[4 * j + 1] = dot4(sum[4 * j + 1], high_pairs(ab, cd), weights);
                const bytes ef = high_bytes(a, b), gh = high_bytes(c, d);
                sum[4 * j + 2] = dot4(sum[4 * j + 2], low_pairs(ef, gh), weights);
                sum[4 * j + 3] = dot4(sum[4 * j + 3], high_pairs(ef, gh), weights);
            }
        }
        by.factor = (reals){0} + factors[i];
#pragma GCC unroll 4
        for (int j = 0; j < width; j++) {
            bytes y;
            if (s.residual) {
                const bytes r = bytes_at(s.residual + i * residual_channel, j);
                const bytes low = low_bytes(r, nothing), high = high_bytes(r, nothing);
                y = pack(
                    output_with(&by, sum[4 * j], low_pairs(low, nothing)),
                    output_with(&by, sum[4 * j + 1], high_pairs(low, nothing)),
                    output_with(&by, sum[4 * j + 2], low_pairs(high, nothing)),
                    output_with(&by, sum[4 * j + 3], high_pairs(high, nothing)));
            } else
                y = pack(
                    output(&by, sum[4 * j]), output(&by, sum[4 * j + 1]), output(&by, sum[4 * j + 2]),
                    output(&by, sum[4 * j + 3]));
            if (table) y = looked_up(table, y);
            store(&s, s.y + i * channel, j, y, fill);
        }
    }
}

static inline void max_pool_bytes(const operation *op, byte_strip s, int64_t width) {
    for (int64_t i = s.begin; i < s.end; i++)
        for (int64_t j = 0; j < width; j++) {
            bytes most = {0};
            const tap *end = op->taps + s.first[i + 1];
            for (const tap *t = op->taps + s.first[i]; t < end; t++) {
                const bytes v = bytes_at(s.x + t->offset, j);
                most = (v & (bytes)(v > most)) | (most & ~(bytes)(v > most));
            }
            store(&s, s.y + i * op->y.channel, j, most, (uint8_t)op->codes->fill);
        }
}

static __attribute__((noinline)) void run_byte_strip(const operation *op, byte_strip s, int64_t width) {
    if (op->kind == MAX_POOL_BYTES) {
        max_pool_bytes(op, s, width);
        return;
    }
    switch (width) {
        case 1: convolve_bytes(op, s, 1); break;
        case 2: convolve_bytes(op, s, 2); break;
#if WIDEST_BYTES == 4
        case 3: convolve_bytes(op, s, 3); break;
        case 4: convolve_bytes(op, s, 4); break;
#endif
    }
}

/* One tile of one plane, all channels of one block. The last vector of a plane may be only partly in it. */
static void byte_strips(const operation *op, int64_t item) {
    const int64_t tile = item % op->tiles, plane = item / op->tiles % op->planes;
    const int64_t image = item / op->tiles / op->planes % op->images, block = item / op->tiles / op->planes / op->images;
    const int64_t vectors = (op->length + WIDE - 1) / WIDE;
    const int64_t end = vectors * (tile + 1) / op->tiles;
    const int64_t width = op->width < WIDEST_BYTES ? op->width : WIDEST_BYTES;
    for (int64_t v = vectors * tile / op->tiles; v < end; v += width) {
        const int64_t q = v * WIDE;
        const byte_strip s = {
            .x = (const uint8_t *)op->x.data + image * op->x.image + plane * op->x.plane + q,
            .y = (uint8_t *)op->y.data + image * op->y.image + plane * op->y.plane + q,
            .residual = !op->residual.data ? 0
                : (const uint8_t *)op->residual.data + image * op->residual.image + plane * op->residual.plane + q,
            .mask = op->mask ? (const uint8_t *)op->mask + plane * op->length + q : 0,
            .first = op->first + (op->tables > 1 ? plane * (op->channels + 1) : 0),
            .begin = op->block_first[block],
            .end = op->block_first[block + 1],
            .left = op->length - q,
        };
        run_byte_strip(op, s, end - v < width ? end - v : width);
    }
}

/* The code of a number of steps. */
static inline uint8_t rounded(float low, float high, integers codes, float v) {
    v = v != v ? 0 : v;
    v = low > v ? low : v;
    v = v > high ? high : v;
    return (uint8_t)((int32_t)(v + 12582912.0f - 12582912.0f) + codes.zero_y);
}

static inline uint8_t encode(float low, float high, integers codes, float v) {
    return rounded(low, high, codes, v / codes.scale);
}

static inline float decode(float low, float high, integers codes, uint8_t code) {
    (void)low, (void)high;
    return (float)(code - codes.zero_x) * codes.scale;
}

DEFINE_COPY(copy_any_bytes, uint8_t, uint8_t, UNCHANGED)
DEFINE_SPLIT(copy_bytes, uint8_t, 16, copy_any_bytes, EVEN_16, ODD_16)
DEFINE_COPY(quantize, float, uint8_t, encode)
DEFINE_COPY(dequantize, uint8_t, float, decode)

/* The mean of one channel of one image; y has no rows and columns. */
static void mean_bytes(const operation *op, int64_t item) {
    const int64_t channel = item % op->channels, image = item / op->channels;
    const uint8_t *x = (const uint8_t *)op->x.data + image * op->x.image + channel * op->x.channel;
    int64_t sum = 0;
    for (int64_t i = 0; i < op->rows; i++, x += op->x.row)
        for (int64_t j = 0; j < op->columns; j++) sum += x[j];
    sum -= op->rows * op->columns * op->codes->zero_x;
    op->y.data[image * op->y.image + channel] = (float)sum * op->codes->scale;
}

/* One channel of one image times a number that lies in `residual`. */
static void gate_bytes(const operation *op, int64_t item) {
    const int64_t channel = item % op->channels, image = item / op->channels;
    const uint8_t *x = (const uint8_t *)op->x.data + image * op->x.image + channel * op->x.channel;
    uint8_t *y = (uint8_t *)op->y.data + image * op->y.image + channel * op->y.channel;
    const uint8_t *mask = (const uint8_t *)op->mask;
    const integers codes = *op->codes;
    const float factor = op->residual.data[image * op->residual.image + channel * op->residual.channel] * codes.scale;
    const float low = op->low, high = op->high;
    for (int64_t i = 0, length = op->length; i < length; i++) {
        const uint8_t code = rounded(low, high, codes, (float)(x[i] - codes.zero_x) * factor);
        y[i] = !mask || mask[i] ? code : (uint8_t)codes.fill;
    }
}

/* One block of outputs for one row. */
static void linear_bytes(const operation *op, int64_t item) {
    const int64_t block = item % op->blocks, image = item / op->blocks;
    const uint8_t *x = (const uint8_t *)op->x.data + image * op->x.image;
    float *y = op->y.data + image * op->y.image;
    for (int64_t i = op->block_first[block]; i < op->block_first[block + 1]; i++) {
        const byte_tap *t = (const byte_tap *)op->taps + op->first[i], *end = (const byte_tap *)op->taps + op->first[i + 1];
        int32_t sum[2] = {((const int32_t *)op->bias)[i], 0};
        for (; t + 2 <= end; t += 2)
            for (int j = 0; j < 2; j++) sum[j] += t[j].weight * x[t[j].offset];
        if (t < end) sum[0] += t->weight * x[t->offset];
        float value = (float)(sum[0] + sum[1]) * op->codes->factors[i];
        if (op->low > value) value = op->low;
        if (value > op->high) value = op->high;
        y[i] = value;
    }
}

#endif
