"""The journal: what a process knows of its open holds, on the local disk, so that its death loses nothing.

A hold is committed in PostgreSQL before anything is bought. What happens next is known to this process alone until the settlement
is committed: that the request was sent, OpenRouter's name for it, its price. Each of these is one line, written the moment it is
known:

    sent <account> <hold>                              the request goes upstream now
    named <account> <hold> <generation>                OpenRouter's headers came
    billed <account> <hold> <charge> <cost> <generation or -> <tokens or -> <tokens or ->   its price is known
    closed <hold>                                      the database has it; the journal may forget

A plain `write` survives `kill -9`: the bytes are in the kernel. It does not survive a power cut, and the database's commits do;
that is why the absence of a line proves something only within one boot of the machine (`Leftover.complete`).

How a line is spelled, and checked, is in `knowledge.py`. A torn last line is what a death leaves; a line that does not check is
skipped and counted.

Files live in numbered slots, `<directory>/<slot>/<owner>.<segment>.log`, one slot for each process, locked for its life.
Whoever can lock a slot knows that its files belong to the dead, and may replay them. A segment that has grown is replaced by
a new one that begins with what is still open, so the files stay as small as the work under way. While PostgreSQL is away the
journal is the spool.
"""

import contextlib
import errno
import fcntl
import logging
import os
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from gptutor.money.amounts import AccountId
from gptutor.money.holds import HoldId
from gptutor.money.journal_records import (
    Charge,
    HoldRecord,
    billed_line,
    closed_line,
    learn,
    named_line,
    owner_line,
    payload_of,
    sent_line,
)

LOGGER = logging.getLogger("gptutor.journal")
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
SLOTS_MAX = 256
CLOSED = -1
LOG_NAMES = "????????-????-????-????-????????????.??????.log"
LINES_BYTES = 200
"""About what one open hold takes up in a new segment."""


class JournalError(Exception):
    """The journal cannot be written: nothing may be bought. The text is a sentence for the operator."""


@dataclass(slots=True)
class Leftover:
    """What a dead process knew. `complete`: a hold of its own that is not in `known` was never sent."""

    owner: uuid.UUID
    known: dict[HoldId, HoldRecord]
    complete: bool
    files: list[Path] = field(default_factory=list)

    def discard(self) -> None:
        """The database has it all."""
        for path in self.files:
            path.unlink(missing_ok=True)


class Journal:
    """One process's own file. `owner` is this process's life: its holds carry it."""

    def __init__(self, slot: Path, segment_bytes_max: int, bytes_max: int) -> None:
        self.owner = uuid.uuid4()
        self.known: dict[HoldId, HoldRecord] = {}
        self.proves_something = False
        """Holds may be open that it does not know: so their requests were never sent, and the next process may free them."""
        self._slot = slot
        self._segment_bytes_max = segment_bytes_max
        self._bytes_max = bytes_max
        self._segment = 0
        self._file = CLOSED
        self._size = 0
        self._begin_segment()

    @property
    def slot_number(self) -> int:
        """A small number that no other living process of this machine has."""
        return int(self._slot.name)

    # -- what is written down

    def sent(self, account_id: AccountId, hold_id: HoldId) -> None:
        """Raises JournalError: then the request must not be sent."""
        if self._size > self._bytes_max:
            raise JournalError(
                f"The journal in {self._slot} has reached {self._bytes_max} bytes; PostgreSQL must catch up first."
            )
        self._append(sent_line(hold_id, account_id))
        self.known[hold_id] = HoldRecord(account_id)

    def named(self, hold_id: HoldId, generation_id: str) -> None:
        knowledge = self.known[hold_id]
        knowledge.generation_id = generation_id
        self._record(named_line(hold_id, knowledge.account_id, generation_id))

    def billed(self, hold_id: HoldId, price: Charge, generation_id: str | None) -> None:
        knowledge = self.known[hold_id]
        knowledge.price = price
        knowledge.generation_id = knowledge.generation_id or generation_id
        self._record(billed_line(hold_id, knowledge, price))

    def closed(self, hold_ids: Iterable[HoldId]) -> None:
        gone = [hold_id for hold_id in hold_ids if self.known.pop(hold_id, None) is not None]
        if gone:
            self._record(b"".join(closed_line(hold_id) for hold_id in gone))
        if self._size > self._segment_bytes_max and self._size > 2 * LINES_BYTES * len(self.known):
            try:
                self._begin_segment()
            except JournalError as error:
                LOGGER.error("%s", error)  # the old file goes on

    def close(self) -> None:
        """At an orderly end; a journal that knows nothing any more leaves no file, unless it `proves_something`."""
        os.close(self._file)
        self._file = CLOSED
        if not self.known and not self.proves_something:
            self._path.unlink(missing_ok=True)

    @property
    def _path(self) -> Path:
        return self._slot / f"{self.owner}.{self._segment:06d}.log"

    def _record(self, lines: bytes) -> None:
        """Writes what is already true: if the disk refuses, memory and the database are all there is."""
        try:
            self._append(lines)
        except JournalError as error:
            LOGGER.error("%s", error)

    def _append(self, lines: bytes) -> None:
        if self._file == CLOSED:
            raise JournalError(f"The journal {self._path} is closed.")
        try:
            _write(self._file, lines)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self._size)  # half a line would spoil the next one as well
            raise JournalError(f"The journal {self._path} cannot be written: {error.strerror}.") from error
        self._size += len(lines)

    def _begin_segment(self) -> None:
        """A new file that begins with all that is open; then the old one may go. Raises JournalError, and keeps the old one."""
        lines = [owner_line(self.owner, boot_id())]
        for hold_id, knowledge in self.known.items():
            lines.append(sent_line(hold_id, knowledge.account_id))
            if knowledge.price is not None:
                lines.append(billed_line(hold_id, knowledge, knowledge.price))
            elif knowledge.generation_id is not None:
                lines.append(named_line(hold_id, knowledge.account_id, knowledge.generation_id))
        content = b"".join(lines)
        old_file, old_path = self._file, self._path
        path = self._slot / f"{self.owner}.{self._segment + 1:06d}.log"
        fresh = path.with_suffix(".new")
        try:
            file = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_TRUNC, 0o600)
            try:
                _write(file, content)
                fresh.rename(path)
            except OSError:
                os.close(file)
                fresh.unlink(missing_ok=True)
                raise
        except OSError as error:
            raise JournalError(f"The journal {path} cannot be written: {error.strerror}.") from error
        self._file, self._size, self._segment = file, len(content), self._segment + 1
        if old_file != CLOSED:
            os.close(old_file)
            old_path.unlink(missing_ok=True)


