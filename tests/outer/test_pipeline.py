"""The same records give the same bits on every CPU: one program, started with different instruction sets and thread counts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.outer import pipeline

HERE = Path(__file__).parent


def start(mode, path, *, capability=None, threads=1):
    environment = {k: v for k, v in os.environ.items() if k != "ATEN_CPU_CAPABILITY"}
    environment |= {"PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": str(threads)}
    if capability:
        environment["ATEN_CPU_CAPABILITY"] = capability
    command = [sys.executable, str(HERE / "pipeline.py"), mode, str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.process
@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() == "DEFAULT", reason="this CPU has one instruction set only")
def test_a_replay_has_the_same_bits_with_other_instructions_and_threads(tmp_path):
    path = tmp_path / "records.json"
    native = start("record", path)
    plain = start("replay", path, capability="default", threads=2)
    assert plain["capability"] == "DEFAULT" != native["capability"]
    assert plain["digests"] == native["digests"]
    assert len(set(native["digests"].values())) == 3
    # The digest sees the records: one norm off by one unit in the seventh digit is another run.
    records = json.loads(path.read_text())
    records["fp32"][9]["norms"][1][1] *= 1 + 1e-6
    path.write_text(json.dumps(records))
    changed = start("replay", path)
    assert changed["digests"]["fp32"] != native["digests"]["fp32"]
    assert all(changed["digests"][wire] == native["digests"][wire] for wire in ("bf16", "int4"))


@pytest.mark.parametrize("wire", ["fp32", "bf16", "int4"])
def test_torchs_default_dtype_is_not_asked(wire, monkeypatch):
    """It is the whole process's, and Lightning's `bf16-true` changes it for the time of every forward pass."""
    expected, _ = pipeline.run(wire, None)
    modules = [pipeline.build() for _ in range(3)]
    monkeypatch.setattr(pipeline, "build", lambda: modules.pop())
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert pipeline.run(wire, None)[0] == expected
    finally:
        torch.set_default_dtype(torch.float32)
