"""`lightning-diloco export` from a snapshot alone, read by plain Lightning."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule
from safetensors.torch import load_file
from torch import nn

from lightning_diloco.cli.main import main
from tests.runtime.job_helpers import running_job, whole_life


class Plain(LightningModule):
    """Frozen, tied and low-precision parameters, running statistics, and a buffer of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 12), nn.BatchNorm1d(12), nn.Linear(12, 2))
        self.tied = self.net[2]
        self.frozen = nn.Linear(3, 3)
        self.frozen.requires_grad_(False)
        self.low = nn.Parameter(torch.ones(5, dtype=torch.bfloat16))
        self.register_buffer("mine", torch.arange(3))

    def forward(self, x):
        return self.net(x) + self.low.float().sum()


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> tuple[Path, Plain, str]:
    """Of a job that has ended: only its snapshots, its last model, and the sum of it."""
    folder = tmp_path_factory.mktemp("job")
    (folder / "run").mkdir()
    module = Plain()
    with running_job(folder / "run") as running:
        whole_life(running.client(0, module), 12)
        summary = running.finish()
    shutil.copytree(folder / "run" / "snapshots", folder / "alone" / "snapshots")
    return folder / "alone", module, summary["global_sha256"]


def test_a_checkpoint_loads_in_plain_lightning_and_is_the_model(job, tmp_path, capsys):
    run_dir, module, sha256 = job
    assert main(["export", str(run_dir), str(tmp_path / "out.ckpt")]) == 0
    assert sha256 in capsys.readouterr().out
    loaded = Plain.load_from_checkpoint(tmp_path / "out.ckpt")
    expected = module.state_dict()
    found = loaded.state_dict()
    assert list(found) == list(expected)
    for name, value in expected.items():
        if name != "net.3.num_batches_tracked":  # each learner counts its own batches; it stays as it was at the founding
            assert found[name].dtype == value.dtype and torch.equal(found[name], value), name
    raw = torch.load(tmp_path / "out.ckpt", weights_only=True)["state_dict"]
    assert raw["tied.weight"].data_ptr() == raw["net.2.weight"].data_ptr()


def test_safetensors_and_json(job, tmp_path, capsys):
    run_dir, module, sha256 = job
    assert main(["export", str(run_dir), str(tmp_path / "out.safetensors"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["global_sha256"] == sha256 and len(told["versions"]) == 5
    tensors = load_file(tmp_path / "out.safetensors")
    assert set(tensors) == set(module.state_dict()) and torch.equal(tensors["low"], module.low.detach())


@pytest.mark.parametrize(
    ("run_dir", "out", "words"),
    [
        ("job", "out.pt", "must end in .ckpt or .safetensors"),
        ("nowhere", "out.ckpt", "there is no such folder"),
        ("empty", "out.ckpt", "holds no snapshot"),
        ("job", "nowhere/out.ckpt", "cannot be written"),
        ("torn", "out.ckpt", "no snapshot in it is whole"),
    ],
)
def test_what_cannot_be_exported_is_a_sentence(run_dir, out, words, job, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    shutil.copytree(job[0], tmp_path / "torn")
    for path in (tmp_path / "torn" / "snapshots").glob("0*/manifest.json"):
        path.write_text("{")
    folder = job[0] if run_dir == "job" else tmp_path / run_dir
    assert main(["export", str(folder), str(tmp_path / out)]) == 2
    assert words in capsys.readouterr().err
    assert not list(tmp_path.glob("**/*out*"))
