/* Products of int8 weights with 16-bit codes of float32 numbers: sums are exact in int32.

   A sequence's numbers share one scale, found anew at every step: code = round(x * reach / max |x|). `reach` is as large as
   16 bits and the sums allow. Packed weights hold two successive inputs of a unit side by side: [pairs][width][LANES][2]. */

#ifndef STR_TRITON_CODES_H
#define STR_TRITON_CODES_H

#include "vectors.h"
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define UNROLLED(i, n) _Pragma("GCC unroll 8") for (int i = 0; i < n; i++)

typedef int16_t halves __attribute__((vector_size(LANES * 2), aligned(2), may_alias));

static float reach_of(int64_t count) {
    const int64_t reach = INT32_MAX / (127 * count);
    return reach < INT16_MAX ? reach : INT16_MAX;
}

/* Writes the codes of `count` numbers, and zeros up to an even number of them. Returns the scale: NaN or infinity where a
   number is, and all codes are zero then. */
static float to_codes(const float *x, int64_t count, int16_t *codes) {
    const vec magic = splat(12582912.0f); /* 1.5 * 2^23: adding it rounds to an integer in the lowest bits */
    const int64_t whole = count / LANES * LANES;
    const float reach = reach_of(count);
    vec last = splat(0);
    memcpy(&last, x + whole, sizeof(float) * (count - whole));
    bits most = (bits)last & 0x7fffffff; /* As integers, NaN is above infinity. */
    for (int64_t i = 0; i < whole; i += LANES) {
        const bits size = (bits)at(x + i, 0) & 0x7fffffff;
        most = (bits)choose(size > most, (vec)size, (vec)most);
    }
    int32_t largest = 0;
    for (int i = 0; i < LANES; i++) largest = most[i] > largest ? most[i] : largest;
    float top;
    memcpy(&top, &largest, sizeof top);
    const float inverse = top > 0 ? reach / top : 0.0f;
    for (int64_t i = 0; i < count; i += LANES) {
        vec v = (i < whole ? at(x + i, 0) : last) * inverse;
        v = clamp(choose(v == v, v, splat(0)), splat(-reach), splat(reach)) + magic;
        const halves found = __builtin_convertvector((bits)v - (bits)magic, halves);
        memcpy(codes + i, &found, sizeof(int16_t) * (i < whole ? LANES : count - whole));
    }
    if (count % 2) codes[count] = 0;
    return top / reach;
}

/* In every element: sum + the products of two int8 weights with two codes, which `pair` holds. */
static inline __attribute__((always_inline)) void dot2(bits *sum, const int8_t *weights, const int32_t *pairs, const int n) {
#if defined(__AVX512BW__) && LANES == 16
    const __m512i wide = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)weights));
    UNROLLED(i, n) sum[i] += (bits)_mm512_madd_epi16(wide, _mm512_set1_epi32(pairs[i]));
#elif defined(__AVX2__) && LANES == 8
    const __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)weights));
    UNROLLED(i, n) sum[i] += (bits)_mm256_madd_epi16(wide, _mm256_set1_epi32(pairs[i]));
#else
    for (int i = 0; i < n; i++) {
        int16_t x[2];
        memcpy(x, pairs + i, sizeof x);
        for (int lane = 0; lane < LANES; lane++) sum[i][lane] += weights[2 * lane] * x[0] + weights[2 * lane + 1] * x[1];
    }
#endif
}

/* y[i][j] = scales[i] steps[j] sum over k of x[i][k] w[k][j], for `rows` sequences and `width` vectors; without steps they
   are 1. `pitch` bytes lie between pairs of weights, `row` codes between sequences. */
static inline __attribute__((always_inline)) void multiply_codes(
    const int8_t *w, int64_t pitch, int64_t pairs, const int16_t *x, int64_t row, const float *scales, const float *steps,
    float *y, int64_t out, const int rows, const int width) {
    bits sum[12];
    UNROLLED(i, rows * width) sum[i] = (bits){0};
    for (int64_t k = 0; k < pairs; k++) {
        int32_t both[4];
        UNROLLED(i, rows) memcpy(both + i, x + i * row + 2 * k, sizeof(int32_t));
        UNROLLED(j, width) dot2(sum + j * rows, w + k * pitch + j * 2 * LANES, both, rows);
    }
    UNROLLED(i, rows) UNROLLED(j, width) {
        vec found = __builtin_convertvector(sum[j * rows + i], vec) * scales[i];
        if (steps) found *= at(steps, j);
        *(vec *)(y + i * out + j * LANES) = found;
    }
}

#define MULTIPLY_CODES(rows, width) \
    case rows * 16 + width: multiply_codes(w, pitch, pairs, x, row, scales, steps, y, out, rows, width); break;

static __attribute__((noinline)) void multiply_some_codes(
    const int8_t *w, int64_t pitch, int64_t pairs, const int16_t *x, int64_t row, const float *scales, const float *steps,
    float *y, int64_t out, int64_t rows, int64_t width) {
    switch (rows * 16 + width) {
        MULTIPLY_CODES(1, 1) MULTIPLY_CODES(1, 2) MULTIPLY_CODES(1, 4) MULTIPLY_CODES(1, 6) MULTIPLY_CODES(1, 8)
        MULTIPLY_CODES(2, 1) MULTIPLY_CODES(2, 2) MULTIPLY_CODES(2, 3)
        MULTIPLY_CODES(3, 1) MULTIPLY_CODES(3, 2) MULTIPLY_CODES(3, 3)
        MULTIPLY_CODES(4, 1) MULTIPLY_CODES(4, 2) MULTIPLY_CODES(4, 3)
    }
}

#endif
