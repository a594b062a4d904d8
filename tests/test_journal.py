"""The journal: what a process knows survives its death, and damaged lines are never trusted (contract C3, C6; rows process-3
to process-6, process-11, operator-2, db-4)."""

import contextlib
import errno
import logging
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptutor.money import journal
from gptutor.money.amounts import AccountId, Nano
from gptutor.money.holds import HoldFacts, HoldId, new_id, placed_at_ms
from gptutor.money.journal import AbandonedJournal, Journal, JournalError
from gptutor.money.journal_records import HoldRecord, _with_checksum
from gptutor.money.pricing import Charge

ACCOUNT = AccountId(7)
CHARGE = Charge(Nano(9 * 10**8), Decimal("0.01"))
MANY = 1 << 30


def hold_id(number: int) -> HoldId:
    return HoldId(uuid.UUID(int=number))


@pytest.fixture
def slot(tmp_path: Path) -> Path:
    path = tmp_path / "journal" / "0"
    path.mkdir(parents=True)
    return path


def written(slot: Path) -> Journal:
    """A process that records all kinds of lines, and dies: hold 1 sent, 2 named, 3 billed, 4 billed without a generation id, 5 closed."""
    own = Journal(slot, MANY, MANY)
    for number in (1, 2, 3, 4, 5):
        own.record_sent(ACCOUNT, hold_id(number))
    for number in (2, 3, 5):
        own.record_generation_id(hold_id(number), f"gen-{number}")
    own.record_charge(hold_id(3), CHARGE, "gen-3")
    own.record_charge(hold_id(4), CHARGE, None)
    own.record_charge(hold_id(5), CHARGE, "gen-5")
    own.record_closed([hold_id(5), hold_id(99)])
    return own


WRITTEN = {
    hold_id(1): HoldRecord(ACCOUNT),
    hold_id(2): HoldRecord(ACCOUNT, "gen-2"),
    hold_id(3): HoldRecord(ACCOUNT, "gen-3", CHARGE),
    hold_id(4): HoldRecord(ACCOUNT, None, CHARGE),
}


def the_file(slot: Path) -> Path:
    """The latest segment."""
    return max(slot.glob("????????-*.log"))


def read(slot: Path) -> AbandonedJournal:
    (abandoned,) = journal.read_journals(slot)
    return abandoned


# -- what survives


def test_what_was_written_survives_without_flush_and_close(slot: Path) -> None:
    """Rows process-3 to process-5: no flush, no close."""
    own = written(slot)
    abandoned = read(slot)
    assert abandoned.owner == own.owner
    assert abandoned.open_holds == own.open_holds == WRITTEN
    assert abandoned.is_complete
    abandoned.retire()
    abandoned.retire()  # twice is no error
    assert journal.read_journals(slot) == []


def test_the_first_generation_id_stays_whatever_the_bill_says(slot: Path) -> None:
    """Contract C6: `/generation` knows the generation id from the headers."""
    own = Journal(slot, MANY, MANY)
    for number, (first, second) in enumerate([("gen-1", None), ("gen-1", "gen-2"), (None, "gen-2")]):
        own.record_sent(ACCOUNT, hold_id(number))
        if first is not None:
            own.record_generation_id(hold_id(number), first)
        own.record_charge(hold_id(number), CHARGE, second)
    assert [record.generation_id for record in read(slot).open_holds.values()] == ["gen-1", "gen-1", "gen-2"]
    assert read(slot).open_holds == own.open_holds


DYING = """
import os, signal, sys, uuid
from decimal import Decimal
from pathlib import Path
from gptutor.money import journal, pricing
with journal.opened(Path(sys.argv[1])) as (own, journals):
    own.record_sent(7, uuid.UUID(int=1))
    own.record_generation_id(uuid.UUID(int=1), "gen-1")
    own.record_charge(uuid.UUID(int=1), pricing.Charge(900000000, Decimal("0.01")), "gen-1")
    own.record_sent(7, uuid.UUID(int=2))
    print(own.owner, own.slot.name, len(journals), flush=True)
    if sys.argv[2] == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    sys.stdin.readline()
    own.record_closed([uuid.UUID(int=1), uuid.UUID(int=2)])
"""


@contextlib.contextmanager
def other_process(directory: Path, how: str) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", DYING, str(directory), how], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process
        process.kill()


def said_by(process: subprocess.Popen[str]) -> list[str]:
    assert process.stdout is not None
    return process.stdout.readline().split()


