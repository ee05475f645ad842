/* The structs that structs.py fills. */

#ifndef STR_TRITON_OPERATIONS_H
#define STR_TRITON_OPERATIONS_H

#include <stdint.h>

enum {
    CONVOLUTION, MAX_POOL, COPY, MEAN, LINEAR, TURN, GATE,
    CONVOLUTION_BYTES, MAX_POOL_BYTES, COPY_BYTES, MEAN_BYTES, LINEAR_BYTES, QUANTIZE, DEQUANTIZE,
    GATE_BYTES,
};

typedef struct {
    float value;
    int32_t offset; /* in floats, from the pixel's place in the first input channel */
} tap;

typedef struct {
    float *data; /* the first pixel of the first image, channel and plane, or a byte; NULL: absent */
    int64_t image, channel, plane, row, column; /* strides in elements */
} view;

/* The numbers of an operation on bytes; integers.h explains them. */
typedef struct {
    const float *factors;  /* [channels]: the factors of the sums */
    const uint8_t *table;  /* [256]: the output for each byte before it; NULL: the byte itself */
    float residual, scale; /* the residual's factor; that of QUANTIZE, DEQUANTIZE, MEAN_BYTES and GATE_BYTES */
    int32_t zero_x, zero_y, zero_residual;
    int32_t fill; /* the byte in the padding */
} integers;

typedef struct {
    int64_t kind;
    int64_t items; /* the number of parts that the threads divide among themselves */
    view x, y, residual;
    int64_t images, channels, planes;
    int64_t length;               /* floats of a plane that are computed, a multiple of LANES */
    int64_t rows, columns;        /* COPY and MEAN: pixels of a plane */
    int64_t tiles, blocks, width; /* a plane in tiles, the channels in blocks, a strip in vectors */
    int64_t tables;               /* of taps: 1, or as many as planes, each with its own; COPY: column phases */
    const tap *taps;
    const int32_t *first;       /* [tables][channels + 1]: where each channel's taps begin */
    const int32_t *block_first; /* [blocks + 1]: where each block of channels begins */
    const float *bias;          /* [channels] */
    const int32_t *mask;        /* [planes][length]: -1 or 0; NULL: every pixel is real */
    float low, high;            /* outputs are clamped to them */
    int64_t activation;         /* what follows the clamp */
    float slope;                /* LEAKY_RELU: the factor of negative values */
    const integers *codes;      /* only for bytes: taps are quads or byte_taps, bias is int32, mask is bytes */
} operation;

typedef struct {
    const operation *operations;
    int64_t count;
} stage;

#endif
