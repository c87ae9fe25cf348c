"""Rounds of one fragment: from due to published (PROTOCOL.md section 4).

    stage     event                                              next
    idle      due: a quorum did H steps since the last opening   pulling (pulls are out; carried contributions are in)
    pulling   contributions >= quorum                            grace (window opens)
    pulling   every pull has ended, contributions < quorum       idle (cancelled; what is in stays held for the next round)
    grace     every pull has ended, or the window is over        merging (Fold was done on arrival; Close is emitted)
    merging   Merged                                             idle (published to all)

Each pull ends for its member in exactly one of: merged, carried, busy, refused, released. A round's deadline turns members that are silent
past it into inactive ones, which lowers the quorum; so every round ends. A contribution that arrives outside a round, or during
`merging`, is folded into the fragment's next merge: it is *carried*. Contributions are relative to their own base, so late is still right.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from lightning_diloco.errors import LocalProtocolError
from lightning_diloco.protocol.actions import Close, Reply, SyncerAction, Tape
from lightning_diloco.protocol.events import Merged
from lightning_diloco.protocol.identity import Version
from lightning_diloco.protocol.job import Decision, Held, Job, merged_through_after, next_version
from lightning_diloco.protocol.members import Member
from lightning_diloco.protocol.messages import Pull, Released
from lightning_diloco.protocol.publisher import Current
from lightning_diloco.protocol.records import Member as MergedMember
from lightning_diloco.protocol.records import MergeRecord, RoundCancelRecord, RoundOpenRecord

__all__ = ["FragmentRound", "Rounds"]

MIN_DEADLINE_S = 10.0
"""No round is given up earlier than this after its opening."""
DEADLINE_SYNC_TIMES = 10.0
"""A round's deadline in multiples of the average sync time."""
DEADLINE_STEP_TIMES = 3.0
"""And in multiples of the longest step time of those pulled; what counts is the largest."""


@dataclass(slots=True)
class FragmentRound:
    """The open round of one fragment, and what is held for it or for the next one."""

    fragment_id: int
    stage: Literal["idle", "pulling", "grace", "merging"] = "idle"
    round_id: int = 0
    opened_s: float = 0.0
    deadline_s: float = 0.0
    quorum: int = 1
    quorum_s: float = 0.0
    window_s: float = 0.0
    grace_opened_s: float = 0.0
    closed_s: float = 0.0
    open_pulls: dict[int, str] = field(default_factory=dict)
    held: list[Held] = field(default_factory=list)
    num_carried: int = 0
    merging: list[Held] = field(default_factory=list)
    grace_used_s: float = 0.0
    eligible: tuple[int, ...] = ()
    last_share: float | None = None

    @property
    def is_collecting(self) -> bool:
        """Whether contributions go into an open round."""
        return self.stage in ("pulling", "grace")

    def holds(self, learner_id: int) -> bool:
        """Whether a contribution of this learner is folded and not merged."""
        return any(h.learner_id == learner_id for h in self.held) or any(h.learner_id == learner_id for h in self.merging)


