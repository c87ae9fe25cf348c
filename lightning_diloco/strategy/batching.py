"""`BatchSizing`: how large the batches of one learner are, from the join to the end.

| when | what |
|---|---|
| a training loader is made | it gets a sampler whose size can change (`live_batches`); a size that is known holds from its first batch |
| the join | the ceiling is found (`memory_probe`), tokens per sample are counted, the first choice is made |
| an inner step has ended | its time is noted; if another size would meet the target better, it holds from the next batch that is drawn |
| memory is full | its window of accumulation is given back, and half of its size holds (`oom_guard`) |
| a choice | Lightning's lengths (`loop_lengths`), the inner learning rate (`inner_rate`), a log line, the tape, the summary |

The user's `accumulate_grad_batches` is left alone but for `tokens_per_step`. There, micro-batches per inner step change only where the
count of batches in this epoch is a multiple of the new number: Lightning counts a window
of accumulation from there, and another window would be scaled wrongly.

With `tokens_per_step` the tokens of a step are fixed and its time follows from the device: the size is then the largest that is allowed and
divides the samples of a step; where only less than half of that divides them, the nearest number of samples is taken, and said. Otherwise,
under ``auto``, the time is fixed and the tokens follow.

All of this runs on the training thread, between two steps: a few additions, and a sort of at most 32 numbers.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, GradientAccumulationScheduler
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch.optim import LBFGS

from lightning_diloco.errors import ConfigurationError
from lightning_diloco.strategy.batch_options import BatchOptions, lr_factor
from lightning_diloco.strategy.counting import count_tokens
from lightning_diloco.strategy.inner_rate import InnerRate
from lightning_diloco.strategy.lease_loader import CountedBatches
from lightning_diloco.strategy.live_batches import LiveBatchSampler, LiveSize, make_live
from lightning_diloco.strategy.loop_lengths import is_epoch_over, refresh_lengths, will_iterate_again
from lightning_diloco.strategy.memory_probe import MAX_SIZE, largest_that_fits, make_batch, probe_step
from lightning_diloco.strategy.outer_sync import OuterSync
from lightning_diloco.strategy.size_search import SizeSearch

if TYPE_CHECKING:
    from lightning_diloco.strategy.strategy import DecoupledDiLoCoStrategy

__all__ = ["BatchSizing", "device_name"]

_log = logging.getLogger(__name__)


class BatchSizing(Callback):
    """Chooses and changes the batch of one learner; the strategy attaches it to a fit behind `OuterSync`.

    Args:
        strategy: of the Trainer that this callback is attached to.
        options: what the user asked for.
    """

    def __init__(self, strategy: DecoupledDiLoCoStrategy, options: BatchOptions) -> None:
        self._strategy, self._options = strategy, options
        self._size = LiveSize()
        self._rate = InnerRate()
        self._search: SizeSearch | None = None
        self._is_set_up = False
        self._samples_per_step = 0
        self._accumulate = 0
        self._users_accumulate: int | None = None
        self._begun = 0
        self._window: list[list[list[Any]]] = []
        self._steps = 0
        self._ended_s: float | None = None
        self.has_failed = False
        """The present batch did not fit into memory; no step of it counts."""

    @classmethod
    def attach(cls, trainer: pl.Trainer, strategy: DecoupledDiLoCoStrategy, options: BatchOptions) -> BatchSizing:
        """Put a fresh one behind the Trainer's `OuterSync`, which comes before all callbacks of the user's."""
        callback = cls(strategy, options)
        callback._remove_from(trainer)
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        callbacks.insert(1 + next(i for i, other in enumerate(callbacks) if isinstance(other, OuterSync)), callback)
        return callback

    def detach(self) -> None:
        """Leave the Trainer's callbacks and optimizers as they were; idempotent."""
        self._rate.detach()
        trainer, own = self._strategy._trainer, self._users_accumulate
        if trainer is not None:
            self._remove_from(trainer)
            trainer.accumulate_grad_batches = trainer.accumulate_grad_batches if own is None else own

    def make_live(self, loader: Any) -> Any:
        """A training loader that follows the present size.

        Raises:
            ConfigurationError: it cannot.
        """
        live = make_live(loader, self._size)
        assignment = self._strategy.assignment
        if assignment is not None and not self._is_set_up:
            known_id = assignment.learner_id if assignment.is_id_given else None
            given = self._options.size_for(device_name(self._strategy.root_device), known_id)
            self._size.size = given or self._size.size
        return live

    # ---- hooks --------------------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Make the first choice."""
        if not self._size.reference:
            return
        self._check(trainer)
        self._rate.attach(trainer.optimizers)
        given = self._options.size_for(device_name(self._strategy.root_device), self._strategy._joined_id)
        size = given or self._size.size
        if self._options.is_auto:
            self._search = SizeSearch(size=size, ceiling=self._ceiling(trainer))
            size = self._search.size
        if self._options.tokens_per_step is not None:
            self._users_accumulate = trainer.accumulate_grad_batches
            size = self._plan(trainer, size)
        self._is_set_up = True
        self.choose(trainer, size, "at the beginning")
        self._ended_s = None

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The lengths of an epoch of the present size; an epoch is also where the number of micro-batches may change."""
        self._ended_s, self._begun = None, 0
        self._window.clear()
        if not self._is_set_up:
            return
        if self._samples_per_step:
            trainer.accumulate_grad_batches = self._accumulate
        if will_iterate_again(trainer):
            for sampler in self._samplers(trainer):
                sampler.rewind()
        self._refresh(trainer)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Note which samples this is, and the rate that goes with them."""
        # A window of accumulation that has lost its beginning is lost as a whole, and comes again.
        self.has_failed = self.has_failed and batch_idx % trainer.accumulate_grad_batches != 0
        samplers = self._samplers(trainer)
        self._begun += 1
        self._window.append([sampler.trained() for sampler in samplers])
        if samplers and self._is_set_up:
            samples = samplers[0].nominal * (trainer.accumulate_grad_batches if self._samples_per_step else 1)
            self._rate.factor = lr_factor(self._options.lr_rule, max(1, samples), self._size.reference)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """If an inner step has ended, note its time and look whether another size is better."""
        if self.has_failed:
            self._give_back(trainer)
            return
        figures = self._strategy.figures
        if figures is None or figures.inner_steps == self._steps:
            return
        self._steps = figures.inner_steps
        now_s = time.monotonic()
        sizes = {len(samples[0]) for samples in self._window if samples}
        if self._search is not None and self._ended_s is not None and len(sizes) == 1:
            self._search.observe(sizes.pop(), now_s - self._ended_s)
        self._window.clear()
        self._ended_s = now_s
        self._follow_time(trainer)
        if self._samples_per_step and trainer.fit_loop.epoch_loop.batch_progress.current.ready % self._accumulate == 0:
            trainer.accumulate_grad_batches = self._accumulate

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A validation is no part of a step."""
        self._ended_s = None

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Nor is a checkpoint."""
        self._ended_s = None

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """A step that was cut short gets its own rate back."""
        self._rate.detach()

    # ---- memory (called by the strategy, inside a pass) -----------------------------------------------------------------------

    @property
    def is_guarding(self) -> bool:
        """Whether an error of memory costs a batch instead of the run."""
        trainer = self._strategy._trainer
        if self._search is None or trainer is None or not trainer.training or not trainer.lightning_module.automatic_optimization:
            return False
        # It asks its closure for a loss.
        return not any(isinstance(optimizer, LBFGS) for optimizer in trainer.optimizers)

    @property
    def may_shrink(self) -> bool:
        """Whether the present batch has more than one sample."""
        return self._present() > 1

    def on_out_of_memory(self) -> None:
        """The present batch does not fit; smaller ones hold from the next that is drawn."""
        if self.has_failed:
            return
        assert self._search is not None and self._strategy._trainer is not None
        self.has_failed = True
        failed, size = self._present(), self._search.failed(self._present())
        trainer = self._strategy._trainer
        if self._samples_per_step:
            size = self._split(size)
        _log.warning("A batch of %d did not fit into memory: batches of %d from here on.", failed, size)
        self.choose(trainer, size, f"a batch of {failed} did not fit into memory")

    def _present(self) -> int:
        """Samples of the batch that is trained now: of the first loader."""
        return len(self._window[-1][0]) if self._window and self._window[-1] else 0

    def _give_back(self, trainer: pl.Trainer) -> None:
        window, self._window = self._window, []
        self._ended_s = None
        lost = 0
        for number, sampler in enumerate(self._samplers(trainer)):
            samples = [index for batch in window for index in batch[number]]
            if not sampler.give_back(samples) and number == 0:
                lost = len(samples)
        if lost:
            _log.warning("%d samples that did not fit into memory are not trained in this epoch: nothing of it is drawn any more.", lost)
        self._refresh(trainer)

    # ---- choices ------------------------------------------------------------------------------------------------------------

    def _follow_time(self, trainer: pl.Trainer) -> None:
        search, client = self._search, self._strategy.client
        if search is None or client is None or self._samples_per_step:
            return
        target_s = self._options.target_step_s or client.target_step_s
        if not target_s:
            return
        before, size = search.size, search.decide(target_s)
        if size != before:
            self.choose(trainer, size, f"to meet steps of {1e3 * target_s:.4g} ms")

    def choose(self, trainer: pl.Trainer, size: int, reason: str) -> None:
        """Draw batches of another size from the next one on, and let everybody know."""
        self._size.size = size
        planned = self._accumulate if self._samples_per_step else trainer.accumulate_grad_batches
        if self._samples_per_step and trainer.fit_loop.epoch_loop.batch_progress.current.ready == 0:
            trainer.accumulate_grad_batches = planned
        factor = lr_factor(self._options.lr_rule, size * (planned if self._samples_per_step else 1), self._size.reference)
        self._refresh(trainer)
        _log.info("batches of %d, %d to a step, learning rate x %.4g: %s", size, planned, factor, reason)
        if self._strategy.client is not None:
            self._strategy.client.batch_chosen(batch_size=size, accumulate=planned, lr_factor=factor, reason=reason)

    def _plan(self, trainer: pl.Trainer, size: int) -> int:
        """Fix the samples of a step by its tokens; returns the size of a micro-batch."""
        assert self._options.tokens_per_step is not None
        loader, module = self._loaders(trainer)[0], trainer.lightning_module
        batch = make_batch(loader, self._size.reference)
        if batch is None:
            raise ConfigurationError(
                f"tokens_per_step={self._options.tokens_per_step} with a stream: how many tokens a sample has is not known before one is "
                "read. Set accumulate_grad_batches of the Trainer instead."
            )
        tokens = count_tokens(batch, module, self._strategy.process_options.token_counter) / self._size.reference
        self._samples_per_step = max(1, round(self._options.tokens_per_step / max(tokens, 1e-9)))
        return self._split(size if self._search is None else self._search.ceiling)

    def _split(self, limit: int) -> int:
        """The samples of a step in equal micro-batches of at most `limit`; returns their size."""
        wanted = self._samples_per_step
        size = max(d for d in range(1, min(limit, wanted) + 1) if wanted % d == 0)
        if 2 * size < min(limit, wanted):
            size = max(1, round(wanted / -(-wanted // limit)))
        self._accumulate = max(1, round(wanted / size))
        if size * self._accumulate != wanted:
            _log.warning(
                "A step has %d samples in the place of %d, which tokens_per_step=%s asks for: batches of at most %d do not divide them.",
                size * self._accumulate,
                wanted,
                self._options.tokens_per_step,
                limit,
            )
        if self._search is not None:
            self._search.size = size
        return size

    def _ceiling(self, trainer: pl.Trainer) -> int:
        """Most samples of a micro-batch of the first loader."""
        reference = self._size.reference
        if self._strategy.root_device.type == "cpu":
            return self._options.cpu_ceiling(reference)
        loaders, module = self._loaders(trainer), trainer.lightning_module
        if len(loaders) > 1 or not module.automatic_optimization or make_batch(loaders[0], 1) is None:
            _log.info("the memory is not probed: that needs one loader of a map-style data set, and automatic optimization")
            return MAX_SIZE
        ceiling = largest_that_fits(lambda size: probe_step(trainer, make_batch(loaders[0], size)), reference)
        _log.info("batches of up to %d fit into memory", ceiling)
        return ceiling

    def _check(self, trainer: pl.Trainer) -> None:
        if is_param_in_hook_signature(trainer.lightning_module.training_step, "dataloader_iter", explicit=True):
            raise ConfigurationError(
                "batch_sizing= or tokens_per_step= with training_step(dataloader_iter): nobody can tell which batch such a step trains. "
                "Take the batch as an argument, or leave out the option."
            )
        if self._options.tokens_per_step is None:
            return
        name = f"tokens_per_step={self._options.tokens_per_step}"
        if not trainer.lightning_module.automatic_optimization:
            raise ConfigurationError(f"{name} with manual optimization: the module decides when it steps. Leave it out.")
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if trainer.accumulate_grad_batches != 1 or any(isinstance(c, GradientAccumulationScheduler) for c in callbacks):
            raise ConfigurationError(
                f"{name} with accumulate_grad_batches: both say how many batches make a step. Leave out one of the two."
            )

    def _refresh(self, trainer: pl.Trainer) -> None:
        # Of leased samples nobody knows how many come, whatever their batches are; and an epoch that is over has the length that it had.
        is_leased = any(isinstance(loader.batch_sampler, CountedBatches) for loader in self._loaders(trainer))
        if not is_leased and not (self._begun and is_epoch_over(trainer)):
            refresh_lengths(trainer, self._begun)

    def _samplers(self, trainer: pl.Trainer) -> list[LiveBatchSampler]:
        found: list[Any] = [loader.batch_sampler for loader in self._loaders(trainer)]
        return [sampler.batches if isinstance(sampler, CountedBatches) else sampler for sampler in found]

    def _loaders(self, trainer: pl.Trainer) -> list[Any]:
        combined = trainer.fit_loop._combined_loader
        return [] if combined is None else list(combined.flattened)

    @staticmethod
    def _remove_from(trainer: pl.Trainer) -> None:
        trainer.callbacks[:] = [c for c in trainer.callbacks if not isinstance(c, BatchSizing)]  # type: ignore[attr-defined]


def device_name(device: torch.device) -> str:
    """What `batch_sizing` calls a device: the model of a GPU, otherwise the kind (``cpu``)."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
