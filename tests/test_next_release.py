"""A way back: a release works with the schema of the next one, beside it and alone, and changes nothing in it.

The next release is made from today's package: a later version, an additive migration, and a function whose definition is another.
"""

import asyncio
import base64
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from decimal import Decimal
from pathlib import Path

import aiohttp
import asyncpg
import pytest

import gptutor
from gptutor import __version__
from gptutor.config.schema import SimulatorSettings
from gptutor.database import migrations
from gptutor.database.migrations import Applied, MigrationError, migrate, pending_files, pending_migrations
from gptutor.database.pool import open_database
from gptutor.money.bookings import Bookings
from gptutor.money.invariants import check
from gptutor.server.serve import simulated_openrouter
from gptutor.simulator.server import Simulator
from tests.support.gateway import SECRET, Client, make_client
from tests.support.releases import FUNCTION, MAJOR, MIGRATION, MINOR, NEXT, make_next
from tests.support.schema import database, drop, interface, read_interfaces
from tests.support.service import Service, environment, refused, start_bare

ATTEMPTS_AT_ONCE = 6
ROUND = 12
"""So many requests are answered by each service before the next step."""


def next_release(folder: Path) -> Path:
    """Makes the package of the next release in the folder."""
    package = folder / "gptutor"
    shutil.copytree(Path(gptutor.__file__).parent, package, ignore=shutil.ignore_patterns("vendor"))
    make_next(package, package / "sql")
    return folder


class Load:
    """Plain requests and streams of one client, several at once, to all services of `urls`."""

    def __init__(self, session: aiohttp.ClientSession, client: Client) -> None:
        self.urls: list[str] = []
        self.answered = Counter[str]()
        self.failed: list[str] = []
        self._session = session
        self._client = client
        self._is_stopping = False
        self._running = Counter[str]()

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            for number in range(ATTEMPTS_AT_ONCE):
                tasks.create_task(self._repeat(number))

    async def _repeat(self, number: int) -> None:
        while not self._is_stopping:
            number += 1
            url = self.urls[number % len(self.urls)]
            body = {"messages": [{"role": "user", "content": f"Hello {number}"}], "stream": number % 3 == 0}
            self._running[url] += 1
            try:
                async with self._session.post(f"{url}/v1/chat/completions", json=body, headers=self._client.headers) as response:
                    text = await response.text()
                    if response.status != 200 or (body["stream"] and "[DONE]" not in text):
                        self.failed.append(f"{url} {response.status} {text}")
            except aiohttp.ClientError as error:
                self.failed.append(f"{url} {error!r}")
            self._running[url] -= 1
            self.answered[url] += 1

    async def round(self) -> None:
        """Until each service has answered some more requests."""
        wanted = {url: self.answered[url] + ROUND for url in self.urls}
        async with asyncio.timeout(60):
            while any(self.answered[url] < count for url, count in wanted.items()):
                await asyncio.sleep(0.01)

    async def leave(self, service: Service) -> None:
        """No more requests are sent to the service, and those that are running there have ended; then it is stopped."""
        self.urls = [url for url in self.urls if url != service.url]
        async with asyncio.timeout(60):
            while self._running[service.url]:
                await asyncio.sleep(0.01)
        assert await asyncio.to_thread(service.stop) == 0

    def stop(self) -> None:
        self._is_stopping = True


def wait_until_ready(service: Service) -> None:
    for _ in range(1000):
        try:
            urllib.request.urlopen(f"{service.url}/ready", timeout=5).close()
            return
        except urllib.error.HTTPError as error:
            error.close()
        time.sleep(0.02)
    raise AssertionError("the service is not ready")


async def started(directory: Path, package: Path | None, settings: dict[str, str]) -> Service:
    program = [] if package is None else ["env", f"--chdir={package}", sys.executable, "-m", "gptutor"]
    service = await asyncio.to_thread(start_bare, directory, program, **settings)
    await asyncio.to_thread(wait_until_ready, service)
    return service


