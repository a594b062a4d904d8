"""Imports run one way, and the pure modules do no I/O (ARCHITECTURE.md, "Packages and the direction of imports")."""

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "gptutor"

# Package or module → what it may import of ours: only packages of earlier rows, or single modules of them.
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "errors": (),
    "tasks": (),
    "text": (),
    "telemetry": ("errors", "text"),
    "config": (),
    "integrations": ("telemetry", "config"),
    "simulator": (),
    "database": ("telemetry",),
    "openrouter": ("telemetry",),
    "money": ("database", "tasks", "telemetry", "text"),
    "http": ("errors", "telemetry", "text", "database", "money.amounts"),
    "api": ("errors", "tasks", "telemetry", "text", "integrations", "database", "openrouter", "money", "http"),
    "admin": ("errors", "telemetry", "text", "config", "database", "openrouter", "money", "http"),
    "routes": ("http", "api"),
    "app": ("tasks", "telemetry", "config", "integrations", "database", "openrouter", "money", "http", "api", "routes"),
    "server": ("tasks", "telemetry", "config", "simulator", "database", "openrouter", "money", "http", "admin", "app"),
    "diagnosis": ("telemetry", "config", "integrations", "database", "openrouter", "money", "server"),
    "web": (
        "errors",
        "text",
        "config",
        "api.keys",
        "api.chat.request",
        "admin.money",
        "admin.users",
        "server.listener",
        "server.runners",
    ),
    "cli": (
        "telemetry",
        "text",
        "config",
        "simulator",
        "integrations",
        "database",
        "openrouter",
        "money",
        "server",
        "diagnosis",
        "web",
    ),
    "__main__": ("cli",),
}
# The keys of `app[…]` name types of higher packages, for the type checker only.
IMPORTS_TYPES_FROM_ABOVE = "gptutor.http.app_keys"
# Package → libraries that it must not import.
FORBIDDEN_LIBRARIES = {
    "config": {"aiohttp", "asyncpg"},
    "database": {"aiohttp"},
    "integrations": {"asyncpg"},
    "money": {"aiohttp", "aiohttp_sse"},
    "openrouter": {"asyncpg"},
    "http": {"asyncpg"},
    "api": {"asyncpg"},
    "admin": {"asyncpg"},
    "diagnosis": {"asyncpg"},
}
# Pure modules → the only modules of ours that they may import.
PURE = {
    "gptutor.config.urls": (),
    "gptutor.money.amounts": (),
    "gptutor.money.journal_records": ("gptutor.money.amounts", "gptutor.money.holds", "gptutor.money.pricing"),
    "gptutor.money.keys": ("gptutor.money.amounts",),
    "gptutor.money.pricing": ("gptutor.money.amounts",),
    "gptutor.openrouter.response_parser": ("gptutor.openrouter.headers",),
    "gptutor.openrouter.headers": (),
    "gptutor.openrouter.bill": ("gptutor.openrouter.json_members",),
    "gptutor.openrouter.json_members": (),
    "gptutor.openrouter.retry": (),
    "gptutor.openrouter.account_state": ("gptutor.openrouter.bill",),
    "gptutor.openrouter.circuit": (),
    "gptutor.api.chat.request": (
        "gptutor.http.json_body",
        "gptutor.api.chat.surrogates",
        "gptutor.errors",
        "gptutor.money.pricing",
        "gptutor.text",
    ),
    "gptutor.http.error_form": ("gptutor.errors",),
    "gptutor.http.json_body": ("gptutor.errors", "gptutor.money.amounts", "gptutor.text"),
    "gptutor.integrations.vk": (),
    "gptutor.api.chat.surrogates": (),
    "gptutor.errors": (),
    "gptutor.text": (),
}
DOES_IO = {"aiohttp", "aiohttp_sse", "asyncio", "asyncpg", "logging", "os", "pathlib", "socket", "subprocess", "threading"}


def modules() -> dict[str, Path]:
    return {
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
        for path in PACKAGE.rglob("*.py")
    }


def imports(source: str, *, of_types: bool = True) -> set[str]:
    """The names that a module imports; without `of_types` those under `if TYPE_CHECKING` are left out."""
    names = set()
    nodes: list[ast.AST] = [ast.parse(source)]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING" and not of_types:
            nodes.extend(node.orelse)
            continue
        nodes.extend(ast.iter_child_nodes(node))
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the floors"
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def imports_of(module: str, path: Path) -> set[str]:
    return imports(path.read_text(encoding="utf-8"), of_types=module != IMPORTS_TYPES_FROM_ABOVE)


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def is_allowed(imported: str, package: str) -> bool:
    """Whether a module of `package` may import this name of ours; `gptutor` alone is the package's version."""
    if imported in ("gptutor", "gptutor.__version__"):
        return True
    return any(within(imported, f"gptutor.{allowed}") for allowed in (package, *MAY_IMPORT[package]))


def test_every_package_has_a_row_and_rows_allow_earlier_ones_only() -> None:
    packages = {name.split(".")[1] for name in modules() if "." in name}
    assert packages == set(MAY_IMPORT)
    rows = list(MAY_IMPORT)
    assert [
        (row, allowed)
        for number, row in enumerate(rows)
        for allowed in MAY_IMPORT[row]
        if allowed.partition(".")[0] not in rows[:number]
    ] == []


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_packages_import_downwards_only(package: str) -> None:
    inside = {name: path for name, path in modules().items() if within(name, f"gptutor.{package}")}
    assert inside
    imported = {(name, one) for name, path in inside.items() for one in imports_of(name, path)}
    # `from gptutor.x import y` also yields gptutor.x: where only gptutor.x.y is allowed, gptutor.x alone is no import of its own.
    parents = {(name, one.rpartition(".")[0]) for name, one in imported}
    assert {(name, one) for name, one in imported - parents if within(one, "gptutor") and not is_allowed(one, package)} == set()
    assert {(name, one) for name, one in imported if one.partition(".")[0] in FORBIDDEN_LIBRARIES.get(package, ())} == set()


@pytest.mark.parametrize("module", PURE)
def test_pure_modules_do_no_io(module: str) -> None:
    imported = imports_of(module, modules()[module])
    assert not {name.partition(".")[0] for name in imported} & DOES_IO
    ours = {name for name in imported if within(name, "gptutor")}
    assert all(any(within(name, allowed) for allowed in PURE[module]) for name in ours), ours


def test_the_floors_test_can_fail() -> None:
    source = "import asyncio\nfrom gptutor.api.chat import request\nif TYPE_CHECKING:\n    import socket\n"
    assert {"asyncio", "gptutor.api.chat", "gptutor.api.chat.request", "socket"} <= imports(source)
    assert "socket" not in imports(source, of_types=False)
    assert within("gptutor.api.chat.request", "gptutor.api")
    assert not within("gptutor.apiary", "gptutor.api")
    assert is_allowed("gptutor.money.amounts.roubles", "http")
    assert not is_allowed("gptutor.money.ledger", "http")
    assert not is_allowed("gptutor.money", "http")
    assert not is_allowed("gptutor.api", "http")


def test_what_tests_share_is_in_their_support() -> None:
    assert not {
        (str(path.relative_to(TESTS)), imported)
        for path in TESTS.rglob("*.py")
        if "node_modules" not in path.parts
        for imported in imports(path.read_text(encoding="utf-8"))
        if imported.startswith("tests.test_") or within(imported, "tests.conftest")
    }
