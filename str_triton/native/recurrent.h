/* The time loops of recurrent layers.

   The recurrent matrix is dense, or a product w v^T of rank r. A step is p = v^T h (if there is a v), q = w p or w h, and
   a function of single units. Lanes are ranks in the first product and hidden units in the second, so that both read
   the packed factors front to back, and one load of a vector serves up to four sequences.

   Packed factors: v as [panels][hidden][width][LANES] with `width` vectors of ranks in a panel; w as
   [blocks][inner][2][gates][LANES] with two vectors of units in a block. The elements beyond the last rank or unit are
   zero there, and their results are never stored. Int8 factors are in pairs of inputs, as codes.h says.

   The input's part of the gates is given, or computed block by block where it is used, so that it stays in the caches: a
   batch's gates of all steps would be written to memory and read back. */

#ifndef STR_TRITON_RECURRENT_H
#define STR_TRITON_RECURRENT_H

#include "codes.h"
#include "products.h"
#include "waiting.h"
#include <string.h>

enum { GRU, LSTM, FASTGRNN, MGU };
enum { UNITS = 2 }; /* vectors of units in a block */

typedef struct {
    int64_t cell, gates, reverse;
    int64_t steps, batch, hidden, inner; /* inner: the rank, or `hidden` without v */
    int64_t panels, width;               /* of v; width 0: there is none */
    int64_t features;                    /* of the input, if there is a w_in */
    const float *x;                      /* [steps][batch][gates * hidden]: the input's part of the gates; or the input */
    const float *h, *c;                  /* [batch][hidden]: the first states; c of an LSTM alone */
    float *y;                            /* [steps + states][batch][hidden]: outputs, the last h, the last c */
    const int64_t *counts;               /* [steps]: how many sequences, the first ones, run at each step; NULL: all */
    float *kept;                         /* for a backward: c after every step, [steps][batch][hidden], or FASTGRNN's z and
                                            n, [steps][batch][2][hidden]; NULL: not asked for */
    const void *v, *w;                   /* packed */
    const float *scales;                 /* of int8 rows of w, packed like its bias with all gates; NULL: w, v are float32 */
    const float *bias;                   /* [blocks][2][gates, of FASTGRNN 2][LANES] */
    const float *w_in, *bias_in;         /* of the input's part of the gates, packed like w and the bias; or NULL */
    float zeta, nu;                      /* FASTGRNN: sigmoids of its two numbers */
    float *scratch;                      /* str_triton_recurrent_scratch floats */
} recurrent;

/* Advances h, and c of an LSTM, of a block of units by a step. q: [2][gates] of R h; x: the input's part, `apart` floats
   from one gate to the next and `across` from one vector of units to the next. Of FASTGRNN c becomes n, and z its gate. */
static inline __attribute__((always_inline)) void advance(
    const recurrent *r, const int cell, const int gates, const float *q, const float *x, int64_t apart, int64_t across,
    const float *bias, vec *h, vec *c, vec *z) {
#define X(gate) at(x + (gate)*apart + u * across, 0)
#define Q(gate) (at(q, u * gates + (gate)) + at(bias, u * gates + (gate)))
#define EACH_UNIT UNROLLED(u, UNITS)
    vec s[2 * UNITS], n[UNITS];
    switch (cell) {
        case GRU:
            EACH_UNIT s[u] = X(0) + Q(0), s[UNITS + u] = X(1) + Q(1);
            sigmoids(s, 2 * UNITS);
            EACH_UNIT n[u] = X(2) + s[u] * Q(2);
            tangents(n, UNITS);
            EACH_UNIT h[u] = n[u] + s[UNITS + u] * (h[u] - n[u]);
            break;
        case LSTM:
            EACH_UNIT s[u] = X(0) + Q(0), s[UNITS + u] = X(1) + Q(1), n[u] = X(2) + Q(2);
            sigmoids(s, 2 * UNITS);
            tangents(n, UNITS);
            EACH_UNIT c[u] = s[UNITS + u] * c[u] + s[u] * n[u], n[u] = c[u], s[u] = X(3) + Q(3);
            tangents(n, UNITS);
            sigmoids(s, UNITS);
            EACH_UNIT h[u] = s[u] * n[u];
            break;
        case MGU:
            EACH_UNIT s[u] = X(0) + Q(0);
            sigmoids(s, UNITS);
            EACH_UNIT n[u] = X(1) + s[u] * Q(1);
            tangents(n, UNITS);
            EACH_UNIT h[u] = h[u] + s[u] * (n[u] - h[u]);
            break;
        default: /* Its bias is [2][2]: of z, of n. */
            EACH_UNIT n[u] = X(0) + at(q, u), s[u] = n[u] + at(bias, 2 * u), n[u] += at(bias, 2 * u + 1);
            sigmoids(s, UNITS);
            tangents(n, UNITS);
            EACH_UNIT h[u] = (r->zeta * (1.0f - s[u]) + r->nu) * n[u] + s[u] * h[u], c[u] = n[u], z[u] = s[u];
    }
#undef X
#undef Q
#undef EACH_UNIT
}

