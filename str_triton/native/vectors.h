/* Vectors of float32: arithmetic, activations, transposition. */

#ifndef STR_TRITON_VECTORS_H
#define STR_TRITON_VECTORS_H

#include <stdint.h>
#include <string.h>
#ifdef __AVX__
#include <immintrin.h>
#endif

/* Floats in a register, and how many registers a strip may take: about half to most of what the processor has. */
#if defined(__AVX512F__) || defined(STR_TRITON_SIXTEEN_LANES)
#define LANES 16
#define WIDEST 16
#define COPIES(x) x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x
#define LOWER 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define UPPER 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif defined(__AVX__)
#define LANES 8
#define WIDEST 8
#define COPIES(x) x, x, x, x, x, x, x, x
#define LOWER 0, 8, 1, 9, 2, 10, 3, 11
#define UPPER 4, 12, 5, 13, 6, 14, 7, 15
#else
#define LANES 4
#ifdef __aarch64__
#define WIDEST 16
#else
#define WIDEST 8
#endif
#define COPIES(x) x, x, x, x
#define LOWER 0, 4, 1, 5
#define UPPER 2, 6, 3, 7
#endif

typedef float vec __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t bits __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

/* The elements of two vectors at the listed places, as a vector of integers of their size. */
#ifdef __clang__
#define PICK(type, a, b, ...) __builtin_shufflevector((type)(a), (type)(b), __VA_ARGS__)
#else
#define PICK(type, a, b, ...) __builtin_shuffle((type)(a), (type)(b), (type){__VA_ARGS__})
#endif

enum { NONE, HARDSWISH, HARDSIGMOID, SIGMOID, SILU, GELU, GELU_TANH, LEAKY_RELU };

static inline vec splat(float value) { return (vec){COPIES(value)}; }

static inline vec choose(bits where, vec a, vec b) { return (vec)((where & (bits)a) | (~where & (bits)b)); }

static inline vec at(const float *x, int64_t index) { return *(const vec *)(x + index * LANES); }

/* NaN stays NaN: both comparisons are false for it, and x86's instructions return their second argument. */
static inline vec clamp(vec v, vec low, vec high) {
#if LANES == 16 && defined(__AVX512F__)
    return (vec)_mm512_min_ps((__m512)high, _mm512_max_ps((__m512)low, (__m512)v));
#elif LANES == 8
    return (vec)_mm256_min_ps((__m256)high, _mm256_max_ps((__m256)low, (__m256)v));
#else
    v = choose(low > v, low, v);
    return choose(v > high, high, v);
#endif
}

/* e^v, right to two units in the last place: e^v = 2^n e^r with |r| < 0.35, and a polynomial of r. From 2^127.5 on it is
   infinite, below the smallest normal number it is that. */
static inline vec exponential(vec v) {
    v = clamp(v, splat(-87.0f), splat(89.0f));
    const vec magic = splat(12582912.0f); /* 1.5 * 2^23: adding it rounds to an integer in the lowest bits */
    const vec shifted = v * 1.44269504f + magic;
    const vec n = shifted - magic;
    const vec r = (v - n * 0.693359375f) - n * -2.12194440e-4f;
    vec p = splat(1.0f / 5040);
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return p * (vec)(((bits)shifted - (bits)magic + 127) << 23);
}

/* x times the normal distribution's integral up to x: the tail beyond |x| is a polynomial in t times e^(-x^2 / 2)
   (Abramowitz and Stegun, 7.1.26: right to 1e-7). */
static inline vec gelu(vec x) {
    const vec z = choose(x < 0, -x, x) * 0.70710678f;
    const vec t = 1.0f / (1.0f + 0.3275911f * z);
    vec tail = t * 1.061405429f - 1.453152027f;
    tail = tail * t + 1.421413741f;
    tail = tail * t - 0.284496736f;
    tail = (tail * t + 0.254829592f) * t * 0.5f * exponential(-z * z);
    return x * choose(x < 0, tail, 1.0f - tail);
}

static __attribute__((noinline)) void activate(int64_t activation, float slope, vec *v, int64_t count) {
    const vec zero = splat(0), one = splat(1);
    for (int64_t i = 0; i < count; i++) {
        const vec x = v[i];
        switch (activation) {
            case HARDSWISH: v[i] = x * clamp(x * (1.0f / 6) + 0.5f, zero, one); break;
            case HARDSIGMOID: v[i] = clamp(x * (1.0f / 6) + 0.5f, zero, one); break;
            case SIGMOID: v[i] = 1.0f / (1.0f + exponential(-x)); break;
            case SILU: v[i] = x / (1.0f + exponential(-x)); break;
            case GELU: v[i] = gelu(x); break;
            case GELU_TANH: v[i] = x / (1.0f + exponential(x * (-1.59576912f - 0.0713548163f * x * x))); break;
            case LEAKY_RELU: v[i] = choose(x > 0, x, x * slope); break;
        }
    }
}

/* Each step interleaves the upper half of the rows with the lower half: in the number of an element, (row, lane), the
   highest bit of each moves to the lowest place of the other. */
static inline __attribute__((always_inline)) void transpose(vec *v) {
    for (int step = 1; step < LANES; step *= 2) {
        vec w[LANES];
        for (int i = 0; i < LANES / 2; i++) {
            w[2 * i] = (vec)PICK(bits, v[i], v[i + LANES / 2], LOWER);
            w[2 * i + 1] = (vec)PICK(bits, v[i], v[i + LANES / 2], UPPER);
        }
        for (int i = 0; i < LANES; i++) v[i] = w[i];
    }
}

#endif
