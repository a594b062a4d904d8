"""What happens in the month. Each part says what it does, and raises Failed with a sentence when the service does not do what it must."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from gptutor import __version__
from tests.month import small_disk
from tests.month.books import Books, leftovers, settled_books
from tests.month.database import Database
from tests.month.installation import install, make_clone, update_clone
from tests.month.load import Load
from tests.month.receiver import Receiver
from tests.month.service import ALERTS_POLL_S, Service
from tests.month.waiting import WAIT_S, require, until
from tests.support.direct_client import DirectClient
from tests.support.releases import NEXT

CUSTOMERS = 5
BALANCE = "100000"
ROUND = 10
"""So many requests must be answered after each event before the next one."""
DATABASE_AWAY_S = 1.0
NOTICED_S = 2.0
"""Each process notices by itself that a trouble is over, the last one after so long (`openrouter.account_probe_s` is 0.5)."""
TOLD_AGAIN_S = 2.5 * ALERTS_POLL_S
"""By then a process that would send an alert again has done so."""
ALERTS = {
    "begin account_refused": "OpenRouter's key was revoked",
    "end account_refused": "the key is valid again",
    "begin disk_nearly_full": "the disk was filled",
    "end disk_nearly_full": "there is room on the disk again",
    "event commits_lost": "a backup was restored",
}
"""All that the operator must have been told at the end, in this order, and why."""


@dataclass(slots=True)
class Month:
    directory: Path
    root: Path
    database: Database
    simulator_url: str
    receiver: Receiver
    service: Service
    say: Callable[[str], None]
    calm_s: float
    """How long nothing happens between two events, beside requests."""
    per_second: float
    replacements: int
    has_small_disk: bool
    reuse: bool
    """Whether releases use this environment's packages, and get none of their own."""
    load: Load | None = None

    async def play(self) -> list[str]:
        """Returns what is wrong at the end, in sentences. Raises Failed."""
        clone = await asyncio.to_thread(make_clone, self.directory / "clone")
        self.say(f"installs GPTutor {__version__} from a clone into {self.root}, where it needs no root")
        await self._install(clone)
        await self.database.create()
        self.service.configure(
            database_url=self.database.url, openrouter_url=f"{self.simulator_url}/api/v1", alerts_url=self.receiver.url
        )
        if not await self.database.is_migrated():
            await asyncio.to_thread(self.service.migrate)
        self.say("starts the service, and creates users")
        await self.service.start()
        keys = [(await self._user(f"customer {number}"))[1] for number in range(CUSTOMERS)]
        self.load = Load(self.service.port, keys, self.per_second)
        customers = asyncio.create_task(self.load.run())
        try:
            return await self._events(clone, self.load)
        finally:
            customers.cancel()
            await asyncio.gather(customers, return_exceptions=True)

    async def _events(self, clone: Path, load: Load) -> list[str]:
        self.say(
            f"{self.per_second:.0f} requests a second begin: plain and streamed, on connections that are kept and on new ones"
        )
        await load.served(ROUND, "after the start")
        for number in range(self.replacements):
            self.say(f"replaces the processes under load, {number + 1} of {self.replacements}")
            await self._replace(load, __version__)
        self.say(f"updates to {NEXT}: installs it beside, migrates, and reloads")
        update_clone(clone)
        await self._install(clone)
        await asyncio.to_thread(self.service.migrate, NEXT)
        await self._replace(load, NEXT)
        self.say(f"goes back to {__version__}, which works with the newer database")
        await self._install(clone, __version__)
        await self._replace(load, __version__)
        self.say(f"goes forward to {NEXT} again")
        await self._install(clone, NEXT)
        await self._replace(load, NEXT)
        await self.service.old_processes_ended()
        self._require_no_failures(load, "while the processes were replaced")
        self.say(f"{load.answered} requests until now, and not one has failed")

        self.say("the database crashes")
        await self._crash(load)
        self.say("OpenRouter revokes the key")
        await self._lose_key(load)
        if self.has_small_disk:
            self.say("the disk is full")
            await self._fill_disk(load)
        else:
            self.say("the disk is not filled: only root may mount a small one")
        self.say("makes a backup under load")
        restored_lost = await self._restore(load)
        await asyncio.sleep(self.calm_s)
        self.say("the last requests end, and the books are compared")
        await load.pause()
        books = await settled_books(self.database.url, self.simulator_url, restored_lost)
        await self._require_told("event commits_lost")
        self.say("stops the service")
        await self.service.stop()
        return await self._audit(load, books, restored_lost)

    # -- events

    async def _install(self, clone: Path, release: str | None = None) -> None:
        await asyncio.to_thread(install, clone, self.root, release=release, reuse=self.reuse)

    async def _replace(self, load: Load, release: str) -> None:
        await self.service.replace(release)
        await load.served(ROUND, f"after a replacement by {release}")
        self._require_no_failures(load, "while the processes were replaced")
        await asyncio.sleep(self.calm_s)

    async def _crash(self, load: Load) -> None:
        async with load.troubled("database_unavailable"):
            await asyncio.to_thread(self.database.crash)
            await load.refused_with("database_unavailable", "while the database is away")
            await asyncio.sleep(DATABASE_AWAY_S)
            self.say("the database is back")
            await asyncio.to_thread(self.database.start)
            await load.served(ROUND, "after the database is back")
            await self._until_ready("after the database is back")
            await asyncio.sleep(NOTICED_S)
        await self._recovered(load, "after the database is back")

    async def _lose_key(self, load: Load) -> None:
        # The first ones are refused by OpenRouter itself; as soon as that is noticed, the service refuses them before anything is held.
        async with load.troubled("upstream_account", "upstream_account_refused"):
            await self._change_account(revoked=True)
            await self._require_told("begin account_refused")
            await load.refused_with("upstream_account_refused", "while OpenRouter refuses the key")
            await asyncio.sleep(TOLD_AGAIN_S)
            self.say("the key is valid again")
            await self._change_account()
            await load.served(ROUND, "after the key is valid again")
            await self._until_ready("after the key is valid again")
            await asyncio.sleep(NOTICED_S)
        await self._recovered(load, "after the key is valid again")
        await self._require_told("end account_refused")

    async def _fill_disk(self, load: Load) -> None:
        async with load.troubled("journal_unavailable"):
            await asyncio.to_thread(small_disk.fill, self.service.data)
            await load.refused_with("journal_unavailable", "while the disk is full")
            await self._require_told("begin disk_nearly_full")
            await asyncio.sleep(TOLD_AGAIN_S)
            self.say("there is room again")
            await asyncio.to_thread(small_disk.free, self.service.data)
            await load.served(ROUND, "after there is room again")
            await asyncio.sleep(NOTICED_S)
        await self._recovered(load, "after there is room again")
        await self._require_told("end disk_nearly_full")

    async def _restore(self, load: Load) -> set[str]:
        """The database is lost, and given the backup. Returns the generations that nobody can be charged for."""
        backup = self.directory / "backup.dump"
        await asyncio.to_thread(self.database.dump, backup)
        newcomer, key = await self._user("newcomer")
        client = DirectClient(self.service.port, key)
        status, headers, _ = await client.complete()
        client.close()
        require(status == 200, f"A new customer got {status}.")
        await load.served(ROUND, "after the backup")
        await load.pause()
        before = await settled_books(self.database.url, self.simulator_url)
        self._require_no_failures(load, "before the restore")
        await self.service.stop()
        self.say("the database is lost; its backup is restored, and what it lacks is listed")
        await self.database.lose()
        await asyncio.to_thread(self.database.restore, backup)
        missing = (await settled_books(self.database.url, self.simulator_url, before.bills)).uncharged
        listed = await asyncio.to_thread(self.service.command, "lost")
        require(
            {each["generation_id"] for each in listed["requests"]} == missing,
            f"`gptutor lost` lists {len(listed['requests'])} requests, and the backup lacks {len(missing)}.",
        )
        lost = {each["generation_id"] for each in listed["requests"] if each["action"] == "none"}
        require(lost == {headers["x-generation-id"]}, f"Only the newcomer's request is lost, and `gptutor lost` says {lost}.")
        require(
            ("create user", str(newcomer)) in {(change["what"], change["userId"]) for change in listed["changes"]},
            "`gptutor lost` does not list the user who was created after the backup.",
        )
        self.say(f"the backup lacks {len(missing)} requests, which the journals know, and a user; starts the service")
        await self.service.start()
        load.resume()
        await load.served(ROUND, "after the restore")
        await self._recovered(load, "after the restore")
        return lost

    async def _recovered(self, load: Load, when: str) -> None:
        """All is well again."""
        await asyncio.sleep(self.calm_s)
        await load.served(ROUND, when)
        self._require_no_failures(load, when)

    # -- what is asked

    async def _user(self, name: str) -> tuple[int, str]:
        """The id and the key of a new one."""
        user = await asyncio.to_thread(self.service.command, "user", "create", "--balance", BALANCE, "--name", name)
        return user["id"], user["apiKey"]

    async def _change_account(self, **account: bool) -> None:
        async with (
            aiohttp.ClientSession() as session,
            session.post(f"{self.simulator_url}/simulator/account", json=account, raise_for_status=True),
        ):
            pass

    async def _until_ready(self, when: str) -> None:
        ends_at = time.monotonic() + WAIT_S
        async with aiohttp.ClientSession() as session:
            while True:
                async with session.get(f"{self.service.url}/ready") as response:
                    if response.status == 200:
                        return
                    require(time.monotonic() < ends_at, f"{when}, /ready says {await response.text()}")
                await asyncio.sleep(0.1)

    async def _require_told(self, alert: str) -> None:
        await until(lambda: alert in self.receiver.told, f"The operator is not told that {ALERTS[alert]}")

    @staticmethod
    def _require_no_failures(load: Load, when: str) -> None:
        require(not load.failed, f"{len(load.failed)} requests failed {when}, such as: {load.failed[0] if load.failed else ''}")

    # -- the end

    async def _audit(self, load: Load, books: Books, lost: set[str]) -> list[str]:
        wrong = [f"A request failed: {failure}" for failure in load.failed]
        wrong += books.differences(lost)
        wrong += await asyncio.to_thread(self.service.broken_invariants)
        wrong += leftovers(self.service)
        expected = [alert for alert in ALERTS if self.has_small_disk or "disk" not in alert]
        if self.receiver.told != expected:
            wrong.append(f"The operator should have been told {expected}, each once, and was told {self.receiver.told}.")
        refused = ", ".join(f"{count} {code}" for code, count in sorted(load.refused.items()))
        print(f"  requests    {load.answered} answered, {len(load.failed)} failed; in trouble refused: {refused}")
        print(f"  books       {len(books.charges)} charges for {len(books.bills)} bills, together {books.billed_usd} dollars")
        print(f"  lost        {len(lost)} request, of the user who was created after the backup")
        print(f"  alerts      {', '.join(self.receiver.told)}")
        return wrong
