"""A learner on the virtual clock: the real `LearnerMachine`, a training thread that steps, and a background that encodes and decodes.

The training thread never waits: a step follows the one before it, after the stalls of its boundary. The background does one thing
after another. A frozen process does nothing; what arrives meanwhile is taken, in its order, when it thaws. A killed one is gone.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from functools import partial
from typing import Any
from zlib import crc32

from lightning_diloco.config import payload_bytes
from lightning_diloco.protocol.actions import (
    Adopt,
    Decode,
    Fence,
    Forget,
    Heal,
    Joined,
    LeftDone,
    RefuseJoin,
    Send,
    SendContribution,
    SendFounding,
    SendLeave,
    Snapshot,
    StopTraining,
)
from lightning_diloco.protocol.events import (
    Boundary,
    ContributionArrived,
    Decoded,
    Encoded,
    FoundingArrived,
    JoinRequested,
    LearnerEvent,
    LeaveRequested,
    MessageReceived,
    PauseChanged,
    PublicationArrived,
    PublicationDelivered,
    StopRequested,
    SyncerEvent,
)
from lightning_diloco.protocol.identity import FragmentInfo
from lightning_diloco.protocol.learner import LearnerMachine, LearnerOptions
from lightning_diloco.protocol.messages import Found, FromLearner, Heartbeat, Leave, Progress
from lightning_diloco.sim.engine import Callback, Engine
from lightning_diloco.sim.network import Wire
from lightning_diloco.sim.options import Cut, SimOptions
from lightning_diloco.sim.syncer_process import SyncerProcess

__all__ = ["LearnerProcess"]


class LearnerProcess:
    """Drives one `LearnerMachine`: one life of one learner.

    Args:
        engine: the clock.
        syncer: whom it dials.
        options: of the simulated job.
        learner_id: its id.
        life: 0 for its first process; part of its name and of the seed of its jitter.
        takeover_token: shown at the door.
        on_end: called once when the process ends, however it does.
    """

    def __init__(
        self, engine: Engine, syncer: SyncerProcess, options: SimOptions, learner_id: int, life: int, takeover_token: str, on_end: Callback
    ) -> None:
        self.learner_id = learner_id
        self.wire = Wire(engine, options.learners[learner_id].link, options.of(Cut, learner_id))
        self.ended: str | None = None
        """None while it lives; else "left", "killed", or the reason of a refusal."""
        self._name = f"{learner_id:08x}{life:08x}"
        self._engine, self._syncer, self._options, self._on_end = engine, syncer, options, on_end
        self._plan = options.learners[learner_id]
        self._random = random.Random(f"{options.seed}/{learner_id}/{life}")
        self.machine = LearnerMachine(
            LearnerOptions(
                nonce=self._name,
                num_fragments=options.config.num_fragments,
                fingerprint="sim",
                config=json.dumps(options.config.as_dict()).encode(),
                adopt=options.config.adopt,
                learner_id=learner_id,
                takeover_token=takeover_token,
                device="sim",
                batch_size=self._plan.tokens_per_step,
                tokens_per_step=self._plan.tokens_per_step,
            )
        )
        self._ended_s = 0.0
        self._background_free_s = 0.0
        self._thaws_s = 0.0
        self._pause_s = 0.0
        self._stall_s = 0.0
        self._steps_left: int | None = None
        self._stop_reason: str | None = None
        self._last_end_s = 0.0
        self._num_told = 0
        self._gaps: tuple[list[float], list[float], list[float]] = ([], [], [])
        self._gap_paused_s = 0.0
        self._gap_stall_s = 0.0
        self._progress: Progress | None = None
        self._handlers: dict[type, Callable[[Any], object]] = {
            Send: lambda action: self._send(action.message),
            SendFounding: self._send_founding,
            Decode: self._decode,
            Adopt: self._stall,
            Heal: self._stall,
            Snapshot: self._snapshot,
            SendContribution: self._send_contribution,
            SendLeave: lambda action: self._send(Leave(reason=action.reason, report=self._report())),
            Forget: lambda action: None,
            Joined: self._joined,
            RefuseJoin: lambda action: self._end(f"refused: {action.reason}"),
            Fence: lambda action: self._end("fenced"),
            StopTraining: self._stop_training,
            LeftDone: lambda action: self._end("left"),
        }

    # ---- from outside -------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """The process starts and says hello."""
        self._syncer.connect(self._name, self)
        self.receive(JoinRequested())
        self._engine.schedule(self._heartbeat, delay_s=self._options.config.heartbeat_s)

    def receive(self, event: LearnerEvent) -> None:
        """Hand one event to the machine and do what it says, now or when the process thaws."""
        if self.ended is not None or self._is_frozen(partial(self.receive, event)):
            return
        handlers = self._handlers
        for action in self.machine.handle(event, self._engine.now_s):
            handlers[type(action)](action)

    def take(self, event: PublicationArrived) -> None:
        """A payload is here: the transport acknowledges it, then the machine has it."""
        if self.ended is not None or self._is_frozen(partial(self.take, event)):
            return
        delivered = PublicationDelivered(session=self._name, fragment_id=event.header.fragment_id)
        self.wire.control(partial(self._syncer.receive, delivered))
        self.receive(event)

    def pause(self, for_s: float) -> None:
        """From the next boundary on, no steps for so long."""
        self._pause_s += for_s

    def freeze(self, for_s: float) -> None:
        """Stand still for so long from now."""
        self._thaws_s = max(self._thaws_s, self._engine.now_s + for_s)

    def kill(self) -> None:
        """End at once."""
        self._end("killed")

    def ask_for_stop(self) -> None:
        """`trainer.should_stop` was set here."""
        self.receive(StopRequested(reason="should_stop"))

    # ---- the training thread ------------------------------------------------------------------------------------------------

    def _joined(self, action: Joined) -> None:
        self._last_end_s = self._engine.now_s
        if self._plan.max_steps is not None:
            before = action.job_step if self._options.config.lr_clock == "job" else 0
            self._steps_left = max(0, self._plan.max_steps - before)
        if self._steps_left == 0:
            self.receive(LeaveRequested(reason="limit"))
        else:
            self._begin_step()

    def _begin_step(self) -> None:
        plan = self._plan
        step_s = plan.step_s * (1.0 + plan.jitter * (2.0 * self._random.random() - 1.0)) if plan.jitter else plan.step_s
        self._engine.schedule(self._end_step, delay_s=self._stall_s + step_s)
        self._gap_stall_s, self._stall_s = self._stall_s, 0.0

    def _end_step(self) -> None:
        if self.ended is not None or self._is_frozen(self._end_step):
            return
        now_s = self._engine.now_s
        for values, value in zip(self._gaps, (now_s - self._last_end_s, self._gap_paused_s, self._gap_stall_s), strict=True):
            values.append(value)
        self._last_end_s, self._gap_paused_s = now_s, 0.0
        self.receive(Boundary(tokens=self._plan.tokens_per_step))
        self._next()

    def _next(self) -> None:
        """After a boundary: leave, pause, or step."""
        if self._steps_left is not None and self.machine.state.inner_step >= self._steps_left:
            self.receive(LeaveRequested(reason="limit"))
        elif self._stop_reason is not None:
            self.receive(LeaveRequested(reason="stopped"))
        elif self._pause_s:
            self.receive(PauseChanged(is_paused=True))
            self._gap_paused_s, self._pause_s = self._pause_s, 0.0
            self._engine.schedule(self._resume, delay_s=self._gap_paused_s)
        else:
            self._begin_step()

    def _resume(self) -> None:
        if self.ended is not None or self._is_frozen(self._resume):
            return
        self.receive(PauseChanged(is_paused=False))
        if self._stop_reason is not None:
            self.receive(LeaveRequested(reason="stopped"))
        else:
            self._begin_step()

    def _stop_training(self, action: StopTraining) -> None:
        self._stop_reason = action.reason

    def _stall(self, action: Adopt | Heal | Snapshot) -> None:
        self._stall_s += self._options.stall_s

    # ---- the background -----------------------------------------------------------------------------------------------------

    def _in_background(self, duration_s: float, event: LearnerEvent) -> None:
        self._background_free_s = max(self._engine.now_s, self._background_free_s) + duration_s
        self._engine.schedule(partial(self.receive, event), at_s=self._background_free_s)

    def _decode(self, action: Decode) -> None:
        self._in_background(self._options.decode_s, Decoded(fragment_id=action.fragment_id, version=action.version, crc_ok=True))

    def _snapshot(self, action: Snapshot) -> None:
        self._stall(action)
        crc = crc32(b"%d/%d/%d" % (self.learner_id, action.fragment_id, action.seq))
        self._in_background(self._options.encode_s, Encoded(fragment_id=action.fragment_id, seq=action.seq, crc=crc))

    def _send_contribution(self, action: SendContribution) -> None:
        num_bytes = payload_bytes(self._options.params_per_fragment, self._options.config.wire_dtype)
        arrived = ContributionArrived(
            session=self._name,
            envelope=self.machine.state.envelope,
            header=action.header,
            norm=float(action.header.steps),
            is_finite=True,
            payload_bytes=num_bytes,
        )
        self._up(num_bytes, arrived)

    def _send_founding(self, action: SendFounding) -> None:
        count, num_params = self._options.config.num_fragments, self._options.params_per_fragment
        fragments = tuple(FragmentInfo(fragment_id=i, num_params=num_params) for i in range(count))
        self._send(Found(layout=b"sim", fragments=fragments, static_bytes=0, static_crc=0))
        num_bytes = 4 * num_params * count
        crcs = tuple(crc32(b"%d/founding" % i) for i in range(count))
        arrived = FoundingArrived(session=self._name, crcs=crcs, payload_bytes=num_bytes)
        self._up(num_bytes, arrived)

    def _up(self, num_bytes: int, event: SyncerEvent) -> None:
        self.wire.up(num_bytes, partial(self._uploaded, event))

    def _uploaded(self, event: SyncerEvent) -> None:
        """A payload is with the syncer, unless its sender was killed before the last byte had left."""
        if self.ended != "killed" or self._ended_s >= self._engine.now_s - self._plan.link.latency_s:
            self._syncer.receive(event)

    def _send(self, message: FromLearner) -> None:
        if isinstance(message, Progress) and self.wire.opens_s() > self._engine.now_s:
            if self._progress is None:
                self._engine.schedule(self._send_progress, at_s=self.wire.opens_s())
            self._progress = message
            return
        received = MessageReceived(session=self._name, envelope=self.machine.state.envelope, message=message)
        self.wire.control(partial(self._syncer.receive, received))

    def _send_progress(self) -> None:
        message, self._progress = self._progress, None
        if message is not None and self.ended is None and not self._is_frozen(partial(self._send, message)):
            self._send(message)

    # ---- reports ------------------------------------------------------------------------------------------------------------

    def _heartbeat(self) -> None:
        if self.ended is not None or self._is_frozen(self._heartbeat):
            return
        if self.machine.state.stage in ("joined", "leaving"):
            self._send(self._report())
        self._engine.schedule(self._heartbeat, delay_s=self._options.config.heartbeat_s)

    def _report(self) -> Heartbeat:
        gaps_s, paused_s, stalls_s = (tuple(values) for values in self._gaps)
        for values in self._gaps:
            values.clear()
        age_s, first_gap = self._engine.now_s - self._last_end_s, self._num_told
        self._num_told += len(gaps_s)
        return self.machine.report(first_gap=first_gap, step_gaps_s=gaps_s, paused_s=paused_s, stalls_s=stalls_s, last_step_age_s=age_s)

    def _is_frozen(self, again: Callback) -> bool:
        """Whether the process stands still; `again` is then called when it thaws."""
        if self._engine.now_s >= self._thaws_s:
            return False
        self._engine.schedule(again, at_s=self._thaws_s)
        return True

    def _end(self, how: str) -> None:
        if self.ended is None:
            self.ended, self._ended_s = how, self._engine.now_s
            self._on_end()
