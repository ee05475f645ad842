"""Text files in the encodings that editors and shells write."""

import codecs
from pathlib import Path

# The marks at the beginning of files in other encodings than plain UTF-8. PowerShell and Notepad write them.
BYTE_ORDER_MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


def read_text(file: str | Path) -> str:
    """Read a file in UTF-8, or in UTF-16 with a byte order mark; convert line ends to "\\n".

    Raises ValueError for other encodings and for NUL characters, OSError for a file that cannot be read.
    """
    content = Path(file).read_bytes()
    encoding = next((name for mark, name in BYTE_ORDER_MARKS.items() if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text (byte {error.start})") from None
    place = text.find("\0")
    if place >= 0:
        raise ValueError(f"{file} is not UTF-8 text: character {place + 1} is a NUL")
    return text.replace("\r\n", "\n").replace("\r", "\n")
