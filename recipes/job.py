"""One job of a recipe: from the configuration to the trained module and its report."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from omegaconf import DictConfig, OmegaConf

from lightning_diloco.errors import ConfigurationError
from lightning_diloco.runtime.rundir import link_latest
from recipes.quiet import quiet
from recipes.report import report, report_single
from recipes.values import check_names

__all__ = ["build_trainer", "run"]

PLAIN = {"single": "auto", "ddp": "ddp_spawn"}
"""Runs to compare with, and the Trainer's strategy for each."""


def run(cfg: DictConfig) -> None:
    """Train a recipe's module, then print what happened, what the model can do, and where the files are.

    Args:
        cfg: the composed configuration.

    Raises:
        ConfigurationError: a value is wrong.
    """
    quiet()
    seed_everything(cfg.seed, workers=True, verbose=False)
    recipe = importlib.import_module(f"recipes.{cfg.name}")
    module, data = recipe.build(cfg)
    run_dir = Path(HydraConfig.get().runtime.output_dir)
    trainer = build_trainer(cfg, run_dir)
    if is_plain(cfg):
        link_latest(run_dir)  # as the strategy does when it starts
    try:
        trainer.fit(module, datamodule=data)
    except (KeyboardInterrupt, SystemExit):  # Lightning makes the second of the first
        print(f"Stopped. Run directory: {_shortest(run_dir)}")
        raise
    if is_plain(cfg):
        _finish_plain(trainer, module, data, run_dir)
    else:
        report(trainer.strategy.summary)  # type: ignore[attr-defined]
    print(f"\n{_show(recipe, module, cfg)}\n\nRun directory: {_shortest(run_dir)}")


def build_trainer(cfg: DictConfig, run_dir: Path) -> Trainer:
    """The Trainer of a job: `cfg.trainer` are its arguments, `cfg.strategy` those of the strategy.

    Args:
        cfg: the composed configuration.
        run_dir: where the job's files go; metrics go to its ``logs/metrics/metrics.csv``.

    Raises:
        ConfigurationError: a name or a value is wrong.
    """
    options: dict[str, Any] = OmegaConf.to_container(cfg.trainer, resolve=True)  # type: ignore[assignment]
    if cfg.strategy.name == "single":
        options["devices"] = 1
    ours: dict[str, Any] = {
        "strategy": PLAIN[cfg.strategy.name] if is_plain(cfg) else _strategy(cfg, run_dir),
        "logger": CSVLogger(save_dir=run_dir, name="logs", version="metrics"),
        "callbacks": _progress(),
        # The strategy writes checkpoints/last.ckpt from the global weights after the drain.
        "enable_checkpointing": False,
        "default_root_dir": run_dir,
    }
    check_names("trainer", Trainer, options, ours=ours)
    try:
        return Trainer(**options, **ours)
    except ConfigurationError:
        raise
    except (MisconfigurationException, TypeError, ValueError) as error:
        raise ConfigurationError(f"A value of trainer is refused by Lightning: {error}") from error


def is_plain(cfg: DictConfig) -> bool:
    """Whether the job is one of Lightning's own strategies."""
    return cfg.strategy.name in PLAIN


def _finish_plain(trainer: Trainer, module: LightningModule, data: LightningDataModule, run_dir: Path) -> None:
    """For a run without our strategy: a checkpoint (of ``single``), a last validation, figures in ``result.json``.

    The last validation inside `fit` may lie many steps back, and with `ddp` each process sees a part of the data.
    """
    # Processes of their own have trained with `ddp`: this one's Trainer has counted nothing, and has no optimizer to save.
    steps = trainer.global_step or None
    if steps is not None:
        trainer.save_checkpoint(run_dir / "checkpoints" / "last.ckpt", weights_only=False)
    alone = Trainer(
        accelerator="cpu",
        devices=1,
        precision=trainer.precision,
        limit_val_batches=trainer.limit_val_batches,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    (metrics,) = alone.validate(module, datamodule=data, verbose=False)
    (run_dir / "result.json").write_text(json.dumps({"status": "finished", "inner_steps": steps, "val": metrics}) + "\n")
    report_single(steps, metrics)


def _strategy(cfg: DictConfig, run_dir: Path) -> Any:
    from lightning_diloco import DecoupledDiLoCoStrategy

    if cfg.strategy.name != "decoupled_diloco":
        raise ConfigurationError(f"strategy.name={cfg.strategy.name!r}: must be 'decoupled_diloco', 'ddp' or 'single'.")
    options: dict[str, Any] = OmegaConf.to_container(cfg.strategy, resolve=True)  # type: ignore[assignment]
    del options["name"]
    if "run_dir" in options:
        raise ConfigurationError("strategy.run_dir: a recipe sets this itself. Leave it out; hydra.run.dir=DIR names the folder.")
    return DecoupledDiLoCoStrategy(run_dir=run_dir, **options)


def _progress() -> list[Callback]:
    """A terminal gets Lightning's bar; what is read later, as a file or in a job's log, gets lines."""
    if sys.stdout.isatty():
        return []
    from lightning_diloco import LineProgress

    return [LineProgress()]


def _show(recipe: Any, module: LightningModule, cfg: DictConfig) -> str:
    """The recipe's own showpiece, from the module of this process, which holds the global weights after `fit`."""
    shown: str = recipe.show(module, cfg)
    return shown


def _shortest(path: Path) -> Path:
    """Relative to the working directory where it lies below it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
