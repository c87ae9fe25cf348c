"""Keeping the CSV logs of an earlier process.

Lightning's CSVLogger, when it starts to write, removes the ``metrics.csv`` of its version: right for a new run, wrong for the second
process of the same run, which is what a restarted learner is, or the calling process that validates after a fit. There the writer is
made beforehand, with the old rows put back.
"""

from __future__ import annotations

import csv
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger

__all__ = ["keep_csv_logs"]


def keep_csv_logs(loggers: Iterable[Any]) -> None:
    """Let CSV loggers go on with the files that are there.

    Args:
        loggers: a Trainer's loggers; others than CSV ones are left alone, they append by themselves.
    """
    for logger in loggers:
        if isinstance(logger, CSVLogger):
            _keep(logger)


def _keep(logger: CSVLogger) -> None:
    path = Path(logger.log_dir) / "metrics.csv"
    if not path.is_file():
        return
    if logger._experiment is None:
        content = path.read_bytes()
        with warnings.catch_warnings():
            # It warns that it is about to remove what is put back two lines below.
            warnings.simplefilter("ignore")
            _ = logger.experiment
        path.write_bytes(content)
    # A writer of before the fit does not know the columns that have come since.
    writer: Any = logger.experiment
    with path.open(newline="", encoding="utf-8") as file:
        writer.metrics_keys = list(csv.DictReader(file).fieldnames or [])