@contextmanager
def opened(
    directory: Path, *, segment_bytes_max: int = 4 << 20, bytes_max: int = 1 << 30
) -> Iterator[tuple[Journal, list[Leftover]]]:
    """A journal in the first free slot, and what dead processes left there. Raises JournalError if there can be none."""
    for number in range(SLOTS_MAX):
        slot = directory / str(number)
        if (lock := _lock(slot)) is not None:
            break
    else:
        raise JournalError(f"All {SLOTS_MAX} journals in {directory} are in use.")
    try:
        leftovers = read_slot(slot)
        journal = Journal(slot, segment_bytes_max, bytes_max)
        try:
            yield journal, leftovers
        finally:
            journal.close()
    finally:
        os.close(lock)


@contextmanager
def adopted(directory: Path) -> Iterator[list[Leftover]]:
    """What dead processes left in slots that nobody has taken since; locked while this context lasts."""
    locks: list[int] = []
    leftovers: list[Leftover] = []
    try:
        for slot in sorted(directory.iterdir()):
            if any(slot.glob(LOG_NAMES)) and (lock := _lock(slot)) is not None:
                locks.append(lock)
                leftovers += read_slot(slot)
        yield leftovers
    finally:
        for lock in locks:
            os.close(lock)


def read_slot(slot: Path) -> list[Leftover]:
    """The files of a locked slot, one Leftover for each process that wrote them."""
    leftovers: dict[str, Leftover] = {}
    for path in sorted(slot.glob(LOG_NAMES)):
        name = path.name.partition(".")[0]
        leftover = leftovers.setdefault(name, Leftover(uuid.UUID(name), {}, complete=False))
        leftover.files.append(path)
        _read(path, leftover)
    return list(leftovers.values())


def boot_id() -> bytes:
    """The machine's current boot; where the kernel does not say, each answer is another, and absence proves nothing."""
    try:
        return BOOT_ID.read_bytes().strip()
    except OSError:
        return uuid.uuid4().hex.encode()


def _read(path: Path, leftover: Leftover) -> None:
    *lines, rest = path.read_bytes().split(b"\n")
    bad = sum(not _take(line, leftover) for line in lines)
    _take(rest, leftover)  # a last line without its end is what a death leaves; if it checks, it is whole all the same
    if bad:
        leftover.complete = False  # one of the lost lines may have said that a request was sent
        LOGGER.error("The journal %s has %d lines that do not check; they are skipped", path, bad)


def _take(line: bytes, leftover: Leftover) -> bool:
    """Whether the line checks; if it does, what it says is known."""
    fields = payload_of(line)
    try:
        if fields is None:
            return False
        if fields[0] == b"owner":
            leftover.complete = fields[2] == boot_id()
        else:
            learn(leftover.known, fields)
    except (ValueError, KeyError, IndexError):
        return False
    return True


def _lock(slot: Path) -> int | None:
    """The slot's lock, held until closed (or until this process dies); None if another process has it. Raises JournalError."""
    try:
        slot.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = os.open(slot / "lock", os.O_WRONLY | os.O_CREAT, 0o600)
    except OSError as error:
        raise JournalError(f"The journal needs the directory {slot}, and it cannot be used: {error.strerror}.") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        return None
    return lock


def _write(file: int, lines: bytes) -> None:
    if os.write(file, lines) != len(lines):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
