"""`docs/sites/slurm.sbatch` in the environment of a job, with a stand-in for `srun`: there is no SLURM here."""

from __future__ import annotations

import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.sites.kit import Site, code, joins, leaves, make_keys, merges_after_last, site, write_program
from tests.tape_checker import check_run

SRUN = Path(__file__).with_name("srun.py")


def submit(here: Site, line: str) -> list[subprocess.Popen[bytes]]:
    """Do what `sbatch` would: read the options of the file and of the line, and start the jobs with SLURM's variables."""
    words = shlex.split(here.command(line))
    at = words.index("sbatch")
    *options, path = words[at + 1 :]
    file = here.folder / path
    in_file = re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", file.read_text(), re.M)
    given = {**dict(in_file), **dict(re.fullmatch(r"--([\w-]+)=(\S+)", option).groups() for option in options)}
    assert {"requeue", "signal", "job-name"} <= set(given), "options that the page speaks of"
    variables = {
        **dict(word.split("=", 1) for word in words[:at]),
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NAME": given["job-name"],
        "SLURM_NTASKS": given["ntasks"],
        "SLURM_NPROCS": given["ntasks"],
        "SLURM_NNODES": "1",
        "SLURM_NODELIST": "node1",
        "SLURM_CPUS_PER_TASK": "1",
    }
    if "array" not in given:
        return [here.start("bash", str(file), **variables)]
    first, last = map(int, given["array"].split("-"))
    ids = range(first, last + 1)
    return [here.start("bash", str(file), SLURM_ARRAY_JOB_ID="4711", SLURM_ARRAY_TASK_ID=str(i), **variables) for i in ids]


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.timeout(420)
def test_a_job_of_two_tasks_is_preempted_and_comes_back_as_an_array(tmp_path):
    with site(tmp_path / "site") as here:
        make_keys(here.folder)
        write_program(here.folder / ".venv" / "bin" / "srun", f'exec {sys.executable} {SRUN} "$@"')
        run_dir = here.folder / "outputs" / "job"
        syncer = here.start_syncer(run_dir)
        by_hand = here.start(*shlex.split(here.command(code("by_hand")))[:-1], "3")
        (job,) = submit(here, code("sbatch"))
        here.wait_until(lambda: len(joins(run_dir)) == 3 and merges_after_last("join", run_dir) > 5, "three learners")
        assert joins(run_dir) == [(0, 0), (1, 0), (2, 0)]

        (srun,) = psutil.Process(job.pid).children()
        srun.send_signal(signal.SIGTERM)
        assert here.exit_code(job) == 128 + signal.SIGTERM, here.text()
        assert sorted(leaves(run_dir)) == [(1, "signal"), (2, "signal")], here.text()

        jobs = submit(here, code("array"))
        here.wait_until(lambda: len(joins(run_dir)) == 5 and merges_after_last("join", run_dir) > 5, "their next lives")
        assert joins(run_dir) == [(0, 0), (1, 0), (1, 1), (2, 0), (2, 1)]
        here.stop()
        assert [here.exit_code(process) for process in (by_hand, *jobs, syncer)] == [0] * 4, here.text()
    summary = check_run(run_dir)
    assert summary["status"] == "finished" and summary["tokens_discarded"] == 0
    assert all(x["rounds_merged"] > 0 for x in summary["learners"])
