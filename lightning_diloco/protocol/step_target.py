"""The time that an inner step is to take where batch sizes are found automatically: the median over the job's learners.

Learners begin with the batch that the user wrote. When all of them have told enough steps, the median of their medians is the target,
for good: it would move with every size that follows it otherwise. In local mode all configured learners are waited for, elsewhere those
that
are active and at least two, but neither for longer than `WAIT_S` after the first one was ready. A job that goes on under a new
syncer finds it anew, from steps that are near the old one. Speed is never asked for, only time: no table of devices knows what else they
do.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from statistics import median

from lightning_diloco.protocol.actions import SyncerAction, Tape
from lightning_diloco.protocol.job import JobOptions
from lightning_diloco.protocol.members import Member
from lightning_diloco.protocol.messages import BatchChosen
from lightning_diloco.protocol.records import BatchRecord, ProgressRecord

__all__ = ["StepTarget"]

FIRST = 2
"""Steps of a life that say little: memory is allocated and kernels are chosen in them."""
ENOUGH = 8
KEPT = 32
WAIT_S = 30.0


class StepTarget:
    """Finds the target from reports.

    Args:
        options: of the job.
    """

    def __init__(self, options: JobOptions) -> None:
        self.target_s = 0.0
        """Seconds; 0 until it is known."""
        self._num_slots = options.num_slots
        self._steps: dict[tuple[int, int], deque[float]] = {}
        self._first_s: float | None = None

    def told(self, learner_id: int, record: ProgressRecord, active: Iterable[Member], now_s: float) -> None:
        """A report has come.

        Args:
            learner_id: whose.
            record: its steps that were not told before.
            active: learners that are active now.
            now_s: monotonic seconds.
        """
        if self.target_s:
            return
        steps = self._steps.setdefault((learner_id, record.incarnation), deque(maxlen=KEPT))
        paused_s = record.paused_s + (0.0,) * len(record.step_gaps_s)
        for number, gap_s in enumerate(record.step_gaps_s):
            if record.first_gap + number >= FIRST:
                steps.append(max(0.0, gap_s - paused_s[number]))
        medians = {m.learner_id: self._median_s(m) for m in active}
        known = [value for value in medians.values() if value > 0]
        if not known:
            return
        self._first_s = now_s if self._first_s is None else self._first_s
        wanted = max(len(medians), 2 if self._num_slots is None else self._num_slots)
        if len(known) >= wanted or now_s - self._first_s >= WAIT_S:
            self.target_s = median(known)
            self._steps.clear()

    def chosen(self, member: Member, message: BatchChosen, now_s: float) -> list[SyncerAction]:
        """A learner has changed its batch: for the tape, with the target of that moment."""
        member.batch_size = message.batch_size
        record = BatchRecord(
            learner_id=member.learner_id,
            incarnation=member.incarnation,
            inner_step=message.inner_step,
            batch_size=message.batch_size,
            accumulate=message.accumulate,
            lr_factor=message.lr_factor,
            reason=message.reason,
            target_step_s=self.target_s,
        )
        return [Tape(record=record)]

    def _median_s(self, member: Member) -> float:
        steps = self._steps.get((member.learner_id, member.incarnation), ())
        return median(steps) if len(steps) >= ENOUGH else 0.0
