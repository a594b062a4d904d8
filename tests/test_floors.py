"""The house stands: imports run one way, and the pure modules do no I/O (ARCHITECTURE.md, "Rooms and floors")."""

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "gptutor"

# room → what it must never import
FORBIDDEN = {
    "gptutor.money": ("gptutor.api", "gptutor.http", "gptutor.openrouter", "gptutor.web", "aiohttp", "aiohttp_sse"),
    "gptutor.openrouter": ("gptutor.api", "gptutor.http", "gptutor.money", "gptutor.simulator", "gptutor.database", "asyncpg"),
    "gptutor.simulator": ("gptutor.api", "gptutor.http", "gptutor.money", "gptutor.openrouter", "gptutor.database"),
    "gptutor.http": ("gptutor.admin", "gptutor.cli", "gptutor.server"),
    "gptutor.api": ("gptutor.admin", "gptutor.cli", "gptutor.server"),
    "gptutor.integrations": ("gptutor.api", "gptutor.http", "gptutor.money", "gptutor.openrouter", "gptutor.database", "asyncpg"),
    "gptutor.database": ("gptutor.api", "gptutor.http", "gptutor.money", "gptutor.openrouter", "gptutor.server"),
    "gptutor.web": ("gptutor.money", "gptutor.openrouter", "gptutor.database"),
}
# pure modules → the only modules of ours that they may import
PURE = {
    "gptutor.config.urls": (),
    "gptutor.money.amounts": (),
    "gptutor.money.journal_records": ("gptutor.money.amounts", "gptutor.money.holds"),
    "gptutor.money.keys": ("gptutor.money.amounts",),
    "gptutor.money.pricing": ("gptutor.money.amounts",),
    "gptutor.openrouter.response_parser": (),
    "gptutor.openrouter.bill": (),
    "gptutor.openrouter.retry": (),
    "gptutor.openrouter.circuit": (),
    "gptutor.http.strict_json": ("gptutor.errors",),
    "gptutor.api.chat.request": (
        "gptutor.http.strict_json",
        "gptutor.api.chat.surrogates",
        "gptutor.errors",
        "gptutor.money.pricing",
    ),
    "gptutor.http.json_body": ("gptutor.http.strict_json", "gptutor.api.chat.request", "gptutor.errors", "gptutor.money.amounts"),
    "gptutor.integrations.vk": (),
    "gptutor.api.chat.surrogates": (),
    "gptutor.errors": (),
}
DOES_IO = {"aiohttp", "aiohttp_sse", "asyncio", "asyncpg", "logging", "os", "pathlib", "socket", "subprocess", "threading"}


def modules() -> dict[str, Path]:
    return {
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
        for path in PACKAGE.rglob("*.py")
    }


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the floors"
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def within(name: str, room: str) -> bool:
    return name == room or name.startswith(room + ".")


@pytest.mark.parametrize("room", FORBIDDEN)
def test_rooms_import_downwards_only(room: str) -> None:
    inside = {name: path for name, path in modules().items() if within(name, room)}
    assert inside
    wrong = [
        (name, imported)
        for name, path in inside.items()
        for imported in imports(path)
        if any(within(imported, forbidden) for forbidden in FORBIDDEN[room])
    ]
    assert not wrong


@pytest.mark.parametrize("module", PURE)
def test_pure_modules_do_no_io(module: str) -> None:
    imported = imports(modules()[module])
    assert not {name.partition(".")[0] for name in imported} & DOES_IO
    ours = {name for name in imported if within(name, "gptutor")}
    assert all(any(within(name, allowed) for allowed in PURE[module]) for name in ours), ours


def test_the_floors_test_can_fail(tmp_path: Path) -> None:
    module = tmp_path / "wrong.py"
    module.write_text("import asyncio\nfrom gptutor.api.chat import request\n")
    assert {"asyncio", "gptutor.api.chat", "gptutor.api.chat.request"} <= imports(module)
    assert within("gptutor.api.chat.request", "gptutor.api")
    assert not within("gptutor.apiary", "gptutor.api")


def test_what_tests_share_is_in_their_support() -> None:
    assert not {
        (str(path.relative_to(TESTS)), imported)
        for path in TESTS.rglob("*.py")
        if "node_modules" not in path.parts
        for imported in imports(path)
        if imported.startswith("tests.test_") or within(imported, "tests.conftest")
    }


def test_modules_are_short_enough_to_read() -> None:
    assert not {name: lines for name, path in modules().items() if (lines := len(path.read_text().splitlines())) > 360}
