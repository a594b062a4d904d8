"""Which commit runs, if the service runs from a clone; git itself need not be installed."""

import re
from pathlib import Path

CLONE = Path(__file__).parent.parent.parent


def revision(clone: Path = CLONE) -> str:
    """The first twelve digits of the commit that was checked out last, or an empty text."""
    try:
        git = clone / ".git"
        if git.is_file():  # a work tree: the file names its folder
            git = clone / git.read_text(encoding="utf-8").removeprefix("gitdir:").strip()
        head = (git / "HEAD").read_text(encoding="utf-8").strip()
        if head.startswith("ref: "):
            head = _commit_of(git, head.removeprefix("ref: "))
    except (OSError, UnicodeDecodeError):
        return ""
    return head[:12] if re.fullmatch(r"[0-9a-f]{40,64}", head) else ""


def _commit_of(git: Path, reference: str) -> str:
    """Raises OSError."""
    shared = git / "commondir"
    common = git / shared.read_text(encoding="utf-8").strip() if shared.exists() else git
    loose = common / reference
    if loose.is_file():
        return loose.read_text(encoding="utf-8").strip()
    packed = (common / "packed-refs").read_text(encoding="utf-8")
    return next((line.split()[0] for line in packed.splitlines() if line.endswith(f" {reference}")), "")
