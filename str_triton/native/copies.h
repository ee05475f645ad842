/* Operations that only move pixels: between tensors and padded images, between phases, from rows to columns. */

#ifndef STR_TRITON_COPIES_H
#define STR_TRITON_COPIES_H

#include "operations.h"
#include "vectors.h"

#define GRAIN 16 /* floats in a cache line */

/* Rows of one channel, between an image in one phase and the planes of `tables` column phases: on the one side pixels of
   a phase follow each other, on the other they are `column` apart, and the next phase is a pixel further. `change` is
   applied to each pixel. Its numbers are copied first: a store of a byte might change what lies behind a pointer. */
#define DEFINE_COPY(name, from, to, change)                                                                    \
    static void name(const operation *op, int64_t item) {                                                      \
        const int64_t channel = item % op->channels, image = item / op->channels;                              \
        const from *row_x = (const from *)op->x.data + image * op->x.image + channel * op->x.channel;          \
        to *row_y = (to *)op->y.data + image * op->y.image + channel * op->y.channel;                          \
        const float low = op->low, high = op->high;                                                            \
        const integers codes = op->codes ? *op->codes : (integers){0};                                         \
        (void)low, (void)high, (void)codes;                                                                    \
        for (int64_t i = 0; i < op->rows; i++, row_x += op->x.row, row_y += op->y.row)                         \
            for (int64_t phase = 0; phase < op->tables; phase++) {                                             \
                const from *x = row_x + phase * op->x.plane;                                                   \
                to *y = row_y + phase * op->y.plane;                                                           \
                const int64_t columns = (op->columns - phase + op->tables - 1) / op->tables;                   \
                const int64_t step_x = op->x.column, step_y = op->y.column;                                    \
                if (op->tables == 1)                                                                           \
                    for (int64_t j = 0; j < columns; j++) y[j] = change(low, high, codes, x[j]);               \
                else if (step_x == 2)                                                                          \
                    for (int64_t j = 0; j < columns; j++) y[j] = change(low, high, codes, x[2 * j]);           \
                else                                                                                           \
                    for (int64_t j = 0; j < columns; j++) y[j * step_y] = change(low, high, codes, x[j * step_x]); \
            }                                                                                                  \
    }
#define UNCHANGED(low, high, codes, x) (x)
DEFINE_COPY(copy_any, float, float, UNCHANGED)

/* Copies into two column phases, row by row: the pixels at even places to y, those at odd places a plane further. The last
   vector of a row begins early enough to end with it, and stores some pixels twice: what follows a row may be a border of
   any value. Rows shorter than a vector, and those after which there is nothing to read, store parts of vectors. */
#define EVEN_4 0, 2, 4, 6
#define ODD_4 1, 3, 5, 7
#define EVEN_16 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#define ODD_16 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31
#define STORE_PART(size, count)             \
    if (size < count && wanted & size) {    \
        memcpy(y, from, size * sizeof *y);  \
        y += size, from += size;            \
    }
