"""One job of `benchmarks/wan.py`: its processes, each in its namespace and on its core, and what they and the links say of it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.wan.net import SYNCER, Net
from benchmarks.wan.progress import read_progress
from benchmarks.wan.sampler import peak_bytes_per_s

__all__ = ["Job", "Setting"]

ROOT = Path(__file__).resolve().parent.parent.parent
PORT = 7777
LIGHTHOUSE_PORT = 29510
PATIENCE_S = 120.0
"""For a start, and for an end after the last step."""
SYNC: dict[str, Any] = {"num_fragments": 24, "sync_interval_steps": 24, "drain_timeout_s": 60.0}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all jobs of a run have in common."""

    net: Net | None
    """None: loopback, and a relay with a rate."""
    num_learners: int
    model: dict[str, Any]
    data: dict[str, Any]
    seed: int = 0
    has_keys: bool = False
    """Whether our links are encrypted."""
    delay_s: float = 0.0
    """One way, between our learners and the syncer."""
    torchft: Path | None = None
    """The folder of `torchft_packages.packages`; None: no jobs of torchft."""

    @property
    def tokens_per_step(self) -> int:
        """Of one learner."""
        return int(self.data["batch_size"] * self.data["context"])


@dataclass(kw_only=True)
class Job:
    """One job.

    Args:
        setting: of the run.
        method: see `learner.py`; those of torchft need namespaces and `setting.torchft`.
        max_steps: inner steps of each learner.
        first_step: from here to `last_step` is the time that counts.
        last_step: 0: `max_steps`.
        bytes_per_s: of each learner's link; None: no limit.
        learning_rate: peak, inner.
        sync: fields of `SyncConfig` beside `SYNC`.
        at_step: what is done as soon as every learner has done so many steps.
        tick: called about five times a second with the fewest steps that a learner has done.
    """

    setting: Setting
    method: str
    max_steps: int
    first_step: int
    last_step: int = 0
    bytes_per_s: float | None = None
    learning_rate: float = 3e-3
    sync: dict[str, Any] = field(default_factory=dict)
    at_step: dict[int, Callable[[], None]] = field(default_factory=dict)
    tick: Callable[[int], None] = lambda step: None

    def __post_init__(self) -> None:
        self.last_step = self.last_step or self.max_steps

    def run(self) -> dict[str, Any]:
        """Run it; returns its row.

        Raises:
            RuntimeError: a process failed, or nothing moved for too long.
        """
        self._children: list[subprocess.Popen[Any]] = []
        self._hub: subprocess.Popen[Any] | None = None
        with tempfile.TemporaryDirectory(prefix="lightning_diloco_wan_") as folder:
            self._folder = Path(folder)
            try:
                return self._run()
            finally:
                for child in self._children:
                    with suppress(ProcessLookupError):
                        os.killpg(child.pid, signal.SIGKILL)
                    child.wait()

    def _run(self) -> dict[str, Any]:
        net = self.setting.net
        if net is not None:
            net.limit_all(self.bytes_per_s)
            self._start("sampler", [*net.inside_hub(), sys.executable, "-m", "benchmarks.wan.sampler", str(self._folder / "links")])
        endpoints = self._start_hub()
        learners = [self._start_learner(i, endpoints) for i in range(self.setting.num_learners)]
        spent_s = self._watch(learners)
        if net is not None:
            net.limit_all(None)
        return self._row(spent_s)

    @property
    def _is_torchft(self) -> bool:
        return self.method.startswith("torchft")

    # ---- processes ----------------------------------------------------------------------------------------------------------

    def _start(self, name: str, command: list[str], environment: dict[str, str] | None = None, **pipes: Any) -> subprocess.Popen[Any]:
        with (self._folder / f"{name}.log").open("w") as log:
            child = subprocess.Popen(
                command,
                cwd=ROOT,
                env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | (environment or {}),
                start_new_session=True,
                **({"stdin": subprocess.PIPE, "stdout": log, "stderr": log} | pipes),
            )
        self._children.append(child)
        return child

    def _start_hub(self) -> list[str]:
        """Start what the method needs beside learners; returns its addresses."""
        if self._is_torchft:
            return self._start_lighthouse()
        return self._start_syncer() if self.method == "ours" else []

    def _start_syncer(self) -> list[str]:
        """Start it; returns its two addresses."""
        net = self.setting.net
        where = [] if net is None else net.inside(SYNCER)
        bind = "tcp://127.0.0.1:0" if net is None else f"tcp://{net.address(SYNCER)}:{PORT}"
        safety = ["--keys", str(self._folder / "keys")] if self.setting.has_keys else [] if net is None else ["--insecure"]
        if self.setting.has_keys:
            make_keys(self._folder / "keys", [self._site(i) for i in range(self.setting.num_learners)])
        command = [*where, sys.executable, "-m", "lightning_diloco", "syncer", "--bind", bind, "--run-dir", str(self._folder / "run")]
        self._hub = self._start("syncer", [*command, *safety])
        said = self._folder / "run" / "syncer.json"
        self._wait(said.exists, "the syncer's start")
        told = json.loads(said.read_text())
        # Beyond loopback bulk has the port after control's.
        return [told["endpoint"], told["bulk"]] if net is None else [bind, f"tcp://{net.address(SYNCER)}:{PORT + 1}"]

    def _start_lighthouse(self) -> list[str]:
        """Start torchft's, in the syncer's place; returns its address."""
        net = self.setting.net
        assert net is not None and self.setting.torchft is not None
        where = f"{net.address(SYNCER)}:{LIGHTHOUSE_PORT}"
        program = str(self.setting.torchft / "bin" / "torchft_lighthouse")
        options = ["--bind", where, "--min_replicas", str(self.setting.num_learners)]
        self._hub = self._start("lighthouse", [*net.inside(SYNCER), sys.executable, program, *options], self._torchft_environment())
        return [f"http://{where}"]

    def _torchft_environment(self) -> dict[str, str]:
        return {"PYTHONPATH": f"{self.setting.torchft}{os.pathsep}{ROOT}"} if self._is_torchft else {}

    def _site(self, learner_id: int) -> Path:
        return self._folder / f"site_{learner_id}"

    def _link(self, learner_id: int) -> dict[str, str]:
        """What the strategy is told of encryption."""
        if self.setting.has_keys:
            return {"keys": str(self._site(learner_id))}
        return {} if self.setting.net is None else {"keys": "insecure"}

    def _start_learner(self, learner_id: int, endpoints: list[str]) -> subprocess.Popen[Any]:
        setting, net = self.setting, self.setting.net
        cores = sorted(os.sched_getaffinity(0))
        where = [] if net is None else net.inside(learner_id)
        told = {
            "method": self.method,
            "learner_id": learner_id,
            "num_learners": setting.num_learners,
            "model": setting.model | {"learning_rate": self.learning_rate, "warmup_steps": max(1, min(100, self.max_steps // 6))},
            "data": setting.data,
            "seed": setting.seed,
            "max_steps": self.max_steps,
            "mark_at": [self.first_step, self.last_step],
            "sync": SYNC | {"min_quorum": setting.num_learners} | self.sync,
            "link": self._link(learner_id),
            "endpoint": endpoints[0] if endpoints else None,
            "address": "127.0.0.1" if net is None else net.address(learner_id),
            "routes": self._relay(learner_id, where, endpoints),
            "steps": str(self._steps(learner_id)),
            "weights": str(self._folder / "weights.safetensors"),
            "out": str(self._out(learner_id)),
        }
        path = self._folder / f"told_{learner_id}.json"
        path.write_text(json.dumps(told))
        first = "127.0.0.1" if net is None else net.address(0)
        environment = {"MASTER_ADDR": first, "MASTER_PORT": "29517", "NODE_RANK": str(learner_id), "LOCAL_RANK": "0"}
        environment |= {"GLOO_SOCKET_IFNAME": "lo" if net is None else "eth0"} | self._torchft_environment()
        pinned = ["taskset", "-c", str(cores[learner_id % len(cores)]), sys.executable]
        program = "benchmarks.wan.learner"
        if self._is_torchft:
            where, program = [*where, *with_hostname(told["address"])], "benchmarks.wan.torchft_learner"
        return self._start(f"learner_{learner_id}", [*where, *pinned, "-m", program, str(path)], environment, stdin=subprocess.DEVNULL)

    def _relay(self, learner_id: int, where: list[str], endpoints: list[str]) -> dict[str, str]:
        """Addresses to dial in the place of the syncer's."""
        rate = self.bytes_per_s if self.setting.net is None else None
        if self.method != "ours" or (rate is None and not self.setting.delay_s):
            return {}
        told = json.dumps({"endpoints": endpoints, "delay_s": self.setting.delay_s, "bytes_per_s": rate})
        child = self._start(
            f"relay_{learner_id}", [*where, sys.executable, "-m", "benchmarks.wan.relay", told], stdout=subprocess.PIPE, text=True
        )
        assert child.stdout is not None
        routes: dict[str, str] = json.loads(child.stdout.readline())
        return routes

    def _steps(self, learner_id: int) -> Path:
        return self._folder / f"steps_{learner_id}.bin"

    def _out(self, learner_id: int) -> Path:
        return self._folder / f"row_{learner_id}.json"

    # ---- while it runs ------------------------------------------------------------------------------------------------------

    def _wait(self, is_so: Callable[[], bool], what: str) -> None:
        end_s = time.monotonic() + PATIENCE_S
        while not is_so():
            self._check()
            if time.monotonic() > end_s:
                raise RuntimeError(f"{what} ({self.method}): not within {PATIENCE_S:g} s.\n{self._logs()}")
            time.sleep(0.1)

    def _check(self) -> None:
        if any(child.poll() for child in self._children):
            raise RuntimeError(f"A process of {self.method} failed.\n{self._logs()}")

    def _logs(self) -> str:
        return "\n".join(f"{path.name}: {path.read_text(errors='replace')[-1500:]}" for path in sorted(self._folder.glob("*.log")))

    def _watch(self, learners: list[subprocess.Popen[Any]]) -> float:
        """Until all learners, and the syncer, have ended; returns the syncer's (lighthouse's) processor time of the time that counts."""
        spent_s, moved_s, steps = [0.0, 0.0], time.monotonic(), -1
        waiting = dict(sorted(self.at_step.items()))
        while any(child.poll() is None for child in learners):
            self._check()
            before, steps = steps, min(read_progress(self._steps(i)) for i in range(self.setting.num_learners))
            moved_s = time.monotonic() if steps > before else moved_s
            # With DDP a step takes as long as its links need.
            if time.monotonic() - moved_s > 2 * PATIENCE_S:
                raise RuntimeError(f"No step of {self.method} within {2 * PATIENCE_S:g} s.\n{self._logs()}")
            while waiting and steps >= next(iter(waiting)):
                waiting.pop(next(iter(waiting)))()
            if self._hub is not None:
                counted = zip((self.first_step, self.last_step), spent_s, strict=True)
                spent_s = [processor_s(self._hub.pid) if steps < at else old for at, old in counted]
            self.tick(steps)
            time.sleep(0.2)
        hub = self._hub
        if hub is not None and not self._is_torchft:
            self._wait(lambda: hub.poll() is not None, "the syncer's end")
        self._check()
        return spent_s[1] - spent_s[0]

    # ---- afterwards ---------------------------------------------------------------------------------------------------------

    def _row(self, syncer_s: float) -> dict[str, Any]:
        rows = [json.loads(self._out(i).read_text()) for i in range(self.setting.num_learners)]
        steps = self.last_step - self.first_step
        pairs = [(row["marks"][str(self.first_step)], row["marks"][str(self.last_step)]) for row in rows]
        lengths_s = [b["at_s"] - a["at_s"] for a, b in pairs]
        keys = [key for key in ("link_up", "link_down", "payload_up", "payload_down", "process_s", "stall_s") if key in pairs[0][0]]
        row: dict[str, Any] = {
            "method": self.method,
            "max_steps": self.max_steps,
            "bytes_per_s": self.bytes_per_s,
            "step_s": sum(lengths_s) / len(rows) / steps,
            "tokens_per_s": sum(self.setting.tokens_per_step * steps / length_s for length_s in lengths_s),
            "wall_s": max(b["at_s"] for _, b in pairs) - min(row["start_s"] for row in rows),
            "end_s": max(row["end_s"] - b["at_s"] for row, (_, b) in zip(rows, pairs, strict=True)),
            "per_step": {key: sum(b[key] - a[key] for a, b in pairs) / len(rows) / steps for key in keys},
            "syncer_s_per_step": syncer_s / steps,
        }
        begin_s, end_s = max(a["at_s"] for a, _ in pairs), min(b["at_s"] for _, b in pairs)
        if self.setting.net is not None:
            row["peak_bytes_per_s"] = peak_bytes_per_s(self._folder / "links", begin_s, end_s)
        if "merges" in pairs[0][0]:
            sync = SYNC | self.sync
            row["due"] = steps * sync["num_fragments"] / sync["sync_interval_steps"]
            row["merges"] = sum(b["merges"] - a["merges"] for a, b in pairs) / len(rows)
        if self.method == "ours":
            row |= {key: [r[key] for r in rows] for key in ("unanswered", "most_on_way")}
            row["answers_s"] = [answer_s for r in rows for asked_s, answer_s in r["answers"] if begin_s <= asked_s <= end_s]
            summary = json.loads((self._folder / "run" / "summary.json").read_text())
            names = ("status", "tokens", "tokens_merged", "tokens_pending", "tokens_discarded", "discarded_by_reason", "mean_members")
            row["summary"] = {name: summary[name] for name in names}
            row["participation"] = [learner["participation"] for learner in summary["learners"]]
        row["val_loss"] = self._validate()
        return row

    def _validate(self) -> float | None:
        """Of the model that all have in the end; None where there is none."""
        path = self._folder / ("run/global.safetensors" if self.method == "ours" else "weights.safetensors")
        if self.method == "alone":
            return None
        command = [sys.executable, "-m", "benchmarks.wan.learner", str(self._folder / "told_0.json"), str(path)]
        done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"The validation failed: {done.stderr[-1500:]}")
        return float(json.loads(done.stdout.splitlines()[-1]))


def with_hostname(name: str) -> list[str]:
    """What stands before a command that is to see its machine by this name, and nobody else.

    torchft tells its peers to find its stores at `socket.gethostname()`; in a namespace of its own that can be an address, which needs no
    resolver.
    """
    return ["unshare", "--uts", "sh", "-c", 'echo "$0" > /proc/sys/kernel/hostname && exec "$@"', name]


def make_keys(syncer: Path, sites: list[Path]) -> None:
    """Keys of a syncer and of the sites that it lets in."""
    from lightning_diloco.runtime.keys import admit, make_pair, trust_syncer

    public = make_pair(syncer)
    for site in sites:
        admit(syncer, site.name, trust_syncer(site, public.hex()).hex())


def processor_s(pid: int) -> float:
    """Processor time of a process so far; 0.0 if it has ended."""
    with suppress(OSError):
        fields = re.split(r"\) ", Path(f"/proc/{pid}/stat").read_text())[-1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return 0.0
