"""How lives end, and how a job ends (PROTOCOL.md section 6).

A leave is complete when its learner holds what its last work has become, or at once if others stay behind to merge it. The last one also
waits until that is on the disk: from then on nobody else holds it. With a
supervisor the job ends by its word alone (`Finish`). By hand it is over when nobody is left and at least one learner has reached its limit
or was stopped; learners that left by signal alone are expected back. Without a supervisor nobody says who is dead, so silence must: a
learner that was not heard for ten heartbeats is not waited for by the last leaver, and one that was not heard for a minute does not hold up
the end.
"""

from __future__ import annotations

from lightning_diloco.protocol.actions import Ended, MakeDurable, Reply, SyncerAction
from lightning_diloco.protocol.admission import Admission
from lightning_diloco.protocol.events import Durable, Finish, LearnerLost
from lightning_diloco.protocol.identity import Version
from lightning_diloco.protocol.job import Job
from lightning_diloco.protocol.members import Member
from lightning_diloco.protocol.messages import Leave, Left
from lightning_diloco.protocol.rounds import Rounds

__all__ = ["Departures"]


class Departures:
    """The way out of a job.

    Args:
        job: its state.
        rounds: of all fragments.
        admission: closes accounts.
    """

    def __init__(self, job: Job, rounds: Rounds, admission: Admission) -> None:
        self._job = job
        self._rounds = rounds
        self._admission = admission
        self._leaving: dict[str, Leave] = {}
        self._until_s: dict[str, float] = {}
        self._asked: tuple[Version, ...] = ()
        self._durable: tuple[Version, ...] = ()
        self.is_winding_up = False
        """Somebody has reached its limit, or was stopped: the job ends when the others have gone."""

    def is_leaving(self, member: Member) -> bool:
        """Whether it has said its last word and waits for the answer."""
        return member.session in self._leaving

    def next_deadline_s(self, now_s: float) -> float | None:
        """When the next leaver has waited long enough; what has passed waits for a merge, not for time."""
        return min((t for t in self._until_s.values() if t > now_s), default=None)

    def leave(self, member: Member, message: Leave, now_s: float) -> list[SyncerAction]:
        """Last word of a member. The last one that leaves closes what remains, and waits for the result."""
        self._leaving[member.session] = message
        self._until_s[member.session] = now_s + self._job.config.drain_timeout_s
        self.is_winding_up = self.is_winding_up or message.reason != "signal"
        member.is_paused = member.is_leaving = True
        actions: list[SyncerAction] = []
        for round_ in self._rounds.all:
            if round_.is_collecting:
                actions += self._rounds.end_pull(member.learner_id, round_.fragment_id, None, now_s)
        return actions

    def leave_early(self, member: Member, message: Leave, now_s: float) -> list[SyncerAction]:
        """It leaves before it was a member: nothing of it is here."""
        return [self._left(member), *self._admission.end(member, message.reason, now_s)]

    def forget(self, session: str) -> None:
        """The session has ended in another way."""
        self._leaving.pop(session, None)
        self._until_s.pop(session, None)

    def expire(self, now_s: float) -> list[SyncerAction]:
        """End those that fell silent before they were members: they hold memory, and an id that others may want."""
        actions: list[SyncerAction] = []
        if not self._job.options.is_supervised:
            for member in self._job.members.present():
                if member.stage != "joined" and member.unheard_s(now_s) > self._job.given_up_after_s:
                    actions += self._admission.end(member, "died", now_s)
        return actions

    def complete(self, now_s: float) -> list[SyncerAction]:
        """Let those go who may go, and end the job if it is over."""
        job, actions = self._job, list[SyncerAction]()
        if not self._leaving and not self.is_winding_up and job.finish_status is None:
            return actions
        for session in [s for s in self._leaving if job.members.of(s) is None]:
            self.forget(session)
        is_over = self._is_over(now_s)
        if is_over:
            # Their accounts close first: what they handed over is merged below, the rest is gone.
            for member in self._others():
                actions += self._admission.end(member, "died", now_s)
        staying = [m for m in self._others() if job.options.is_supervised or m.unheard_s(now_s) <= job.silent_after_s]
        if not staying and (self._leaving or is_over):
            for round_ in self._rounds.all:
                actions += self._rounds.force(round_, now_s)
            if not self._rounds.is_quiet():
                return actions
        is_safe = bool(staying) or self._is_durable(actions)
        for session, message in list(self._leaving.items()):
            leaver = job.members.of(session)
            if leaver is not None and (staying or (is_safe and self._has_everything(session)) or now_s >= self._until_s[session]):
                self.forget(session)
                actions += [self._left(leaver), *self._admission.end(leaver, message.reason, now_s)]
        return actions + (self._end() if is_over and not self._leaving else [])

    def _is_durable(self, actions: list[SyncerAction]) -> bool:
        """Whether the model as it is now is on the disk; if not, it is asked for."""
        versions = tuple(c.version for c in self._job.currents)
        if self._leaving and self._durable != versions and self._asked != versions:
            self._asked = versions
            actions.append(MakeDurable())
        return self._durable == versions

    def durable(self, event: Durable, now_s: float) -> list[SyncerAction]:
        """`MakeDurable` was performed."""
        self._durable = self._asked
        return []

    def _others(self) -> list[Member]:
        return [m for m in self._job.members.present() if m.session not in self._leaving]

    def _is_over(self, now_s: float) -> bool:
        """Whether nobody will come back."""
        job = self._job
        if job.finish_status is not None:
            return not self._others()
        # A leaver waits for the answer: whoever is silent now is not waited for. A job without one can wait for a broken link.
        patience_s = job.silent_after_s if self._leaving else job.given_up_after_s
        is_by_hand = not job.options.is_supervised and self.is_winding_up
        return is_by_hand and all(m.unheard_s(now_s) > patience_s for m in self._others())

    def _has_everything(self, session: str) -> bool:
        return all(self._job.publisher.holds(session, i, c.version) for i, c in enumerate(self._job.currents))

    def _left(self, member: Member) -> Reply:
        message = Left(versions=tuple(c.version.n for c in self._job.currents))
        return Reply(session=member.session, message=message, incarnation=member.incarnation)

    def _end(self) -> list[SyncerAction]:
        job = self._job
        job.is_ended = True
        status = job.finish_status or "finished"
        return [Ended(status=status, versions=tuple(c.version.n for c in job.currents))]  # type: ignore[arg-type]

    def finish(self, event: Finish, now_s: float) -> list[SyncerAction]:
        """Nobody will come back: end every incarnation that is left, then close what is held."""
        self._job.finish_status = event.status
        actions: list[SyncerAction] = []
        for member in self._others():
            actions += self._admission.end(member, "died", now_s)
        if not self._job.is_founded:
            actions += self._end()
        return actions

    def lost(self, event: LearnerLost, now_s: float) -> list[SyncerAction]:
        """Somebody who knows says that a process is gone."""
        member = self._job.members.by_id(event.learner_id)
        if member is None or event.incarnation not in (None, member.incarnation):
            return []
        if event.life is not None and member.life > event.life:
            return []
        self.forget(member.session)
        return self._admission.end(member, event.reason, now_s)
