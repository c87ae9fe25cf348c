"""`OuterSync`: where Lightning's hooks meet the learner client.

One **inner step** is a batch in which at least one optimizer was really stepped. torch's step hook sees every kind of optimization
(automatic, accumulated, manual with or without Lightning's wrapper, LBFGS, a GradScaler that skips), and the boundary itself waits for
``on_train_batch_end``: parameters must not change between two optimizers of one manual step, nor before the scaler's update.

| hook | what happens |
|---|---|
| ``on_fit_start`` | every learner but the first gets its own random stream |
| ``on_train_start`` | the client is made and joins: parameters become the global ones, counters and schedules the job's |
| ``on_train_batch_start`` | tokens of the batch are counted, accumulated micro-batches included |
| ``on_train_batch_end`` | the boundary, if an optimizer was stepped; then the job's stop is obeyed |
| ``on_validation_start`` | pause, global weights in (the callback is first in the list) |
| `end_validation` | global weights out, go on (called by the strategy, whose hook comes after every callback's) |
| ``on_train_end`` | leave with final contributions, then hold the global weights; what later callbacks put there is kept |
| ``on_exception`` | weights out; after SIGTERM leave in order, otherwise close |

To checkpoints the strategy adds what the next job goes on from, under a key that Lightning does not know (`strategy.resume`): they load
without this package, and no hook of the user's sees it.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import BaseFinetuning, Callback
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.optim import Optimizer

from lightning_diloco.runtime.client import ClientOptions, JoinInfo
from lightning_diloco.runtime.figures import Figures
from lightning_diloco.runtime.global_state import GlobalState
from lightning_diloco.runtime.sharded_client import AnyClient, join_job
from lightning_diloco.strategy.advice import advise_before, advise_late, tell_fragments, warn
from lightning_diloco.strategy.assignment import Assignment
from lightning_diloco.strategy.checks import check_callbacks
from lightning_diloco.strategy.counting import count_tokens
from lightning_diloco.strategy.healing import reset_nonfinite_moments
from lightning_diloco.strategy.job_clock import JobClock
from lightning_diloco.strategy.joining import join_when_free, patience_s
from lightning_diloco.strategy.lease_feed import LeaseFeed
from lightning_diloco.strategy.live_batches import present_batch_size
from lightning_diloco.strategy.own_weights import OWN_WEIGHTS, all_close, checksums
from lightning_diloco.strategy.rejoin import InnerStateSaver, keep_inner_state
from lightning_diloco.strategy.resume import CHECKPOINT_KEY, Resumed, outer_state, read_resumed
from lightning_diloco.strategy.seeding import reseed_learner
from lightning_diloco.strategy.showing import Showing
from lightning_diloco.strategy.step_watch import StepWatch
from lightning_diloco.strategy.training_state import refreshed
from lightning_diloco.strategy.unfrozen import check_unfrozen

if TYPE_CHECKING:
    from lightning_diloco.strategy.strategy import DecoupledDiLoCoStrategy

__all__ = ["OuterSync"]

_log = logging.getLogger(__name__)


class OuterSync(Callback):
    """Joins, counts, exchanges and leaves on behalf of one learner; the strategy attaches it to a fit.

    Args:
        strategy: the strategy of the Trainer that this callback is attached to.
    """

    def __init__(self, strategy: DecoupledDiLoCoStrategy) -> None:
        self._strategy = strategy
        self._client: AnyClient | None = None
        self._watch = StepWatch()
        self.clock: JobClock | None = None
        self.info: JoinInfo | None = None
        """What the syncer said at the join."""
        self._tokens = self._depth = 0
        self._has_left = self._has_asked = self._is_validating = False
        self.is_done = False
        """Whether it has left and will not come back."""
        self.told_s: float | None = None  # when SIGTERM came, on the monotonic clock
        self._showing: Showing | None = None
        self._saver: InnerStateSaver | None = None
        self._resumed = Resumed()
        self._saved: GlobalState | None = None
        self._left_sums: tuple[int, ...] = ()
        self.feed: LeaseFeed | None = None
        """Feeds the training loader, where samples are leased."""
        self.figures: Figures | None = None
        """The client's figures at the last boundary; None before the first one."""
        self._written: dict[str, Any] | None = None
        self.validated: dict[str, float | None] | None = None
        """Metrics of the validation since the last inner step, if they are those of the final global model too; see `is_identity`."""

    @classmethod
    def attach(cls, trainer: pl.Trainer, strategy: DecoupledDiLoCoStrategy) -> OuterSync:
        """Put a fresh one at the front of the Trainer's callbacks, in place of one of an earlier fit."""
        callback = cls(strategy)
        _remove_from(trainer)
        trainer.callbacks.insert(0, callback)  # type: ignore[attr-defined]
        if strategy.process_options.data == "lease" and strategy.assignment is not None:
            callback.feed = LeaseFeed(trainer, strategy.assignment)
            trainer.callbacks.insert(0, callback.feed)  # type: ignore[attr-defined]
        return callback

    def detach(self) -> None:
        """Leave the Trainer's callbacks: after a fit they are the user's."""
        if self._strategy._trainer is not None:
            _remove_from(self._strategy._trainer)

    @property
    def client(self) -> AnyClient | None:
        """This learner's client; None before the join and after the end."""
        return self._client

    @property
    def is_joined(self) -> bool:
        """Whether this learner is a member of its job: joined, not left."""
        return self._client is not None and not self._has_left

    @property
    def has_left(self) -> bool:
        """Whether it was a member and has delivered what it had."""
        return self._has_left

    @property
    def is_identity(self) -> bool:
        """Whether merging is the identity, up to the last bit: nobody to merge with, and an outer step that goes where the learner is.

        What a merge at this moment would publish is then known without one: it is in the module.
        """
        assignment, sync = self._strategy.assignment, self._strategy.sync
        is_alone = assignment is not None and assignment.role != "island" and assignment.num_learners == 1
        return is_alone and (sync.outer_lr, sync.outer_momentum, sync.wire_dtype) == (1.0, 0.0, "fp32")

    @property
    def is_validating(self) -> bool:
        """Whether the module holds the global weights for a validation, so that an exception may strike at any moment."""
        return self._is_validating

    def watch(self, optimizers: list[Optimizer]) -> None:
        """See the steps of these optimizers from now on."""
        self._watch.attach(optimizers)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give learners of one job different random streams."""
        assignment = self._strategy.assignment
        if assignment is not None and assignment.role in ("learner", "island"):
            check_callbacks(trainer)
        if assignment is not None and assignment.num_learners > 1:
            reseed_learner(assignment.learner_id, assignment.life)
        if assignment is not None and assignment.role != "learner":
            warn(advise_before(self._strategy.sync, trainer.max_steps))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Join; on return the module holds the global parameters."""
        assignment = self._strategy.assignment
        if assignment is None:
            return
        if any(isinstance(callback, BaseFinetuning) for callback in trainer.callbacks):  # type: ignore[attr-defined]
            # It will unfreeze what is frozen now.
            self._strategy.sync = dataclasses.replace(self._strategy.sync, include_frozen=True)
        is_restarted_by_others = assignment.role == "island" and assignment.is_id_given
        client, info = join_when_free(
            lambda: join_job(pl_module, self._client_options(trainer, assignment), context=assignment.context),
            patience_s(self._strategy.sync.heartbeat_s) if is_restarted_by_others else 0.0,
        )
        self._client, self.info = client, info
        if assignment.life == 0 and (assignment.role != "learner" or info.learner_id == 0):
            tell_fragments(self._strategy.sync, client.layout)
            warn(advise_late(self._strategy.sync, trainer))
        client.on_heal = lambda parameters: reset_nonfinite_moments(trainer.optimizers, parameters)
        _log.info("learner %d joined as %s, incarnation %d, job step %d", info.learner_id, info.role, info.incarnation, info.job_step)
        if info.role == "member":
            client.weights.set_local(self._resumed.local)
        self._resumed = Resumed()
        if assignment.role != "inline":
            self._saver = keep_inner_state(client, trainer.optimizers, assignment.rejoin_path(), info, self._strategy.sync)
        self._strategy.on_joined(info.learner_id)
        self._showing = Showing(trainer, is_logged=not self.is_identity)
        self.clock = JobClock(trainer)
        if self._strategy.sync.lr_clock == "job":
            self.clock.advance(info.job_step)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Count the batch; at the beginning of an epoch, look whether something was unfrozen that nobody would merge."""
        if batch_idx == 0:
            check_unfrozen(self._client if self.is_joined else None)
        if self.clock is not None:
            self.clock.on_first_batch()
        self._watch.on_batch_start(trainer.scaler)
        self._tokens += count_tokens(batch, pl_module, self._strategy.process_options.token_counter)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Pass the boundary if an optimizer was stepped, then obey what the job has decided."""
        has_stepped, batching = self._watch.has_stepped(trainer.scaler), self._strategy.batching
        if batching is not None and batching.has_failed:
            self._tokens = 0
        elif self.is_joined and has_stepped:
            self._boundary(trainer)

    def _boundary(self, trainer: pl.Trainer) -> None:
        assert self._client is not None
        self.validated = self._written = None
        self._client.boundary(tokens=self._tokens)
        self._tokens = 0
        self._obey(trainer)
        self.figures = self._client.figures
        if self._showing is not None:
            self._showing.update(self.figures)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Validate the global model; not in the sanity check, which comes before the join."""
        if trainer.sanity_checking or not self.is_joined:
            return
        assert self._client is not None
        self._client.set_paused(True)
        self._is_validating = True
        if not self.is_identity:
            self._swap_in()

    def end_validation(self) -> None:
        """Go on with the local weights; called after every other hook of the validation's end."""
        if self._is_validating:
            self._is_validating = False
            if self._depth:
                self._swap_out()
            self._keep_metrics()
            if self.is_joined:
                assert self._client is not None
                self._client.set_paused(False)

    @contextmanager
    def global_weights(self) -> Iterator[None]:
        """The module holds the last published weights inside; nests with a validation."""
        if not self.is_joined or self.is_identity:
            yield
            return
        self._swap_in()
        assert self._client is not None
        self._saved = self._client.weights.global_state()
        try:
            yield
        finally:
            self._swap_out()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look once more for what nobody would merge, and pass on a stop that was decided outside of a batch."""
        check_unfrozen(self._client if self.is_joined else None)
        self._pass_on_stop(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave, then hold the global model for the hooks and checkpoints that follow."""
        if not self.is_joined:
            return
        assert self._client is not None
        self._pass_on_stop(trainer)
        # Who ends because there is no syncer says nothing of the job: should it hear from one after all, that job goes on.
        self._leave("signal" if self._client.is_offline else "stopped" if trainer.should_stop else "limit")
        local = {} if self.validated is None else self._client.weights.local_tensors()
        self._saved = self._client.weights.load_global()
        if local and not all_close(local, self._client.weights.local_tensors()):
            # The last contribution was not merged as it was: what was validated is not the final model.
            self.validated = None
        assignment = self._strategy.assignment
        if self._strategy.is_global_zero and assignment is not None and assignment.launch_dir is not None:
            self._left_sums = checksums(pl_module, self._client.layout)

    def has_own_weights(self, pl_module: pl.LightningModule) -> bool:
        """Whether a callback has put other weights into the module since this one's `on_train_end`, and left its parts as they were."""
        if self._client is None or not self._left_sums:
            return False
        now = checksums(pl_module, self._client.layout)
        return bool(now) and now != self._left_sums

    def outer_state(self) -> dict[str, Any]:
        """What the next job goes on from, for a checkpoint whose ``state_dict`` was taken just now; empty before the join."""
        if self._client is None:
            return {}
        state = self._client.weights.global_state() if self._saved is None else self._saved
        is_alone = self._strategy.assignment is not None and self._strategy.assignment.num_learners == 1
        local = self._client.weights.local_tensors() if is_alone and self.is_joined else {}
        return {CHECKPOINT_KEY: outer_state(self._client.layout, state, local)}

    def resume_from(self, checkpoint: dict[str, Any]) -> None:
        """Keep what the job is to begin with, should this learner found it."""
        self._resumed = read_resumed(checkpoint)

    def on_written(self, checkpoint: dict[str, Any]) -> None:
        """A checkpoint has been written: its copies of the global model may go."""
        if not self._has_left:
            self._saved = None
        if self.is_identity and "optimizer_states" in checkpoint:
            self._written = {name: value for name, value in checkpoint.items() if name != "state_dict"}

    def training_state(self, trainer: pl.Trainer) -> dict[str, Any]:
        """What ``last.ckpt`` is made of, at the end of the fit; with a mark if a callback has put weights of its own into the module.

        Where merging is the identity and a checkpoint was written after the last step, no hook of the user's is called a second time.
        """
        module = trainer.lightning_module
        is_own = self.has_own_weights(module)
        if self._written is None or is_own:
            state = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        else:
            state = refreshed(trainer, self._written)
        return {**state, **self.outer_state(), OWN_WEIGHTS: is_own}

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Put the local weights back; leave in order if it was a signal. Never raises: the exception on its way is the news."""
        self._is_validating = False
        try:
            while self._depth:
                self._swap_out()
            if self.is_joined and isinstance(exception, (SIGTERMException, KeyboardInterrupt)):
                self._leave("signal")
        except Exception:
            _log.exception("leaving after %s failed", type(exception).__name__)

    def close(self) -> None:
        """Close the client and take the hooks off the optimizers; idempotent."""
        self._watch.detach()
        if self._showing is not None:
            self._showing.close()
            self._showing = None
        if self._saver is not None:
            self._saver.close(is_done=False)
            self._saver = None
        if self._client is not None:
            self.figures = self._client.figures
            self._client.close()
            self._client = None

    def _client_options(self, trainer: pl.Trainer, assignment: Assignment) -> ClientOptions:
        return ClientOptions(
            endpoint=assignment.endpoint,
            keys=assignment.site_keys(),
            config=self._strategy.sync,
            learner_id=assignment.learner_id if assignment.is_id_given else None,
            token=assignment.token,
            takeover_token=assignment.takeover_token,
            life=assignment.life,
            device=str(self._strategy.root_device),
            batch_size=present_batch_size(trainer),
            counters_path=assignment.counters_path(),
            join_timeout_s=assignment.join_timeout_s,
            founding=self._resumed.founding,
            keeps_momentum=self._strategy.is_global_zero,
            leases=self.feed.leases if self.feed is not None else None,
        )

    def _keep_metrics(self) -> None:
        trainer = self._strategy._trainer
        # With several loaders Lightning has those of the last one only at this point.
        if self.is_identity and trainer is not None and trainer._results is not None and len(trainer.num_val_batches) == 1:
            self.validated = {name: float(value) for name, value in trainer._results.metrics(on_step=False)["log"].items()}

    def _swap_in(self) -> None:
        assert self._client is not None
        self._client.weights.swap_in_global()
        self._depth += 1

    def _swap_out(self) -> None:
        assert self._client is not None
        self._depth -= 1
        self._client.weights.swap_out_global()

    def _leave(self, reason: Literal["limit", "signal", "stopped"]) -> None:
        assert self._client is not None
        self._client.leave(reason, self.told_s)
        self.figures = self._client.figures
        # Who was sent away comes back; who has reached the end does not.
        self._has_left, self.is_done = True, reason != "signal"
        if self._saver is not None:
            self._saver.close(is_done=self.is_done)
            self._saver = None

    def _obey(self, trainer: pl.Trainer) -> None:
        assert self._client is not None
        if self._client.fenced is not None:
            raise self._client.fenced
        if self._client.stop_reason is not None and not trainer.should_stop:
            _log.info("the job ends: %s", self._client.stop_reason)
            trainer.should_stop = True
        self._pass_on_stop(trainer)

    def _pass_on_stop(self, trainer: pl.Trainer) -> None:
        """Learner 0's decision ends the job for all, once it is one: below min_steps or min_epochs Lightning goes on, and so do all."""
        if self._has_asked or not self.is_joined or not trainer.should_stop or not trainer.fit_loop._can_stop_early:
            return
        assert self._client is not None
        self._has_asked = True
        if self._strategy.is_learner_zero and self._client.stop_reason is None:
            self._client.request_stop("trainer.should_stop")


def _remove_from(trainer: pl.Trainer) -> None:
    trainer.callbacks[:] = [c for c in trainer.callbacks if not isinstance(c, OuterSync | LeaseFeed)]  # type: ignore[attr-defined]
