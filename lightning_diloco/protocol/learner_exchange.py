"""What a learner does at the boundary of an inner step, and the life of its contributions (PROTOCOL.md sections 3, 4, 6, 7).

At a boundary, in this order: count; adopt what is ready; heal what was refused for its values; answer pulls. The answer is `busy` with an
unresolved contribution, a version received and not adopted, no work, or no room to stage; nothing is dropped. Whether an own
contribution is in a version is decided by `merged_through` alone, never by "members of the round".
"""

from __future__ import annotations

from typing import Literal

from lightning_diloco.errors import LocalProtocolError
from lightning_diloco.protocol.actions import (
    Adopt,
    DropPrepared,
    Forget,
    Heal,
    LearnerAction,
    LeaveAgain,
    LeftDone,
    Send,
    SendContribution,
    SendLeave,
    Snapshot,
    UnsayLeave,
)
from lightning_diloco.protocol.events import Boundary, Encoded, LeaveRequested, PauseChanged
from lightning_diloco.protocol.learner_state import FragmentState, LearnerState, Pending
from lightning_diloco.protocol.messages import Adopted, Busy, Contribution, Paused, Progress, Pull, Released, Resolved, StopRequest

__all__ = ["Exchange"]


class Exchange:
    """The rules of adoption and contribution.

    Args:
        state: the learner's state, shared with `LearnerMachine`.
    """

    def __init__(self, state: LearnerState) -> None:
        self._state = state

    def boundary(self, event: Boundary) -> list[LearnerAction]:
        """The training thread ended an inner step: count, adopt, heal, answer."""
        self._state.inner_step += event.steps
        self._state.tokens += event.tokens
        if self._state.stage != "joined":
            return []
        # Heals come before the pulls of all fragments: a snapshot taken in the same boundary must not count work that a heal throws away.
        actions = [*self._adopt_all(), *self._heal_all(event.poisoned)]
        for fragment in self._state.fragments:
            if fragment.pulled_by is not None:
                actions.append(self._answer_pull(fragment, event.can_snapshot))
        actions.append(Send(message=Progress(inner_step=self._state.inner_step, tokens=self._state.tokens)))
        return actions

    def _adopt_all(self) -> list[LearnerAction]:
        return [action for fragment in self._state.fragments if fragment.is_ready for action in self._adopt(fragment)]

    def _adopt(self, fragment: FragmentState) -> list[LearnerAction]:
        actions: list[LearnerAction] = []
        version, content = fragment.held, fragment.held_content
        if version is None or fragment.base is None:
            raise LocalProtocolError("adoption without a version")
        mode = "overwrite" if fragment.is_handed_over else self._state.options.adopt
        actions.append(Adopt(fragment_id=fragment.fragment_id, version=version, mode=mode))
        seq = fragment.contains(content.mine)
        if version.epoch > fragment.base.epoch:
            fragment.roll_back(content.mine)
            actions += [] if seq else self._take_back(fragment)
        if seq:
            fragment.settle()
            actions.append(Forget(fragment_id=fragment.fragment_id, seq=seq))
        if self._state.options.adopt == "overwrite":
            fragment.overwrite(self._state.inner_step, self._state.tokens)
        fragment.put_in_place()
        actions.append(Send(message=Adopted(fragment_id=fragment.fragment_id, version=version, crc=content.crc)))
        return actions

    def _take_back(self, fragment: FragmentState) -> list[LearnerAction]:
        """The syncer that was to merge the unresolved contribution has lost it: its work is local again, and goes into a new one."""
        pending, fragment.unresolved = fragment.unresolved, None
        if pending is None:
            return []
        if not pending.in_counters:
            fragment.discard("overwritten", pending.header.tokens)
        return [Forget(fragment_id=fragment.fragment_id, seq=pending.header.seq)] if pending.is_sent else []

    def _heal_all(self, poisoned: tuple[int, ...] | None) -> list[LearnerAction]:
        """Heal what was refused for its values, and with `nonfinite` everything else that is poisoned."""
        fragments = self._state.fragments
        for fragment_id in poisoned or ():
            fragments[fragment_id].heal = "nonfinite"
        due = [f for f in fragments if f.heal == "norm" or (f.heal is not None and poisoned is not None)]
        return [action for fragment in due for action in self._heal(fragment)]

    def _heal(self, fragment: FragmentState) -> list[LearnerAction]:
        reason: Literal["nonfinite", "norm"] = "nonfinite" if fragment.heal == "nonfinite" else "norm"
        fragment.heal = None
        actions: list[LearnerAction] = []
        pending = fragment.unresolved
        if pending is not None and pending.in_counters and not pending.is_sent:
            # It was copied aside and not encoded yet: nobody has seen it, so its work goes with the rest.
            actions += self._withdraw(fragment, pending)
            fragment.unresolved = pending = None
        kept = pending if pending is not None and pending.in_counters else None
        steps, tokens = (kept.header.steps, kept.header.tokens) if kept is not None else (0, 0)
        fragment.discard(reason, self._state.tokens - fragment.since_tokens - tokens)
        fragment.since_step, fragment.since_tokens = self._state.inner_step - steps, self._state.tokens - tokens
        if kept is not None:
            kept.is_mended = True
        return [*actions, Heal(fragment_id=fragment.fragment_id, reason=reason, keep_seq=kept.header.seq if kept is not None else 0)]

    def _withdraw(self, fragment: FragmentState, pending: Pending) -> list[LearnerAction]:
        # Its payload is forgotten when it is encoded, in vain.
        return [Send(message=Busy(fragment_id=fragment.fragment_id, round_id=pending.header.round_id or 0))]

    def _answer_pull(self, fragment: FragmentState, can_snapshot: bool) -> LearnerAction:
        round_id, fragment.pulled_by = fragment.pulled_by, None
        has_work = self._state.inner_step > fragment.since_step and self._state.tokens > fragment.since_tokens
        is_free = fragment.unresolved is None and fragment.heal is None and not fragment.is_behind and not self._is_old(fragment)
        if not (is_free and has_work and can_snapshot):
            return Send(message=Busy(fragment_id=fragment.fragment_id, round_id=round_id or 0))
        fragment.unresolved = Pending(self._header(fragment, round_id))
        return Snapshot(fragment_id=fragment.fragment_id, seq=fragment.unresolved.header.seq)

    def _is_old(self, fragment: FragmentState) -> bool:
        """Whether it stands on a version of a syncer that has started again since; the same version comes anew."""
        return fragment.base is not None and fragment.base.epoch < self._state.envelope.epoch

    def _header(self, fragment: FragmentState, round_id: int | None, after: Pending | None = None) -> Contribution:
        if fragment.base is None:
            raise LocalProtocolError("a contribution without a base")
        counted = after.header if after is not None and after.in_counters else None
        return Contribution(
            fragment_id=fragment.fragment_id,
            seq=fragment.take_seq(),
            round_id=round_id,
            base=fragment.base,
            base_merged_seq=fragment.base_content.mine.seq,
            steps=max(1, self._state.inner_step - fragment.since_step - (counted.steps if counted else 0)),
            tokens=self._state.tokens - fragment.since_tokens - (counted.tokens if counted else 0),
            inner_step=self._state.inner_step,
            total_tokens=self._state.tokens,
            crc=0,
            is_final=self._state.stage == "leaving",
            after=after.header.seq if after is not None else None,
        )

    def encoded(self, event: Encoded) -> list[LearnerAction]:
        """A snapshot was encoded: send it."""
        fragment = self._state.fragments[event.fragment_id]
        for name in ("unresolved", "final"):
            pending: Pending | None = getattr(fragment, name)
            if pending is not None and pending.header.seq == event.seq:
                header = _with_crc(pending.header, event.crc)
                pending.header, pending.is_sent = header, True
                return [SendContribution(header=header)]
        return [Forget(fragment_id=event.fragment_id, seq=event.seq)]  # it was withdrawn meanwhile

    def pulled(self, message: Pull) -> list[LearnerAction]:
        """The syncer asks for a contribution: answered at the next boundary, or busy at once if there will be none."""
        if self._state.stage not in ("joined", "leaving") or message.fragment_id >= len(self._state.fragments):
            return []
        if self._state.is_paused or self._state.stage == "leaving":
            return [Send(message=Busy(fragment_id=message.fragment_id, round_id=message.round_id))]
        self._state.fragments[message.fragment_id].pulled_by = message.round_id
        return []

    def released(self, message: Released) -> list[LearnerAction]:
        """A round ended without this learner's answer."""
        if message.fragment_id < len(self._state.fragments) and self._state.fragments[message.fragment_id].pulled_by == message.round_id:
            self._state.fragments[message.fragment_id].pulled_by = None
        return []

    def resolved(self, message: Resolved) -> list[LearnerAction]:
        """The fate of a contribution."""
        if message.fragment_id >= len(self._state.fragments):
            return []
        fragment = self._state.fragments[message.fragment_id]
        is_final = fragment.final is not None and fragment.final.header.seq == message.seq
        pending = fragment.final if is_final else fragment.unresolved
        if pending is None or pending.header.seq != message.seq:
            return []
        if message.outcome == "unknown":
            # One of an earlier epoch waits for the version that tells whether it is merged.
            is_of_now = pending.header.base.epoch == self._state.envelope.epoch
            return [SendContribution(header=pending.header)] if pending.is_sent and is_of_now else []
        if message.outcome != "refused":
            pending.is_acknowledged = True
            return self._maybe_left()
        if is_final:
            fragment.final = None
        else:
            fragment.unresolved = None
        self._count_refusal(fragment, pending, message)
        forget = Forget(fragment_id=fragment.fragment_id, seq=message.seq, reason=message.reason)
        return [forget, *self._maybe_left()]

    def _count_refusal(self, fragment: FragmentState, pending: Pending, message: Resolved) -> None:
        """d^ is forgotten; work and counters stay local, but for values that must not be sent again."""
        by_value = message.reason in ("nonfinite", "norm")
        if not pending.in_counters:
            fragment.discard("overwritten", pending.header.tokens)
        elif by_value and self._state.stage == "leaving":
            fragment.discard("nonfinite" if message.reason == "nonfinite" else "norm", pending.header.tokens)
            fragment.discarded_in_place += pending.header.tokens
        elif message.reason == "nonfinite" and pending.is_mended:
            fragment.discard("nonfinite", pending.header.tokens)
            fragment.since_step += pending.header.steps
            fragment.since_tokens += pending.header.tokens
        elif by_value:
            fragment.heal = message.reason

    def pause(self, event: PauseChanged) -> list[LearnerAction]:
        """Inner steps stop for a while, or go on."""
        self._state.is_paused = event.is_paused
        actions: list[LearnerAction] = [Send(message=Paused(is_paused=event.is_paused))] if self._state.stage == "joined" else []
        return [*(self._refuse_pulls() if event.is_paused else []), *actions]

    def _refuse_pulls(self) -> list[LearnerAction]:
        actions: list[LearnerAction] = []
        for fragment in self._state.fragments:
            if fragment.pulled_by is not None:
                actions.append(Send(message=Busy(fragment_id=fragment.fragment_id, round_id=fragment.pulled_by)))
                fragment.pulled_by = None
        return actions

    # ---- leaving ------------------------------------------------------------------------------------------------------------

    def leave(self, event: LeaveRequested) -> list[LearnerAction]:
        """Push what is left of every fragment, then say good-bye when each is accounted for."""
        if self._state.stage == "leaving":
            return []
        if self._state.stage != "joined":
            # Nothing was trained; the syncer should know that nobody comes.
            was_new, self._state.stage = self._state.stage == "new", "left"
            return [LeftDone()] if was_new else [SendLeave(reason=event.reason), LeftDone()]
        self._state.stage, self._state.leave_reason = "leaving", event.reason
        actions = [*self._refuse_pulls(), *self._adopt_all(), *self._heal_all(event.poisoned)]
        for fragment in self._state.fragments:
            counted = fragment.unresolved.header.tokens if fragment.unresolved and fragment.unresolved.in_counters else 0
            if self._state.tokens - fragment.since_tokens - counted > 0:
                fragment.final = Pending(self._header(fragment, None, fragment.unresolved))
                # After an overwrite the unresolved contribution is not in the parameters any more.
                seq, after = fragment.final.header.seq, fragment.unresolved is not None and fragment.unresolved.in_counters
                actions.append(Snapshot(fragment_id=fragment.fragment_id, seq=seq, after_unresolved=after))
        return actions + self._maybe_left()

    def restarted(self) -> list[LearnerAction]:
        """The syncer has started again: what was received of the one before and not adopted is dropped, what it was told is told again.

        Unresolved contributions wait for the first version of the new epoch, which says whether they are in it.
        """
        state = self._state
        actions: list[LearnerAction] = []
        if state.said_leave is not None:
            state.leave_reason, state.said_leave = state.said_leave, None
            actions.append(UnsayLeave())
        if state.wants_stop is not None and state.is_stopped:
            # The others may not have been told.
            actions.append(Send(message=StopRequest(reason=state.wants_stop)))
        for pending in [p for f in state.fragments for p in (f.unresolved, f.final) if p is not None]:
            pending.is_acknowledged = False
        return [*actions, *(DropPrepared(fragment_id=f.fragment_id) for f in state.fragments if f.drop_held())]

    def leave_again(self) -> list[LearnerAction]:
        """All fragments of the new epoch are here: a leave that the old syncer has not completed begins anew."""
        state, reason = self._state, self._state.leave_reason
        if state.stage != "leaving" or reason is None or not any(self._is_old(f) for f in state.fragments):
            return []
        if any(f.held is None or f.held.epoch < state.envelope.epoch for f in state.fragments):
            return []
        actions: list[LearnerAction] = []
        for fragment in state.fragments:
            final, fragment_id = fragment.final, fragment.fragment_id
            if final is None:
                continue
            if fragment.held_content.mine.seq >= final.header.seq:
                sent = [p.header.seq for p in (fragment.unresolved, final) if p is not None]
                fragment.settle_final()
            else:
                sent, fragment.final = [final.header.seq] if final.is_sent else [], None
            actions += [Forget(fragment_id=fragment_id, seq=seq) for seq in sent]
        state.stage, state.leave_reason = "joined", None
        return [*actions, LeaveAgain(reason=reason)]

    def _maybe_left(self) -> list[LearnerAction]:
        if self._state.stage != "leaving" or self._state.leave_reason is None:
            return []
        pending = [p for f in self._state.fragments for p in (f.unresolved, f.final) if p is not None]
        if any(not p.is_acknowledged for p in pending):
            return []
        reason, self._state.leave_reason = self._state.leave_reason, None
        self._state.said_leave = reason
        return [SendLeave(reason=reason)]


def _with_crc(header: Contribution, crc: int) -> Contribution:
    fields = {name: getattr(header, name) for name in header.__struct_fields__}
    return Contribution(**{**fields, "crc": crc})
