"""In the place of `srun`, which is not here: starts a command once for each task, with the variables that SLURM gives it.

Options before the command are looked at only so far that they are options. SIGTERM goes to every process of every task, as SLURM sends it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys


def main(words: list[str]) -> int:
    """Run all tasks; returns the highest exit code, as srun does."""
    command = words[next(i for i, word in enumerate(words) if not word.startswith("--")) :]
    num_tasks = int(os.environ["SLURM_NTASKS"])
    tasks = []
    signal.signal(signal.SIGTERM, lambda *_: [os.killpg(task.pid, signal.SIGTERM) for task in tasks if task.poll() is None])
    for i in range(num_tasks):
        of_task = {
            "SLURM_PROCID": str(i),
            "SLURM_LOCALID": str(i),
            "SLURM_NODEID": "0",
            "SLURM_STEP_ID": "0",
            "SLURM_STEP_NUM_TASKS": str(num_tasks),
        }
        tasks.append(subprocess.Popen(command, env={**os.environ, **of_task}, start_new_session=True))
    codes = [task.wait() for task in tasks]
    return max(128 - code if code < 0 else code for code in codes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
