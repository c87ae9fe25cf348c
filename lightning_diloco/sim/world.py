"""The smallest world that runs both real machines on a virtual clock: a syncer, its learners, and a supervisor.

**What is real**: every rule of `SyncerMachine` and `LearnerMachine`. **What is simulated**: the network (`network`), the durations of a
step, an encoding, a decoding, a fold and a merge (`options`), and processes that pause, freeze, die and come back. The supervisor sees
a killed process `notice_s` later, hands in its counters, and says `Finish` when nobody will come back: what is left is then closed.

**The trace** is the tape that the real syncer would write, with virtual time in `t_s`; the folds of `lightning_diloco.metrics` work
on it. The same options give the same bytes, on any machine and under any `PYTHONHASHSEED`.

**Not simulated**: lost, doubled or damaged messages (the transport mends them; the machines' own tests break them), a restart of the
syncer, a shared bandwidth of all learners at the syncer, values: every contribution has the norm of its number of steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from lightning_diloco.metrics import SummaryFold
from lightning_diloco.protocol.events import CountersRead, Finish, LearnerLost
from lightning_diloco.protocol.records import TapeLine, decode_line
from lightning_diloco.sim.engine import Engine
from lightning_diloco.sim.learner_process import LearnerProcess
from lightning_diloco.sim.options import Freeze, Kill, Pause, SimOptions, Takeover
from lightning_diloco.sim.syncer_process import TAKEOVER_TOKEN, SyncerProcess

__all__ = ["SimResult", "simulate"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SimResult:
    """What became of a simulated job."""

    trace: bytes
    """The tape: one JSON object a line."""
    status: Literal["finished", "stopped", "failed"] | None
    """The machine's last word; None if the job had not ended at `until_s`."""
    virtual_s: float
    """Virtual time at the end."""
    num_events: int
    """Callbacks of the engine."""
    merges: int
    """Versions over all fragments."""
    pending: dict[tuple[int, int], int]
    """Tokens whose fate is open in the syncer's ledger, by (learner_id, fragment_id); only those that are not 0."""
    processes: tuple[tuple[int, str | None], ...]
    """Each process that started, in this order: its learner_id, and how it ended (None: it lives)."""

    def lines(self) -> Iterator[TapeLine]:
        """The records of the trace."""
        return map(decode_line, self.trace.splitlines())

    def summary(self) -> dict[str, Any]:
        """The content of `summary.json` of this job."""
        fold = SummaryFold()
        for line in self.lines():
            fold.feed(line)
        return fold.result()


class _World:
    """The processes of one job and their supervisor."""

    def __init__(self, options: SimOptions) -> None:
        self.engine = Engine()
        self.syncer = SyncerProcess(self.engine, options)
        self.processes: list[LearnerProcess] = []
        self._options = options
        self._current: dict[int, LearnerProcess] = {}
        self._lives = [0] * len(options.learners)
        self._to_start = len(options.learners) + len(options.of(Takeover))

    def prepare(self) -> None:
        """Put everything that happens at a stated time on the clock."""
        options, at = self._options, self.engine.schedule
        for learner_id, learner in enumerate(options.learners):
            at(partial(self._start, learner_id, ""), at_s=learner.join_at_s)
        for takeover in options.of(Takeover):
            at(partial(self._take_over, takeover.learner_id), at_s=takeover.at_s)
        for kill in options.of(Kill):
            at(partial(self._kill, kill), at_s=kill.at_s)
        for pause in options.of(Pause):
            at(partial(self._pause, pause), at_s=pause.at_s)
        for freeze in options.of(Freeze):
            at(partial(self._freeze, freeze), at_s=freeze.at_s)
        if options.stop_at_s is not None:
            at(self._ask_for_stop, at_s=options.stop_at_s)

    def _start(self, learner_id: int, takeover_token: str) -> None:
        life, self._lives[learner_id] = self._lives[learner_id], self._lives[learner_id] + 1
        process = LearnerProcess(self.engine, self.syncer, self._options, learner_id, life, takeover_token, self._look_for_end)
        self._current[learner_id] = process
        self.processes.append(process)
        self._to_start -= 1
        process.start()

    def _take_over(self, learner_id: int) -> None:
        before = self._current.get(learner_id)
        if before is not None and before.ended == "killed":
            self._hand_in_counters(before)
        self._start(learner_id, TAKEOVER_TOKEN)

    def _kill(self, kill: Kill) -> None:
        process = self._current.get(kill.learner_id)
        if process is not None and process.ended is None:
            process.kill()
            if kill.is_noticed:
                self.engine.schedule(partial(self._notice, process), delay_s=self._options.notice_s)

    def _notice(self, process: LearnerProcess) -> None:
        if self._current[process.learner_id] is process:
            self._hand_in_counters(process)
            self.syncer.receive(LearnerLost(learner_id=process.learner_id))

    def _hand_in_counters(self, process: LearnerProcess) -> None:
        """The totals of a dead process are read from its memory-mapped file."""
        state = process.machine.state
        read = CountersRead(
            learner_id=process.learner_id, incarnation=state.envelope.incarnation, inner_steps=state.inner_step, tokens=state.tokens
        )
        self.syncer.receive(read)

    def _pause(self, pause: Pause) -> None:
        process = self._current.get(pause.learner_id)
        if process is not None:
            process.pause(pause.for_s)

    def _freeze(self, freeze: Freeze) -> None:
        process = self._current.get(freeze.learner_id)
        if process is not None:
            process.freeze(freeze.for_s)

    def _ask_for_stop(self) -> None:
        process = self._current.get(0)
        if process is not None:
            process.ask_for_stop()

    def _look_for_end(self) -> None:
        """A process ended: when all have and none will start, the supervisor says so."""
        if self._to_start == 0 and all(process.ended is not None for process in self.processes):
            self.engine.schedule(self._finish, delay_s=2.0 * self._options.notice_s)

    def _finish(self) -> None:
        for process in self._current.values():
            if process.ended == "killed":
                self._hand_in_counters(process)
        self.syncer.receive(Finish(status="finished"))


def simulate(options: SimOptions) -> SimResult:
    """Run a job on the virtual clock to its end, or to `until_s`.

    Args:
        options: the job.

    Returns:
        The trace and what the syncer knew at the end. The same options give the same bytes.
    """
    world = _World(options)
    world.prepare()
    virtual_s = world.engine.run(options.until_s)
    job, end = world.syncer.machine.job, world.syncer.end
    pending = {(m, p): job.ledger.pending(m, p) for m in job.ledger.learners() for p in range(job.num_fragments)}
    return SimResult(
        trace=b"".join(world.syncer.lines),
        status=end.status if end is not None else None,
        virtual_s=virtual_s,
        num_events=world.engine.num_scheduled,
        merges=sum(current.version.n for current in job.currents),
        pending={key: tokens for key, tokens in pending.items() if tokens},
        processes=tuple((process.learner_id, process.ended) for process in world.processes),
    )
