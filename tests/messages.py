"""How tests read messages: by the values, names and options in them, not by whole sentences."""

import re


def holding(parts: str) -> str:
    """Return a pattern that finds each of the parts as whole words, in any order. " .. " separates two parts."""
    return "(?s)" + "".join(f"(?=.*{whole(part)})" for part in parts.split(" .. "))


def whole(part: str) -> str:
    begin, end = (r"\b" if re.match(r"\w", character) else "" for character in (part[:1], part[-1:]))
    return begin + re.escape(part) + end


def holds(text: str, parts: str) -> bool:
    return re.search(holding(parts), text) is not None
