"""Joining, founding, leaving, fencing (PROTOCOL.md sections 1, 5, 6).

Emptiness belongs to the job, not to a process: a syncer founds once, from one appointed founder. A freshly initialized learner that
meets a founded job receives; one that shows another lineage is refused loudly. The configuration of the job is the founder's; a joiner
with another one is refused with the field's name. A live learner's id is refused to another process unless it shows the takeover token.
"""

from __future__ import annotations

from lightning_diloco.config import SyncConfig
from lightning_diloco.errors import ConfigurationError
from lightning_diloco.protocol.actions import BeginFounding, CloseSession, Reply, SyncerAction, Tape, TransmitStatic
from lightning_diloco.protocol.events import FoundingArrived
from lightning_diloco.protocol.identity import LeaveReason, Version
from lightning_diloco.protocol.job import Job
from lightning_diloco.protocol.leases import LeaseLedger
from lightning_diloco.protocol.leasing import data_difference
from lightning_diloco.protocol.members import MAX_JOINING, Member
from lightning_diloco.protocol.messages import (
    ID_IN_USE,
    PROTOCOL_VERSION,
    Envelope,
    Fenced,
    Found,
    Hello,
    JoinRefused,
    Left,
    Resolved,
    SendState,
    Stop,
    Welcome,
)
from lightning_diloco.protocol.publisher import Current
from lightning_diloco.protocol.records import CountersRecord, DiscardRecord, JobRecord, JoinRecord, LeaveRecord
from lightning_diloco.protocol.rounds import Rounds
from lightning_diloco.shallow_json import read_shallow_json

__all__ = ["FENCED", "Admission"]

FENCED = "Another process has taken over this learner's id."
GIVEN_UP = "This process was given up for dead, and what it had not handed over is discarded. It ends; a new process may join."


