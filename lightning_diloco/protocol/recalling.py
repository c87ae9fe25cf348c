"""Which version of every fragment a syncer that starts again goes on with, and how it comes here.

Of each fragment the highest version counts that the snapshot has or that a learner has shown in its `Hello`. What only learners have is
asked of one of them (`Recall`) and comes as a payload. A control message may be lost with a connection, and a holder may have no way for
payloads. So, for each fragment and each learner that was asked for it:

- `Recall` is said again every `AGAIN_S`, and at that learner's next `Hello`, unless bytes of its payloads have come within that time.
  A copy is harmless: a learner has the same payload on its way once.
- After `SEEK_S` without such bytes from anybody asked, one more holder of the same version is asked. Who is first counts; nobody who was
  asked is turned away, or two slow holders would be refused in turn.
- After `GIVE_UP_S` without such bytes a learner is given up, for this fragment; at once if it says that it cannot, or if what it sends is
  something else. The last one that has a fragment at all is never given up for slowness: there is nothing to go on from without it.
- Who was not heard of at all for as long as silence may take is forgotten; when it speaks again it is asked who it is.

Bytes count for all that a learner was asked for: its payloads come one after the other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_diloco.protocol.actions import Reply, SyncerAction
from lightning_diloco.protocol.identity import Version
from lightning_diloco.protocol.job import Job
from lightning_diloco.protocol.messages import Hello, Recall
from lightning_diloco.protocol.publisher import Current

__all__ = ["AGAIN_S", "GIVE_UP_S", "SEEK_S", "Recalling", "Unmet"]

AGAIN_S = 5.0
"""As for what a learner says again while it joins."""
SEEK_S = 10.0
"""A learner answers from its background thread, within a round trip; a multiple of `AGAIN_S`, at which all this is looked at."""
GIVE_UP_S = 600.0
"""As long as the transport keeps a half-received payload; likewise a multiple of `AGAIN_S`."""


@dataclass(frozen=True, slots=True)
class Unmet:
    """A learner from which a version that it has shown did not come, and why not; for the log."""

    fragment_id: int
    learner_id: int
    version: Version
    why: str


@dataclass(slots=True)
class _Asked:
    """What one learner was asked for, of one fragment."""

    version: Version
    asked_s: float
    due_s: float
    """When it is said again."""
    moved_s: float = -math.inf
    """When bytes of this learner's payloads came last."""

    def quiet_s(self, now_s: float) -> float:
        """Seconds without a byte since it was asked."""
        return now_s - max(self.asked_s, self.moved_s)