class Rounds:
    """The rounds of all fragments of a job."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._rounds: list[FragmentRound] = []
        self._published_s: dict[int, float] = {}
        self._sync_s: dict[int, float] = {}

    def start(self, round_ids: Mapping[int, int] | None = None) -> None:
        """The job was founded, or goes on; `round_ids`: of the last round of each fragment."""
        last = round_ids or {}
        self._rounds = [FragmentRound(fragment_id=f.fragment_id, round_id=last.get(f.fragment_id, 0)) for f in self._job.fragments]

    def of(self, fragment_id: int) -> FragmentRound:
        """The round state of one fragment."""
        return self._rounds[fragment_id]

    @property
    def all(self) -> list[FragmentRound]:
        """All fragments' rounds in order."""
        return self._rounds

    def is_quiet(self) -> bool:
        """Whether nothing is held or merging anywhere."""
        return all(r.stage == "idle" and not r.held for r in self._rounds)

    def open_due(self, now_s: float) -> list[SyncerAction]:
        """Open every round that is due and allowed."""
        job, actions = self._job, list[SyncerAction]()
        if job.stop_reason is not None or job.finish_status is not None:
            return actions
        active = job.members.active(now_s)
        if not active:
            return actions
        self._admit(active, now_s)
        steps = {m.learner_id: m.inner_step for m in active}
        for fragment_id in job.pace.due(steps, self._quorum(len(active))):
            if job.pace.allowance <= 0:
                break
            if self._rounds[fragment_id].stage == "idle":
                actions += self._open(self._rounds[fragment_id], active, now_s)
        return actions

    def _admit(self, active: list[Member], now_s: float) -> None:
        """Let the pace know who became active, and whose counter stands still."""
        job, joined = self._job, self._job.members.joined()
        for member in joined if len(joined) > len(active) else ():
            if member.is_admitted and member.is_still(now_s):
                job.pace.remove(member.learner_id)
                member.is_admitted = False
        for member in active:
            if not member.is_admitted:
                alone = not any(m.is_admitted for m in active)
                # Alone: its interval began before the step that has made it active.
                job.pace.admit(member.learner_id, member.inner_step - alone, staggered=alone)
                member.is_admitted = True

    def _quorum(self, num_active: int) -> int:
        return max(1, min(self._job.config.min_quorum, num_active))

    def _open(self, round_: FragmentRound, active: list[Member], now_s: float) -> list[SyncerAction]:
        job, fragment_id = self._job, round_.fragment_id
        job.pace.opened(fragment_id, {m.learner_id: m.inner_step for m in active})
        pulled = [m for m in active if m.has_work(fragment_id) and not round_.holds(m.learner_id)]
        round_.stage, round_.round_id = "pulling", round_.round_id + 1
        round_.opened_s = now_s
        # An answer comes at the end of a step, so long steps must fit in.
        step_time_s = max((m.step_time.value or 0.0 for m in pulled), default=0.0)
        sync_s = job.grace.sync.value or 0.0
        round_.deadline_s = now_s + max(DEADLINE_SYNC_TIMES * sync_s, DEADLINE_STEP_TIMES * step_time_s, MIN_DEADLINE_S)
        round_.num_carried = len(round_.held)
        round_.open_pulls = {m.learner_id: m.session for m in pulled}
        record = RoundOpenRecord(
            fragment_id=fragment_id,
            round_id=round_.round_id,
            quorum=self._quorum(len(active)),
            active=tuple(m.learner_id for m in active),
            pulled=tuple(m.learner_id for m in pulled),
            carried=tuple(h.learner_id for h in round_.held),
        )
        actions: list[SyncerAction] = [Tape(record=record)]
        pull = Pull(fragment_id=fragment_id, round_id=round_.round_id)
        actions += [Reply(session=m.session, message=pull, incarnation=m.incarnation) for m in pulled]
        return actions + self.progress(round_, now_s)

    def end_pull(self, learner_id: int, fragment_id: int, round_id: int | None, now_s: float) -> list[SyncerAction]:
        """A member answered, or cannot answer any more; `round_id` None ends its pull whatever the round."""
        round_ = self._rounds[fragment_id]
        if round_.is_collecting and round_id in (None, round_.round_id):
            round_.open_pulls.pop(learner_id, None)
        return self.progress(round_, now_s)

    def drop_learner(self, learner_id: int, now_s: float) -> list[SyncerAction]:
        """A learner is not active any more: its pulls end, quorums are recomputed."""
        self._job.pace.remove(learner_id)
        actions: list[SyncerAction] = []
        for round_ in self._rounds:
            if round_.is_collecting:
                actions += self.end_pull(learner_id, round_.fragment_id, None, now_s)
        return actions

    def progress(self, round_: FragmentRound, now_s: float) -> list[SyncerAction]:
        """Move one collecting round as far as it goes."""
        if round_.stage == "pulling":
            contributors = len({h.learner_id for h in round_.held})
            round_.quorum = self._quorum(len(self._job.members.active(now_s)))
            if contributors >= round_.quorum and not self._waits_for_an_answer(round_, now_s):
                round_.stage = "grace"
                round_.grace_opened_s = now_s
                round_.quorum_s = now_s - round_.opened_s
                # A quorum of carried contributions alone is no measurement.
                is_measured = len(round_.held) > round_.num_carried
                if is_measured:
                    self._job.grace.quorum.add(round_.quorum_s)
                step_time_s = self._job.members.step_time_s(now_s)
                round_.window_s = self._job.grace.window_s(step_time_s, quorum_s=None if is_measured else round_.quorum_s)
            elif not round_.open_pulls:
                return self._cancel(round_, contributors)
        if round_.stage == "grace" and (not round_.open_pulls or now_s >= round_.grace_opened_s + round_.window_s):
            return self._close(round_, now_s)
        return []

    def _waits_for_an_answer(self, round_: FragmentRound, now_s: float) -> bool:
        """Whether all that is in was carried, and those pulled may still answer: for tau steps the merge is not the carried ones' alone.

        Otherwise two equal learners lock in: the one that was late makes the quorum of the next round at its opening, so the other one,
        which has just passed a boundary, is late for that; they are merged in turn, one at a time, which is no averaging at all.
        """
        return bool(round_.open_pulls) and len(round_.held) == round_.num_carried and now_s < self._patience_ends_s(round_)

    def _patience_ends_s(self, round_: FragmentRound) -> float:
        return round_.opened_s + self._job.config.overlap_steps * (self._job.members.step_time_s(round_.opened_s) or 0.0)

    def tick(self, now_s: float) -> list[SyncerAction]:
        """Windows and deadlines."""
        actions: list[SyncerAction] = []
        for round_ in self._collecting():
            if now_s >= round_.deadline_s:
                for learner_id in list(round_.open_pulls):
                    member = self._job.members.by_id(learner_id)
                    if member is not None:
                        member.fall_silent()
                actions += self._release(round_)
            actions += self.progress(round_, now_s)
        return actions

    def next_deadline_s(self, now_s: float) -> float | None:
        """When `tick` has something to do next; `now_s` is when it was called last."""
        collecting = self._collecting()
        times = [r.deadline_s for r in collecting]
        times += [r.grace_opened_s + r.window_s for r in collecting if r.stage == "grace"]
        patience = [self._patience_ends_s(r) for r in collecting if r.stage == "pulling" and r.num_carried]
        # One that is over has been looked at: as a deadline it would keep the runtime turning until the round ends.
        times += [end_s for end_s in patience if end_s > now_s]
        return min(times, default=None)

    def _collecting(self) -> list[FragmentRound]:
        # Asked twice for every event: a call for each of hundreds of fragments would be most of the work.
        return [r for r in self._rounds if r.stage == "pulling" or r.stage == "grace"]

    def force(self, round_: FragmentRound, now_s: float) -> list[SyncerAction]:
        """Close what is held now, whoever is missing: nobody else will come."""
        actions = self._release(round_) if round_.is_collecting else []
        if round_.stage == "idle" and round_.held:
            round_.round_id += 1
            record = RoundOpenRecord(
                fragment_id=round_.fragment_id,
                round_id=round_.round_id,
                quorum=1,
                active=(),
                pulled=(),
                carried=tuple(h.learner_id for h in round_.held),
            )
            round_.stage, round_.opened_s, round_.quorum_s, round_.quorum = "pulling", now_s, 0.0, 1
            actions.append(Tape(record=record))
        if round_.is_collecting:
            round_.quorum = 1 if round_.stage == "pulling" else round_.quorum
            round_.window_s, round_.grace_opened_s = 0.0, now_s
            actions += self._close(round_, now_s) if round_.held else self._cancel(round_, 0)
        return actions

    def _release(self, round_: FragmentRound) -> list[SyncerAction]:
        released = Released(fragment_id=round_.fragment_id, round_id=round_.round_id)
        actions: list[SyncerAction] = []
        for learner_id, session in round_.open_pulls.items():
            member = self._job.members.by_id(learner_id)
            if member is not None and member.session == session:
                actions.append(Reply(session=session, message=released, incarnation=member.incarnation))
        round_.open_pulls = {}
        return actions

    def _cancel(self, round_: FragmentRound, contributors: int) -> list[SyncerAction]:
        round_.stage = "idle"
        record = RoundCancelRecord(
            fragment_id=round_.fragment_id, round_id=round_.round_id, contributions=contributors, quorum=round_.quorum
        )
        return [Tape(record=record)]

    def _close(self, round_: FragmentRound, now_s: float) -> list[SyncerAction]:
        # No `Released`: who is late answers at its next boundary all the same, and is carried.
        actions: list[SyncerAction] = []
        round_.open_pulls = {}
        current = self._job.currents[round_.fragment_id]
        round_.stage, round_.closed_s = "merging", now_s
        round_.merging, round_.held = round_.held, []
        round_.grace_used_s = max(0.0, now_s - round_.grace_opened_s)
        contributors = {h.learner_id for h in round_.merging}
        round_.eligible = tuple(
            m.learner_id
            for m in self._job.members.joined()
            if m.learner_id in contributors or (not m.is_paused and m.has_work(round_.fragment_id))
        )
        version = next_version(current.version, self._job.epoch)
        round_.last_share = self._last_share(round_)
        close = Close(fragment_id=round_.fragment_id, version=version, merge_index=version.n, last_share=round_.last_share)
        actions.append(close)
        return actions

    def _last_share(self, round_: FragmentRound) -> float | None:
        # Somebody who comes later finds a model that is not ahead, which costs that fragment the way ahead of one merge.
        if not all(m.is_leaving for m in self._job.members.present()):
            return None
        return min(1.0, max(h.steps for h in round_.merging) / self._job.config.sync_interval_steps)

    def merged(self, event: Merged, now_s: float) -> list[SyncerAction]:
        """The merge is done: account for it, publish it to all, write it down."""
        job, round_ = self._job, self._rounds[event.fragment_id]
        if round_.stage != "merging":
            raise LocalProtocolError(f"Fragment {event.fragment_id} was merged, but no Close was asked for (stage {round_.stage}).")
        before = job.currents[event.fragment_id]
        version = next_version(before.version, job.epoch)
        job.currents[event.fragment_id] = Current(
            version=version,
            parent=before.version,
            crc=event.crc,
            merged_through=merged_through_after(before.merged_through, round_.merging),
            difference_bytes=before.difference_bytes,
            full_bytes=before.full_bytes,
        )
        actions: list[SyncerAction] = [Tape(record=self._merge_record(round_, event, version))]
        for held in round_.merging:
            job.ledger.merge(held.learner_id, event.fragment_id, held.tokens)
            self._remember_merged(held, event.fragment_id)
        round_.stage, round_.merging = "idle", []
        self._finish_sync(event.fragment_id)
        self._published_s[event.fragment_id], self._sync_s[event.fragment_id] = round_.closed_s, event.merge_s
        return actions + job.offer_all(event.fragment_id)

    def _merge_record(self, round_: FragmentRound, event: Merged, version: Version) -> MergeRecord:
        members = tuple(
            MergedMember(learner_id=h.learner_id, incarnation=h.incarnation, seq=h.seq, steps=h.steps, tokens=h.tokens, weight=h.weight)
            for h in round_.merging
        )
        return MergeRecord(
            fragment_id=event.fragment_id,
            round_id=round_.round_id,
            version=version,
            members=members,
            eligible=round_.eligible,
            quorum=round_.quorum,
            quorum_s=round_.quorum_s,
            grace_window_s=round_.window_s,
            grace_used_s=round_.grace_used_s,
            merge_s=event.merge_s,
            outer_lr=self._job.config.outer_lr,
            outer_momentum=event.outer_momentum,
            last_share=round_.last_share,
            crc=event.crc,
            norms=event.norms,
            scales=event.scales,
        )

    def _remember_merged(self, held: Held, fragment_id: int) -> None:
        known = self._job.decisions[(held.learner_id, fragment_id)].get(held.seq)
        if known is not None:
            self._job.decide(held.learner_id, fragment_id, held.seq, Decision(crc=known.crc, outcome="merged"))

    def delivered(self, fragment_id: int, version: Version | None, now_s: float) -> None:
        """A learner has the current version: the slowest such time is the fragment's sync time.

        Not its adoption: the wait for a boundary is no cost of the synchronization, tau counts whole steps already, and one slow learner's
        steps would close everybody's window.
        """
        if fragment_id in self._sync_s and version in (None, self._job.currents[fragment_id].version):
            self._sync_s[fragment_id] = max(self._sync_s[fragment_id], now_s - self._published_s[fragment_id])

    def _finish_sync(self, fragment_id: int) -> None:
        sync_s = self._sync_s.pop(fragment_id, None)
        if sync_s is not None:
            self._job.grace.sync.add(sync_s)
