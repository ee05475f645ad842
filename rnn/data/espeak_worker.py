"""A separate program that speaks words with eSpeak NG. It is run by its path and imports nothing of this project.

eSpeak NG is under the GPL-3. Only this process loads its library. The training process talks to it through pipes:

- The arguments are the library's file, the folder that holds espeak-ng-data ("" for the library's own), and the seed.
- The program first writes the sample rate in Hz as a line of text.
- For each word it reads a line "VOICE RATE PITCH RANGE WORD" (RATE in words a minute, PITCH and RANGE from 0 to 99).
- It answers with a line that holds the number of bytes, then these bytes: mono 16-bit samples in native byte order.
  The number -1 means that the voice does not exist.
"""

import ctypes
import ctypes.util
import importlib.util
import os
import shutil
import sys
from pathlib import Path

# Constants from eSpeak's speak_lib.h.
SYNCHRONOUS, DO_NOT_EXIT, UTF8 = 2, 0x8000, 1
RATE, PITCH, RANGE = 1, 3, 4
LIBRARY_NAMES = ("libespeak-ng.so.1", "libespeak-ng.so", "libespeak-ng.dylib", "espeak-ng.dll", "libespeak-ng.dll")


def find_library() -> tuple[str, str] | None:
    """Return eSpeak NG's library file and data folder ("" for the library's default), or None where it is missing.

    Looks for the package espeakng_loader, then for the library that the linker finds, then for the library next to the
    program `espeak-ng`. Loads nothing.
    """
    package = importlib.util.find_spec("espeakng_loader")
    if package is not None and package.origin:
        folder = Path(package.origin).parent
        for name in LIBRARY_NAMES:
            if (folder / name).is_file():
                return str(folder / name), str(folder)
    found = ctypes.util.find_library("espeak-ng")
    if found:
        return found, ""
    program = shutil.which("espeak-ng")
    if program:
        folder = Path(program).resolve().parent
        for place in (folder, folder.parent / "lib", folder.parent / "lib64"):
            for name in LIBRARY_NAMES:
                if (place / name).is_file():
                    return str(place / name), ""
    return None


def main(library: str, data: str, seed: int) -> None:
    """Speak the words on standard input until it ends."""
    espeak = ctypes.CDLL(library)
    rate = espeak.espeak_Initialize(SYNCHRONOUS, 0, data.encode() or None, DO_NOT_EXIT)
    sys.stdout.buffer.write(b"%d\n" % rate)
    sys.stdout.buffer.flush()
    # Breath and whisper are random. An eSpeak without its own generator uses that of the C library.
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
        # eSpeak silently ignores an unknown variant: two speakers would then sound the same.
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