def test_a_killed_process_leaves_all_it_knew_to_the_next_process_in_its_slot(tmp_path: Path) -> None:
    """Rows process-4, process-5; contract C6: kill -9 of a real process."""
    with other_process(tmp_path, "die") as process:
        owner, slot, _ = said_by(process)
        assert process.wait(30) == -signal.SIGKILL
    with journal.opened(tmp_path) as (own, journals):
        (abandoned,) = journals
        assert own.slot.name == slot == "0"
        assert str(abandoned.owner) == owner != str(own.owner)
        assert abandoned.is_complete
        assert abandoned.open_holds == {hold_id(1): HoldRecord(ACCOUNT, "gen-1", CHARGE), hold_id(2): HoldRecord(ACCOUNT)}


def test_two_processes_never_share_a_slot_and_only_journals_of_dead_processes_are_abandoned(tmp_path: Path) -> None:
    """Rows process-11, operator-2: two processes of one machine, and two journals of one process."""
    with other_process(tmp_path, "live") as process:
        owner, slot, _ = said_by(process)
        with journal.opened(tmp_path) as (one, none), journal.opened(tmp_path) as (two, none_either):
            assert [slot, one.slot.name, two.slot.name] == ["0", "1", "2"]
            assert none == none_either == []
            one.record_sent(ACCOUNT, hold_id(5))
            with journal.abandoned(tmp_path) as journals:
                assert journals == []
            process.kill()
            process.wait(30)
            with journal.abandoned(tmp_path) as journals:
                assert [str(abandoned.owner) for abandoned in journals] == [owner]
                with journal.abandoned(tmp_path) as again:  # its slot is locked
                    assert again == []
                with journal.opened(tmp_path) as (three, not_three):  # nor does a new process take that slot
                    assert (three.slot.name, not_three) == ("3", [])
                journals[0].retire()
            with journal.abandoned(tmp_path) as journals:
                assert journals == []
    assert [path.name for path in (tmp_path / "1").glob("*.log")] == [f"{one.owner}.000001.log"]


def test_an_orderly_end_leaves_a_file_only_if_something_is_open(tmp_path: Path) -> None:
    """Row process-7: the next process knows what was cancelled at shutdown."""
    with journal.opened(tmp_path) as (own, _):
        own.record_sent(ACCOUNT, hold_id(1))
        own.record_closed([hold_id(1)])
    with journal.opened(tmp_path) as (own, journals):
        assert journals == []
        own.record_sent(ACCOUNT, hold_id(2))
    with journal.opened(tmp_path) as (_, journals):
        assert [abandoned.open_holds for abandoned in journals] == [{hold_id(2): HoldRecord(ACCOUNT)}]


def test_an_empty_journal_is_kept_on_request(tmp_path: Path) -> None:
    """Row process-7: it proves that the requests of holds that could not be released at shutdown were never sent."""
    with journal.opened(tmp_path) as (own, _):
        own.keep_when_empty = True
    with journal.opened(tmp_path) as (_, journals):
        assert [(abandoned.open_holds, abandoned.is_complete) for abandoned in journals] == [({}, True)]


def test_an_abandoned_journal_stays_until_it_is_deleted_however_many_processes_die_before(tmp_path: Path) -> None:
    """Row process-6: a process that dies before its replay leaves two journals."""
    (tmp_path / "0").mkdir()
    dead = written(tmp_path / "0")
    for _ in range(3):
        with journal.opened(tmp_path) as (own, journals):
            assert [abandoned.owner for abandoned in journals] == [dead.owner]
            assert own.owner != dead.owner
    another = Journal(tmp_path / "0", MANY, MANY)
    another.record_sent(ACCOUNT, hold_id(8))
    with journal.opened(tmp_path) as (_, journals):
        assert {abandoned.owner: set(abandoned.open_holds) for abandoned in journals} == {
            dead.owner: set(WRITTEN),
            another.owner: {hold_id(8)},
        }


def cannot_open(sentence: str, directory: Path) -> None:
    """No journal can be opened there, and the error is a sentence for the operator."""
    with pytest.raises(JournalError, match=sentence), journal.opened(directory):
        pass


def test_without_a_free_slot_no_journal_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "SLOTS_MAX", 2)
    with journal.opened(tmp_path), journal.opened(tmp_path):
        cannot_open(f"All 2 journals in {tmp_path} are in use", tmp_path)


# -- what is not trusted


