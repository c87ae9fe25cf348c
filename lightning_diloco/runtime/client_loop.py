"""The learner's background thread: sockets, encoding, decoding, reports.

It takes the lock for each call of the machine and for handing references over, and never while it computes or sends. Work from the
training thread comes through one queue (`later`), in order. Progress messages are coalesced: only the newest one is sent.

A message may be lost with its connection. What matters is therefore in every report, or said again with it (a leave, a request to stop),
until the syncer has answered.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from typing import Literal

import msgspec
from torch import nn

from lightning_diloco.config import SyncConfig
from lightning_diloco.errors import ConfigurationError, DiLoCoError, FencedError, JoinRefusedError, LearnerIdInUseError, RemoteProtocolError
from lightning_diloco.outer import buffer_of
from lightning_diloco.protocol.actions import (
    Decode,
    DropPrepared,
    Fence,
    Forget,
    Joined,
    LearnerAction,
    LeaveAgain,
    LeftDone,
    RefuseJoin,
    Send,
    SendContribution,
    SendDescription,
    SendFounding,
    SendHeld,
    SendLeave,
    Snapshot,
    StopTraining,
    UnsayLeave,
)
from lightning_diloco.protocol.events import ControlReceived, Decoded, Encoded, LearnerEvent, PublicationArrived
from lightning_diloco.protocol.learner import LearnerMachine
from lightning_diloco.protocol.messages import (
    ID_IN_USE,
    Describe,
    FromSyncer,
    HeldFragment,
    Leave,
    Message,
    NotHeld,
    PeerState,
    PeerStateWanted,
    Progress,
    Publication,
    Recall,
    SendState,
    Sharded,
    StaticState,
    Welcome,
)
from lightning_diloco.protocol.wire import decode_from_syncer, decode_syncer_header, encode
from lightning_diloco.runtime.checksum import crc32
from lightning_diloco.runtime.client_joining import Joining
from lightning_diloco.runtime.complaints import MAX_SENTENCE, Complaints, printable
from lightning_diloco.runtime.figures import StepTimes
from lightning_diloco.runtime.global_state import FoundingState
from lightning_diloco.runtime.learner_store import Encode, LearnerStore, Receive
from lightning_diloco.runtime.link_care import LinkCare
from lightning_diloco.runtime.offers import Offers
from lightning_diloco.runtime.outbox import Outbox
from lightning_diloco.runtime.peer_state import PeerStates
from lightning_diloco.runtime.reporting import Reports
from lightning_diloco.runtime.threads import never_interrupt_others
from lightning_diloco.runtime.transport import SYNCER, LearnerTransport, PayloadDelivered, PayloadFailed, PayloadReceived, TransportEvent
from lightning_diloco.runtime.transport import ControlReceived as ControlBytes

__all__ = ["ClientLoop"]

_log = logging.getLogger(__name__)


class ClientLoop:
    """The background half of `LearnerClient`; attributes without underscore may be read from any thread."""

    def __init__(
        self,
        *,
        module: nn.Module,
        machine: LearnerMachine,
        store: LearnerStore,
        times: StepTimes,
        transport: LearnerTransport,
        links: LinkCare,
        config: SyncConfig,
        patience_s: float,
        founding: FoundingState,
    ) -> None:
        self.lock = threading.Lock()
        self.settled = threading.Event()
        self.left = threading.Event()
        self.joined: Joined | None = None
        self.fatal: DiLoCoError | None = None
        self.sharded: Sharded | None = None
        self.stop_reason: str | None = None
        self.staleness_versions = 0.0
        self._machine = machine
        self._store = store
        self._times = times
        self._config = config
        self._transport = transport
        self._outbox = Outbox(self._transport)
        self._queue: deque[LearnerAction | Encode] = deque()
        self._waiting: dict[int, tuple[Publication, memoryview]] = {}
        self._bases: dict[tuple[int, int], int] = {}
        self._joining = Joining(
            module=module,
            store=store,
            feed=self._feed,
            send=self.send,
            send_payload=self._send_payload,
            patience_s=patience_s,
            founding=founding,
        )
        self.peers = PeerStates(store.layout, send=self.send, send_payload=self._send_once, wake=transport.wake)
        self.reports = Reports(machine, self.lock, times, config, self.send, store.layout)
        self.leave_again: Literal["limit", "signal", "stopped"] | None = None
        self.links = links
        self._complaints = Complaints(_log)
        self.offers = Offers(store.layout, config, self.peers, self._complaints)
        self._is_over = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="diloco-client", daemon=True)

    # ---- for the training thread --------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Dial, and begin to serve."""
        self._transport.connect()
        self._thread.start()

    def stop(self) -> None:
        """End the thread and close the sockets; waits a short while."""
        self._stop.set()
        self._transport.wake()
        if self._thread.is_alive():
            self._thread.join(5.0)
        elif not self._is_over:
            self._is_over = True
            self._transport.close()

    def wake(self) -> None:
        """There is something in the queue."""
        self._transport.wake()

    def later(self, action: LearnerAction | Encode) -> None:
        """Leave an action to this thread, in order; dropped if it has ended, or the queue would grow for ever."""
        if not self._is_over:
            self._queue.append(action)

    def handle(self, event: LearnerEvent) -> None:
        """Give the machine an event from the training thread and leave its actions to this one."""
        with self.lock:
            for action in self._machine.handle(event, time.monotonic()):
                self.later(action)
        self._transport.wake()

    def encode_job(self, action: Snapshot) -> Encode:
        """Under the lock: the base of this moment and a buffer for the snapshot."""
        fragment = self._machine.state.fragments[action.fragment_id]
        after = fragment.unresolved.header.seq if action.after_unresolved and fragment.unresolved is not None else 0
        self._bases[action.fragment_id, action.seq] = fragment.base.n if fragment.base is not None else 0
        return Encode(action.fragment_id, action.seq, self._store.base(action.fragment_id), self._store.stage(action.fragment_id), after)

    @property
    def backlog(self) -> int:
        """Actions that wait for this thread."""
        return len(self._queue)

    @property
    def bytes_up(self) -> int:
        """Payload bytes sent."""
        return self._transport.stats.bytes_up

    @property
    def bytes_down(self) -> int:
        """Payload bytes received."""
        return self._transport.stats.bytes_down

    def leave_now(self, reason: Literal["limit", "signal", "stopped"]) -> None:
        """The drain took too long: say good-bye with what is acknowledged."""
        self.later(SendLeave(reason=reason))
        self.wake()

    # ---- the loop -----------------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            never_interrupt_others()
            while not self._stop.is_set() and self.fatal is None:
                self._turn()
            self._transport.poll(0.0)
        except Exception as error:  # the training thread must learn of it at its next look
            _log.exception("The background thread of the learner failed.")
            self.fatal = DiLoCoError(f"The background thread of the learner failed: {error!r}")
            self.fatal.__cause__ = error
        finally:
            self._is_over = True
            self._queue.clear()
            self.settled.set()
            self.left.set()
            self._transport.close()

    def _turn(self) -> None:
        patience_s = self._joining.ping_s if self.joined is None else self._config.heartbeat_s / 4
        timeout_s = 0.0 if self._queue else min(patience_s, 0.25)
        for event in self._transport.poll(timeout_s):
            self._take(event)
        self._drain_queue()
        now_s = time.monotonic()
        if self.joined is None:
            self._joining.tick(now_s)
        elif not self.left.is_set():
            self.reports.tick(now_s)
            self.peers.tick(now_s)
        refusal = self.links.tick(now_s, self.reports.heard_s, is_joined=self.joined is not None)
        if refusal is not None:
            self._feed(ControlReceived(envelope=self._machine.state.envelope, message=refusal))

    def _drain_queue(self) -> None:
        newest: Send | None = None
        while self._queue:
            action = self._queue.popleft()
            if isinstance(action, Send) and isinstance(action.message, Progress):
                newest = action
            elif isinstance(action, Encode):
                self._encode(action)
            else:
                self._do(action)
        if newest is not None and self.reports.is_heard(time.monotonic()):
            self._do(newest)

    # ---- events -------------------------------------------------------------------------------------------------------------

    def _feed(self, event: LearnerEvent) -> None:
        with self.lock:
            actions = self._machine.handle(event, time.monotonic())
        for action in actions:
            self._do(action)

    def _take(self, event: TransportEvent) -> None:
        if isinstance(event, ControlBytes):
            try:
                envelope, message = decode_from_syncer(event.data)
            except RemoteProtocolError as error:
                self._complaints.add("A message of the syncer", error)
                return
            self.reports.heard_s = time.monotonic()
            if self._machine.heeds(envelope, message):
                self._heed(message)
            self._feed(ControlReceived(envelope=envelope, message=message))
        elif isinstance(event, PayloadReceived):
            self.reports.heard_s = time.monotonic()
            envelope, header = decode_syncer_header(event.header)
            if isinstance(header, Publication):
                self._waiting[header.fragment_id] = (header, event.payload)
                self._feed(PublicationArrived(envelope=envelope, header=header))
                self._waiting.pop(header.fragment_id, None)
            elif isinstance(header, StaticState) and self.joined is None:
                self._joining.install_static(header, event.payload)
            elif isinstance(header, PeerState):
                self.peers.take(header, event.payload)
        elif isinstance(event, PayloadDelivered | PayloadFailed):
            self._outbox.ended(event.transfer_id)
            self.peers.ended(event.transfer_id)

    def _heed(self, message: FromSyncer) -> None:
        """What a message of this learner's syncer asks of this thread, beside what the rules make of it."""
        if isinstance(message, Welcome | Recall | Describe) and message.shards:
            self._dial(message.shards[0].bulk_endpoint)
        elif isinstance(message, SendState):
            self._joining.send_state()
        elif isinstance(message, Sharded):
            self.sharded = message
            self.settled.set()
        elif isinstance(message, PeerStateWanted):
            self.peers.heard(message)
        else:
            self.reports.heed(message)

    def _dial(self, endpoint: str) -> None:
        """Go where payloads are served; an address that is none leaves everything as it is."""
        try:
            self._transport.connect_bulk(endpoint)
        except ConfigurationError as error:
            self._complaints.add("An address of the syncer", error)

    # ---- actions ------------------------------------------------------------------------------------------------------------

    def _do(self, action: LearnerAction) -> None:
        if isinstance(action, Send):
            self.send(action.message)
        elif isinstance(action, Decode):
            self._decode(action)
        elif isinstance(action, SendContribution):
            header = action.header
            self._send_payload(header, self._store.payload(header.fragment_id, header.seq))
        elif isinstance(action, Forget):
            self._store.forget(action.fragment_id, action.seq)
            self._bases.pop((action.fragment_id, action.seq), None)
        elif isinstance(action, SendLeave):
            reports = self.reports
            reports.leave = reports.leave or Leave(reason=action.reason, report=reports.make())
            self.send(reports.leave)
        elif isinstance(action, SendFounding):
            self._joining.describe()
        elif isinstance(action, SendHeld):
            self._send_held(action.header)
        elif isinstance(action, SendDescription):
            self._joining.describe_again(action)
        elif isinstance(action, UnsayLeave):
            self.reports.leave = None
        elif isinstance(action, DropPrepared):
            with self.lock:
                self._store.drop_prepared(action.fragment_id)
        else:
            self._settle(action)

    def _settle(self, action: LearnerAction) -> None:
        """Ends of a phase that somebody waits for."""
        if isinstance(action, Joined):
            self.joined = action
            self._joining.end()
            self.settled.set()
        elif isinstance(action, RefuseJoin):
            kind = LearnerIdInUseError if action.reason == ID_IN_USE else JoinRefusedError
            self.fatal = kind(printable(f"{action.reason}: {action.detail}", MAX_SENTENCE))
            self.settled.set()
        elif isinstance(action, Fence):
            self.fatal = FencedError(printable(action.detail, MAX_SENTENCE))
            self.settled.set()
        elif isinstance(action, StopTraining):
            self.stop_reason = printable(action.reason)
        elif isinstance(action, LeaveAgain):
            self.leave_again = action.reason
        elif isinstance(action, LeftDone):
            self.left.set()

    def send(self, message: Message) -> bool:
        """Whether the socket took it."""
        return self._transport.send_control(SYNCER, encode(self._machine.state.envelope, message))

    def _send_payload(self, header: Message, payload: memoryview) -> None:
        self._outbox.send(encode(self._machine.state.envelope, header), payload)

    def _send_once(self, header: Message, payload: memoryview) -> int:
        return self._transport.send_payload(SYNCER, encode(self._machine.state.envelope, header), payload)

    def _send_held(self, header: HeldFragment) -> None:
        """A syncer that started again has lost this version; the founder's first one came without a checksum."""
        values = self._store.published(header.fragment_id)
        if self._outbox.is_on_way(encode(self._machine.state.envelope, header)):
            self._send_payload(header, buffer_of(values))  # asked again, every few seconds: its checksum was right
        elif header.crc in (0, crc := crc32(values)):
            self._send_payload(msgspec.structs.replace(header, crc=crc), buffer_of(values))
        else:
            self.send(NotHeld(fragment_id=header.fragment_id))

    def _encode(self, job: Encode) -> None:
        job.settle()
        crc = self._store.encode(job.fragment_id, job.seq, job.base, job.local, job.after)
        self._feed(Encoded(fragment_id=job.fragment_id, seq=job.seq, crc=crc))

    def _decode(self, action: Decode) -> None:
        store, fragment_id = self._store, action.fragment_id
        header, payload = self._waiting[fragment_id]
        with self.lock:
            base = None if action.is_joining else store.base(fragment_id)
        found, own = action.version.n, action.with_contribution
        job = Receive(fragment_id=fragment_id, n=found, crc=header.crc, is_full=action.is_full, base=base, with_contribution=own)
        received = store.receive(job, payload)
        if received is not None and action.is_joining:
            store.set_joined(fragment_id, received.adoption.published, action.version.n)
        elif received is not None:
            self._count_staleness(fragment_id, action)
            with self.lock:
                store.set_prepared(fragment_id, received, action.version.n)
        self._feed(Decoded(fragment_id=fragment_id, version=action.version, crc_ok=received is not None))

    def _count_staleness(self, fragment_id: int, action: Decode) -> None:
        if (base_n := self._bases.get((fragment_id, action.with_contribution))) is not None:
            newest = float(max(0, action.version.n - 1 - base_n))
            self.staleness_versions += 0.1 * (newest - self.staleness_versions)
