"""Templates of the C program; `str_triton.deploy.c_export.program` fills them in."""

from collections.abc import Callable
from string import Template
from typing import NamedTuple

import numpy as np

HEADER = Template("""\
/* $title.
 *
 * C99 without allocation. It needs expf and tanhf of the math library. One call per frame:
 *
 *     ${name}_state state;
 *     ${name}_init(&state);
$calls
 *     int best = ${name}_predict(&state);
 *
 * A frame is an array of ${guard}_INPUTS floats:
 * $features.
 * $ready ${name}_logits returns the score of each class, without a softmax.
 * The classes:
 *
$classes
 */
#ifndef ${guard}_H
#define ${guard}_H

#include <stdint.h>

#define ${guard}_INPUTS $inputs
#define ${guard}_OUTPUTS $outputs

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
$state
} ${name}_state;

/* Begin a sequence. */
void ${name}_init(${name}_state *state);

/* Process one frame$forward. */
void ${name}_step(${name}_state *state, const float frame[${guard}_INPUTS]);
$backward
/* Write the score of each class to logits. */
void ${name}_logits(const ${name}_state *state, float logits[${guard}_OUTPUTS]);

/* Return the class with the largest score. */
int ${name}_predict(const ${name}_state *state);

#ifdef __cplusplus
}
#endif

#endif
""")

SOURCE = Template("""\
/* $title. See $name.h. */
#include "$name.h"

#include <math.h>
#include <stddef.h>

enum {
    INPUTS = ${guard}_INPUTS,
    OUTPUTS = ${guard}_OUTPUTS,
    HIDDEN = $hidden,
    LAYERS = $layers,
    DIRECTIONS = $directions,
    MAX_RANK = $max_rank
};

typedef $weight weight;

/* A matrix: the product of rows and inner, or rows alone, where inner is NULL. */
typedef struct {
    const weight *rows;
    const weight *inner;
$scale_field    size_t columns; /* columns of the matrix */
    size_t size; /* length of a row: the rank, or columns */
} matrix;

typedef struct {
    const weight *values;
$vector_scale_field} vector;

typedef struct {
    matrix input;
    matrix hidden;
    vector bias;
$cell_fields} layer;

$data
static float dot(const weight *w, const float *x, size_t count)
{
    float sum = 0.0f;
    for (size_t i = 0; i < count; i++) {
        sum += (float)w[i] * x[i];
    }
    return sum;
}

/* Return the vector that the rows of m are multiplied with: x, or the product of inner and x, written to buffer. */
static const float *project(const matrix *m, const float *x, float *buffer)
{
    if (m->inner == NULL) {
        return x;
    }
    for (size_t k = 0; k < m->size; k++) {
        buffer[k] = $component;
    }
    return buffer;
}

static float row(const matrix *m, size_t i, const float *projected)
{
    const float sum = dot(m->rows + i * m->size, projected, m->size);
    return $row;
}

static float at(const vector *v, size_t i)
{
    return ${vector_scale}v->values[i];
}

$sigmoid
$cell
static void advance(${name}_state *state, const float *frame, size_t direction)
{
$standardise    for (size_t l = 0; l < LAYERS; l++) {
        const size_t first = (direction + l) * HIDDEN;
        cell(&layers[direction + l], input, $cell_state);
        input = state->h + first;
    }
$pool}

void ${name}_init(${name}_state *state)
{
$begin}

void ${name}_step(${name}_state *state, const float frame[${guard}_INPUTS])
{
    advance(state, frame, 0);
}
$step_back
void ${name}_logits(const ${name}_state *state, float logits[${guard}_OUTPUTS])
{
$pooled    for (size_t i = 0; i < OUTPUTS; i++) {
        logits[i] = row(&classifier, i, pooled) + at(&classifier_bias, i);
    }
}

int ${name}_predict(const ${name}_state *state)
{
    float logits[OUTPUTS];
    size_t best = 0;
    ${name}_logits(state, logits);
    for (size_t i = 1; i < OUTPUTS; i++) {
        if (logits[i] > logits[best]) {
            best = i;
        }
    }
    return (int)best;
}
""")

ZERO = Template("""\
    for (size_t i = 0; i < $count; i++) {
        state->$field[i] = 0;
    }
""")

SIGMOID = """\
static float sigmoid(float x)
{
    return 1.0f / (1.0f + expf(-x));
}
"""

