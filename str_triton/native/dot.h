/* Vectors of bytes, and the instruction that int8 arithmetic is built on: sums of four products of bytes. */

#ifndef STR_TRITON_DOT_H
#define STR_TRITON_DOT_H

#include "vectors.h"
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

/* WIDE: bytes in a register. WIDEST_BYTES: registers of pixels in a strip, each of which has four of sums. */
#if defined(__AVX512BW__)
#define WIDE 64
#define WIDEST_BYTES 4
#elif defined(__AVX2__)
#define WIDE 32
#define WIDEST_BYTES 2
#else
#define WIDE 16
#define WIDEST_BYTES 2
#endif

typedef uint8_t bytes __attribute__((vector_size(WIDE), aligned(1), may_alias));
typedef uint16_t shorts __attribute__((vector_size(WIDE), aligned(1), may_alias));
typedef int32_t ints __attribute__((vector_size(WIDE), aligned(1), may_alias));
typedef float reals __attribute__((vector_size(WIDE), aligned(1), may_alias));

/* Keeps the compiler from fusing a product with the sum that follows: all processors round each result in the same way. */
#if defined(__x86_64__)
#define ROUNDED(v) __asm__("" : "+x"(v))
#elif defined(__aarch64__)
#define ROUNDED(v) __asm__("" : "+w"(v))
#else
#define ROUNDED(v) __asm__("" : "+m"(v))
#endif

/* Interleave and unpack within parts of 16 bytes, as x86 does; `pack` undoes two steps of it. */
#if WIDE == 64
#define WIDE_CALL(name) _mm512_##name
#define WIDE_TYPE __m512i
#elif WIDE == 32
#define WIDE_CALL(name) _mm256_##name
#define WIDE_TYPE __m256i
#endif

#if WIDE > 16
#define AS_INTEGERS(v) ((WIDE_TYPE)(v))
static inline bytes low_bytes(bytes a, bytes b) { return (bytes)WIDE_CALL(unpacklo_epi8)(AS_INTEGERS(a), AS_INTEGERS(b)); }
static inline bytes high_bytes(bytes a, bytes b) { return (bytes)WIDE_CALL(unpackhi_epi8)(AS_INTEGERS(a), AS_INTEGERS(b)); }
static inline bytes low_pairs(bytes a, bytes b) { return (bytes)WIDE_CALL(unpacklo_epi16)(AS_INTEGERS(a), AS_INTEGERS(b)); }
static inline bytes high_pairs(bytes a, bytes b) { return (bytes)WIDE_CALL(unpackhi_epi16)(AS_INTEGERS(a), AS_INTEGERS(b)); }

/* The lowest bytes of integers from 0 to 255. */
static inline bytes pack(ints a, ints b, ints c, ints d) {
    return (bytes)WIDE_CALL(packus_epi16)(
        WIDE_CALL(packs_epi32)(AS_INTEGERS(a), AS_INTEGERS(b)), WIDE_CALL(packs_epi32)(AS_INTEGERS(c), AS_INTEGERS(d)));
}
#else
static inline bytes low_bytes(bytes a, bytes b) { return PICK(bytes, a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23); }
static inline bytes high_bytes(bytes a, bytes b) { return PICK(bytes, a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31); }
static inline bytes low_pairs(bytes a, bytes b) { return (bytes)PICK(shorts, a, b, 0, 8, 1, 9, 2, 10, 3, 11); }
static inline bytes high_pairs(bytes a, bytes b) { return (bytes)PICK(shorts, a, b, 4, 12, 5, 13, 6, 14, 7, 15); }
static inline bytes pack(ints a, ints b, ints c, ints d) {
    const shorts ab = PICK(shorts, a, b, 0, 2, 4, 6, 8, 10, 12, 14), cd = PICK(shorts, c, d, 0, 2, 4, 6, 8, 10, 12, 14);
    return PICK(bytes, ab, cd, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
}
#endif

/* In every element: sum + the products of four unsigned bytes with four signed ones. All forms are exact; that of AVX2
   adds two products in 16 bits, which fit because quads.py pairs only weights whose products do. */
static inline ints dot4(ints sum, bytes x, ints weights) {
#if defined(STR_TRITON_EMULATE_VNNI)
    /* The meaning of vpdpbusd, element by element: for tests where no processor has it. */
    ints result = sum;
    const bytes w = (bytes)weights;
    for (int i = 0; i < WIDE; i++) result[i / 4] += (int32_t)x[i] * (int8_t)w[i];
    return result;
#elif defined(STR_TRITON_PORTABLE_DOT)
#define DOT_BY_SHIFTS
#elif WIDE == 64 && defined(__AVX512VNNI__)
    return (ints)_mm512_dpbusd_epi32(AS_INTEGERS(sum), AS_INTEGERS(x), AS_INTEGERS(weights));
#elif WIDE == 32 && defined(__AVXVNNI__)
    return (ints)_mm256_dpbusd_avx_epi32(AS_INTEGERS(sum), AS_INTEGERS(x), AS_INTEGERS(weights));
#elif WIDE > 16 && defined(STR_TRITON_WIDE_DOT)
    /* Even and odd bytes as 16 bits each: any weights, twice the instructions. For the benchmark. */
    const bytes even = x & (bytes)((shorts){0} + 255), odd = (bytes)((shorts)x >> 8);
    const ints w0 = (ints)WIDE_CALL(srai_epi16)(WIDE_CALL(slli_epi16)(AS_INTEGERS(weights), 8), 8);
    const ints w1 = (ints)WIDE_CALL(srai_epi16)(AS_INTEGERS(weights), 8);
    return sum + (ints)WIDE_CALL(madd_epi16)(AS_INTEGERS(even), AS_INTEGERS(w0))
        + (ints)WIDE_CALL(madd_epi16)(AS_INTEGERS(odd), AS_INTEGERS(w1));
#elif WIDE > 16
    return sum + (ints)WIDE_CALL(madd_epi16)(
        WIDE_CALL(maddubs_epi16)(AS_INTEGERS(x), AS_INTEGERS(weights)), WIDE_CALL(set1_epi16)(1));
#elif defined(__ARM_FEATURE_MATMUL_INT8)
    return (ints)vusdotq_s32((int32x4_t)sum, (uint8x16_t)x, (int8x16_t)weights);
#elif defined(__ARM_FEATURE_DOTPROD)
    /* The instruction takes signed bytes: subtract 128 from them, and add 128 times the weights. */
    const int32x4_t less = vdotq_s32((int32x4_t)sum, (int8x16_t)(x ^ 128), (int8x16_t)weights);
    return (ints)vsubq_s32(less, vdotq_s32(vdupq_n_s32(0), vdupq_n_s8(-128), (int8x16_t)weights));
#else
#define DOT_BY_SHIFTS
#endif
#ifdef DOT_BY_SHIFTS
    const ints quads = (ints)x;
    return sum + (quads & 255) * (weights << 24 >> 24) + (quads >> 8 & 255) * (weights << 16 >> 24)
        + (quads >> 16 & 255) * (weights << 8 >> 24) + (quads >> 24 & 255) * (weights >> 24);
#endif
}

#endif
