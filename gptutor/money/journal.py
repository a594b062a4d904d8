"""The journal: what a process knows of its open holds, on the local disk, so that the death of the process loses nothing.

A hold is committed in PostgreSQL before anything is bought. What happens next is known to this process alone until the settlement
is committed: that the request was sent, its generation id, its cost. Each fact is one line, written as soon as the fact is known:

    owner <process> <boot> <time>      first line of a file: the process id, the boot of the machine, when the file was begun
    sent <account> <hold> <amount> <rate> <key> <request id> <model>   the request is about to be sent upstream
    named <account> <hold> <generation id>             OpenRouter's headers have arrived
    billed <account> <hold> <charge> <cost> <generation id or -> <tokens or -> <tokens or ->   the bill was read
    closed <hold>                                      the hold is settled or released in the database
    handed_over <hold>                                 recovery has it: the database has all that is known here

A plain `write` survives `kill -9`: the bytes are in the kernel. It does not survive a power cut; the database's commits do.
So the absence of a line proves something only within one boot of the machine (`AbandonedJournal.is_complete`).

The format of a line and its checksum are in `journal_records.py`. A crash may leave a torn last line. A line with a wrong
checksum is skipped and counted.

Files are in numbered slots, `<directory>/<slot>/<owner>.<segment>.log`, one slot for each process, locked while it lives. A
process that can lock a slot knows that the files there belong to dead processes, and may replay them. A segment that has grown
too large is followed by a new one that begins with the open holds, so that each file can be understood alone. While PostgreSQL is
unavailable, the journal is the spool.

What the database has committed it may lose: it is restored from a backup, or a server that lagged behind is promoted. So closed
holds are kept for a while: the older segments, and the files of processes whose journal was replayed, which are renamed to
`.kept`. `rollback.py` compares them with a database that has gone back. `expire` bounds them.
"""

import contextlib
import errno
import fcntl
import logging
import math
import os
import time
import uuid
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from gptutor.money.amounts import AccountId
from gptutor.money.holds import HoldFacts, HoldId, placed_at_ms
from gptutor.money.journal_records import (
    HoldRecord,
    apply_line,
    billed_line,
    closed_line,
    handed_over_line,
    named_line,
    owner_line,
    parse_line,
    record_lines,
    sent_line,
)
from gptutor.money.pricing import Charge

LOGGER = logging.getLogger("gptutor.journal")
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
SLOTS_MAX = 256
CLOSED = -1
FILE_PATTERN = "????????-????-????-????-????????????.??????.log"
KEPT_PATTERN = "????????-????-????-????-????????????.??????.kept"
JOURNALS = "journal"
"""The folder of all slots, in `paths.data`."""
UNBOOKED = "unbooked"
"""In a slot: what cannot be booked, because the database has lost the account. Only the operator deletes it."""
OPEN_HOLD_BYTES = 400
"""About the size of one open hold in a new segment."""


class JournalError(Exception):
    """The journal cannot be written, so nothing may be bought. The text is a sentence for the operator."""


@dataclass(slots=True)
class Segment:
    """What one file says, or several that follow each other."""

    open_holds: dict[HoldId, HoldRecord] = field(default_factory=dict)
    closed_holds: dict[HoldId, HoldRecord] = field(default_factory=dict)
    is_whole: bool = False
    """Whether no line is lost, and it was written since the machine's latest boot."""
    begun_ms: int | None = None
    """When it was begun, in milliseconds since 1970: all lines of holds that were placed later are in it, or in a later one.
    None: its first line is lost, or of an earlier release."""


@dataclass(slots=True)
class AbandonedJournal:
    """What the journal of a dead process says.

    `open_holds` are the holds whose requests were sent. If `is_complete`, no request was sent under the process's other holds,
    unless they are closed.
    """

    owner: uuid.UUID
    open_holds: dict[HoldId, HoldRecord]
    is_complete: bool
    files: list[Path] = field(default_factory=list)

    def retire(self) -> None:
        """To be called when the database has all of it: the files are kept as evidence for a while."""
        _retire(self.files)


@dataclass(slots=True)
class ClosedHolds:
    """What a journal says of some holds that are not open in it."""

    records: dict[HoldId, HoldRecord]
    sent_are_known_after_ms: float
    """Of every hold that was placed later than this, the journal knows whether its request was sent."""


