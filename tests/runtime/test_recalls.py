"""A syncer that starts again asks a member for versions over the real transport: lost words, slow payloads, what the log says."""

from __future__ import annotations

import logging
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from lightning_diloco.outer import buffer_of
from lightning_diloco.protocol import recalling
from lightning_diloco.protocol.events import HeldMoves
from lightning_diloco.protocol.identity import Version
from lightning_diloco.protocol.messages import HeldFragment, Ready, Recall, Welcome
from lightning_diloco.protocol.recalling import Unmet
from lightning_diloco.runtime import recovery_watch
from lightning_diloco.runtime.checksum import crc32
from lightning_diloco.runtime.recovery_watch import LOOK_S, RecoveryWatch
from lightning_diloco.runtime.store import SyncerStore
from lightning_diloco.runtime.transport.frames import Begin, Chunk
from tests.runtime.job_helpers import CONFIG, Job, running_job, until
from tests.runtime.job_raw_peer import RawPeer
from tests.runtime.test_founding_again import make, send_founding_state
from tests.runtime.transport_link import CHUNK, Link

NEWER = Version(0, 7)
"""What the member holds; the snapshot is that of the founding."""


@contextmanager
def resumed(tmp_path: Path) -> Iterator[tuple[Job, RawPeer]]:
    """The next syncer of a job whose only member is ahead of the snapshot, and that member, which has said so."""
    (tmp_path / "before").mkdir()
    with running_job(tmp_path / "before") as before, RawPeer(before.endpoint, make(), CONFIG, before.context) as peer:
        send_founding_state(peer)
        peer.hear(Welcome, role="member")
        peer.say(Ready())
        envelope = peer.envelope
        until(lambda: peer.poll() or b'"join"' in (tmp_path / "before" / "tape.jsonl").read_bytes())
        until(lambda: any((tmp_path / "before" / "snapshots").glob("0*/manifest.json")))
        # What a syncer that is killed at this moment leaves.
        shutil.copytree(tmp_path / "before", tmp_path / "run", ignore=shutil.ignore_patterns("*.tmp"))
    with running_job(tmp_path / "run", resume=True) as job, RawPeer(job.endpoint, make(), CONFIG, job.context, nonce=peer.nonce) as again:
        again.envelope = envelope
        again.hello(learner_id=0, lineage=envelope.lineage, versions=(NEWER,) * 4)
        yield job, again


def give(peer: RawPeer, fragment_id: int) -> str | None:
    """Offer a fragment's values; returns how that ended (None: they are there)."""
    values = torch.full((peer.layout.fragment_sizes[fragment_id],), 3.0)
    header = HeldFragment(fragment_id=fragment_id, version=NEWER, crc=crc32(values), merged_through={})
    return peer.end_of(peer.offer(header, buffer_of(values)))


def test_a_recall_that_did_not_reach_its_learner_is_said_again_and_the_log_says_what_is_awaited(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(recalling, "AGAIN_S", 0.3)
    monkeypatch.setattr(recovery_watch, "COMPLAIN_S", 0.5)
    with caplog.at_level(logging.WARNING), resumed(tmp_path) as (job, peer):
        for _ in range(3):  # the first two are lost
            asked = [peer.hear(Recall, fragment_id=p) for p in range(4)]
        until(lambda: "fragments [0, 1, 2, 3] have to come from learners [0]" in caplog.text)
        peer.transport.connect_bulk(asked[0].shards[0].bulk_endpoint)
        assert [give(peer, p) for p in range(4)] == [None] * 4
        peer.hear(Welcome, role="resumed")
        assert [c.version for c in job.machine.job.currents] == [Version(1, 7)] * 4


def test_a_copy_of_a_version_that_is_being_looked_at_is_not_taken(tmp_path, monkeypatch):
    looks, may_look, look = threading.Event(), threading.Event(), SyncerStore.recalled

    def slowly(self: SyncerStore, *payload: Any) -> Any:
        looks.set()
        assert may_look.wait(20)
        return look(self, *payload)

    monkeypatch.setattr(SyncerStore, "recalled", slowly)
    with resumed(tmp_path) as (_, peer):
        peer.transport.connect_bulk(peer.hear(Recall, fragment_id=0).shards[0].bulk_endpoint)
        assert give(peer, 0) is None and looks.wait(20)
        ends = [give(peer, 0), give(peer, 1)]
        may_look.set()
        assert ends == ["refused", None]
        assert [give(peer, p) for p in (2, 3)] == [None, None]
        peer.hear(Welcome, role="resumed")


def test_progress_is_how_much_of_which_payload_is_here():
    link = Link(0)
    assert link.receiver.progress is None
    payload = bytes(2 * CHUNK)
    begin = Begin(5, 1, b"", len(payload), 2, crc32(payload))
    for _ in range(2):  # offered again, nothing has moved
        link.receiver.on_begin(begin, 0.0)
        assert link.receiver.progress == (5, 0)
    link.receiver.on_chunk(Chunk(5, 0), memoryview(payload)[:CHUNK], 0.0)
    assert link.receiver.progress == (5, 1)
    link.receiver.on_chunk(Chunk(5, 1), memoryview(payload)[:CHUNK], 0.0)
    assert link.receiver.progress is None


class Watched:
    """A recovery that waits for one learner, and a transport that says how far its payload is."""

    def __init__(self) -> None:
        self.progress: tuple[int, int] | None = None
        self.recalls = SimpleNamespace(sessions=["aa"], unmet=[], missing=(), awaited={3: (7,)})
        machine: Any = SimpleNamespace(recovery=SimpleNamespace(recalls=self.recalls, is_running=True))
        transport: Any = SimpleNamespace(incoming_progress=lambda peer: self.progress if peer == b"\xaa" else None)
        self.moves: list[str] = []
        self.watch = RecoveryWatch(
            machine, transport, lambda event: self.moves.append(event.session) if isinstance(event, HeldMoves) else None
        )
        self._now_s = 0.0

    def look(self, progress: tuple[int, int] | None) -> int:
        """A second later the transport says this; returns how often the rules have been told of progress so far."""
        self.progress, self._now_s = progress, self._now_s + LOOK_S
        self.watch.tick(self._now_s)
        return len(self.moves)


def test_the_rules_are_told_when_more_of_a_payload_has_come_and_only_then():
    watched = Watched()
    assert [watched.look(p) for p in (None, (1, 0), (1, 0), (1, 4), (1, 4), None, (2, 0), (2, 0))] == [0, 1, 1, 2, 2, 2, 3, 3]


def test_what_did_not_come_is_in_the_log_once(caplog):
    watched, why = Watched(), "nothing came of it for 600 s"
    watched.recalls.unmet.append(Unmet(3, 7, Version(0, 5), why))
    watched.look(None)
    watched.look(None)
    assert caplog.text.count(f"Version 5 of fragment 3 did not come from learner 7: {why}. Another learner's, or an older one") == 1
