"""Re-execution of a run's merges from its tape and its recorded payloads (`lightning-diloco replay`).

**What is executed.** The tape says which contributions each merge had, in which order, with which weights, and with what the outer step was
taken; `payloads.bin` has the founding and the contributions (`runtime/payloads.py`). They are folded, stepped and published by
the same functions of `outer/` as in the syncer. Norms and scales are the recorded ones: a sum over a tensor differs in its last bit between
CPUs and numbers of threads. All the rest is elementwise, so a replay is exact on every machine. Publications on the tape are not looked at.

**What is compared.** The CRC-32 of every merge's result with that on its record, so that the first difference has a place; and the SHA-256
of the end with `global_sha256` of `summary.json` (without one: of the tape's `end`). A replay goes on after a difference, and counts.

**Restarts.** A syncer that starts again goes on, per fragment, from a version of the snapshot, or from one that a learner held, then with
the momentum of the snapshot; merges above it are undone, and what was held is lost. The tape is read twice: the first time to learn which
states a later restart goes back to (its `origins` and `momenta`), the second time to execute. Memory: the present state of each fragment,
12 bytes per parameter, those states until the last restart that needs them, and one merge. Payloads are read when they are folded.

Bytes of both files are not trusted: what does not fit together is an error that names the place, never a guess.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, Literal

import torch

from lightning_diloco.config import SyncConfig
from lightning_diloco.errors import ConfigurationError, DiLoCoError
from lightning_diloco.outer import Encoded, FragmentState, Layout, MergeAccumulator, OuterStep, payload_bytes, sha256_of, take_step
from lightning_diloco.protocol.identity import Version
from lightning_diloco.protocol.records import ContributionRecord, EndRecord, JobRecord, MergeRecord, RestartRecord
from lightning_diloco.runtime.checksum import crc32
from lightning_diloco.runtime.payloads import PAYLOADS_NAME, PayloadError, PayloadFile, PayloadKey
from lightning_diloco.runtime.store import MAX_LAYOUT_BYTES
from lightning_diloco.runtime.summary import SUMMARY_NAME
from lightning_diloco.runtime.tape import TAPE_NAME, walk_tape

__all__ = ["Replayed", "ReplayedFragment", "expected_sha256", "replay_part", "replay_run"]

_ACCEPTED: Final = ("folded", "carried")


class ReplayError(DiLoCoError):
    """Tape and payloads do not tell one story; the sentence names the place."""


@dataclass(slots=True, kw_only=True)
class ReplayedFragment:
    """What was executed of one fragment."""

    fragment_id: int
    kind: str
    num_params: int
    founded_n: int
    """Version that it began with."""
    version: tuple[int, int]
    """(epoch, n) that it ended at."""
    merges: int = 0
    """Merges executed, undone ones included."""
    contributions: int = 0
    """Contributions in them."""
    differences: int = 0
    """Merges whose result does not have the CRC-32 on the tape."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """What a replay found."""

    job_id: str
    is_equal: bool
    """Whether nothing differs."""
    global_sha256: str
    """Of the replayed model, as `summary.json` has it."""
    expected_sha256: str | None
    """What it was compared with; None: the job has not ended, so only the merges were compared."""
    expected_from: Literal["summary.json", "tape.jsonl"] | None
    merges: int
    contributions: int
    restarts: int
    differences: int
    """Merges and ends that are not those of the run."""
    first_difference: str | None
    """A sentence with the place of the first one."""
    fragments: tuple[ReplayedFragment, ...]


def replay_run(run_dir: Path) -> Replayed:
    """Execute the merges of a run without shards and compare; see `replay_part`."""
    return replay_part(run_dir)[0]


def replay_part(run_dir: Path) -> tuple[Replayed, list[torch.Tensor]]:
    """Execute a run's merges and compare.

    Args:
        run_dir: of a job that ran with ``tape_payloads=True``: `tape.jsonl`, `payloads.bin` and, if the job has ended, `summary.json`.

    Returns:
        What was found, and the published values of each fragment at the end, flat float32.

    Raises:
        ConfigurationError: there is no such folder or no job in it, or its payloads were not kept.
        DiLoCoError: tape, payloads or summary are damaged or incomplete; the sentence names the place.
    """
    tape = run_dir / TAPE_NAME
    if not run_dir.is_dir():
        raise ConfigurationError(f"{run_dir}: there is no such folder. Give the run directory of a job.")
    if not tape.is_file():
        raise ConfigurationError(f"{run_dir}: holds no {TAPE_NAME}. Give the run directory of a job.")
    plan = _survey(tape)
    payloads = PayloadFile(run_dir / PAYLOADS_NAME)
    try:
        replay = _Replay(tape, plan, payloads)
        return replay.run(expected_sha256(run_dir)), replay.published
    finally:
        payloads.close()


@dataclass(slots=True, kw_only=True)
class _Plan:
    """What the first reading tells."""

    job: JobRecord
    config: SyncConfig
    needed: Counter[tuple[int, Version]] = field(default_factory=Counter)
    """How many restarts go back to each state."""


def _survey(tape: Path) -> _Plan:
    """Read the tape once."""
    plan: _Plan | None = None
    lost: dict[tuple[int, int, int], str] = {}
    missing: list[str] = []
    for number, line in enumerate(walk_tape(tape), start=1):
        record = line.record
        if isinstance(record, JobRecord):
            plan = _plan(tape, number, record)
        elif isinstance(record, RestartRecord) and plan is not None:
            plan.needed.update(_sources(f"{tape}, line {number}", record, len(plan.job.fragments)))
        elif isinstance(record, ContributionRecord) and record.outcome in _ACCEPTED and record.payload_at is None:
            key = (record.learner_id, record.fragment_id, record.seq)
            lost[key] = f"contribution {record.seq} of learner {record.learner_id} to fragment {record.fragment_id} ({tape}, line {number})"
        elif isinstance(record, MergeRecord):
            missing += [lost.pop(key) for m in record.members if (key := (m.learner_id, record.fragment_id, m.seq)) in lost]
    if plan is None:
        raise ConfigurationError(f"{tape}: tells of no founded job. Give the run directory of a job that has begun.")
    if missing:
        raise ReplayError(
            f"{len(missing)} contributions that were merged have no payload: the disk failed when they were to be kept. The first one is "
            f"{missing[0]}."
        )
    return plan


def _plan(tape: Path, number: int, job: JobRecord) -> _Plan:
    try:
        config = SyncConfig.from_options(job.config)
    except (ConfigurationError, TypeError) as error:
        raise ReplayError(f"{tape}, line {number}: the job's options cannot be used ({error}). The tape is damaged.") from error
    if not config.tape_payloads:
        raise ConfigurationError(
            f"{tape.parent}: this job ran with tape_payloads=False, so its contributions were not kept and there is nothing to replay. "
            "Pass tape_payloads=True to the strategy in the next run."
        )
    if job.is_rebuilt:
        raise ConfigurationError(
            f"{tape.parent}: this job was rebuilt from its learners, and what it began with was not kept. Nothing to replay."
        )
    if job.payload_at is None:
        raise ReplayError(f"{tape}, line {number}: the founding has no payloads: the disk failed when they were to be kept.")
    if len(job.founded_n) != len(job.fragments):
        raise ReplayError(f"{tape}, line {number}: {len(job.founded_n)} versions for {len(job.fragments)} fragments. The tape is damaged.")
    return _Plan(job=job, config=config)


def _sources(place: str, record: RestartRecord, num_fragments: int) -> list[tuple[int, Version]]:
    """The states that a restart goes back to."""
    if not len(record.versions) == len(record.origins) == len(record.momenta) == num_fragments:
        raise ReplayError(f"{place}: the restart does not name versions, origins and momenta of {num_fragments} fragments.")
    momenta = [(p, version) for p, version in enumerate(record.momenta) if version is not None]
    return [*enumerate(record.origins), *momenta]


def expected_sha256(run_dir: Path) -> str | None:
    """What the summary of a run tells of its end; None if there is none, or the run has not ended.

    Raises:
        ReplayError: it cannot be read.
    """
    path = run_dir / SUMMARY_NAME
    try:
        summary = json.loads(path.read_bytes())
        sha256 = summary.get("global_sha256")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, AttributeError) as error:
        raise ReplayError(f"{path}: cannot be read ({error}).") from error
    return sha256 if isinstance(sha256, str) else None


class _Replay:
    """The second reading."""

    def __init__(self, tape: Path, plan: _Plan, payloads: PayloadFile) -> None:
        self._tape, self._job, self._config, self._payloads = tape, plan.job, plan.config, payloads
        self._needed = plan.needed
        self._place = ""
        self._epoch = plan.job.epoch
        self._layout: Layout | None = None
        self._states: list[FragmentState] = []
        self._kept: dict[tuple[int, Version], FragmentState] = {}
        self._held: dict[tuple[int, int, int], ContributionRecord] = {}
        self._fragments: list[ReplayedFragment] = []
        self._restarts = 0
        self._end: tuple[str, str | None] | None = None
        self._first: str | None = None
        self._differences = 0

    def run(self, summary_sha256: str | None) -> Replayed:
        """Execute the tape; `summary_sha256`: of `summary.json`, or None."""
        for number, line in enumerate(walk_tape(self._tape), start=1):
            self._place = f"{self._tape}, line {number}"
            match line.record:
                case JobRecord() as record:
                    self._found(record)
                case ContributionRecord() as record if record.outcome in _ACCEPTED:
                    self._held[record.learner_id, record.fragment_id, record.seq] = record
                case MergeRecord() as record:
                    self._merge(record)
                case RestartRecord() as record:
                    self._restart(record)
                case EndRecord() as record:
                    self._end = (sha256_of(s.shadow for s in self._states), record.global_sha256)
                    self._compare(*self._end, "end: the model's SHA-256")
                case _:
                    pass
        return self._result(summary_sha256)

    @property
    def published(self) -> list[torch.Tensor]:
        """The values of each fragment now."""
        return [state.shadow for state in self._states]

    def _result(self, summary_sha256: str | None) -> Replayed:
        found, told = self._end or (sha256_of(s.shadow for s in self._states), None)
        expected = summary_sha256 or told
        if summary_sha256 is not None and summary_sha256 != told:
            self._place = str(self._tape.with_name(SUMMARY_NAME))
            self._compare(found, summary_sha256, "global_sha256")
        return Replayed(
            job_id=self._job.job_id,
            is_equal=not self._differences,
            global_sha256=found,
            expected_sha256=expected,
            expected_from=None if expected is None else SUMMARY_NAME if summary_sha256 is not None else TAPE_NAME,
            merges=sum(f.merges for f in self._fragments),
            contributions=sum(f.contributions for f in self._fragments),
            restarts=self._restarts,
            differences=self._differences,
            first_difference=self._first,
            fragments=tuple(self._fragments),
        )

    def _compare(self, found: str, told: str | None, what: str) -> bool:
        if told is None or found == told:
            return True
        self._differences += 1
        self._first = self._first or f"{self._place}: {what} is {found}, and {told} in the run"
        return False

    def _damaged(self, why: str) -> ReplayError:
        return ReplayError(f"{self._place}: {why}. Lines are missing, or the tape was edited.")

    # ---- founding -----------------------------------------------------------------------------------------------------------

    def _found(self, record: JobRecord) -> None:
        if record != self._job or self._layout is not None or record.payload_at is None:
            raise self._damaged("the job is founded a second time")
        data, at = self._payloads.read(record.payload_at, PayloadKey(kind="layout"), MAX_LAYOUT_BYTES)
        self._layout = layout = Layout.from_bytes(bytes(data), max_bytes=MAX_LAYOUT_BYTES)
        told = tuple((f.fragment_id, f.num_params, f.kind) for f in record.fragments)
        if told != tuple((f.fragment_id, f.num_params, f.kind) for f in layout.fragments) or layout.fingerprint() != record.fingerprint:
            raise self._damaged(f"the layout in {self._payloads.path} is not the job's")
        for fragment, n in zip(layout.fragments, record.founded_n, strict=True):
            size = fragment.num_params
            values, at = self._payloads.read(at, PayloadKey(kind="values", fragment_id=fragment.fragment_id), 4 * size)
            state = replace(FragmentState.founded(torch.frombuffer(values, dtype=torch.float32)), merge_index=n)
            momentum = PayloadKey(kind="momentum", fragment_id=fragment.fragment_id)
            if self._payloads.peek(at) == momentum:
                buffer, at = self._payloads.read(at, momentum, 4 * size)
                state = replace(state, momentum=torch.frombuffer(buffer, dtype=torch.float32))
            version = Version(record.epoch, n)
            self._fragments.append(
                ReplayedFragment(
                    fragment_id=fragment.fragment_id, kind=fragment.kind, num_params=size, founded_n=n, version=(record.epoch, n)
                )
            )
            self._states.append(state)
            self._keep(fragment.fragment_id, version)

    def _keep(self, fragment_id: int, version: Version) -> None:
        """Remember the present state if a later restart goes back to it."""
        self._fragments[fragment_id].version = (version.epoch, version.n)
        if self._needed[fragment_id, version]:
            self._kept[fragment_id, version] = self._states[fragment_id]

    # ---- merges -------------------------------------------------------------------------------------------------------------

    def _merge(self, record: MergeRecord) -> None:
        if not 0 <= record.fragment_id < len(self._states):
            raise self._damaged(f"a merge of fragment {record.fragment_id}, which was not founded")
        told = self._fragments[record.fragment_id]
        expected = Version(self._epoch, told.version[1] + 1)
        if record.version != expected:
            raise self._damaged(
                f"fragment {told.fragment_id} is merged into version {_name(record.version)}, and {_name(expected)} is next"
            )
        try:
            state = self._step(record)
        except (ReplayError, PayloadError):
            raise
        except DiLoCoError as error:
            raise self._damaged(f"the merge of fragment {told.fragment_id} cannot be executed ({error})") from error
        self._states[record.fragment_id] = state
        told.merges, told.contributions = told.merges + 1, told.contributions + len(record.members)
        what = f"merge of fragment {told.fragment_id} into version {_name(record.version)}: CRC-32 of the result"
        if not self._compare(f"{crc32(state.shadow):08x}", f"{record.crc:08x}", what):
            told.differences += 1
        self._keep(record.fragment_id, record.version)

    def _step(self, record: MergeRecord) -> FragmentState:
        assert self._layout is not None
        fragment = self._layout.fragments[record.fragment_id]
        if len(record.norms) != len(record.members):
            raise self._damaged(f"{len(record.norms)} lists of norms for {len(record.members)} members")
        wire_dtype, merge = fragment.wire_dtype(self._config.wire_dtype), MergeAccumulator(fragment)
        for member, norms in zip(record.members, record.norms, strict=True):
            contribution = self._held.pop((member.learner_id, record.fragment_id, member.seq), None)
            if contribution is None or contribution.payload_at is None:
                raise self._damaged(f"contribution {member.seq} of learner {member.learner_id} is merged, and was not accepted before")
            key = PayloadKey(
                kind="contribution",
                fragment_id=record.fragment_id,
                learner_id=member.learner_id,
                incarnation=contribution.incarnation,
                seq=member.seq,
            )
            payload, _ = self._payloads.read(contribution.payload_at, key, payload_bytes(fragment.num_params, wire_dtype))
            merge.fold(Encoded.of(payload, fragment.num_params, wire_dtype), member.weight, norms=norms)
        merged, _ = merge.close(scales=record.scales)
        step = OuterStep(
            lr=record.outer_lr, momentum=record.outer_momentum, last_share=record.last_share, wire_dtype=self._config.wire_dtype
        )
        return take_step(fragment, self._states[record.fragment_id], merged, step, record.version.n).state

    # ---- restarts -----------------------------------------------------------------------------------------------------------

    def _restart(self, record: RestartRecord) -> None:
        if not self._states or record.epoch <= self._epoch:
            raise self._damaged(f"a restart with epoch {record.epoch} after epoch {self._epoch}")
        origins = zip(record.origins, record.momenta, record.versions, strict=True)
        for fragment_id, (origin, momentum, version) in enumerate(origins):
            if version != Version(record.epoch, origin.n):
                raise self._damaged(f"fragment {fragment_id} goes on as {_name(version)} from {_name(origin)}")
            values, before = self._source(fragment_id, origin), None if momentum is None else self._source(fragment_id, momentum)
            if fragment_id in record.recalled:
                self._states[fragment_id] = FragmentState.recalled(values.shadow, before, origin.n)
            else:
                self._states[fragment_id] = values
        for source in _sources(self._place, record, len(self._states)):
            self._needed[source] -= 1
            if not self._needed[source]:
                self._kept.pop(source, None)
        self._held, self._epoch, self._restarts, self._end = {}, record.epoch, self._restarts + 1, None
        for fragment_id, version in enumerate(record.versions):
            self._keep(fragment_id, version)

    def _source(self, fragment_id: int, version: Version) -> FragmentState:
        state = self._kept.get((fragment_id, version))
        if state is None:
            raise self._damaged(f"the restart goes back to version {_name(version)} of fragment {fragment_id}, which no line before makes")
        return state


def _name(version: Version) -> str:
    return f"({version.epoch}, {version.n})"
