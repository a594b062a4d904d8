"""The journal: what a process knows of its open holds, on the local disk, so that the death of the process loses nothing.

A hold is committed in PostgreSQL before anything is bought. What happens next is known to this process alone until the settlement
is committed: that the request was sent, its generation id, its cost. Each fact is one line, written as soon as the fact is known:

    owner <process> <boot>                             first line of a file: the process id, and the boot of the machine
    sent <account> <hold>                              the request is about to be sent upstream
    named <account> <hold> <generation id>             OpenRouter's headers have arrived
    billed <account> <hold> <charge> <cost> <generation id or -> <tokens or -> <tokens or ->   the bill was read
    closed <hold>                                      the database has all of it: the journal drops the hold

A plain `write` survives `kill -9`: the bytes are in the kernel. It does not survive a power cut; the database's commits do.
So the absence of a line proves something only within one boot of the machine (`AbandonedJournal.is_complete`).

The format of a line and its checksum are in `journal_records.py`. A crash may leave a torn last line. A line with a wrong
checksum is skipped and counted.

Files are in numbered slots, `<directory>/<slot>/<owner>.<segment>.log`, one slot for each process, locked while it lives. A
process that can lock a slot knows that the files there belong to dead processes, and may replay them. A segment that has grown
too large is replaced by a new one that begins with the open holds, so the files stay as small as the work in progress. While
PostgreSQL is unavailable, the journal is the spool.
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
    HoldRecord,
    apply_line,
    billed_line,
    closed_line,
    named_line,
    owner_line,
    parse_line,
    sent_line,
)
from gptutor.money.pricing import Charge

LOGGER = logging.getLogger("gptutor.journal")
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
SLOTS_MAX = 256
CLOSED = -1
FILE_PATTERN = "????????-????-????-????-????????????.??????.log"
OPEN_HOLD_BYTES = 200
"""About the size of one open hold in a new segment."""


class JournalError(Exception):
    """The journal cannot be written, so nothing may be bought. The text is a sentence for the operator."""


@dataclass(slots=True)
class AbandonedJournal:
    """What the journal of a dead process says.

    `open_holds` are the holds whose requests were sent. If `is_complete`, no request was sent under the process's other holds.
    """

    owner: uuid.UUID
    open_holds: dict[HoldId, HoldRecord]
    is_complete: bool
    files: list[Path] = field(default_factory=list)

    def delete(self) -> None:
        """To be called when the database has all of it."""
        for path in self.files:
            path.unlink(missing_ok=True)


class Journal:
    """The journal of this process. `owner` is the id of this process, new at each start: its holds carry it in the database."""

    def __init__(self, slot: Path, segment_bytes_max: int, bytes_max: int) -> None:
        self.owner = uuid.uuid4()
        self.open_holds: dict[HoldId, HoldRecord] = {}
        """The holds whose requests were sent, and which the database has not closed yet."""
        self.keep_when_empty = False
        """Whether `close` keeps the file of an empty journal: it proves that the requests of holds that are still open were never
        sent, so that the next process may release them."""
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

    def record_sent(self, account_id: AccountId, hold_id: HoldId) -> None:
        """To be called before the request is sent. Raises JournalError: then the request must not be sent."""
        if self._size > self._bytes_max:
            raise JournalError(
                f"The journal in {self._slot} has reached {self._bytes_max} bytes; PostgreSQL must catch up first."
            )
        self._append(sent_line(hold_id, account_id))
        self.open_holds[hold_id] = HoldRecord(account_id)

    def record_generation_id(self, hold_id: HoldId, generation_id: str) -> None:
        record = self.open_holds[hold_id]
        record.generation_id = generation_id
        self._append_or_log(named_line(hold_id, record.account_id, generation_id))

    def record_charge(self, hold_id: HoldId, charge: Charge, generation_id: str | None) -> None:
        """The generation id that was recorded first stays."""
        record = self.open_holds[hold_id]
        record.charge = charge
        record.generation_id = record.generation_id or generation_id
        self._append_or_log(billed_line(hold_id, record, charge))

    def record_closed(self, hold_ids: Iterable[HoldId]) -> None:
        """Holds that are not in the journal are ignored."""
        closed = [hold_id for hold_id in hold_ids if self.open_holds.pop(hold_id, None) is not None]
        if closed:
            self._append_or_log(b"".join(closed_line(hold_id) for hold_id in closed))
        if self._size > self._segment_bytes_max and self._size > 2 * OPEN_HOLD_BYTES * len(self.open_holds):
            try:
                self._begin_segment()
            except JournalError as error:
                LOGGER.error("%s", error)  # the old segment stays in use

    def close(self) -> None:
        """At an orderly end. The file of an empty journal is deleted, unless `keep_when_empty`."""
        os.close(self._file)
        self._file = CLOSED
        if not self.open_holds and not self.keep_when_empty:
            self._path.unlink(missing_ok=True)

    @property
    def _path(self) -> Path:
        return self._slot / f"{self.owner}.{self._segment:06d}.log"

    def _append_or_log(self, lines: bytes) -> None:
        """Writes facts that hold whether or not the disk takes them: a failure is logged, and the records stay in memory."""
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
                os.ftruncate(self._file, self._size)  # half a line would damage the next line as well
            raise JournalError(f"The journal {self._path} cannot be written: {error.strerror}.") from error
        self._size += len(lines)

    def _begin_segment(self) -> None:
        """Writes all open holds to a new file, then removes the old one. Raises JournalError, and keeps the old file."""
        lines = [owner_line(self.owner, boot_id())]
        for hold_id, record in self.open_holds.items():
            lines.append(sent_line(hold_id, record.account_id))
            if record.charge is not None:
                lines.append(billed_line(hold_id, record, record.charge))
            elif record.generation_id is not None:
                lines.append(named_line(hold_id, record.account_id, record.generation_id))
        content = b"".join(lines)
        old_file, old_path = self._file, self._path
        path = self._slot / f"{self.owner}.{self._segment + 1:06d}.log"
        temporary = path.with_suffix(".new")
        try:
            file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_TRUNC, 0o600)
            try:
                _write(file, content)
                temporary.rename(path)
            except OSError:
                os.close(file)
                temporary.unlink(missing_ok=True)
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
) -> Iterator[tuple[Journal, list[AbandonedJournal]]]:
    """A new journal in the first free slot, and the abandoned journals in that slot. Raises JournalError."""
    for number in range(SLOTS_MAX):
        slot = directory / str(number)
        if (lock := _lock(slot)) is not None:
            break
    else:
        raise JournalError(f"All {SLOTS_MAX} journals in {directory} are in use.")
    try:
        abandoned_journals = read_journals(slot)
        journal = Journal(slot, segment_bytes_max, bytes_max)
        try:
            yield journal, abandoned_journals
        finally:
            journal.close()
    finally:
        os.close(lock)


@contextmanager
def abandoned(directory: Path) -> Iterator[list[AbandonedJournal]]:
    """The journals of dead processes in slots that no living process uses. The slots are locked while this context lasts."""
    locks: list[int] = []
    journals: list[AbandonedJournal] = []
    try:
        for slot in sorted(directory.iterdir()):
            if any(slot.glob(FILE_PATTERN)) and (lock := _lock(slot)) is not None:
                locks.append(lock)
                journals += read_journals(slot)
        yield journals
    finally:
        for lock in locks:
            os.close(lock)


def read_journals(slot: Path) -> list[AbandonedJournal]:
    """The journals in a slot, one for each process that wrote there. The slot should be locked."""
    journals: dict[str, AbandonedJournal] = {}
    for path in sorted(slot.glob(FILE_PATTERN)):
        owner = path.name.partition(".")[0]
        journal = journals.setdefault(owner, AbandonedJournal(uuid.UUID(owner), {}, is_complete=False))
        journal.files.append(path)
        _read_file(path, journal)
    return list(journals.values())


def boot_id() -> bytes:
    """The id of the machine's current boot. Where the kernel has none, a new id each time, so that no journal is complete."""
    try:
        return BOOT_ID.read_bytes().strip()
    except OSError:
        return uuid.uuid4().hex.encode()


def _read_file(path: Path, journal: AbandonedJournal) -> None:
    *lines, last = path.read_bytes().split(b"\n")
    invalid = sum(not _read_line(line, journal) for line in lines)
    _read_line(last, journal)  # a crash may tear the last line: that is no damage; with a right checksum the line is whole
    if invalid:
        journal.is_complete = False  # a lost line may have said that a request was sent
        LOGGER.error("The journal %s has %d lines with a wrong checksum or format; they are skipped", path, invalid)


def _read_line(line: bytes, journal: AbandonedJournal) -> bool:
    """Updates the journal by a line. Returns whether the line is valid."""
    fields = parse_line(line)
    try:
        if fields is None:
            return False
        if fields[0] == b"owner":
            journal.is_complete = fields[2] == boot_id()
        else:
            apply_line(journal.open_holds, fields)
    except (ValueError, KeyError, IndexError):
        return False
    return True


def _lock(slot: Path) -> int | None:
    """Locks a slot until the returned file is closed or the process dies. None if another process has it. Raises JournalError."""
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
