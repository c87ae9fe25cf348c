"""The tape on disk: what was written is read back, through crashes, full disks and damage."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest

from lightning_diloco.protocol.identity import Version
from lightning_diloco.protocol.records import ContributionRecord, EndRecord, LeaveRecord, RunRecord, TapeLine
from lightning_diloco.runtime import tape as tape_module
from lightning_diloco.runtime.complaints import COMPLAIN_S
from lightning_diloco.runtime.tape import FLUSH_PERIOD_S, TapeError, TapeTail, TapeWriter, append_run_record

ROOT = str(Path(__file__).parents[2])
CONTRIBUTION = ContributionRecord(
    learner_id=1,
    incarnation=0,
    fragment_id=2,
    seq=41,
    base=Version(0, 3),
    steps=4,
    tokens=40,
    weight=400.0,
    norm=0.1,
    payload_bytes=100,
    outcome="folded",
)
END = EndRecord(status="finished", versions=(1,), global_sha256=None)
RUN = RunRecord(status="finished", startup_s=2.0, restarts={"learners": 0, "syncer": 0}, val={"val_loss": 1.5})


class Clock:
    """A clock that the test moves."""

    def __init__(self, now_s: float = 100.0) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s


def leave(learner_id: int) -> LeaveRecord:
    return LeaveRecord(learner_id=learner_id, incarnation=0, reason="limit")


def read_tape(path: Path) -> list[TapeLine]:
    return list(tape_module.read_tape(path))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tape.jsonl"


def test_lines_come_back_as_they_were_written(path: Path):
    clock = Clock()
    writer = TapeWriter(path, clock, t0_s=90.0)
    written = [writer.write(leave(0))]
    clock.now_s += 1 / 3
    written.append(writer.write(CONTRIBUTION))
    clock.now_s = 80.0  # before second 0
    written.append(writer.write(END))
    writer.close()
    assert read_tape(path) == written
    assert [line.seq for line in written] == [0, 1, 2]
    assert [line.t_s for line in written] == [10.0, 10.333333, 0.0]
    assert writer.num_lines == 3
    assert writer.error is None


def test_buffered_lines_reach_the_file_half_a_second_after_the_last_flush(path: Path):
    clock = Clock()
    writer = TapeWriter(path, clock)
    writer.write(leave(0))
    writer.flush_if_due(clock.now_s + FLUSH_PERIOD_S - 0.01)
    assert path.read_bytes() == b""
    clock.now_s += FLUSH_PERIOD_S
    writer.flush_if_due(clock.now_s)
    assert len(read_tape(path)) == 1
    writer.write(leave(1))
    writer.flush_if_due(clock.now_s + 0.1)
    assert len(read_tape(path)) == 1
    writer.flush()
    assert len(read_tape(path)) == 2
    writer.close()


def test_closed_writer_ignores_what_comes(path: Path):
    writer = TapeWriter(path, Clock())
    writer.write(leave(0))
    writer.close()
    writer.write(leave(1))
    writer.flush()
    writer.close()
    assert len(read_tape(path)) == 1


def test_half_written_last_line_is_not_read_and_is_cut_by_the_next_writer(path: Path):
    writer = TapeWriter(path, Clock())
    writer.write(leave(0))
    writer.write(CONTRIBUTION)
    writer.close()
    whole = path.read_bytes()
    for cut in range(1, len(whole.splitlines(keepends=True)[1]) + 1):
        path.write_bytes(whole[:-cut])
        assert [line.record for line in read_tape(path)] == [leave(0)]
    writer = TapeWriter(path, Clock(500.0))
    line = writer.write(leave(2))
    writer.close()
    assert line.seq == 1
    assert [line.record for line in read_tape(path)] == [leave(0), leave(2)]


def test_file_that_holds_only_a_half_line_starts_anew(path: Path):
    path.write_bytes(b'{"seq":0,"t_s"')
    writer = TapeWriter(path, Clock())
    assert path.read_bytes() == b""
    assert writer.write(END).seq == 0
    writer.close()


def test_continued_tape_goes_on_in_number_and_time(path: Path):
    writer = TapeWriter(path, Clock(7.0), t0_s=0.0)
    for i in range(3):
        writer.write(leave(i))
    writer.close()
    clock = Clock(1000.0)
    writer = TapeWriter(path, clock)
    clock.now_s += 2.0
    line = writer.write(CONTRIBUTION)
    writer.close()
    assert (line.seq, line.t_s) == (3, 9.0)
    assert len(read_tape(path)) == 4


def test_last_line_longer_than_a_block_is_found(path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tape_module, "_END_BLOCK_BYTES", 8)
    writer = TapeWriter(path, Clock())
    writer.write(leave(0))
    writer.write(CONTRIBUTION)
    writer.close()
    assert append_run_record(path, RUN).seq == 2


def test_a_killed_writer_leaves_what_was_flushed(path: Path):
    program = (
        "import os, signal, sys; from pathlib import Path\n"
        "from lightning_diloco.protocol.records import LeaveRecord\n"
        "from lightning_diloco.runtime.tape import TapeWriter\n"
        "writer = TapeWriter(Path(sys.argv[1]))\n"
        "for i in range(100): writer.write(LeaveRecord(learner_id=i, incarnation=0, reason='died'))\n"
        "writer.flush()\n"
        "writer.write(LeaveRecord(learner_id=100, incarnation=0, reason='died'))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program, str(path)], timeout=60, env=os.environ | {"PYTHONPATH": ROOT})
    assert ended.returncode == -signal.SIGKILL
    assert [line.record.learner_id for line in read_tape(path)] == list(range(100))


def refuse(fd: int, data: bytes) -> int:
    """Stands in for `os.write` of a full disk."""
    raise OSError(errno.ENOSPC, "No space left on device")


def test_others_cannot_read_the_sessions_on_a_tape(path: Path):
    before = os.umask(0)
    try:
        TapeWriter(path, Clock()).close()
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_disk_that_refuses_lines_is_logged_at_once_and_once_and_so_is_its_recovery(path: Path, monkeypatch, caplog):
    clock = Clock()
    writer = TapeWriter(path, clock)
    for outage in (1, 2):
        with monkeypatch.context() as patch:
            patch.setattr(tape_module.os, "write", refuse)
            for i in range(50):
                writer.write(leave(i))
                writer.flush()
                assert caplog.text.count("the tape cannot be written: [Errno 28] No space left") == outage
        for _ in range(2):
            writer.flush()
        assert caplog.text.count("the disk takes the tape again") == outage and len(read_tape(path)) == 50 * outage
        clock.now_s += COMPLAIN_S
    writer.close()
    assert len(caplog.records) == 4 and all(str(path) in r.getMessage() for r in caplog.records)


def test_a_disk_that_flaps_does_not_fill_the_log_and_an_outage_that_lasts_is_told(path: Path, monkeypatch, caplog):
    clock = Clock()
    writer = TapeWriter(path, clock)

    def fail_for(num_flushes: int) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(tape_module.os, "write", refuse)
            for _ in range(num_flushes):
                writer.write(leave(0))
                writer.flush()
                clock.now_s += FLUSH_PERIOD_S

    for _ in range(10):
        fail_for(1)
        writer.flush()
    assert len(caplog.records) == 2
    fail_for(int(COMPLAIN_S / FLUSH_PERIOD_S))
    assert len(caplog.records) == 3, "it lasts"
    writer.close()
    assert "takes the tape again" in caplog.records[3].getMessage()


def test_lines_that_the_disk_has_not_taken_at_the_end_are_said_to_be_lost(path: Path, monkeypatch, caplog):
    writer = TapeWriter(path, Clock())
    writer.write(leave(0))
    monkeypatch.setattr(tape_module.os, "write", refuse)
    writer.close()
    assert "the disk has not taken the last" in caplog.text and "in no account" in caplog.text


def test_full_disk_is_kept_as_an_error_and_the_tape_goes_on_when_there_is_room(path: Path, monkeypatch: pytest.MonkeyPatch):
    writer = TapeWriter(path, Clock())
    real_write, room = os.write, [30]

    def write(fd: int, data: bytes) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        portion = bytes(data[: room[0]])
        room[0] -= len(portion)
        return real_write(fd, portion)

    monkeypatch.setattr(tape_module.os, "write", write)
    writer.write(leave(0))
    writer.flush()
    assert isinstance(writer.error, OSError)
    assert writer.error.errno == errno.ENOSPC
    first = writer.error
    assert path.stat().st_size == 30
    assert read_tape(path) == []
    writer.write(leave(1))
    writer.flush()
    assert writer.error is first
    room[0] = 10_000
    writer.flush()
    assert [line.record for line in read_tape(path)] == [leave(0), leave(1)]
    writer.close()


def test_disk_that_stays_full_does_not_fill_the_memory_and_the_log_says_where_the_tape_ends(path: Path, monkeypatch, caplog):
    writer = TapeWriter(path, Clock())
    writer.write(leave(0))
    writer.flush()
    monkeypatch.setattr(tape_module, "MAX_PENDING_BYTES", 1000)
    with monkeypatch.context() as patch:
        patch.setattr(tape_module.os, "write", refuse)
        for i in range(1, 100):
            writer.write(leave(i))
            writer.flush()
    assert len(writer._pending) == 0
    assert caplog.text.count("The tape ends here for good") == 1
    writer.write(leave(100))
    writer.close()
    assert [line.record for line in read_tape(path)] == [leave(0)]  # it ends where it was given up, and can be read
    assert len(caplog.records) == 2, "the disk takes nothing of it again"


def test_disk_error_while_closing_is_kept(path: Path, monkeypatch: pytest.MonkeyPatch):
    writer = TapeWriter(path, Clock())

    def fsync(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(tape_module.os, "fsync", fsync)
    writer.close()
    assert writer.error is not None
    assert writer.error.errno == errno.EIO
    with pytest.raises(OSError, match="Input/output"):
        append_run_record(path, RUN)


def test_damaged_line_in_the_middle_is_an_error_with_its_number(path: Path):
    writer = TapeWriter(path, Clock())
    for i in range(3):
        writer.write(leave(i))
    writer.close()
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1].replace(b"leave", b"sleep") + lines[2])
    with pytest.raises(TapeError, match=r"tape.jsonl, line 2: not a record"):
        read_tape(path)
    path.write_bytes(lines[0] + lines[2])
    with pytest.raises(TapeError, match="line 2: seq is 2 and should be 1"):
        read_tape(path)
    tail = TapeTail(path)
    assert len(tail.read_new()) == 1  # what is good comes first
    with pytest.raises(TapeError):
        tail.read_new()


def test_tape_whose_last_line_is_no_record_is_not_continued(path: Path):
    path.write_bytes(b"hello\n")
    with pytest.raises(TapeError, match="the last line is not a record"):
        TapeWriter(path)


def test_a_tape_of_many_portions_is_read_whole_and_in_little_memory(path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tape_module, "_PORTION_BYTES", 1000)
    writer = TapeWriter(path, Clock())
    for i in range(2000):
        writer.write(leave(i))
    writer.close()
    assert [line.seq for line in read_tape(path)] == list(range(2000))
    tracemalloc.start()
    try:
        assert sum(1 for _ in tape_module.read_tape(path)) == 2000
        assert tracemalloc.get_traced_memory()[1] < path.stat().st_size / 4
    finally:
        tracemalloc.stop()
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    assert len(read_tape(path)) == 1999, "a half-written last line is left out"
    path.write_bytes(data.replace(b'"seq":1500,', b'"seq":1501,'))
    with pytest.raises(TapeError, match="line 1501: seq is 1501 and should be 1500"):
        read_tape(path)


def test_missing_tape_is_a_sentence(path: Path):
    with pytest.raises(TapeError, match="no tape here"):
        read_tape(path)


def test_tail_reads_each_line_once_as_it_comes(path: Path):
    tail = TapeTail(path)
    assert tail.read_new() == []
    writer = TapeWriter(path, Clock())
    writer.write(leave(0))
    writer.flush()
    assert [line.record for line in tail.read_new()] == [leave(0)]
    assert tail.read_new() == []
    whole = path.read_bytes()
    writer.write(CONTRIBUTION)
    writer.close()
    grown = path.read_bytes()
    path.write_bytes(grown[: len(whole) + 10])
    assert tail.read_new() == []
    path.write_bytes(grown)
    assert [line.record for line in tail.read_new()] == [CONTRIBUTION]


def test_run_record_has_the_time_of_the_last_line(path: Path):
    writer = TapeWriter(path, Clock(12.5), t0_s=0.0)
    writer.write(END)
    writer.close()
    line = append_run_record(path, RUN)
    assert (line.seq, line.t_s) == (1, 12.5)
    assert read_tape(path)[-1] == line


def test_run_record_without_a_tape_starts_one_and_has_null_for_what_json_cannot_hold(path: Path):
    diverged = RunRecord(status="failed", startup_s=1.0, restarts={}, val={"val_loss": float("nan"), "val_acc": 0.5})
    append_run_record(path, diverged)
    assert read_tape(path)[0].record.val == {"val_loss": None, "val_acc": 0.5}
    append_run_record(path, RunRecord(status="failed", startup_s=1.0, restarts={}, val=None))
    assert read_tape(path)[1].record.val is None
