"""What has to be true of a Trainer and its machine before a job starts; each error says what to do."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.fabric.plugins import ClusterEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.accelerators import Accelerator, CPUAccelerator, CUDAAccelerator
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_diloco.config import SyncConfig
from lightning_diloco.errors import ConfigurationError, not_there_yet
from lightning_diloco.strategy.registration import wrong_framework

__all__ = ["check_callbacks", "check_host", "check_island", "check_local", "check_trainable"]


def check_host(accelerator: Accelerator | None, num_nodes: int) -> None:
    """Check the framework, the accelerator and the number of nodes.

    Raises:
        ConfigurationError: a ``pytorch_lightning`` Trainer, an accelerator that is not there yet, or several nodes.
    """
    if type(accelerator).__module__.split(".")[0] == "pytorch_lightning":
        raise wrong_framework()
    if not isinstance(accelerator, CPUAccelerator | CUDAAccelerator):
        raise not_there_yet(
            f"accelerator={type(accelerator).__name__}", "Learners run on CPUs and CUDA devices: pass Trainer(accelerator='cpu') or 'gpu'."
        )
    if isinstance(accelerator, CUDAAccelerator):
        rank_zero_warn("Learners on CUDA devices: this was written without a GPU at hand, and the tests for it have never run on one.")
    if num_nodes != 1:
        raise not_there_yet(
            f"num_nodes={num_nodes}, which means learners on several machines,", "Pass num_nodes=1; devices=N is the number of learners."
        )


def check_trainable(module: pl.LightningModule) -> None:
    """Check that there is something to synchronize, before any process is started.

    Raises:
        ConfigurationError: no parameter is trainable, and no hook could still make one.
    """
    makes_layers_later = is_overridden("configure_model", module) or is_overridden("setup", module)
    if not makes_layers_later and not any(parameter.requires_grad for parameter in module.parameters()):
        raise ConfigurationError(
            f"{type(module).__name__} has no trainable parameters: there is nothing to synchronize. "
            "Unfreeze some, or train without this strategy."
        )


def check_callbacks(trainer: pl.Trainer) -> None:
    """Check that no callback of a job of several processes runs a training of its own before the fit.

    It would run in every learner, find something else in each, and read back a checkpoint that only learner 0 writes.

    Raises:
        ConfigurationError: a finder of the batch size or the learning rate.
    """
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        if isinstance(callback, BatchSizeFinder | LearningRateFinder):
            raise ConfigurationError(
                f"{type(callback).__name__} trains before the fit, on one device and without learners. Use it with a Trainer without this "
                "strategy, Tuner(Trainer(devices=1)).lr_find(model) or .scale_batch_size(model), and pass on what it finds."
            )


def check_local(sync: SyncConfig, launch: str, num_devices: int, environment: ClusterEnvironment | None) -> None:
    """Check a job whose learners this process starts.

    Raises:
        ConfigurationError: more contributions wanted than there are learners, several devices inline, or a process that an outside
            launcher started as one of many.
    """
    if launch == "inline" and num_devices != 1:
        raise ConfigurationError(f"launch='inline' with devices={num_devices}: this process is the only learner. Pass Trainer(devices=1).")
    if sync.min_quorum > num_devices:
        raise ConfigurationError(
            f"min_quorum={sync.min_quorum} with devices={num_devices}: a merge cannot need more contributions than there are learners. "
            f"Lower min_quorum to at most {num_devices} or raise devices."
        )
    if environment is not None and environment.creates_processes_externally:
        try:
            size = environment.world_size()
        except KeyError:  # a scheduler's environment without its number of tasks: nothing that it started
            size = 1
        if size > 1:
            raise ConfigurationError(
                f"{type(environment).__name__}: this process is one of {size} that an outside launcher started, and each would start "
                f"{num_devices} learners. Start the script once, without a launcher; devices=N is the number of learners."
            )


def check_island(num_devices: int) -> None:
    """Check a learner of a syncer that someone else started.

    Raises:
        ConfigurationError: several devices, or one process of several that torchrun takes for one job.
    """
    if num_devices != 1:
        raise not_there_yet(
            f"syncer= with devices={num_devices}: a learner of several devices", "Pass devices=1 and start one Trainer for each learner."
        )
    # Of torchrun's processes one that dies takes the others with it: they can be one learner, but not several.
    if TorchElasticEnvironment.detect() and (size := TorchElasticEnvironment().world_size()) > 1:
        raise not_there_yet(
            f"syncer= in one of {size} processes of torchrun: a learner of several processes",
            "Start one torchrun --nproc-per-node 1 for each learner, with --standalone or a --master-port of its own.",
        )
