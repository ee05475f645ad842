/* The backward of the time loops: the steps that depend on each other. What surrounds them needs no loop, and torch computes
   it for all steps at once (ops/low_rank_cpu.py).

   With dh the gradient of the state after a step, and coefficients a, keep, a_c that torch has formed:

       GRU, MGU, FASTGRNN: gates = a dh                             dh = keep dh + v w^T gates
       LSTM: dc = dc + a_c dh, gates = a (dc, for o: dh)            dh = v w^T gates, dc = keep dc

   Sequences are independent of each other: each thread walks its own through all steps. */

#ifndef STR_TRITON_BACKWARD_H
#define STR_TRITON_BACKWARD_H

#include "recurrent.h"

typedef struct {
    int64_t lstm, gates, backward;         /* backward: time falls */
    int64_t steps, batch, hidden, rank;
    int64_t panels, width;                 /* of w */
    int64_t pitch;                         /* of keep, from one sequence to the next */
    const int64_t *counts;                 /* [steps]: how many sequences, the first ones, run at each step; NULL: all */
    const float *grad;                     /* [steps][batch][hidden]: the gradient of the outputs */
    const float *a;                        /* [steps][batch][gates][hidden] */
    const float *keep;                     /* [steps][batch][..., pitch floats] */
    const float *a_c;                      /* [steps][batch][hidden], of an LSTM */
    float *gates_grad, *p_grad;            /* [steps][batch][gates][hidden] and [steps][batch][rank], to be written */
    float *dh, *dc;                        /* [batch][hidden], changed; dc of an LSTM */
    float *dhs;                            /* [steps][batch][hidden]: dh of every step, to be written; not of an LSTM */
    const float *w, *v;                    /* packed: w as recurrent.h's v, v as its w with one gate */
    float *scratch;                        /* str_triton_walk_scratch floats */
} walk;

static int64_t walk_row(const walk *k) {
    return k->panels * k->width * LANES + unit_blocks(k->hidden) * UNITS * LANES;
}

/* The gradients of one sequence's gates at a step. */
static inline void gate_gradients(const walk *k, int64_t row, const float *restrict grad, float *restrict dh) {
    const int64_t hidden = k->hidden;
    const float *restrict a = k->a + row * k->gates * hidden;
    float *restrict out = k->gates_grad + row * k->gates * hidden;
    for (int64_t j = 0; j < hidden; j++) dh[j] += grad[j];
    if (!k->lstm) {
        memcpy(k->dhs + row * hidden, dh, sizeof(float) * hidden);
        for (int64_t gate = 0; gate < k->gates; gate++)
            for (int64_t j = 0; j < hidden; j++) out[gate * hidden + j] = a[gate * hidden + j] * dh[j];
        return;
    }
    const float *restrict a_c = k->a_c + row * hidden;
    float *restrict dc = k->dc + row % k->batch * hidden;
    for (int64_t j = 0; j < hidden; j++) dc[j] += a_c[j] * dh[j];
    for (int64_t gate = 0; gate < 3; gate++)
        for (int64_t j = 0; j < hidden; j++) out[gate * hidden + j] = a[gate * hidden + j] * dc[j];
    for (int64_t j = 0; j < hidden; j++) out[3 * hidden + j] = a[3 * hidden + j] * dh[j];
}

/* The gradients of one sequence's states before a step, from back = v w^T gates. */
static inline void state_gradients(const walk *k, int64_t row, const float *restrict back, float *restrict dh) {
    const int64_t hidden = k->hidden;
    const float *restrict keep = k->keep + row * k->pitch;
    if (!k->lstm) {
        for (int64_t j = 0; j < hidden; j++) dh[j] = dh[j] * keep[j] + back[j];
        return;
    }
    float *restrict dc = k->dc + row % k->batch * hidden;
    memcpy(dh, back, sizeof(float) * hidden);
    for (int64_t j = 0; j < hidden; j++) dc[j] *= keep[j];
}

/* `most` sequences from s on, through all steps. */
static void walk_rows(const walk *k, int64_t s, int64_t most) {
    const int64_t hidden = k->hidden, all = k->gates * hidden, ranks = k->panels * k->width * LANES, row = walk_row(k);
    const int64_t blocks = unit_blocks(hidden);
    float *p = k->scratch + s * row, *back = p + ranks;
    for (int64_t i = 0; i < k->steps; i++) {
        const int64_t time = k->backward ? k->steps - 1 - i : i, first = time * k->batch + s;
        const int64_t rows = k->counts ? smaller(most, k->counts[time] - s) : most;
        if (rows <= 0) continue;
        for (int64_t j = 0; j < rows; j++)
            gate_gradients(k, first + j, k->grad + (first + j) * hidden, k->dh + (s + j) * hidden);
        for (int64_t panel = 0; panel < k->panels; panel++)
            multiply_some(
                k->w + panel * all * k->width * LANES, k->width * LANES, all, k->gates_grad + first * all, all,
                p + panel * k->width * LANES, row, rows, k->width);
        for (int64_t j = 0; j < rows; j++)
            memcpy(k->p_grad + (first + j) * k->rank, p + j * row, sizeof(float) * k->rank);
        for (int64_t block = 0; block < blocks; block++)
            multiply_some(
                k->v + block * k->rank * UNITS * LANES, UNITS * LANES, k->rank, p, row, back + block * UNITS * LANES, row,
                rows, UNITS);
        for (int64_t j = 0; j < rows; j++) state_gradients(k, first + j, back + j * row, k->dh + (s + j) * hidden);
    }
}

/* Groups of ROWS sequences, from number `begin` to number `end`. */
static void walk_groups(const walk *k, int64_t begin, int64_t end) {
    for (int64_t s = begin * ROWS, left; s < end * ROWS && (left = k->batch - s) > 0; s += ROWS)
        walk_rows(k, s, left < ROWS ? left : ROWS);
}

#endif
