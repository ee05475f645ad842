/* Sparse convolutions on images with padded rows: the operations that plan.py lists.

   An image is stored as planes of rows, each row followed by zeros (its right padding and the next row's left padding),
   with rows of zeros above and below. A convolution then is, for every output pixel q of the flat plane, a sum over the
   weights that are not zero of value * x[q + offset]: a "tap". A strip of pixels stays in registers while the taps of
   an output channel run. Pixels of the padding are computed like others and masked to zero when they are stored. A
   strided convolution reads an image that is split into its phases (for stride 2: even and odd rows and columns), one
   plane each, so that its taps are plain offsets, too. Depthwise convolutions are lists of a few taps like any other.

   A linear layer for several rows is a 1x1 convolution: each feature is a channel, and the rows are its pixels.

   Vector extensions of gcc and clang, no intrinsics; without OpenMP everything runs on the calling thread. */

#include "backward.h"
#include "copies.h"
#include "integers.h"
#include "stepping.h"
#include <math.h>
#include <string.h>

typedef struct {
    const float *x, *residual;
    float *y;
    const int32_t *mask, *first;
    int64_t begin, end; /* channels */
} strip;

/* `width` is a constant in each copy that the compiler makes of these two, so that the sums live in registers. */
#define EACH(j) for (int j = 0; j < width; j++)

/* A multiply-add can begin only when the one before on the same sum has ended, about four cycles later. Narrow strips
   have too few sums to fill that time, so they take two taps at a time, with sums of their own. */
#define PAIRED(width) ((width) <= WIDEST * 3 / 4)

static inline __attribute__((always_inline)) void convolve(const operation *op, strip s, const int width) {
    const vec low = splat(op->low), high = splat(op->high);
    for (int64_t i = s.begin; i < s.end; i++) {
        vec sum[WIDEST];
        EACH(j) sum[j] = splat(op->bias[i]);
        const tap *t = op->taps + s.first[i], *end = op->taps + s.first[i + 1];
        if (PAIRED(width)) {
            vec second[WIDEST];
            EACH(j) second[j] = splat(0);
            for (; t + 2 <= end; t += 2) {
                const float *x = s.x + t[0].offset, *x_second = s.x + t[1].offset;
                const vec value = splat(t[0].value), value_second = splat(t[1].value);
                EACH(j) sum[j] += value * at(x, j);
                EACH(j) second[j] += value_second * at(x_second, j);
            }
            EACH(j) sum[j] += second[j];
        }
        for (; t < end; t++) {
            const float *x = s.x + t->offset;
            const vec value = splat(t->value);
            EACH(j) sum[j] += value * at(x, j);
        }
        if (s.residual) {
            const float *residual = s.residual + i * op->residual.channel;
            EACH(j) sum[j] += at(residual, j);
        }
        EACH(j) sum[j] = clamp(sum[j], low, high);
        if (op->activation) {
            vec y[WIDEST]; /* A copy of the sums, because a variable whose address is taken is not kept in registers. */
            EACH(j) y[j] = sum[j];
            activate(op->activation, op->slope, y, width);
            EACH(j) sum[j] = y[j];
        }
        if (s.mask) EACH(j) sum[j] = (vec)((bits)sum[j] & (bits)at((const float *)s.mask, j));
        float *y = s.y + i * op->y.channel;
        EACH(j) *(vec *)(y + j * LANES) = sum[j];
    }
}

static inline __attribute__((always_inline)) void max_pool(const operation *op, strip s, const int width) {
    for (int64_t i = s.begin; i < s.end; i++) {
        vec most[WIDEST];
        EACH(j) most[j] = splat(-INFINITY);
        const tap *end = op->taps + s.first[i + 1];
        for (const tap *t = op->taps + s.first[i]; t < end; t++) EACH(j) {
                const vec v = at(s.x + t->offset, j);
                most[j] = choose((v > most[j]) | (v != v), v, most[j]);
            }
        if (s.mask) EACH(j) most[j] = (vec)((bits)most[j] & (bits)at((const float *)s.mask, j));
        float *y = s.y + i * op->y.channel;
        EACH(j) *(vec *)(y + j * LANES) = most[j];
    }
}