@pytest.mark.timeout(240)
async def test_two_releases_serve_side_by_side_and_the_earlier_one_goes_on_alone(
    postgres: str, simulator: Simulator, tmp_path: Path
) -> None:
    server = await asyncpg.connect(postgres)
    await server.execute("CREATE DATABASE next_release")
    url = database(postgres, "next_release")
    await migrate(url)
    package = await asyncio.to_thread(next_release, tmp_path / "package")
    async with (
        simulated_openrouter(simulator, SimulatorSettings(port=0)) as base_url,
        open_database(url) as connected,
        aiohttp.ClientSession() as session,
    ):
        settings = {
            "DATABASE_URL": url,
            "GPTUTOR_SECRET_KEY": base64.b64encode(SECRET).decode(),
            "OPENROUTER_API_KEY": "sk-or-x",
            "OPENROUTER_BASE_URL": base_url,
            "GPTUTOR_RATE_LIMIT__CHAT_PER_MINUTE": "0",
            "GPTUTOR_LOGS__STDOUT": "false",
        }
        load = Load(session, client := await make_client(connected, "1000"))
        running = [await started(tmp_path / "today", None, settings)]
        try:
            load.urls = [running[0].url]
            loading = asyncio.create_task(load.run())
            await load.round()
            migrated = await asyncio.to_thread(
                lambda: subprocess.run(
                    [sys.executable, "-m", "gptutor", "migrate"],
                    cwd=package,
                    env=environment(tmp_path, **settings),
                    capture_output=True,
                    text=True,
                    check=False,
                )
            )
            assert f"{MIGRATION}, {FUNCTION}" in migrated.stdout, migrated.stderr
            running.append(await started(tmp_path / "next", package, settings))
            load.urls = [service.url for service in running]
            await load.round()  # side by side
            running.append(await started(tmp_path / "again", None, settings))
            load.urls = [service.url for service in running]
            await load.round()  # the earlier release was started on the newer schema
            await load.leave(running.pop(0))
            await load.leave(running.pop(0))
            await load.round()  # alone
            load.stop()
            await loading
        finally:
            load.stop()
            for service in running:
                await asyncio.to_thread(service.stop)
        assert load.failed == []
        entries = [entry for entry in await Bookings(connected).entries(client.account_id, 10_000) if entry.cost_usd is not None]
        assert len(entries) == sum(load.answered.values())
        assert sum(entry.cost_usd for entry in entries if entry.cost_usd is not None) == simulator.billing.total_usd()
        assert (await client.balance(), await client.held()) == (1000 - simulator.billing.total_usd() * 90, Decimal(0))
        assert [finding.invariant.name async for finding in check(connected) if finding.rows] == []
        connection = await asyncpg.connect(url)
        rows = await connection.fetch("SELECT coalesce(settled_by, '') AS settled_by, count(*) AS count FROM holds GROUP BY 1")
        settled = {row["settled_by"]: row["count"] for row in rows}
        await connection.close()
        assert settled[""] >= ROUND
        assert settled["next"] >= 4 * ROUND, "both releases call the function of the newer one"
    await changes_nothing(url, settings, tmp_path)
    await drop(postgres, "next_release")
    await server.close()


async def changes_nothing(url: str, settings: dict[str, str], directory: Path) -> None:
    """The earlier release's `migrate` refuses, and what is done for an embedded database leaves the newer functions alone."""
    connection = await asyncpg.connect(url)
    before = await connection.fetch("SELECT * FROM schema_functions ORDER BY name")
    told = await asyncio.to_thread(refused, environment(directory, **settings), "migrate")
    assert f"{NEXT} has migrated it. {__version__} changes nothing in it, and needs no migration" in told
    assert await migrate(url, accept_newer=True) == []
    assert await pending_migrations(url) == []
    assert await connection.fetch("SELECT * FROM schema_functions ORDER BY name") == before
    assert "settled_by" in await connection.fetchval("SELECT prosrc FROM pg_proc WHERE proname = 'book_charges'")
    await connection.close()


# -- the decision

HELD = [Applied(file.name, file.checksum, __version__) for file in migrations.load_migrations()]
FUNCTIONS = [Applied(file.name, file.checksum, __version__) for file in migrations.load_functions()]


