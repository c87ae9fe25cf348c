"""Snapshots on a real disk: whole or not at all, the last two kept, damage found, the one before used."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lightning_diloco.config import SyncConfig
from lightning_diloco.outer import FragmentState, pack_static, plan_layout
from lightning_diloco.protocol.identity import MergedThrough, Origin, Version
from lightning_diloco.runtime import snapshot
from lightning_diloco.runtime.checksum import crc32
from lightning_diloco.runtime.snapshot import Founding, FragmentSnapshot, Identity, SnapshotError, SnapshotStore

ONE, TWO = (1000,), (1000, 1000)


def fragment(n: int, size: int = 1000, epoch: int = 0) -> FragmentSnapshot:
    values = torch.randn(3, size, generator=torch.Generator().manual_seed(n))
    state = FragmentState(theta=values[0], momentum=values[1], shadow=values[2], ahead=0.25, merge_index=n)
    return FragmentSnapshot(state=state, version=Version(epoch, n), crc=crc32(values[2]), merged_through={3: MergedThrough(n, 10 * n)})


def asks(*versions: int) -> list[Callable[[], FragmentSnapshot]]:
    return [lambda n=n: fragment(n) for n in versions]


def same(a: FragmentSnapshot | None, b: FragmentSnapshot) -> bool:
    assert a is not None
    tensors = all(torch.equal(getattr(a.state, x), getattr(b.state, x)) for x in ("theta", "momentum", "shadow"))
    rest = (a.version, a.crc, a.merged_through, a.state.ahead, a.state.merge_index)
    return tensors and rest == (b.version, b.crc, b.merged_through, b.state.ahead, b.state.merge_index)


def test_what_was_written_is_read_bit_for_bit_and_is_a_safetensors_file(tmp_path):
    path = SnapshotStore(tmp_path).write(asks(4, 7))
    first, second = SnapshotStore(tmp_path).read(TWO)
    assert same(first, fragment(4)) and same(second, fragment(7))
    tensors = load_file(path / "fragment_0001.safetensors")
    assert torch.equal(tensors["momentum"], fragment(7).state.momentum)


@pytest.mark.parametrize(
    "origin", [None, Origin(version=Version(0, 4), momentum=None, is_recalled=True), Origin(version=Version(2, 4), momentum=Version(0, 1))]
)
def test_what_a_fragment_was_before_a_restart_is_kept_with_it(origin, tmp_path):
    SnapshotStore(tmp_path).write([lambda: replace(fragment(4, epoch=3), origin=origin)])
    (found,) = SnapshotStore(tmp_path).read(ONE)
    assert found is not None and found.origin == origin and same(found, fragment(4, epoch=3))


def test_the_last_two_are_kept_and_what_did_not_change_is_written_twice_at_most(tmp_path, monkeypatch):
    store, real, written = SnapshotStore(tmp_path), snapshot.write_tensors, []

    def write_tensors(path, *arguments, **options):
        written.append(path.name[:13])
        return real(path, *arguments, **options)

    monkeypatch.setattr(snapshot, "write_tensors", write_tensors)
    paths = [store.write(asks(n, 1)) for n in range(1, 6)]
    assert [path.exists() for path in paths] == [False, False, False, True, True]
    assert (written.count("fragment_0000"), written.count("fragment_0001")) == (5, 2)
    assert same(SnapshotStore(tmp_path).read(TWO)[1], fragment(1))


@pytest.mark.parametrize("num_snapshots", [2, 3, 4])
@pytest.mark.parametrize("fragment_id", [0, 1])
def test_damage_to_a_fragment_that_did_not_change_leaves_the_snapshot_before_whole(tmp_path, num_snapshots, fragment_id, caplog):
    store = SnapshotStore(tmp_path)
    paths = [store.write(asks(n, 1)) for n in range(1, num_snapshots + 1)]
    with (paths[-1] / f"fragment_{fragment_id:04d}.safetensors").open("r+b") as file:
        file.seek(-5, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-5, os.SEEK_END)
        file.write(bytes([byte ^ 1]))  # in place: whoever else has this file has the damage
    first, second = SnapshotStore(tmp_path).read(TWO)
    assert same(first, fragment(num_snapshots - 1)) and same(second, fragment(1))
    assert caplog.text.count("The snapshot before it is used.") == 1


def test_a_fragment_of_the_same_number_and_another_epoch_is_written(tmp_path):
    store = SnapshotStore(tmp_path)
    store.write([lambda: fragment(5)])
    store.write([lambda: fragment(5, epoch=1)])
    (found,) = SnapshotStore(tmp_path).read(ONE)
    assert found is not None and found.version == Version(1, 5)


@pytest.mark.parametrize("where", ["manifest", "half", "bit", "gone"])
def test_a_damaged_snapshot_is_found_and_the_one_before_used(tmp_path, where, caplog):
    store = SnapshotStore(tmp_path)
    store.write(asks(1))
    path = store.write(asks(2))
    file = path / ("manifest.json" if where == "manifest" else "fragment_0000.safetensors")
    data = bytearray(file.read_bytes())
    if where == "bit":
        data[-5] ^= 1
    file.write_bytes(data[: len(data) // 2] if where in ("half", "manifest") else data)
    if where == "gone":
        file.unlink()
    (found,) = SnapshotStore(tmp_path).read(ONE)
    assert same(found, fragment(1))
    assert str(path) in caplog.text and "The snapshot before it is used." in caplog.text


def test_a_snapshot_of_another_layout_is_not_used(tmp_path, caplog):
    store = SnapshotStore(tmp_path)
    store.write(asks(1))
    assert store.read((999,)) == [None] and "999 elements" in caplog.text


def test_without_any_snapshot_nothing_is_known(tmp_path):
    assert SnapshotStore(tmp_path).read(TWO) == [None, None]
    assert SnapshotStore(tmp_path).read_identity() is None and SnapshotStore(tmp_path).read_founding() is None


def test_a_disk_that_is_full_leaves_what_was_there(tmp_path, monkeypatch):
    store = SnapshotStore(tmp_path)
    store.write(asks(1, 1))
    real, count = os.write, [0]

    def full(fd: int, data: memoryview) -> int:
        count[0] += 1
        if count[0] > 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, data[: len(data) // 2 + 1])

    monkeypatch.setattr(snapshot.os, "write", full)
    with pytest.raises(OSError, match="No space left"):
        store.write(asks(2, 2))
    monkeypatch.undo()
    assert sorted(p.name for p in store.folder.iterdir()) == ["00000001"]
    assert same(SnapshotStore(tmp_path).read(TWO)[0], fragment(1))
    store.write(asks(3, 1))
    assert same(SnapshotStore(tmp_path).read(TWO)[0], fragment(3)), "the disk has room again"


def test_a_snapshot_that_was_cut_off_by_a_crash_is_not_there(tmp_path):
    store = SnapshotStore(tmp_path)
    store.write(asks(1))
    (store.folder / ".00000002").mkdir()
    (store.folder / ".00000002" / "fragment_0000.safetensors").write_bytes(b"half")
    assert same(SnapshotStore(tmp_path).read(ONE)[0], fragment(1))
    SnapshotStore(tmp_path).write(asks(2))
    assert same(SnapshotStore(tmp_path).read(ONE)[0], fragment(2))


def test_identity_and_founding_come_back(tmp_path):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    model[0].weight.requires_grad_(False)
    config = SyncConfig(num_fragments=2, outer_lr=0.3)
    layout = plan_layout(model, num_fragments=2, merge=config.merge, mean_patterns=config.mean_patterns)
    founding = Founding(config=config, fingerprint=layout.fingerprint(), layout=layout, static=pack_static(model, layout))
    identity = Identity(job_id="job", lineage="line", epoch=3, started_unix_s=1.5)
    store = SnapshotStore(tmp_path)
    store.write_identity(identity)
    store.write_founding(founding)
    found = SnapshotStore(tmp_path).read_founding()
    assert SnapshotStore(tmp_path).read_identity() == identity
    assert found is not None and found.config == config and found.layout == layout and torch.equal(found.static, founding.static)


@pytest.mark.parametrize("name", ["identity.json", "founding.json"])
@pytest.mark.parametrize("data", [b"{", b"[]", b'{"schema": 1}', b'{"schema": 9}'])
def test_a_damaged_description_is_a_sentence(tmp_path, name, data):
    store = SnapshotStore(tmp_path)
    store.folder.mkdir()
    (store.folder / "static.bin").write_bytes(b"")
    (store.folder / name).write_bytes(data)
    with pytest.raises(SnapshotError, match=name):
        (store.read_identity if name == "identity.json" else store.read_founding)()


def test_static_state_with_another_checksum_is_refused(tmp_path):
    model = nn.Linear(2, 2)
    layout = plan_layout(model, num_fragments=1, merge="rda", mean_patterns=())
    store = SnapshotStore(tmp_path)
    store.write_founding(Founding(config=SyncConfig(), fingerprint="x", layout=layout, static=torch.ones(8, dtype=torch.uint8)))
    (store.folder / "static.bin").write_bytes(b"12345678")
    with pytest.raises(SnapshotError, match="checksum"):
        store.read_founding()
    assert json.loads((store.folder / "founding.json").read_text())["static_bytes"] == 8


def test_the_folder_is_as_the_module_says(tmp_path: Path):
    store = SnapshotStore(tmp_path)
    store.write_identity(Identity(job_id="a", lineage="b", epoch=0, started_unix_s=0.0))
    store.write(asks(1))
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()) == [
        "snapshots/00000001/fragment_0000.safetensors",
        "snapshots/00000001/manifest.json",
        "snapshots/identity.json",
    ]