class Admission:
    """The door of a job."""

    def __init__(self, job: Job, rounds: Rounds) -> None:
        self._job = job
        self._rounds = rounds
        self._hellos: dict[str, Hello] = {}
        self._found: tuple[str, Found] | None = None
        self._founding_config = SyncConfig()

    def hello(self, session: str, envelope: Envelope, hello: Hello, now_s: float) -> list[SyncerAction]:
        """A process wants in, or is back."""
        job = self._job
        refusal = self.refuse(session, envelope, hello)
        if refusal:
            return refusal
        member = job.members.of(session)
        if member is not None:
            return self.resume(member, hello, now_s)
        if hello.lineage:
            # Only a life that this job does not know any more holds its versions and is no member.
            return [self.fence(session)]
        actions = self._make_room(now_s)
        if actions is None:
            return []
        learner_id = self._free_id(now_s) if hello.learner_id is None else hello.learner_id
        taken, why = self._take_id(learner_id, hello, now_s)
        actions += taken
        if why is not None:
            refused = Reply(session=session, message=JoinRefused(reason=why[0], detail=why[1]))
            return [*actions, refused, CloseSession(session=session)]
        self._hellos[session] = hello
        member = job.members.add(learner_id, session, "waiting")
        member.device, member.batch_size, member.tokens_per_step = hello.device, hello.batch_size, hello.tokens_per_step
        member.life = hello.life
        member.last_heard_s = now_s
        return actions + self._place(member, now_s)

    def refuse(self, session: str, envelope: Envelope, hello: Hello) -> list[SyncerAction]:
        """The answer to a process that may not come in; empty for all others."""
        ended = self.farewell(session)
        if ended is not None:
            return [ended]
        refusal = self._refusal(envelope, hello)
        if refusal is None:
            return []
        return [Reply(session=session, message=JoinRefused(reason=refusal[0], detail=refusal[1])), CloseSession(session=session)]

    def fence(self, session: str) -> Reply:
        """The answer to a life that this job does not know any more."""
        return Reply(session=session, message=Fenced(detail=GIVEN_UP))

    def farewell(self, session: str) -> Reply | None:
        """The last word to a session whose incarnation has ended: its account is closed, so it can never rejoin."""
        reason = self._job.members.end_of(session)
        if reason is None:
            return None
        if reason in ("fenced", "died"):
            return Reply(session=session, message=Fenced(detail=FENCED if reason == "fenced" else GIVEN_UP))
        return Reply(session=session, message=Left(versions=tuple(c.version.n for c in self._job.currents)))

    def _refusal(self, envelope: Envelope, hello: Hello) -> tuple[str, str] | None:
        job = self._job
        if hello.protocol_version != PROTOCOL_VERSION:
            return (
                "protocol_version",
                f"protocol_version={hello.protocol_version}: this syncer speaks {PROTOCOL_VERSION}. Install the same release.",
            )
        if job.options.token and hello.token != job.options.token:
            return "token", "The token is not this job's. Two jobs must not share a syncer: start one syncer for each."
        if envelope.job_id and envelope.job_id != job.options.job_id:
            return "job_id", f"job_id={envelope.job_id!r}: this syncer runs job {job.options.job_id!r}. Start one syncer for each job."
        if hello.lineage and hello.lineage != job.options.lineage:
            return "lineage", "The learner holds the parameters of another history; a job is never founded twice. Start a fresh learner."
        if job.is_ended or job.finish_status is not None:
            return "ended", "This job has ended. Start a new syncer for a new job."
        if not job.is_founded:
            return None
        return self._difference(hello)

    def _difference(self, hello: Hello) -> tuple[str, str] | None:
        config = read_config(hello.config)
        if isinstance(config, str):
            return "config", config
        field = self._job.config.first_difference(config)
        if field is not None:
            ours, theirs = getattr(self._job.config, field), getattr(config, field)
            return (
                "config",
                f"{field}={theirs!r:.500} differs from the job's {ours!r:.500}. The founder's configuration holds: use the same value.",
            )
        if (data := data_difference(None if self._job.leases is None else self._job.leases.spec, hello.data)) is not None:
            return "data", data
        if hello.fingerprint != self._job.fingerprint:
            return (
                "wrong_layout",
                "The layout (names, order, shapes, dtypes, ties) differs from the founder's. Use the same model and version.",
            )
        return None

    def _free_id(self, now_s: float) -> int:
        """An id for a newcomer that brings none: a free one, else that of a dead process, else one that `_take_id` refuses."""
        job = self._job
        free = job.members.free_id(job.num_ids)
        if free is not None:
            return free
        return next((m.learner_id for m in job.members.present() if self._may_replace(m, now_s)), job.num_ids)

    def _may_replace(self, member: Member, now_s: float) -> bool:
        """Whether a member's silence is its end as soon as somebody else wants its id. With a supervisor that one decides."""
        return not self._job.options.is_supervised and member.unheard_s(now_s) > self._job.silent_after_s

    def _make_room(self, now_s: float) -> list[SyncerAction] | None:
        """A place among those that are not members yet, if need be that of the one that was silent longest; None: none is free."""
        joining = [m for m in self._job.members.present() if m.stage != "joined"]
        if len(joining) < MAX_JOINING:
            return []
        oldest = min(joining, key=lambda m: m.last_heard_s)
        # Without an answer the newcomer says hello again in a while: there is nothing to remember of it.
        return self.end(oldest, "died", now_s) if oldest.unheard_s(now_s) > self._job.silent_after_s else None

    def _take_id(self, learner_id: int, hello: Hello, now_s: float) -> tuple[list[SyncerAction], tuple[str, str] | None]:
        options, num_ids = self._job.options, self._job.num_ids
        if learner_id >= num_ids and options.num_slots == num_ids:
            return [], ("learner_id", f"learner_id={learner_id}: this job has {num_ids} learners, ids 0 to {num_ids - 1}.")
        if learner_id >= num_ids:
            return [], (
                "learner_id",
                f"learner_id={learner_id}: a job has at most {num_ids} learner ids, 0 to {num_ids - 1}, because every version names all of "
                "its learners. Give the id of a process that has ended, or none to be given one.",
            )
        before = self._job.members.by_id(learner_id)
        if before is None:
            return [], None
        if options.takeover_token and hello.takeover_token == options.takeover_token:
            fenced = Reply(session=before.session, message=Fenced(detail=FENCED))
            return [fenced, *self.end(before, "fenced", now_s)], None
        if self._may_replace(before, now_s):
            return self.end(before, "died", now_s), None
        return [], (ID_IN_USE, f"learner_id={learner_id} is in use by a live process. Use another id, or none to be given one.")

    def _place(self, member: Member, now_s: float) -> list[SyncerAction]:
        """Founder, in line behind the founder, or joiner."""
        job = self._job
        if job.is_founded and not job.is_recovering:
            return self._receive(member, now_s)
        if member.learner_id == job.options.founder_id and job.options.may_found and not job.is_founded:
            member.stage, member.is_founder = "founding", True
            return [self._welcome(member, "founder", now_s), self._begin_founding(member)]
        return [self._welcome(member, "waiting", now_s)]

    def _begin_founding(self, member: Member) -> BeginFounding:
        hello = self._hellos[member.session]
        return BeginFounding(session=member.session, config=hello.config, fingerprint=hello.fingerprint)

    def _receive(self, member: Member, now_s: float) -> list[SyncerAction]:
        job = self._job
        member.stage = "receiving"
        difference = self._difference(self._hellos[member.session])
        if difference is not None:
            return self._turn_away(member, difference[0], difference[1], now_s)
        job.publisher.start(member.session, {})
        actions: list[SyncerAction] = [self._welcome(member, "joiner", now_s)]
        if job.static_bytes:
            actions.append(TransmitStatic(session=member.session, learner_id=member.learner_id))
        for fragment_id, current in enumerate(job.currents):
            actions += job.publisher.offer(member, fragment_id, current)
        return actions

    def resume(self, member: Member, hello: Hello, now_s: float) -> list[SyncerAction]:
        """The same process is back: same incarnation, missing versions, an answer for every unresolved contribution."""
        job = self._job
        member.last_heard_s = now_s
        # A process that holds everything was let in and its `Ready` was lost: it says so again when it is welcomed back.
        holds_all = bool(hello.lineage) and len(hello.versions) == job.num_fragments
        if not job.is_founded or job.is_recovering or (member.stage == "receiving" and not holds_all):
            return self._welcome_again(member, now_s)
        actions: list[SyncerAction] = [self._welcome(member, "resumed", now_s)]
        for item in hello.unresolved:
            if item.fragment_id >= job.num_fragments:
                continue
            known = job.decisions.get((member.learner_id, item.fragment_id), {}).get(item.seq)
            outcome = "unknown" if known is None else known.outcome
            reason = known.reason if known is not None else None
            answer = Resolved(fragment_id=item.fragment_id, seq=item.seq, outcome=outcome, reason=reason)
            actions.append(Reply(session=member.session, message=answer, incarnation=member.incarnation))
        held = {i: v for i, v in enumerate(hello.versions[: job.num_fragments]) if v.epoch == job.epoch}
        # Before it knew of the restart it may have said hello several times: what is on its way already is not sent again.
        begin = job.publisher.resume if hello.versions and all(v.epoch < job.epoch for v in hello.versions) else job.publisher.start
        begin(member.session, held)
        for fragment_id, current in enumerate(job.currents):
            actions += job.publisher.offer(member, fragment_id, current)
        return actions

    def _welcome_again(self, member: Member, now_s: float) -> list[SyncerAction]:
        """A hello that was said twice, or whose answer was lost: what is on its way already is not sent again."""
        job = self._job
        if member.stage != "receiving":
            return [self._welcome(member, "founder" if member.stage == "founding" else "waiting", now_s)]
        actions: list[SyncerAction] = [self._welcome(member, "member" if member.is_founder else "joiner", now_s)]
        for fragment_id, current in enumerate(job.currents):
            actions += job.publisher.offer(member, fragment_id, current)
        return actions

    def found(self, session: str, message: Found, now_s: float) -> list[SyncerAction]:
        """The appointed founder described the job; its payloads follow."""
        member = self._job.members.of(session)
        if member is None or member.stage != "founding" or self._job.is_founded:
            return []
        config = read_config(self._hellos[session].config)
        if isinstance(config, str):
            return self._turn_away(member, "config", config, now_s)
        ids = [f.fragment_id for f in message.fragments]
        if ids != list(range(len(ids))) or len(message.versions) not in (0, len(ids)):
            detail = "The fragments' ids must be 0, 1, 2, ... and there must be one version for each, or none at all."
            return self._turn_away(member, "wrong_layout", detail, now_s)
        self._founding_config, self._found = config, (session, message)
        return [Reply(session=session, message=SendState(), incarnation=member.incarnation)]

    def _turn_away(self, member: Member, reason: str, detail: str, now_s: float) -> list[SyncerAction]:
        """End a session that is not a member yet with a sentence."""
        refused = Reply(session=member.session, message=JoinRefused(reason=reason, detail=detail), incarnation=member.incarnation)
        return [refused, *self.end(member, "died", now_s)]

    def founded(self, event: FoundingArrived, now_s: float) -> list[SyncerAction]:
        """Everything of the founder is stored: the history begins, and those in line are let in."""
        job, announced = self._job, self._found
        member = job.members.of(event.session)
        # The description must be that of this process: an earlier founder may have died after its own.
        if member is None or announced is None or announced[0] != event.session or job.is_founded or member.stage != "founding":
            return []
        found, self._found = announced[1], None
        numbers = found.versions or (0,) * len(found.fragments)
        currents = [
            Current.alone(f, self._founding_config.wire_dtype, Version(job.epoch, n), crc, {})
            for f, n, crc in zip(found.fragments, numbers, event.crcs, strict=True)
        ]
        hello = self._hellos[event.session]
        job.found(config=self._founding_config, fingerprint=hello.fingerprint, fragments=found.fragments, currents=currents)
        job.static_crc, job.static_bytes = found.static_crc, found.static_bytes
        job.leases = None if hello.data is None else LeaseLedger(hello.data)
        self._rounds.start()
        actions: list[SyncerAction] = [Tape(record=self._job_record(numbers, event, member.learner_id))]
        job.publisher.start(member.session, {i: c.version for i, c in enumerate(currents)})
        member.stage = "receiving"
        actions.append(self._welcome(member, "member", now_s))
        return actions + self.let_in(now_s)

    def let_in(self, now_s: float) -> list[SyncerAction]:
        """There is a model now: those in line are let in."""
        actions: list[SyncerAction] = []
        for other in self._job.members.present():
            if other.stage == "waiting":
                actions += self._receive(other, now_s)
        return actions

    def _job_record(self, numbers: tuple[int, ...], event: FoundingArrived, founder_id: int) -> JobRecord:
        job = self._job
        return JobRecord(
            job_id=job.options.job_id,
            lineage=job.options.lineage,
            epoch=job.epoch,
            config={**job.config.as_dict(), "num_fragments": sum(f.kind == "parameters" for f in job.fragments)},
            fingerprint=job.fingerprint,
            fragments=job.fragments,
            founded_n=numbers,
            founder_id=founder_id,
            founding_bytes=event.payload_bytes,
            num_slots=job.options.num_slots,
            versions=job.options.versions,
            payload_at=event.payload_at,
            data=None if job.leases is None else job.leases.spec,
        )

    def ready(self, session: str, now_s: float) -> list[SyncerAction]:
        """All fragments are held: a member from here on."""
        job = self._job
        member = job.members.of(session)
        if member is None or member.stage != "receiving":
            return []
        # Its word and the transport's acknowledgements come on two channels: the last of both makes the member.
        member.is_ready = True
        if not job.publisher.holds_all(session, job.num_fragments):
            return []
        member.stage, member.last_advance_s, member.last_heard_s = "joined", now_s, now_s
        actions: list[SyncerAction] = [self.join_record(member)]
        if job.stop_reason is not None:
            actions.append(Reply(session=session, message=Stop(reason=job.stop_reason), incarnation=member.incarnation))
        return actions

    def join_record(self, member: Member) -> Tape:
        """The line of the tape that tells of a new member."""
        record = JoinRecord(
            learner_id=member.learner_id,
            incarnation=member.incarnation,
            role="founder" if member.is_founder else "joiner",
            session=member.session,
            life=member.life,
            device=member.device,
            batch_size=member.batch_size,
            tokens_per_step=member.tokens_per_step,
            job_step=member.joined_at_step,
        )
        return Tape(record=record)

    def end(self, member: Member, reason: LeaveReason, now_s: float) -> list[SyncerAction]:
        """End an incarnation: its pulls end, and what it had not handed over is discarded with the reason."""
        job = self._job
        was_joined = member.stage == "joined"
        job.members.remove(member, reason)
        job.publisher.stop(member.session)
        self._hellos.pop(member.session, None)
        if job.leases is not None:
            job.leases.end(member.learner_id, member.incarnation, member.session, said_last_word=reason not in ("died", "fenced"))
        # What is said to it now, and what was said just before, are control messages; only what is queued on bulk is dropped.
        actions: list[SyncerAction] = [CloseSession(session=member.session)]
        if not was_joined:
            return actions
        if member.tokens > member.taped_tokens:
            # Totals that came with a `Progress` or a contribution: what is discarded below must have been trained on the tape.
            counters = CountersRecord(
                learner_id=member.learner_id, incarnation=member.incarnation, inner_steps=member.inner_step, tokens=member.tokens
            )
            actions.append(Tape(record=counters))
        actions.append(Tape(record=LeaveRecord(learner_id=member.learner_id, incarnation=member.incarnation, reason=reason)))
        lost = "fenced" if reason == "fenced" else "died" if reason == "died" else "drain"
        for fragment_id, tokens in job.ledger.end_incarnation(member.learner_id):
            record = DiscardRecord(learner_id=member.learner_id, fragment_id=fragment_id, reason=lost, tokens=tokens)  # type: ignore[arg-type]
            actions.append(Tape(record=record))
        return actions + self._rounds.drop_learner(member.learner_id, now_s)

    def _welcome(self, member: Member, role: str, now_s: float) -> Reply:
        job = self._job
        # Who needs longer to start than the others is no late joiner, and trains all its steps.
        if role == "joiner" and not (job.options.starts_together and member.incarnation == 0):
            member.joined_at_step = job.members.job_step(now_s)
        message = Welcome(
            role=role,  # type: ignore[arg-type]
            learner_id=member.learner_id,
            incarnation=member.incarnation,
            shards=job.options.shards,
            job_step=member.joined_at_step if member.stage == "receiving" else job.members.job_step(now_s),
            next_seq=job.next_seq(member.learner_id),
            static_crc=job.static_crc,
            static_bytes=job.static_bytes,
            data=None if job.leases is None else job.leases.spec,
        )
        return Reply(session=member.session, message=message, incarnation=member.incarnation)


def read_config(data: bytes) -> SyncConfig | str:
    """The configuration in a hello, or the sentence that says why it cannot be read."""
    try:
        return SyncConfig.from_options(read_shallow_json(data.decode()))
    except (ConfigurationError, TypeError, ValueError, AttributeError, OverflowError) as error:
        return f"The configuration cannot be read: {error}"[:1000]
