"""Answers to observers: how a job is, told to whoever asks and holds no slot. Lives on the loop thread, beside the rules.

    StatusRequest --> waiting (one place per peer, `MAX_WAITING` of them)
                         |  twice a second at most
                         v
              worker thread: figures from the tape --> loop thread: the machine's view of its members, one encoding --> all who wait

Nothing of this reaches `SyncerMachine`, and nothing here writes to it. A thousand questions of one peer are one answer; what does not fit
into the waiting room is dropped, and its sender asks again. The loop's own part of an answer is a few attributes for each of `MAX_TOLD`
learners; the next answer comes no sooner than `REST` times what that took.

At the end of the job those who asked last are told so unasked, for after it there is nobody to ask. A site whose key was revoked meanwhile
is told nothing, although its connection stays open.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, Literal

from lightning_diloco.errors import RemoteProtocolError
from lightning_diloco.metrics import PresentLearner, SummaryFold
from lightning_diloco.protocol.actions import Reply, SyncerAction
from lightning_diloco.protocol.members import Member
from lightning_diloco.protocol.messages import PROTOCOL_VERSION, Envelope, JoinRefused, Message, Status, StatusRefused
from lightning_diloco.protocol.observer_messages import MAX_TOLD, Fault, LearnerStatus
from lightning_diloco.protocol.syncer import SyncerMachine
from lightning_diloco.protocol.wire import decode_from_observer, encode
from lightning_diloco.runtime.live_summary import REST, LiveSummary, Reading
from lightning_diloco.runtime.tape import TapeWriter
from lightning_diloco.runtime.transport import SyncerTransport

__all__ = ["Observers", "state_of"]

PERIOD_S: Final = 0.5
"""Seconds between two answers."""
MAX_WAITING: Final = 64
"""Observers that wait for an answer, and that are told of the job's end."""
MAX_TURNED_AWAY: Final = 256
"""Processes that were told to end, of which the sentence is kept."""
MAX_TEXT: Final = 200
"""Characters of a peer's own words."""
_NOTHING: Final = Reading(SummaryFold().result("running"), {}, {}, 0, 0)

_log = logging.getLogger(__name__)


