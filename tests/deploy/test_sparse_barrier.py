"""The barrier of the kernels' threads under ThreadSanitizer: what is written before it is read after it."""

import shutil
import subprocess
from pathlib import Path

import pytest

from str_triton.native.build import SOURCE

PROGRAM = r"""
#include "waiting.h"
#include <pthread.h>
#include <stdio.h>

enum { STAGES = 2000 };
static barrier b;
static int64_t values[2][TEAM]; /* of one stage, from the values of the stage before */

static void *run(void *of) {
    const int64_t member = (int64_t)of;
    for (int64_t stage = 0; stage < STAGES; stage++) {
        int64_t sum = 1;
        for (int64_t i = 0; i < TEAM; i++) sum += values[stage % 2][i];
        values[(stage + 1) % 2][member] = sum % 1000003;
        wait_for_all(&b, TEAM);
    }
    return 0;
}

int main(void) {
    pthread_t threads[TEAM];
    for (int64_t i = 0; i < TEAM; i++) pthread_create(threads + i, 0, run, (void *)i);
    for (int64_t i = 0; i < TEAM; i++) pthread_join(threads[i], 0);
    for (int64_t i = 0; i < TEAM; i++) printf("%lld\n", (long long)values[STAGES % 2][i]);
    return 0;
}
"""
WAITS = {"usual": (), "yield": ("-DSPINS=0", "-DYIELDS=100000000"), "sleep": ("-DSPINS=0", "-DYIELDS=0")}


@pytest.mark.parametrize("team", [2, 4])
@pytest.mark.parametrize("wait", WAITS.values(), ids=WAITS.keys())
def test_each_stage_reads_what_the_one_before_wrote(tmp_path: Path, wait: tuple[str, ...], team: int) -> None:
    if shutil.which("gcc") is None:
        pytest.skip("no gcc")
    source, program = tmp_path / "barrier.c", tmp_path / "barrier"
    source.write_text(PROGRAM)
    flags = ("-O1", "-g", "-fopenmp", "-fsanitize=thread", f"-DTEAM={team}", *wait, f"-I{SOURCE.parent}")
    made = subprocess.run(["gcc", *flags, source, "-o", program, "-lpthread"], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"gcc has no ThreadSanitizer: {made.stderr[:80]}")
    # ThreadSanitizer needs addresses that the system does not draw at random.
    fixed = ["setarch", "-R"] if shutil.which("setarch") else []
    run = subprocess.run([*fixed, program], capture_output=True, text=True, timeout=240)
    value = 0
    for _ in range(2000):
        value = (1 + team * value) % 1000003
    assert (run.returncode, run.stdout) == (0, f"{value}\n" * team), run.stderr