#define DEFINE_SPLIT(name, type, count, any, even_places, odd_places)                                          \
    typedef type name##_vector __attribute__((vector_size(16), aligned(1), may_alias));                        \
    static inline void name##_store(type *y, name##_vector v, int64_t wanted) {                                \
        if (wanted >= count) {                                                                                 \
            *(name##_vector *)y = v;                                                                           \
            return;                                                                                            \
        }                                                                                                      \
        type element[count];                                                                                   \
        const type *from = element;                                                                            \
        *(name##_vector *)element = v;                                                                         \
        STORE_PART(8, count) STORE_PART(4, count) STORE_PART(2, count) STORE_PART(1, count)                    \
    }                                                                                                          \
    static void name(const operation *op, int64_t item) {                                                      \
        if (op->tables != 2 || op->x.column != 2 || op->y.column != 1) {                                       \
            any(op, item);                                                                                     \
            return;                                                                                            \
        }                                                                                                      \
        const int64_t channel = item % op->channels, image = item / op->channels, plane = op->y.plane;         \
        const int64_t columns = op->columns, even = (columns + 1) / 2, odd = columns / 2;                      \
        const int64_t step_x = op->x.row, step_y = op->y.row;                                                  \
        const type *x = (const type *)op->x.data + image * op->x.image + channel * op->x.channel;              \
        type *y = (type *)op->y.data + image * op->y.image + channel * op->y.channel;                          \
        for (int64_t left = (op->rows - 1) * step_x + columns; left > 0; left -= step_x, x += step_x, y += step_y) { \
            int64_t j = 0;                                                                                     \
            for (; j + count <= odd && left - 2 * j >= 2 * count; j += count) {                                \
                const name##_vector a = *(const name##_vector *)(x + 2 * j);                                   \
                const name##_vector b = *(const name##_vector *)(x + 2 * j + count);                           \
                *(name##_vector *)(y + j) = PICK(name##_vector, a, b, even_places);                            \
                *(name##_vector *)(y + plane + j) = PICK(name##_vector, a, b, odd_places);                     \
            }                                                                                                  \
            if (j > 0 && j < even && left >= 2 * even) {                                                       \
                const type *x_even = x + 2 * (even - count), *x_odd = x + 2 * (odd - count);                   \
                const name##_vector a = *(const name##_vector *)x_even, b = *(const name##_vector *)(x_even + count); \
                const name##_vector c = *(const name##_vector *)x_odd, d = *(const name##_vector *)(x_odd + count); \
                *(name##_vector *)(y + even - count) = PICK(name##_vector, a, b, even_places);                 \
                *(name##_vector *)(y + plane + odd - count) = PICK(name##_vector, c, d, odd_places);           \
                continue;                                                                                      \
            }                                                                                                  \
            for (; j < even && left - 2 * j >= 2 * count; j += count) {                                        \
                const name##_vector a = *(const name##_vector *)(x + 2 * j);                                   \
                const name##_vector b = *(const name##_vector *)(x + 2 * j + count);                           \
                name##_store(y + j, PICK(name##_vector, a, b, even_places), even - j);                         \
                name##_store(y + plane + j, PICK(name##_vector, a, b, odd_places), odd - j);                   \
            }                                                                                                  \
            for (; j < even; j++) {                                                                            \
                y[j] = x[2 * j];                                                                               \
                if (j < odd) y[plane + j] = x[2 * j + 1];                                                      \
            }                                                                                                  \
        }                                                                                                      \
    }
typedef int32_t word __attribute__((may_alias)); /* four bytes of any type */
DEFINE_SPLIT(copy, word, 4, copy_any, EVEN_4, ODD_4)

/* GRAIN pixels of GRAIN channels at most, between a tensor [columns, channels], in which the channel's stride is 1, and an
   image of one row, which has room for whole vectors of pixels. */
static void turn_square(const operation *op, const float *x, float *y, int64_t channels, int64_t pixels) {
    const int to_image = op->x.channel == 1;
    for (int64_t p = 0; p < pixels; p += LANES, x += LANES * op->x.column, y += LANES * op->y.column) {
        const int64_t present = pixels - p < LANES ? pixels - p : LANES;
        int64_t c = 0;
        for (; c + LANES <= channels; c += LANES) {
            vec v[LANES];
            for (int64_t i = 0; i < LANES; i++)
                v[i] = !to_image ? at(x + (c + i) * op->x.channel, 0)
                    : i < present ? at(x + i * op->x.column + c, 0) : splat(0);
            transpose(v);
            for (int64_t i = 0; i < LANES; i++)
                if (to_image)
                    *(vec *)(y + (c + i) * op->y.channel) = v[i];
                else if (i < present)
                    *(vec *)(y + i * op->y.column + c) = v[i];
        }
        for (; c < channels; c++)
            for (int64_t i = 0; i < present; i++)
                y[c * op->y.channel + i * op->y.column] = x[c * op->x.channel + i * op->x.column];
    }
}

/* GRAIN pixels and one of `blocks` parts of the channels. */
static void turn(const operation *op, int64_t item) {
    const int64_t block = item % op->blocks, pixel = item / op->blocks * GRAIN, pixels = op->columns - pixel;
    const int64_t squares = (op->channels + GRAIN - 1) / GRAIN;
    for (int64_t i = squares * block / op->blocks; i < squares * (block + 1) / op->blocks; i++) {
        const int64_t c = i * GRAIN, channels = op->channels - c;
        turn_square(
            op, op->x.data + c * op->x.channel + pixel * op->x.column,
            op->y.data + c * op->y.channel + pixel * op->y.column, channels < GRAIN ? channels : GRAIN,
            pixels < GRAIN ? pixels : GRAIN);
    }
}

#endif
