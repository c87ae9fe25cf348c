"""Who holds which version: at most one publication of a fragment is on its way to a learner, and it is the newest one.

A learner that holds the parent of the current version gets the difference; anyone else gets the full shadow. While one is on its way the
next one waits; when the transport has delivered or given up, the newest version is sent if the learner is still behind. So a slow link
never builds a queue, a lost publication is followed by a full one, and a joiner's full transfer can be overtaken by nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lightning_diloco.config import payload_bytes
from lightning_diloco.protocol.actions import SyncerAction, Tape, Transmit
from lightning_diloco.protocol.identity import FragmentInfo, MergedThrough, Version
from lightning_diloco.protocol.members import Member
from lightning_diloco.protocol.records import PublishRecord

__all__ = ["Current", "Publisher"]


@dataclass(slots=True)
class Current:
    """The published state of one fragment: what a publication says beside the values."""

    version: Version
    parent: Version | None
    crc: int
    merged_through: dict[int, MergedThrough]
    difference_bytes: int
    full_bytes: int

    @classmethod
    def alone(cls, info: FragmentInfo, wire_dtype: str, version: Version, crc: int, merged_through: Mapping[int, MergedThrough]) -> Current:
        """A version that is no difference to another one: of a founding, a snapshot, or a learner. Running statistics go as values."""
        sizes = payload_bytes(info.num_params, wire_dtype if info.kind == "parameters" else "fp32"), payload_bytes(info.num_params, "fp32")
        return cls(version, None, crc, dict(merged_through), *sizes)


class Publisher:
    """Tracks, per session and fragment, the version held and the one on its way."""

    def __init__(self) -> None:
        self._held: dict[str, dict[int, Version]] = {}
        self._on_way: dict[str, dict[int, Version]] = {}
        self._wants_full: dict[str, dict[int, bool]] = {}
        # What a report said against what was acknowledged; believed when the next report says it again.
        self._doubted: dict[str, dict[int, Version]] = {}

    def start(self, session: str, held: dict[int, Version]) -> None:
        """A session begins with these versions in its hands."""
        self._held[session], self._on_way[session], self._wants_full[session], self._doubted[session] = dict(held), {}, {}, {}

    def resume(self, session: str, held: dict[int, Version]) -> None:
        """A session goes on with these versions in its hands; what is on its way to it still is, unless the transport says otherwise."""
        on_way = self._on_way.get(session, {})
        self.start(session, held)
        self._on_way[session] = on_way

    def stop(self, session: str) -> None:
        """A session ended."""
        for table in (self._held, self._on_way, self._wants_full, self._doubted):
            table.pop(session, None)

    def offer(self, member: Member, fragment_id: int, current: Current) -> list[SyncerAction]:
        """Send the current version to this member unless it holds it or another one is on its way."""
        session = member.session
        if session not in self._held or fragment_id in self._on_way[session]:
            return []
        held = self._held[session].get(fragment_id)
        wants_full = self._wants_full[session].pop(fragment_id, False)
        if held == current.version and not wants_full:
            return []
        parent = current.parent if held is not None and held == current.parent and not wants_full else None
        self._on_way[session][fragment_id] = current.version
        return [
            Transmit(
                session=session,
                fragment_id=fragment_id,
                version=current.version,
                parent=parent,
                crc=current.crc,
                merged_through=current.merged_through,
            ),
            Tape(
                record=PublishRecord(
                    fragment_id=fragment_id,
                    version=current.version,
                    is_full=parent is None,
                    learners=(member.learner_id,),
                    payload_bytes=current.full_bytes if parent is None else current.difference_bytes,
                )
            ),
        ]

    def delivered(self, member: Member, fragment_id: int, current: Current, version: Version | None = None) -> list[SyncerAction]:
        """The one on its way has arrived; send the newest if there is a newer one."""
        arrived = self._take_off_way(member.session, fragment_id, version)
        if arrived is None:
            return []
        self._held[member.session][fragment_id] = arrived
        self._doubted[member.session].pop(fragment_id, None)
        return self.offer(member, fragment_id, current)

    def failed(self, member: Member, fragment_id: int, current: Current, version: Version | None = None) -> list[SyncerAction]:
        """The transport gave up on the one on its way: what is held there is unknown, so send the full state."""
        if self._take_off_way(member.session, fragment_id, version) is None:
            return []
        self._held[member.session].pop(fragment_id, None)
        return self.offer(member, fragment_id, current)

    def needs_full(self, member: Member, fragment_id: int, current: Current) -> list[SyncerAction]:
        """The learner could not apply a difference."""
        if member.session in self._wants_full:
            self._wants_full[member.session][fragment_id] = True
        return self.offer(member, fragment_id, current)

    def reported(self, member: Member, fragment_id: int, version: Version, current: Current) -> list[SyncerAction]:
        """A heartbeat says what is held: mend what was lost on the way without anybody's notice."""
        held = self._held.get(member.session)
        if held is None or fragment_id in self._on_way[member.session]:
            return []
        doubted = self._doubted[member.session]
        if held.get(fragment_id) == current.version and doubted.get(fragment_id) != version:
            # The report may be older than the acknowledgement: they come on two channels.
            doubted[fragment_id] = version
            return []
        doubted.pop(fragment_id, None)
        held[fragment_id] = version
        return self.offer(member, fragment_id, current)

    def _take_off_way(self, session: str, fragment_id: int, version: Version | None) -> Version | None:
        """End the transfer that is on its way; None if the word is about an earlier one of a session that was resumed."""
        on_way = self._on_way.get(session, {})
        if version is not None and on_way.get(fragment_id) != version:
            return None
        return on_way.pop(fragment_id, None)

    def holds(self, session: str, fragment_id: int, version: Version) -> bool:
        """Whether this version has been delivered to this session (True for a session that is not known: nothing can be sent)."""
        return session not in self._held or self._held[session].get(fragment_id) == version

    def held_range(self, session: str) -> tuple[int, int] | None:
        """Lowest and highest n that was delivered to this session, over its fragments (None: nothing was, or it is not known)."""
        numbers = [version.n for version in self._held.get(session, {}).values()]
        return (min(numbers), max(numbers)) if numbers else None

    def holds_all(self, session: str, num_fragments: int) -> bool:
        """Whether every fragment has been delivered to this session at some version."""
        return len(self._held.get(session, {})) == num_fragments
