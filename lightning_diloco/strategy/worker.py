"""The learner process: ``python -m lightning_diloco.strategy.worker``, started by the supervisor and never by hand.

The order matters. The assignment is read and the life line held first, so that the process cannot outlive its supervisor. SIGTERM is
caught before anything slow, because Lightning's own handler comes late. The learner's rank is set before Lightning is imported,
because loggers and progress bars ask for it. Then the payload is read, and the user's fit runs exactly as in its own process: through
Lightning's ``_call_and_handle_interrupt``, so that hooks for exceptions and teardown run here.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_diloco.runtime.disk import lose_output_of_a_full_disk
from lightning_diloco.runtime.life_signs import begin_signs, give_sign
from lightning_diloco.strategy.life_line import hold_life_line, read_assignment
from lightning_diloco.strategy.sigterm import EXIT_SIGTERM, SigtermPolicy, is_sigterm_exit

if TYPE_CHECKING:
    from lightning_diloco.strategy.outer_sync import OuterSync
    from lightning_diloco.strategy.results import LearnerResult
    from lightning_diloco.strategy.strategy import DecoupledDiLoCoStrategy

__all__ = ["main"]

_log = logging.getLogger(__name__)

_strategy: DecoupledDiLoCoStrategy | None = None


def main() -> int:
    """Run one learner to its end.

    Returns:
        The exit code: 0 done, 1 failed, 143 left after SIGTERM.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Nothing to clean up yet, and an exception in the middle of an import leaves half a module behind.
    signal.signal(signal.SIGTERM, lambda signum, frame: os._exit(EXIT_SIGTERM))
    assigned = read_assignment(0)
    hold_life_line(0)
    _restore_surroundings(assigned)
    # After the surroundings are restored, and before anything of the user's may print.
    lose_output_of_a_full_disk()
    try:
        _begin_signs(Path(assigned["signs_path"]), _spare_dir(assigned))
        _settle_rank(assigned["learner_id"])
        result = _run(assigned)
    except BaseException as error:
        return _end_with(error, assigned)
    return _write(result, assigned)


def _run(assigned: dict[str, Any]) -> LearnerResult:
    global _strategy
    from lightning.pytorch.trainer import call

    from lightning_diloco.strategy.assignment import Assignment
    from lightning_diloco.strategy.csv_logs import keep_csv_logs
    from lightning_diloco.strategy.payload import load_payload
    from lightning_diloco.strategy.results import collect

    payload = load_payload(Path(assigned["payload_path"]))
    trainer = payload.trainer
    _strategy = trainer.strategy
    assert _strategy is not None
    _strategy.take(
        Assignment(
            role="learner",
            endpoint=_await_endpoint(Path(assigned["syncer_path"])),
            learner_id=assigned["learner_id"],
            num_learners=assigned["num_learners"],
            life=assigned["life"],
            token=assigned["token"],
            takeover_token=assigned["takeover_token"],
            run_dir=Path(assigned["run_dir"]),
            launch_dir=Path(assigned["launch_dir"]),
            spare_dir=_spare_dir(assigned),
        )
    )
    # The supervisor has run it once for the machine.
    trainer._data_connector.prepare_data = _nothing
    if assigned["learner_id"] == 0 and assigned["life"] > 0:
        keep_csv_logs(trainer.loggers)
        for callback in trainer.callbacks:
            # LightningCLI's SaveConfigCallback takes the file of this very run for that of an earlier one, and raises.
            if hasattr(callback, "already_saved"):
                callback.already_saved = True
    payload.state.restore()
    SigtermPolicy(_find_sync).install()
    call._call_and_handle_interrupt(trainer, payload.function, *payload.args, **payload.kwargs)
    return collect(trainer)


def _begin_signs(path: Path, spare_dir: Path | None) -> None:
    try:
        try:
            begin_signs(path)
        except OSError:
            if spare_dir is None:
                raise
            begin_signs(spare_dir / path.name)
    except OSError as error:
        _log.warning(
            "%s cannot be written (%s): whether this learner hangs is told by the CPU that it uses, not by its batches.", path, error
        )


def _await_endpoint(path: Path) -> str:
    """The syncer's address, which it writes when it is ready; the supervisor ends this process if that never happens."""
    while not path.exists():
        give_sign()
        time.sleep(0.02)
    return str(json.loads(path.read_text("utf-8"))["endpoint"])


def _nothing() -> None:
    """Stand-in for a hook that has run elsewhere."""


def _end_process(code: int) -> None:
    """End as the interpreter would, without taking every module apart first: that takes a second, and nothing is left to be saved."""
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _find_sync() -> OuterSync | None:
    return None if _strategy is None else _strategy._outer_sync


def _end_with(error: BaseException, assigned: dict[str, Any]) -> int:
    from lightning_diloco.errors import DiLoCoError
    from lightning_diloco.strategy.results import LearnerResult, failure

    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if is_sigterm_exit(error):
        return _write(LearnerResult(outcome="signal"), assigned)
    if not isinstance(error, DiLoCoError):
        # Our own errors are sentences; the supervisor raises them. The user's are shown where they happened as well.
        traceback.print_exception(error)
    return _write(failure(error), assigned)


def _spare_dir(assigned: dict[str, Any]) -> Path | None:
    return None if assigned["spare_dir"] is None else Path(assigned["spare_dir"])


def _write(result: LearnerResult, assigned: dict[str, Any]) -> int:
    from lightning_diloco.strategy.results import leave_result

    leave_result(result, Path(assigned["result_path"]), _spare_dir(assigned))
    sys.stdout.flush()
    sys.stderr.flush()
    return {"done": 0, "signal": EXIT_SIGTERM, "memory": 1, "failed": 1}[result.outcome]


def _restore_surroundings(assigned: dict[str, Any]) -> None:
    """Undo what was only needed to get here: this process looks for modules where its parent does."""
    sys.path[:] = assigned["sys_path"]
    sys.argv[:] = assigned["argv"]
    for name, value in assigned["environment"].items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _settle_rank(learner_id: int) -> None:
    from lightning_utilities.core.rank_zero import rank_zero_only

    vars(rank_zero_only)["rank"] = learner_id


if __name__ == "__main__":
    # Other code finds this module by its name, and there has to be one of it: the handler and the run share its globals.
    sys.modules["lightning_diloco.strategy.worker"] = sys.modules["__main__"]
    _end_process(main())
