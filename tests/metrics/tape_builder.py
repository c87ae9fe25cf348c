"""Builds tapes by hand: a clock that the test moves, and one short method for each record."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning_diloco.metrics import SummaryFold
from lightning_diloco.protocol.identity import FragmentInfo, Version
from lightning_diloco.protocol.records import (
    ContributionRecord,
    CountersRecord,
    DiscardRecord,
    EndRecord,
    JobRecord,
    JoinRecord,
    LeaveRecord,
    Member,
    MergeRecord,
    ProgressRecord,
    PublishRecord,
    Record,
    RestartRecord,
    RoundCancelRecord,
    RoundOpenRecord,
    RunRecord,
    TapeLine,
    encode_line,
)
from lightning_diloco.runtime.summary import write_summary


class TapeBuilder:
    """Writes records at `now_s`; keeps versions, rounds and sequence numbers so that the tape is a valid one."""

    def __init__(self) -> None:
        self.lines: list[TapeLine] = []
        self.now_s = 0.0
        self.epoch = 0
        self.versions: dict[int, int] = {}
        self.rounds = 0
        self.seqs: dict[tuple[int, int], int] = {}
        self.gaps: dict[tuple[int, int], int] = {}

    def add(self, record: Record) -> None:
        self.lines.append(TapeLine(len(self.lines), self.now_s, record))

    def job(self, num_params: tuple[int, ...] = (30, 10), *, buffers: int = 0, num_slots: int | None = None, **fields: Any) -> None:
        fragments = [FragmentInfo(p, n) for p, n in enumerate(num_params)]
        fragments += [FragmentInfo(len(fragments), buffers, "buffers")] if buffers else []
        values: dict[str, Any] = {"founded_n": (0,) * len(fragments), "founding_bytes": 160} | fields
        self.versions = dict(enumerate(values["founded_n"]))
        record = JobRecord(
            job_id="j1",
            lineage="l1",
            epoch=0,
            config={"outer_lr": 0.7},
            fingerprint="f",
            fragments=tuple(fragments),
            founder_id=0,
            num_slots=num_slots,
            versions={"torch": "2"},
            **values,
        )
        self.add(record)

    def join(self, learner: int, incarnation: int = 0, **fields: Any) -> None:
        self.add(JoinRecord(learner_id=learner, incarnation=incarnation, role="joiner", **fields))

    def leave(self, learner: int, incarnation: int = 0, reason: Any = "limit") -> None:
        self.add(LeaveRecord(learner_id=learner, incarnation=incarnation, reason=reason))

    def progress(self, learner: int, steps: int, tokens: int, gaps: tuple[float, ...] = (), incarnation: int = 0, **fields: Any) -> None:
        first = fields.pop("first_gap", self.gaps.get((learner, incarnation), 0))
        self.gaps[learner, incarnation] = first + len(gaps)
        totals = {"inner_steps": steps, "tokens": tokens, "first_gap": first}
        self.add(ProgressRecord(learner_id=learner, incarnation=incarnation, step_gaps_s=gaps, batch_size=4, **totals, **fields))

    def counters(self, learner: int, steps: int, tokens: int, incarnation: int = 0) -> None:
        self.add(CountersRecord(learner_id=learner, incarnation=incarnation, inner_steps=steps, tokens=tokens))

    def contribute(
        self, learner: int, fragment: int, steps: int, tokens: int, outcome: Any = "folded", incarnation: int = 0, reason: Any = None
    ) -> Member:
        seq = self.seqs[learner, fragment] = self.seqs.get((learner, fragment), 0) + 1
        weight = tokens**2 / steps
        record = ContributionRecord(
            learner_id=learner,
            incarnation=incarnation,
            fragment_id=fragment,
            seq=seq,
            base=Version(self.epoch, self.versions[fragment]),
            steps=steps,
            tokens=tokens,
            weight=weight,
            norm=1.0,
            payload_bytes=100,
            outcome=outcome,
            reason=reason,
        )
        self.add(record)
        return Member(learner_id=learner, incarnation=incarnation, seq=seq, steps=steps, tokens=tokens, weight=weight)

    def open(self, fragment: int, quorum: int = 1) -> int:
        self.rounds += 1
        self.add(RoundOpenRecord(fragment_id=fragment, round_id=self.rounds, quorum=quorum, active=(0, 1), pulled=(0, 1), carried=()))
        return self.rounds

    def cancel(self, fragment: int, round_id: int) -> None:
        self.add(RoundCancelRecord(fragment_id=fragment, round_id=round_id, contributions=0, quorum=1))

    def merge(self, fragment: int, members: list[Member], eligible: tuple[int, ...], quorum: int = 1, round_id: int | None = None) -> None:
        round_id = self.open(fragment, quorum) if round_id is None else round_id
        self.versions[fragment] += 1
        record = MergeRecord(
            fragment_id=fragment,
            round_id=round_id,
            version=Version(self.epoch, self.versions[fragment]),
            members=tuple(members),
            eligible=eligible,
            quorum=quorum,
            quorum_s=0.1,
            grace_window_s=0.2,
            grace_used_s=0.1,
            merge_s=0.01,
            outer_lr=0.7,
            outer_momentum=0.5,
            crc=1,
        )
        self.add(record)

    def publish(self, fragment: int, learners: tuple[int, ...], payload_bytes: int = 50) -> None:
        version = Version(self.epoch, self.versions.get(fragment, 0))
        self.add(PublishRecord(fragment_id=fragment, version=version, is_full=False, learners=learners, payload_bytes=payload_bytes))

    def discard(self, learner: int, fragment: int, tokens: int, reason: Any = "died") -> None:
        self.add(DiscardRecord(learner_id=learner, fragment_id=fragment, reason=reason, tokens=tokens))

    def restart(self, versions: tuple[int, ...]) -> None:
        self.epoch += 1
        self.versions = dict(enumerate(versions))
        self.add(RestartRecord(epoch=self.epoch, versions=tuple(Version(self.epoch, n) for n in versions)))

    def end(self, status: Any = "finished") -> None:
        self.add(EndRecord(status=status, versions=tuple(self.versions.values()), global_sha256="ab"))

    def run(self, status: Any = "finished", **fields: Any) -> None:
        values: dict[str, Any] = {"startup_s": 3.5, "restarts": {"learners": 1, "syncer": 0}, "val": {"val_loss": 1.25}} | fields
        self.add(RunRecord(status=status, **values))

    def fold(self) -> SummaryFold:
        fold = SummaryFold()
        for line in self.lines:
            fold.feed(line)
        return fold

    def summary(self, **options: Any) -> dict[str, Any]:
        return self.fold().result(**options)

    def write(self, run_dir: Path) -> dict[str, Any]:
        """Write tape and summary as a run does."""
        summary = self.summary()
        (run_dir / "tape.jsonl").write_bytes(b"".join(map(encode_line, self.lines)))
        write_summary(run_dir, summary)
        return summary


def two_learner_run() -> TapeBuilder:
    """Two learners, fragments of 30 and 10 parameters and a buffer fragment; learner 1 dies, returns, and has a carried contribution.

    Learner 0 joins at 10 s and steps every second to 30 s, 10 tokens each; at 20..25 it is paused for 4 of 5 s (one step).
    Learner 1 joins at 12 s, steps every 2 s, 5 tokens each, dies at 18.5 s, is back at 24 s, steps to 30 s. The drain ends at 31 s.
    """
    tape = TapeBuilder()
    tape.now_s = 9.0
    tape.job((30, 10), buffers=5, num_slots=2)
    tape.now_s = 10.0
    tape.join(0, batch_size=2)
    tape.now_s = 12.0
    tape.join(1)
    tape.publish(-1, (1,), 7)
    tape.now_s = 14.5
    tape.progress(0, 4, 40, (1.0,) * 4, stalls_s=(0.0, 0.01, 0.02, 0.01), paused_s=(0.0,) * 4, last_step_age_s=0.5)
    tape.progress(1, 1, 5, (2.0,), stalls_s=(0.005,), last_step_age_s=0.5)
    tape.merge(0, [tape.contribute(0, 0, 4, 40), tape.contribute(1, 0, 1, 5)], (0, 1), quorum=2)
    tape.publish(0, (0, 1))
    late = tape.contribute(1, 1, 1, 5, "carried")
    tape.contribute(1, 1, 1, 5, "refused", reason="overlap")
    tape.contribute(0, 2, 4, 40)
    tape.cancel(1, tape.open(1))
    tape.now_s = 18.5
    tape.progress(1, 3, 15, (2.0, 2.0), stalls_s=(0.005, 0.005), last_step_age_s=0.5)
    tape.counters(1, 4, 20)
    tape.leave(1, reason="died")
    tape.discard(1, 0, 15)
    tape.discard(1, 1, 15)
    tape.discard(1, 2, 20)  # buffers have no account
    tape.now_s = 19.0
    tape.merge(1, [late, tape.contribute(0, 1, 8, 80)], (0,))
    tape.merge(2, [Member(learner_id=0, incarnation=0, seq=1, steps=4, tokens=40, weight=400.0)], (0,))
    tape.publish(1, (0,), 20)
    tape.now_s = 24.0
    tape.join(1, 1)
    tape.now_s = 30.0
    gaps = (1.0,) * 6 + (5.0,) + (1.0,) * 5
    tape.progress(0, 16, 160, gaps, stalls_s=(0.0,) * 12, paused_s=(0.0,) * 6 + (4.0,) + (0.0,) * 5)
    tape.progress(1, 3, 15, (2.0,) * 3, incarnation=1)
    tape.merge(0, [tape.contribute(0, 0, 12, 120), tape.contribute(1, 0, 3, 15, incarnation=1)], (0, 1))
    tape.leave(0)
    tape.leave(1, 1)
    tape.merge(1, [tape.contribute(0, 1, 8, 80)], (0, 1))
    tape.merge(1, [tape.contribute(1, 1, 3, 15, "carried", 1)], ())
    tape.now_s = 31.0
    tape.end()
    tape.run()
    return tape
