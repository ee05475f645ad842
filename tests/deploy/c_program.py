"""Helpers of the C export's tests and benchmark: compile an exported program and run it on sequences."""

import os
import shutil
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np

STRICT = ("-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic", "-Wconversion", "-Wdouble-promotion", "-Wshadow")
SANITIZE = ("-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
COMPILER = shutil.which("gcc") or shutil.which("cc")

# Reads sequences (uint32 steps, then the frames) and writes for each the scores, float32, and the predicted class.
MAIN = """\
#include "{name}.h"
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

int main(int argc, char **argv)
{{
    const int repeats = argc > 1 ? atoi(argv[1]) : 1;
    static float frames[{longest}][{guard}_INPUTS];
    float logits[{guard}_OUTPUTS];
    double frames_run = 0.0, seconds = 0.0;
    uint32_t steps;
    while (fread(&steps, sizeof steps, 1, stdin) == 1) {{
        {name}_state state;
        int best = 0;
        if (steps > {longest} || fread(frames, sizeof frames[0], steps, stdin) != steps) {{
            return 1;
        }}
        const clock_t begin = clock();
        for (int repeat = 0; repeat < repeats; repeat++) {{
            {name}_init(&state);
            for (uint32_t t = 0; t < steps; t++) {{
                {name}_step(&state, frames[t]);
            }}
{backward}            {name}_logits(&state, logits);
            best = {name}_predict(&state);
        }}
        seconds += (double)(clock() - begin) / CLOCKS_PER_SEC;
        frames_run += (double)steps * repeats;
        fwrite(logits, sizeof logits, 1, stdout);
        fwrite(&best, sizeof best, 1, stdout);
    }}
    fprintf(stderr, "%.9g\\n", seconds / frames_run);
    return 0;
}}
"""
BACKWARD = """\
            for (uint32_t t = steps; t > 0; t--) {{
                {name}_step_back(&state, frames[t - 1]);
            }}
"""


def compiled(folder: Path, *flags: str, longest: int = 256) -> Path:
    """Compile the NAME.h and NAME.c in ``folder`` with a main function; return the program's path."""
    (header,) = folder.glob("*.h")
    name = header.stem
    named = {"name": name, "guard": name.upper()}
    backward = BACKWARD.format(**named) if f"{name}_step_back" in header.read_text() else ""
    (folder / "main.c").write_text(MAIN.format(**named, longest=longest, backward=backward))
    command = [COMPILER, *STRICT, *flags, "-o", "program", f"{name}.c", "main.c", "-lm"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "program"


def scores(
    program: Path, sequences: Sequence[np.ndarray], outputs: int, repeats: int = 1
) -> tuple[np.ndarray, np.ndarray, float]:
    """Run the program; return float32 scores [N, outputs], predicted classes [N], and seconds per frame."""
    given = b"".join(struct.pack("<I", len(frames)) + frames.astype("<f4").tobytes() for frames in sequences)
    # Libraries that a debugger or another tool preloads would be loaded before the sanitizer's.
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    done = subprocess.run([program, str(repeats)], input=given, capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr.decode()
    record = np.dtype([("logits", "<f4", (outputs,)), ("best", "<i4")])
    result = np.frombuffer(done.stdout, record)
    return result["logits"], result["best"], float(done.stderr)
