"""A program of its own that speaks words with eSpeak NG: run by its path, it imports nothing of this project.

eSpeak NG is under the GPL-3. Only this process loads its library; the process that trains talks to it through pipes:

- arguments: the library's file, the folder that holds espeak-ng-data ("" for the library's own), the random seed;
- it writes the sample rate in Hz as a line of text;
- it reads a line "VOICE RATE PITCH RANGE WORD" for each word (RATE in words a minute, PITCH and RANGE from 0 to 99) and
  answers with a line that holds the number of bytes, then those bytes: mono 16-bit samples of the machine's byte order;
  -1 instead of the number: no such voice.
"""

import ctypes
import ctypes.util
import importlib.util
import os
import shutil
import sys
from pathlib import Path

# Constants of eSpeak's speak_lib.h.
SYNCHRONOUS, DO_NOT_EXIT, UTF8 = 2, 0x8000, 1
RATE, PITCH, RANGE = 1, 3, 4
LIBRARY_NAMES = ("libespeak-ng.so.1", "libespeak-ng.so", "libespeak-ng.dylib", "espeak-ng.dll", "libespeak-ng.dll")


def find_library() -> tuple[str, str] | None:
    """The library's file and the folder with its data ("": it knows its own), or None where there is no eSpeak NG.

    Takes the package espeakng_loader, or else what the system has: the library that the linker finds, or the one beside
    the program `espeak-ng`. Looks only; loads nothing.
    """
    package = importlib.util.find_spec("espeakng_loader")
    if package is not None and package.origin:
        folder = Path(package.origin).parent
        for name in LIBRARY_NAMES:
            if (folder / name).is_file():
                return str(folder / name), str(folder)
    name = ctypes.util.find_library("espeak-ng")
    if name:
        return name, ""
    program = shutil.which("espeak-ng")
    if program:
        folder = Path(program).resolve().parent
        for place in (folder, folder.parent / "lib", folder.parent / "lib64"):
            for name in LIBRARY_NAMES:
                if (place / name).is_file():
                    return str(place / name), ""
    return None


def main(library: str, data: str, seed: int) -> None:
    """Answer the lines of standard input until it ends."""
    espeak = ctypes.CDLL(library)
    rate = espeak.espeak_Initialize(SYNCHRONOUS, 0, data.encode() or None, DO_NOT_EXIT)
    sys.stdout.buffer.write(b"%d\n" % rate)
    sys.stdout.buffer.flush()
    # Breath and whisper are random. An eSpeak without a generator of its own draws from the C library.
    set_seed = getattr(espeak, "espeak_ng_SetRandSeed", None) or ctypes.CDLL(None).srand
    set_seed(ctypes.c_long(seed))
    spoken = bytearray()

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
    def hear(samples: "ctypes._Pointer[ctypes.c_short]", count: int, events: int) -> int:
        if samples and count > 0:
            spoken.extend(ctypes.string_at(samples, 2 * count))
        return 0

    espeak.espeak_SetSynthCallback(hear)
    place = ctypes.c_char_p()
    espeak.espeak_Info(ctypes.byref(place))
    variants = Path(os.fsdecode(place.value or b"")) / "voices" / "!v"
    for line in sys.stdin:
        voice, speed, pitch, spread, word = line.split()
        spoken.clear()
        variant = voice.partition("+")[2]
        # eSpeak itself passes over a variant that it does not know: two speakers would then be one.
        if not (variants / variant).exists() or espeak.espeak_SetVoiceByName(voice.encode()) != 0:
            sys.stdout.buffer.write(b"-1\n")
        else:
            for parameter, value in ((RATE, speed), (PITCH, pitch), (RANGE, spread)):
                espeak.espeak_SetParameter(parameter, int(value), 0)
            text = word.encode() + b"\0"
            espeak.espeak_Synth(text, ctypes.c_size_t(len(text)), 0, 1, 0, UTF8, None, None)
            espeak.espeak_Synchronize()
            sys.stdout.buffer.write(b"%d\n" % len(spoken) + bytes(spoken))
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
