"""Templates of the C keyword spotter; `str_triton.deploy.c_export.spotter` fills them in."""

from string import Template

HEADER = Template("""\
/* Words in a stream of sound: $title.
 *
 * C99 without allocation. It needs $name.c, and expf, logf and tanhf of the math library:
 *
 *     static ${name}_spotter spotter; ... $state_bytes bytes
 *     ${name}_detection found;
 *     ${name}_spotter_init(&spotter);
 *     if (${name}_spot(&spotter, samples, count, &found)) { ... ${name}_words[found.word] ... }
 *
 * The samples are 16-bit mono at ${guard}_RATE Hz. Every $hop samples complete a frame of $bands features. A window of
 * $frames frames begins every $stride frames; the probabilities of $smoothing windows are averaged. A word is detected
 * while its average is $threshold or more, and reported once: when it ends, or after $longest windows.
 */
#ifndef ${guard}_SPOTTER_H
#define ${guard}_SPOTTER_H

#include "$name.h"

#include <stddef.h>
#include <stdint.h>

#define ${guard}_RATE $rate
#define ${guard}_CHUNK $chunk /* At most one detection completes in so many samples. */

#ifdef __cplusplus
extern "C" {
#endif

/* The names of the classes. */
extern const char *const ${name}_words[${guard}_OUTPUTS];

typedef struct {
    int word; /* the number of the class */
    float probability; /* the largest averaged probability */
    double seconds; /* the middle of the word, from the first sample on */
} ${name}_detection;

typedef struct {
    int16_t samples[$window]; /* the beginning of the next window of sound */
    uint32_t count; /* samples in it */
    uint32_t frames; /* frames so far; ${name}_spotter_init starts over, which 32 bits need after 497 days */
    uint32_t quiet; /* quiet frames since the last loud one */
    float work[2][$window];
    float features[$bands]; /* the last frame's log-mel energies, not standardised */
    ${name}_state windows[$windows];
    float recent[$smoothing][${guard}_OUTPUTS]; /* probabilities of the last windows */
    uint32_t next; /* the oldest of them */
    int word; /* the class that is being detected, or -1 */
    uint32_t word_windows, word_first; /* its windows, and the frame in which the first one ended */
    float word_weight, word_offset, word_best;
} ${name}_spotter;

/* Begin a stream of sound. */
void ${name}_spotter_init(${name}_spotter *spotter);

/* Process the next samples. Return 1 and write found where they complete a detection, else 0. Give at most
 * ${guard}_CHUNK samples at once: of several detections, found is the last. */
int ${name}_spot(${name}_spotter *spotter, const int16_t *samples, size_t count, ${name}_detection *found);

/* Return 1 and write found where the end of the sound completes a detection, else 0. */
int ${name}_spotter_end(const ${name}_spotter *spotter, ${name}_detection *found);

#ifdef __cplusplus
}
#endif

#endif
""")

