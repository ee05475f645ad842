"""Text files as people's editors and shells write them."""

import codecs
from pathlib import Path

# What a file of another encoding than UTF-8 begins with: PowerShell and Notepad write these.
BYTE_ORDER_MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


def read_text(file: str | Path) -> str:
    """Read a file in UTF-8, or in UTF-16 with a byte order mark; line ends become newlines.

    Raises ValueError for other bytes and for NULs, which no text holds; OSError for a file that cannot be read.
    """
    content = Path(file).read_bytes()
    encoding = next((name for mark, name in BYTE_ORDER_MARKS.items() if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text (byte {error.start})") from None
    place = text.find("\0")
    if place >= 0:
        raise ValueError(f"{file} is no text, or not in UTF-8: character {place + 1} is a NUL")
    return text.replace("\r\n", "\n").replace("\r", "\n")
