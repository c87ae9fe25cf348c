"""Train a recipe: ``python recipes/train.py recipe=NAME key=value ...`` (``--help`` lists both).

With ``-m`` a value may be a list, and every combination is a run: ``outputs/multirun/DATE_TIME/NUMBER``.

Hydra composes the configuration and makes the run directory ``outputs/DATE_TIME``; its own copy of the configuration goes to
``logs/hydra`` there, the rest of the directory belongs to the strategy. Exit code 2, with a sentence, means a wrong value or option.

Everything heavy is imported after the command line was understood, because the number of threads of a process has to be
settled before torch is imported, and because ``--help`` should not take four seconds.
"""

from __future__ import annotations

import os
import shutil
import sys
from contextlib import suppress
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

# Run as a script, so the folder above is not on the path; learners get this process's path.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lightning_diloco.errors import ConfigurationError  # noqa: E402
from recipes.values import check_devices  # noqa: E402

__all__ = ["main"]

_understood = False
_threads: str | None = None
"""What this process has put into OMP_NUM_THREADS."""


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def _job(cfg: DictConfig) -> None:
    """Run one job; a wrong value ends the process with a sentence."""
    global _understood
    _understood = True
    try:
        if cfg.strategy.name != "single":
            check_devices(cfg.trainer.devices)
        share_cores(cfg.trainer.devices)
        from recipes.job import run

        run(cfg)
    except ConfigurationError as error:
        forget(Path(HydraConfig.get().runtime.output_dir))
        print(error, file=sys.stderr)
        sys.exit(2)


def share_cores(num_learners: object) -> None:
    """Give each learner its share of the cores, unless the caller's environment says how many threads a process has.

    Torch would use every core in every learner. With two learners on two cores that is four threads in lock step, and a step takes
    several times as long.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = cores // num_learners if isinstance(num_learners, int) and num_learners > 0 else 1
    global _threads
    if os.environ.get("OMP_NUM_THREADS") in (None, _threads):
        # Again for every job of a sweep: they may have other numbers of learners.
        _threads = os.environ["OMP_NUM_THREADS"] = str(max(1, share))


def forget(run_dir: Path) -> None:
    """Remove the folder of a run that was refused, as far as there is nothing in it but Hydra's copy of the configuration.

    Args:
        run_dir: which Hydra has made.
    """
    if not any((run_dir / name).exists() for name in ("tape.jsonl", "result.json", "checkpoints")):
        shutil.rmtree(run_dir / "logs" / "hydra", ignore_errors=True)
        with suppress(OSError):  # the first that is not empty
            for folder in (run_dir / "logs", run_dir):
                folder.rmdir()
            if run_dir.parent.name == "outputs":  # our own; another one is the user's
                run_dir.parent.rmdir()


def main() -> None:
    """Understand the command line and run the job."""
    try:
        _job()
    except SystemExit as end:
        # Hydra ends with 1 whether the job failed or an option was unknown; the latter is wrong use.
        if end.code == 1 and not _understood:
            sys.exit(2)
        raise


if __name__ == "__main__":
    main()