SOURCE = Template("""\
/* Words in a stream of sound. See ${name}_spotter.h. */
#include "${name}_spotter.h"

#include <math.h>

enum {
    OUTPUTS = ${guard}_OUTPUTS,
    WINDOW = $window, /* samples */
    POINTS = WINDOW / 2, /* of the complex transform: two samples each */
    HOP = $hop,
    MARGIN = $margin, /* zeros before the sound */
    BANDS = $bands,
    FRAMES = $frames, /* of a window of the network */
    STRIDE = $stride,
    WINDOWS = $windows, /* that overlap */
    SMOOTHING = $smoothing,
    LONGEST = $longest
};

const char *const ${name}_words[OUTPUTS] = {
$words
};

$data
static float sine(size_t k)
{
    return cosine[k < WINDOW / 4 ? k + 3 * WINDOW / 4 : k - WINDOW / 4];
}

/* Transform POINTS complex numbers, real and imaginary parts in turns: Stockham's algorithm for any radices.
 * Return the buffer that holds the result; the other one is overwritten. */
static float *transform(float *from, float *to)
{
    size_t done = 1;
    for (size_t stage = 0; stage < sizeof radices; stage++) {
        const size_t radix = radices[stage], apart = POINTS / radix;
        for (size_t j = 0; j < apart; j++) {
            const size_t k = j % done;
            for (size_t q = 0; q < radix; q++) {
                const size_t step = (k + q * done) * (WINDOW / (done * radix));
                size_t angle = 0;
                float re = 0.0f, im = 0.0f;
                for (size_t a = 0; a < radix; a++) {
                    const float *x = from + 2 * (j + a * apart);
                    const float c = cosine[angle], s = sine(angle);
                    re += x[0] * c + x[1] * s;
                    im += x[1] * c - x[0] * s;
                    angle = (angle + step) % WINDOW;
                }
                float *y = to + 2 * ((j - k) * radix + k + q * done);
                y[0] = re;
                y[1] = im;
            }
        }
        float *other = from;
        from = to;
        to = other;
        done *= radix;
    }
    return from;
}

/* Write the power of the frequencies 0 ... POINTS of the window of sound to power. */
static const float *spectrum(${name}_spotter *spotter)
{
    float *x = spotter->work[0];
    for (size_t i = 0; i < WINDOW; i++) {
        x[i] = (float)spotter->samples[i] / 32768.0f * (0.5f - 0.5f * cosine[i]);
    }
    const float *z = transform(x, spotter->work[1]);
    float *power = spotter->work[z == x ? 1 : 0];
    for (size_t k = 0; k <= POINTS; k++) {
        const float *p = z + 2 * (k % POINTS), *q = z + 2 * ((POINTS - k) % POINTS);
        const float even_re = 0.5f * (p[0] + q[0]), even_im = 0.5f * (p[1] - q[1]);
        const float odd_re = 0.5f * (p[1] + q[1]), odd_im = 0.5f * (q[0] - p[0]);
        const float c = k == POINTS ? -1.0f : cosine[k], s = k == POINTS ? 0.0f : sine(k);
        const float re = even_re + odd_re * c + odd_im * s, im = even_im + odd_im * c - odd_re * s;
        power[k] = re * re + im * im;
    }
    return power;
}

/* Compute the features of the window of sound; return whether it is loud. */
static int listen(${name}_spotter *spotter)
{
    const float *power = spectrum(spotter), *weight = mel_weights;
    float energy = 0.0f;
    for (size_t band = 0; band < BANDS; band++) {
        float sum = $floor;
        for (size_t i = 0; i < mel_count[band]; i++) {
            sum += *weight++ * power[mel_first[band] + i];
        }
        energy += sum;
        spotter->features[band] = logf(sum);
    }
    return energy > $quiet;
}

static void report(const ${name}_spotter *spotter, ${name}_detection *found)
{
    const double mean = (double)(spotter->word_offset / spotter->word_weight);
    const double middle = mean - 0.5 * (FRAMES + (SMOOTHING - 1) * STRIDE);
    found->word = spotter->word;
    found->probability = spotter->word_best;
    found->seconds = ((double)spotter->word_first + middle) * HOP / ${guard}_RATE;
}

int ${name}_spotter_end(const ${name}_spotter *spotter, ${name}_detection *found)
{
    if (spotter->word < 0 || spotter->word_windows >= LONGEST) {
        return 0;
    }
    report(spotter, found);
    return 1;
}

/* Return the class that the averaged probabilities detect, or -1; write its probability. */
static int loudest(const ${name}_spotter *spotter, float *probability)
{
    int best = 0;
    *probability = 0.0f;
    for (int i = 0; i < OUTPUTS; i++) {
        float sum = 0.0f;
        for (size_t k = 0; k < SMOOTHING; k++) {
            sum += spotter->recent[k][i];
        }
        if (sum / SMOOTHING > *probability) {
            *probability = sum / SMOOTHING;
            best = i;
        }
    }
    return *probability < $threshold || is_ignored[best] || spotter->quiet >= FRAMES ? -1 : best;
}

/* Take the scores of a window that ended; return 1 and write found where a detection is complete. */
static int decide(${name}_spotter *spotter, const ${name}_state *state, ${name}_detection *found)
{
    float *recent = spotter->recent[spotter->next], probability, largest, sum = 0.0f;
    int is_found = 0;
    ${name}_logits(state, recent);
    largest = recent[0];
    for (size_t i = 1; i < OUTPUTS; i++) {
        largest = recent[i] > largest ? recent[i] : largest;
    }
    for (size_t i = 0; i < OUTPUTS; i++) {
        recent[i] = expf(recent[i] - largest);
        sum += recent[i];
    }
    for (size_t i = 0; i < OUTPUTS; i++) {
        recent[i] /= sum;
    }
    spotter->next = (spotter->next + 1) % SMOOTHING;
    const int word = loudest(spotter, &probability);
    if (word != spotter->word) {
        is_found = ${name}_spotter_end(spotter, found);
        spotter->word = word;
        spotter->word_windows = 0;
        spotter->word_first = spotter->frames;
        spotter->word_weight = spotter->word_offset = spotter->word_best = 0.0f;
    }
    if (word >= 0 && spotter->word_windows < LONGEST) {
        spotter->word_weight += probability;
        spotter->word_offset += probability * (float)(spotter->word_windows * STRIDE);
        spotter->word_best = probability > spotter->word_best ? probability : spotter->word_best;
        spotter->word_windows++;
        if (spotter->word_windows == LONGEST) {
            report(spotter, found);
            is_found = 1;
        }
    }
    return is_found;
}

/* Process the window of sound; return 1 and write found where it completes a detection. */
static int frame(${name}_spotter *spotter, ${name}_detection *found)
{
    const int is_loud = listen(spotter);
    spotter->quiet = is_loud ? 0 : spotter->quiet < FRAMES ? spotter->quiet + 1 : FRAMES;
    if (spotter->frames % STRIDE == 0) {
        ${name}_init(&spotter->windows[spotter->frames / STRIDE % WINDOWS]);
    }
    for (size_t i = 0; i < WINDOWS; i++) {
        ${name}_step(&spotter->windows[i], spotter->features);
    }
    spotter->frames++;
    if (spotter->frames < FRAMES || (spotter->frames - FRAMES) % STRIDE != 0) {
        return 0;
    }
    return decide(spotter, &spotter->windows[(spotter->frames - FRAMES) / STRIDE % WINDOWS], found);
}

void ${name}_spotter_init(${name}_spotter *spotter)
{
    for (size_t i = 0; i < MARGIN; i++) {
        spotter->samples[i] = 0;
    }
    for (size_t i = 0; i < WINDOWS; i++) {
        ${name}_init(&spotter->windows[i]);
    }
    for (size_t k = 0; k < SMOOTHING; k++) {
        for (size_t i = 0; i < OUTPUTS; i++) {
            spotter->recent[k][i] = 0.0f;
        }
    }
    spotter->count = MARGIN;
    spotter->frames = spotter->next = spotter->word_windows = spotter->word_first = 0;
    spotter->quiet = FRAMES;
    spotter->word = -1;
    spotter->word_weight = spotter->word_offset = spotter->word_best = 0.0f;
}

int ${name}_spot(${name}_spotter *spotter, const int16_t *samples, size_t count, ${name}_detection *found)
{
    int is_found = 0;
    for (size_t i = 0; i < count; i++) {
        spotter->samples[spotter->count++] = samples[i];
        if (spotter->count == WINDOW) {
            is_found |= frame(spotter, found);
            for (size_t k = HOP; k < WINDOW; k++) {
                spotter->samples[k - HOP] = spotter->samples[k];
            }
            spotter->count = WINDOW - HOP;
        }
    }
    return is_found;
}
""")
