"""`LearnerClient`: what a training process calls; the training thread never waits here once it has joined.

Two threads share one `LearnerMachine`:

- the **training thread** calls `boundary` at the end of each inner step: count, adopt what was prepared, copy a pulled fragment aside;
- the **background thread** (`client_loop.ClientLoop`) owns the sockets, decodes, encodes, sends.

They meet under one lock that is only held while the machine thinks and references change hands: no tensor is touched, no socket is used
under it. At a boundary the training thread does not wait for it either: if the lock is taken at that moment, the step is counted and the
exchange is left to the next boundary. So no step can ever be longer than its own arithmetic plus one addition and one copy per fragment
exchanged.

Only `join`, `leave` and `close` wait, each with a stated limit.

References:
    Decoupled DiLoCo, arXiv 2604.21428, algorithm 1 (the learner never waits).
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Literal

import zmq
from torch import nn

from lightning_diloco.errors import FencedError
from lightning_diloco.outer import Layout, global_id
from lightning_diloco.protocol.actions import Adopt, Heal, LearnerAction, Send, Snapshot
from lightning_diloco.protocol.events import Boundary, JoinRequested, LeaveRequested, PauseChanged, StopRequested
from lightning_diloco.protocol.identity import Version
from lightning_diloco.protocol.learner import LearnerMachine
from lightning_diloco.protocol.messages import BatchChosen
from lightning_diloco.runtime.client_loop import ClientLoop
from lightning_diloco.runtime.client_options import JOIN_TIMEOUT_S, ClientOptions, JoinInfo, learner_options, planned_layout
from lightning_diloco.runtime.client_waiting import FounderWatch, wait_for_join, wait_for_lease
from lightning_diloco.runtime.counters import CounterFile, open_counters
from lightning_diloco.runtime.figures import Figures, StepTimes
from lightning_diloco.runtime.global_state import MomentumTracker
from lightning_diloco.runtime.healing import Remedy, describe, is_heal_due, poisoned_fragments, tensors_of
from lightning_diloco.runtime.learner_store import Adoption, Encode, LearnerStore
from lightning_diloco.runtime.leaving import leave_all
from lightning_diloco.runtime.link_care import LinkCare
from lightning_diloco.runtime.transport import LearnerTransport
from lightning_diloco.runtime.weights import Weights

__all__ = ["ClientOptions", "Figures", "JoinInfo", "LearnerClient"]

_log = logging.getLogger(__name__)

MAX_BACKLOG = 64
"""Snapshots that may wait for encoding; above that pulls are answered `busy`."""

_Item = Adoption | Encode | Remedy


class LearnerClient:
    """One learner's side of the outer synchronization.

    Args:
        module: the user's module; its parameters are read and written in place, on the calling thread only.
        options: see `ClientOptions`.
        context: shared with a syncer in this process (`inproc://`).
        layout: what of the module is synchronized here (None: all of it); of one shard of a syncer that is its part.
        nonce: the process's random name (None: a new one), which is one and the same at all shards.

    Raises:
        ConfigurationError: the module has no parameter to synchronize, or one that cannot be.
    """

    def __init__(
        self,
        module: nn.Module,
        options: ClientOptions,
        *,
        context: zmq.Context[zmq.Socket[bytes]] | None = None,
        layout: Layout | None = None,
        nonce: bytes | None = None,
    ) -> None:
        config = options.config
        self.layout = planned_layout(module, config) if layout is None else layout
        self.on_heal: Callable[[list[nn.Parameter]], None] | None = None
        """Called on the training thread with the parameters of what was healed: reset their non-finite inner moments."""
        self.on_boundary: Callable[[], None] | None = None
        """Called on the training thread at the end of every boundary, inside of what counts as stall."""
        self._module = module
        self._options = options
        self._nonce = secrets.token_bytes(16) if nonce is None else nonce
        self._machine = LearnerMachine(learner_options(options, self.layout, self._nonce))
        self._store = LearnerStore(
            module,
            self.layout,
            config,
            momentum=MomentumTracker(self.layout, config, is_on=options.keeps_momentum),
        )
        self._times = StepTimes()
        self._transport = LearnerTransport(
            options.endpoint,
            nonce=self._nonce,
            accept=lambda *offer: self._loop.offers.accepts(*offer),
            context=context,
            configure=None if options.keys is None else options.keys.configure,
        )
        self._loop = ClientLoop(
            module=module,
            machine=self._machine,
            store=self._store,
            times=self._times,
            transport=self._transport,
            links=LinkCare(self._transport, options),
            config=config,
            patience_s=self._patience_s,
            founding=options.founding,
        )
        self.peers = self._loop.peers
        """Inner optimizer state from and for other learners."""
        self._counters: CounterFile | None = None
        self._inner_steps = 0
        self._tokens = 0
        self._uncounted_steps = 0
        self._uncounted_tokens = 0
        self.weights = Weights(module, self._store, self._loop.lock)
        self._is_closed = False

    # ---- joining ------------------------------------------------------------------------------------------------------------

    def join(self, meanwhile: Callable[[], None] = lambda: None) -> JoinInfo:
        """Join the job; on return the module's parameters are the global ones.

        Args:
            meanwhile: called again and again while this waits; what it raises ends the wait.

        Raises:
            JoinRefusedError: the syncer said no; the sentence says why.
            ShardedSyncerError: there are several shards to be joined.
            SyncerUnavailableError: nobody answered in time, or there was no connection for payloads.
        """
        try:
            if self._options.counters_path is not None:
                self._counters = open_counters(self._options.counters_path / f"{self._nonce.hex()}.bin")
            self._loop.reports.heard_s = time.monotonic()
            self._loop.start()
            self._loop.handle(JoinRequested())
            founder = FounderWatch(self._machine, self.layout)
            wait_for_join(self._loop, self._transport, self._options, self._patience_s, founder.look, meanwhile)
        except BaseException:
            self.close()
            raise
        joined = self._loop.joined
        assert joined is not None
        if joined.data is not None:
            wait_for_lease(self._loop, self._machine, self._options, joined.data, self._patience_s)
        if joined.role != "member":
            for fragment_id, view in enumerate(self._store.views):
                view.copy_from(self._store.base(fragment_id))
        if self._counters is not None:
            self._counters.set_incarnation(joined.incarnation)
        self.begin()
        return JoinInfo(
            learner_id=joined.learner_id,
            incarnation=joined.incarnation,
            role=joined.role,
            job_step=joined.job_step,
            lineage=self._machine.state.envelope.lineage,
        )

    def begin(self) -> None:
        """The join is complete, with all shards: the first gap between steps begins."""
        self._times.start()

    @property
    def nonce(self) -> bytes:
        """This process's random name."""
        return self._nonce

    @property
    def _patience_s(self) -> float:
        return JOIN_TIMEOUT_S if self._options.join_timeout_s is None else self._options.join_timeout_s

    # ---- training -----------------------------------------------------------------------------------------------------------

    def boundary(self, *, tokens: int, begun_s: float | None = None, heals: bool = False, wakes: bool = True) -> None:
        """An inner step has ended. Never waits.

        Args:
            tokens: trained in this step, at least 0.
            begun_s: monotonic time at which this boundary began (None: now), if other shards' parts came first.
            heals: another shard's part is healed of values that are not finite, and this one's are with it.
            wakes: whether the background thread is woken, or the caller does so at the end of all parts.
        """
        start_s = time.monotonic() if begun_s is None else begun_s
        self._inner_steps += 1
        self._tokens += tokens
        self._uncounted_steps += 1
        self._uncounted_tokens += tokens
        samples = self._options.leases.stepped() if self._options.leases is not None else 0
        if self._counters is not None:
            self._counters.update(self._inner_steps, self._tokens, samples)
        self._exchange(heals=heals)
        if self.on_boundary is not None:
            self.on_boundary()
        if wakes:
            self.wake()
        self._times.step(time.monotonic() - start_s)

    def wake(self) -> None:
        """Wake the background thread: last, because where threads share a core, who is woken earlier runs in the middle of a copy."""
        self._loop.wake()

    def _exchange(self, *, heals: bool) -> None:
        loop = self._loop
        poisoned = self._poisoned(heals=heals)
        if not loop.lock.acquire(blocking=False):
            return
        try:
            event = Boundary(
                tokens=self._uncounted_tokens,
                steps=self._uncounted_steps,
                can_snapshot=loop.backlog < MAX_BACKLOG,
                poisoned=poisoned,
            )
            self._uncounted_steps = self._uncounted_tokens = 0
            work = self._hand_over(self._machine.handle(event, time.monotonic()))
        finally:
            loop.lock.release()
        self._perform(work)

    def _hand_over(self, actions: list[LearnerAction]) -> list[tuple[LearnerAction, _Item]]:
        """Under the lock: exchange references, so that the tensors can be worked on after it."""
        work: list[tuple[LearnerAction, _Item]] = []
        for action in actions:
            if isinstance(action, Adopt):
                work.append((action, self._store.take(action.fragment_id)))
            elif isinstance(action, Heal):
                work.append((action, self._store.remedy(action.fragment_id, action.keep_seq)))
            elif isinstance(action, Snapshot):
                work.append((action, self._loop.encode_job(action)))
            else:
                self._loop.later(action)
        return work

    def _perform(self, work: list[tuple[LearnerAction, _Item]]) -> None:
        for action, item in work:
            if isinstance(item, Adoption) and isinstance(action, Adopt):
                self._store.adopt(action.fragment_id, item, action.mode)
            elif isinstance(item, Encode):
                self._loop.later(self._store.snapshot(item))
            elif isinstance(action, Heal) and isinstance(item, Remedy):
                self._heal(action, item)

    @property
    def is_heal_due(self) -> bool:
        """Whether something was refused for values that are not finite, and is healed at the next boundary."""
        return is_heal_due(self._machine.state.fragments)

    def _poisoned(self, *, heals: bool = False) -> tuple[int, ...] | None:
        return poisoned_fragments(self._module, self._store.views) if heals or self.is_heal_due else None

    def _heal(self, action: Heal, remedy: Remedy) -> None:
        number = global_id(action.fragment_id, self.layout.shard, self.layout.num_shards)
        _log.warning("%s", describe(self._machine.state.learner_id, action, self._options.config.norm_gate, number))
        self._store.views[action.fragment_id].copy_from(remedy.values())
        if self.on_heal is not None:
            # One step with a NaN puts it into the moments of all parameters.
            healed = self._store.views if action.reason == "nonfinite" else [self._store.views[action.fragment_id]]
            self.on_heal([p for view in healed for p in tensors_of(self._module, view) if isinstance(p, nn.Parameter)])

    def set_paused(self, is_paused: bool) -> None:
        """No inner steps for a while (validation, checkpoint), or on again."""
        self._times.pause(is_paused)
        self._loop.handle(PauseChanged(is_paused=is_paused))

    def batch_chosen(self, *, batch_size: int, accumulate: int, lr_factor: float, reason: str) -> None:
        """The batches have another size from now on (see `BatchChosen`); for the records. Never waits."""
        self._machine.state.batch_size = batch_size
        message = BatchChosen(
            inner_step=self._inner_steps, batch_size=batch_size, accumulate=accumulate, lr_factor=lr_factor, reason=reason[:200]
        )
        self._loop.later(Send(message=message))
        self._loop.wake()

    @property
    def target_step_s(self) -> float:
        """Seconds that a step is to take where batch sizes are found automatically; 0 until the syncer has said it."""
        return self._loop.reports.target_step_s

    def request_stop(self, reason: str) -> None:
        """This learner's `should_stop`; learner 0's ends the job for all."""
        self._loop.handle(StopRequested(reason=reason[:200]))

    # ---- the end ------------------------------------------------------------------------------------------------------------

    def leave(self, reason: Literal["limit", "signal", "stopped"], told_s: float | None = None) -> None:
        """Push the last contributions and say good-bye; waits at most `drain_timeout_s`, counted from `told_s` (see `leave_all`)."""
        leave_all([self], reason, self._options.config.drain_timeout_s, told_s)

    def begin_leave(self, reason: Literal["limit", "signal", "stopped"]) -> bool:
        """Push the last contributions; returns whether there is an answer to be waited for."""
        if self._is_closed or self._loop.joined is None or self._loop.fatal is not None:
            return False
        self._store.momentum.freeze()
        if self._uncounted_steps:
            event = Boundary(tokens=self._uncounted_tokens, steps=self._uncounted_steps, can_snapshot=False, poisoned=self._poisoned())
            self._uncounted_steps = self._uncounted_tokens = 0
            self._take_part(event)
        self._take_part(LeaveRequested(reason=reason, poisoned=self._poisoned()))
        return True

    def leave_again(self) -> None:
        """Push once more if the syncer has started again meanwhile, and has lost what was handed over."""
        again, self._loop.leave_again = self._loop.leave_again, None
        if again is not None:
            self._take_part(LeaveRequested(reason=again, poisoned=self._poisoned()))

    def leave_now(self, reason: Literal["limit", "signal", "stopped"]) -> None:
        """Say good-bye with what is acknowledged."""
        self._loop.leave_now(reason)

    def wait_left(self, timeout_s: float) -> bool:
        """Wait for the end of the leave; returns whether it has come."""
        return self._loop.left.wait(timeout_s)

    def _take_part(self, event: Boundary | LeaveRequested) -> None:
        """Give the machine an event and do what follows; waits for the lock, as only the end of a training may."""
        with self._loop.lock:
            work = self._hand_over(self._machine.handle(event, time.monotonic()))
        self._perform(work)
        self._loop.wake()

    def close(self) -> None:
        """Stop the background thread and close the sockets; short, idempotent, never raises."""
        if self._is_closed:
            return
        self._is_closed = True
        with suppress(Exception):
            self._loop.stop()
        counters, self._counters = self._counters, None
        if counters is not None:
            with suppress(Exception):
                counters.close()

    # ---- what can be read ---------------------------------------------------------------------------------------------------

    @property
    def stop_reason(self) -> str | None:
        """Why the job ends for all, or for this learner, or None."""
        return self._loop.stop_reason or self._loop.reports.offline_stop

    @property
    def is_offline(self) -> bool:
        """Whether this learner ends because there is no syncer."""
        return self._loop.reports.offline_stop is not None

    def version(self, fragment_id: int) -> Version:
        """The newest version of a fragment that has been received."""
        return self._machine.state.fragments[fragment_id].held or Version(0, 0)

    @property
    def fenced(self) -> FencedError | None:
        """Set when this process must end: another one has its id, or the syncer closed its session."""
        fatal = self._loop.fatal
        if fatal is None or isinstance(fatal, FencedError):
            return fatal
        failed = FencedError(str(fatal))
        failed.__cause__ = fatal
        return failed

    @property
    def lost_syncer(self) -> bool:
        """Whether nothing was heard from the syncer for a while; training goes on."""
        return self._loop.reports.lost_syncer

    @property
    def figures(self) -> Figures:
        """Running figures of this learner."""
        state = self._machine.state
        return Figures(
            merges=state.merges_seen,
            participation=state.merges_with_us / state.merges_seen if state.merges_seen else None,
            staleness_versions=self._loop.staleness_versions,
            stall_s=self._times.stall_s,
            inner_steps=self._inner_steps,
            tokens=self._tokens,
            bytes_up=self._loop.bytes_up,
            bytes_down=self._loop.bytes_down,
        )
