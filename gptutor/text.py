"""Characters that must not reach a terminal, a table or a log as they are: they control a terminal, break a line, or reorder it.

These are the control characters (C0, DEL, C1), the separators of lines and paragraphs, and invisible characters of formatting,
such as those that turn the direction of writing. Joiners (U+200C, U+200D) are none of them: scripts and emoji need them.
"""

import re

# In the form of a character class of regular expressions.
_UNSAFE_ABOVE_C0 = (
    r"\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\U000e0000-\U000e007f"
)
UNSAFE = r"\x00-\x1f" + _UNSAFE_ABOVE_C0
ONE_LINE = rf"^[^{UNSAFE}]*\Z"
"""The pattern of a text that people see: one line, without unsafe characters."""

_UNSAFE_CHARACTER = re.compile(f"[{UNSAFE}]")
# JSON has C0 escaped already, and a log line ends in one of them.
_UNSAFE_IN_JSON = re.compile(f"[{_UNSAFE_ABOVE_C0}]")


def is_one_line(text: str) -> bool:
    return _UNSAFE_CHARACTER.search(text) is None


def escaped(text: str) -> str:
    """With unsafe characters as `\\u202e`, for terminals and tables: such texts may have been stored by an earlier version."""
    return text if text.isascii() and text.isprintable() else _UNSAFE_CHARACTER.sub(_escape, text)


def escaped_json(document: bytes) -> bytes:
    """The same JSON with unsafe characters escaped. ASCII, as nearly every log line is, is returned as it is."""
    if document.isascii() and b"\x7f" not in document:
        return document
    return _UNSAFE_IN_JSON.sub(_escape, document.decode()).encode()


def _escape(found: re.Match[str]) -> str:
    units = found[0].encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[index : index + 2].hex()}" for index in range(0, len(units), 2))
