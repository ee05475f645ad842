"""Hand-made folders in the layout of Speech Commands: lists, links, files of other kinds."""

import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from str_triton.rnn.data.audio import RATE, write_wav
from tests.messages import holds
from tests.rnn.speech_folder import make, read, refuse, sound


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return make(tmp_path / "small", ("bed", "cat", "dog"))


def test_folders_that_are_not_such_a_set(tmp_path: Path, small: Path):
    refuse(tmp_path / "none", re.escape(f"speech-commands:{tmp_path / 'none'}: no such folder"))
    (tmp_path / "empty").mkdir()
    refuse(tmp_path / "empty", "empty has no folder with WAV files for a word")
    for name, part in (("validation_list.txt", "validation"), ("testing_list.txt", "test")):
        text = (small / name).read_text()
        (small / name).unlink()
        refuse(small, f"small has no {name}.*{part}$")
        (small / name).write_text(text + "\nbed/none.wav\n")
        refuse(small, f"{name} names bed/none.wav")
        (small / name).write_bytes(b"\xff")
        refuse(small, f"{name} is not UTF-8 text")
        for line in ("/bed/t006.wav", r"C:\\bed\\t006.wav", "../small/bed/t006.wav", "bed/../bed/t006.wav"):
            (small / name).write_text(line)
            refuse(small, rf"{name} names {re.escape(line)}: .*word/file\.wav")
        (small / name).write_text("bed/a.wav\nbed/t006.wav\nbed/b.wav\n")
        refuse(small, rf"{name} names bed/a\.wav.* \(2 of its 3 ")
        (small / name).write_text("")
        refuse(small, f"the class 'bed' has no clip for {part}")
        (small / name).write_text(text)
    (small / "validation_list.txt").write_text("bed/t006.wav\n")
    refuse(small, r"bed/t006.wav is in both validation_list.txt and testing_list.txt of .*small")
    (small / "validation_list.txt").unlink()
    refuse(small, r"has no validation_list\.txt: .*word/file\.wav")


@pytest.mark.parametrize(
    "written",
    [
        lambda text: b"\xef\xbb\xbf" + text.encode(),
        lambda text: text.encode("utf-16"),  # the encoding of PowerShell
        lambda text: text.replace("/", "\\").encode(),
        lambda text: text.replace("\n", "\r\n").encode(),
        lambda text: ("\n\n./" + text.replace("\n", "  \n\n./").removesuffix("./") + "\n").encode(),
        lambda text: text.replace("/", "//").encode(),
        lambda text: (text + "\n" + text).encode(),
    ],
)
def test_lists_are_read_as_other_systems_write_them(small: Path, written: object):
    for name in ("validation_list.txt", "testing_list.txt"):
        (small / name).write_bytes(written((small / name).read_text()))
    assert [len(part) for part in (read(small).train, read(small).validation, read(small).test)] == [12, 6, 6]


def test_accents_of_a_mac(small: Path):
    (small / "cat").rename(small / "chate\u0301")  # e and a combining accent
    for name in ("validation_list.txt", "testing_list.txt"):
        text = (small / name).read_text().replace("cat/", "chat\u00e9/")
        (small / name).write_text(text, encoding="utf-8")
    assert len(read(small).test) == 6


def test_what_is_left_out_is_counted(small: Path, capfd: pytest.CaptureFixture):
    (small / "stop").mkdir()
    for number in range(3):
        (small / "stop" / f"{number}.FLAC").write_bytes(b"fLaC")
    (small / "bed" / "more").mkdir()
    (small / "bed" / "._t006.wav").write_bytes(b"AppleDouble")
    for folder in ("LICENSES", "nothing", "__MACOSX", ".cache", "_unknown_"):
        (small / folder).mkdir()
    (small / "LICENSES" / "MIT.txt").write_text("free")
    write_wav(small / "__MACOSX" / "a.wav", sound(1))
    (small / "loop").symlink_to(small)
    (small / "_background_noise_" / "rain.wav").rename(small / "_background_noise_" / "rain.WAV")
    (small / "_background_noise_" / "hum.mp3").write_bytes(b"ID3")
    data = read(small, ("bed", "cat"))
    assert data.class_names == ("bed", "cat", "silence", "unknown")
    assert len(data.train.background) == 16 * RATE
    facts = (
        "recordings .. 3 .. stop/0.FLAC",
        "folders .. 3 .. LICENSES",
        "folders .. 1 .. bed/more",
        "noise .. hum.mp3",
    )
    for line, parts in zip(capfd.readouterr().err.splitlines(), facts, strict=True):
        assert holds(line, f"warning: speech-commands:{small} .. skipped .. {parts}")


def test_links_that_lead_astray(small: Path):
    (small / "bed2").symlink_to(small / "bed")
    refuse(small, "'bed' and 'bed2' are one folder")
    (small / "bed2").unlink()
    (small / "bed" / "x.wav").symlink_to(small / "nowhere")
    refuse(small, r"bed/x\.wav is not a file")
    (small / "bed" / "x.wav").unlink()
    os.mkfifo(small / "bed" / "x.wav")
    refuse(small, r"bed/x\.wav is not a file")
    (small / "bed" / "x.wav").unlink()
    (small / "circle").symlink_to(small / "circle")
    with pytest.raises(OSError, match="circle"):
        read(small)


def test_a_set_of_another_kind_of_file_says_so(tmp_path: Path):
    (tmp_path / "set" / "yes").mkdir(parents=True)
    (tmp_path / "set" / "yes" / "0.flac").write_bytes(b"fLaC")
    refuse(tmp_path / "set", r"no folder with WAV files .*yes/0\.flac")


@pytest.mark.parametrize("words", [("rat",), ("bed", "cat", "dog"), ("bed", "silence")])
def test_words_are_checked_before_the_clips_are_read(
    small: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
):
    monkeypatch.setattr(
        "str_triton.rnn.data.speech_commands.cached_clips", lambda *args, **options: pytest.fail("they were read")
    )
    refuse(small, "word", words)


def test_a_full_disk_is_named_before_the_clips_are_read(small: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        "str_triton.rnn.data.clip_store.shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})
    )
    monkeypatch.setattr("str_triton.rnn.data.clip_store.to_one_second", lambda *args: pytest.fail("a clip was read"))
    refuse(small, r"cache/clips cannot be written \(.*0\.0 GB")


def test_two_runs_read_the_same_set_at_once(small: Path):
    with ThreadPoolExecutor(4) as pool:
        sets = list(pool.map(read, [small] * 4))
    assert len({data.notes["sha256"] for data in sets}) == 1
    assert all(torch.equal(data.test.clips(torch.arange(6)), sets[0].test.clips(torch.arange(6))) for data in sets)


def test_what_a_kill_left_in_the_cache_is_removed_after_a_day(small: Path):
    clips = small.parent / "cache" / "clips"
    clips.mkdir(parents=True)
    for name, age in (("old", 90_000), ("new", 60)):
        (clips / f".unfinished-{name}").write_bytes(b"half")
        os.utime(clips / f".unfinished-{name}", (time.time() - age,) * 2)
    read(small)
    assert [path.name for path in clips.glob(".unfinished-*")] == [".unfinished-new"]
