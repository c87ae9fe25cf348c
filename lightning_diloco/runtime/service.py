"""The syncer's service: one loop thread for sockets and rules, one numerics thread for tensors.

    sockets --events--> SyncerMachine --actions--> sockets, tape, numerics thread
                              ^                             |
                              +---------- results ----------+

The loop thread never touches a tensor, so a control message waits for no merge. The numerics thread performs decode, fold and close in the
order in which the machine decided them (one queue, first in first out); its results come back as events. What was published last is kept
by the loop thread beside the machine's own account of it, so a transfer always carries the version that its header names.

A peer's garbage costs that peer its session, never the syncer. An error in the loop itself is kept as `error` and ends the service.

This module and everything that it imports never imports lightning: the syncer's process starts fast and stays small.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import zmq

from lightning_diloco.errors import RemoteProtocolError
from lightning_diloco.protocol.actions import MakeDurable
from lightning_diloco.protocol.events import (
    Durable,
    Finish,
    LearnerLost,
    Merged,
    MessageReceived,
    PayloadFailed,
    PublicationDelivered,
    PublicationFailed,
    SyncerEvent,
    Tick,
)
from lightning_diloco.protocol.identity import Version
from lightning_diloco.protocol.messages import Found, FromLearner, Heartbeat, Hello, Leave
from lightning_diloco.protocol.records import TapeLine
from lightning_diloco.protocol.syncer import SyncerMachine
from lightning_diloco.protocol.wire import decode_from_learner
from lightning_diloco.runtime.complaints import Complaints
from lightning_diloco.runtime.counters import counters_folder, read_totals
from lightning_diloco.runtime.disk import disk_errors
from lightning_diloco.runtime.intake import MIN_DECODING, Intake
from lightning_diloco.runtime.life_signs import give_sign
from lightning_diloco.runtime.live_summary import LiveSummary
from lightning_diloco.runtime.observers import Observers
from lightning_diloco.runtime.opening import open_job
from lightning_diloco.runtime.performer import Performer
from lightning_diloco.runtime.rebuilding import Rebuilding, refuse_a_folder_in_use
from lightning_diloco.runtime.recovery_watch import RecoveryWatch
from lightning_diloco.runtime.relay import PeerStateRelay
from lightning_diloco.runtime.rundir import lock_run_dir
from lightning_diloco.runtime.service_options import ServiceOptions
from lightning_diloco.runtime.shard_door import ShardDoor
from lightning_diloco.runtime.snapshot import SnapshotStore
from lightning_diloco.runtime.store import Closed, Measured
from lightning_diloco.runtime.tape import TAPE_NAME, TapeWriter
from lightning_diloco.runtime.transport import (
    ControlReceived,
    KeyRevoked,
    PayloadDelivered,
    PayloadReceived,
    PayloadRefused,
    SyncerTransport,
    TransportEvent,
)
from lightning_diloco.runtime.transport import PayloadFailed as TransportFailed

__all__ = ["ServiceOptions", "SyncerService"]

_log = logging.getLogger(__name__)

MAX_FAILURES = 64
"""A learner that refuses so many publications in a row is told to end."""
IDLE_S = 0.25
"""Longest sleep of the loop; deadlines of the machine are met earlier."""


class SyncerService:
    """Serves one job.

    Args:
        options: see `ServiceOptions`.
        context: shared with learners of the same process (`inproc://`).
        on_line: called on the loop thread with every line of the tape.
        live: the job's figures, if others read them too.
    """

    def __init__(
        self,
        options: ServiceOptions,
        context: zmq.Context[zmq.Socket[bytes]] | None = None,
        on_line: Callable[[TapeLine], None] | None = None,
        live: LiveSummary | None = None,
    ) -> None:
        self.options = options
        self._live = LiveSummary(options.run_dir) if live is None else live
        self.error: BaseException | None = None
        self.status: Literal["finished", "stopped", "failed"] | None = None
        self._start_s = time.monotonic()
        self._transport = SyncerTransport(options.bind, options.bulk or None, accept=self._accept, context=context, keys=options.keys)
        self._rebuilding: Rebuilding | None = None
        self._results: deque[Callable[[], None]] = deque()
        self._failures: dict[str, int] = {}
        self._complaints = Complaints(_log)
        self._commands: deque[SyncerEvent] = deque()
        self._numerics = ThreadPoolExecutor(max_workers=1, thread_name_prefix="diloco-numerics")
        self._thread: threading.Thread | None = None
        self._on_line = on_line

    # ---- control from outside (any thread) ----------------------------------------------------------------------------------

    def bind(self) -> str:
        """Open the sockets, lock the folder, open the tape; returns the control endpoint with its real port.

        Raises:
            ConfigurationError: the address cannot be bound, or the folder belongs to another syncer or to an earlier job.
            DiskError: the folder takes nothing.
        """
        self._lock = lock_run_dir(self.options.run_dir)
        try:
            self._open()
        except BaseException:
            self._transport.close()
            self._lock.close()
            raise
        return self._transport.control_endpoint

    def abandon(self) -> None:
        """Let go of what `bind` has opened; nothing was served."""
        self._tape.close()
        self._transport.close()
        self._lock.close()

    def _open(self) -> None:
        run_dir, options = self.options.run_dir, self.options
        if options.rebuild:
            refuse_a_folder_in_use(run_dir)
        # First: an address that is taken must not leave anything in the folder, nor have a snapshot read for nothing.
        self._transport.bind()
        if options.rebuild:
            self._rebuilding = Rebuilding(self._transport, token=options.token, num_slots=options.num_slots)
            self._rebuilding.run(run_dir)
            self._rebuilding = None
        part = (options.shard, options.num_shards)
        with disk_errors(run_dir):
            opening = open_job(run_dir, SnapshotStore(run_dir), resume=options.resume or options.rebuild, part=part)
            counters_folder(run_dir)
            self._tape = TapeWriter(run_dir / TAPE_NAME, t0_s=self._start_s - opening.elapsed_s)
        self._performer = Performer(
            options=self.options,
            transport=self._transport,
            tape=self._tape,
            submit=self._submit,
            on_merged=self._merged,
            on_refused=self._refused,
            on_line=self._on_line,
            opening=opening,
            on_loop=self._on_loop,
            on_durable=lambda: self._handle(Durable()),
        )
        self._machine = SyncerMachine(self._performer.job_options(), opening.resumption)
        self._relay = PeerStateRelay(self._machine, self._transport, store=lambda: self._performer.store, handle=self._handle)
        self._intake = Intake(self._machine, self._performer, self._relay, submit=self._submit, handle=self._handle)
        self._watch = RecoveryWatch(self._machine, self._transport, self._handle)
        self._door = ShardDoor(options, self._performer.say)
        token = options.observer_token
        self._observers = Observers(self._machine, self._tape, self._transport, self._live, token, self._on_loop)

    @property
    def bulk_endpoint(self) -> str:
        """Where payloads go, with the real port; known after `bind`."""
        return self._transport.bulk_endpoint

    def drops(self) -> dict[str, int]:
        """What the sockets did not take since the process started, by reason; from any thread."""
        return dict(self._transport.stats.drops)

    def start(self) -> str:
        """Bind, and serve on a thread of this process; returns the control endpoint."""
        endpoint = self.bind()
        self._thread = threading.Thread(target=self._run_guarded, name="diloco-syncer", daemon=True)
        self._thread.start()
        return endpoint

    def run(self) -> None:
        """Serve on this thread until the job ends; `bind` comes first.

        Raises:
            Exception: whatever went wrong in the loop itself.
        """
        self._run_guarded()
        if self.error is not None:
            raise self.error

    def finish(self, status: Literal["finished", "stopped", "failed"]) -> None:
        """No learner will come back: close what is held, write the global state, end."""
        self._commands.append(Finish(status=status))
        self._transport.wake()

    def learner_lost(self, learner_id: int, life: int | None = None) -> None:
        """This learner's process is gone: that of this `life` (None: whichever has the id)."""
        self._commands.append(LearnerLost(learner_id=learner_id, life=life))
        self._transport.wake()

    def join(self, timeout_s: float | None = None) -> bool:
        """Wait for the thread's end; returns whether it has ended."""
        if self._thread is not None:
            self._thread.join(timeout_s)
            return not self._thread.is_alive()
        return True

    # ---- the loop -----------------------------------------------------------------------------------------------------------

    def _run_guarded(self) -> None:
        try:
            self._loop()
        except BaseException as error:  # noqa: BLE001 - whoever waits for this thread must learn of it
            self.error = error
            _log.exception("The syncer failed.")
        finally:
            self._observers.close()
            self._numerics.shutdown(wait=True, cancel_futures=True)
            self._performer.keeper.close(writes=self._performer.ended is not None)
            self._performer.payloads.close()
            self._tape.close()
            self._transport.close()
            self._lock.close()

    def _loop(self) -> None:
        while self._performer.ended is None:
            give_sign()
            for event in self._transport.poll(self._sleep_s()):
                self._take(event)
            while self._results:
                self._results.popleft()()
            while self._commands:
                self._command(self._commands.popleft())
            self._handle(Tick())
            self._performer.keeper.tick(time.monotonic())
            self._observers.tick(time.monotonic())
            self._watch.tick(time.monotonic())
            self._tape.flush_if_due(time.monotonic())
        self.status = self._performer.ended.status
        self._observers.end(self.status)
        # Last answers (Left) are on their way; the transport lingers shortly when it closes.
        self._transport.poll(0.0)

    def _sleep_s(self) -> float:
        deadline_s = self._machine.next_deadline_s()
        return IDLE_S if deadline_s is None else min(max(deadline_s - time.monotonic(), 0.0), IDLE_S)

    def _command(self, event: SyncerEvent) -> None:
        """Totals of processes that are gone come first, so that the ledger closes with all their tokens."""
        for member in self._machine.job.members.present():
            if not isinstance(event, LearnerLost) or member.learner_id == event.learner_id:
                counters = read_totals(self.options.run_dir / "counters", member)
                if counters is not None:
                    self._handle(counters)
        self._handle(event)

    def _handle(self, event: SyncerEvent, measured: Measured | None = None) -> None:
        was_founded = self._machine.job.is_serving
        actions = self._machine.handle(event, time.monotonic())
        durable = [action for action in actions if isinstance(action, MakeDurable)]
        if durable or (self._machine.job.is_serving and not was_founded):
            self._performer.keep_all(self._machine.job.currents, durable[0].origins if durable else ())
        self._performer.perform(actions, measured)
        self._observers.note(actions)
        self._relay.perform(actions)

    def _on_loop(self, work: Callable[[], None]) -> None:
        """Run something on the loop thread, soon; from any thread."""
        self._results.append(work)
        self._transport.wake()

    def _submit(self, work: Callable[[], Any], then: Callable[[Any], None]) -> None:
        """Run `work` on the numerics thread, and `then(result)` on this one."""

        def run() -> None:
            """On the numerics thread: work, and hand the result or the error to the loop."""
            try:
                result = work()
            except BaseException as error:  # noqa: BLE001 - raised again on the loop thread
                self._results.append(lambda error=error: _raise(error))  # type: ignore[misc]
            else:
                self._results.append(lambda: then(result))
            self._transport.wake()

        self._numerics.submit(run)

    def _accept(self, peer: bytes, header: bytes, total_bytes: int) -> bool | str:
        if self._rebuilding is not None:
            return self._rebuilding.accept(peer, header, total_bytes)
        return self._intake.accepts(peer, header, total_bytes)

    def _take(self, event: TransportEvent) -> None:
        session = event.peer.hex()
        if isinstance(event, ControlReceived):
            self._control(session, event.data)
        elif isinstance(event, PayloadReceived):
            self._intake.take(session, event.header, event.payload)
        elif isinstance(event, PayloadRefused):
            if event.reason != "refused":
                self._handle(PayloadFailed(session=session, reason=event.reason))
        elif isinstance(event, KeyRevoked):
            # A last word, encrypted for the key that it had; what it answers is not heard any more.
            self._performer.refuse(session, "key_revoked", "The key of this site was revoked: it takes no part in this job any more.")
        elif isinstance(event, PayloadDelivered | TransportFailed):
            self._relay.ended(session, event.transfer_id)
            sent = self._performer.take_off_way(session, event.transfer_id)
            if sent is not None and isinstance(event, PayloadDelivered):
                self._failures.pop(session, None)
                self._handle(PublicationDelivered(session=session, fragment_id=sent[0], version=sent[1]))
            elif sent is not None:
                self._publication_failed(session, *sent)

    def _publication_failed(self, session: str, fragment_id: int, version: Version) -> None:
        """The rules send it again; a learner that refuses whatever it is sent would keep that up for ever."""
        if self._machine.job.members.of(session) is None:
            return
        self._failures[session] = self._failures.get(session, 0) + 1
        if self._failures[session] < MAX_FAILURES:
            self._handle(PublicationFailed(session=session, fragment_id=fragment_id, version=version))
        else:
            self._performer.refuse(session, "wrong_layout", f"{MAX_FAILURES} publications in a row were refused. Use the same release.")

    def _control(self, session: str, data: bytes) -> None:
        job = self._machine.job
        if job.finish_status is not None and job.members.end_of(session) == "died":
            return  # ended with the job, by whoever stops the syncer: it is told nothing, and goes on as without a syncer
        try:
            envelope, message = decode_from_learner(data)
        except RemoteProtocolError as error:
            if not self._observers.ask(session, data):
                self._complaints.add(f"A message of session {session[:8]}", error)
            return
        if self._is_excessive(message):
            self._complaints.add(f"A message of session {session[:8]}", "its lists are longer than any that a learner has use for")
            return
        if isinstance(message, Hello) and self._door.turns_away(session, message):
            return
        if isinstance(message, Found):
            refusal = self._performer.begin_founding(session, message)
            if refusal is not None:
                self._performer.refuse(session, "wrong_layout", refusal)
                return
        self._handle(MessageReceived(session=session, envelope=envelope, message=message))

    def _is_excessive(self, message: FromLearner) -> bool:
        """Whether one message asks for more answers than a learner has use for."""
        report = message.report if isinstance(message, Leave) else message
        limit = 2 * max(self._machine.job.num_fragments, MIN_DECODING)
        return isinstance(report, Heartbeat | Hello) and len(report.unresolved) > limit

    def _refused(self, session: str) -> None:
        """A session was told to end."""
        self._failures.pop(session, None)
        self._handle(PayloadFailed(session=session, reason="wrong_layout"))

    def _merged(self, closed: Closed) -> None:
        """A merge is done: publish it."""
        self._performer.publish(closed)
        self._handle(
            Merged(
                fragment_id=closed.fragment_id,
                crc=closed.crc,
                merge_s=closed.merge_s,
                outer_momentum=closed.outer_momentum,
                norms=closed.norms,
                scales=closed.scales,
            )
        )
        self._performer.keep(closed.fragment_id, self._machine.job.currents[closed.fragment_id])


def _raise(error: BaseException) -> None:
    raise error
