"""`LearnerMachine`: the rules of a learner, without I/O, clock, tensor or lock.

    stage       what happens
    new         nothing was said
    greeting    Hello is out; a Welcome tells the role (waiting: somebody else founds)
    founding    the founding state is on its way
    receiving   full transfers are on their way
    joined      inner steps; adoption and pulls at their boundaries
    leaving     final contributions are on their way
    left / refused / fenced: the end

At a boundary, in this order (PROTOCOL.md section 3): count; adopt what is ready; heal what was refused for its values; answer pulls. The
answer is `busy` with an unresolved contribution, a version received and not adopted, no work, or no room to stage; nothing is dropped.
Whether an own contribution is in a version is decided by `merged_through` alone, never by "members of the round".

Invariants (property tests): versions only grow; parameters = base + local progress that is not merged; at most one unresolved
contribution per fragment (and a final one after it); tokens = merged + pending + discarded.

References:
    Decoupled DiLoCo, arXiv 2604.21428, algorithm 1. Adoption by rebase is our choice (the paper overwrites).
"""

from __future__ import annotations

from collections.abc import Callable

from lightning_diloco.errors import LocalProtocolError
from lightning_diloco.protocol.actions import (
    Decode,
    Fence,
    Joined,
    LearnerAction,
    LeftDone,
    RefuseJoin,
    Send,
    SendDescription,
    SendFounding,
    SendHeld,
    SendLeave,
    StopTraining,
)
from lightning_diloco.protocol.events import (
    Boundary,
    ControlReceived,
    Decoded,
    Encoded,
    JoinRequested,
    LearnerEvent,
    LeaveRequested,
    PauseChanged,
    PublicationArrived,
    StaticInstalled,
    StopRequested,
    Tick,
)
from lightning_diloco.protocol.identity import Version
from lightning_diloco.protocol.learner_exchange import Exchange
from lightning_diloco.protocol.learner_state import NOTHING, Content, LearnerOptions, LearnerState
from lightning_diloco.protocol.messages import (
    PROTOCOL_VERSION,
    Describe,
    Discarded,
    Envelope,
    Fenced,
    FromSyncer,
    Heartbeat,
    HeldFragment,
    Hello,
    JoinRefused,
    Left,
    NeedFull,
    NotHeld,
    Paused,
    Pull,
    Ready,
    Recall,
    Released,
    Resolved,
    Stop,
    StopRequest,
    Unresolved,
    Welcome,
    WhoAreYou,
)

__all__ = ["LearnerMachine", "LearnerOptions"]


