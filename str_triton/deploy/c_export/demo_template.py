"""Template of the C program that finds words in a WAV file; `str_triton.deploy.c_export.spotter` fills it in."""

from string import Template

DEMO = Template("""\
/* Print the words in a WAV file on standard input:
 * cc -std=c99 -O2 -o spot demo/main.c ${name}.c ${name}_spotter.c -lm && ./spot < FILE.wav */
#include "../${name}_spotter.h"

#include <limits.h>
#include <stdio.h>
#include <string.h>

static unsigned little(const unsigned char *bytes, int count)
{
    unsigned value = 0;
    while (count > 0) {
        value = value << 8 | bytes[--count];
    }
    return value;
}

/* Read up to the samples. Return their number, or 0 where they are not 16-bit mono at the network's rate. */
static unsigned read_header(void)
{
    unsigned char bytes[16];
    unsigned left = 0;
    int fits = 0;
    if (fread(bytes, 1, 12, stdin) != 12 || memcmp(bytes, "RIFF", 4) != 0) {
        return 0;
    }
    while (fread(bytes, 1, 8, stdin) == 8 && memcmp(bytes, "data", 4) != 0) {
        left = little(bytes + 4, 4);
        if (memcmp(bytes, "fmt ", 4) == 0 && left >= 16 && fread(bytes, 1, 16, stdin) == 16) {
            left -= 16;
            fits = little(bytes, 2) == 1 && little(bytes + 2, 2) == 1 && little(bytes + 4, 4) == ${guard}_RATE
                && little(bytes + 14, 2) == 16;
        }
        for (left += left % 2; left > 0 && getchar() != EOF; left--) {
        }
    }
    left = little(bytes + 4, 4) / 2;
    return fits ? left > 0 ? left : UINT_MAX : 0; /* 0: written to a pipe, up to its end */
}

static void print(const ${name}_detection *found)
{
    printf("%8.1f s  %s  %.0f%%\\n", found->seconds, ${name}_words[found->word], 100.0 * (double)found->probability);
}

int main(void)
{
    static ${name}_spotter spotter;
    static unsigned char bytes[2 * ${guard}_CHUNK];
    static int16_t samples[${guard}_CHUNK];
    ${name}_detection found;
    size_t count;
    unsigned left = read_header();
    if (left == 0) {
        fprintf(stderr, "a WAV file of 16-bit mono at %d Hz is needed\\n", ${guard}_RATE);
        return 2;
    }
    ${name}_spotter_init(&spotter);
    while (left > 0 && (count = fread(bytes, 2, left < ${guard}_CHUNK ? left : ${guard}_CHUNK, stdin)) > 0) {
        left -= (unsigned)count;
        for (size_t i = 0; i < count; i++) {
            const int value = (int)little(bytes + 2 * i, 2);
            samples[i] = (int16_t)(value < 32768 ? value : value - 65536);
        }
        if (${name}_spot(&spotter, samples, count, &found)) {
            print(&found);
        }
    }
    if (${name}_spotter_end(&spotter, &found)) {
        print(&found);
    }
    return 0;
}
""")
