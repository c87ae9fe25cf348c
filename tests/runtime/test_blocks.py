"""Blocks of bytes: lent to whoever holds a view, kept in proportion to what is used, never written to while somebody reads."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from lightning_diloco.config import SyncConfig
from lightning_diloco.outer import buffer_of, encode, encode_full, encode_publication, plan_layout
from lightning_diloco.runtime.blocks import RECENT, Blocks
from lightning_diloco.runtime.checksum import crc32
from lightning_diloco.runtime.global_state import MomentumTracker
from lightning_diloco.runtime.learner_store import LearnerStore, Receive
from lightning_diloco.runtime.payloads import PAYLOADS_NAME, PayloadFile, PayloadKeeper, PayloadKey
from lightning_diloco.runtime.store import SyncerStore
from lightning_diloco.runtime.transport import SYNCER
from lightning_diloco.runtime.transport.frames import CHUNK_BYTES
from lightning_diloco.runtime.transport.peers import KEEP_S
from tests.runtime.transport_helpers import Pair, make_bytes

SIZE = 3 * CHUNK_BYTES + 5


def address(view):
    return torch.frombuffer(view, dtype=torch.uint8).data_ptr()


@pytest.mark.parametrize("size", [1, 100, 1 << 16, SIZE])
def test_a_view_is_bytes_that_can_be_written_and_come_again(size):
    blocks = Blocks()
    view = blocks.view(size)
    assert (view.nbytes, view.format, view.readonly, view.contiguous) == (size, "B", False, True)
    view[:] = bytes(size)
    first = address(view)
    assert first % 16 == 0 and blocks.used_bytes == size
    del view
    assert (blocks.used_bytes, blocks.free_bytes) == (0, size)
    assert address(blocks.view(size)) == first


@pytest.mark.parametrize(
    "hold", [lambda v: v[7:9], lambda v: torch.frombuffer(v, dtype=torch.uint8)[3:], lambda v: v.cast("c"), lambda v: v.toreadonly()]
)
def test_whatever_refers_to_a_block_holds_it(hold):
    blocks = Blocks()
    view = blocks.view(SIZE)
    first = address(view)
    held = hold(view)
    del view
    assert (blocks.used_bytes, blocks.free_bytes) == (SIZE, 0)
    assert address(other := blocks.view(SIZE)) != first
    del held
    assert blocks.used_bytes == SIZE and blocks.free_bytes == SIZE
    del other


def test_used_and_free_are_never_more_than_was_used_at_once_of_late():
    blocks = Blocks()
    held = [blocks.view(1000) for _ in range(8)]
    held.clear()
    assert blocks.free_bytes == 8000
    for _ in range(RECENT - 1):
        blocks.view(1000)
    assert blocks.free_bytes == 8000
    for _ in range(2):
        blocks.view(1000)
    assert blocks.free_bytes == 1000, "what was used long ago is not kept"
    blocks.view(100_000)
    assert blocks.free_bytes == 101_000 - 1000, "of two sizes the one that was not used is freed first"
    blocks.trim()
    assert (blocks.free_bytes, blocks.used_bytes) == (0, 0)


def test_what_is_not_there_is_an_error_and_no_block():
    blocks = Blocks()
    for size in (1 << 60, (1 << 63) - 1):
        with pytest.raises(MemoryError, match=str(size)):
            blocks.view(size)
    assert blocks.used_bytes == blocks.free_bytes == 0


# ---- payloads -------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def pair():
    pair = Pair("tcp")
    pair.meet()
    yield pair
    pair.close()


def send(pair, payload):
    """From the learner to the syncer; what arrived, held by nobody else."""
    pair.learner.send_payload(SYNCER, b"head", payload)
    pair.until(lambda: bool(pair.received()) and bool(pair.delivered()))
    (event,) = pair.received()
    pair.syncer_events.clear()
    pair.learner_events.clear()
    return event.payload


def test_a_payload_that_somebody_holds_stays_as_it_is_and_the_others_take_turns(pair):
    held, addresses = send(pair, make_bytes(SIZE, 0)), set()
    for seed in range(1, 6):
        payload = send(pair, make_bytes(SIZE, seed))
        assert payload == make_bytes(SIZE, seed)
        addresses.add(address(payload))
        del payload
    assert held == make_bytes(SIZE, 0)
    assert len(addresses) == 1 and address(held) not in addresses
    assert pair.syncer._incoming.buffers.used_bytes == SIZE


def test_memory_that_is_kept_for_nobody_goes_back(pair):
    del pair.syncer_events[:]
    send(pair, make_bytes(SIZE))
    buffers = pair.syncer._incoming.buffers
    assert buffers.free_bytes == SIZE
    pair.syncer._incoming.expire(time.monotonic() + KEEP_S - 5.0)
    assert buffers.free_bytes == SIZE
    pair.syncer._incoming.expire(time.monotonic() + KEEP_S + 5.0)
    assert buffers.free_bytes == 0


@pytest.mark.parametrize("is_cancelled", [False, True])
def test_what_is_sent_without_a_copy_is_held_until_it_has_left(pair, is_cancelled):
    blocks = Blocks()
    view = blocks.view(20 * CHUNK_BYTES)
    view[:] = make_bytes(20 * CHUNK_BYTES)
    transfer_id = pair.learner.send_payload(SYNCER, b"head", view)
    del view
    pair.until(lambda: pair.learner.stats.bytes_up >= 2 * CHUNK_BYTES)
    assert blocks.used_bytes == 20 * CHUNK_BYTES
    if is_cancelled:
        pair.learner.cancel(SYNCER, transfer_id)
    else:
        pair.until(lambda: bool(pair.received()))
        assert pair.received()[0].payload == make_bytes(20 * CHUNK_BYTES)
    # pyzmq lets go on a thread of its own.
    pair.until(lambda: blocks.used_bytes == 0)
    assert blocks.free_bytes == 20 * CHUNK_BYTES


def test_a_payload_that_waits_for_the_disk_is_not_written_to(tmp_path):
    blocks, is_blocked, tasks = Blocks(), threading.Event(), []
    keeper = PayloadKeeper(tmp_path, on_loop=tasks.append)
    keeper.begin(True)
    assert keeper._thread is not None
    keeper._thread.submit(is_blocked.wait)
    keys = [PayloadKey(kind="contribution", seq=seq) for seq in range(5)]
    written = []
    for key in keys:
        view = blocks.view(SIZE)
        view[:] = make_bytes(SIZE, key.seq)
        written.append(keeper.put(key, view))
        del view
    assert blocks.used_bytes == 5 * SIZE
    is_blocked.set()
    offsets = [future.result(10.0) for future in written]
    keeper.close()
    del written
    file = PayloadFile(tmp_path / PAYLOADS_NAME)
    assert all(file.read(at, key, SIZE)[0] == make_bytes(SIZE, key.seq) for at, key in zip(offsets, keys, strict=True))
    file.close()
    assert blocks.used_bytes == 0


MODULE = torch.nn.Linear(300, 300, bias=False)
LAYOUT = plan_layout(MODULE, num_fragments=1, merge="rda", mean_patterns=())


def store_and_payloads(wire):
    config = SyncConfig(num_fragments=1, sync_interval_steps=24, wire_dtype=wire)
    store, random = SyncerStore(LAYOUT, config), torch.Generator().manual_seed(0)
    founded = torch.randn(LAYOUT.num_params, generator=random)
    store.found_fragment(0, "values", buffer_of(founded), crc32(founded))
    return store, [bytes(buffer_of(encode(torch.randn(LAYOUT.num_params, generator=random), wire))) for _ in range(5)]


@pytest.mark.parametrize("wire", ["fp32", "bf16", "int4"])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_merge_holds_the_payloads_that_it_has_not_added(wire, count):
    blocks, (store, payloads), (untouched, _) = Blocks(), store_and_payloads(wire), store_and_payloads(wire)
    for n, payload in enumerate(payloads[:count]):
        view = blocks.view(len(payload))
        view[:] = payload
        store.fold(0, store.measure_contribution(0, view, crc32(payload)), 1.0 + n)
        untouched.fold(0, untouched.measure_contribution(0, memoryview(payload), crc32(payload)), 1.0 + n)
        del view
        # The next payload arrives: in memory that nobody needs any more.
        blocks.view(len(payload))[:] = bytes(len(payload))
    assert blocks.used_bytes < 4 * LAYOUT.num_params or count == 1
    closed = store.close(0, 1)
    assert closed.crc == crc32(closed.shadow) == untouched.close(0, 1).crc
    del closed
    assert blocks.used_bytes == 0


@pytest.mark.parametrize("wire", ["fp32", "bf16", "int4"])
@pytest.mark.parametrize("is_full", [False, True])
def test_a_version_that_waits_for_its_adoption_is_not_written_to(wire, is_full):
    blocks, config = Blocks(), SyncConfig(num_fragments=1, sync_interval_steps=24, wire_dtype=wire)
    store = LearnerStore(MODULE, LAYOUT, config, momentum=MomentumTracker(LAYOUT, config, is_on=False))
    base = store.found(0, 0)
    payload, new = encode_publication(base + 1e-3, base, wire)
    payload = encode_full(new) if is_full else payload
    view = blocks.view(payload.numel())
    view[:] = buffer_of(payload)
    job = Receive(fragment_id=0, n=1, crc=crc32(new), is_full=is_full, base=base, with_contribution=0)
    received = store.receive(job, view)
    assert received is not None
    del view
    for _ in range(2):
        blocks.view(payload.numel())[:] = bytes(payload.numel())
    assert torch.equal(received.adoption.published, new)
    assert torch.equal(torch.cat(list(received.adoption.delta_views)), new - base)


@pytest.mark.parametrize("parts", [("values",), ("values", "momentum")])
def test_the_founded_model_lies_in_blocks_that_go_back_when_merges_have_replaced_it(parts):
    """In memory of malloc's it left holes: 6 bytes per parameter of a syncer, for as long as it ran."""
    config, size = SyncConfig(num_fragments=1), LAYOUT.num_params
    store = SyncerStore(LAYOUT, config, has_momentum=len(parts) == 2)
    founded = torch.randn(size)
    for part in parts:
        store.found_fragment(0, part, buffer_of(founded), crc32(founded))
    state = store.state(0)
    assert torch.equal(state.theta, founded) and torch.equal(state.momentum, founded if len(parts) == 2 else torch.zeros(size))
    assert store._memory.used_bytes == 2 * 4 * size, "Theta, which is the shadow too, and the momentum"
    del state
    payload = encode(1e-3 * torch.randn(size), config.wire_dtype)
    store.fold(0, store.measure_contribution(0, buffer_of(payload), crc32(payload)), 1.0)
    store.close(0, 1)
    assert store._memory.used_bytes == 3 * 4 * size, "of the new state alone"