class LearnerMachine:
    """A learner's state and rules.

    Args:
        options: who this process is.
    """

    def __init__(self, options: LearnerOptions) -> None:
        self.state = LearnerState(options)
        self._exchange = Exchange(self.state)
        self._welcome: Welcome | None = None
        self._founding_epoch = -1
        self._needs_static = False
        self._has_static = False
        self._handlers: dict[type, Callable[..., list[LearnerAction]]] = {
            JoinRequested: lambda event: self._say_hello(),
            ControlReceived: self._control,
            PublicationArrived: self._publication,
            Decoded: self._decoded,
            StaticInstalled: self._static_installed,
            Boundary: self._exchange.boundary,
            Encoded: self._exchange.encoded,
            PauseChanged: self._exchange.pause,
            StopRequested: self._stop_requested,
            LeaveRequested: self._exchange.leave,
            Tick: lambda event: [],
        }
        self._messages: dict[type, Callable[..., list[LearnerAction]]] = {
            Welcome: self._welcomed,
            JoinRefused: self._join_refused,
            Fenced: self._fenced,
            WhoAreYou: lambda m: self._say_hello(),
            Pull: self._exchange.pulled,
            Released: self._exchange.released,
            Resolved: self._exchange.resolved,
            Recall: self._recalled,
            Describe: self._describe,
            Stop: self._stopped,
            Left: self._left,
        }

    def handle(self, event: LearnerEvent, now_s: float) -> list[LearnerAction]:
        """Take one event; returns the actions that follow from it, in order.

        Args:
            event: what happened.
            now_s: monotonic time in seconds (the rules of a learner need none; it stands here so that both machines look alike).
        """
        if self.state.stage in ("left", "refused", "fenced"):
            return []
        return self._handlers[type(event)](event)

    def report(
        self,
        *,
        first_gap: int = 0,
        step_gaps_s: tuple[float, ...] = (),
        paused_s: tuple[float, ...] = (),
        stalls_s: tuple[float, ...] = (),
        last_step_age_s: float = 0.0,
        clock_s: float = 0.0,
    ) -> Heartbeat:
        """The full report of this moment (see `Heartbeat`)."""
        pending = [(f.fragment_id, p) for f in self.state.fragments for p in (f.unresolved, f.final) if p is not None and p.is_sent]
        return Heartbeat(
            inner_step=self.state.inner_step,
            tokens=self.state.tokens,
            # One of a syncer before this one is none: the same number of now would be taken for it.
            versions=tuple(
                v.n if (v := f.arriving or f.held) is not None and v.epoch == self.state.envelope.epoch else 0 for f in self.state.fragments
            ),
            unresolved=tuple(Unresolved(i, p.header.seq) for i, p in pending),
            discarded=tuple(Discarded(f.fragment_id, r, n) for f in self.state.fragments for r, n in sorted(f.discarded.items())),
            first_gap=first_gap,
            step_gaps_s=step_gaps_s,
            paused_s=paused_s,
            stalls_s=stalls_s,
            last_step_age_s=last_step_age_s,
            clock_s=clock_s,
            is_paused=self.state.is_paused,
            batch_size=self.state.batch_size,
        )

    @property
    def is_waiting(self) -> bool:
        """Whether the join waits for another learner, which founds the job."""
        return self.state.stage == "greeting" and self._welcome is not None and self._welcome.role == "waiting"

    # ---- joining ------------------------------------------------------------------------------------------------------------

    def _say_hello(self) -> list[LearnerAction]:
        if self.state.stage == "new":
            self.state.stage = "greeting"
        options = self.state.options
        holds_all = self.state.stage in ("joined", "leaving")
        hello = Hello(
            protocol_version=PROTOCOL_VERSION,
            token=options.token,
            learner_id=self.state.learner_id if self.state.learner_id >= 0 else options.learner_id,
            nonce=options.nonce,
            takeover_token=options.takeover_token,
            config=options.config,
            fingerprint=options.fingerprint,
            lineage=self.state.envelope.lineage if holds_all else "",
            versions=tuple(f.held for f in self.state.fragments if f.held is not None) if holds_all else (),
            unresolved=self.report().unresolved,
            inner_step=self.state.inner_step,
            tokens=self.state.tokens,
            device=options.device,
            batch_size=self.state.batch_size,
            tokens_per_step=options.tokens_per_step,
            joined_at_step=self.state.joined_at_step,
            life=options.life,
            # Once it is known, the job's: a syncer that has lost everything goes on with the same seed.
            data=options.data if self._welcome is None or self._welcome.data is None else self._welcome.data,
        )
        return [Send(message=hello)]

    def _control(self, event: ControlReceived) -> list[LearnerAction]:
        state, message, actions = self.state, event.message, list[LearnerAction]()
        if not self.heeds(event.envelope, message):
            return []
        if state.stage in ("joined", "leaving"):
            is_restart = event.envelope.epoch > state.envelope.epoch
            if is_restart and isinstance(message, Pull | Released | Resolved | Stop | Left):
                return self._say_hello()  # the syncer has started again, and its welcome was lost
            if is_restart and isinstance(message, Welcome):
                actions += self._exchange.restarted()
        handler = self._messages.get(type(message))
        if isinstance(message, Welcome):
            state.envelope = event.envelope
        return actions + (handler(message) if handler is not None else [])

    def heeds(self, envelope: Envelope, message: FromSyncer) -> bool:
        """Whether a control message is this learner's syncer's. Before the join it knows no syncer yet, and listens to all."""
        ours = self.state.envelope
        if self.state.stage not in ("joined", "leaving"):
            return True
        if isinstance(message, Welcome) and envelope.epoch == ours.epoch and envelope.incarnation != ours.incarnation:
            return False  # one syncer has one number for this life
        return self._is_ours(envelope)

    def _is_ours(self, envelope: Envelope) -> bool:
        """A learner refuses a lower epoch, another lineage or job (all are silent: an old syncer woke beside its successor)."""
        ours = self.state.envelope
        return envelope.job_id == ours.job_id and envelope.lineage == ours.lineage and envelope.epoch >= ours.epoch

    def _welcomed(self, message: Welcome) -> list[LearnerAction]:
        self._welcome = message
        if self.state.stage in ("joined", "leaving"):
            return self._say_again()
        if message.role == "resumed":
            return []
        self.state.learner_id = message.learner_id
        if message.next_seq:
            for fragment, seq in zip(self.state.fragments, message.next_seq, strict=False):
                fragment.next_seq = seq
        if message.role == "founder":
            if self.state.stage == "founding" and self._founding_epoch == self.state.envelope.epoch:
                return []
            # For the first time, or for a syncer that has started again while the state was on its way.
            self.state.stage, self._founding_epoch = "founding", self.state.envelope.epoch
            return [SendFounding()]
        if message.role == "joiner":
            self.state.stage = "receiving"
            self._needs_static = message.static_bytes > 0 and not self._has_static
            return [*self._ask_for_missed(), *self._maybe_joined()]
        if message.role == "member":
            numbers = self.state.options.founded_n or (0,) * len(self.state.fragments)
            for fragment, n in zip(self.state.fragments, numbers, strict=True):
                fragment.base = fragment.held = Version(self.state.envelope.epoch, n)
            return [*self._join_done(), *self._ask_for_missed()]
        return []

    def _say_again(self) -> list[LearnerAction]:
        """The session is a new one: what was said once and may be lost with the old one is said again."""
        state = self.state
        actions: list[LearnerAction] = [Send(message=Ready(inner_step=state.inner_step))]
        if state.stage == "joined":
            actions.append(Send(message=Paused(is_paused=state.is_paused)))
        if state.wants_stop is not None and not state.is_stopped:
            actions.append(Send(message=StopRequest(reason=state.wants_stop)))
        if state.said_leave is not None:
            actions.append(SendLeave(reason=state.said_leave))
        return actions + self._ask_for_missed()

    def _ask_for_missed(self) -> list[LearnerAction]:
        """Publications that overtook the welcome (two channels) could not be used; the syncer believes that they are held.

        The question may be lost as well: it is asked at every welcome until the answer is here.
        """
        return [Send(message=NeedFull(fragment_id=f.fragment_id)) for f in self.state.fragments if f.is_missed]

    def _static_installed(self, event: StaticInstalled) -> list[LearnerAction]:
        self._needs_static, self._has_static = False, True
        return self._maybe_joined()

    def _maybe_joined(self) -> list[LearnerAction]:
        if self.state.stage == "receiving" and not self._needs_static and all(f.base is not None for f in self.state.fragments):
            return self._join_done()
        return []

    def _join_done(self) -> list[LearnerAction]:
        welcome = self._welcome
        if welcome is None:
            raise LocalProtocolError("joined without a welcome")
        self.state.stage, self.state.joined_at_step = "joined", welcome.job_step
        joined = Joined(
            learner_id=self.state.learner_id,
            incarnation=welcome.incarnation,
            role=welcome.role,
            job_step=welcome.job_step,
            data=welcome.data,
        )
        return [Send(message=Ready(inner_step=self.state.inner_step)), joined]

    def _stop_requested(self, event: StopRequested) -> list[LearnerAction]:
        self.state.wants_stop = event.reason
        return [Send(message=StopRequest(reason=event.reason))]

    def _stopped(self, message: Stop) -> list[LearnerAction]:
        if self.state.is_stopped:
            return []
        self.state.is_stopped = True
        return [StopTraining(reason=message.reason)]

    def _join_refused(self, message: JoinRefused) -> list[LearnerAction]:
        self.state.stage = "refused"
        return [RefuseJoin(reason=message.reason, detail=message.detail)]

    def _fenced(self, message: Fenced) -> list[LearnerAction]:
        self.state.stage = "fenced"
        return [Fence(detail=message.detail)]

    # ---- publications -------------------------------------------------------------------------------------------------------

    def _publication(self, event: PublicationArrived) -> list[LearnerAction]:
        header = event.header
        if header.fragment_id >= len(self.state.fragments):
            return []
        if self.state.stage not in ("receiving", "joined", "leaving"):
            self.state.fragments[header.fragment_id].is_missed = True
            return []
        fragment = self.state.fragments[header.fragment_id]
        if not self._is_ours(event.envelope) or header.version.epoch < self.state.envelope.epoch:
            return []
        if header.version.epoch > self.state.envelope.epoch:
            # It has overtaken the welcome of a syncer that started again.
            fragment.is_missed = True
            return self._say_hello()
        if fragment.held is not None and header.version <= fragment.held:
            fragment.is_missed = False
            return []
        if header.parent is not None and header.parent != fragment.held:
            return [Send(message=NeedFull(fragment_id=header.fragment_id))]
        fragment.is_missed = False
        merged = header.merged_through.get(self.state.learner_id, NOTHING)
        fragment.arriving, fragment.arriving_content = header.version, Content(header.crc, merged, header.merged_through)
        return [
            Decode(
                fragment_id=header.fragment_id,
                version=header.version,
                is_full=header.parent is None,
                with_contribution=fragment.contains(merged),
                is_joining=self.state.stage == "receiving",
            )
        ]

    def _decoded(self, event: Decoded) -> list[LearnerAction]:
        fragment = self.state.fragments[event.fragment_id]
        if fragment.arriving != event.version:
            return []
        if not event.crc_ok:
            fragment.arriving = None
            return [Send(message=NeedFull(fragment_id=event.fragment_id))]
        before, merged_before = fragment.held, fragment.held_content.mine.seq
        fragment.accept_held()
        if self.state.stage == "receiving":
            fragment.put_in_place()
            return self._maybe_joined()
        if before is not None and event.fragment_id not in self.state.options.value_fragments:
            self.state.merges_seen += max(0, event.version.n - before.n)
            self.state.merges_with_us += 1 if fragment.held_content.mine.seq > merged_before else 0
        return self._exchange.leave_again()

    def _recalled(self, message: Recall) -> list[LearnerAction]:
        """A syncer that started again has lost what is held here."""
        if self.state.stage not in ("joined", "leaving") or message.fragment_id >= len(self.state.fragments):
            return []
        fragment = self.state.fragments[message.fragment_id]
        if fragment.held != message.version:
            return [Send(message=NotHeld(fragment_id=message.fragment_id))]
        content = fragment.held_content
        header = HeldFragment(
            fragment_id=message.fragment_id, version=message.version, crc=content.crc, merged_through=dict(content.through)
        )
        return [SendHeld(header=header)]

    def _describe(self, message: Describe) -> list[LearnerAction]:
        """A syncer has nothing but its members to go on from."""
        if self.state.stage not in ("joined", "leaving"):
            return []
        earlier = tuple(max(0, f.held_content.mine.tokens - f.merged_tokens - f.tokens_on_hand) for f in self.state.fragments)
        return [SendDescription(earlier=earlier, with_static=message.with_static)]

    def _left(self, message: Left) -> list[LearnerAction]:
        self.state.stage = "left"
        return [LeftDone()]
