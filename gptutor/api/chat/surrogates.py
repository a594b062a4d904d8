"""Lone surrogates in JSON text, such as `"\\ud83d"`: half of an emoji, as JavaScript sends it after a text was cut in the middle.

JSON's grammar allows them, OpenRouter accepts them, our parser does not. To pass unchanged, each is *masked* before parsing by a
noncharacter that makes it plain text, `\\ud83d` → `\\ufdd0ud83d`, and unmasked in the bytes that go upstream. Escapes are matched
from the left, so that neither a whole pair nor an escaped backslash before `ud83d` is taken for a lone surrogate.
"""

import re

MASK = rb"\ufdd0"
MASK_CHARACTER = "\ufdd0".encode()
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
ESCAPE = re.compile(
    rb"\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|(u[dD][89a-fA-F][0-9a-fA-F]{2})|\\)", re.DOTALL
)


def mask(body: bytes) -> bytes | None:
    """The body with its lone surrogates masked; None if it has none, or contains the mask itself."""
    if MASK in body.lower() or MASK_CHARACTER in body or not SURROGATE.search(body):
        return None
    masked = ESCAPE.sub(lambda escape: MASK + escape[1] if escape[1] else escape[0], body)
    return masked if masked != body else None


def unmask(body: bytes) -> bytes:
    """Unmasks escapes, and the noncharacter itself, which member names contain after they were encoded again."""
    return body.replace(MASK, b"\\").replace(MASK_CHARACTER, b"\\")