/* Copies the last units' part of each gate, which is less than a block. */
static __attribute__((noinline)) void pad(const float *x, int64_t hidden, int64_t gates, int64_t left, float *y) {
    for (int64_t gate = 0; gate < gates; gate++) memcpy(y + gate * UNITS * LANES, x + gate * hidden, sizeof(float) * left);
}

/* The work of one thread: number `member` of the `team` threads that run the sequences from `begin` to `end`. */
typedef struct {
    int64_t begin, end, member, team;
} duty;

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

static int64_t unit_blocks(int64_t hidden) { return (hidden + UNITS * LANES - 1) / (UNITS * LANES); }
static int64_t blocks_of(const recurrent *r) { return unit_blocks(r->hidden); }

/* Floats of a sequence's state, of its p, and of the codes of both. */
static int64_t state_pitch(const recurrent *r) { return blocks_of(r) * UNITS * LANES; }
static int64_t rank_pitch(const recurrent *r) { return r->panels * r->width * LANES; }
static int64_t code_floats(const recurrent *r) {
    return r->scales ? state_pitch(r) / 2 + rank_pitch(r) / 2 + 2 : 0;
}

/* Floats of scratch memory that a sequence needs: two states and c, p, the codes of h and of p and their scales, and the
   input's part of the gates at ROWS steps. */
static int64_t sequence_floats(const recurrent *r) {
    return 3 * state_pitch(r) + rank_pitch(r) + code_floats(r) + (r->features ? ROWS * r->gates * state_pitch(r) : 0);
}

#define SHARE(count, d, part) ((count) * ((d).member + (part)) / (d).team)
#define EACH_GROUP(s, rows, d) \
    for (int64_t s = (d).begin, rows; s < (d).end && (rows = (d).end - s < ROWS ? (d).end - s : ROWS, 1); s += rows)

/* What a recurrent product reads: numbers, or their codes with a scale for each sequence; `row` from one sequence to the
   next. */
typedef struct {
    const float *x;
    int16_t *codes;
    float *scales;
    int64_t row, count;
} source;

static void encode_all(const source *from, duty d) {
    for (int64_t s = d.begin; from->codes && s < d.end; s++)
        from->scales[s] = to_codes(from->x + s * from->row, from->count, from->codes + s * from->row);
}

/* y[rows][width] = x w for `rows` sequences from `s` on; `w` begins at a panel or block of `vectors` vectors, of which the
   product takes `width` from the one numbered j on. */
static inline __attribute__((always_inline)) void product(
    const source *from, int64_t s, const void *w, int64_t part, int64_t vectors, int64_t j, const float *steps, float *y,
    int64_t out, int64_t rows, int64_t width) {
    const int64_t pitch = vectors * LANES, pairs = (from->count + 1) / 2;
    if (from->codes)
        multiply_some_codes(
            (const int8_t *)w + (part * pairs * pitch + j * LANES) * 2, 2 * pitch, pairs, from->codes + s * from->row,
            from->row, from->scales + s, steps, y, out, rows, width);
    else
        multiply_some(
            (const float *)w + part * from->count * pitch + j * LANES, pitch, from->count, from->x + s * from->row,
            from->row, y, out, rows, width);
}

/* p = v^T h for a member's share of the panels. */
static void to_ranks(const recurrent *r, duty d, const source *h, float *p) {
    for (int64_t panel = SHARE(r->panels, d, 0); panel < SHARE(r->panels, d, 1); panel++)
        EACH_GROUP(s, rows, d)
            product(
                h, s, r->v, panel, r->width, 0, 0, p + s * rank_pitch(r) + panel * r->width * LANES, rank_pitch(r), rows,
                r->width);
}