@pytest.mark.parametrize(
    # the release, and whether this one works with its schema
    ("release", "works"),
    [("0.2.1", True), ("0.3.0", True), ("0.3.17", True), ("0.4.0", False), ("0.30.0", False), ("1.0.0", False)],
)
def test_the_schema_of_the_next_minor_version_is_accepted(release: str, works: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(migrations, "__version__", "0.2.0")
    added, replaced = Applied("9999_new", "", release), Applied(FUNCTIONS[0].name, "another", release)
    for applied, functions in (([*HELD, added], FUNCTIONS), (HELD, [replaced, *FUNCTIONS[1:]])):
        if works:
            pending = pending_files(applied, functions)
            assert (pending.names, pending.newer) == ([], release)
        else:
            with pytest.raises(
                MigrationError, match=f"newer than this version: {release} has migrated it, and .* Update GPTutor"
            ):
                pending_files(applied, functions)


@pytest.mark.parametrize("release", [__version__, None])
def test_an_unknown_migration_of_this_version_is_another_branchs(release: str | None) -> None:
    with pytest.raises(MigrationError, match=r"newer than this version: it has 9999_new\. Update GPTutor"):
        pending_files([*HELD, Applied("9999_new", "", release)], FUNCTIONS)


def test_an_earlier_function_is_replaced() -> None:
    earlier = Applied(FUNCTIONS[0].name, "another", "0.0.1")
    assert pending_files(HELD, [earlier, *FUNCTIONS[1:]]).names == [earlier.name]
    assert pending_files(HELD, FUNCTIONS[1:]).names == [FUNCTIONS[0].name]


async def test_a_newer_database_that_lacks_something_is_not_mended(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    connection = await asyncpg.connect(database_url)
    known = [*migrations.load_migrations(), migrations.Migration("9998_of_a_branch", "SELECT 1")]
    monkeypatch.setattr(migrations, "load_migrations", lambda: known)
    await connection.execute("INSERT INTO schema_migrations (name, checksum, version) VALUES ('9999_new', '', $1)", NEXT)
    try:
        assert await pending_migrations(database_url) == ["9998_of_a_branch"]
        for accept_newer in (False, True):
            with pytest.raises(MigrationError, match=r"changes nothing in it, and lacks 9998_of_a_branch\. Update GPTutor"):
                await migrate(database_url, accept_newer=accept_newer)
    finally:
        await connection.execute("DELETE FROM schema_migrations WHERE name LIKE '999%'")
        await connection.close()


# -- what makes it possible


def missing(earlier: list[str], today: list[str]) -> list[str]:
    """What an earlier release names and today's schema lacks or has otherwise, and new columns that it cannot leave out."""
    gone = [line for line in earlier if line not in today and line.removesuffix(" NOT NULL") not in today]
    return gone + [
        line for line in today if line.endswith(" NOT NULL") and line not in earlier and is_of_old_table(line, earlier)
    ]


def is_of_old_table(column: str, earlier: list[str]) -> bool:
    return any(line.startswith(column.partition(".")[0] + ".") for line in earlier)


EARLIER = ["column a.x bigint NOT NULL", "column a.y text", "function f(one bigint) TABLE(two text)"]


@pytest.mark.parametrize(
    ("today", "expected"),
    [
        (EARLIER, []),
        ([*EARLIER, "column a.z text", "column b.x bigint NOT NULL", "function f_with_more(one bigint, more text) void"], []),
        (["column a.x bigint", *EARLIER[1:]], []),
        ([*EARLIER, "column a.z text NOT NULL"], ["column a.z text NOT NULL"]),
        (EARLIER[:1] + EARLIER[2:], ["column a.y text"]),
        ([EARLIER[0], "column a.y bigint", EARLIER[2]], ["column a.y text"]),
        ([*EARLIER[:2], "function f(one bigint, more text) TABLE(two text)"], [EARLIER[2]]),
        ([*EARLIER[:2], "function f(one bigint) TABLE(two text, three text)"], [EARLIER[2]]),
    ],
)
def test_what_an_earlier_release_would_miss(today: list[str], expected: list[str]) -> None:
    assert missing(EARLIER, today) == expected


async def test_nothing_is_taken_from_the_releases_that_may_still_run(database_url: str) -> None:
    """sql/interfaces.txt has the columns and functions of each release (CONTRIBUTING.md, "A migration")."""
    interfaces, today = read_interfaces(), await interface(database_url)
    assert interfaces[__version__] == today, "make schema"
    for release, earlier in interfaces.items():
        if release.split(".")[0] == MAJOR and int(release.split(".")[1]) >= int(MINOR) - 1:
            assert missing(earlier, today) == [], f"{release} needs it, and may still run"