class Journal:
    """The journal of this process. `owner` is the id of this process, new at each start: its holds carry it in the database."""

    def __init__(self, slot: Path, segment_bytes_max: int, bytes_max: int, kept_bytes_max: int = 32 << 20) -> None:
        self.owner = uuid.uuid4()
        self.open_holds: dict[HoldId, HoldRecord] = {}
        """The holds whose requests were sent, and which the database has not closed yet."""
        self.keep_when_empty = False
        """Whether `close` keeps the file of an empty journal: it proves that the requests of holds that are still open were never
        sent, so that the next process may release them."""
        self.latest_settled: tuple[AccountId, HoldId] | None = None
        self.slot = slot
        self._segment_bytes_max = segment_bytes_max
        self._bytes_max = bytes_max
        self._kept_bytes_max = kept_bytes_max
        self._latest_sent = HoldId(uuid.UUID(int=0))
        self._segment = 0
        self._file = CLOSED
        self._size = 0
        self._begin_segment()
        self._size_when_empty = self._size

    @property
    def slot_number(self) -> int:
        """A small number that no other living process of this machine has."""
        return int(self.slot.name)

    def size_bytes(self) -> int:
        """Of the file that is written to."""
        return self._size

    def filled(self) -> float:
        """Which part of `bytes_max` is used; above 1 nothing can be bought."""
        return self._size / self._bytes_max

    # -- what is written down

    def record_sent(self, account_id: AccountId, hold_id: HoldId, facts: HoldFacts | None = None) -> None:
        """To be called before the request is sent. Raises JournalError: then the request must not be sent."""
        if self._size > self._bytes_max:
            raise JournalError(f"The journal in {self.slot} has reached {self._bytes_max} bytes; PostgreSQL must catch up first.")
        record = HoldRecord(account_id, facts=facts)
        self._append(sent_line(hold_id, record))
        self.open_holds[hold_id] = record
        if hold_id > self._latest_sent:
            self._latest_sent = hold_id

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
        """They are settled or released. Holds that are not in the journal are ignored."""
        lines = []
        for hold_id in hold_ids:
            if (record := self.open_holds.pop(hold_id, None)) is not None:
                lines.append(closed_line(hold_id))
                if record.charge is not None:
                    self.latest_settled = (record.account_id, hold_id)
        self._record_ended(lines)

    def record_handed_over(self, hold_ids: Iterable[HoldId]) -> None:
        """Recovery has them. Holds that are not in the journal are ignored."""
        self._record_ended([handed_over_line(hold_id) for hold_id in hold_ids if self.open_holds.pop(hold_id, None) is not None])

    def record_unbooked(self, hold_id: HoldId, record: HoldRecord) -> None:
        """Writes down what cannot be booked, for the operator; twice if need be. Raises JournalError."""
        path = self.slot / UNBOOKED
        try:
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            try:
                _write(file, record_lines(hold_id, record))
            finally:
                os.close(file)
        except OSError as error:
            raise JournalError(f"{path} cannot be written: {error.strerror}.") from error

    def closed(self, hold_ids: Collection[HoldId]) -> ClosedHolds:
        """What the files say of holds that are closed."""
        return find_closed(self.files, hold_ids)

    def close(self) -> None:
        """At an orderly end. The files of an empty journal are only kept as evidence, unless `keep_when_empty`."""
        os.close(self._file)
        self._file = CLOSED
        if not self.open_holds and not self.keep_when_empty:
            if self._segment == 1 and self._size == self._size_when_empty:
                self._path.unlink(missing_ok=True)
            _retire(self.files)

    @property
    def files(self) -> list[Path]:
        """The segments that are kept, the latest last."""
        return sorted(self.slot.glob(f"{self.owner}.??????.log"))

    def _record_ended(self, lines: list[bytes]) -> None:
        if lines:
            self._append_or_log(b"".join(lines))
        if self._size > self._segment_bytes_max and self._size > 2 * OPEN_HOLD_BYTES * len(self.open_holds):
            try:
                self._begin_segment()
                self.expire()
            except JournalError as error:
                LOGGER.error("%s", error)  # the old segment stays in use

    def expire(self, older_than_s: float | None = None) -> None:
        """Deletes evidence in the slot that is older, and the oldest of what exceeds the bound."""
        expire_kept(self.slot, older_than_s, self._kept_bytes_max, of_closed=self.files[:-1])

    @property
    def _path(self) -> Path:
        return self.slot / f"{self.owner}.{self._segment:06d}.log"

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
        """Begins a new file with all open holds. Raises JournalError, and keeps the old file."""
        begun_ms = max(time.time_ns() // 1_000_000, placed_at_ms(self._latest_sent))  # after a clock was set back, too
        lines = [owner_line(self.owner, boot_id(), begun_ms)]
        lines += [record_lines(hold_id, record) for hold_id, record in self.open_holds.items()]
        content = b"".join(lines)
        old_file = self._file
        path = self.slot / f"{self.owner}.{self._segment + 1:06d}.log"
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


@contextmanager
def opened(
    directory: Path, *, segment_bytes_max: int = 4 << 20, bytes_max: int = 1 << 30, kept_bytes_max: int = 32 << 20
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
        journal = Journal(slot, segment_bytes_max, bytes_max, kept_bytes_max)
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


@contextmanager
def locked(slot: Path) -> Iterator[bool]:
    """Whether no other process has the slot; then it is locked while this context lasts. Raises JournalError."""
    lock = _lock(slot)
    try:
        yield lock is not None
    finally:
        if lock is not None:
            os.close(lock)


def slots(directory: Path) -> list[Path]:
    """The slots of all processes, living and dead."""
    return sorted(path for path in directory.iterdir() if path.is_dir())


def read_journals(slot: Path) -> list[AbandonedJournal]:
    """The journals in a slot, one for each process that wrote there. The slot should be locked."""
    return [_read_journal(uuid.UUID(owner), files) for owner, files in _by_owner(slot.glob(FILE_PATTERN)).items()]


def read_segment(path: Path) -> Segment:
    segment = Segment()
    _read_file(path, segment)
    return segment


def find_closed(files: Sequence[Path], hold_ids: Collection[HoldId]) -> ClosedHolds:
    """What the files of one process say of holds that are closed. Reads only files that may have lines about them."""
    earliest_ms = min(map(placed_at_ms, hold_ids))
    first = len(files) - 1
    while first > 0 and not _begun_ms(files[first]) < earliest_ms:
        first -= 1
    # What was closed in the segments before the first may be forgotten.
    found = ClosedHolds({}, _begun_ms(files[first]) if _segment_number(files[first]) > 1 else 0)
    for path in files[first:]:
        segment = read_segment(path)
        found.records |= {hold_id: segment.closed_holds[hold_id] for hold_id in hold_ids if hold_id in segment.closed_holds}
        if not segment.is_whole:
            found.sent_are_known_after_ms = math.inf
    return found


def kept_files(slot: Path) -> Iterator[list[tuple[Path, bool]]]:
    """The files of each process, the latest first, and whether a file's open holds are closed as well: it was replayed."""
    for files in _by_owner([*slot.glob(FILE_PATTERN), *slot.glob(KEPT_PATTERN)]).values():
        yield [(path, path == files[-1] and path.suffix == ".kept") for path in reversed(files)]


def read_unbooked(directory: Path) -> dict[HoldId, HoldRecord]:
    """What could not be booked in any slot."""
    segment = Segment()
    for path in sorted(directory.glob(f"*/{UNBOOKED}")):
        _read_file(path, segment)
    return segment.open_holds


def expire_kept(slot: Path, older_than_s: float | None, bytes_max: int, of_closed: Sequence[Path] = ()) -> None:
    """Deletes evidence that is older, and the oldest of what exceeds the bound. `of_closed`: more files without open holds."""
    kept = bytes_max
    for path in sorted([*slot.glob(KEPT_PATTERN), *of_closed], key=lambda path: path.stat().st_mtime, reverse=True):
        status = path.stat()
        kept -= status.st_size
        if kept < 0 or (older_than_s is not None and time.time() - status.st_mtime > older_than_s):
            path.unlink()


def boot_id() -> bytes:
    """The id of the machine's current boot. Where the kernel has none, a new id each time, so that no journal is complete."""
    try:
        return BOOT_ID.read_bytes().strip()
    except OSError:
        return uuid.uuid4().hex.encode()


def _read_journal(owner: uuid.UUID, files: list[Path]) -> AbandonedJournal:
    """A segment has all that was open when it was begun, so the latest is enough, unless it is damaged."""
    first = len(files) - 1
    while not (latest := read_segment(files[first])).is_whole and first > 0:
        first -= 1
    for path in files[first + 1 :]:
        latest.closed_holds.clear()  # there may be hundreds of thousands
        _read_file(path, latest)
    return AbandonedJournal(owner, latest.open_holds, latest.is_whole, files)


def _read_file(path: Path, segment: Segment) -> None:
    *lines, last = path.read_bytes().split(b"\n")
    segment.is_whole = False
    invalid = sum(not _read_line(line, segment) for line in lines)
    _read_line(last, segment)  # a crash may tear the last line: that is no damage; with a right checksum the line is whole
    if invalid:
        segment.is_whole = False  # a lost line may have said that a request was sent
        LOGGER.error("The journal %s has %d lines with a wrong checksum or format; they are skipped", path, invalid)


def _read_line(line: bytes, segment: Segment) -> bool:
    """Updates the segment by a line. Returns whether the line is valid."""
    fields = parse_line(line)
    try:
        if fields is None:
            return False
        if fields[0] == b"owner":
            segment.is_whole = fields[2] == boot_id()
            segment.begun_ms = int(fields[3]) if len(fields) > 3 else None
        else:
            apply_line(segment.open_holds, segment.closed_holds, fields)
    except (ValueError, KeyError, IndexError):
        return False
    return True


def _begun_ms(path: Path) -> float:
    """`begun_ms` of a file; infinite if its first line does not tell."""
    segment = Segment()
    with path.open("rb") as file:
        _read_line(file.readline().rstrip(b"\n"), segment)
    return math.inf if segment.begun_ms is None else segment.begun_ms


def _by_owner(paths: Iterable[Path]) -> dict[str, list[Path]]:
    """The files of each process, the latest last."""
    files: dict[str, list[Path]] = {}
    for path in sorted(paths):
        files.setdefault(path.name.partition(".")[0], []).append(path)
    return files


def _segment_number(path: Path) -> int:
    return int(path.name.split(".")[1])


def _retire(files: Iterable[Path]) -> None:
    for path in files:
        with contextlib.suppress(FileNotFoundError):  # it was done before
            os.utime(path)  # kept for a while from now on
            path.rename(path.with_suffix(".kept"))


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