/* As many of a block's units as there are. */
static inline __attribute__((always_inline)) void store_units(float *y, const vec *v, int64_t left) {
    if (left < UNITS * LANES) {
        float all[UNITS * LANES];
        UNROLLED(u, UNITS) *(vec *)(all + u * LANES) = v[u];
        memcpy(y, all, sizeof(float) * left);
    } else
        UNROLLED(u, UNITS) *(vec *)(y + u * LANES) = v[u];
}

/* The products of all vectors of a block, [rows][vectors][LANES]; `steps` are the scales of int8 weights, or NULL. */
static inline __attribute__((always_inline)) void products(
    const source *from, int64_t s, const void *w, int64_t block, const int64_t vectors, const float *steps, float *y,
    int64_t rows) {
    const int64_t most = rows == 1 ? vectors : vectors > 4 ? 3 : 2; /* so that the sums stay in registers */
    for (int64_t j = 0; j < vectors; j += most)
        product(
            from, s, w, block, vectors, j, steps ? steps + (block * vectors + j) * LANES : 0, y + j * LANES,
            vectors * LANES, rows, smaller(most, vectors - j));
}

/* The input's part of the gates of a block of units, for inputs `row` floats apart: [rows][vectors][LANES]. */
static inline __attribute__((always_inline)) void project(
    const recurrent *r, int64_t block, const int64_t vectors, const float *x, int64_t row, int64_t rows, float *y) {
    const source inputs = {x, 0, 0, row, r->features};
    products(&inputs, 0, r->w_in, block, vectors, 0, y, rows);
    for (int64_t i = 0; i < rows; i++)
        UNROLLED(j, vectors) *(vec *)(y + (i * vectors + j) * LANES) += at(r->bias_in, block * vectors + j);
}

/* `ahead` holds the input's part of the gates of ROWS steps, for groups of fewer than ROWS sequences: [sequence][block]
   [step][vectors][LANES]. A load of a weight serves that many steps. */
static inline __attribute__((always_inline)) void units(
    const recurrent *r, const int cell, const int gates, duty d, int64_t time, const source *from, const float *h,
    float *next, float *cells, float *ahead) {
    const int64_t pitch = state_pitch(r), vectors = UNITS * gates;
    const int64_t biases = cell == FASTGRNN ? 2 : gates, hidden = r->hidden;
    float q[ROWS * UNITS * 4 * LANES] __attribute__((aligned(64))), last[4 * UNITS * LANES] = {0};
    float shared[ROWS * UNITS * 4 * LANES] __attribute__((aligned(64)));
    const int64_t done = r->reverse ? r->steps - 1 - time : time, turn = done % ROWS; /* steps before this one */
    const int64_t next_step = (r->reverse ? -1 : 1) * r->batch * r->features;
    for (int64_t block = SHARE(blocks_of(r), d, 0); block < SHARE(blocks_of(r), d, 1); block++) {
        const int64_t unit = block * UNITS * LANES, left = hidden - unit;
        const int is_part = left < UNITS * LANES;
        EACH_GROUP(s, rows, d) {
            const int64_t first = time * r->batch + s;
            products(from, s, r->w, block, vectors, r->scales, q, rows);
            const float *in = shared;
            int64_t in_row = vectors * LANES;
            if (r->w_in && (rows == ROWS || r->counts)) {
                project(r, block, vectors, r->x + first * r->features, r->features, rows, shared);
            } else if (r->w_in) {
                in_row = ROWS * gates * pitch;
                float *own = ahead + s * in_row + block * ROWS * vectors * LANES;
                in = own + turn * vectors * LANES;
                for (int64_t i = 0; i < rows && turn == 0; i++)
                    project(
                        r, block, vectors, r->x + (first + i) * r->features, next_step, smaller(ROWS, r->steps - done),
                        own + i * in_row);
            }
            for (int64_t i = 0; i < rows; i++) {
                const int64_t place = (s + i) * pitch + unit;
                const float *x = r->x + (first + i) * gates * hidden + unit;
                int64_t apart = hidden, across = LANES;
                if (r->w_in) {
                    x = in + i * in_row, apart = LANES, across = gates * LANES;
                } else if (is_part) {
                    pad(x, hidden, gates, left, last);
                    x = last, apart = UNITS * LANES;
                }
                vec state[UNITS], c[UNITS], z[UNITS];
                UNROLLED(u, UNITS) state[u] = at(h + place, u), c[u] = cell == LSTM ? at(cells + place, u) : splat(0);
                advance(
                    r, cell, gates, q + i * vectors * LANES, x, apart, across, r->bias + block * UNITS * biases * LANES,
                    state, c, z);
                UNROLLED(u, UNITS) *(vec *)(next + place + u * LANES) = state[u];
                if (cell == LSTM) UNROLLED(u, UNITS) *(vec *)(cells + place + u * LANES) = c[u];
                store_units(r->y + (first + i) * hidden + unit, state, left);
                if (cell == LSTM && r->kept) store_units(r->kept + (first + i) * hidden + unit, c, left);
                if (cell == FASTGRNN && r->kept) {
                    store_units(r->kept + (first + i) * 2 * hidden + unit, z, left);
                    store_units(r->kept + (first + i) * 2 * hidden + hidden + unit, c, left);
                }
            }
        }
    }
}