#define CASE(n) case n: if (op->kind == CONVOLUTION) convolve(op, s, n); else max_pool(op, s, n); break;

static __attribute__((noinline)) void run_strip(const operation *op, strip s, int64_t width) {
    switch (width) {
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8)
#if WIDEST == 16
        CASE(9) CASE(10) CASE(11) CASE(12) CASE(13) CASE(14) CASE(15) CASE(16)
#endif
    }
}

/* One tile of one plane, all channels of one block. */
static void strips(const operation *op, int64_t item) {
    const int64_t tile = item % op->tiles, plane = item / op->tiles % op->planes;
    const int64_t image = item / op->tiles / op->planes % op->images, block = item / op->tiles / op->planes / op->images;
    const int64_t vectors = op->length / LANES;
    const int64_t end = vectors * (tile + 1) / op->tiles;
    const int64_t width = op->width < WIDEST ? op->width : WIDEST;
    for (int64_t v = vectors * tile / op->tiles; v < end; v += width) {
        const int64_t q = v * LANES;
        const strip s = {
            .x = op->x.data + image * op->x.image + plane * op->x.plane + q,
            .y = op->y.data + image * op->y.image + plane * op->y.plane + q,
            .residual = !op->residual.data ? 0
                : op->residual.data + image * op->residual.image + plane * op->residual.plane + q,
            .mask = op->mask ? op->mask + plane * op->length + q : 0,
            .first = op->first + (op->tables > 1 ? plane * (op->channels + 1) : 0),
            .begin = op->block_first[block],
            .end = op->block_first[block + 1],
        };
        run_strip(op, s, end - v < width ? end - v : width);
    }
}

/* The mean of one channel of one image; y has no rows and columns. */
static void mean(const operation *op, int64_t item) {
    const int64_t channel = item % op->channels, image = item / op->channels;
    const float *x = op->x.data + image * op->x.image + channel * op->x.channel;
    double sum = 0;
    for (int64_t i = 0; i < op->rows; i++, x += op->x.row) {
        float row = 0;
        for (int64_t j = 0; j < op->columns; j++) row += x[j];
        sum += row;
    }
    op->y.data[image * op->y.image + channel] = (float)(sum / (double)(op->rows * op->columns));
}

/* One channel of one image times a number that lies in `residual`. */
static void gate(const operation *op, int64_t item) {
    const int64_t channel = item % op->channels, image = item / op->channels;
    const float *x = op->x.data + image * op->x.image + channel * op->x.channel;
    float *y = op->y.data + image * op->y.image + channel * op->y.channel;
    const vec value = splat(op->residual.data[image * op->residual.image + channel * op->residual.channel]);
    for (int64_t i = 0; i < op->length; i += LANES) {
        const vec product = at(x + i, 0) * value;
        *(vec *)(y + i) = op->mask ? (vec)((bits)product & (bits)at((const float *)op->mask + i, 0)) : product;
    }
}

/* One block of outputs for one row. */
static void linear(const operation *op, int64_t item) {
    const int64_t block = item % op->blocks, image = item / op->blocks;
    const float *x = op->x.data + image * op->x.image;
    float *y = op->y.data + image * op->y.image;
    for (int64_t i = op->block_first[block]; i < op->block_first[block + 1]; i++) {
        const tap *t = op->taps + op->first[i], *end = op->taps + op->first[i + 1];
        float sum[4] = {op->bias[i], 0, 0, 0};
        for (; t + 4 <= end; t += 4) {
            __asm__ volatile(""); /* Otherwise gcc gathers four x in a vector, which takes four times as long. */
            for (int j = 0; j < 4; j++) sum[j] += t[j].value * x[t[j].offset];
        }
        for (; t < end; t++) sum[0] += t->value * x[t->offset];
        float value = (sum[0] + sum[1]) + (sum[2] + sum[3]);
        if (op->low > value) value = op->low;
        if (value > op->high) value = op->high;
        y[i] = value;
    }
    for (int64_t i = op->block_first[block]; op->activation && i < op->block_first[block + 1]; i += LANES) {
        const int64_t left = op->block_first[block + 1] - i, size = sizeof(float) * (left < LANES ? left : LANES);
        vec v = splat(0);
        memcpy(&v, y + i, size);
        activate(op->activation, op->slope, &v, 1);
        memcpy(y + i, &v, size);
    }
}

