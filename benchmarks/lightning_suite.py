"""Lightning's own tests with this project's strategy where theirs is: which of those that pass without us fail with us.

    git clone --branch 2.6.6 https://github.com/Lightning-AI/pytorch-lightning   # the tag of the installed version
    .venv/bin/python benchmarks/lightning_suite.py pytorch-lightning/tests --mode inline [--json FILE] [--only WORD ...]

Every test file runs in a process of its own, once as it is (``plain``) and once with the strategy (``inline``: in place of the default
one on one CPU device, with a neutral outer optimizer; ``ddp``: in place of ``ddp`` and its kin on the CPU). Nothing of the suite is
changed. Files that the JSON holds are not run again; `--only` keeps the files whose path contains one of the words.

The exit code is 1 if a test that passes as it is fails with us and is not listed with its reason in `EXPECTED`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.row_file import read_rows, write_rows  # noqa: E402

CLASS = "compares the strategy's class or options, or that of its launcher"
LAST = "counts validations or workers: the final global model is validated once more"
CALLER = "asks the calling process for what only learners have (a sampler, mocked calls)"
EXPECTED = {
    "test_trainer_config_strategy[": CLASS,
    "test_pytorch_profiler_trainer_fit[": CLASS,
    "test_ddp_kwargs_from_registry[": CLASS,
    "test_incorrect_ddp_script_spawning": CLASS,
    "test_swa_callback_ddp_cpu": CLASS,
    "test_swa_resume_training_from_checkpoint_ddp": CLASS,
    "test_dataloader_persistent_workers_performance_warning[": CLASS,
    "test_dataloaders_load_every_n_epochs_": LAST,
    "test_load_model_from_checkpoint[": "the last merge rounds: base + (weights - base) may differ from the weights in the last bit",
    "test_distributed_sampler_with_overfit_batches": CALLER,
    "test_eval_distributed_sampler_warning[": "warns of a sampler in validation; the calling process validates the whole set without one",
    "test_fit_twice_raises": "a second fit is an error with ddp_fork; here it works",
    "test_trainer_predict_ddp_spawn": "predictions are an error with ddp_spawn; here the calling process predicts and returns them",
    "test_spawn_predict_return_predictions": "predictions are an error with ddp_spawn; here the calling process predicts and returns them",
    "test_logging_sync_dist_true[": "sync_dist: a learner reduces over itself",
    "test_multiple_early_stopping_callbacks[": "one learner of two diverges: the decision of learner 0 is the one that ends the job",
}
"""Parts of test ids, and why such a test cannot pass."""


def main() -> int:
    """Run what is missing, then compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tests", type=Path, help="the folder that holds `tests_pytorch`")
    parser.add_argument("--only", nargs="*", default=[], metavar="WORD", help="files whose path contains one of these")
    parser.add_argument("--mode", choices=["inline", "ddp"], default="inline")
    parser.add_argument("--json", type=Path, default=Path("lightning_suite.json"))
    parser.add_argument("--timeout", type=int, default=120, help="seconds for one test")
    arguments = parser.parse_args()
    root = arguments.tests / "tests_pytorch"
    if not root.is_dir():
        parser.error(f"{root} is no folder: give the folder `tests` of Lightning's repository.")
    known: dict[str, Any] = read_rows(arguments.json, {})
    files = sorted(p.relative_to(arguments.tests).as_posix() for p in root.rglob("test_*.py"))
    files = [f for f in files if not arguments.only or any(word in f for word in arguments.only)]
    for file in files:
        for mode in ("plain", arguments.mode):
            if file not in known.setdefault(mode, {}):
                known[mode][file] = run(arguments.tests, file, mode, arguments.timeout)
                write_rows(arguments.json, known)
    return compare(known, arguments.mode, files)


def run(tests: Path, file: str, mode: str, timeout_s: int) -> dict[str, Any]:
    """One file in one mode; returns outcomes by test id and the totals of its jobs."""
    start_s = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "outcomes.json"
        path = os.pathsep.join([str(tests.resolve()), str(ROOT), str(ROOT / "benchmarks")])
        environment = {**os.environ, "SUITE_MODE": mode, "SUITE_OUT": str(out), "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        # Not in the suite's folder: its tests may leave nothing there, and a job has a run directory.
        where = [str(tests.resolve() / file), f"--rootdir={tests.resolve()}"]
        command = [sys.executable, "-m", "pytest", *where, "-q", "--tb=native", "-p", "lightning_suite_plugin", f"--timeout={timeout_s}"]
        log = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, errors="replace")
        result = json.loads(out.read_text()) if out.exists() else {"outcomes": {}, "totals": {}}
    result["seconds"] = round(time.monotonic() - start_s, 1)
    result["code"] = log.returncode
    result["log"] = log.stdout[-20_000:] if log.returncode else ""
    counts = {o: list(result["outcomes"].values()).count(o) for o in ("passed", "failed", "skipped")}
    print(f"{mode:7} {file:75} {counts} {result['seconds']} s", flush=True)
    return result


def compare(known: dict[str, Any], mode: str, files: list[str]) -> int:
    """Print new failures and totals."""
    passed, new = 0, []
    totals = {"fits": 0, "merges": 0, "bytes_up": 0}
    for file in files:
        ours = known[mode][file]
        for name, value in ours["totals"].items():
            totals[name] += value
        for test, outcome in known["plain"][file]["outcomes"].items():
            passed += outcome == "passed"
            if outcome == "passed" and ours["outcomes"].get(test) != "passed":
                new.append(test)
    unexpected = [t for t in new if not any(part in t for part in EXPECTED)]
    for test in new:
        reason = next((reason for part, reason in EXPECTED.items() if part in test), "NOT EXPECTED")
        print(f"fails with us: {test}: {reason}")
    share = 100 * len(new) / max(passed, 1)
    print(
        f"{mode}: {passed} tests pass without us, {len(new)} of them fail with us ({share:.1f} %), {len(unexpected)} not listed; {totals}"
    )
    return 1 if unexpected else 0


if __name__ == "__main__":
    sys.exit(main())
