"""The C keyword spotter: torch's features, and the detections of rnn/listen.py."""

import dataclasses
import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from str_triton import deploy
from str_triton.deploy.c_export import SpotterSizes
from str_triton.rnn.data.audio import BANDS, RATE, WINDOW, LogMel, write_wav
from str_triton.rnn.export import keyword_spotter, main
from str_triton.rnn.finished_run import FinishedRun
from str_triton.rnn.listen import Listener, print_detections
from tests.deploy.c_program import COMPILER, SANITIZE, STRICT
from tests.messages import holds
from tests.rnn.test_listen import made_run, tone, tones_run

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C compiler")

# Reads int16 samples and writes the features of each frame.
FEATURES = """\
#include "spot_spotter.h"
#include <stdio.h>

int main(void)
{
    static spot_spotter spotter;
    spot_detection found;
    int16_t sample;
    spot_spotter_init(&spotter);
    while (fread(&sample, sizeof sample, 1, stdin) == 1) {
        const uint32_t frames = spotter.frames;
        (void)spot_spot(&spotter, &sample, 1, &found);
        if (spotter.frames != frames) {
            fwrite(spotter.features, sizeof spotter.features, 1, stdout);
        }
    }
    fprintf(stderr, "%zu", sizeof spotter);
    return 0;
}
"""


def exported(run: FinishedRun, folder: Path, weights: str = "float32") -> SpotterSizes:
    return deploy.export_c(
        run.model,
        folder / "spot",
        weights=weights,
        outputs=run.outputs,
        mean=run.mean,
        std=run.std,
        spotter=keyword_spotter(),
    )


def ran(folder: Path, main_file: str, content: bytes) -> tuple[bytes, str]:
    """Compile a main file with the spotter under the sanitizers; return what it writes and its messages."""
    sources = [main_file, "spot.c", "spot_spotter.c"]
    command = [COMPILER, *STRICT, *SANITIZE, "-o", "program", *sources, "-lm"]
    done = subprocess.run(command, cwd=folder / "spot", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    result = subprocess.run([folder / "spot" / "program"], input=content, capture_output=True, env=environment)
    assert result.returncode == 0, result.stderr
    return result.stdout, result.stderr.decode()


def sounds() -> np.ndarray:
    """Return silence, noise at four volumes, a full-scale square wave, a rising tone, and a hum in noise.

    The tone is not louder: a pure tone leaves bands almost empty, where float32 rounding in torch's own features grows
    with the tone's amplitude, to 1.4e-3 at 20,000.
    """
    generator = np.random.default_rng(0)
    noise = [generator.normal(size=RATE // 4) * volume for volume in (3, 300, 3000, 20_000)]
    time = np.arange(RATE) / RATE
    sweep = 1000 * time * np.sin(2 * np.pi * (200 + 3000 * time) * time)
    square = 32767 * np.sign(np.sin(2 * np.pi * 100 * time[:4000]))
    voice = sum(2000 / k * np.sin(2 * np.pi * 120 * k * time) for k in range(1, 30)) + generator.normal(size=RATE) * 20
    parts = [np.zeros(1000), *noise, square, sweep, voice]
    return np.concatenate(parts).round().clip(-32768, 32767).astype(np.int16)


def test_the_features_are_torchs(tmp_path: Path) -> None:
    run, sound = made_run("fastgrnn"), sounds()
    sizes = exported(run, tmp_path)
    (tmp_path / "spot" / "features.c").write_text(FEATURES)
    content, state = ran(tmp_path, "features.c", sound.astype("<i2").tobytes())
    features = np.frombuffer(content, "<f4").reshape(-1, BANDS)
    expected = LogMel()(torch.from_numpy(sound)[None])[0].numpy()
    assert len(expected) - 1 <= len(features) <= len(expected)
    np.testing.assert_allclose(features, expected[: len(features)], rtol=0, atol=1e-4)
    assert int(state) == sizes.state


@pytest.mark.parametrize("weights", ["float32", "int8"])
def test_a_wav_file_has_the_detections_of_listen(
    weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, silence = tones_run(), np.zeros(RATE, np.int16)
    words = [tone(300, 0.8), silence, tone(6000, 3.5), silence, tone(300, 0.8), tone(6000, 0.8)]
    sound = np.concatenate([silence, *words, tone(300, 0.8)])  # the last word is cut off by the end
    listener = Listener(run)
    print_detections([*listener(torch.from_numpy(sound)), *listener.end()])
    expected = capsys.readouterr().out
    assert re.findall(r"low|high", expected) == ["low", "high", "low", "high", "low"]
    exported(run, tmp_path, weights)
    write_wav(tmp_path / "x.wav", sound)
    content, _ = ran(tmp_path, "demo/main.c", (tmp_path / "x.wav").read_bytes() + b"LIST\4\0\0\0abcd")
    assert content.decode() == expected


def test_the_program_writes_a_spotter_and_its_sizes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("str_triton.rnn.export.open_run", lambda folder: made_run("gru"))
    assert main(["c", "run", str(tmp_path / "words"), "--weights", "int8"]) == 0
    assert re.search(r"RAM: [\d,]+ bytes .*; [\d,]+ multiply-adds a second", capsys.readouterr().out)
    files = {str(path.relative_to(tmp_path / "words")) for path in (tmp_path / "words").rglob("*.*")}
    assert files == {"words.h", "words.c", "words_spotter.h", "words_spotter.c", "demo/main.c"}


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (made_run("gru", bidirectional=True), "a bidirectional network needs the end of the sound"),
        (dataclasses.replace(made_run("gru"), mean=None, std=None), "no standardisation"),
        (
            dataclasses.replace(made_run("gru"), config={"data": "har:x", "task": "classify"}),
            "har:x, which is not speech",
        ),
    ],
)
def test_a_network_that_cannot_listen_has_no_spotter_and_the_program_says_why(
    run: FinishedRun, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("str_triton.rnn.export.open_run", lambda folder: run)
    assert main(["c", "run", str(tmp_path / "x")]) == 0
    assert holds(capsys.readouterr().out, f"without a keyword spotter: .. {reason}")
    assert sorted(path.name for path in (tmp_path / "x").iterdir()) == ["x.c", "x.h"]


@pytest.mark.parametrize(
    ("options", "message"), [({"window": WINDOW + 2}, "window 402"), ({"hop": 0}, "hop 0"), ({"longest": 1}, "longest")]
)
def test_wrong_sizes_are_refused(options: dict, message: str) -> None:
    given = vars(keyword_spotter())
    with pytest.raises(ValueError, match=message):
        deploy.KeywordSpotter(**given | options)
