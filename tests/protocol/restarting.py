"""A `Pair` whose syncer can crash: a new `SyncerMachine` goes on from a snapshot, the tape, and what the learners hold."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Any

import msgspec

from lightning_diloco.protocol import actions as act
from lightning_diloco.protocol import events as ev
from lightning_diloco.protocol.history import History
from lightning_diloco.protocol.identity import Origin
from lightning_diloco.protocol.messages import Leave
from lightning_diloco.protocol.publisher import Current
from lightning_diloco.protocol.recovery import Resumption
from lightning_diloco.protocol.syncer import SyncerMachine
from lightning_diloco.protocol.wire import decode_learner_header, encode
from tests.protocol.pair import Pair
from tests.protocol.toy import Bag, Node, bag_crc

__all__ = ["RestartingPair"]


class RestartingPair(Pair):
    """Snapshots are taken when a test says so, and by every restart; a crash forgets all else that is not on the tape.

    `slow_disk`: a test performs `MakeDurable` itself, with `make_durable`.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.slow_disk = False
        self.snapshot: list[tuple[Current, Bag, Origin | None]] = []
        self._origins: tuple[Origin, ...] = ()
        self.values: list[Bag] = []
        self.leaves: dict[str, Leave] = {}
        self.now_s = 1e6  # as on a machine that has been up for days

    def heartbeat(self, node: Node) -> None:
        """A full report; a leave that was said is said again instead."""
        if node.nonce in self.leaves:
            self._send(node, self.leaves[node.nonce])
        else:
            super().heartbeat(node)

    def take_snapshot(self) -> None:
        """What the syncer holds now is on its disk."""
        currents = self.syncer.job.currents
        before = {(i, c.version): origin for i, (c, _, origin) in enumerate(self.snapshot)}
        origins = dict(enumerate(self._origins)) if self.syncer.job.is_recovering else {}
        self.snapshot = [
            (deepcopy(c), self.history[i][c.version], origins.get(i, before.get((i, c.version)))) for i, c in enumerate(currents)
        ]

    def crash(self, *, keeps_payloads: bool = True) -> None:
        """The syncer is killed, and another one starts; connections break. What a learner was sending is sent to the new one."""
        history = History(tuple(c.version for c, _, _ in self.snapshot))
        for record in self.tape:
            history.feed(record)
        currents = tuple(deepcopy(c) for c, _, _ in self.snapshot) or (None,) * self.num_fragments
        self.values = [values for _, values, _ in self.snapshot]
        resumption = Resumption(
            history=history,
            config=self.config,
            fingerprint="print",
            static_crc=0,
            static_bytes=self.static_bytes,
            currents=currents,
            origins=tuple(origin if c.version.epoch > history.epoch else None for c, _, origin in self.snapshot),
        )
        options = replace(self.syncer.job.options, epoch=max(history.epoch, self.syncer.job.epoch) + 1)
        self.syncer = SyncerMachine(options, resumption)
        self.folded, self.closing, self.is_writing = [[] for _ in range(self.num_fragments)], {}, False
        for node in self.nodes:
            node.control_down.clear()
            node.bulk_down.clear()
            kept = [item for item in node.bulk_up if item[0] == "contribution" and keeps_payloads]
            node.bulk_up.clear()
            node.bulk_up.extend(kept)

    def crash_before_the_founding(self) -> None:
        """There is nothing to go on with but the epoch."""
        self.syncer = SyncerMachine(replace(self.syncer.job.options, epoch=self.syncer.job.epoch + 1))
        for node in self.nodes:
            node.control_down.clear()
            node.bulk_up.clear()

    def make_durable(self) -> None:
        """The snapshot of the new epoch is written."""
        self.is_writing = False
        self.take_snapshot()
        self.take(ev.Durable())

    def restart(self, **options: Any) -> None:
        """Crash, and go through the whole recovery; every member says something, as its heartbeat would."""
        self.crash(**options)
        self.settle_all()
        self.advance(6.0)
        self.settle_all()
        assert not self.syncer.job.is_recovering

    def settle_all(self) -> None:
        """Everything arrives, after a report of everyone."""
        for node in self.nodes:
            if not node.is_dead and node.stage in ("joined", "leaving"):
                self.heartbeat(node)
        self.settle()

    def merge(self) -> None:
        """As in `Pair`; a syncer that recovers merges nothing."""
        super().merge()

    def write(self) -> None:
        """As in `Pair`, unless a test plays the disk."""
        if self.is_writing and not self.slow_disk:
            self.make_durable()

    def _perform_syncer(self, action: act.SyncerAction) -> None:
        if isinstance(action, act.MakeDurable):
            self.is_writing, self._origins = True, action.origins
            for i, current in enumerate(self.syncer.job.currents if self.syncer.job.is_recovering else ()):
                self.history[i] = {v: bag for v, bag in self.history[i].items() if v.epoch < current.version.epoch}
                self.history[i][current.version] = self.values[i]
        else:
            super()._perform_syncer(action)

    def _perform_learner(self, node: Node, action: act.LearnerAction) -> None:
        if isinstance(action, act.SendHeld):
            i = action.header.fragment_id
            header = msgspec.structs.replace(action.header, crc=action.header.crc or bag_crc(node.published[i]))
            node.bulk_up.append(("held", encode(self._envelope_up(node), header), node.published[i]))
        elif isinstance(action, act.DropPrepared):
            node.published[action.fragment_id] = node.base[action.fragment_id]
        elif isinstance(action, act.UnsayLeave):
            self.leaves.pop(node.nonce)
        elif isinstance(action, act.SendLeave):
            self.leaves.setdefault(node.nonce, Leave(reason=action.reason, report=node.machine.report()))
            self._send(node, self.leaves[node.nonce])
        elif isinstance(action, act.LeaveAgain):
            self.feed(node, ev.LeaveRequested(reason=action.reason))
        else:
            super()._perform_learner(node, action)

    def _adopt(self, node: Node, action: act.Adopt) -> None:
        before = node.base[action.fragment_id]
        super()._adopt(node, action)
        after = node.base[action.fragment_id]
        node.live[action.fragment_id] -= {atom for atom in before if not after[atom]}

    def deliver_bulk_up(self, node: Node, *, keep: bool = False, crc_ok: bool = True) -> None:
        """As in `Pair`; a version that was asked for is stored, then the machine hears of it."""
        kind, data, payload = node.bulk_up[0]
        if kind != "held":
            super().deliver_bulk_up(node, keep=keep, crc_ok=crc_ok)
            return
        if not keep:
            node.bulk_up.popleft()
        _, header = decode_learner_header(data)
        recovery = self.syncer.recovery
        if recovery is None or not recovery.expects(node.nonce, header.fragment_id, header.version):
            return
        is_right = crc_ok and bag_crc(payload) == header.crc
        if is_right:
            while len(self.values) <= header.fragment_id:
                self.values.append(payload)
            self.values[header.fragment_id] = payload
        self.take(ev.HeldArrived(session=node.nonce, header=header, crc_ok=is_right))
