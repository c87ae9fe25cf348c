"""A job of whose run directory nothing is left, taken from its learners (PROTOCOL.md section 8: `--rebuild`).

A syncer needs three things to go on with a job: who it is (identity, configuration, layout, static state), its accounts, and its tensors.
All but the outer momentum is held by every member. This module asks for the first two at the address that the learners dial, and writes
them down as a run directory in which a syncer was killed before its first snapshot. Everything after that is the recovery that exists
(`protocol/recovery.py`): it recalls each fragment from whoever holds the highest version, and the momentum begins at zero.

    listening    learners that speak are asked who they are; each `Hello` with versions is kept, newcomers wait
    describing   `COLLECT_S` after the first one each of them is asked for a `Description`, one of them for the static state too
    writing      identity, founding and the first lines of the tape are written; all answers are here, or `COLLECT_S` is over again

What the learners tell must agree: two histories, configurations or layouts are an error that names both, and nothing is written.

Accounts: a running life tells its own totals. Of its ended lives its learner tells per fragment what is in the model; the most of that is
put down as what they had trained, and what a fragment lacks of it as lost (`rollback`). Learners of whom nobody runs any more are known by
what versions name of them (`recovery._close_accounts`). The tape begins again at second 0.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from lightning_diloco.config import SyncConfig
from lightning_diloco.errors import ConfigurationError, RemoteProtocolError
from lightning_diloco.outer import Layout
from lightning_diloco.outer.static import static_bytes
from lightning_diloco.protocol.identity import FragmentInfo
from lightning_diloco.protocol.members import MAX_IDS
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
from lightning_diloco.protocol.recovery import COLLECT_S, MAX_NUMBER
from lightning_diloco.protocol.wire import decode_from_learner, decode_learner_header, encode
from lightning_diloco.runtime.checksum import crc32
from lightning_diloco.runtime.snapshot import Founding, Identity, SnapshotStore
from lightning_diloco.runtime.store import MAX_LAYOUT_BYTES
from lightning_diloco.runtime.tape import TAPE_NAME, TapeWriter
from lightning_diloco.runtime.transport import ControlReceived, PayloadReceived, SyncerTransport, TransportEvent

__all__ = ["Rebuilding"]

_log = logging.getLogger(__name__)

COMPLAIN_S = 10.0


@dataclass(slots=True)
class _Witness:
    """A learner that holds the job."""

    envelope: Envelope
    hello: Hello
    description: Description | None = None


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
        self._static: tuple[int, memoryview] | None = None
        self._static_from: bytes | None = None
        self._deadline_s: float | None = None

    def accept(self, peer: bytes, header: bytes, total_bytes: int) -> bool | str:
        """Whether memory may be given to a payload: to the static state that was asked for, and nothing else."""
        witness = self._witnesses.get(peer)
        if peer != self._static_from or witness is None or witness.description is None:
            return "refused"
        try:
            _, message = decode_learner_header(header)
        except RemoteProtocolError:
            return "refused"
        return (isinstance(message, FoundingStatic) and total_bytes == witness.description.static_bytes) or "refused"

    def run(self, run_dir: Path) -> None:
        """Wait for learners, ask them, and write what they tell.

        Args:
            run_dir: locked by the caller; must not hold a job.

        Raises:
            ConfigurationError: it holds one, or the learners hold more than one.
            OSError: the disk failed.
        """
        snapshots = SnapshotStore(run_dir)
        if (run_dir / TAPE_NAME).exists() or snapshots.read_identity() is not None:
            raise ConfigurationError(
                f"--rebuild: {run_dir} holds a job already. Go on with it by --resume {run_dir}, or give a new directory."
            )
        self._listen(run_dir)
        self._describe()
        self._write(run_dir, snapshots)

    # ---- listening ----------------------------------------------------------------------------------------------------------

    def _listen(self, run_dir: Path) -> None:
        _log.warning("Rebuilding in %s: waiting at %s for learners that hold the job.", run_dir, self._transport.control_endpoint)
        complain_at_s = time.monotonic() + COMPLAIN_S
        while self._deadline_s is None or time.monotonic() < self._deadline_s:
            self._poll()
            if self._deadline_s is None and time.monotonic() >= complain_at_s:
                complain_at_s = time.monotonic() + COMPLAIN_S
                _log.warning("No learner that holds the job has come yet to %s. Is it where they dial?", self._transport.control_endpoint)

    def _poll(self) -> None:
        for event in self._transport.poll(0.25):
            self._take(event)

    def _take(self, event: TransportEvent) -> None:
        try:
            if isinstance(event, ControlReceived):
                self._control(event.peer, *decode_from_learner(event.data))
            elif isinstance(event, PayloadReceived):
                _, header = decode_learner_header(event.header)
                if isinstance(header, FoundingStatic) and crc32(event.payload) == header.crc:
                    self._static = (header.crc, event.payload)
        except RemoteProtocolError:
            return  # a stranger's bytes

    def _control(self, peer: bytes, envelope: Envelope, message: Message) -> None:
        witness = self._witnesses.get(peer)
        if isinstance(message, Ping):
            # Newcomers see that somebody is there, and wait.
            self._say(peer, envelope, Pong(number=message.number))
        elif isinstance(message, Hello):
            self._hello(peer, envelope, message)
        elif witness is None and envelope.lineage:
            self._say(peer, envelope, WhoAreYou())
        elif witness is not None and isinstance(message, Description) and _is_sound(message, witness.hello):
            witness.description = message

    def _hello(self, peer: bytes, envelope: Envelope, hello: Hello) -> None:
        holds_all = bool(hello.lineage) and hello.lineage == envelope.lineage and hello.learner_id is not None and bool(hello.versions)
        is_ours = hello.protocol_version == PROTOCOL_VERSION and (not self._token or hello.token == self._token)
        if not holds_all or not is_ours or not _is_possible(envelope, hello):
            return
        who = (hello.learner_id, hello.lineage)
        same_id = next((p for p, w in self._witnesses.items() if (w.hello.learner_id, w.hello.lineage) == who and p != peer), None)
        if same_id is not None:
            if self._witnesses[same_id].envelope.incarnation >= envelope.incarnation:
                return  # an old life woke beside its successor
            del self._witnesses[same_id]
        self._witnesses[peer] = _Witness(envelope, hello)
        if self._deadline_s is None:
            self._deadline_s = time.monotonic() + COLLECT_S

    def _say(self, peer: bytes, envelope: Envelope, message: Message) -> None:
        """In the learner's own envelope: it heeds no other."""
        self._transport.send_control(peer, encode(envelope, message))

    # ---- describing ---------------------------------------------------------------------------------------------------------

    def _describe(self) -> None:
        """Ask everyone, and another one for the static state if the first one falls silent."""
        self._agree()
        while not self._is_described():
            for peer, witness in self._witnesses.items():
                if witness.description is None:
                    self._ask(peer, witness, with_static=False)
            if self._static is None:
                order = list(self._witnesses)
                following = order.index(self._static_from) + 1 if self._static_from in order else 0
                self._static_from = order[following % len(order)]
                self._ask(self._static_from, self._witnesses[self._static_from], with_static=True)
            deadline_s = time.monotonic() + COLLECT_S
            while time.monotonic() < deadline_s and not self._is_described(everyone=True):
                self._poll()
            self._agree()
            if not self._is_described():
                _log.warning("No learner has described the job within %.0f s; they are asked again.", COLLECT_S)

    def _ask(self, peer: bytes, witness: _Witness, *, with_static: bool) -> None:
        shards = (ShardAddress(bulk_endpoint=self._transport.bulk_endpoint),)
        self._say(peer, witness.envelope, Describe(with_static=with_static, shards=shards))

    def _is_described(self, *, everyone: bool = False) -> bool:
        told = [w.description for w in self._witnesses.values() if w.description is not None]
        if not told or (everyone and len(told) < len(self._witnesses)):
            return False
        return told[0].static_bytes == 0 or (self._static is not None and len(self._static[1]) == told[0].static_bytes)

    def _agree(self) -> None:
        """One job, or an error that names what differs."""
        for what, told in (
            ("histories (job, lineage)", {(w.envelope.job_id, w.envelope.lineage) for w in self._witnesses.values()}),
            ("configurations", {w.hello.config for w in self._witnesses.values()}),
            ("layouts", {w.hello.fingerprint for w in self._witnesses.values()}),
        ):
            if len(told) > 1:
                shown = " and ".join(repr(x) for x in sorted(told, key=str)[:2])
                raise ConfigurationError(
                    f"--rebuild: the learners at this address hold {len(told)} {what}: {shown}. One syncer serves one job: end those "
                    "of the other one, and start again."
                )

    # ---- writing ------------------------------------------------------------------------------------------------------------

    def _write(self, run_dir: Path, snapshots: SnapshotStore) -> None:
        witnesses = [w for w in self._witnesses.values() if w.description is not None]
        first = witnesses[0]
        layout, config = _read_layout(first), _read_config(first)
        static = torch.frombuffer(self._static[1], dtype=torch.uint8) if self._static is not None else torch.empty(0, dtype=torch.uint8)
        if static.numel() != static_bytes(layout):
            raise ConfigurationError("--rebuild: the static state is not the layout's. Install the same release everywhere.")
        shown = [(w.envelope.epoch, *(v.epoch for v in w.hello.versions)) for w in self._witnesses.values()]
        epoch = max(max(epochs) for epochs in shown)
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
            config=config.as_dict(),
            fingerprint=layout.fingerprint(),
            fragments=tuple(FragmentInfo(fragment_id=f.fragment_id, num_params=f.num_params, kind=f.kind) for f in layout.fragments),
            founded_n=tuple(v.n for v in newest),
            founder_id=first.hello.learner_id or 0,
            founding_bytes=0,
            num_slots=self._num_slots,
            is_rebuilt=True,
        )