static void run_item(const operation *op, int64_t item) {
    switch (op->kind) {
        case COPY: copy(op, item); break;
        case MEAN: mean(op, item); break;
        case LINEAR: linear(op, item); break;
        case TURN: turn(op, item); break;
        case GATE: gate(op, item); break;
        case CONVOLUTION_BYTES:
        case MAX_POOL_BYTES: byte_strips(op, item); break;
        case COPY_BYTES: copy_bytes(op, item); break;
        case GATE_BYTES: gate_bytes(op, item); break;
        case MEAN_BYTES: mean_bytes(op, item); break;
        case LINEAR_BYTES: linear_bytes(op, item); break;
        case QUANTIZE: quantize(op, item); break;
        case DEQUANTIZE: dequantize(op, item); break;
        default: strips(op, item);
    }
}

static void run_share(const stage *s, int64_t thread, int64_t threads) {
    for (int64_t i = 0; i < s->count; i++) {
        const operation *op = s->operations + i;
        const int64_t share = (thread + i) % threads; /* Rotated, so that no thread always gets the larger shares. */
        for (int64_t item = op->items * share / threads; item < op->items * (share + 1) / threads; item++)
            run_item(op, item);
    }
}

/* Runs the stages in turn; each waits for the one before. */
void str_triton_run(const stage *stages, int64_t count, int64_t threads) {
#ifdef _OPENMP
    if (threads > 1) {
        barrier b = {0};
#pragma omp parallel num_threads((int)threads)
        for (int64_t i = 0; i < count; i++) {
            run_share(stages + i, omp_get_thread_num(), omp_get_num_threads());
            wait_for_all(&b, omp_get_num_threads()); /* After the last stage, too: OpenMP would spin for milliseconds. */
        }
        return;
    }
#endif
    (void)threads;
    for (int64_t i = 0; i < count; i++) run_share(stages + i, 0, 1);
}

enum { MOST_TEAMS = 64 };

/* Runs a recurrent layer: its sequences are shared out among the threads, and, where `shared` says so and there are fewer
   sequences than threads, the hidden units of each. */
void str_triton_recurrent(const recurrent *r, int64_t threads, int64_t shared) {
#ifdef _OPENMP
    if (threads > 1 && (shared || r->batch > 1)) {
        barrier barriers[MOST_TEAMS] = {0};
        const int64_t most = threads < MOST_TEAMS ? threads : MOST_TEAMS;
#pragma omp parallel num_threads((int)(shared || most < r->batch ? most : r->batch))
        {
            const int64_t thread = omp_get_thread_num(), count = omp_get_num_threads();
            const int64_t teams = count < r->batch ? count : r->batch, number = thread % teams;
            const duty d = {
                r->batch * number / teams, r->batch * (number + 1) / teams, thread / teams, shared ? count / teams : 1};
            if (d.member < d.team) run_sequences(r, d, barriers + number);
        }
        return;
    }
#endif
    (void)threads, (void)shared;
    run_sequences(r, (duty){0, r->batch, 0, 1}, 0);
}

/* Walks back through the steps of a recurrent layer, with a share of the sequences for each thread. */
void str_triton_walk(const walk *k, int64_t threads) {
    const int64_t groups = (k->batch + ROWS - 1) / ROWS;
#ifdef _OPENMP
    if (threads > 1 && groups > 1) {
        barrier b = {0};
#pragma omp parallel num_threads((int)(threads < groups ? threads : groups))
        {
            const int64_t thread = omp_get_thread_num(), count = omp_get_num_threads();
            walk_groups(k, groups * thread / count, groups * (thread + 1) / count);
            wait_for_all(&b, count);
        }
        return;
    }
#endif
    (void)threads;
    walk_groups(k, 0, groups);
}

/* Floats of scratch memory that a layer's backward needs. */
int64_t str_triton_walk_scratch(const walk *k) { return k->batch * walk_row(k); }

/* Floats of scratch memory that a layer needs. */
int64_t str_triton_recurrent_scratch(const recurrent *r) { return r->batch * sequence_floats(r); }

int64_t str_triton_lanes(void) { return LANES; }
