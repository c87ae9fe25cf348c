"""The lease ledger as a fold over the tape: for a syncer that starts again, and for the summary."""

from __future__ import annotations

from lightning_diloco.protocol.leases import LeaseLedger
from lightning_diloco.protocol.records import (
    CountersRecord,
    JobRecord,
    JoinRecord,
    LeaseBackRecord,
    LeaseLateRecord,
    LeaseRecord,
    LeaveRecord,
    ProgressRecord,
    Record,
)

__all__ = ["fold_leases"]


def fold_leases(ledger: LeaseLedger | None, record: Record, sessions: dict[tuple[int, int], str]) -> LeaseLedger | None:
    """The ledger after one more record of the tape; a job without leases has none.

    Args:
        ledger: of the records before; changed in place.
        record: the next one.
        sessions: names of the processes of running lives, kept by this function.
    """
    if isinstance(record, JobRecord):
        return None if record.data is None else LeaseLedger(record.data, is_rebuilt=record.is_rebuilt)
    if ledger is None:
        return None
    match record:
        case JoinRecord():
            sessions[record.learner_id, record.incarnation] = record.session
        case LeaseRecord():
            life = ledger.life(record.learner_id, record.incarnation)
            ledger.trained(record.learner_id, record.incarnation, record.samples)
            ledger.take(life, record.number, record.ranges, record.before)
        case ProgressRecord():
            ledger.trained(record.learner_id, record.incarnation, record.samples, record.again)
        case CountersRecord() if record.samples is not None:
            ledger.counted(record.learner_id, record.incarnation, record.samples)
        case LeaseBackRecord():
            ledger.reclaim(record.learner_id, record.incarnation)
        case LeaseLateRecord():
            ledger.late(record.session, record.samples)
        case LeaveRecord():
            session = sessions.pop((record.learner_id, record.incarnation), "")
            said = record.reason not in ("died", "fenced")
            ledger.end(record.learner_id, record.incarnation, session, said_last_word=said)
        case _:
            pass
    return ledger
