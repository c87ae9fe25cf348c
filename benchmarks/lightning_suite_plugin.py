"""A pytest plugin that puts this project's strategy where Lightning's own tests have theirs; see ``lightning_suite.py``.

Environment: ``SUITE_MODE`` is ``plain`` (nothing is changed), ``inline`` (in place of the default strategy on one CPU device, with a
neutral outer optimizer) or ``ddp`` (in place of ``ddp``, ``ddp_spawn`` and their kin on the CPU). ``SUITE_OUT`` names the JSON file for
the outcomes.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.trainer.connectors.accelerator_connector import _AcceleratorConnector

from lightning_diloco import DecoupledDiLoCoStrategy
from lightning_diloco.strategy.finish import JobRecorder

MODE = os.environ.get("SUITE_MODE", "plain")
NEUTRAL: dict[str, Any] = {"outer_lr": 1.0, "outer_momentum": 0.0, "wire_dtype": "fp32"}
DDP_NAMES = ("ddp", "ddp_spawn", "ddp_fork", "ddp_find_unused_parameters_true", "ddp_spawn_find_unused_parameters_true")

outcomes: dict[str, str] = {}
totals = {"fits": 0, "merges": 0, "bytes_up": 0}


def pytest_configure(config: pytest.Config) -> None:
    """Put the strategy in place before anything is imported from the suite."""
    if MODE == "inline":
        _replace_default()
    elif MODE == "ddp":
        _replace_ddp()
    if MODE != "plain":
        _count_jobs()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Note the worst of a test's phases."""
    ranks = {"passed": 0, "skipped": 1, "failed": 2}
    before = outcomes.get(report.nodeid, "passed")
    outcomes[report.nodeid] = max(before, report.outcome, key=lambda o: ranks[o])


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write what was seen."""
    path = os.environ.get("SUITE_OUT")
    if path:
        Path(path).write_text(json.dumps({"outcomes": outcomes, "totals": totals}))


def _replace_default() -> None:
    choose = _AcceleratorConnector._choose_strategy

    def chosen(self: _AcceleratorConnector) -> Any:
        strategy = choose(self)
        if isinstance(strategy, SingleDeviceStrategy) and strategy.root_device.type == "cpu":
            return DecoupledDiLoCoStrategy(launch="inline", **NEUTRAL)
        return strategy

    _AcceleratorConnector._choose_strategy = chosen  # type: ignore[method-assign]


def _replace_ddp() -> None:
    check = _AcceleratorConnector._check_strategy_and_fallback

    def checked(self: _AcceleratorConnector) -> None:
        check(self)
        devices = self._parallel_devices or []
        if self._strategy_flag in DDP_NAMES and self._num_nodes_flag == 1 and all(d.type == "cpu" for d in devices):
            self._strategy_flag = DecoupledDiLoCoStrategy(**NEUTRAL)

    _AcceleratorConnector._check_strategy_and_fallback = checked  # type: ignore[method-assign]


def _count_jobs() -> None:
    finish = JobRecorder.finish

    def counted(self: JobRecorder, *args: Any, **kwargs: Any) -> dict[str, Any]:
        summary = finish(self, *args, **kwargs)
        totals["fits"] += 1
        totals["merges"] += summary.get("merges") or 0
        totals["bytes_up"] += summary.get("bytes_up") or 0
        return summary

    JobRecorder.finish = counted  # type: ignore[method-assign]