class Observers:
    """Whoever watches one job.

    Args:
        machine: read, never given an event.
        tape: flushed before the last answer; its clock dates what is on it.
        transport: of the syncer.
        live: the figures.
        token: what an observer must show ("": nothing).
        on_loop: runs a function on the loop thread, soon.
    """

    def __init__(
        self,
        machine: SyncerMachine,
        tape: TapeWriter,
        transport: SyncerTransport,
        live: LiveSummary,
        token: str,
        on_loop: Callable[[Callable[[], None]], None],
    ) -> None:
        self._machine, self._tape, self._transport, self._live = machine, tape, transport, live
        self._token, self._on_loop = token, on_loop
        self._waiting: dict[str, StatusRefused | None] = {}
        self._asked: dict[str, None] = {}
        self._turned_away: dict[str, tuple[str, float]] = {}
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="diloco-status")
        self._is_reading = self._is_closed = self._has_failed = False
        self._next_s = 0.0

    def ask(self, session: str, data: bytes) -> bool:
        """Take a message that no learner says.

        Returns:
            Whether it is an observer's; if so it is answered soon, or dropped if too many wait.
        """
        try:
            _, request = decode_from_observer(data)
        except RemoteProtocolError:
            return False
        if session in self._waiting or len(self._waiting) < MAX_WAITING:
            self._waiting[session] = self._refusal(request.protocol_version, request.token)
        return True

    def note(self, actions: Sequence[SyncerAction]) -> None:
        """Remember who was told to end, and why: it is not on the tape."""
        for action in actions:
            if isinstance(action, Reply) and isinstance(action.message, JoinRefused):
                self._turned_away.pop(action.session, None)
                self._turned_away[action.session] = (f"{action.message.reason}: {action.message.detail}"[:MAX_TEXT], time.monotonic())
                if len(self._turned_away) > MAX_TURNED_AWAY:
                    self._turned_away.pop(next(iter(self._turned_away)))

    def tick(self, now_s: float) -> None:
        """Answer those who wait, if it is time."""
        if not self._waiting or self._is_reading or now_s < self._next_s:
            return
        if all(refusal is not None for refusal in self._waiting.values()):
            self._answer(None)
            return
        self._is_reading = True
        self._worker.submit(self._read)

    def end(self, status: Literal["finished", "stopped", "failed"]) -> None:
        """The job has ended: tell those who watched."""
        told = {**self._asked, **{session: None for session, refusal in self._waiting.items() if refusal is None}}
        if told:
            self._tape.flush()
            self._tell(list(told), self._reading(at_once=True), status)

    def close(self) -> None:
        """End the worker thread."""
        self._is_closed = True
        self._worker.shutdown(wait=True, cancel_futures=True)

    def status(self, reading: Reading | None, ended: Literal["finished", "stopped", "failed"] | None = None) -> Status:
        """What is told.

        Args:
            reading: the figures (None: they cannot be had).
            ended: how the job has ended.
        """
        now_s, job, reading = time.monotonic(), self._machine.job, reading or _NOTHING
        summary, present = reading.summary, {m.learner_id: m for m in job.members.present()}
        ids = [*present, *(m for m in reading.learners if m not in present)]
        figures = {x["learner_id"]: x for x in summary["learners"]}
        learners = [self._learner(m, present.get(m), reading.learners.get(m), figures.get(m, {}), now_s) for m in sorted(ids[:MAX_TOLD])]
        known = {m.session for m in present.values()} | {x.session for x in reading.learners.values()}
        strangers = [self._aged(*x, now_s) for session, x in self._turned_away.items() if session not in known]
        # The lead of several shards tells of all fragments of parameters; its own members and open rounds are what it knows at first hand.
        told = [f["version"] for f in summary["fragments"]] if job.options.num_shards > 1 else []
        versions = told or [current.version.n for current in job.currents]
        word = "waiting" if not job.is_founded else "recovering" if not job.is_serving else "running"
        return Status(
            job_id=job.options.job_id,
            epoch=job.epoch,
            status=ended or word,  # type: ignore[arg-type]  # mypy takes the conditional for a str
            **{name: summary[name] for name in _SAME},
            num_members=len(job.members.joined()),
            num_active=len(job.members.active(now_s)),
            num_fragments=len(told) or job.num_fragments,
            version_min=min(versions, default=None),
            version_max=max(versions, default=None),
            open_rounds=sum(r.stage != "idle" for r in self._machine.rounds.all),
            num_learners=len(ids),
            learners=tuple(learners),
            refused_join=strangers[-1] if strangers else None,
        )

    # ---- asking and answering -----------------------------------------------------------------------------------------------

    def _refusal(self, version: int, token: str) -> StatusRefused | None:
        if version != PROTOCOL_VERSION:
            detail = f"This syncer speaks protocol version {PROTOCOL_VERSION}, the observer {version}. Install the same release."
            return StatusRefused(reason="protocol_version", detail=detail)
        if self._token and not secrets.compare_digest(token.encode(), self._token.encode()):
            detail = "This job tells only who can read its run directory. Give that in the place of the address: status RUN_DIR."
            return StatusRefused(reason="token", detail=detail)
        return None

    def _read(self) -> None:
        """On the worker thread."""
        reading = self._reading()
        if not self._is_closed:
            self._on_loop(lambda: self._answer(reading))

    def _reading(self, *, at_once: bool = False) -> Reading | None:
        try:
            return self._live.read(lambda: self._is_closed, at_once=at_once)
        except Exception as error:
            self._complain("The figures for observers cannot be read", error)
            return None

    def _complain(self, what: str, error: Exception) -> None:
        """A question must not end the job, whatever is wrong; it is said once."""
        if not self._has_failed:
            self._has_failed = True
            _log.error("%s: %r", what, error)

    def _answer(self, reading: Reading | None) -> None:
        start_s = time.monotonic()
        waiting, self._waiting, self._is_reading = self._waiting, {}, False
        welcome = [session for session, refusal in waiting.items() if refusal is None]
        self._tell(welcome, reading)
        for session, refusal in waiting.items():
            if refusal is not None:
                self._say([session], refusal)
        for session in welcome:
            self._asked.pop(session, None)
            self._asked[session] = None
        while len(self._asked) > MAX_WAITING:
            self._asked.pop(next(iter(self._asked)))
        now_s = time.monotonic()
        self._next_s = now_s + max(PERIOD_S, REST * (now_s - start_s))

    def _tell(self, sessions: list[str], reading: Reading | None, ended: Literal["finished", "stopped", "failed"] | None = None) -> None:
        if not sessions:
            return
        try:
            self._say(sessions, self.status(reading, ended))
        except Exception as error:
            self._complain("Observers were not answered", error)

    def _say(self, sessions: list[str], message: Message) -> None:
        options = self._machine.job.options
        data = encode(Envelope(options.job_id, options.lineage, options.epoch, 0), message)
        for peer in map(bytes.fromhex, sessions):
            if self._transport.is_admitted(peer):
                self._transport.send_control(peer, data)

    # ---- one learner --------------------------------------------------------------------------------------------------------

    def _learner(
        self, learner_id: int, member: Member | None, seen: PresentLearner | None, figures: dict[str, Any], now_s: float
    ) -> LearnerStatus:
        held = None if member is None else self._machine.job.publisher.held_range(member.session)
        own_step = 0 if member is None else member.joined_at_step + member.inner_step
        return LearnerStatus(
            learner_id=learner_id,
            incarnation=member.incarnation if member is not None else seen.incarnation if seen is not None else 0,
            device=(member.device if member is not None else seen.device if seen is not None else "")[:MAX_TEXT],
            state="gone" if member is None else state_of(member, now_s),
            heard_age_s=None if member is None else max(0.0, member.unheard_s(now_s)),
            inner_step=own_step if seen is None or member is not None else seen.inner_step,
            tokens=figures.get("tokens", 0),
            version_min=None if held is None else held[0],
            version_max=None if held is None else held[1],
            participation=figures.get("participation"),
            staleness_versions=None if seen is None else seen.staleness_versions,
            steps_per_s=None if seen is None else seen.steps_per_s,
            tokens_per_s=None if seen is None else seen.tokens_per_s,
            bytes_up=0 if seen is None else seen.bytes_up,
            bytes_down=0 if seen is None else seen.bytes_down,
            fault=self._fault(member, seen, now_s),
        )

    def _fault(self, member: Member | None, seen: PresentLearner | None, now_s: float) -> Fault | None:
        """The newer one of what the tape tells and of a session that was told to end."""
        found: list[Fault] = []
        if seen is not None and seen.fault is not None:
            what, t_s = seen.fault
            found.append(Fault(what=what, age_s=max(0.0, self._tape.clock_s() - t_s)))
        for session in {x.session for x in (member, seen) if x is not None}:
            if session in self._turned_away:
                found.append(self._aged(*self._turned_away[session], now_s))
        return min(found, key=lambda fault: fault.age_s, default=None)

    @staticmethod
    def _aged(what: str, at_s: float, now_s: float) -> Fault:
        return Fault(what=what, age_s=max(0.0, now_s - at_s))


_SAME: Final = (
    *("wall_s", "merges", "mean_members", "tokens", "tokens_merged", "tokens_pending", "tokens_discarded"),
    *("bytes_up", "bytes_down", "goodput", "uptime"),
)
"""Figures that have the same name in `Status` and in `summary.json`."""


def state_of(member: Member, now_s: float) -> Literal["joining", "active", "paused", "leaving", "silent"]:
    """What a member is doing, in the words of `LearnerStatus`: as `Member.is_active` judges it."""
    if member.stage != "joined" or member.inner_step == 0:
        return "joining"
    if member.is_leaving:
        return "leaving"
    if member.is_paused:
        return "paused"
    return "active" if member.is_active(now_s) else "silent"
