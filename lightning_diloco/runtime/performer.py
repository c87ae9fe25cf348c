"""Performs what `SyncerMachine` decides: messages, transfers, the tape, and work for the numerics thread."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_diloco.config import SyncConfig
from lightning_diloco.errors import ConfigurationError, RemoteProtocolError
from lightning_diloco.outer import FragmentState, Layout, buffer_of, payload_bytes, static_bytes
from lightning_diloco.protocol.actions import (
    BeginFounding,
    Close,
    CloseSession,
    Ended,
    Fold,
    MakeDurable,
    Reply,
    SyncerAction,
    Tape,
    Transmit,
    TransmitStatic,
)
from lightning_diloco.protocol.identity import STATIC_FRAGMENT, Origin, Version
from lightning_diloco.protocol.job import JobOptions
from lightning_diloco.protocol.messages import (
    Contribution,
    Envelope,
    Found,
    FoundingFragment,
    FoundingStatic,
    HeldFragment,
    JoinRefused,
    LearnerHeader,
    Message,
    Pong,
    Publication,
    ShardAddress,
    StaticState,
)
from lightning_diloco.protocol.publisher import Current
from lightning_diloco.protocol.records import EndRecord, MergeRecord, ProgressRecord, PublishRecord, Record, TapeLine
from lightning_diloco.protocol.wire import decode_learner_header, encode
from lightning_diloco.runtime.checksum import crc32
from lightning_diloco.runtime.complaints import printable
from lightning_diloco.runtime.durability import SnapshotKeeper
from lightning_diloco.runtime.final_model import keep_final_model
from lightning_diloco.runtime.founding import Founded, keep_founding
from lightning_diloco.runtime.opening import Opening
from lightning_diloco.runtime.payloads import PayloadKeeper
from lightning_diloco.runtime.service_options import ServiceOptions
from lightning_diloco.runtime.snapshot import Founding, FragmentSnapshot, SnapshotStore
from lightning_diloco.runtime.store import MAX_LAYOUT_BYTES, Closed, Measured, SyncerStore
from lightning_diloco.runtime.tape import TapeWriter
from lightning_diloco.runtime.telling import package_versions, sentence
from lightning_diloco.runtime.transport import SyncerTransport
from lightning_diloco.shallow_json import read_shallow_json

__all__ = ["Performer"]

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Published:
    """The newest published version of a fragment, as the loop thread may send it."""

    shadow: Tensor
    difference: Tensor | None
    state: FragmentState


class Performer:
    """The hands of the syncer.

    Args:
        options: of the service.
        transport: bound.
        tape: open.
        submit: runs (work, then) on the numerics thread and back.
        on_merged: called on the loop thread when a merge is done.
        on_refused: called on the loop thread with a session that broke the rules and was told so.
        on_line: called with every line of the tape.
        opening: what the syncer starts from.
        on_loop: runs a function on the loop thread, soon.
        on_durable: called on the loop thread when `MakeDurable` was performed.
    """

    def __init__(
        self,
        *,
        options: ServiceOptions,
        transport: SyncerTransport,
        tape: TapeWriter,
        submit: Callable[[Callable[[], Any], Callable[[Any], None]], None],
        on_merged: Callable[[Closed], None],
        on_refused: Callable[[str], None],
        on_line: Callable[[TapeLine], None] | None,
        opening: Opening,
        on_loop: Callable[[Callable[[], None]], None],
        on_durable: Callable[[], None],
    ) -> None:
        self._options = options
        self._transport = transport
        self._tape = tape
        self._submit = submit
        self._on_merged = on_merged
        self._on_refused = on_refused
        self._on_line = on_line
        self._on_durable = on_durable
        self._opening = opening
        self._founder: BeginFounding | None = None
        self._is_founded = False
        self._envelope = Envelope(opening.identity.job_id, opening.identity.lineage, opening.identity.epoch, 0)
        self._published: dict[int, _Published] = {}
        self._kept: dict[int, FragmentSnapshot] = {}
        self._snapshots = SnapshotStore(options.run_dir)
        self.keeper = SnapshotKeeper(self._snapshots, ask=self._kept.__getitem__, on_loop=on_loop)
        self.payloads = PayloadKeeper(options.run_dir, on_loop=on_loop)
        self.store: SyncerStore | None = None
        if opening.founding is not None:
            self._restore(opening.founding, opening.fragments)
        self.ended: Ended | None = None
        self._transfers: dict[tuple[str, int], tuple[int, Version]] = {}
        self._on_way: dict[tuple[str, int], int] = {}

    def job_options(self) -> JobOptions:
        """The identity of the job, for its machine."""
        return JobOptions(
            job_id=self._envelope.job_id,
            lineage=self._envelope.lineage,
            epoch=self._envelope.epoch,
            may_found=self._opening.resumption is None,
            token=self._options.token,
            takeover_token=self._options.takeover_token,
            num_slots=self._options.num_slots,
            is_supervised=self._options.supervised,
            starts_together=self._options.supervised and self._options.num_slots is not None,
            shards=(ShardAddress(bulk_endpoint=self._transport.bulk_endpoint),),
            versions=package_versions(),
            shard=self._options.shard,
            num_shards=self._options.num_shards,
        )

    def perform(self, actions: list[SyncerAction], measured: Measured | None) -> None:
        """Do what the machine decided, in order; `measured` is the contribution that the event brought."""
        self._write_down(actions)
        for action in actions:
            if isinstance(action, Reply):
                self.say(action.session, action.message, action.incarnation)
            elif isinstance(action, Fold):
                self._fold(action, measured)
            elif isinstance(action, Close):
                self._close(action)
            elif isinstance(action, Transmit):
                self._transmit(action)
            elif isinstance(action, TransmitStatic):
                self._transmit_static(action)
            elif isinstance(action, CloseSession):
                self._transport.forget(bytes.fromhex(action.session))
            elif isinstance(action, BeginFounding):
                self._founder = action
            elif isinstance(action, MakeDurable):
                self.keeper.write(self._on_durable)
            elif isinstance(action, Ended):
                self._end(action)

    def _write_down(self, actions: list[SyncerAction]) -> None:
        """Hand what is for the tape to the kernel, before anything of it leaves this process.

        A syncer that starts again must not know less than a learner.
        """
        records = [action.record for action in actions if isinstance(action, Tape)]
        for record in records:
            self._record(record)
        # A `Pong` says how much of a learner's reports is on the tape.
        confirms = any(isinstance(action, Reply) and isinstance(action.message, Pong) and action.message.num_gaps for action in actions)
        if confirms or any(not isinstance(record, ProgressRecord) for record in records):
            self._tape.flush()

    # ---- a job that goes on ---------------------------------------------------------------------------------------------------

    def _restore(self, founding: Founding, fragments: tuple[FragmentSnapshot | None, ...]) -> None:
        self.store = SyncerStore(founding.layout, founding.config)
        self.payloads.begin(founding.config.tape_payloads)
        self.store.restore(founding.static, [None if f is None else f.state for f in fragments])
        self._is_founded = True
        for fragment_id, found in enumerate(fragments):
            if found is not None:
                self.put_recalled(fragment_id, found.state)

    def put_recalled(self, fragment_id: int, state: FragmentState) -> None:
        """This is the fragment's state from here on, and what is published of it."""
        self._published[fragment_id] = _Published(state.shadow, None, state)

    def accepts_held(self, data: bytes, total_bytes: int, is_expected: Callable[[HeldFragment], bool]) -> bool | str:
        """Whether memory may be given to a version that was asked for; to nothing else, while a job is gone on with."""
        try:
            _, header = decode_learner_header(data)
        except RemoteProtocolError:
            return "refused"
        if self.store is None or not isinstance(header, HeldFragment) or not is_expected(header):
            return "refused"
        return total_bytes == 4 * self.store.layout.fragment_sizes[header.fragment_id] or "refused"

    def keep(self, fragment_id: int, current: Current, origin: Origin | None = None) -> None:
        """What the next snapshot has of this fragment; called when the rules know of it."""
        self._kept[fragment_id] = FragmentSnapshot(
            state=self._published[fragment_id].state,
            version=current.version,
            crc=current.crc,
            merged_through=dict(current.merged_through),
            origin=origin,
        )

    def keep_all(self, currents: list[Current], origins: Sequence[Origin] = ()) -> None:
        """The same for all fragments, and from here on snapshots are written."""
        for fragment_id, current in enumerate(currents):
            self.keep(fragment_id, current, origins[fragment_id] if origins else None)
        self.keeper.begin(len(currents), self._founded_store().config.snapshot_interval_s)

    # ---- founding -----------------------------------------------------------------------------------------------------------

    def begin_founding(self, session: str, message: Found) -> str | None:
        """Prepare the store for the appointed founder's payloads; returns a sentence if its description is no layout."""
        founder = self._founder
        if self._is_founded or founder is None or session != founder.session:
            return None
        try:
            layout = Layout.from_bytes(message.layout, max_bytes=MAX_LAYOUT_BYTES)
            config = SyncConfig.from_options(read_shallow_json(founder.config.decode()))
        except (RemoteProtocolError, ConfigurationError, TypeError, ValueError) as error:
            return str(error)
        sizes = tuple((f.fragment_id, f.num_params, f.kind) for f in message.fragments)
        if sizes != tuple((f.fragment_id, f.num_params, f.kind) for f in layout.fragments) or layout.fingerprint() != founder.fingerprint:
            return "The layout does not have the sizes or the fingerprint that go with it."
        if static_bytes(layout) != message.static_bytes:
            return f"static_bytes={message.static_bytes}: the layout has {static_bytes(layout)}."
        self.store = SyncerStore(layout, config, has_momentum=message.has_momentum)
        self.payloads.begin(config.tape_payloads)
        return None

    def take_founding(self, session: str, header: LearnerHeader, payload: memoryview, done: Callable[[Founded], bool]) -> None:
        """Store one founding payload on the numerics thread.

        A payload that is not what its header says costs its sender the session; `done` is called on the loop thread after the last one
        and tells whether the job is founded now.
        """
        store = self.store
        if store is None or self._is_founded or not self._is_founder(session):
            return

        def work() -> Founded | RemoteProtocolError | None:
            """Store the part; what was founded after the last one."""
            try:
                if isinstance(header, FoundingFragment):
                    store.found_fragment(header.fragment_id, header.part, payload, header.crc)
                elif isinstance(header, FoundingStatic):
                    store.found_static(payload, header.crc)
            except RemoteProtocolError as error:
                return error
            return keep_founding(store, self._snapshots, self.payloads) if store.is_complete else None

        def then(result: Founded | RemoteProtocolError | None) -> None:
            """On the loop thread: refuse the founder, or go on."""
            # Meanwhile another founder, or the same one again, may have begun anew.
            if result is None or store is not self.store or self._is_founded or not self._is_founder(session):
                return
            if isinstance(result, RemoteProtocolError):
                self.refuse(session, result.reason, result.detail)
                return
            for i in range(len(result.crcs)):
                self.put_recalled(i, store.state(i))
            self._is_founded = done(result)

        self._submit(work, then)

    def accepts(self, session: str, data: bytes, total_bytes: int) -> bool | str:
        """Whether memory may be given to a payload of this header and size."""
        try:
            _, header = decode_learner_header(data)
        except RemoteProtocolError:
            return "refused"
        if self.store is None:
            return "refused"
        sizes, is_founder = self.store.layout.fragment_sizes, self._is_founder(session) and not self._is_founded
        if isinstance(header, FoundingStatic):
            expected = static_bytes(self.store.layout) if is_founder else -1
        elif isinstance(header, Contribution | FoundingFragment) and header.fragment_id < len(sizes):
            is_founding = isinstance(header, FoundingFragment)
            if is_founding != is_founder or (isinstance(header, FoundingFragment) and header.part not in self.store.founding_parts):
                return "refused"
            configured = "fp32" if is_founding else self.store.config.wire_dtype
            expected = payload_bytes(sizes[header.fragment_id], self.store.layout.fragments[header.fragment_id].wire_dtype(configured))
        else:
            return "refused"
        return True if total_bytes == expected else "oversized" if total_bytes > expected else "refused"

    def _is_founder(self, session: str) -> bool:
        return self._founder is not None and session == self._founder.session

    def refuse(self, session: str, reason: str, sentence: str) -> None:
        """Tell a process that it may not go on, and end its session."""
        _log.warning("Session %s was refused: %s", session[:8], printable(sentence))
        self.say(session, JoinRefused(reason=reason, detail=sentence[:2000]), 0)
        self._on_refused(session)

    # ---- actions ------------------------------------------------------------------------------------------------------------

    def publish(self, closed: Closed) -> None:
        """Keep what a merge produced, for the transfers that follow."""
        self._published[closed.fragment_id] = _Published(closed.shadow, closed.difference, closed.state)

    def say(self, session: str, message: Message, incarnation: int = 0) -> None:
        """Send a control message."""
        envelope = Envelope(self._envelope.job_id, self._envelope.lineage, self._envelope.epoch, incarnation)
        self._transport.send_control(bytes.fromhex(session), encode(envelope, message))

    def _record(self, record: Record) -> None:
        line = self._tape.write(record)
        if isinstance(record, MergeRecord):
            _log.info("%s", sentence(record))
        if self._on_line is not None:
            self._on_line(line)

    def _fold(self, action: Fold, measured: Measured | None) -> None:
        store, fragment_id, weight = self._founded_store(), action.key.fragment_id, action.weight
        if measured is None:
            raise RemoteProtocolError("wrong_layout", "A contribution was folded without its payload.")
        self._submit(lambda: store.fold(fragment_id, measured, weight), lambda result: None)

    def _close(self, action: Close) -> None:
        store = self._founded_store()
        self._submit(lambda: store.close(action.fragment_id, action.merge_index, last_share=action.last_share), self._on_merged)

    def _transmit(self, action: Transmit) -> None:
        published = self._published[action.fragment_id]
        payload = published.shadow if action.parent is None or published.difference is None else published.difference
        header = Publication(
            fragment_id=action.fragment_id,
            version=action.version,
            parent=action.parent,
            crc=action.crc,
            merged_through=action.merged_through,
        )
        peer = bytes.fromhex(action.session)
        # A session that says hello again is sent everything anew; one that says so and takes nothing must not fill the memory.
        before = self._on_way.pop((action.session, action.fragment_id), None)
        if before is not None:
            self._transfers.pop((action.session, before), None)
            self._transport.cancel(peer, before)
        transfer_id = self._transport.send_payload(peer, encode(self._envelope, header), buffer_of(payload))
        self._transfers[action.session, transfer_id] = (action.fragment_id, action.version)
        self._on_way[action.session, action.fragment_id] = transfer_id

    def take_off_way(self, session: str, transfer_id: int) -> tuple[int, Version] | None:
        """A transfer has ended: the fragment and the version that it carried; None for one that was replaced."""
        sent = self._transfers.pop((session, transfer_id), None)
        if sent is not None:
            self._on_way.pop((session, sent[0]), None)
        return sent

    def _transmit_static(self, action: TransmitStatic) -> None:
        static = self._founded_store().static
        header = encode(self._envelope, StaticState(crc=crc32(static)))
        self._transport.send_payload(bytes.fromhex(action.session), header, buffer_of(static))
        self._record(
            PublishRecord(
                fragment_id=STATIC_FRAGMENT,
                version=Version(0, 0),
                is_full=True,
                learners=(action.learner_id,),
                payload_bytes=static.numel(),
            )
        )

    def _end(self, action: Ended) -> None:
        sha256, store = None, self.store
        if self._is_founded and store is not None and store.is_complete:
            sha256 = store.global_sha256()
            if not keep_final_model(store, action.versions, self._options.run_dir, self._options.spare_dir):
                _log.error("The global model is nowhere. The run has failed.")
                action = Ended(status="failed", versions=action.versions)
        self._record(EndRecord(status=action.status, versions=action.versions, global_sha256=sha256))
        self.ended = action

    def _founded_store(self) -> SyncerStore:
        if self.store is None:
            raise RemoteProtocolError("wrong_layout", "The job has not been founded.")
        return self.store
