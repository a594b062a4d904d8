"""The next release, made from today's: a later version, an additive migration, and a function whose definition is another."""

from pathlib import Path

from gptutor import __version__

MAJOR, MINOR, *_ = __version__.split(".")
NEXT = f"{MAJOR}.{int(MINOR) + 1}.0"
MIGRATION = "9999_settled_by"
FUNCTION = "functions/book_charges"


def make_next(package: Path, sql: Path) -> None:
    """Changes a copy of the package, and of the folder `sql`, into the next release's."""
    (package / "__init__.py").write_text(f'__version__ = "{NEXT}"\n')
    (sql / "migrations" / f"{MIGRATION}.sql").write_text("ALTER TABLE holds ADD COLUMN settled_by text;\n")
    function = sql / f"{FUNCTION}.sql"
    function.write_text(function.read_text().replace("SET state = 'settled',", "SET state = 'settled', settled_by = 'next',"))