def _is_possible(envelope: Envelope, hello: Hello) -> bool:
    numbers = [hello.tokens, hello.inner_step, hello.joined_at_step, envelope.epoch, envelope.incarnation]
    numbers += [x for v in hello.versions for x in (v.epoch, v.n)]
    return (hello.learner_id or 0) < MAX_IDS and max(numbers) <= MAX_NUMBER


def _is_sound(description: Description, hello: Hello) -> bool:
    return len(description.earlier) == len(hello.versions) and max(description.earlier) <= MAX_NUMBER


def _read_layout(witness: _Witness) -> Layout:
    assert witness.description is not None
    try:
        layout = Layout.from_bytes(witness.description.layout, max_bytes=MAX_LAYOUT_BYTES)
    except RemoteProtocolError as error:
        raise ConfigurationError(
            f"--rebuild: the learners' layout cannot be read ({error}). Install the same release everywhere."
        ) from error
    if layout.fingerprint() != witness.hello.fingerprint or len(layout.fragments) != len(witness.hello.versions):
        raise ConfigurationError(
            "--rebuild: a learner describes another layout than the one it trains. Install the same release everywhere."
        )
    return layout


def _read_config(witness: _Witness) -> SyncConfig:
    try:
        return SyncConfig.from_options(json.loads(witness.hello.config))
    except (ConfigurationError, TypeError, ValueError) as error:
        raise ConfigurationError(f"--rebuild: the learners' configuration cannot be read ({error}).") from error


def _lives(session: str, witness: _Witness) -> Iterator[Record]:
    """What the tape tells of one learner: its ended lives as one, and its running one."""
    hello, incarnation = witness.hello, witness.envelope.incarnation
    learner_id = hello.learner_id or 0
    earlier = witness.description.earlier if witness.description is not None else ()
    most = max(earlier, default=0)
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
