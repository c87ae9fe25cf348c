"""A job of whose run directory nothing is left, taken from its learners (PROTOCOL.md section 8: `--rebuild`).

A syncer needs three things to go on with a job: who it is (identity, configuration, layout, static state), its accounts, and its tensors.
All but the outer momentum is held by every member. This module asks for the first two at the address that the learners dial, and writes
them down as a run directory in which a syncer was killed before its first snapshot. Everything after that is the recovery that exists
(`protocol/recovery.py`): it recalls each fragment from whoever holds the highest version, and the momentum begins at zero.

Whoever speaks is asked who it is. Each `Hello` with versions makes a witness, who is asked for a `Description`; the first one that gives
it is asked for the static state too; newcomers wait. `LISTEN_S` after the first one the run directory is written, as soon as all witnesses
that are heard have answered. Who comes later and is in a version is taken for ended, and told so.

What the learners tell must agree: two histories, configurations or layouts are an error that names both, and nothing is written.

Accounts: a running life tells its own totals. Of its ended lives its learner tells per fragment what is in the model; the most of that is
put down as what they had trained, and what a fragment lacks of it as lost (`rollback`). Learners of whom nobody runs any more are known by
what versions name of them (`recovery._close_accounts`). The tape begins again at second 0.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from lightning_diloco.config import SyncConfig
from lightning_diloco.errors import ConfigurationError, RemoteProtocolError
from lightning_diloco.outer import Layout, part_of
from lightning_diloco.outer.static import static_bytes
from lightning_diloco.protocol.admission import read_config
from lightning_diloco.protocol.identity import FragmentInfo
from lightning_diloco.protocol.members import MAX_IDS, SILENT_S
from lightning_diloco.protocol.messages import (
    PROTOCOL_VERSION,
    Describe,
    Description,
    Envelope,
    FoundingStatic,
    Hello,
    Message,
    Ping,
    Pong,
    ShardAddress,
    WhoAreYou,
)
from lightning_diloco.protocol.records import CountersRecord, DiscardRecord, JobRecord, JoinRecord, LeaveRecord, Record
from lightning_diloco.protocol.recovery import MAX_NUMBER
from lightning_diloco.protocol.wire import decode_from_learner, decode_learner_header, encode
from lightning_diloco.runtime.checksum import crc32
from lightning_diloco.runtime.complaints import MAX_SENTENCE, Complaints, printable
from lightning_diloco.runtime.snapshot import Founding, Identity, SnapshotStore
from lightning_diloco.runtime.store import MAX_LAYOUT_BYTES
from lightning_diloco.runtime.tape import TAPE_NAME, TapeWriter
from lightning_diloco.runtime.telling import package_versions
from lightning_diloco.runtime.transport import ControlReceived, KeyRevoked, PayloadReceived, SyncerTransport, TransportEvent

__all__ = ["Rebuilding", "refuse_a_folder_in_use"]

_log = logging.getLogger(__name__)

LISTEN_S = 15.0
"""Learners that live have said hello by then: their transport reconnects within a second, and they speak at every step."""
AGAIN_S = 5.0
"""Who has not answered is asked again."""
STATIC_S = 120.0
"""After so long another one is asked for the static state, which can be large; sooner, if the one that was asked is silent."""
COMPLAIN_S = 10.0


def refuse_a_folder_in_use(run_dir: Path) -> None:
    """A job that is there is gone on with, not rebuilt.

    Raises:
        ConfigurationError: the directory holds a job, or what is left of one.
    """
    if SnapshotStore(run_dir).read_identity() is not None:
        raise ConfigurationError(f"--rebuild: {run_dir} holds a job. Go on with it by --resume {run_dir}, or give a new directory.")
    if (run_dir / TAPE_NAME).exists():
        raise ConfigurationError(f"--rebuild: {run_dir} holds the tape of a job, and no more of it. Give a new directory.")


@dataclass(slots=True)
class _Witness:
    """A learner that holds the job."""

    envelope: Envelope
    hello: Hello
    heard_s: float
    asked_s: float = 0.0
    layout: Layout | None = None
    earlier: tuple[int, ...] = ()


class Rebuilding:
    """Asks the learners of a lost job; blocks the thread that calls `run`.

    Args:
        transport: bound at the address that the learners dial; gives this object its events until `run` returns.
        token: what a learner must show ("": nothing).
        num_slots: configured learners (None: open membership).
    """

    def __init__(self, transport: SyncerTransport, *, token: str, num_slots: int | None) -> None:
        self._transport, self._token, self._num_slots = transport, token, num_slots
        self._witnesses: dict[bytes, _Witness] = {}
        self._first_s: float | None = None
        self._static: memoryview | None = None
        self._static_of: bytes | None = None
        self._asked_for_static: dict[bytes, float] = {}
        self._complain_at_s = 0.0
        self._complaints = Complaints(_log)

    def accept(self, peer: bytes, header: bytes, total_bytes: int) -> bool | str:
        """Whether memory may be given to a payload: to the static state that was asked for, and nothing else."""
        witness = self._witnesses.get(peer)
        if self._static is not None or peer not in self._asked_for_static or witness is None or witness.layout is None:
            return "refused"
        try:
            _, message = decode_learner_header(header)
        except RemoteProtocolError:
            return "refused"
        return (isinstance(message, FoundingStatic) and total_bytes == static_bytes(witness.layout)) or "refused"

    def run(self, run_dir: Path) -> None:
        """Wait for learners, ask them, and write what they tell.

        Args:
            run_dir: locked by the caller; holds no job (`refuse_a_folder_in_use`).

        Raises:
            ConfigurationError: the learners hold more than one job, or none that can be read.
            OSError: the disk failed.
        """
        _log.warning("Rebuilding in %s: waiting at %s for learners that hold the job.", run_dir, self._transport.control_endpoint)
        while not self._is_complete(time.monotonic()):
            for event in self._transport.poll(0.25):
                self._take(event, time.monotonic())
            self._agree()
            self._ask(time.monotonic())
            self._complain(time.monotonic())
        self._write(run_dir, SnapshotStore(run_dir))

    # ---- asking -------------------------------------------------------------------------------------------------------------

    def _is_complete(self, now_s: float) -> bool:
        if self._first_s is None or now_s < self._first_s + LISTEN_S or self._awaited(now_s):
            return False
        told = [w.layout for w in self._witnesses.values() if w.layout is not None]
        return bool(told) and (static_bytes(told[0]) == 0 or self._static is not None)

    def _awaited(self, now_s: float) -> list[int]:
        """Ids of witnesses that are heard and have not described the job."""
        return [w.hello.learner_id or 0 for w in self._witnesses.values() if w.layout is None and now_s - w.heard_s < SILENT_S]

    def _take(self, event: TransportEvent, now_s: float) -> None:
        try:
            if isinstance(event, ControlReceived):
                self._control(event.peer, *decode_from_learner(event.data), now_s)
            elif isinstance(event, PayloadReceived):
                _, header = decode_learner_header(event.header)
                if isinstance(header, FoundingStatic) and crc32(event.payload) == header.crc:
                    self._static, self._static_of = event.payload, event.peer
            elif isinstance(event, KeyRevoked):
                self._forget(event.peer)
        except RemoteProtocolError as error:
            self._complaints.add(f"A message of session {event.peer.hex()[:8]}", error)

    def _forget(self, peer: bytes) -> None:
        """What a site has told whose key is revoked meanwhile does not count."""
        self._asked_for_static.pop(peer, None)
        if self._static_of == peer:
            self._static = self._static_of = None
        witness = self._witnesses.pop(peer, None)
        if witness is not None:
            _log.warning("What learner %d tells of the job does not count: its key is revoked.", witness.hello.learner_id)

    def _control(self, peer: bytes, envelope: Envelope, message: Message, now_s: float) -> None:
        witness = self._witnesses.get(peer)
        if witness is not None:
            witness.heard_s = now_s
        if isinstance(message, Ping):
            # Newcomers see that somebody is there, and wait.
            self._say(peer, envelope, Pong(number=message.number))
        elif isinstance(message, Hello):
            self._hello(peer, envelope, message, now_s)
        elif witness is None and envelope.lineage:
            self._say(peer, envelope, WhoAreYou())
        elif witness is not None and isinstance(message, Description):
            _describe(witness, message)

    def _hello(self, peer: bytes, envelope: Envelope, hello: Hello, now_s: float) -> None:
        holds_all = bool(hello.lineage) and hello.lineage == envelope.lineage and hello.learner_id is not None and bool(hello.versions)
        why = self._why_not(envelope, hello)
        if not holds_all or why:
            if holds_all:
                self._complaints.add(f"The hello of session {peer.hex()[:8]}", why)
            return
        who = (hello.learner_id, hello.lineage)
        same_id = next((p for p, w in self._witnesses.items() if (w.hello.learner_id, w.hello.lineage) == who and p != peer), None)
        if same_id is not None:
            if self._witnesses[same_id].envelope.incarnation >= envelope.incarnation:
                return  # an old life woke beside its successor
            del self._witnesses[same_id]
        if peer in self._witnesses:
            self._witnesses[peer].envelope, self._witnesses[peer].hello = envelope, hello
        elif len(self._witnesses) < MAX_IDS:
            self._witnesses[peer] = _Witness(envelope, hello, now_s)
            _log.warning("Learner %d holds the job %s.", hello.learner_id, envelope.job_id)
        self._first_s = now_s if self._first_s is None else self._first_s

    def _why_not(self, envelope: Envelope, hello: Hello) -> str:
        if hello.protocol_version != PROTOCOL_VERSION:
            return f"protocol_version={hello.protocol_version}, and this syncer speaks {PROTOCOL_VERSION}: install the same release"
        if self._token and hello.token != self._token:
            return "its token is not this job's"
        numbers = [hello.tokens, hello.inner_step, hello.joined_at_step, envelope.epoch, envelope.incarnation]
        numbers += [x for v in hello.versions for x in (v.epoch, v.n)]
        # The names of the job would stand in its log, and in its run directory for good.
        is_named = (envelope.job_id + envelope.lineage).isprintable()
        is_possible = (hello.learner_id or 0) < MAX_IDS and max(numbers) <= MAX_NUMBER and is_named
        return "" if is_possible else "it shows an id, names, versions or totals that no learner can have"

    def _ask(self, now_s: float) -> None:
        """Everyone for a description; of those who have given one, one for the static state (before that its size is not known here)."""
        for peer, witness in self._witnesses.items():
            if witness.layout is None and now_s >= witness.asked_s + AGAIN_S:
                witness.asked_s = now_s
                self._say(peer, witness.envelope, Describe(shards=self._shards()))
        can_give = [
            p for p, w in self._witnesses.items() if w.layout is not None and now_s < w.heard_s + SILENT_S and static_bytes(w.layout)
        ]
        if self._static is not None or not can_give or any(now_s < self._asked_for_static.get(p, -STATIC_S) + STATIC_S for p in can_give):
            return
        peer = min(can_give, key=lambda p: self._asked_for_static.get(p, 0.0))
        self._asked_for_static[peer] = now_s
        self._say(peer, self._witnesses[peer].envelope, Describe(with_static=True, shards=self._shards()))

    def _shards(self) -> tuple[ShardAddress, ...]:
        return (ShardAddress(bulk_endpoint=self._transport.bulk_endpoint),)

    def _say(self, peer: bytes, envelope: Envelope, message: Message) -> None:
        """In the learner's own envelope: it heeds no other."""
        self._transport.send_control(peer, encode(envelope, message))

    def _complain(self, now_s: float) -> None:
        if self._complain_at_s == 0.0:
            self._complain_at_s = now_s + COMPLAIN_S
        if now_s < self._complain_at_s:
            return
        self._complain_at_s = now_s + COMPLAIN_S
        if self._first_s is None:
            _log.warning("No learner that holds the job has come yet to %s. Is it where they dial?", self._transport.control_endpoint)
        elif now_s >= self._first_s + LISTEN_S:
            awaited = self._awaited(now_s)
            _log.warning("Waiting for %s.", f"what learners {awaited[:20]} know of the job" if awaited else "the static state")

    def _agree(self) -> None:
        """One job without shards, or an error that names what differs."""
        parts = {part_of(w.hello.fingerprint) for w in self._witnesses.values()} - {(0, 1)}
        if parts:
            raise ConfigurationError(
                f"--rebuild: the learners at this address are those of a syncer with {max(parts)[1]} shards, whose job cannot be rebuilt. "
                "Start a new one from a checkpoint: fit(ckpt_path=...)."
            )
        for what, told in (
            ("histories (job, lineage)", {(w.envelope.job_id, w.envelope.lineage) for w in self._witnesses.values()}),
            ("configurations", {w.hello.config for w in self._witnesses.values()}),
            ("layouts", {w.hello.fingerprint for w in self._witnesses.values()}),
        ):
            if len(told) > 1:
                shown = " and ".join(repr(x)[:300] for x in sorted(told, key=str)[:2])
                raise ConfigurationError(
                    f"--rebuild: the learners at this address hold {len(told)} {what}: {shown}. One syncer serves one job: end those "
                    "of the other one, and start again."
                )

    # ---- writing ------------------------------------------------------------------------------------------------------------

    def _write(self, run_dir: Path, snapshots: SnapshotStore) -> None:
        first = next(w for w in self._witnesses.values() if w.layout is not None)
        layout, config = first.layout, read_config(first.hello.config)
        assert layout is not None
        if isinstance(config, str):
            raise ConfigurationError(f"--rebuild: {printable(config, MAX_SENTENCE)} Install the same release everywhere.")
        static = torch.empty(0, dtype=torch.uint8) if self._static is None else torch.frombuffer(self._static, dtype=torch.uint8)
        epoch = max(max(w.envelope.epoch, *(v.epoch for v in w.hello.versions)) for w in self._witnesses.values())
        job_id, lineage = first.envelope.job_id, first.envelope.lineage
        snapshots.folder.mkdir(exist_ok=True)
        snapshots.write_founding(Founding(config=config, fingerprint=first.hello.fingerprint, layout=layout, static=static))
        tape = TapeWriter(run_dir / TAPE_NAME)
        tape.write(self._job_record(first, layout, config, epoch))
        for peer, witness in self._witnesses.items():
            for record in _lives(peer.hex(), witness):
                tape.write(record)
        tape.close()
        if tape.error is not None:
            raise tape.error
        # Last: with it the directory holds a job.
        snapshots.write_identity(Identity(job_id=job_id, lineage=lineage, epoch=epoch, started_unix_s=time.time()))
        _log.warning(
            "The job %s is rebuilt from %d learners; its fragments follow. Lost: the outer momentum, which begins at zero, and the tape.",
            job_id,
            len(self._witnesses),
        )

    def _job_record(self, first: _Witness, layout: Layout, config: SyncConfig, epoch: int) -> JobRecord:
        hellos = [w.hello for w in self._witnesses.values() if len(w.hello.versions) == len(layout.fragments)]
        newest = [max(h.versions[i] for h in hellos) for i in range(len(layout.fragments))]
        return JobRecord(
            job_id=first.envelope.job_id,
            lineage=first.envelope.lineage,
            epoch=epoch,
            config={**config.as_dict(), "num_fragments": sum(f.kind == "parameters" for f in layout.fragments)},
            fingerprint=layout.fingerprint(),
            fragments=tuple(FragmentInfo(fragment_id=f.fragment_id, num_params=f.num_params, kind=f.kind) for f in layout.fragments),
            founded_n=tuple(v.n for v in newest),
            founder_id=first.hello.learner_id or 0,
            founding_bytes=0,
            num_slots=self._num_slots,
            versions=package_versions(),
            is_rebuilt=True,
            data=first.hello.data,
        )


