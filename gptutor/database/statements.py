"""The named statements of `sql/queries`: `-- name: …`, a comment, one statement."""

import re
from pathlib import Path

SQL = Path(__file__).parent.parent / "sql"
NAME_LINE = re.compile(r"^-- name: ([a-z_]+)\n", re.MULTILINE)


def load_statements(directory: Path = SQL / "queries") -> dict[str, str]:
    """Every statement of the directory, by name. Raises ValueError if a name exists twice."""
    statements: dict[str, str] = {}
    for path in sorted(directory.glob("*.sql")):
        _, *parts = NAME_LINE.split(path.read_text(encoding="utf-8"))
        for name, text in zip(parts[::2], parts[1::2], strict=True):
            if name in statements:
                raise ValueError(f"{path}: the statement {name} exists twice")
            statements[name] = text.strip().rstrip(";")
    return statements


STATEMENTS = load_statements()
