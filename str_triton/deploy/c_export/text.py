"""C text: arrays, numbers and comments."""

import re

import numpy as np

WIDTH = 120  # the maximum length of a line


def array(name: str, kind: str, values: np.ndarray) -> str:
    """Return the C definition of a constant array, in lines of at most WIDTH characters."""
    lines, line = [], "   "
    for number in values.flatten().tolist():
        text = f" {number}," if values.dtype.kind in "iu" else f" {constant(number)},"
        if len(line) + len(text) > WIDTH:
            lines.append(line)
            line = "   "
        line += text
    lines.append(line)
    return f"static const {kind} {name}[{values.size}] = {{\n" + "\n".join(lines) + "\n};\n"


def constant(value: float) -> str:
    """Return a C float constant that reads back as the same float32."""
    text = f"{value:.9g}"
    return f"{text}f" if re.search(r"[.e]", text) else f"{text}.0f"


def comment(text: str) -> str:
    """Return text that is safe inside a C comment."""
    text = re.sub(r"[^ -~]", "_", text).replace("*/", "* /").replace("/*", "/ *")
    return re.sub(r"\?(?=\?)", "? ", text)  # ??/ and others are trigraphs


def string(text: str) -> str:
    """Return a C string constant; characters beyond ASCII become UTF-8 escapes."""
    escaped = "".join(
        chr(byte) if 32 <= byte < 127 and byte not in b'"\\?' else f"\\{byte:03o}" for byte in text.encode()
    )
    return f'"{escaped}"'
