"""Rejoin checkpoints as files: what is written is read again, the freshest is taken, and nothing that is damaged or another job's."""

from __future__ import annotations

import json
import logging
import random
import threading
import time
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open

from lightning_diloco.errors import RemoteProtocolError
from lightning_diloco.outer import buffer_of
from lightning_diloco.protocol.identity import Version
from lightning_diloco.runtime.rejoin import InnerState, RejoinFiles, pack, read_freshest, staging, unpack
from lightning_diloco.runtime.tensor_file import DTYPES, read_tensors

ADAMW = ("AdamW",)


def state(n: int, value: float = 1.0, fragment_id: int = 0, lineage: str = "ours", optimizers: tuple[str, ...] = ADAMW) -> InnerState:
    tensors = {"0/layer.weight/exp_avg": torch.full((3, 2), value), "0/layer.weight/step": torch.tensor(float(n))}
    return InnerState(
        lineage=lineage,
        optimizers=optimizers,
        fragment_id=fragment_id,
        version=Version(0, n),
        inner_step=7,
        numbers={"0/layer.weight/initial": 0.5, "0/layer.weight/none": None},
        tensors=tensors,
    )


def write(folder, learner_id: int, *states: InnerState) -> RejoinFiles:
    files = RejoinFiles(folder, learner_id)
    for item in states:
        files.write(item)
    files.close(removes=False)
    return files


def read(folder, learner_id: int = 1, num_fragments: int = 2) -> list[tuple[int, InnerState]]:
    return read_freshest(folder, learner_id, lineage="ours", optimizers=ADAMW, num_fragments=num_fragments)


def test_what_is_written_is_read_again(tmp_path):
    assert write(tmp_path, 1, state(4)).num_written == 1
    ((owner, found),) = read(tmp_path)
    assert owner == 1 and found.version == Version(0, 4) and found.inner_step == 7
    assert found.numbers == {"0/layer.weight/initial": 0.5, "0/layer.weight/none": None}
    assert {name: value.tolist() for name, value in found.tensors.items()} == {n: v.tolist() for n, v in state(4).tensors.items()}


def test_every_dtype_and_shape_can_be_saved_from_one_block(tmp_path):
    sizes = [(), (1,), (5,), (3, 2), (0,)]
    tensors = [torch.arange(max(1, torch.Size(s).numel()))[: torch.Size(s).numel()].reshape(s).to(d) for d in DTYPES for s in sizes]
    places, memory = staging(tensors, torch.empty(0, dtype=torch.uint8))
    for place, tensor in zip(places, tensors, strict=True):
        place.copy_(tensor)
    assert staging(tensors, memory)[1] is memory, "the block is used again"
    names = [f"0/w/{i}" for i in range(len(tensors))]
    item = InnerState(
        lineage="ours", optimizers=ADAMW, fragment_id=0, version=Version(0, 1), inner_step=1, tensors=dict(zip(names, places, strict=True))
    )
    write(tmp_path, 1, item)
    ((_, found),) = read(tmp_path)
    for name, tensor in zip(names, tensors, strict=True):
        assert found.tensors[name].dtype == tensor.dtype and found.tensors[name].shape == tensor.shape
        assert torch.equal(found.tensors[name], tensor)


def test_the_newest_version_is_taken_and_ones_own_of_two_equal_ones(tmp_path):
    write(tmp_path, 0, state(5, value=10.0), state(3, value=11.0, fragment_id=1))
    write(tmp_path, 1, state(5, value=20.0), state(2, value=21.0, fragment_id=1))
    write(tmp_path, 2, state(4, value=30.0))
    assert [(owner, found.fragment_id, found.version.n) for owner, found in read(tmp_path)] == [(1, 0, 5), (0, 1, 3)]
    assert [owner for owner, _ in read(tmp_path, learner_id=7)] == [0, 0], "a newcomer has the moments of those who are there"


def test_a_version_of_a_later_epoch_is_newer_though_its_number_is_smaller(tmp_path):
    """A syncer that started again may have gone back."""
    write(tmp_path, 0, state(500))
    write(tmp_path, 1, replace(state(481), version=Version(1, 481)))
    assert [(owner, found.version) for owner, found in read(tmp_path)] == [(1, Version(1, 481))]


def test_a_number_that_is_not_finite_is_left_out(tmp_path):
    write(tmp_path, 1, replace(state(1), numbers={"0/w/a": float("inf"), "0/w/b": 2, "0/w/c": float("nan")}))
    assert [found.numbers for _, found in read(tmp_path)] == [{"0/w/b": 2}]