_BEGIN = """\
{
    float buffer_x[MAX_RANK], buffer_h[MAX_RANK], next[HIDDEN];
    const float *p = project(&l->input, x, buffer_x);
    const float *q = project(&l->hidden, h, buffer_h);
    for (size_t i = 0; i < HIDDEN; i++) {
"""
_END = """\
    }
    for (size_t i = 0; i < HIDDEN; i++) {
        h[i] = next[i];
    }
}
"""


def _gate(name: str, number: int) -> str:
    """Return C code that computes gate `number` of unit i before its activation."""
    at = {0: "i", 1: "HIDDEN + i"}.get(number, f"{number} * HIDDEN + i")
    products = f"row(&l->input, {at}, p) + row(&l->hidden, {at}, q)"
    return f"        const float {name} = at(&l->bias, {at})\n            + {products};\n"


class Cell(NamedTuple):
    """A cell in C. `bias` maps the layer's two biases [gates, hidden] to the program's bias [blocks, hidden]."""

    code: str
    bias: Callable[[np.ndarray, np.ndarray], np.ndarray]
    states: tuple[str, ...] = ("h",)


CELLS = {
    "gru": Cell(
        "static void cell(const layer *l, const float *x, float *h)\n"
        + _BEGIN
        + _gate("r", 0)
        + _gate("z", 1)
        + """\
        const float n_x = row(&l->input, 2 * HIDDEN + i, p) + at(&l->bias, 2 * HIDDEN + i);
        const float n_h = row(&l->hidden, 2 * HIDDEN + i, q) + at(&l->bias, 3 * HIDDEN + i);
        const float n = tanhf(n_x + sigmoid(r) * n_h);
        next[i] = n + sigmoid(z) * (h[i] - n);
"""
        + _END,
        # The sums of both biases for r and z, then the input bias of n and the recurrent bias of n.
        lambda first, second: np.concatenate([first[:2] + second[:2], first[2:], second[2:]]),
    ),
    "lstm": Cell(
        "static void cell(const layer *l, const float *x, float *h, float *c)\n"
        + _BEGIN
        + _gate("in", 0)
        + _gate("forget", 1)
        + _gate("g", 2)
        + _gate("out", 3)
        + """\
        c[i] = sigmoid(forget) * c[i] + sigmoid(in) * tanhf(g);
        next[i] = sigmoid(out) * tanhf(c[i]);
"""
        + _END,
        lambda first, second: first + second,
        states=("h", "c"),
    ),
    "fastgrnn": Cell(
        "static void cell(const layer *l, const float *x, float *h)\n"
        + _BEGIN
        + """\
        const float a = row(&l->input, i, p) + row(&l->hidden, i, q);
        const float z = sigmoid(a + at(&l->bias, i));
        next[i] = (l->zeta * (1.0f - z) + l->nu) * tanhf(a + at(&l->bias, HIDDEN + i)) + z * h[i];
"""
        + _END,
        lambda first, second: np.concatenate([first, second]),
    ),
}

STANDARDISE = """\
    float input_frame[INPUTS];
    const float *input = input_frame;
    for (size_t i = 0; i < INPUTS; i++) {
        input_frame[i] = (frame[i] - mean[i]) / deviation[i];
    }
"""

# Kahan summation, because the sum of a long sequence would lose small terms.
POOL = """\
    for (size_t i = 0; i < HIDDEN; i++) {
        const size_t k = direction * HIDDEN + i;
        const float term = input[i] - state->compensation[k];
        const float total = state->total[k] + term;
        state->compensation[k] = (total - state->total[k]) - term;
        state->total[k] = total;
    }
    state->steps[direction]++;
"""

POOLED_MEAN = """\
    float pooled[DIRECTIONS * HIDDEN];
    for (size_t i = 0; i < DIRECTIONS * HIDDEN; i++) {
        const uint32_t steps = state->steps[i / HIDDEN];
        pooled[i] = steps > 0 ? state->total[i] / (float)steps : 0.0f;
    }
"""
POOLED_LAST = "    const float *pooled = state->h + (LAYERS - 1) * HIDDEN;\n"

BACKWARD_DECLARATION = Template("""
/* Process one frame of the backward pass, from the last to the first. */
void ${name}_step_back(${name}_state *state, const float frame[${guard}_INPUTS]);
""")
STEP_BACK = Template("""
void ${name}_step_back(${name}_state *state, const float frame[${guard}_INPUTS])
{
    advance(state, frame, 1);
}
""")