static __attribute__((noinline)) void step_units(
    const recurrent *r, duty d, int64_t time, const source *from, const float *h, float *next, float *cells,
    float *ahead) {
    switch (r->cell) {
        case GRU: units(r, GRU, 3, d, time, from, h, next, cells, ahead); break;
        case LSTM: units(r, LSTM, 4, d, time, from, h, next, cells, ahead); break;
        case MGU: units(r, MGU, 2, d, time, from, h, next, cells, ahead); break;
        default: units(r, FASTGRNN, 1, d, time, from, h, next, cells, ahead);
    }
}

/* Copies a member's share of the units of a state: to the scratch with its padding, or back. */
static void copy_state(const recurrent *r, duty d, const float *from, int64_t pitch, float *to, int64_t row) {
    const int64_t begin = SHARE(blocks_of(r), d, 0) * UNITS * LANES, end = SHARE(blocks_of(r), d, 1) * UNITS * LANES;
    const int64_t count = (end < r->hidden ? end : r->hidden) - begin;
    for (int64_t s = d.begin; s < d.end && count > 0; s++)
        memcpy(to + s * row + begin, from + s * pitch + begin, sizeof(float) * count);
}

#define WAIT() if (d.team > 1) wait_for_all(b, d.team)

static void run_sequences(const recurrent *r, duty d, barrier *b) {
    const int64_t pitch = state_pitch(r), size = r->batch * pitch, finals = r->steps * r->batch * r->hidden;
    float *states[2] = {r->scratch, r->scratch + size}, *cells = r->scratch + 2 * size, *p = r->scratch + 3 * size;
    float *ahead = p + r->batch * rank_pitch(r);
    float *codes = ahead + (r->features ? ROWS * r->gates * size : 0), *codes_p = codes + size / 2;
    float *scales = codes_p + r->batch * rank_pitch(r) / 2;
    const source ranks = {p, r->scales ? (int16_t *)codes_p : 0, scales + r->batch, rank_pitch(r), r->inner};
    copy_state(r, d, r->h, r->hidden, states[0], pitch);
    if (r->cell == LSTM) copy_state(r, d, r->c, r->hidden, cells, pitch);
    WAIT();
    for (int64_t i = 0; i < r->steps; i++) {
        const int64_t time = r->reverse ? r->steps - 1 - i : i;
        const float *h = states[i % 2];
        float *next = states[(i + 1) % 2];
        duty now = d, idle = d;
        if (r->counts) now.end = idle.begin = smaller(d.end, larger(d.begin, r->counts[time]));
        const source whole = {h, r->scales ? (int16_t *)codes : 0, scales, pitch, r->hidden};
        encode_all(&whole, now);
        if (r->width) {
            to_ranks(r, now, &whole, p);
            WAIT();
            encode_all(&ranks, now);
        }
        step_units(r, now, time, r->width ? &ranks : &whole, h, next, cells, ahead);
        if (r->counts) copy_state(r, idle, h, pitch, next, pitch);
        WAIT();
    }
    copy_state(r, d, states[r->steps % 2], pitch, r->y + finals, r->hidden);
    if (r->cell == LSTM) copy_state(r, d, cells, pitch, r->y + finals + r->batch * r->hidden, r->hidden);
}

#endif
