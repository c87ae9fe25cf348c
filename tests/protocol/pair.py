"""One real `SyncerMachine` and several real `LearnerMachine`s, joined by a fake link under explicit control, on an exact toy model.

The link has four queues per process: control and bulk, up and down. Each keeps its order, none knows of the others; a test delivers,
drops or duplicates their heads. Every message goes through the wire format on its way.

The model: an inner step of learner m makes one *atom*, a value that is unlike all others. A fragment of a learner is a bag of atoms with
integer coefficients, the pseudo-gradient is a difference of bags, merging is adding. "The work is in the model exactly once" is then
"the atom's coefficient in the shadow is 1", and "theta = base + local progress that is not merged" is an equation of bags. `check`
states the invariants of PROTOCOL.md section 13; `Pair` calls it after every event.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from typing import Any

from lightning_diloco.config import SyncConfig
from lightning_diloco.protocol import actions as act
from lightning_diloco.protocol import events as ev
from lightning_diloco.protocol.identity import FragmentInfo, Version
from lightning_diloco.protocol.job import JobOptions
from lightning_diloco.protocol.learner import LearnerMachine, LearnerOptions
from lightning_diloco.protocol.messages import Envelope, Found, Leave, Publication, SendState, StaticState
from lightning_diloco.protocol.records import Record
from lightning_diloco.protocol.syncer import SyncerMachine
from lightning_diloco.protocol.wire import decode_from_learner, decode_from_syncer, decode_learner_header, decode_syncer_header, encode
from tests.protocol.invariants import check_learner, check_syncer
from tests.protocol.readings import Readings
from tests.protocol.toy import TOKENS, Bag, Node, bag_crc, bag_sum, check_members

__all__ = ["TOKENS", "Bag", "Node", "Pair"]


class Pair(Readings):
    """The whole job in one process.

    Args:
        num_fragments: P.
        options: fields of `JobOptions`.
        config: fields of `SyncConfig`.
    """

    def __init__(self, *, num_fragments: int = 2, options: dict[str, Any] | None = None, **config: Any) -> None:
        self.config = SyncConfig(**{"num_fragments": num_fragments, "sync_interval_steps": 4, "grace_fraction": 0.0, **config})
        self.syncer = SyncerMachine(JobOptions(**{"job_id": "job", "lineage": "first", **(options or {})}))
        self.num_fragments = num_fragments
        self.now_s = 100.0
        self.nodes: list[Node] = []
        self.tape: list[Record] = []
        self.history: list[dict[Version, Bag]] = [{} for _ in range(num_fragments)]
        self.folded: list[list[Bag]] = [[] for _ in range(num_fragments)]
        self.closing: dict[int, tuple[act.Close, list[Bag]]] = {}
        self.manual_merge = False
        self.manual_encode = False
        self.static_bytes = 0
        self.is_writing = False
        self.ended: act.Ended | None = None
        self.tokens_of: dict[int, tuple[int, int]] = {}
        self._atoms = itertools.count(1)
        self._nonces = itertools.count(1)
        self._waiting: Bag | None = None

    def add(self, learner_id: int | None = None, *, joins: bool = True, **options: Any) -> Node:
        """Start a process; by default its join runs to the end."""
        nonce = f"{next(self._nonces):02x}"
        fields = {"fingerprint": "print", "config": json.dumps(self.config.as_dict()).encode(), "adopt": self.config.adopt}
        machine = LearnerMachine(
            LearnerOptions(**{"nonce": nonce, "num_fragments": self.num_fragments, "learner_id": learner_id, **fields, **options})
        )
        empty = lambda: [Counter() for _ in range(self.num_fragments)]  # noqa: E731
        node = Node(machine, nonce, empty(), empty(), empty(), [set() for _ in range(self.num_fragments)])
        self.nodes.append(node)
        if joins:
            self.hello(node)
            self.settle()
        return node

    def found(self, count: int, **options: Any) -> list[Node]:
        """That many learners, the first of which founds."""
        return [self.add(i, **options) for i in range(count)]

    def hello(self, node: Node) -> None:
        """The process says hello (for the first time, or again)."""
        self.feed(node, ev.JoinRequested())

    def kill(self, node: Node) -> None:
        """The process is gone; what it has sent is still on its way."""
        node.is_dead = True
        node.control_down.clear()
        node.bulk_down.clear()

    def reconnect(self, node: Node) -> None:
        """The control connection breaks, what is on it is lost, and the process says hello again."""
        node.control_up.clear()
        node.control_down.clear()
        self.hello(node)

    def step(self, node: Node, tokens: int = TOKENS, *, nan: bool = False, loud: bool = False) -> None:
        """One inner step: a new atom in every fragment, then the boundary."""
        atom = next(self._atoms)
        self.tokens_of[atom] = (node.learner_id, tokens)
        node.made.add(atom)
        for fragment_id in range(self.num_fragments):
            node.theta[fragment_id] = bag_sum((1, node.theta[fragment_id]), (1, Counter({atom: 1})))
            node.live[fragment_id].add(atom)
            if nan:
                node.poisoned.add(fragment_id)
            if loud:
                node.loud.add(fragment_id)
        self.feed(node, ev.Boundary(tokens=tokens))

    def steps(self, nodes: list[Node], count: int, dt_s: float = 1.0) -> None:
        """Rounds of one step each, everything delivered in between."""
        for _ in range(count):
            for node in nodes:
                self.step(node)
            self.advance(dt_s)
            self.settle()

    def heartbeat(self, node: Node) -> None:
        """A full report."""
        self._send(node, node.machine.report())

    def leave(self, node: Node, reason: str = "limit") -> None:
        """The process ends in order."""
        self.feed(node, ev.LeaveRequested(reason=reason))

    def feed(self, node: Node, event: Any) -> None:
        """One event for one learner."""
        if node.is_dead:
            return
        for action in node.machine.handle(event, self.now_s):
            self._perform_learner(node, action)
        if not self.manual_encode:
            self.encode(node)
        check_learner(self, node)

    def encode(self, node: Node) -> None:
        """The background thread encodes what was copied aside."""
        while node.to_encode:
            snapshot = node.to_encode.popleft()
            bag, _, _ = node.payloads[snapshot.fragment_id, snapshot.seq]
            self.feed(node, ev.Encoded(fragment_id=snapshot.fragment_id, seq=snapshot.seq, crc=bag_crc(bag)))

    def _perform_learner(self, node: Node, action: act.LearnerAction) -> None:
        if isinstance(action, act.Send):
            self._send(node, action.message)
        elif isinstance(action, act.SendLeave):
            self._send(node, Leave(reason=action.reason, report=node.machine.report()))
        elif isinstance(action, act.SendContribution):
            payload = node.payloads[action.header.fragment_id, action.header.seq]
            node.bulk_up.append(("contribution", encode(self._envelope_up(node), action.header), payload))
        elif isinstance(action, act.SendFounding):
            fragments = tuple(FragmentInfo(i, 8) for i in range(self.num_fragments))
            founded_n = node.machine.state.options.founded_n
            self._send(node, Found(layout=b"layout", fragments=fragments, static_bytes=self.static_bytes, static_crc=0, versions=founded_n))
        elif isinstance(action, act.Snapshot):
            self._snapshot(node, action)
        elif isinstance(action, act.Forget):
            del node.payloads[action.fragment_id, action.seq]
        elif isinstance(action, act.Decode):
            self._decode(node, action)
        elif isinstance(action, act.Adopt):
            self._adopt(node, action)
        elif isinstance(action, act.Heal):
            node.theta[action.fragment_id] = node.base[action.fragment_id]
            node.live[action.fragment_id].clear()
            node.poisoned.discard(action.fragment_id)
            node.loud.discard(action.fragment_id)
        else:
            self._note(node, action)

    def _note(self, node: Node, action: act.LearnerAction) -> None:
        if isinstance(action, act.Joined):
            node.joined = action
            if action.role != "member":
                node.theta = list(node.base)
        elif isinstance(action, act.StopTraining):
            assert node.stop_reason is None, "told to stop twice"
            node.stop_reason = action.reason
        elif isinstance(action, act.LeftDone):
            node.has_left = True
        elif isinstance(action, act.RefuseJoin | act.Fence):
            node.detail = action.detail
        else:
            raise AssertionError(f"unknown action {action}")

    def _snapshot(self, node: Node, action: act.Snapshot) -> None:
        i = action.fragment_id
        reference = node.base[i]
        unresolved = node.machine.state.fragments[i].unresolved
        if action.after_unresolved:
            assert unresolved is not None
            reference = bag_sum((1, reference), (1, node.payloads[i, unresolved.header.seq][0]))
        bag = bag_sum((1, node.theta[i]), (-1, reference))
        node.payloads[i, action.seq] = (bag, i not in node.poisoned, 1e6 if i in node.loud else 1.0)
        node.to_encode.append(action)

    def _decode(self, node: Node, action: act.Decode) -> None:
        assert node.publication is not None
        header, payload = node.publication
        i = action.fragment_id
        result = payload if action.is_full else bag_sum((1, node.published[i]), (1, payload))
        crc_ok = bag_crc(result) == header.crc
        if crc_ok:
            node.published[i] = result
            if action.is_joining:
                node.base[i] = result
            taken = node.payloads[i, action.with_contribution][0] if action.with_contribution else Counter()
            node.references[i] = bag_sum((1, node.base[i]), (1, taken))
        self.feed(node, ev.Decoded(fragment_id=i, version=action.version, crc_ok=crc_ok))

    def _adopt(self, node: Node, action: act.Adopt) -> None:
        i = action.fragment_id
        if action.mode == "overwrite":
            node.theta[i] = node.published[i]
            node.live[i].clear()
            node.poisoned.discard(i)
            node.loud.discard(i)
        else:
            node.theta[i] = bag_sum((1, node.theta[i]), (1, node.published[i]), (-1, node.references[i]))
        node.base[i] = node.published[i]

    def _envelope_up(self, node: Node) -> Envelope:
        known = node.machine.state.envelope
        return Envelope("job", known.lineage, known.epoch, known.incarnation)

    def _send(self, node: Node, message: Any) -> None:
        node.control_up.append(encode(self._envelope_up(node), message))

    def take(self, event: Any) -> None:
        """One event for the syncer."""
        for action in self.syncer.handle(event, self.now_s):
            self._perform_syncer(action)
        self._waiting = None
        if not self.manual_merge:
            self.merge()
        self.write()
        check_syncer(self)

    def advance(self, dt_s: float) -> None:
        """Time passes."""
        self.now_s += dt_s
        self.take(ev.Tick())
        due_s = self.syncer.next_deadline_s()
        assert due_s is None or due_s > self.now_s, "a deadline that has been looked at would keep the runtime turning"

    def merge(self) -> None:
        """Every `Close` that was asked for is performed."""
        while self.closing:
            i = next(iter(self.closing))
            close, bags = self.closing.pop(i)
            before = max(self.history[i])
            merged = bag_sum((1, self.history[i][before]), *[(1, bag) for bag in bags])
            self.history[i][close.version] = merged
            self.take(ev.Merged(fragment_id=i, crc=bag_crc(merged), merge_s=0.01))

    def write(self) -> None:
        """The disk is quick."""
        if self.is_writing:
            self.is_writing = False
            self.take(ev.Durable())

    def _perform_syncer(self, action: act.SyncerAction) -> None:
        if isinstance(action, act.MakeDurable):
            self.is_writing = True
        elif isinstance(action, act.Tape):
            self.tape.append(check_members(action.record))
        elif isinstance(action, act.Reply):
            node = self.by_session(action.session)
            if node is not None:
                node.control_down.append(encode(Envelope("job", "first", self.syncer.job.epoch, action.incarnation), action.message))
        elif isinstance(action, act.Fold):
            assert self._waiting is not None
            self.folded[action.key.fragment_id].append(self._waiting)
        elif isinstance(action, act.Close):
            i = action.fragment_id
            assert i not in self.closing
            self.closing[i], self.folded[i] = (action, self.folded[i]), []
        elif isinstance(action, act.Transmit):
            self._transmit(action)
        elif isinstance(action, act.TransmitStatic):
            node = self.by_session(action.session)
            if node is not None:
                node.bulk_down.append((encode(Envelope("job", "first", 0, 0), StaticState(crc=0)), None))
        elif isinstance(action, act.CloseSession):
            node = self.by_session(action.session)
            if node is not None:
                node.bulk_down.clear()
        elif isinstance(action, act.Ended):
            assert self.ended is None
            self.ended = action

    def _transmit(self, action: act.Transmit) -> None:
        node, i = self.by_session(action.session), action.fragment_id
        if node is None:
            return
        values = self.history[i][action.version]
        payload = values if action.parent is None else bag_sum((1, values), (-1, self.history[i][action.parent]))
        header = Publication(
            fragment_id=i, version=action.version, parent=action.parent, crc=action.crc, merged_through=action.merged_through
        )
        node.bulk_down.append((encode(Envelope("job", "first", self.syncer.job.epoch, 0), header), payload))

    def by_session(self, session: str) -> Node | None:
        """The living process behind a session."""
        return next((n for n in self.nodes if n.nonce == session and not n.is_dead), None)

    def deliver_control_up(self, node: Node, *, keep: bool = False) -> None:
        """The head of the queue reaches the syncer (`keep`: it will arrive once more)."""
        data = node.control_up[0] if keep else node.control_up.popleft()
        envelope, message = decode_from_learner(data)
        self.take(ev.MessageReceived(session=node.nonce, envelope=envelope, message=message))

    def deliver_control_down(self, node: Node, *, keep: bool = False) -> None:
        """The head of the queue reaches the learner."""
        data = node.control_down[0] if keep else node.control_down.popleft()
        envelope, message = decode_from_syncer(data)
        if isinstance(message, SendState):
            node.bulk_up.append(("founding", b"", None))
        self.feed(node, ev.ControlReceived(envelope=envelope, message=message))

    def deliver_bulk_up(self, node: Node, *, keep: bool = False, crc_ok: bool = True) -> None:
        """A payload or an acknowledgement reaches the syncer."""
        kind, data, payload = node.bulk_up[0] if keep else node.bulk_up.popleft()
        if kind == "founding":
            self._founding(node)
        elif kind == "contribution":
            envelope, header = decode_learner_header(data)
            bag, is_finite, norm = payload
            self._waiting = bag
            self.take(
                ev.ContributionArrived(
                    session=node.nonce,
                    envelope=envelope,
                    header=header,
                    norm=norm * header.steps,
                    is_finite=is_finite,
                    payload_bytes=16,
                    crc_ok=crc_ok,
                )
            )
        elif kind == "delivered":
            self.take(ev.PublicationDelivered(session=node.nonce, fragment_id=data, version=payload))
        else:
            self.take(ev.PublicationFailed(session=node.nonce, fragment_id=data, version=payload))

    def _founding(self, node: Node) -> None:
        numbers = node.machine.state.options.founded_n or (0,) * self.num_fragments
        for i, n in enumerate(numbers):
            self.history[i][Version(self.syncer.job.epoch, n)] = node.theta[i]
        crcs = tuple(bag_crc(node.theta[i]) for i in range(self.num_fragments))
        self.take(ev.FoundingArrived(session=node.nonce, crcs=crcs, payload_bytes=64))

    def deliver_bulk_down(self, node: Node, *, keep: bool = False) -> None:
        """A publication reaches the learner; the transport acknowledges it."""
        data, payload = node.bulk_down[0] if keep else node.bulk_down.popleft()
        envelope, header = decode_syncer_header(data)
        if isinstance(header, StaticState):
            self.feed(node, ev.StaticInstalled())
            return
        assert isinstance(header, Publication)
        node.bulk_up.append(("delivered", header.fragment_id, header.version))
        node.publication = (header, payload)
        self.feed(node, ev.PublicationArrived(envelope=envelope, header=header))

    def drop_bulk_down(self, node: Node) -> None:
        """The transport gives up on a publication."""
        data, _ = node.bulk_down.popleft()
        _, header = decode_syncer_header(data)
        assert isinstance(header, Publication)
        node.bulk_up.append(("failed", header.fragment_id, header.version))

    def settle(self) -> None:
        """Everything that is on its way arrives, and what follows from it."""
        is_busy = True
        while is_busy:
            is_busy = False
            for node in self.nodes:
                for queue, deliver in (
                    (node.control_up, self.deliver_control_up),
                    (node.control_down, self.deliver_control_down),
                    (node.bulk_up, self.deliver_bulk_up),
                    (node.bulk_down, self.deliver_bulk_down),
                ):
                    while queue:
                        deliver(node)
                        is_busy = True
