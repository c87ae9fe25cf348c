"""The file of recorded payloads on a real disk: what was written is read, a half-written end is cut off, damage is found."""

from __future__ import annotations

import errno
import logging
import os
import threading

import pytest

from lightning_diloco.runtime import payloads
from lightning_diloco.runtime.payloads import HEADER_BYTES, PayloadError, PayloadFile, PayloadKeeper, PayloadKey, PayloadWriter
from tests.runtime.job_helpers import until


def key(seq: int) -> PayloadKey:
    return PayloadKey(kind="contribution", fragment_id=3, learner_id=2**62, incarnation=1, seq=seq)


def payload(seq: int) -> bytes:
    return bytes(range(256)) * seq


def write(path, *seqs: int) -> list[int]:
    writer = PayloadWriter(path)
    offsets = [writer.append(key(seq), payload(seq)) for seq in seqs]
    writer.close()
    return offsets


def test_what_was_written_is_read_and_a_later_writer_goes_on(tmp_path):
    path = tmp_path / "payloads.bin"
    offsets = write(path, 1, 0, 5) + write(path, 2)
    file = PayloadFile(path)
    ends = []
    for at, seq in zip(offsets, (1, 0, 5, 2), strict=True):
        data, end = file.read(at, key(seq), 256 * seq)
        ends.append(end)
        assert data == payload(seq) and file.peek(at) == key(seq)
    assert ends == [*offsets[1:], path.stat().st_size] and file.peek(ends[-1]) is None
    file.close()


@pytest.mark.parametrize("left", [1, HEADER_BYTES - 1, HEADER_BYTES, HEADER_BYTES + 100])
def test_a_half_written_entry_is_cut_off(left, tmp_path):
    path = tmp_path / "payloads.bin"
    offsets = write(path, 1, 3)
    os.truncate(path, offsets[1] + left)
    assert write(path, 2) == [offsets[1]]
    assert path.stat().st_size == offsets[1] + HEADER_BYTES + 512
    assert PayloadFile(path).read(offsets[1], key(2), 512)[0] == payload(2)


def test_behind_a_damaged_header_nothing_is_cut_off(tmp_path, caplog):
    path = tmp_path / "payloads.bin"
    offsets, size = write(path, 1, 3, 2), path.stat().st_size
    with path.open("r+b") as file:
        file.seek(offsets[1] + 9)
        file.write(b"\xff")
    assert write(path, 4) == [size] and f"damaged at byte {offsets[1]}" in caplog.text
    assert PayloadFile(path).read(offsets[2], key(2), 512)[0] == payload(2)
    with pytest.raises(PayloadError, match=rf"byte {offsets[1]} \(contribution 3 of learner \d+ to fragment 3\): no payload begins here"):
        PayloadFile(path).read(offsets[1], key(3), 768)


@pytest.mark.parametrize(
    ("at", "asked", "num_bytes", "sentence"),
    [
        (0, key(2), 256, "contribution 1 of learner"),
        (0, key(1), 255, "has 256 bytes and should have 255"),
        (0, key(1), 257, "has 256 bytes and should have 257"),
        (5, key(1), 256, "no payload begins here"),
        (-1, key(1), 256, "cannot be read"),
        (10**9, key(1), 256, "no payload begins here"),
    ],
)
def test_what_is_not_there_is_named(at, asked, num_bytes, sentence, tmp_path):
    path = tmp_path / "payloads.bin"
    write(path, 1, 2)
    with pytest.raises(PayloadError, match=sentence) as caught:
        PayloadFile(path).read(at, asked, num_bytes)
    assert f"{path}, byte {at} ({asked})" in str(caught.value)


def test_a_length_that_is_not_there_costs_no_memory(tmp_path):
    path = tmp_path / "payloads.bin"
    path.write_bytes(payloads.pack_header(key(1), 2**50, 0) + b"x")
    with pytest.raises(PayloadError, match="the file ends inside of it"):
        PayloadFile(path).read(0, key(1), 2**50)


def test_a_disk_that_is_full_leaves_what_was_there_and_is_tried_again(tmp_path, monkeypatch):
    path = tmp_path / "payloads.bin"
    writer, real, calls = PayloadWriter(path), os.pwritev, []
    first = writer.append(key(1), payload(1))

    def full(fd, parts, at):
        calls.append(at)
        if len(calls) == 1:
            return real(fd, [memoryview(parts[0])[:10]], at)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(payloads.os, "pwritev", full)
    with pytest.raises(OSError, match="No space left"):
        writer.append(key(2), payload(2))
    assert path.stat().st_size == HEADER_BYTES + 256 and len(calls) == 2
    monkeypatch.setattr(payloads.os, "pwritev", real)
    second = writer.append(key(2), payload(2))
    writer.close()
    assert [PayloadFile(path).read(at, key(seq), 256 * seq)[0] for at, seq in ((first, 1), (second, 2))] == [payload(1), payload(2)]


def test_the_keeper_tells_offsets_in_order_on_the_loop_and_nothing_while_it_is_off(tmp_path):
    queue, told = [], []
    keeper = PayloadKeeper(tmp_path, on_loop=queue.append)
    assert keeper.put(key(1), memoryview(payload(1))) is None and keeper.put_founding([]) is None
    keeper.when_written(None, told.append)
    keeper.begin(False)
    keeper.close()
    assert told == [None] and not (tmp_path / "payloads.bin").exists()
    keeper.begin(True)
    for written in [keeper.put(key(seq), memoryview(payload(seq))) for seq in (1, 2, 3)]:
        keeper.when_written(written, told.append)
    until(lambda: len(queue) == 3)
    assert told == [None], "they are told by the loop"
    for work in queue:
        work()
    keeper.close()
    assert told[1:] == [0, HEADER_BYTES + 256, 2 * HEADER_BYTES + 768]
    assert not [t for t in threading.enumerate() if t.name.startswith("diloco-payloads")]


def test_a_folder_that_cannot_be_written_to_is_an_error_in_the_log_and_no_more(tmp_path, caplog):
    keeper = PayloadKeeper(tmp_path / "nowhere", on_loop=lambda work: work())
    keeper.begin(True)
    with caplog.at_level(logging.ERROR):
        assert keeper.put_founding([(key(1), payload(1))]) is None
        assert [keeper.put(key(seq), memoryview(b"x")).result() for seq in (2, 3)] == [None, None]
        keeper.close()
    assert caplog.text.count("could not be written") == 1 and "lacks 3 payloads" in caplog.text
