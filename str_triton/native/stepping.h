/* One time step of a stack of recurrent layers, with projections of their inputs, and a linear layer on the last layer's
   output or on the mean of its outputs so far. Runs on the calling thread. */

#ifndef STR_TRITON_STEPPING_H
#define STR_TRITON_STEPPING_H

#include "recurrent.h"

typedef struct {
    const float *w;    /* [panels][inner][width][LANES]; NULL: no product */
    const float *bias; /* [panels * width * LANES] */
    int64_t inner, outer, panels, width;
} matrix;

typedef struct {
    matrix first, second; /* the input's part of the gates is second(first(x)), or second(x) */
    recurrent loop;
} step_layer;

typedef struct {
    const step_layer *layers;
    int64_t count, inputs, hidden, states, outputs;
    int64_t mean;  /* score the mean of the outputs, not the last one */
    matrix head;   /* without it the last layer's output is the result */
    float *scratch; /* str_triton_step_scratch floats for a batch of `room` */
    int64_t room;
} stepper;

static int64_t floats_of(const matrix *m) { return m->panels * m->width * LANES; }

/* y = m x + bias for rows of x, `pitch` floats apart; rows of y are floats_of(m) apart. */
static void apply(const matrix *m, const float *x, int64_t pitch, float *y, int64_t batch) {
    const int64_t width = m->width * LANES, row = floats_of(m);
    for (int64_t panel = 0; panel < m->panels; panel++)
        EACH_GROUP(s, rows, ((duty){0, batch, 0, 1})) {
            float *to = y + s * row + panel * width;
            multiply_some(m->w + panel * m->inner * width, width, m->inner, x + s * pitch, pitch, to, row, rows, m->width);
            for (int64_t i = 0; i < rows; i++)
                for (int64_t j = 0; j < m->width; j++)
                    *(vec *)(to + i * row + j * LANES) += at(m->bias + panel * width, j);
        }
}

/* The rows of y without the elements beyond their end. */
static void trim(const float *x, int64_t pitch, float *y, int64_t size, int64_t batch) {
    for (int64_t s = 0; s < batch; s++) memcpy(y + s * size, x + s * pitch, sizeof(float) * size);
}

/* Adds h to the sums of the outputs so far and writes their means. A sum is two floats: the second one holds the rounding
   error of the first. The first element of the third row holds a sequence's number of steps. */
static void add_to_mean(const stepper *s, int64_t batch, const float *h, const float *from, float *to, float *mean) {
    const int64_t size = batch * s->hidden;
    for (int64_t b = 0; b < batch; b++) {
        const int64_t begin = b * s->hidden;
        int32_t steps;
        memcpy(&steps, from + 2 * size + begin, sizeof steps);
        steps += steps < INT32_MAX;
        for (int64_t i = begin; i < begin + s->hidden; i++) {
            const double sum = (double)from[i] + (double)from[size + i] + (double)h[i];
            to[i] = (float)sum;
            to[size + i] = (float)(sum - (double)to[i]);
            to[2 * size + i] = 0;
            mean[i] = (float)(sum / steps);
        }
        memcpy(to + 2 * size + begin, &steps, sizeof steps);
    }
}

/* Floats of scratch memory for one sequence of a batch: two outputs or means, and the largest needs of a layer. */
static int64_t scratch_of(const stepper *s) {
    int64_t most = floats_of(&s->head);
    for (int64_t i = 0; i < s->count; i++) {
        const step_layer *l = s->layers + i;
        const int64_t loop = sequence_floats(&l->loop), gates = l->loop.gates * s->hidden;
        const int64_t floats = floats_of(&l->first) + floats_of(&l->second) + gates + (1 + s->states) * s->hidden + loop;
        most = floats > most ? floats : most;
    }
    return 2 * s->hidden + most;
}

int64_t str_triton_step_scratch(const stepper *s, int64_t batch) { return batch * scratch_of(s); }

/* x [batch][inputs], state and next [count * states, of the mean 3 more][batch][hidden], y [batch][outputs]. `next` may
   be `state`. */
void str_triton_step(const stepper *s, int64_t batch, const float *x, const float *state, float *next, float *y) {
    if (!batch) return; /* The arrays of an empty batch may be null. */
    const int64_t size = batch * s->hidden;
    float *out = s->scratch, *mean = out + size, *rest = mean + size;
    int64_t pitch = s->inputs;
    for (int64_t i = 0; i < s->count; i++) {
        const step_layer *l = s->layers + i;
        float *thin = rest, *wide = thin + batch * floats_of(&l->first), *gates = wide + batch * floats_of(&l->second);
        float *results = gates + batch * l->loop.gates * s->hidden;
        if (l->first.w) apply(&l->first, x, pitch, thin, batch);
        apply(&l->second, l->first.w ? thin : x, l->first.w ? floats_of(&l->first) : pitch, wide, batch);
        trim(wide, floats_of(&l->second), gates, l->loop.gates * s->hidden, batch);
        recurrent loop = l->loop;
        loop.steps = 1, loop.batch = batch, loop.x = gates, loop.y = results;
        loop.h = state + i * s->states * size, loop.c = loop.h + (s->states - 1) * size;
        loop.scratch = results + (1 + s->states) * size;
        run_sequences(&loop, (duty){0, batch, 0, 1}, 0);
        memcpy(next + i * s->states * size, results + size, sizeof(float) * s->states * size);
        memcpy(out, results, sizeof(float) * size);
        x = out, pitch = s->hidden;
    }
    if (s->mean) {
        const int64_t begin = s->count * s->states * size;
        add_to_mean(s, batch, out, state + begin, next + begin, mean);
        x = mean;
    }
    if (s->head.w) {
        apply(&s->head, x, s->hidden, rest, batch);
        trim(rest, floats_of(&s->head), y, s->outputs, batch);
    } else {
        memcpy(y, x, sizeof(float) * size);
    }
}

#endif