def _describe(witness: _Witness, description: Description) -> None:
    """Keep what a witness tells of its layout, if it is the one that it trains.

    Raises:
        RemoteProtocolError: it is none.
    """
    layout = Layout.from_bytes(description.layout, max_bytes=MAX_LAYOUT_BYTES)
    count = len(layout.fragments)
    if layout.fingerprint() != witness.hello.fingerprint or not count == len(witness.hello.versions) == len(description.earlier):
        raise RemoteProtocolError("wrong_layout", "it describes another layout than the one it trains")
    if max(description.earlier) > MAX_NUMBER:
        raise RemoteProtocolError("wrong_layout", "it tells of more tokens than a learner can have trained")
    witness.layout, witness.earlier = layout, description.earlier


def _lives(session: str, witness: _Witness) -> Iterator[Record]:
    """What the tape tells of one learner: its ended lives as one, and its running one."""
    hello, incarnation, earlier = witness.hello, witness.envelope.incarnation, witness.earlier
    learner_id, most = hello.learner_id or 0, max(witness.earlier, default=0)
    if most and incarnation:
        yield JoinRecord(learner_id=learner_id, incarnation=incarnation - 1, role="earlier")
        yield CountersRecord(learner_id=learner_id, incarnation=incarnation - 1, inner_steps=0, tokens=most)
        yield LeaveRecord(learner_id=learner_id, incarnation=incarnation - 1, reason="died")
        for fragment_id, tokens in enumerate(earlier):
            if tokens < most:
                yield DiscardRecord(learner_id=learner_id, fragment_id=fragment_id, reason="rollback", tokens=most - tokens)
    yield JoinRecord(
        learner_id=learner_id,
        incarnation=incarnation,
        role="rebuilt",
        session=session,
        life=hello.life,
        device=hello.device,
        batch_size=hello.batch_size,
        tokens_per_step=hello.tokens_per_step,
        job_step=hello.joined_at_step,
    )
    yield CountersRecord(learner_id=learner_id, incarnation=incarnation, inner_steps=hello.inner_step, tokens=hello.tokens)
