"""`DecoupledDiLoCoStrategy`: what Lightning sees of a learner, a supervisor, or both in one.

The strategy is a `DDPStrategy` because Lightning decides by isinstance who may have compiled models, injected samplers and a precision
plugin. It never makes a process group: a learner is one device and stands alone, so every collective is the identity. Three numbers
that other strategies have in common differ here on purpose: ``world_size`` is 1 (what a learner reduces over), ``global_rank`` is the
learner's id (who logs, how workers are seeded), and training data is sharded over all learners.

In the calling process of a supervised run nothing is trained: ``fit`` goes to the launcher, everything else runs here as on one device.

References:
    Decoupled DiLoCo, arXiv 2604.21428.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies.parallel import ParallelStrategy
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from lightning_utilities.core.rank_zero import rank_zero_only, rank_zero_warn
from torch import Tensor, nn
from typing_extensions import override

from lightning_diloco.config import SyncConfig
from lightning_diloco.runtime.figures import Figures
from lightning_diloco.runtime.sharded_client import AnyClient
from lightning_diloco.strategy import checks
from lightning_diloco.strategy.assignment import CHECKPOINT_DUMP, Assignment
from lightning_diloco.strategy.batch_options import BatchOptions, LrRule
from lightning_diloco.strategy.batching import BatchSizing
from lightning_diloco.strategy.island_environment import choose_environment
from lightning_diloco.strategy.loader_position import LoaderPosition
from lightning_diloco.strategy.oom_guard import OutOfMemoryGuard
from lightning_diloco.strategy.options import LaunchMode, ProcessOptions, Role, name_sync_fields, read_keys, refuse_what_is_not_there_yet
from lightning_diloco.strategy.outer_sync import OuterSync
from lightning_diloco.strategy.registration import serve_other_framework
from lightning_diloco.strategy.resume import CHECKPOINT_KEY
from lightning_diloco.strategy.shuffled_shares import share_shuffled
from lightning_diloco.strategy.streams import share_stream
from lightning_diloco.strategy.training_state import leave_training_state

__all__ = ["DecoupledDiLoCoStrategy"]

_log = logging.getLogger(__name__)


class DecoupledDiLoCoStrategy(OutOfMemoryGuard):
    """Decoupled DiLoCo as a Lightning strategy: ``Trainer(accelerator="cpu", devices=N, strategy="decoupled_diloco")`` trains N learners.

    Args:
        syncer: endpoint of a syncer that runs already: this process is then one learner of it. None: the Trainer brings its own.
        keys: with `syncer`: folder of this site's keys (`lightning-diloco keygen`); ``"insecure"``: none, beyond loopback too.
        devices_per_learner: 1; islands of several devices are not there yet.
        launch: ``supervised`` starts learners and syncer as processes; ``inline`` makes this process the only learner.
        learner_id: with `syncer`: the id of this learner (None: the syncer's choice).
        num_learners: with `syncer`: how many learners share the training data (None: this one reads all of it).
        batch_sizing: samples of a batch: ``auto``, by device name, by learner, or a function of both (`strategy.batch_options`; None: the
            DataLoader's).
        target_step_s: seconds of an inner step under ``auto`` (None: the median of the job's learners).
        tokens_per_step: tokens of an inner step, kept by gradient accumulation (None: whatever the batches have).
        inner_lr_rule: how the inner learning rate follows the samples of a step: ``none``, ``sqrt`` or ``linear``.
        data: ``shard``: each learner trains on its part. ``lease``: the syncer hands out samples, and fast learners take more.
        max_restarts: how often a learner that a signal has ended, or memory that ran out, is started again.
        hang_timeout_s: a learner that hangs for so many seconds is killed and started again; the syncer too, after 300 s at most (None:
            neither).
        run_dir: where the run's files go (None: ``outputs/DATE_TIME`` under the working directory).
        token_counter: tokens of a batch (None: see `lightning_diloco.strategy.counting`).
        accelerator: as for every strategy.
        parallel_devices: as for every strategy.
        cluster_environment: as for every strategy; with `syncer` None is a process that stands alone.
        checkpoint_io: as for every strategy.
        precision_plugin: as for every strategy.
        **sync: the fields of `lightning_diloco.SyncConfig`.

    Raises:
        ConfigurationError: an option is unknown, wrong, or not there yet; the sentence says which and what to do.
    """

    strategy_name = "decoupled_diloco"
    world_size = 1
    """What a learner reduces over: itself."""

    @name_sync_fields
    def __init__(
        self,
        *,
        syncer: str | None = None,
        keys: str | Path | None = None,
        devices_per_learner: int = 1,
        launch: LaunchMode = "supervised",
        learner_id: int | None = None,
        num_learners: int | None = None,
        batch_sizing: str | Mapping[Any, int] | Callable[[str, int], int] | None = None,
        target_step_s: float | None = None,
        tokens_per_step: int | None = None,
        inner_lr_rule: LrRule = "none",
        data: Literal["shard", "lease"] = "shard",
        max_restarts: int = 3,
        hang_timeout_s: float | None = 1800.0,
        run_dir: str | Path | None = None,
        token_counter: Callable[[Any], int] | None = None,
        accelerator: Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
        **sync: Any,
    ) -> None:
        super().__init__(
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=choose_environment(cluster_environment, syncer),
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
        )
        refuse_what_is_not_there_yet(devices_per_learner=devices_per_learner)
        self.sync = SyncConfig.from_options(sync)
        """What the learners of the job agree on."""
        folder, is_insecure = read_keys(keys)
        self.process_options = ProcessOptions(
            syncer=syncer,
            keys=folder,
            is_insecure=is_insecure,
            launch=launch,
            learner_id=learner_id,
            num_learners=num_learners,
            max_restarts=max_restarts,
            hang_timeout_s=hang_timeout_s,
            run_dir=None if run_dir is None else Path(run_dir),
            token_counter=token_counter,
            data=data,
        )
        """What this process was told about its part."""
        self.batch_options = BatchOptions(
            sizing=batch_sizing, target_step_s=target_step_s, tokens_per_step=tokens_per_step, lr_rule=inner_lr_rule
        )
        """How large the batches are to be."""
        self._reset()

    def _reset(self) -> None:
        self.assignment: Assignment | None = None
        """The place of this process in a running job; None in a supervisor."""
        self.summary: dict[str, Any] | None = None
        """The content of ``summary.json`` of the last fit; None before it and in learners."""
        self.is_saving_blocked = False
        """Checkpoints are not written: this process holds untrained weights because its learners train, or have failed."""
        self.final_state: dict[str, Any] | None = None
        """Inline: the training state at the end of the fit, for the last checkpoint; None otherwise."""
        self._joined_id = 0
        self._outer_sync: OuterSync | None = None
        self.batching = None
        self._trainer: pl.Trainer | None = None
        self._wants_sampler: bool | None = None

    # -- who this process is -------------------------------------------------------------------------------------------------------

    @property
    def role(self) -> Role:
        """What this process does in a fit."""
        return "supervisor" if self.assignment is None else self.assignment.role

    @property
    def learner_id(self) -> int:
        """The id of this process's learner; 0 in a supervisor."""
        return 0 if self.assignment is None else self.assignment.learner_id

    @property
    def is_learner_zero(self) -> bool:
        """Whether this learner's decision to stop ends the job for all."""
        return self._joined_id == 0

    @property
    def figures(self) -> Figures | None:
        """What the learner of this process has exchanged so far; None outside of a fit."""
        return None if self._outer_sync is None else self._outer_sync.figures

    @property
    def client(self) -> AnyClient | None:
        """The client of this process's learner; None unless it has joined a job."""
        return None if self._outer_sync is None else self._outer_sync.client

    @property
    @override
    def global_rank(self) -> int:
        return self.learner_id

    @property
    @override
    def local_rank(self) -> int:
        return 0

    @property
    @override
    def root_device(self) -> torch.device:
        # The learners of one machine have a device each; by hand there is one.
        devices = self.parallel_devices or [torch.device("cpu")]
        return devices[self.learner_id if self.role == "learner" else 0]

    @property
    @override
    def node_rank(self) -> int:
        return self.learner_id

    @property
    @override
    def is_global_zero(self) -> bool:
        return self.learner_id == 0

    @override
    def set_world_ranks(self) -> None:
        # One function object under every name that Lightning gives it; its attribute is how the rank is passed around.
        vars(rank_zero_only)["rank"] = self.global_rank

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        # Only training data is shared out: every learner validates on the whole set, or its metrics would compare with nothing.
        if self.assignment is not None and self._trainer is not None and self._trainer.state.stage == RunningStage.TRAINING:
            return {"num_replicas": self.assignment.num_learners, "rank": self.assignment.learner_id}
        return {"num_replicas": 1, "rank": 0}

    # -- life of a Trainer ---------------------------------------------------------------------------------------------------------

    @override
    def _configure_launcher(self) -> None:
        num_devices = len(self.parallel_devices or [])
        checks.check_host(self.accelerator, self.num_nodes)
        if self.process_options.syncer is not None:
            from lightning_diloco.strategy.island_launcher import IslandLauncher

            checks.check_island(num_devices)
            self._launcher = IslandLauncher(self)
            self.take(Assignment.of_island(self.process_options))
            return
        checks.check_local(self.sync, self.process_options.launch, num_devices, self.cluster_environment)
        if self.process_options.launch == "inline":
            from lightning_diloco.strategy.inline import InlineLauncher
            from lightning_diloco.strategy.one_device import count_inline_as_one_device

            count_inline_as_one_device()
            self._launcher = InlineLauncher(self)
        else:
            from lightning_diloco.strategy.launcher import SupervisorLauncher

            self._launcher = SupervisorLauncher(self)

    def take(self, assignment: Assignment | None) -> None:
        """Become the learner that `assignment` describes, or a supervisor again (None)."""
        self.assignment = assignment
        self._joined_id = self.learner_id
        self.set_world_ranks()

    def on_joined(self, learner_id: int) -> None:
        """Note which learner the syncer made of this process; an island's ranks stay what they were, its files have begun."""
        self._joined_id = learner_id

    @override
    def connect(self, model: pl.LightningModule) -> None:
        super().connect(model)
        self._trainer = trainer = model._trainer
        if trainer is None:
            return
        connector = trainer._accelerator_connector
        if self._wants_sampler is None:
            self._wants_sampler = bool(connector.use_distributed_sampler)
        is_fit = trainer.state.fn == TrainerFn.FITTING
        num_learners = 1 if self.assignment is None else self.assignment.num_learners
        # With one learner the user's loader object stays as it is.
        is_leased, is_learner = self.process_options.data == "lease", is_fit and self.assignment is not None
        connector.use_distributed_sampler = self._wants_sampler and is_fit and num_learners > 1 and not is_leased
        self._outer_sync = OuterSync.attach(trainer, self) if is_learner else None
        self.batching = BatchSizing.attach(trainer, self, self.batch_options) if is_learner and self.batch_options.is_active else None
        if self._outer_sync is not None and not is_leased:
            LoaderPosition.attach(trainer, self._outer_sync, every_steps=self.sync.rejoin_every_steps)

    @override
    def setup_distributed(self) -> None:
        if self.assignment is not None and self.assignment.num_learners > 1:
            reset_seed()
        self.set_world_ranks()

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        if self._layer_sync is not None:
            rank_zero_warn("sync_batchnorm=True has no effect: a learner of one device has nobody to share batch statistics with.")
        # Not DDP's: it wraps the model and needs a process group even for validation.
        super(ParallelStrategy, self).setup(trainer)
        if self._outer_sync is not None:
            self._outer_sync.watch(self.optimizers)

    @override
    def _setup_model(self, model: nn.Module) -> nn.Module:  # type: ignore[override]
        return model

    @override
    def process_dataloader(self, dataloader: object) -> object:
        share = self.distributed_sampler_kwargs["rank"], self.distributed_sampler_kwargs["num_replicas"]
        if self._outer_sync is not None and self._outer_sync.feed is not None:
            dataloader = self._outer_sync.feed.take(dataloader)
        elif self._wants_sampler:
            dataloader = share_shuffled(share_stream(dataloader, *share), *share)
        if self.batching is not None and self._trainer is not None and self._trainer.state.stage == RunningStage.TRAINING:
            dataloader = self.batching.make_live(dataloader)
        return super().process_dataloader(dataloader)

    @override
    def on_validation_end(self) -> None:
        if self._outer_sync is not None:
            self._outer_sync.end_validation()

    @override
    def on_train_end(self) -> None:
        if self.assignment is not None and self.assignment.launch_dir is not None and self.is_global_zero:
            leave_training_state(self, self.assignment.launch_dir / CHECKPOINT_DUMP, self.assignment.spare_dir)

    @override
    def on_exception(self, exception: BaseException) -> None:
        """Nothing of DDP's, which explains its own errors: the callback has put the weights back, and `teardown` closes the client."""
        super(ParallelStrategy, self).on_exception(exception)

    @override
    def teardown(self) -> None:
        if self._outer_sync is not None:
            self._outer_sync.close()
            self._outer_sync.detach()
            LoaderPosition.detach(self._trainer)
        if self.batching is not None:
            self.batching.detach()
        super().teardown()

    # -- checkpoints ---------------------------------------------------------------------------------------------------------------

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The global model, as this learner last saw it; during a fit as copies, because the weights are swapped back before writing."""
        if self._outer_sync is None:
            return super().lightning_module_state_dict()
        with self._outer_sync.global_weights():
            state = super().lightning_module_state_dict()
            for name, value in state.items():
                if isinstance(value, Tensor):
                    state[name] = value.detach().clone()
        return state

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        if self.is_saving_blocked:
            _log.warning("%s is not written: the weights of this process are not those that its learners train", filepath)
            return
        sync = self._outer_sync
        is_whole = sync is not None and self.is_global_zero and "optimizer_states" in checkpoint
        # A copy: what hooks of the user's were given stays as it was.
        ours = sync.outer_state() if sync is not None and is_whole else {}
        super().save_checkpoint({**checkpoint, **ours}, filepath, storage_options=storage_options)
        if sync is not None:
            sync.on_written(checkpoint)

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        checkpoint: dict[str, Any] = super().load_checkpoint(checkpoint_path, weights_only)
        if self._outer_sync is not None:
            self._outer_sync.resume_from(checkpoint)
        checkpoint.pop(CHECKPOINT_KEY, None)
        return checkpoint

    @override
    def remove_checkpoint(self, filepath: Any) -> None:
        if not self.is_saving_blocked:
            super().remove_checkpoint(filepath)

    @override
    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        # An assignment is one process's own; a callback with a live client cannot travel.
        state.update(assignment=None, _outer_sync=None, batching=None, summary=None, is_saving_blocked=False)
        return state


serve_other_framework(DecoupledDiLoCoStrategy)