def test_a_torn_last_line_is_ignored(slot: Path) -> None:
    """Row process-11: it was never acknowledged, so its fact has not happened."""
    written(slot)
    content = the_file(slot).read_bytes()
    last = content.rstrip(b"\n").rindex(b"\n") + 1  # the line that closes hold 5
    open_again = {**WRITTEN, hold_id(5): HoldRecord(ACCOUNT, "gen-5", CHARGE)}
    for length in range(last, len(content) - 1):
        the_file(slot).write_bytes(content[:length])
        abandoned = read(slot)
        assert abandoned.open_holds == open_again
        assert abandoned.is_complete
    the_file(slot).write_bytes(content[:-1])  # whole but for its line end: the checksum is right, so the line counts
    assert read(slot).open_holds == WRITTEN
    assert read(slot).is_complete


def test_a_flipped_bit_costs_its_line_and_the_completeness_of_the_journal(slot: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Row process-11: the line is skipped and counted, and the journal is not complete: the line may have said that a request was sent."""
    own = written(slot)
    path = the_file(slot)
    content = path.read_bytes()
    lines = content.splitlines(keepends=True)
    start = 0
    for number, line in enumerate(lines):
        for place in (0, 5, 8, 9, len(line) // 2, len(line) - 2):
            damaged = bytearray(content)
            damaged[start + place] ^= 0x04
            path.write_bytes(damaged)
            caplog.clear()
            abandoned = read(slot)
            assert not abandoned.is_complete
            assert abandoned.owner == own.owner  # also in the file's name
            assert [record.getMessage() for record in caplog.records] == [
                f"The journal {path} has 1 lines with a wrong checksum or format; they are skipped"
            ]
            path.write_bytes(b"".join(lines[:number] + lines[number + 1 :]))
            assert abandoned.open_holds == read(slot).open_holds
        start += len(line)


def test_garbage_with_a_right_checksum_is_skipped_as_well(slot: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Row process-11: a line of a later release, or of another program, is no reason to stop."""
    written(slot)
    odd = [b"", b"sent", b"sent x y", b"named 7 not-a-uuid gen", b"closed", b"billed 7", b"owner", b"billed 7 \xff"]
    with the_file(slot).open("ab") as file:
        for payload in odd:
            file.write(_with_checksum(payload))
    abandoned = read(slot)
    assert abandoned.open_holds == WRITTEN
    assert not abandoned.is_complete
    assert f"has {len(odd)} lines with a wrong checksum or format" in caplog.text


def test_the_end_of_a_hold_without_its_beginning_is_no_damage(slot: Path) -> None:
    """The beginning may have been in a segment that was compacted, or in a line that was lost."""
    written(slot)
    with the_file(slot).open("ab") as file:
        file.write(_with_checksum(b"closed %s" % hold_id(5).hex.encode()))
        file.write(_with_checksum(b"handed_over %s" % hold_id(77).hex.encode()))
    assert (read(slot).is_complete, read(slot).open_holds) == (True, WRITTEN)


def test_a_flipped_bit_is_counted_even_if_the_last_line_has_no_line_end(slot: Path) -> None:
    """Row process-11."""
    written(slot)
    content = bytearray(the_file(slot).read_bytes()[:-1])
    content[content.index(b"sent")] ^= 0x04
    the_file(slot).write_bytes(content)
    assert not read(slot).is_complete


def test_an_empty_file_and_one_without_its_first_line_prove_nothing(slot: Path) -> None:
    """Row process-11: without the first line, the boot of the machine is unknown."""
    written(slot)
    path = the_file(slot)
    _, _, rest = path.read_bytes().partition(b"\n")
    path.write_bytes(rest)
    assert (read(slot).is_complete, read(slot).open_holds) == (False, WRITTEN)
    path.write_bytes(b"")
    assert (read(slot).is_complete, read(slot).open_holds) == (False, {})


def test_after_another_boot_absence_proves_nothing(slot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Contract C6: a power cut loses the last lines of the file, and keeps the database's commits."""
    written(slot)
    assert read(slot).is_complete
    other = tmp_path / "boot_id"
    other.write_text("another-boot\n")
    monkeypatch.setattr(journal, "BOOT_ID", other)
    assert (read(slot).is_complete, read(slot).open_holds) == (False, WRITTEN)


def test_without_a_boot_id_absence_proves_nothing(slot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "BOOT_ID", tmp_path / "there is none")
    written(slot)
    assert (read(slot).is_complete, read(slot).open_holds) == (False, WRITTEN)


# -- rotation and bounds


def test_a_segment_that_has_grown_is_replaced_by_what_is_open(slot: Path) -> None:
    """Each file stays as small as the work in progress; no open hold is lost, no closed one comes back. What is closed is bounded."""
    own = Journal(slot, segment_bytes_max=2000, bytes_max=MANY, kept_bytes_max=5000)
    for number in (1, 2, 3, 4):
        own.record_sent(ACCOUNT, hold_id(number))
    own.record_generation_id(hold_id(2), "gen-2")
    own.record_charge(hold_id(3), CHARGE, "gen-3")
    own.record_charge(hold_id(4), CHARGE, None)
    names, sizes = set(), []
    for number in range(100, 300):
        own.record_sent(ACCOUNT, hold_id(number))
        own.record_closed([hold_id(number)])
        names.add(the_file(slot).name)
        assert sum(path.stat().st_size for path in slot.glob("*.log")) < 5000 + 4000
        sizes.append(the_file(slot).stat().st_size)
        assert read(slot).open_holds == own.open_holds == WRITTEN
        assert read(slot).is_complete
    assert len(names) > 6
    assert max(sizes) < 4000
    assert {path.suffix for path in slot.iterdir()} == {".log"}


def test_a_segment_full_of_what_is_open_is_not_rewritten_again_and_again(slot: Path) -> None:
    """Row db-4: while PostgreSQL is unavailable thousands are open, and each closing must stay cheap."""
    own = Journal(slot, segment_bytes_max=1000, bytes_max=MANY)
    for number in range(1, 201):
        own.record_sent(ACCOUNT, hold_id(number))
    for number in range(1, 101):
        own.record_closed([hold_id(number)])
    assert own._segment < 5
    assert set(read(slot).open_holds) == {hold_id(number) for number in range(101, 201)}
    own.record_closed([hold_id(number) for number in range(101, 201)])
    assert own._segment > 1
    assert read(slot).open_holds == {}


def test_a_death_between_the_new_segment_and_the_removal_of_the_old_one_changes_nothing(slot: Path) -> None:
    """Row process-6: both files exist, with the same content."""
    own = written(slot)
    old = the_file(slot)
    content = old.read_bytes()
    own._begin_segment()
    own.record_closed([hold_id(1)])
    own.record_sent(ACCOUNT, hold_id(6))
    old.write_bytes(content)
    abandoned = read(slot)
    assert abandoned.open_holds == own.open_holds
    assert len(abandoned.files) == 2
    abandoned.retire()
    assert journal.read_journals(slot) == []


def fill(own: Journal) -> None:
    for number in range(1, 1000):
        own.record_sent(ACCOUNT, hold_id(number))


def test_a_journal_that_has_reached_its_bound_takes_no_new_work(slot: Path) -> None:
    """Row process-11, db-4: running requests may still be recorded, and when PostgreSQL has caught up, new ones are accepted."""
    own = Journal(slot, segment_bytes_max=100, bytes_max=1000)
    with pytest.raises(JournalError, match=r"has reached 1000 bytes; PostgreSQL must catch up first\."):
        fill(own)
    numbers = list(own.open_holds)
    assert 5 < len(numbers) < 20
    assert set(numbers) == set(read(slot).open_holds)
    own.record_generation_id(numbers[0], "gen-1")
    own.record_charge(numbers[0], CHARGE, "gen-1")
    assert read(slot).open_holds[numbers[0]] == HoldRecord(ACCOUNT, "gen-1", CHARGE)
    own.record_closed(numbers)
    own.record_sent(ACCOUNT, hold_id(500))
    assert read(slot).open_holds == {hold_id(500): HoldRecord(ACCOUNT)}


# -- evidence of what is closed


FACTS = HoldFacts(Nano(5 * 10**9), Decimal("81.25"), bytes(range(8)), "request.1", "vendor/model:free")


def closed_one(own: Journal, which: HoldId, facts: HoldFacts | None = FACTS) -> None:
    own.record_sent(ACCOUNT, which, facts)
    own.record_charge(which, CHARGE, "gen-1")
    own.record_closed([which])


@pytest.mark.parametrize("text", ["plain", "~moonshotai/kimi-latest", "a b", "ключ", "%20", "", "-", "a\nb"])
def test_the_facts_of_a_hold_survive_whatever_is_in_them(slot: Path, text: str) -> None:
    own = Journal(slot, MANY, MANY)
    facts = HoldFacts(Nano(1), Decimal("1E+2"), b"12345678", text, text)
    own.record_sent(ACCOUNT, hold_id(1), facts)
    assert read(slot).open_holds == {hold_id(1): HoldRecord(ACCOUNT, facts=facts)}
    own._begin_segment()
    assert read(slot).open_holds == {hold_id(1): HoldRecord(ACCOUNT, facts=facts)}


def test_closed_holds_are_found_with_all_that_was_known(slot: Path) -> None:
    own = Journal(slot, MANY, MANY)
    one, handed_over, released, again = [new_id() for _ in range(4)]
    closed_one(own, one)
    for which in (handed_over, released, again):
        own.record_sent(ACCOUNT, which, FACTS)
    own.record_handed_over([handed_over, hold_id(99)])
    own.record_closed([released, again])
    own._begin_segment()
    own.record_sent(ACCOUNT, again, FACTS)  # another attempt of the same request
    assert own.closed([one, handed_over, released, hold_id(99)]).records == {
        one: HoldRecord(ACCOUNT, "gen-1", CHARGE, FACTS),
        handed_over: HoldRecord(ACCOUNT, facts=FACTS, is_handed_over=True),
        released: HoldRecord(ACCOUNT, facts=FACTS),
    }
    assert own.latest_settled == (ACCOUNT, one)


def test_a_journal_knows_how_far_back_it_goes(slot: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hold that was placed before its oldest segment may have been sent, closed and forgotten; so may all, if a line is lost."""
    own = Journal(slot, MANY, MANY)
    before = new_id()
    closed_one(own, before)
    assert own.closed([before]).sent_are_known_after_ms == 0
    own._begin_segment()
    time.sleep(0.002)
    after = new_id()
    assert placed_at_ms(before) > own.closed([before]).sent_are_known_after_ms
    assert placed_at_ms(after) > own.closed([after]).sent_are_known_after_ms > 0  # reads the second segment alone
    own.files[0].unlink()
    known = own.closed([before, after])
    assert placed_at_ms(before) <= known.sent_are_known_after_ms < placed_at_ms(after)
    the_file(slot).write_bytes(the_file(slot).read_bytes() + b"damaged\n")
    assert own.closed([after]).sent_are_known_after_ms == math.inf
    content = the_file(slot).read_bytes()
    the_file(slot).write_bytes(content[content.index(b"\n") + 1 :])
    assert own.closed([after]).sent_are_known_after_ms == math.inf


def test_a_segment_of_an_earlier_release_does_not_tell_when_it_was_begun(slot: Path) -> None:
    own = Journal(slot, MANY, MANY)
    own._begin_segment()
    own.files[0].unlink()
    the_file(slot).write_bytes(_with_checksum(b"owner %s %s" % (str(own.owner).encode(), journal.boot_id())))
    assert read(slot).is_complete
    assert own.closed([new_id()]).sent_are_known_after_ms == math.inf


def test_a_segment_is_not_begun_before_the_holds_in_it_whatever_the_clock_says(slot: Path) -> None:
    """The clock was set back: what was closed in the first segment must not count as never sent when that is gone."""
    own = Journal(slot, MANY, MANY)
    later = HoldId(uuid.UUID(int=new_id().int + (3_600_000 << 80)))
    closed_one(own, later)
    own._begin_segment()
    own.files[0].unlink()
    assert placed_at_ms(later) <= own.closed([later]).sent_are_known_after_ms


def test_evidence_is_bounded_by_its_age_and_by_its_size(tmp_path: Path) -> None:
    """Both the older segments of a living process, and what dead ones have left. What is open stays, whatever its age."""
    with journal.opened(tmp_path, kept_bytes_max=MANY) as (own, _):
        closed_one(own, new_id())
    slot = own.slot
    (kept,) = slot.glob("*.kept")
    assert list(journal.kept_files(slot)) == [[(kept, True)]]
    abandoned = Journal(slot, MANY, MANY)
    abandoned.record_sent(ACCOUNT, hold_id(1), FACTS)
    with journal.opened(tmp_path, kept_bytes_max=MANY) as (own, _):
        closed_one(own, new_id())
        own._begin_segment()
        old, current = own.files
        own.expire(older_than_s=60)
        assert (kept.exists(), old.exists()) == (True, True)
        os.utime(kept, (0, 0))
        own.expire(older_than_s=60)
        assert (kept.exists(), old.exists()) == (False, True)
        own._kept_bytes_max = 0
        own.expire()
        assert (old.exists(), current.exists()) == (False, True)
        assert set(read_owners(slot)) == {own.owner, abandoned.owner}
    assert [path.suffix for path in slot.glob(f"{own.owner}*")] == [".kept"]


def read_owners(slot: Path) -> list[uuid.UUID]:
    return [one.owner for one in journal.read_journals(slot)]


def test_a_process_that_recorded_nothing_leaves_nothing(tmp_path: Path) -> None:
    with journal.opened(tmp_path) as (own, _):
        pass
    assert [path.name for path in own.slot.iterdir()] == ["lock"]


def test_a_latest_segment_that_a_power_cut_has_damaged_is_read_with_the_one_before(slot: Path) -> None:
    own = written(slot)
    own._begin_segment()
    the_file(slot).write_bytes(the_file(slot).read_bytes()[:50])
    abandoned = read(slot)
    assert abandoned.open_holds == WRITTEN
    assert not abandoned.is_complete


def test_what_cannot_be_booked_is_written_down_in_any_slot(tmp_path: Path) -> None:
    with journal.opened(tmp_path) as (one, _), journal.opened(tmp_path) as (two, _):
        one.record_unbooked(hold_id(1), HoldRecord(ACCOUNT, "gen-1", CHARGE, FACTS))
        two.record_unbooked(hold_id(2), HoldRecord(ACCOUNT, "gen-2"))
        two.record_unbooked(hold_id(2), HoldRecord(ACCOUNT, "gen-2"))
    assert journal.read_unbooked(tmp_path) == {
        hold_id(1): HoldRecord(ACCOUNT, "gen-1", CHARGE, FACTS),
        hold_id(2): HoldRecord(ACCOUNT, "gen-2"),
    }
    assert journal.read_unbooked(tmp_path / "none") == {}


# -- disks that fail


class FullDisk:
    """A disk with `room` for so many bytes, or any number if None."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.room: int | None = None
        self._write = os.write
        monkeypatch.setattr(os, "write", self.write)

    def write(self, file: int, data: bytes) -> int:
        if self.room is None:
            return self._write(file, data)
        if not self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken = self._write(file, data[: self.room])
        self.room -= taken
        return taken


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> FullDisk:
    return FullDisk(monkeypatch)


@pytest.mark.parametrize("room", [0, 1, 20])
def test_a_full_disk_stops_new_work_and_damages_nothing(
    slot: Path, disk: FullDisk, caplog: pytest.LogCaptureFixture, room: int
) -> None:
    """Row process-11: `record_sent` fails, other facts stay in memory and are logged; the file stays readable, half lines are removed."""
    own = written(slot)
    size = the_file(slot).stat().st_size
    disk.room = room
    with pytest.raises(JournalError, match=r"cannot be written: No space left on device\."):
        own.record_sent(ACCOUNT, hold_id(6))
    assert hold_id(6) not in own.open_holds
    with caplog.at_level(logging.ERROR, "gptutor.journal"):
        disk.room = room
        own.record_generation_id(hold_id(1), "gen-1")
        disk.room = room
        own.record_charge(hold_id(2), CHARGE, "gen-2")
        disk.room = room
        own.record_closed([hold_id(3)])
    assert [record.name for record in caplog.records] == ["gptutor.journal"] * 3
    assert own.open_holds == {
        hold_id(1): HoldRecord(ACCOUNT, "gen-1"),
        hold_id(2): HoldRecord(ACCOUNT, "gen-2", CHARGE),
        hold_id(4): WRITTEN[hold_id(4)],
    }
    assert the_file(slot).stat().st_size == size
    assert read(slot).open_holds == WRITTEN
    assert read(slot).is_complete

    disk.room = None  # there is room again, and the next line is whole
    own.record_sent(ACCOUNT, hold_id(7))
    assert read(slot).open_holds == {**WRITTEN, hold_id(7): HoldRecord(ACCOUNT)}
    assert read(slot).is_complete


def test_what_cannot_be_booked_nor_written_down_is_an_error(slot: Path, disk: FullDisk) -> None:
    """It stays in the journal then."""
    own = Journal(slot, MANY, MANY)
    disk.room = 3
    with pytest.raises(JournalError, match=r"unbooked cannot be written: No space left on device\."):
        own.record_unbooked(hold_id(1), HoldRecord(ACCOUNT, facts=FACTS))


def test_a_journal_that_cannot_be_created_is_a_sentence(tmp_path: Path, disk: FullDisk) -> None:
    """Issue 3, row process-11: no journal, no service."""
    disk.room = 0
    cannot_open(r"^The journal .*\.log cannot be written: No space left on device\.$", tmp_path)


ROTATING = {"segment_bytes_max": 300, "bytes_max": MANY}


def full_at_rotation(slot: Path, disk: FullDisk) -> Journal:
    """A journal whose next closing wants a new segment, for which there is no room."""
    own = Journal(slot, **ROTATING)
    for number in (1, 2, 3, 4):
        own.record_sent(ACCOUNT, hold_id(number))
    own.record_charge(hold_id(4), CHARGE, "gen-4")
    own.record_closed([hold_id(1), hold_id(2)])
    own._size = 10_000  # the segment has grown
    disk.room = 60  # the line of the closing fits, the segment does not
    return own


def test_a_new_segment_that_cannot_be_written_does_not_fail_a_closing(slot: Path, disk: FullDisk) -> None:
    """Row process-11: the database has it; the old segment stays in use."""
    own = full_at_rotation(slot, disk)
    own.record_closed([hold_id(3)])
    assert own.open_holds == {hold_id(4): HoldRecord(ACCOUNT, "gen-4", CHARGE)} == read(slot).open_holds
    assert {path.suffix for path in slot.iterdir()} == {".log"}  # half a segment is not left behind


def test_after_a_failed_new_segment_later_lines_are_still_found(slot: Path, disk: FullDisk) -> None:
    """Row process-11, contract C6: what was sent afterwards must not count as never sent."""
    own = full_at_rotation(slot, disk)
    with contextlib.suppress(JournalError):  # the previous test is about that
        own.record_closed([hold_id(3)])
    disk.room = None
    own.record_sent(ACCOUNT, hold_id(9))
    own.record_charge(hold_id(9), CHARGE, "gen-9")
    abandoned = read(slot)
    assert abandoned.open_holds[hold_id(9)] == HoldRecord(ACCOUNT, "gen-9", CHARGE)
    assert abandoned.open_holds[hold_id(4)] == HoldRecord(ACCOUNT, "gen-4", CHARGE)


@pytest.mark.skipif(os.geteuid() != 0 or not sys.platform.startswith("linux"), reason="only root may mount a small disk")
def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    """Row process-11, on a tmpfs of 64 kilobytes: writes fail, the file stays whole, and with room again work goes on."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)], check=False, capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount here: {mounted.stderr.strip()}")
    try:
        with journal.opened(tmp_path) as (own, _):
            ballast = tmp_path / "ballast"
            ballast.write_bytes(b"x" * 40_000)
            with pytest.raises(JournalError, match="No space left on device"):
                fill(own)
            count = len(own.open_holds)
            assert count > 20
            own.record_charge(hold_id(1), CHARGE, "g" * 200)
            assert own.open_holds[hold_id(1)].charge == CHARGE
            (abandoned,) = journal.read_journals(tmp_path / "0")
            assert abandoned.is_complete
            assert set(abandoned.open_holds) == set(own.open_holds)
            ballast.unlink()
            own.record_sent(ACCOUNT, hold_id(5000))
            (abandoned,) = journal.read_journals(tmp_path / "0")
            assert set(abandoned.open_holds) == set(own.open_holds)
            assert len(own.open_holds) == count + 1
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_an_unusable_directory_is_a_sentence(tmp_path: Path) -> None:
    """Issue 3: no journal directory, no service, said at start. (Root may write anywhere, so a file is in the way.)"""
    (tmp_path / "file").write_text("")
    cannot_open(r"^The journal needs the directory .*/file/0, and it cannot be used: Not a directory\.$", tmp_path / "file")


def test_a_permission_lost_is_a_sentence(slot: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row process-11."""

    def forbidden(*_: Any) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "open", forbidden)
    cannot_open(r"it cannot be used: Permission denied\.$", slot.parent)
    with pytest.raises(JournalError, match=r"cannot be written: Permission denied\.$"):
        Journal(slot, MANY, MANY)


def test_files_are_private(tmp_path: Path) -> None:
    with journal.opened(tmp_path / "journal"):
        modes = {
            path.name: path.stat().st_mode & 0o777
            for path in [tmp_path / "journal" / "0", *(tmp_path / "journal" / "0").iterdir()]
        }
    assert modes.pop("0") == 0o700
    assert set(modes.values()) == {0o600}
    assert len(modes) == 2


def test_a_slot_that_cannot_be_read_does_not_keep_other_slots_locked(tmp_path: Path) -> None:
    """Row process-11: what failed once must be possible the next time."""
    for number in ("0", "1"):
        (tmp_path / number).mkdir()
    dead = written(tmp_path / "0")
    odd = tmp_path / "1" / f"{uuid.uuid4()}.000001.log"
    odd.mkdir()
    with pytest.raises(OSError, match="Is a directory"), journal.abandoned(tmp_path):
        pass
    odd.rmdir()
    with journal.abandoned(tmp_path) as journals:
        assert [abandoned.owner for abandoned in journals] == [dead.owner]


def test_a_journal_that_is_closed_writes_nowhere(slot: Path, tmp_path: Path) -> None:
    """Row process-13: a closing after shutdown (by a worker of a batch) must not write into another file."""
    own = written(slot)
    own.close()
    other_file = os.open(tmp_path / "other", os.O_WRONLY | os.O_CREAT)  # gets the file descriptor that was closed
    try:
        own.record_closed([hold_id(1)])
        assert (tmp_path / "other").read_bytes() == b""
    finally:
        os.close(other_file)


# -- any history, cut anywhere

numbers = st.integers(1, 6)
names = st.text(alphabet="abc-019_~!", min_size=1, max_size=12).filter(lambda name: name != "-")
charges = st.builds(
    Charge,
    st.integers(0, 10**18).map(Nano),
    st.decimals(min_value=0, max_value=99_999, allow_nan=False, allow_infinity=False),
)
operations = st.one_of(
    st.tuples(st.just("sent"), numbers),
    st.tuples(st.just("named"), numbers, names),
    st.tuples(st.just("billed"), numbers, charges, st.none() | names),
    st.tuples(st.just("closed"), st.lists(numbers, max_size=3)),
)


def copied(known: dict[HoldId, HoldRecord]) -> dict[HoldId, HoldRecord]:
    return {one: HoldRecord(what.account_id, what.generation_id, what.charge) for one, what in known.items()}


def play(own: Journal, operation: tuple[Any, ...]) -> None:
    kind, which, *values = operation
    if kind == "closed":
        own.record_closed([hold_id(number) for number in which])
    elif kind == "sent" and hold_id(which) not in own.open_holds:
        own.record_sent(AccountId(which * 1000), hold_id(which))
    elif kind == "named" and hold_id(which) in own.open_holds:
        own.record_generation_id(hold_id(which), *values)
    elif kind == "billed" and hold_id(which) in own.open_holds:
        own.record_charge(hold_id(which), *values)


@given(st.lists(operations, max_size=25), st.integers(0, 10**6), st.sampled_from([200, 600, 10**6]))
def test_any_history_cut_at_any_byte_is_the_state_at_one_moment(
    history: list[tuple[Any, ...]], cut: int, segment_bytes_max: int
) -> None:
    """Contract C3, C6; row process-11: never a mixture, and never more than one operation behind the byte at which it ends."""
    with tempfile.TemporaryDirectory() as directory:
        slot = Path(directory)
        own = Journal(slot, segment_bytes_max, MANY)
        moments = [(the_file(slot).stat().st_size, copied(own.open_holds))]
        for operation in history:
            segment = own._segment
            play(own, operation)
            if own._segment != segment:
                moments.clear()  # a new file, which exists as a whole or not at all
            moments.append((the_file(slot).stat().st_size, copied(own.open_holds)))
            assert read(slot).open_holds == own.open_holds
            assert read(slot).is_complete
        os.close(own._file)

        path = the_file(slot)
        content = path.read_bytes()
        first = moments[0][0]
        length = first + cut % (len(content) - first + 1)
        path.write_bytes(content[:length])
        before = [known for size, known in moments if size <= length]
        after = [known for size, known in moments if size > length]
        abandoned = read(slot)
        assert abandoned.is_complete
        if length in [size for size, _ in moments]:
            assert abandoned.open_holds == before[-1]
        else:
            closing = before[-1].keys() - after[0].keys()  # one call for several holds writes several lines
            assert abandoned.open_holds in (before[-1], after[0]) or (
                closing and abandoned.open_holds == {one: what for one, what in before[-1].items() if one in abandoned.open_holds}
            )


@given(st.lists(operations, min_size=1, max_size=12), st.data())
def test_any_history_with_any_bit_flipped_is_never_complete_and_never_invents_facts(
    history: list[tuple[Any, ...]], data: st.DataObject
) -> None:
    """Row process-11: checksums cover all but the last line end; whatever is read was once written."""
    with tempfile.TemporaryDirectory() as directory:
        slot = Path(directory)
        own = Journal(slot, MANY, MANY)
        charges_written, generation_ids_written = set(), set()
        for operation in history:
            play(own, operation)
            charges_written |= {what.charge for what in own.open_holds.values()}
            generation_ids_written |= {what.generation_id for what in own.open_holds.values()}
        os.close(own._file)
        path = the_file(slot)
        content = bytearray(path.read_bytes())
        place = data.draw(st.integers(0, len(content) - 2))
        content[place] ^= 1 << data.draw(st.integers(0, 7))
        path.write_bytes(content)
        abandoned = read(slot)
        if abandoned.is_complete:
            assert abandoned.open_holds == own.open_holds  # the same checksum, with a capital letter
        for what in abandoned.open_holds.values():
            assert what.charge in charges_written | {None}
            assert what.generation_id in generation_ids_written | {None}
            assert what.account_id in {1000, 2000, 3000, 4000, 5000, 6000}


def test_each_process_has_a_slot_number_of_its_own(tmp_path: Path) -> None:
    with journal.opened(tmp_path) as (first, _), journal.opened(tmp_path) as (second, _):
        assert (first.slot_number, second.slot_number) == (0, 1)