def test_a_header_that_was_damaged_counts_as_none(tmp_path):
    write(tmp_path, 1, state(4))
    path = tmp_path / "learner_1" / "fragment_0000.safetensors"
    data = path.read_bytes()
    assert data.count(b"0.5") == 1
    path.write_bytes(data.replace(b"0.5", b"0.7"))
    assert read(tmp_path) == []


def test_files_of_another_job_or_optimizer_are_left_alone(tmp_path):
    write(tmp_path, 0, state(9, lineage="another"))
    write(tmp_path, 2, state(9, optimizers=("SGD",)))
    write(tmp_path, 1, state(2))
    assert [(owner, found.version.n) for owner, found in read(tmp_path)] == [(1, 2)]


def test_a_damaged_file_counts_as_none_and_an_older_whole_one_is_taken(tmp_path, caplog):
    write(tmp_path, 0, state(9))
    write(tmp_path, 2, state(8))
    write(tmp_path, 1, state(2))
    path = tmp_path / "learner_0" / "fragment_0000.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    cut = tmp_path / "learner_2" / "fragment_0000.safetensors"
    cut.write_bytes(cut.read_bytes()[:-9])
    assert [(owner, found.version.n) for owner, found in read(tmp_path)] == [(1, 2)]
    assert (
        "learner_0/fragment_0000.safetensors is not used: bad_checksum: an inner optimizer state does not have its checksum" in caplog.text
    )
    assert "learner_2/fragment_0000.safetensors is not used" in caplog.text


def sized(n: int, size: int, fragment_id: int = 0) -> InnerState:
    return replace(state(n, fragment_id=fragment_id), tensors={"0/w/exp_avg": torch.full((size,), float(n))})


def whole(found: InnerState) -> bool:
    return bool((found.tensors["0/w/exp_avg"] == float(found.version.n)).all())


def test_what_was_replaced_is_written_over_by_what_is_smaller_and_larger(tmp_path):
    sizes = [50_000, 100_000, 7, 80_000, 100_000, 3]
    files = RejoinFiles(tmp_path, 1)
    seen = []
    for n, size in enumerate(sizes, 1):
        files._write(sized(n, size, fragment_id=n % 2), None)
        ((_, found),) = [x for x in read(tmp_path) if x[1].fragment_id == n % 2]
        assert found.version.n == n and whole(found) and len(found.tensors["0/w/exp_avg"]) == size
        seen.append((tmp_path / "learner_1" / f"fragment_{n % 2:04d}.safetensors").stat().st_ino)
    files.close(removes=False)
    assert len(set(seen)) == 3, "two fragments, and one to write over"
    assert sorted(path.name for path in (tmp_path / "learner_1").glob("*.tmp")) == ["spare.tmp"]


@pytest.mark.parametrize("call", ["hardlink_to", "replace"])
def test_a_learner_that_is_killed_between_two_renames_has_one_of_two_whole_files(tmp_path, monkeypatch, call):
    class Killed(BaseException):
        pass

    def killed(*args):
        raise Killed

    files = RejoinFiles(tmp_path, 1)
    for n in (1, 2):
        files._write(sized(n, 1000), None)
    calls = []
    real = getattr(type(tmp_path), call)
    for number in (1, 2) if call == "replace" else (1,):
        # The first call of `replace` puts the new file into place, the second one keeps what it has replaced.
        calls.clear()
        monkeypatch.setattr(
            type(tmp_path), call, lambda *x, number=number: calls.append(x) or (killed() if len(calls) == number else real(*x))
        )
        with pytest.raises(Killed):
            files._write(sized(2 + number, 2000), None)
        monkeypatch.undo()
        ((_, found),) = read(tmp_path)
        assert found.version.n in (1 + number, 2 + number) and whole(found)
        for n in (5, 6, 7):
            RejoinFiles(tmp_path, 1)._write(sized(n * number, 1000 * n), None)
            ((_, found),) = read(tmp_path)
            assert found.version.n == n * number and whole(found)
        files._write(sized(2 + number, 10), None)


def test_a_file_system_without_second_names_has_whole_files_too(tmp_path, monkeypatch):
    def refused(*args):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(type(tmp_path), "hardlink_to", refused)
    write(tmp_path, 1, sized(1, 1000), sized(2, 500))
    ((_, found),) = read(tmp_path)
    assert found.version.n == 2 and whole(found)


