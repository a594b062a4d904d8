"""Lone surrogates in JSON text, such as `"\\ud83d"`: half of an emoji, as JavaScript sends it after a text was cut in the middle.

JSON's grammar allows them, OpenRouter accepts them, our parser does not. To pass unchanged, each is *masked* before parsing by a
noncharacter that makes it plain text, `\\ud83d` → `\\ufdd0ud83d`, and unmasked in the bytes that go upstream. The noncharacter is
one that the body does not contain. Escapes are matched from the left, so that neither a whole pair nor an escaped backslash
before `ud83d` is taken for a lone surrogate.
"""

import re

NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
ESCAPE = re.compile(
    rb"\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|(u[dD][89a-fA-F][0-9a-fA-F]{2})|\\)", re.DOTALL
)


def mask(body: bytes) -> tuple[bytes, str] | None:
    """The body with its lone surrogates masked, and the mask; None if it has none, or contains all noncharacters."""
    if not SURROGATE.search(body):
        return None
    lower = body.lower()
    mask = next((mask for mask in NONCHARACTERS if _escape(mask) not in lower and mask.encode() not in body), None)
    if mask is None:
        return None
    escape = _escape(mask)
    masked = ESCAPE.sub(lambda found: escape + found[1] if found[1] else found[0], body)
    return (masked, mask) if masked != body else None


def unmask(body: bytes, mask: str) -> bytes:
    """Unmasks escapes, and the noncharacter itself, which member names contain after they were encoded again."""
    return body.replace(_escape(mask), b"\\").replace(mask.encode(), b"\\")


def _escape(character: str) -> bytes:
    return b"\\u%04x" % ord(character)
