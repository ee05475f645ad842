/* The activations of recurrent layers, and thin products in float32. */

#ifndef STR_TRITON_PRODUCTS_H
#define STR_TRITON_PRODUCTS_H

#include "vectors.h"

enum { ROWS = 4 }; /* rows that share a load of a weight: sequences, or steps of one */

/* Activations of n vectors side by side: one alone would wait for each of its results. With 2^k e^r = e^v and |r| < 0.35,
   q is e^r - 1, and power is 2^k. */
static inline __attribute__((always_inline)) void split_power(const vec *v, vec *q, vec *power, const int n) {
    const vec magic = splat(12582912.0f); /* 1.5 * 2^23: adding it rounds to an integer in the lowest bits */
    vec r[8];
    UNROLLED(i, n) power[i] = v[i] * 1.44269504f + magic;
    UNROLLED(i, n) r[i] = v[i] - (power[i] - magic) * 0.693359375f;
    UNROLLED(i, n) r[i] = r[i] - (power[i] - magic) * -2.12194440e-4f;
    UNROLLED(i, n) q[i] = r[i] * (1.0f / 5040) + 1.0f / 720;
    UNROLLED(i, n) q[i] = q[i] * r[i] + 1.0f / 120;
    UNROLLED(i, n) q[i] = q[i] * r[i] + 1.0f / 24;
    UNROLLED(i, n) q[i] = q[i] * r[i] + 1.0f / 6;
    UNROLLED(i, n) q[i] = q[i] * r[i] + 0.5f;
    UNROLLED(i, n) q[i] = q[i] * r[i] * r[i] + r[i];
    UNROLLED(i, n) power[i] = (vec)(((bits)power[i] - (bits)magic + 127) << 23);
}

/* Right to 4 units in the last place down to -87, and below that at most the value at -88, which is 6e-39. At 2^128 power
   would be infinite, and infinity times q, which may be negative, is not a number after the sum. */
static inline __attribute__((always_inline)) void sigmoids(vec *v, const int n) {
    vec q[8], power[8];
    UNROLLED(i, n) v[i] = clamp(-v[i], splat(-87.0f), splat(88.0f));
    split_power(v, q, power, n);
    UNROLLED(i, n) v[i] = 1.0f / (1.0f + (q[i] * power[i] + power[i]));
}

/* (e^2v - 1) / (e^2v + 1), right to 4 units in the last place; exactly 1 or -1 from |v| = 10 on. NaN stays, because
   `clamp` keeps it. */
static inline __attribute__((always_inline)) void tangents(vec *v, const int n) {
    vec q[8], power[8];
    UNROLLED(i, n) v[i] = 2.0f * clamp(v[i], splat(-10.0f), splat(10.0f));
    split_power(v, q, power, n);
    UNROLLED(i, n) q[i] = q[i] * power[i] + (power[i] - 1.0f);
    UNROLLED(i, n) v[i] = q[i] / (q[i] + 2.0f);
}

/* y[i][j] = sum over k of x[i][k] w[k][j], for `rows` sequences and `width` vectors, added up in `chains` parts, so that
   enough sums are under way. All three are constants in each copy that the compiler makes. */
static inline __attribute__((always_inline)) void multiply(
    const float *w, int64_t pitch, int64_t count, const float *x, int64_t row, float *y, int64_t out, const int rows,
    const int width, const int chains) {
    vec sum[8 * ROWS];
    UNROLLED(i, rows * width * chains) sum[i] = splat(0);
    int64_t k = 0;
    for (; k + chains <= count; k += chains)
        UNROLLED(c, chains) UNROLLED(j, width) {
            const vec value = at(w + (k + c) * pitch, j);
            UNROLLED(i, rows) sum[(c * rows + i) * width + j] += value * splat(x[i * row + k + c]);
        }
    for (; k < count; k++)
        UNROLLED(j, width) UNROLLED(i, rows) sum[i * width + j] += at(w + k * pitch, j) * splat(x[i * row + k]);
    for (int c = chains / 2; c > 0; c /= 2) UNROLLED(i, c * rows * width) sum[i] += sum[c * rows * width + i];
    UNROLLED(i, rows) UNROLLED(j, width) *(vec *)(y + i * out + j * LANES) = sum[i * width + j];
}

#define MULTIPLY(rows, width, chains) \
    case rows * 16 + width: multiply(w, pitch, count, x, row, y, out, rows, width, chains); break;

static __attribute__((noinline)) void multiply_some(
    const float *w, int64_t pitch, int64_t count, const float *x, int64_t row, float *y, int64_t out, int64_t rows,
    int64_t width) {
    switch (rows * 16 + width) {
        MULTIPLY(1, 1, 8) MULTIPLY(1, 2, 4) MULTIPLY(1, 4, 2) MULTIPLY(1, 6, 1) MULTIPLY(1, 8, 1)
        MULTIPLY(2, 1, 4) MULTIPLY(2, 2, 2) MULTIPLY(2, 3, 1)
        MULTIPLY(3, 1, 2) MULTIPLY(3, 2, 1) MULTIPLY(3, 3, 1)
        MULTIPLY(4, 1, 2) MULTIPLY(4, 2, 1) MULTIPLY(4, 3, 1)
    }
}

#endif
