"""`Showing`: the job's figures where a user looks, in the progress bar and in the loggers.

They are not among the user's metrics: neither ``callback_metrics`` nor ``logged_metrics`` nor ``progress_bar_metrics`` has them. The bar
shows them before its own. To a logger they go in the calls that Lightning makes anyway, with what the module logs: a step has one row
there, and a module that logs nothing gets none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import RichProgressBar

from lightning_diloco.runtime.figures import Figures

__all__ = ["Showing"]


class Showing:
    """Adds figures to what the bar and the loggers of a Trainer are given, from now on until `close`.

    Args:
        trainer: of this process.
        is_logged: whether loggers get them; a job whose merges change nothing is there to be compared with a plain one, row for row.
    """

    def __init__(self, trainer: pl.Trainer, *, is_logged: bool) -> None:
        self._connector = trainer._logger_connector
        self._in_bar: dict[str, float | str] = {}
        self._in_logs: dict[str, float] = {}
        self._is_rich = isinstance(trainer.progress_bar_callback, RichProgressBar)
        """It shows every number with three decimals, and text as it is; the other bar shows an integer as one."""
        self._replaced: list[tuple[object, str, Any]] = []
        if trainer.progress_bar_callback is not None:
            self._metrics = self._replace(trainer.progress_bar_callback, "get_metrics", self._get_metrics)
        if is_logged:
            self._log = self._replace(self._connector, "log_metrics", self._log_metrics)

    def update(self, figures: Figures) -> None:
        """Show these; counts are integers. Called at every boundary."""
        shown: dict[str, float] = {"merges": figures.merges, "staleness": float(figures.staleness_versions)}
        if figures.participation is not None:
            shown["participation"] = float(figures.participation)
        self._in_bar = {**shown, "merges": str(figures.merges)} if self._is_rich else {**shown}
        if figures.merges:
            self._in_logs = {f"diloco/{name}": value for name, value in shown.items()}
            for name in ("stall_s", "bytes_up", "bytes_down", "inner_steps", "tokens"):
                self._in_logs[f"diloco/{name}"] = getattr(figures, name)

    def close(self) -> None:
        """Leave bar and loggers as they were."""
        for owner, name, own in self._replaced:
            vars(owner).pop(name, None)
            if own is not None:
                setattr(owner, name, own)
        self._replaced.clear()

    def _replace(self, owner: object, name: str, method: Any) -> Any:
        """Put `method` in the instance's way; returns the one that it stands for."""
        before = getattr(owner, name)
        self._replaced.append((owner, name, vars(owner).get(name)))
        setattr(owner, name, method)
        return before

    def _get_metrics(self, *args: Any) -> dict[str, Any]:
        """Ours, then the bar's own: the user's stand where they always do, at the end."""
        return {**self._in_bar, **self._metrics(*args)}

    def _log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        if not metrics or step is not None:
            # Nothing is logged; or it is a batch of a validation, which counts its own steps.
            self._log(metrics, step)
            return
        self._log({**self._in_logs, **metrics})
        for name in self._in_logs.keys() - metrics.keys():
            self._connector._logged_metrics.pop(name, None)