class Recalling:
    """What of a model is here, what is asked for, and of whom.

    Args:
        job: whose members hold it.
        in_snapshot: per fragment what the snapshot holds; None: nothing.
    """

    def __init__(self, job: Job, in_snapshot: Sequence[Current | None]) -> None:
        self._job, self._in_snapshot = job, tuple(in_snapshot)
        self.hellos: dict[str, Hello] = {}
        """The last one of every member that has shown what it holds, by session."""
        self.open = set(range(len(self._in_snapshot)))
        """Fragments whose version is not here yet."""
        self.unmet: list[Unmet] = []
        """What did not come, in order."""
        self._asked: dict[int, dict[str, _Asked]] = {}
        self._useless: set[tuple[str, int]] = set()

    @property
    def missing(self) -> tuple[int, ...]:
        """Fragments that nobody has shown so far."""
        return tuple(p for p in sorted(self.open) if self._best(p) is None)

    @property
    def awaited(self) -> dict[int, tuple[int, ...]]:
        """By fragment that has to come, the learner ids that were asked for it."""
        members = self._job.members
        return {
            p: tuple(sorted(m.learner_id for session in self._asked[p] if (m := members.of(session)) is not None))
            for p in sorted(self.open)
            if self._asked.get(p)
        }

    @property
    def sessions(self) -> list[str]:
        """Everyone who was asked for something that has not come, sorted."""
        return sorted({session for p in self.open for session in self._asked.get(p, ())})

    def expects(self, session: str, fragment_id: int, version: Version | None) -> bool:
        """Whether this fragment was asked for of this session, at this version (None: at any), and has not come."""
        asked = self._asked.get(fragment_id, {}).get(session)
        return fragment_id in self.open and asked is not None and version in (None, asked.version)

    def returned(self, session: str, hello: Hello, now_s: float) -> None:
        """A member shows what it holds: for the first time, or because its connection broke, and what was said to it may be lost."""
        self.hellos[session] = hello
        for asked in self._asks_of(session):
            if now_s >= asked.moved_s + AGAIN_S:
                asked.due_s = now_s

    def moved(self, session: str, now_s: float) -> None:
        """Bytes of this session's payloads have come."""
        for asked in self._asks_of(session):
            asked.moved_s, asked.due_s = now_s, now_s + AGAIN_S

    def arrived(self, session: str, fragment_id: int, now_s: float) -> None:
        """A fragment is here, from this session."""
        self.moved(session, now_s)
        self._close(fragment_id)

    def failed(self, session: str, fragment_id: int, why: str) -> None:
        """A learner cannot give what it was asked for, or gave something else."""
        self._useless.add((session, fragment_id))
        asked, member = self._asked.get(fragment_id, {}).pop(session, None), self._job.members.of(session)
        if asked is not None and member is not None:
            self.unmet.append(Unmet(fragment_id, member.learner_id, asked.version, why))

    def tick(self, now_s: float) -> list[SyncerAction]:
        """Ask for what has to come, and close what is here."""
        self._forget_the_silent(now_s)
        self._give_up(now_s)
        actions: list[SyncerAction] = []
        for fragment_id in sorted(self.open):
            best = self._best(fragment_id)
            if best is not None and not best[1]:
                self._close(fragment_id)
            elif best is not None:
                actions += self._ask(fragment_id, *best, now_s)
        return actions

    def next_deadline_s(self) -> float | None:
        """When `tick` has something to say; silence is judged by whatever comes next."""
        return min((asked.due_s for p in self.open for asked in self._asked.get(p, {}).values()), default=None)

    def _asks_of(self, session: str) -> list[_Asked]:
        return [asked[session] for asked in self._asked.values() if session in asked]

    def _close(self, fragment_id: int) -> None:
        self.open.discard(fragment_id)
        self._asked.pop(fragment_id, None)

    def _best(self, fragment_id: int) -> tuple[Version, list[str]] | None:
        """The highest version of a fragment, and who has it, in the order in which they are asked (nobody: the snapshot has it)."""
        snapshot = self._in_snapshot[fragment_id]
        shown = [
            (hello.versions[fragment_id], session)
            for session, hello in self.hellos.items()
            if self._job.members.of(session) is not None and (session, fragment_id) not in self._useless
        ]
        best = max((version for version, _ in shown), default=None)
        if snapshot is not None and (best is None or snapshot.version >= best):
            return snapshot.version, []
        if best is None:
            return None
        holders = sorted(session for version, session in shown if version == best)
        first = fragment_id % len(holders)
        return best, holders[first:] + holders[:first]

    def _ask(self, fragment_id: int, version: Version, holders: list[str], now_s: float) -> list[SyncerAction]:
        before = self._asked.get(fragment_id, {})
        asked = self._asked[fragment_id] = {s: x for s, x in before.items() if s in holders and x.version == version}
        if all(x.quiet_s(now_s) >= SEEK_S for x in asked.values()):
            more = next((s for s in holders if s not in asked), None)
            if more is not None:
                asked[more] = _Asked(version, asked_s=now_s, due_s=now_s)
        recall, actions = Recall(fragment_id=fragment_id, version=version, shards=self._job.options.shards), list[SyncerAction]()
        for session, item in asked.items():
            member = self._job.members.of(session)
            if now_s >= item.due_s and member is not None:
                item.due_s = now_s + AGAIN_S
                actions.append(Reply(session=session, message=recall, incarnation=member.incarnation))
        return actions

    def _forget_the_silent(self, now_s: float) -> None:
        for session in list(self.hellos):
            member = self._job.members.of(session)
            if member is None or member.unheard_s(now_s) > self._job.silent_after_s:
                del self.hellos[session]
                for asked in self._asked.values():
                    asked.pop(session, None)

    def _give_up(self, now_s: float) -> None:
        late = [(p, s) for p, asked in self._asked.items() for s, item in asked.items() if item.quiet_s(now_s) >= GIVE_UP_S]
        for fragment_id, session in late:
            self._useless.add((session, fragment_id))
            nobody_else = self._best(fragment_id) is None
            self._useless.discard((session, fragment_id))
            if not nobody_else:
                self.failed(session, fragment_id, f"nothing came of it for {GIVE_UP_S:g} s")