def test_who_reads_while_it_is_written_gets_a_whole_state_or_none(tmp_path):
    """Two fragments of different sizes in turn, each written over what was the other one a moment ago."""
    stop = threading.Event()

    def keep_writing() -> None:
        files, n = RejoinFiles(tmp_path, 1), 0
        while not stop.wait(0.003):
            n += 1
            files._write(sized(n, 300_000 if n % 2 else 20_000, fragment_id=n % 2), None)

    thread = threading.Thread(target=keep_writing)
    thread.start()
    try:
        num_read, until_s = 0, time.monotonic() + 60
        while num_read < 30 and time.monotonic() < until_s:
            found = [state for _, state in read(tmp_path)]
            assert all(whole(state) for state in found)
            assert all(state.version.n % 2 == state.fragment_id for state in found)
            num_read += len(found)
    finally:
        stop.set()
        thread.join()
    assert num_read >= 30, "there is one again and again"


def test_a_disk_that_fails_is_told_once_and_ends_nothing(tmp_path, caplog):
    folder = tmp_path / "file"
    folder.write_text("in the way")
    with caplog.at_level(logging.ERROR):
        files = write(folder, 1, state(1), state(2))
    assert files.num_written == 0 and not files.is_busy
    assert len(caplog.records) == 1 and "could not be written" in caplog.text and "older inner optimizer state" in caplog.text


def test_a_learner_that_is_done_takes_its_files_along(tmp_path):
    write(tmp_path, 0, state(1))
    files = RejoinFiles(tmp_path, 1)
    files.write(state(1))
    files.close(removes=True)
    assert [path.name for path in tmp_path.iterdir()] == ["learner_0"]


def test_a_file_can_be_read_without_this_package(tmp_path):
    write(tmp_path, 1, state(4))
    with safe_open(tmp_path / "learner_1" / "fragment_0000.safetensors", "pt") as file:
        assert file.get_tensor("0/layer.weight/exp_avg").tolist() == [[1.0, 1.0]] * 3


# ---- over the network -----------------------------------------------------------------------------------------------------------


def test_what_is_packed_is_unpacked_with_every_dtype_and_shape():
    sizes = [(), (1,), (5,), (3, 2), (0,)]
    tensors = {f"0/w/{d}{s}": torch.arange(12)[: torch.Size(s).numel()].reshape(s).to(d) for d in DTYPES for s in sizes}
    found = unpack(buffer_of(pack(replace(state(4), tensors=tensors))))
    assert found.numbers == state(4).numbers and found.version == Version(0, 4)
    assert found.tensors.keys() == tensors.keys()
    assert all(found.tensors[n].dtype == t.dtype and torch.equal(found.tensors[n], t) for n, t in tensors.items())


def test_bytes_turned_cut_and_put_in_are_refused_and_nothing_else_happens():
    dice, whole = random.Random(3), bytes(buffer_of(pack(state(4))))
    start = 8 + int.from_bytes(whole[:8], "little")
    for _ in range(2000):
        data = bytearray(whole)
        for _ in range(dice.choice((1, 1, 2, 8))):
            data[dice.randrange(start if dice.random() < 0.9 else len(data))] = dice.choice((dice.randrange(256), *b'0192",:[]{}'))
        if dice.random() < 0.2:
            del data[dice.randrange(len(data)) :]
        # A space more or less in the header is no damage.
        if bytes(data).replace(b" ", b"") != whole.replace(b" ", b""):
            with pytest.raises(RemoteProtocolError):
                unpack(memoryview(data))
    assert unpack(memoryview(bytearray(whole))).version == Version(0, 4)


@pytest.mark.parametrize(
    "entry",
    [
        {"shape": [2**53, 2**53, 0], "data_offsets": [0, 0]},
        {"shape": [2**53], "data_offsets": [0, 2**53]},
        {"shape": [8], "data_offsets": [8, 0]},
        {"shape": [8], "data_offsets": [8, 16]},
        {"shape": [-8], "data_offsets": [0, 8]},
        {"shape": [1] * 70, "data_offsets": [0, 1]},
        {"shape": [4], "data_offsets": [0, 8]},
    ],
)
def test_a_place_that_is_none_is_refused(entry):
    text = json.dumps({"a": {"dtype": "U8", **entry}}).encode()
    text += b" " * (-len(text) % 8)
    with pytest.raises(ValueError, match="has dtype|is none"):
        read_tensors(memoryview(bytearray(len(text).to_bytes(8, "little") + text + bytes(8))))
